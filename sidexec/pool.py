"""The pairs of one launcher: those that wait for an execution, and who waits for one.

Responsible for which execution begins on which pair, and for keeping one pair ready
ahead of need. It has no process of its own: it asks the launcher for forks, and hears
of what became of them. All of it runs in the loop's thread.
"""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable
from typing import Deque

from . import protocol
from .loop import Loop, Timer
from .pair import Owner, Pair, Pids
from .supervision import Supervision

FDS_PER_PAIR = 4
# How long a fork ahead leaves the processors to the snippet that has just started.
AHEAD_AFTER = 0.003


class Pool(Owner):
    def __init__(
        self, loop: Loop, send: Callable[[bytes], None], on_idle: Callable[[], None]
    ) -> None:
        self.forks_ahead = False
        self._loop = loop
        self._send = send
        self._on_idle = on_idle
        self._can_fork = False
        self._pending = 0  # forks asked for that have neither come nor been refused
        self._ahead: Timer | None = None
        self._waiting: Deque[Supervision] = collections.deque()
        self._spares: Deque[Pair] = collections.deque()
        self._pairs: dict[int, Pair] = {}
        self._running: set[Supervision] = set()

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._waiting

    # -- what executions want

    def request(self, supervision: Supervision) -> None:
        """Have `supervision` begin on a pair, or be refused one, as soon as can be."""
        self._running.add(supervision)
        self._waiting.append(supervision)
        self._assign()

    def cancel(self, supervision: Supervision) -> None:
        """`supervision` needs no pair any more."""
        self._waiting.remove(supervision)

    def release(self, supervision: Supervision, pair: Pair | None) -> None:
        """`supervision` has ended, and `pair` with it."""
        self._running.discard(supervision)
        if pair is not None:
            self._forget(pair)
        if self.is_idle and not self.forks_ahead:
            self._on_idle()

    def _assign(self) -> None:
        while self._waiting and self._spares:
            pair = self._spares.popleft()
            pair.owner = supervision = self._waiting.popleft()
            supervision.begin(pair)
        self._fork_what_is_needed()

    def _fork_what_is_needed(self) -> None:
        if not self._can_fork:
            return
        while self._pending < len(self._waiting):
            self._pending += 1
            self._send(protocol.pack(protocol.FORK))
        if self._ahead is None and self._wants_spare():
            self._ahead = self._loop.at(time.monotonic() + AHEAD_AFTER, self._fork_ahead)

    def _wants_spare(self) -> bool:
        return self.forks_ahead and not self._pending and not self._spares

    def _fork_ahead(self) -> None:
        self._ahead = None
        if self._wants_spare():
            self._pending += 1
            self._send(protocol.pack(protocol.FORK_AHEAD))

    # -- what the launcher says

    def open(self) -> None:
        """The launcher takes requests from now on."""
        self._can_fork = True
        self._fork_what_is_needed()

    def add(self, keeper_pid: int, fds: list[int]) -> None:
        """It has forked a pair, of which these descriptors have come."""
        if len(fds) == FDS_PER_PAIR:
            self._pairs[keeper_pid] = Pair(self._loop, self, keeper_pid, fds)
        else:  # the kernel leaves out those that find no place
            for fd in fds:
                os.close(fd)
            self.refuse("this process has no descriptors left (see `ulimit -n`)")

    def refuse(self, reason: str) -> None:
        """It could not fork one."""
        self._pending -= 1
        if self._waiting:
            self._waiting.popleft().refuse(reason)
        # And no fork ahead, which would be refused again, until the next request.

    def lose(self, keeper_pid: int, code: int, stuck: Pids) -> None:
        """A keeper has ended without its END, and what it left has been swept."""
        pair = self._pairs.get(keeper_pid)
        if pair is not None:
            pair.hear_keeper()  # it may have said why
            if keeper_pid in self._pairs:
                pair.drain()
                pair.owner.on_lost(pair, code, stuck)

    def close(self) -> None:
        """Fork nothing any more, and let go of what waits."""
        self._can_fork = self.forks_ahead = False
        if self._ahead is not None:
            self._ahead.cancel()
        while self._spares:
            self._forget(self._spares.popleft())

    def end(self, reason: str, was_expected: bool) -> None:
        """The launcher is gone."""
        self.close()
        for pair in [*self._pairs.values()]:
            if pair.owner is self:
                self._forget(pair)
        while self._waiting:
            self._waiting.popleft().refuse(reason)
        if not was_expected:
            for each in [*self._running]:
                each.on_launcher_gone(reason)

    def _forget(self, pair: Pair) -> None:
        pair.close()
        self._pairs.pop(pair.keeper_pid, None)

    # -- the owner of pairs on which nothing runs yet

    def on_ready(self, pair: Pair) -> None:
        self._pending -= 1
        if self._can_fork and (self._waiting or not self._spares):
            self._spares.append(pair)
            self._assign()
        else:
            self._forget(pair)  # of a start that was cancelled, or stopped waiting for it

    def on_refused(self, pair: Pair, reason: str) -> None:
        self._forget(pair)
        self.refuse(reason)

    def on_keeper_gone(self, pair: Pair) -> None:
        self._forget(pair)
        if pair in self._spares:
            self._spares.remove(pair)
        else:
            self.refuse(f"the keeper ended before it was ready: {pair.fault}".rstrip(": "))

    def on_lost(self, pair: Pair, code: int, stuck: Pids) -> None:
        self.on_keeper_gone(pair)

    def on_end(self, pair: Pair, code: int | None, forced: bool, stuck: Pids) -> None:
        self.on_keeper_gone(pair)
