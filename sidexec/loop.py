"""The loop that a manager's one thread runs: descriptors, timers, posted calls.

Everything that changes an execution's state runs here, in one thread, so none of
it needs a lock. Other threads, and signal handlers, post calls. The loop knows
nothing about executions, and calls nothing that a user has written.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import heapq
import itertools
import logging
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Deque

from .journal import Journal
from .waiting import Bell

Call = Callable[[], object]

# These are raised by the thread's own fault, and must reach whoever reports them.
_OWN_FAULT = {"SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"}


# For a host that has SIGPIPE end it, where a call meets the end of the loop.
NO_SIGPIPE = getattr(socket, "MSG_NOSIGNAL", 0)
MAX_TIMEOUT = 86400.0  # for `select`, which does not take just any number


class Timer:
    """A call that is due at a time of `time.monotonic()`, until it is cancelled."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        self.call: Call | None = call

    def cancel(self) -> None:
        self.call = None


class Loop:
    def __init__(self, journal: Journal, on_end: Call) -> None:
        """Raises `OSError` where the system has no descriptors left."""
        self._journal = journal
        self._on_end = on_end
        self._selector = selectors.DefaultSelector()
        try:
            self._wake, self._wake_end = socket.socketpair()
        except OSError:
            self._selector.close()
            raise
        self._wake.setblocking(False)
        self._wake_end.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_wake)
        self._watched: set[int] = set()
        self._posted: Deque[Call] = collections.deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._purge_at = 64
        self._sequence = itertools.count()
        self._unclaimed = [None]
        self._stopping = False
        self.ended = False  # no call that is posted will be made any more
        self.is_closed = False  # and its descriptors are given back
        self.ending = Bell()  # rings then

    # -- from any thread

    def post(self, call: Call) -> None:
        """Have the loop make `call`. Never blocks; after the loop's end it does nothing."""
        self._posted.append(call)
        # Each time: were it left out after another post's, a signal handler that comes
        # in between that one's append and its send would wait for ever.
        try:
            self._wake_end.send(b"\0", NO_SIGPIPE)
        except OSError:
            pass  # full, so it wakes anyway; or closed, so there is nothing to wake

    def start(self) -> None:
        """Run the loop in a thread of its own; every call but the first does nothing.

        Not by `threading.Thread`, whose start holds a lock that all threads share.
        """
        if self._unclaimed:
            _thread.start_new_thread(self._run, ())

    def close_unstarted(self) -> None:
        """Close a loop whose thread could not be started; a running one is left alone."""
        if self._claim():
            self._close()

    # -- from the loop's own thread

    def stop(self) -> None:
        self._stopping = True

    def at(self, when: float, call: Call) -> Timer:
        if len(self._timers) >= self._purge_at:
            self._timers = [each for each in self._timers if each[2].call is not None]
            heapq.heapify(self._timers)
            self._purge_at = 2 * len(self._timers) + 64
        timer = Timer(call)
        heapq.heappush(self._timers, (when, next(self._sequence), timer))
        return timer

    def watch(self, fd: int, call: Call, *, writing: bool = False) -> None:
        """Make `call` whenever `fd` can be read, or with `writing` written, too."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
        if fd in self._watched:
            self._selector.modify(fd, events, call)
        else:
            self._selector.register(fd, events, call)
            self._watched.add(fd)

    def unwatch(self, fd: int) -> None:
        # Before the descriptor is closed: where a process that the host has forked
        # holds a copy, closing alone would leave it in the selector.
        if fd in self._watched:
            self._watched.remove(fd)
            self._selector.unregister(fd)

    # -- the thread

    def _run(self) -> None:
        if not self._claim():
            return
        own_fault = {getattr(signal, name) for name in _OWN_FAULT}
        # A signal meant for the host must not come here, where no handler can run.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - own_fault)
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._timeout()):
                    if not self._call(key.data):
                        self.unwatch(key.fd)  # or it would fail again and again
                self._run_posted()
                self._run_timers()
        except Exception:  # such as of descriptors that somebody else has closed
            self._report_fault()
        finally:
            self._close()

    def _claim(self) -> bool:
        """Whether the loop is the caller's to run: true once."""
        try:
            self._unclaimed.pop()
            return True
        except IndexError:
            return False

    def _close(self) -> None:
        self.ended = True  # before the last look, so that no post can fall in between
        self._run_posted()
        for each in (self._selector, self._wake_end, self._wake):
            with contextlib.suppress(OSError):
                each.close()
        self.is_closed = True
        self.ending.ring()
        self._call(self._on_end)

    def _call(self, call: Call) -> bool:
        try:
            call()
            return True
        except Exception:
            # A fault of ours: whatever it was about, the other executions go on.
            self._report_fault()
            return False

    def _report_fault(self) -> None:
        self._journal.log(logging.ERROR, "internal error\n%s", traceback.format_exc())

    def _on_wake(self) -> None:
        try:
            self._wake.recv(4096)
        except BlockingIOError:
            pass

    def _run_posted(self) -> None:
        for _ in range(len(self._posted)):
            self._call(self._posted.popleft())

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.call is not None:
                self._call(timer.call)

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return min(max(0.0, self._timers[0][0] - time.monotonic()), MAX_TIMEOUT)
