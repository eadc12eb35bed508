"""The other side: what runs in the launcher, the keepers and the snippets.

The host never imports this package. It sends the modules' code over a socket to an
interpreter that it has started, which runs them under the same names and then
takes them out of `sys.modules`, so that the user's code finds no package of ours.

    host ── FORK ─────▶ launcher        one per manager and environment
    host ◀─ PAIR ────── launcher        a keeper and a snippet, by four descriptors:
    host ── STOP ─────▶ keeper            control   (socket, keeper)
    host ◀─ READY, END ─ keeper           channel   (socket, snippet)
    host ── RUN ──────▶ snippet           output and error output (pipes, snippet)
    host ◀─ PROGRESS, RESULT, ERROR ─ snippet

`protocol` says what stands in each frame. An execution, in order:

1. FORK: the launcher forks a keeper, which forks a snippet and says READY. This
   happens ahead of need, so the pair is most often there.
2. RUN goes straight to the waiting snippet, which runs the code.
3. PROGRESS and RESULT come as the code reports them, and RESULT or ERROR at its end.
4. STOP, the end of the control socket, of the launcher or of the host make the
   keeper ask the snippet, and kill it when the grace period is over.
5. When nothing of the tree is left, the keeper says END, with the exit code.
   If the keeper is killed, the launcher sweeps the tree and says LOST.
"""
