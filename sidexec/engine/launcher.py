"""A launcher as the host sees it, and the thread that reads from it.

The thread starts the interpreter, passes what it says to pairs and requests, and ends it.
`requests` decides which request a pair takes; the pair's own thread does the rest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from .. import procfs, protocol
from . import thread
from .descriptors import close_all
from .execution import Execution
from .pair import LOOK_INTERVAL, NO_DESCRIPTORS, Pair
from .process import EXIT_LIMIT, Environment, Process
from .requests import Requests
from .waiting import Bell, log, monotonic, native, note_end, start_thread

logger = logging.getLogger(__name__)

FDS_PER_PAIR = 4
# How long an interpreter may take to come up and to load what it is to preload, in seconds.
BOOT_LIMIT = 60.0


class Settings(NamedTuple):
    """What all launchers of a manager have in common."""

    python: str
    cwd: str | None
    preload: tuple[str, ...]
    grace: float


class Launcher:
    def __init__(
        self,
        settings: Settings,
        environment: Environment,
        identity: object,
        on_gone: Callable[[Launcher], None],
    ) -> None:
        """Starts nothing: that is `boot`."""
        self.environment = environment
        self.identity = identity
        self.grace = settings.grace
        self.is_up = True  # it takes requests
        self.is_gone = False
        self.changed = Bell()  # when it is gone, or one of its pairs
        self._settings = settings
        self._on_gone = on_gone
        self._unstarted = [None]
        self.requests = Requests(self._ask)
        self._is_loaded = False
        self._running: dict[str, Execution] = {}
        self._pairs: dict[int, Pair] = {}
        self._process: Process | None = None
        self._failure: str | None = None

    # -- from any thread

    def boot(self) -> None:
        """Start the thread that starts the interpreter; only the first call does anything."""
        if self._unstarted:
            start_thread(self._run)

    def discard(self) -> None:
        """Have it never start, unless its thread has begun."""
        try:
            self._unstarted.pop()
        except IndexError:
            return
        self.is_up = False  # whoever has found it until now goes to another one
        self._leave()

    def submit(self, execution: Execution) -> bool:
        """Hand it to a pair that is ready, or queue it; returns whether a pair has it.

        What is queued is begun or refused later; if this launcher is not up, perhaps neither.
        """
        self._running[execution.id] = execution
        process = self._process
        if execution.umask is None and process is not None:
            execution.umask = process.umask()
        is_placed = self.requests.put(execution)
        execution.is_queued = True
        return is_placed

    def withdraw(self, execution: Execution) -> None:
        """It has ended, or will not begin here."""
        if self._running.pop(execution.id, None) is not None and not self.requests.keeps_spare:
            self.let_go()

    def let_go(self) -> None:
        """End it as soon as nothing runs on it."""
        self.requests.keeps_spare = False
        if not self._running and not self.is_gone:
            self.retire()

    def is_through(self) -> bool:
        """Whether it is gone, and so are its pairs: no thread of it has anything left to do."""
        return self.is_gone and not self._pairs

    def is_stopped(self) -> bool:
        process = self._process
        return process is not None and procfs.is_stopped(process.pid)

    def abandon_if_cut_off(self) -> bool:
        """Give this launcher up where the host has closed all descriptors; whether it has."""
        process = self._process
        if process is None or not process.is_cut_off():
            return False
        self.abandon("can't be reached: this process has closed its descriptors")
        process.kill()
        # What is left of it is closed by number: the next one's files must not have that by then.
        self.changed.wait_for(self.is_through, EXIT_LIMIT)
        return True

    def abandon(self, reason: str) -> None:
        """Give this launcher up, as it does not answer; what runs on it may go on."""
        pid = None if self._process is None else self._process.pid
        self._failure = self._failure or f"the launcher (pid {pid}) {reason}"
        self.is_up = self.requests.keeps_spare = False
        self.requests.refuse_all(self._failure)

    def retire(self) -> None:
        """End it once its keepers have ended; the bell rings when it has."""
        self.is_up = self.requests.keeps_spare = False
        self.discard()
        self._let_go_of_spares()
        process = self._process
        # Else a start has come in between: `withdraw` sees to it once that has ended.
        if process is not None and not self._running:
            process.quit(at_once=not self._is_loaded)

    # -- from the thread of a pair

    def why_ended(self) -> str | None:
        """Why the process has ended, which it is known to have, or to do just now."""
        self.changed.wait_for(lambda: self.is_gone, EXIT_LIMIT)
        return self._failure

    def kill_keeper(self, pid: int) -> None:
        """End a keeper that does not answer; what it leaves is swept, and then LOST."""
        self._send(protocol.pack(protocol.KILL, str(pid).encode()))

    def release(self, pair: Pair) -> None:
        """The thread of `pair` needs nothing any more; a second call does nothing."""
        if self._pairs.get(pair.keeper_pid) is pair:  # its number may be another one's by now
            note_end()
            del self._pairs[pair.keeper_pid]
        self.changed.ring()

    # -- asking the process

    def _ask(self, kind: bytes) -> None:
        self._send(protocol.pack(kind))

    def _send(self, frame: bytes) -> None:
        process = self._process
        until = monotonic() + LOOK_INTERVAL
        while process is not None and not process.send(frame) and monotonic() < until:
            native("time", "sleep")(0.001)

    # -- its own thread

    def _run(self) -> None:
        try:
            self._unstarted.pop()
        except IndexError:
            return  # another call was first
        python = self._settings.python
        try:
            config = {
                "preload": self._settings.preload,
                "grace": self.grace,
                "host": os.getpid(),
                "cwd": self._settings.cwd,
            }
            self._process = Process(python, self.environment, config)
            if not self.is_up:
                self._process.kill()  # `retire` may have found no process yet
            self._serve(self._process)
        except OSError as error:
            self._failure = _explain(error, python)
        except Exception as error:
            self._failure = f"internal error: {error!r}"
            message = "internal error in the thread of a launcher"
            log(logger, logging.ERROR, message, exc_info=True)
        finally:
            self._end()

    def _serve(self, process: Process) -> None:
        loaded_by = monotonic() + BOOT_LIMIT
        while True:
            limit = None if self._is_loaded else loaded_by - monotonic()
            frames = process.hear(limit)
            if frames is None:
                return
            if process.is_greeted:
                self.requests.open()
            for kind, text in frames:
                if kind == protocol.LOADED:
                    self._failure = text or None
                    self._is_loaded = not text
                elif kind == protocol.PAIR:
                    self._add_pair(process, text)
                elif kind == protocol.REFUSED:
                    is_ahead, _, reason = text.partition(" ")
                    self.requests.miss(is_ahead == "1", reason)
                elif kind == protocol.FAULT:
                    self._failure = f"the launcher (pid {process.pid}) has failed: {text}"
                    log(logger, logging.ERROR, "%s", self._failure)
                elif kind == protocol.SWEEPING:
                    for each in list(self._pairs.values()):
                        each.swept_at = monotonic()
                elif kind == protocol.LOST:
                    pid, code, *stuck = map(int, text.split())
                    pair = self._pairs.get(pid)
                    if pair is not None:
                        pair.lost = code, tuple(stuck)
                        pair.wake()
            if not self._is_loaded and monotonic() >= loaded_by:
                python = self._settings.python
                self._failure = f"the interpreter {python!r} was not up after {BOOT_LIMIT:g} s"
                return

    def _add_pair(self, process: Process, text: str) -> None:
        """A keeper has been forked: the thread of its pair begins."""
        keeper_pid, is_ahead = map(int, text.split())
        fds = process.fds[:FDS_PER_PAIR]
        del process.fds[:FDS_PER_PAIR]
        if len(fds) < FDS_PER_PAIR:  # the kernel leaves out those that find no place
            close_all(fds)
            self.requests.miss(is_ahead == 1, NO_DESCRIPTORS)
            return
        pair = self._pairs[keeper_pid] = Pair(keeper_pid, fds, is_ahead == 1)
        try:
            start_thread(thread.main, pair, self)
        except RuntimeError as problem:
            self._pairs.pop(keeper_pid).close()
            self.requests.miss(
                is_ahead == 1, f"could not start a thread for the execution: {problem}"
            )

    def _end(self) -> None:
        """The process has ended, or has to: release everything."""
        was_expected = not self.is_up and self._failure is None
        self.is_up = False
        try:
            if self._process is not None:
                if not self._is_loaded:
                    self._process.kill_tree()
                how = self._process.end()
                if self._failure is None:
                    self._failure = self._process.failure or self._describe_exit(how)
            if not was_expected:
                self.requests.refuse_all(self._failure or "")
                for pair in list(self._pairs.values()):
                    pair.launcher_fault = self._failure
                    pair.wake()
        finally:
            self._let_go_of_spares()
            note_end()
            self._leave()

    def _leave(self) -> None:
        """Say that it is gone; without a thread of its own, the caller's says so."""
        self._on_gone(self)
        self.is_gone = True
        self.changed.ring()

    def _let_go_of_spares(self) -> None:
        self.requests.close()
        # All that wait: one that a start took, and was interrupted, is among no spares.
        for pair in list(self._pairs.values()):
            pair.release()

    def _describe_exit(self, how: str) -> str:
        process = self._process
        assert process is not None
        if self._is_loaded:
            return f"the launcher (pid {process.pid}) of this execution is gone: {how}"
        said = f": {process.said}" if process.said else ""
        if process.is_greeted and self._settings.preload:
            return f"the launcher has ended while it imported the modules of preload ({how}){said}"
        return (
            f"the interpreter {self._settings.python!r} did not start ({how}); it must be a"
            f" Python 3.10 or newer{said}"
        )


def _explain(error: OSError, python: str) -> str:
    if isinstance(error, FileNotFoundError) and error.filename == python:
        return f"no such interpreter: {python!r}; pass the path of a Python 3.10 or newer"
    if isinstance(error, PermissionError) and error.filename == python:
        return f"the interpreter {python!r} can't be executed: check its permissions"
    return f"could not start the interpreter {python!r}: {error}"
