"""The sweep: SIGKILL for whatever is left, until nothing is.

Responsible for signalling no process but descendants of this one. The number of a
child of its own stays the child's until it is reaped. That of any other process may be
somebody else's by the time that it is signalled: `_kill_below` has more to say on this.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import time

from .. import procfs
from . import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# How long a process may take to end after SIGKILL before it counts as stuck.
STUCK_AFTER = 2.0


def kill_all(find: Callable[[], set[int] | None], wait: Callable[[], object]) -> set[int]:
    """Kill what `find` names until it says None; returns the pids that can't be killed.

    `find` names unreaped children, or a group by its negative number. However long the
    sweep takes, it goes on for as long as anything ends or turns up.
    """
    last: set[int] | None = None
    until = 0.0
    searched: set[int] = set()
    while True:
        found = find()
        if found is None:
            return set()
        now = time.monotonic()
        # Not in the first round: most often there is nothing below what is left.
        if last is not None:
            for pid in found - searched:
                _kill_below(pid)
            searched |= found
        if found != last:
            last, until = found, now + STUCK_AFTER
        elif found and now >= until:
            return found
        for pid in found:
            kernel.signal_process(pid, _signal.SIGKILL)
        # In rounds: what is forked meanwhile turns up in the next one.
        wait()


def _kill_below(pid: int) -> None:
    """Kill the descendants of a child, as far as they can be found.

    A pidfd is opened first, and then the process is looked at. If it is the child of
    one that is known to be a descendant, and that one's number has not been given to
    another since, then the pidfd is a descendant's, or of a process that has ended.
    """
    known: list[tuple[int, int | None]] = [(pid, None)]
    while known:
        parent, parent_fd = known.pop()
        for child in procfs.children(parent):
            fd = kernel.open_pidfd(child)
            if fd is not None:
                if procfs.parent_of(child) == parent and _send(parent_fd, 0):
                    known.append((child, fd))
                else:
                    os.close(fd)
        if parent_fd is not None:
            _send(parent_fd, _signal.SIGKILL)
            os.close(parent_fd)


def _send(pidfd: int | None, signum: int) -> bool:
    """Signal a descendant; whether it is not reaped yet, as a child (None) never is here."""
    try:
        if pidfd is not None:
            _signal.pidfd_send_signal(pidfd, signum)
        return True
    except OSError:
        return False
