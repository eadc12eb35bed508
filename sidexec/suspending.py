"""Signals to a whole tree of processes, to suspend and to resume it.

Each process is signalled by a pidfd, which is opened before its parent is checked: so a
pid that has been reused is never signalled. Without /proc or pidfds nothing is.
"""

from __future__ import annotations

import contextlib
import os
import signal

from . import procfs
from .engine.execution import Execution


def signal_all(executions: list[Execution], signum: int) -> None:
    for execution in executions:
        if execution.owner is not None:
            signal_tree(execution.owner.keeper_pid, signum)


def signal_tree(keeper_pid: int, signum: int) -> None:
    """Signal all descendants of the keeper, and not the keeper itself.

    From the top down: a stopped parent can't fork a child that would be missed.
    """
    launcher_pid = procfs.parent_of(keeper_pid)
    if launcher_pid is None or procfs.parent_of(launcher_pid) != os.getpid():
        return
    parents = [keeper_pid]
    while parents:
        parent = parents.pop()
        for pid in procfs.children(parent):
            if _signal_child(pid, parent, signum):
                parents.append(pid)


def _signal_child(pid: int, parent: int, signum: int) -> bool:
    with contextlib.suppress(AttributeError, OSError):
        pidfd = os.pidfd_open(pid)
        try:
            if procfs.parent_of(pid) == parent:
                signal.pidfd_send_signal(pidfd, signum)
                return True
        finally:
            os.close(pidfd)
    return False
