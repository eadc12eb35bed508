"""A launcher as the host sees it: starts one, and has it fork keepers.

Responsible for the launcher's process, for its pairs until an execution begins on
them, and for keeping one ready ahead of need. All of it runs in the loop's thread.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Deque

from . import payload, protocol
from .execution import describe_exit
from .interpreter import Interpreter
from .loop import Loop, Timer
from .pair import Owner, Pair, Pids
from .supervision import Supervision

# How long an interpreter may take to come up and to load what it is to preload.
BOOT_LIMIT = 60.0
EXIT_LIMIT = 5.0
EXIT_INTERVAL = 0.02
FDS_PER_PAIR = 4
# How long a fork ahead leaves the processors to the snippet that has just started.
AHEAD_AFTER = 0.003


class Launcher(Owner):
    def __init__(
        self,
        loop: Loop,
        python: str,
        environment: dict[str, str],
        config: dict[str, Any],
        on_idle: Callable[[Launcher], None],
        on_gone: Callable[[Launcher], None],
    ) -> None:
        self.environment = environment
        self.forks_ahead = False
        self.is_up = True
        self._loop = loop
        self._python = python
        self._config = config
        self._on_idle = on_idle
        self._on_gone = on_gone
        self._inbox = protocol.Inbox(protocol.FROM_LAUNCHER)
        self._greeting = b""
        self._is_loaded = False
        self._has_ended = False
        self._failure: str | None = None
        self._unsent = b""
        self._said = b""  # the end of what it has written to its standard error
        self._fds: list[int] = []
        self._pending = 0  # forks asked for that have neither come nor been refused
        self._ahead: Timer | None = None
        self._waiting: Deque[Supervision] = collections.deque()
        self._spares: Deque[Pair] = collections.deque()
        self._pairs: dict[int, Pair] = {}
        self._running: set[Supervision] = set()

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._waiting

    # -- the process

    def boot(self) -> None:
        """Start the interpreter; raises `OSError` where the system does not let it."""
        payload.load()  # now, where it may still raise
        self._socket, theirs = socket.socketpair()
        try:
            self._errors, errors_end = os.pipe()
            try:
                arguments = ["-u", "-c", payload.BOOT]
                self._process = Interpreter(
                    self._python, arguments, self.environment, theirs.fileno(), errors_end
                )
            except BaseException:
                os.close(self._errors)
                raise
            finally:
                os.close(errors_end)
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        os.set_blocking(self._errors, False)
        self._socket.setblocking(False)
        self._limit = self._loop.at(time.monotonic() + BOOT_LIMIT, self._on_boot_limit)
        self._loop.watch(self._socket.fileno(), self._on_socket)
        self._loop.watch(self._errors, self._on_errors)
        try:
            # A worker that the host forks just now holds the launcher's end of the
            # socket as well, which then never comes to its end of file.
            self._pidfd = os.pidfd_open(self._process.pid)
            self._loop.watch(self._pidfd, self._on_exit)
        except (AttributeError, OSError):
            self._pidfd = -1

    def retire(self) -> None:
        """Have it end once its keepers have; `on_gone` is called when it has."""
        self._drop_spares()
        self.forks_ahead = False
        if self._ahead is not None:
            self._ahead.cancel()
        if self.is_up:
            self.is_up = False
            self._limit.cancel()
            if self._is_loaded:
                with contextlib.suppress(OSError):  # it may have ended meanwhile
                    self._socket.shutdown(socket.SHUT_WR)
                self._limit = self._loop.at(time.monotonic() + EXIT_LIMIT, self._on_exit_limit)
                self._look_for_exit()
            else:
                self._end()  # there is no keeper yet to wait for

    def kill_keeper(self, pid: int) -> None:
        """End a keeper that does not answer; what it leaves is swept, and then LOST."""
        self._send(protocol.pack(protocol.KILL, str(pid).encode()))

    def _on_boot_limit(self) -> None:
        self._failure = f"the interpreter {self._python!r} was not up after {BOOT_LIMIT:g} s"
        self._end()

    def _on_exit_limit(self) -> None:
        self._process.kill()
        self._end()

    def _look_for_exit(self) -> None:
        """What a pidfd tells by itself."""
        if self._pidfd < 0 and not self._has_ended:
            if self._process.poll() is None:
                self._loop.at(time.monotonic() + EXIT_INTERVAL, self._look_for_exit)
            else:
                self._end()

    def _on_exit(self) -> None:
        while not self._has_ended and self._on_socket():
            pass
        self._end()

    def _on_errors(self) -> bool:
        """Read what it says while it comes up, which it would wait for otherwise."""
        if self._errors < 0:
            return False  # closed by an earlier event of the same round
        try:
            data = os.read(self._errors, 65536)
        except BlockingIOError:
            return False
        self._said = (self._said + data)[-2000:]
        if not data:
            self._loop.unwatch(self._errors)
        return bool(data)

    def _on_socket(self) -> bool:
        """Handle what the launcher has sent; whether there was anything."""
        if self._unsent:
            unsent, self._unsent = self._unsent, b""
            self._send(unsent)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, 65536, 16 * FDS_PER_PAIR, flags)
        except BlockingIOError:
            return False
        except OSError:
            data, fds = b"", []
        self._fds += fds
        if len(self._greeting) < payload.GREETING:
            self._greeting += data
            if len(self._greeting) >= payload.GREETING:
                self._answer_greeting()
        else:
            try:
                frames = self._inbox.feed(data)
            except protocol.ProtocolError as error:
                self._failure = f"the interpreter {self._python!r} answers with {error}"
                self._process.kill()
                data, frames = b"", []
            for kind, body in frames:
                self._on_frame(kind, body.decode("utf-8", "replace"))
        if not data:
            self._end()
        return bool(data)

    def _answer_greeting(self) -> None:
        try:
            modules = payload.pack(self._greeting, self._config)
        except Exception as error:  # such as a package without its source, for another version
            self._failure = f"could not read this package's own code: {error}"
            self._process.kill()
            return
        self._send(modules)
        self._fork_what_is_needed()

    def _on_frame(self, kind: bytes, text: str) -> None:
        if kind == protocol.LOADED:
            self._limit.cancel()
            self._is_loaded = not text
            self._failure = text or None
        elif kind == protocol.PAIR:
            self._on_pair(int(text))
        elif kind == protocol.REFUSED:
            self._on_refusal(text)
        elif kind == protocol.LOST:
            pid, code, *stuck = map(int, text.split())
            pair = self._pairs.get(pid)
            if pair is not None:
                pair.drain()
                pair.owner.on_lost(pair, code, tuple(stuck))

    def _end(self) -> None:
        """The process has ended, or is to: let go of all that there was of it."""
        if self._has_ended:
            return
        self._has_ended = True
        was_expected = not self.is_up
        self.is_up = False
        self._limit.cancel()
        self._loop.unwatch(self._socket.fileno())
        self._socket.close()
        if self._pidfd >= 0:
            self._loop.unwatch(self._pidfd)
            os.close(self._pidfd)
        if not self._is_loaded:
            self._process.kill_group()  # a script, perhaps, with children of its own
        code = self._process.wait(EXIT_LIMIT)
        while self._on_errors():
            pass
        failure = self._failure or self._describe_exit(code)
        self._loop.unwatch(self._errors)
        os.close(self._errors)
        self._errors = -1
        for fd in self._fds:
            os.close(fd)
        self._drop_spares()
        for pair in [*self._pairs.values()]:
            if pair.owner is self:
                self._forget(pair)
        while self._waiting:
            self._waiting.popleft().refuse(failure)
        if not was_expected:
            for each in [*self._running]:
                each.on_launcher_gone(failure)
        self._on_gone(self)

    def _describe_exit(self, code: int | None) -> str:
        how = "the kernel does not let go of it" if code is None else describe_exit(code)
        if self._is_loaded:
            return f"the launcher (pid {self._process.pid}) of this execution is gone: {how}"
        said = self._said.decode("utf-8", "replace").strip()
        return (
            f"the interpreter {self._python!r} did not start ({how}); it must be a"
            f" Python 3.9 or newer{': ' if said else ''}{said}"
        )

    def _send(self, data: bytes) -> None:
        if self._socket.fileno() < 0:
            return
        self._unsent += data
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = b""  # it has ended, as the end of the file will say
        self._loop.watch(self._socket.fileno(), self._on_socket, writing=bool(self._unsent))

    # -- pairs

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
        if self.is_up and self.is_idle and not self.forks_ahead:
            self._on_idle(self)

    def _assign(self) -> None:
        while self._waiting and self._spares:
            pair = self._spares.popleft()
            pair.owner = supervision = self._waiting.popleft()
            supervision.begin(pair)
        self._fork_what_is_needed()

    def _fork_what_is_needed(self) -> None:
        if not self.is_up or len(self._greeting) < payload.GREETING:
            return
        while self._pending < len(self._waiting):
            self._pending += 1
            self._send(protocol.pack(protocol.FORK))
        if self._ahead is None and self._wants_spare():
            self._ahead = self._loop.at(time.monotonic() + AHEAD_AFTER, self._fork_ahead)

    def _wants_spare(self) -> bool:
        return self.forks_ahead and self.is_up and not self._pending and not self._spares

    def _fork_ahead(self) -> None:
        self._ahead = None
        if self._wants_spare():
            self._pending += 1
            self._send(protocol.pack(protocol.FORK_AHEAD))

    def _on_pair(self, keeper_pid: int) -> None:
        fds, self._fds = self._fds[:FDS_PER_PAIR], self._fds[FDS_PER_PAIR:]
        if len(fds) == FDS_PER_PAIR:
            self._pairs[keeper_pid] = Pair(self._loop, self, keeper_pid, fds)
        else:  # the kernel leaves out those that find no place
            for fd in fds:
                os.close(fd)
            self._on_refusal("this process has no descriptors left (see `ulimit -n`)")

    def _on_refusal(self, reason: str) -> None:
        self._pending -= 1
        if self._waiting:
            self._waiting.popleft().refuse(reason)
        # And no fork ahead, which would be refused again, until the next request.

    def _forget(self, pair: Pair) -> None:
        pair.close()
        self._pairs.pop(pair.keeper_pid, None)

    def _drop_spares(self) -> None:
        while self._spares:
            self._forget(self._spares.popleft())

    # -- the owner of pairs on which nothing runs yet

    def on_ready(self, pair: Pair) -> None:
        self._pending -= 1
        if self.is_up and (self._waiting or not self._spares):
            self._spares.append(pair)
            self._assign()
        else:
            self._forget(pair)  # of a start that was cancelled, or stopped waiting for it

    def on_refused(self, pair: Pair, reason: str) -> None:
        self._forget(pair)
        self._on_refusal(reason)

    def on_keeper_gone(self, pair: Pair) -> None:
        self._forget(pair)
        if pair in self._spares:
            self._spares.remove(pair)
        else:
            self._on_refusal("the keeper ended before it was ready")

    def on_lost(self, pair: Pair, code: int, stuck: Pids) -> None:
        self.on_keeper_gone(pair)

    def on_end(self, pair: Pair, code: int | None, forced: bool, stuck: Pids) -> None:
        self.on_keeper_gone(pair)
