"""The other side: what runs in the launcher, the keepers and the snippets.

The host never imports this package. It starts an interpreter with a few lines of code
(`payload.BOOT`), which runs the modules that it is sent under the same names and then
takes them out of `sys.modules`, so that the user's code finds no package of ours. A
snippet's process returns from the launcher's frames to these lines, which call its code.

    interpreter --> host  its version                      over the launcher's socket
    interpreter <-- host  these modules
    launcher --> host     LOADED                           it is up, or why it is not
    launcher <-- host     FORK, FORK_AHEAD, KILL
    launcher --> host     PAIR, REFUSED, SWEEPING, LOST, FAULT
    keeper <-- host       STOP                             over the control socket
    keeper --> host       READY, REFUSED, SWEEPING, END, FAULT
    snippet <-- host      RUN                              over the channel, a socket
    snippet --> host      PROGRESS, RESULT, ERROR
    snippet --> host      what it prints                   over two pipes

There is one launcher for each manager and environment. PAIR carries the host's ends of
the control socket, the channel and the pipes, so that nothing of an execution passes
through the launcher. `protocol` says what each frame contains. An execution, in order:

1. FORK: the launcher forks a keeper and says PAIR; the keeper forks a snippet and says
   READY. FORK_AHEAD is the same ahead of need, so that a pair is most often there; the
   snippet then also rehearses. REFUSED says which resource was not available.
2. RUN goes straight to the snippet, which takes it as soon as it waits for it. With its first
   bytes come descriptors: of standard input, of the current directory if that has been
   removed, and of the paths of a confinement, which the snippet sets before it runs the code.
3. PROGRESS and RESULT come as the code reports them, and RESULT or ERROR at its end.
4. STOP has the keeper ask the snippet, by SIGTERM and once, and kill it when the grace
   period is over. So do the end of the control socket, of the launcher and of the host.
5. When nothing of the tree is left, the keeper says END, with the exit code and what the
   tree has used. Where a keeper was killed, or has failed (it says FAULT, and why), the
   launcher sweeps the tree and says LOST.
6. The end of its socket, or of the host, ends the launcher once its keepers have ended.
   It continues those that are stopped, and kills those that take too long.
"""
