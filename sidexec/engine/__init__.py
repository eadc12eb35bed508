"""The host's side, below the public methods of the manager.

    caller's thread                   the thread of a pair                other processes
    start: Engine.start
             Requests.put
               a spare pair     ---------------------------------------->  snippet
               is told          --->  reads output, frames and END  <----  keeper, snippet
               or none is there --->  a pair that gets ready takes it -->  snippet
    stop:  Execution.stop
             claims, and tells  ---------------------------------------->  keeper: asks, sweeps
             waits for the bell <---  tells whoever waits, last

    engine.py     which launcher a start goes to, what is remembered, closing
    launcher.py   one launcher, and the thread that reads from it
    process.py    its process: an interpreter that is started, given its code, and reaped
    requests.py   the requests that wait for a pair, and the pairs that match them
    thread.py     one execution's thread: from a ready pair to the end
    pair.py       a keeper and its snippet as descriptors
    descriptors.py   descriptors that several threads use, and closing them
    execution.py  what is known about one execution, and how it is stopped
    output.py, delivery.py   its output, and passing that to `on_output`
    input.py      its standard input
    results.py    checking the result that a snippet has sent
    waiting.py    waiting in a way that no signal handler can break
    payload.py    the other side's code, as it is sent to the launcher

Requests go down, bytes come up. Nothing here imports the manager.

State that several threads change is changed by one call of a built-in method, such as
`dict.setdefault`, `deque.popleft` or `list.append`. These are atomic without the GIL, too: each
takes the object's own lock. A counter is written by one thread only. What others may change
meanwhile is copied before it is iterated over: `list(a_dict.values())`, but `a_deque.copy()`,
since `list(a_deque)` is not atomic without the GIL.
"""
