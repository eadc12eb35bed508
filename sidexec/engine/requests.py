"""The requests of one launcher, and the pairs that take them.

A request goes to a pair that is ready ahead of need; where there is none it waits, and the
launcher is asked for one. A pair that gets ready takes a request that waits, or is the
spare one for the next. Each step is atomic, since it may come from any thread, and from a
signal handler that has interrupted the same step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..protocol import FORK, FORK_AHEAD
from .execution import NOBODY, Execution
from .pair import Pair


class Requests:
    def __init__(self, ask: Callable[[bytes], object], umask: Callable[[], int | None]) -> None:
        """`ask` sends FORK and FORK_AHEAD to the launcher; `umask` is the host's."""
        self.keeps_spare = False
        self._ask = ask
        self._umask = umask
        self._spares: deque[Pair] = deque()
        self._waiting: deque[Execution] = deque()
        self._wanted: deque[None] = deque()  # one for each pair that is still to be asked for
        self._may_fork_ahead: deque[None] = deque([None])  # taken while such a pair comes
        self._is_open = False
        self._is_closed = False

    # -- from any thread

    def put(self, execution: Execution) -> bool:
        """Have a spare pair begin it, or let it wait for a pair; whether it has begun."""
        while True:
            try:
                pair = self._spares.popleft()
            except IndexError:
                break
            if pair.hand_over(execution, self._umask()):
                return True
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

    # -- from the launcher's thread

    def open(self) -> None:
        """The launcher can be asked from now on."""
        self._is_open = True
        self._ask_for_pairs()

    def miss(self, is_ahead: bool, reason: str) -> None:
        """A pair that was asked for will not come: a request is refused for it."""
        if is_ahead:
            self._may_fork_ahead.append(None)
        else:
            self._refuse_one(reason)

    # -- from the thread of a pair

    def take(self, pair: Pair) -> Execution | None:
        """A request for `pair`, which is ready; None where none needs it."""
        execution = self._take_waiting(pair)
        if pair.is_ahead:
            self._may_fork_ahead.append(None)
        if execution is not None or self._spares or not self.keeps_spare:
            return execution
        self._spares.append(pair)
        # Looked at again: what has come meanwhile has seen no spare, or a closed launcher.
        while self._waiting or self._is_closed:
            try:
                self._spares.remove(pair)
            except ValueError:
                break  # a call has taken it
            execution = self._take_waiting(pair)
            if execution is not None or self._is_closed:
                return execution
            self._spares.append(pair)
        return pair.wait_for_request()

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

    # -- what these share

    def _take_waiting(self, pair: Pair) -> Execution | None:
        while True:
            try:
                execution = self._waiting.popleft()
            except IndexError:
                return None
            if execution.claim(pair):  # else it was withdrawn
                pair.send(execution, self._umask())
                return execution

    def _refuse_one(self, reason: str) -> bool:
        """Refuse the request that has waited longest; whether there was one."""
        try:
            execution = self._waiting.popleft()
        except IndexError:
            return False
        if execution.claim(NOBODY):
            execution.refuse(reason)
        return True

    def _ask_for_pairs(self) -> None:
        while self._is_open and self._wanted:
            try:
                self._wanted.pop()
            except IndexError:
                return  # another thread has just asked
            self._ask(FORK)
