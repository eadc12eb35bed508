"""Waiting for what another thread does, in a way that a signal handler can't break.

A handler may interrupt any call here and make the same call again, or raise. So
nobody waits for a lock that somebody could be holding: every wait has a lock of
its own, which the bell releases. (`threading.Event` and `Condition` share one
lock among their callers, and a handler that comes back in finds it taken.)
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import importlib.util
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

# Python 3.10 may crash if the interpreter ends while a thread does.
MUST_JOIN = sys.version_info < (3, 11) and hasattr(_thread, "get_native_id")
# How long to wait for threads that have nothing left to do, in seconds.
JOIN_LIMIT = 1.0
# How long to wait at a time where gevent may have replaced locks, in seconds: without a limit,
# its loop would end with `LoopExit`, since it does not know of threads that may ring.
MAX_WAIT = 3600.0

# Not `time.monotonic`, which some libraries for tests replace in their host, to freeze time.
monotonic: Callable[[], float] = time.monotonic
if hasattr(time, "clock_gettime"):
    monotonic = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)

_ending: deque[int] = deque(maxlen=64)  # threads of ours, by what the system calls them


def native(module: str, name: str) -> Any:
    """The interpreter's own `module.name`, even where gevent has replaced it.

    The engine's threads have to be threads of the system: a greenlet that waits for a
    descriptor, or for a process, would hold up everything else in its thread.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module, name)
    # Not by `importlib`: a signal handler that raises in its code leaves its lock taken, and
    # every thread of ours waits for that.
    return getattr(sys.modules.get(module) or __import__(module), name)


def native_subprocess() -> Any:
    """The module `subprocess`; where gevent has taken it apart, one of our own."""
    if "gevent.monkey" not in sys.modules:
        return importlib.import_module("subprocess")
    spec = importlib.util.find_spec("subprocess")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._USE_POSIX_SPAWN = False  # that one is gevent's
    return module


def start_thread(run: Callable[..., object], *arguments: object) -> None:
    """Call `run` in a thread of the system; raises `RuntimeError` where there are none left."""
    native("_thread", "start_new_thread")(_run, (run, arguments))


def _run(run: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Block signals in a thread of ours, so that the host's own threads get them.

    But for those that the thread's own fault raises, which must reach whoever reports them.
    """
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - faults)
    run(*arguments)


def mask() -> set[int]:
    """The calling thread's signal mask."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


@contextlib.contextmanager
def masked(mask: set[int]) -> Iterator[None]:
    """Set this thread's signal mask; threads and processes started meanwhile inherit it."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def log(
    logger: logging.Logger, level: int, message: str, *values: object, exc_info: bool = False
) -> None:
    """Log in a thread that others wait for: what a logging handler raises must not end it.

    The standard library's own handlers raise where `sys.stderr` is closed.
    """
    with contextlib.suppress(Exception):
        logger.log(level, message, *values, exc_info=exc_info, stacklevel=2)


def note_end() -> None:
    """Note that the calling thread, one of ours, is about to end; before anybody is told."""
    if MUST_JOIN:
        _ending.append(_thread.get_native_id())


def join_ending() -> None:
    """Wait until the threads that have called `note_end` have ended, if `MUST_JOIN`."""
    until = monotonic() + JOIN_LIMIT
    for id in set(_ending) - {_thread.get_native_id()}:
        while os.path.exists(f"/proc/self/task/{id}") and monotonic() < until:
            native("time", "sleep")(0.0002)
        with contextlib.suppress(ValueError):  # another thread that closes was first
            _ending.remove(id)


class Bell:
    """Any number of threads wait for a condition; one thread rings when it may hold."""

    def __init__(self) -> None:
        self._waiting: dict[int, _thread.LockType] = {}

    def ring(self) -> None:
        """Make all waiting threads check their condition. Never blocks."""
        while self._waiting:
            try:
                _, lock = self._waiting.popitem()
            except KeyError:
                break
            lock.release()

    def wait_for(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until `condition()` holds, at most `timeout` seconds; whether it does."""
        if condition():
            return True
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            lock = _thread.allocate_lock()
            lock.acquire()
            self._waiting[id(lock)] = lock
            try:
                # Checked after the lock is registered, so that no ring in between is missed.
                if condition():
                    return True
                if sys.is_finalizing():
                    return False  # no other thread runs any more, so none will ring
                left = MAX_WAIT if "gevent.monkey" in sys.modules else -1.0
                if deadline is not None:
                    left = deadline - monotonic()
                    if left <= 0:
                        return False
                    left = min(left, _thread.TIMEOUT_MAX)
                lock.acquire(timeout=left)
            finally:
                self._waiting.pop(id(lock), None)
