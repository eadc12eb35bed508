"""The sweep: SIGKILL for whatever is left, until nothing is.

It signals only descendants of this process. A child's pid stays the child's until it is
reaped; deeper down it could be another process's by now, which `procfs.signal_below` prevents.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import time

from .. import procfs
from . import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# How many rounds a process may take to end after SIGKILL before it counts as stuck: five
# seconds, or as much longer as a busy machine takes for the rounds, and for its end.
STUCK_AFTER = 1000
ROUND = 0.005
# How often to tell the host of a sweep, in seconds.
SIGN_INTERVAL = 1.0


def kill_all(
    find: Callable[[], set[int] | None], wait: Callable[[], object], sign: Callable[[], object]
) -> set[int]:
    """Kill what `find` names until it says None; returns the pids that can't be killed.

    `find` names unreaped children, or a group by its negative number; `wait` waits for one
    to end, at most `ROUND` seconds. However long the sweep takes, it goes on for as long as
    anything ends or turns up, and `sign` tells the host of it.
    """
    last: set[int] | None = None
    rounds = 0
    sign_at = 0.0
    searched: set[int] = set()
    while True:
        found = find()
        if found is None:
            return set()
        # Not in the first round: most often there is nothing below what is left.
        if last is not None:
            for pid in found - searched:
                procfs.signal_below(pid, _signal.SIGKILL)
            searched |= found
        rounds = rounds + 1 if found == last else 0
        last = found
        if found and rounds >= STUCK_AFTER:
            return found
        for pid in found:
            kernel.signal_process(pid, _signal.SIGKILL)
        now = time.monotonic()
        if now >= sign_at:
            sign_at = now + SIGN_INTERVAL
            sign()
        # In rounds: what is forked meanwhile turns up in the next one.
        wait()
