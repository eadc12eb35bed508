"""The requests of one launcher, and the pairs that take them.

A request goes to a pair that is ready ahead of need; where there is none it waits, and the
launcher is asked for one. A pair that gets ready takes a waiting request, or is kept as the
spare for the next one. Each step is atomic, since it may come from any thread, and from a
signal handler that has interrupted the same step.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable

from ..protocol import FORK, FORK_AHEAD
from .execution import NOBODY, Execution
from .pair import Pair


class Requests:
    def __init__(self, ask: Callable[[bytes], object]) -> None:
        """`ask` sends FORK and FORK_AHEAD to the launcher."""
        self.keeps_spare = False  # if so, the launcher stays up when nothing runs on it
        self._ask = ask
        self._spares: deque[Pair] = deque()
        self._waiting: deque[Execution] = deque()
        self._wanted: deque[None] = deque()  # one for each pair that is still to be asked for
        self._coming: deque[None] = deque()  # one for each pair that was, until it is there
        self._may_fork_ahead: deque[None] = deque([None])  # taken while one comes ahead of need
        self._is_open = False
        self._is_closed = False

    # -- from any thread

    def put(self, execution: Execution) -> bool:
        """Hand it to a spare pair, or queue it; returns whether a spare pair has it."""
        while True:
            try:
                pair = self._spares.popleft()
            except IndexError:
                break
            try:
                if pair.hand_over(execution):
                    return True
            except BaseException:  # a signal handler's: nobody else knows of this pair
                pair.release()
                raise
        self._waiting.append(execution)
        self._wanted.append(None)
        self._ask_for_pairs()
        return False

    def refuse_all(self, reason: str) -> None:
        while self._refuse_one(reason):
            pass

    def close(self) -> None:
        """Keep no spare pair from here on."""
        self._is_closed = True
        self._spares.clear()

    # -- from the launcher's thread, and `miss` from that of a pair, too

    def open(self) -> None:
        """The launcher can be asked from now on; a further call does nothing."""
        self._is_open = True
        self._ask_for_pairs()

    def miss(self, is_ahead: bool, reason: str) -> None:
        """A pair that was asked for will not come: a request is refused for it.

        None is refused if a pair that was forked ahead has taken one meanwhile, so that those
        still to come are enough for the rest.
        """
        self._has_come(is_ahead)
        if not is_ahead and len(self._coming) + len(self._wanted) < len(self._waiting):
            self._refuse_one(reason)

    # -- from the thread of a pair

    def take(self, pair: Pair) -> Execution | None:
        """Claim a request for `pair`, which is ready; None where none needs it."""
        self._has_come(pair.is_ahead)
        while True:
            execution = self._next_for(pair)
            if execution is None:
                return None
            if self._is_closed or pair.is_gone():
                execution.place()
                return None
            if execution.claim(pair):  # else it was withdrawn
                return execution

    def _next_for(self, pair: Pair) -> Execution | None:
        if self._waiting:
            with contextlib.suppress(IndexError):
                return self._waiting.popleft()
        if self._spares or not self.keeps_spare:
            return None
        self._spares.append(pair)
        # Check again: a request or a `close` that came just before did not see this spare.
        if self._waiting or self._is_closed:
            with contextlib.suppress(ValueError):  # a call has taken it just now
                self._spares.remove(pair)
                return None if self._is_closed else self._next_for(pair)
        return pair.wait_for_request()

    def fork_ahead(self) -> None:
        """See to a spare pair, once one has been taken."""
        try:
            self._may_fork_ahead.pop()
        except IndexError:
            return  # one is on its way
        # If more pairs are to come than requests wait, one of them will be the spare.
        has_spare = self._spares or len(self._coming) > len(self._waiting)
        if self.keeps_spare and not has_spare:
            self._ask(FORK_AHEAD)
        else:
            self._may_fork_ahead.append(None)

    # -- what these share

    def _has_come(self, is_ahead: bool) -> None:
        """A pair has come, or will not."""
        if is_ahead:
            self._may_fork_ahead.append(None)
        else:
            with contextlib.suppress(IndexError):
                self._coming.pop()

    def _refuse_one(self, reason: str) -> bool:
        """Refuse the request that has waited longest; whether there was one."""
        while True:
            try:
                execution = self._waiting.popleft()
            except IndexError:
                return False
            if execution.claim(NOBODY):  # else it was withdrawn
                execution.refuse(reason)
                return True

    def _ask_for_pairs(self) -> None:
        while self._is_open and self._wanted:
            try:
                self._wanted.pop()
            except IndexError:
                return  # another thread has just asked
            self._coming.append(None)
            try:
                self._ask(FORK)
            except BaseException:  # a signal handler's: it may not have been asked for
                with contextlib.suppress(IndexError):  # one has just come instead
                    self._coming.pop()
                raise
