"""This side: what happens in the host's process, below the manager's public methods.

    caller's thread                   an execution's own thread           other processes
    ───────────────                   ─────────────────────────           ───────────────
    start: Engine.start
             Launcher.submit ──────▶  takes the request from the     ──▶  snippet
             waits for the bell  ◀──  launcher's queue, sends it
    stop:  Execution.stop
             claims, and tells  ───────────────────────────────────▶  keeper asks, sweeps
             waits for the bell  ◀──  reads output, frames and END   ◀──  keeper, snippet

    engine.py     which launcher a start goes to, what is remembered, the end of it all
    launcher.py   one launcher, and the thread that hears it
    process.py    its process: an interpreter that is started, given its code, and reaped
    requests.py   the requests that wait for a pair, and the pairs that match them
    thread.py     one execution's thread: from a ready pair to the end
    pair.py       a keeper and its snippet as descriptors
    execution.py  what is known of one execution, and how it is stopped
    output.py, delivery.py   what it has written, and handing that to `on_output`
    waiting.py    waiting in a way that no signal handler can break
    payload.py    the other side's code, as it is sent to the launcher

Requests go down, bytes come up. Nothing here imports the manager.
"""
