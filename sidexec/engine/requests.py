"""The requests of one launcher, and the pairs that match them.

Every request in the queue is matched by a pair: one that is ready ahead of need, or one
that the launcher is asked to fork. Responsible for keeping the two in step, whichever of
them is withdrawn, refused or lost, and for one spare pair. Each step is atomic, since it
may come from any thread, and from a signal handler that has interrupted the same step.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from typing import Any

from ..protocol import FORK, FORK_AHEAD
from .execution import NOBODY, Execution
from .pair import Pair
from .waiting import native


class Requests:
    def __init__(self, ask: Callable[[bytes], object]) -> None:
        """`ask` sends FORK and FORK_AHEAD to the launcher."""
        self.keeps_spare = False
        self._ask = ask
        self._queue: Any = native("queue", "SimpleQueue")()
        self._spares: deque[None] = deque()  # one for each pair that is ready ahead of need
        self._may_fork_ahead: deque[None] = deque([None])  # taken while such a pair comes
        self._wanted: deque[None] = deque()  # one for each pair that is still to be asked for
        self._is_open = False

    # -- from any thread

    def put(self, execution: Execution) -> None:
        """Queue a request.

        A signal handler that raises in between leaves a pair too many, or a request that
        whoever has put it withdraws.
        """
        has_pair = self._take_spare()
        self._queue.put(execution)
        if not has_pair:
            self._want_pair()

    def refuse_all(self, reason: str) -> None:
        while not self._queue.empty():
            self.miss(False, reason)

    def close(self) -> None:
        """Have the pairs that wait for a request wait no longer."""
        self._queue.put(None)

    # -- from the launcher's thread

    def open(self) -> None:
        """The launcher can be asked from now on."""
        self._is_open = True
        self._ask_for_pairs()

    def miss(self, is_ahead: bool, reason: str) -> None:
        """A pair that was asked for will not come: a request is refused for it."""
        if is_ahead:
            self._may_fork_ahead.append(None)
            return
        try:
            execution = self._queue.get_nowait()
        except queue.Empty:
            self._take_spare()  # which has taken that request, and was counted on for another
            return
        if execution is not None and execution.claim(NOBODY):
            execution.refuse(reason)

    # -- from the thread of a pair

    def take(self, pair: Pair) -> Execution | None:
        """Wait for a request, and claim it for `pair`; None where there will be none."""
        is_spare = pair.is_ahead
        if is_spare:
            self._spares.append(None)
            self._may_fork_ahead.append(None)
        while True:
            execution: Execution | None = self._queue.get()
            if execution is None:
                self._queue.put(None)  # for the next one that waits
                return None
            if pair.is_gone():
                self._queue.put(execution)
                self._want_pair()
                return None
            if execution.claim(pair):
                return execution
            # That request was withdrawn. Where no other is left, this pair is a spare now.
            if self._queue.empty():
                self._spares.append(None)

    def fork_ahead(self) -> None:
        """See to a spare pair, once one has been taken."""
        try:
            self._may_fork_ahead.pop()
        except IndexError:
            return  # one is on its way
        if self.keeps_spare and not self._spares:
            self._ask(FORK_AHEAD)
        else:
            self._may_fork_ahead.append(None)

    # -- asking the launcher

    def _take_spare(self) -> bool:
        """Whether there is a spare pair, which is not counted as one any more."""
        try:
            self._spares.pop()
            return True
        except IndexError:
            return False

    def _want_pair(self) -> None:
        self._wanted.append(None)
        self._ask_for_pairs()

    def _ask_for_pairs(self) -> None:
        while self._is_open and self._wanted:
            try:
                self._wanted.pop()
            except IndexError:
                return  # another thread has just asked
            self._ask(FORK)
