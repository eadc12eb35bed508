"""A launcher as the host sees it: a process that is started, heard and let go.

Responsible for its interpreter coming up, for what it sends, and for its end. Which
execution begins on what it forks is the pool's business. It waits for nothing but
the end of a process that has been told to end, or is being killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from . import payload, protocol
from .execution import describe_exit
from .interpreter import Interpreter
from .journal import Journal
from .loop import Loop
from .pool import FDS_PER_PAIR, Pool

# How long an interpreter may take to come up and to load what it is to preload.
BOOT_LIMIT = 60.0
EXIT_LIMIT = 5.0
EXIT_INTERVAL = 0.02


class Launcher:
    def __init__(
        self,
        loop: Loop,
        journal: Journal,
        python: str,
        environment: dict[str, str],
        config: dict[str, Any],
        on_gone: Callable[[Launcher], None],
    ) -> None:
        self.environment = environment
        self.is_up = True
        self.pool = Pool(loop, self._send, on_idle=self.retire)
        self._loop = loop
        self._journal = journal
        self._python = python
        self._config = config
        self._on_gone = on_gone
        self._inbox = protocol.Inbox(protocol.FROM_LAUNCHER)
        self._greeting = b""
        self._is_loaded = False
        self._has_ended = False
        self._failure: str | None = None
        self._unsent = b""
        self._said = b""  # the end of what it has written to its standard error
        self._fds: list[int] = []

    def boot(self) -> None:
        """Start the interpreter; raises `OSError` where the system does not let it."""
        payload.load()  # now, where it may still raise
        self._socket, theirs = socket.socketpair()
        try:
            self._errors, errors_end = os.pipe()
            try:
                arguments = ["-u", "-c", payload.BOOT]
                environment = {**self.environment, payload.MARK: "1"}
                self._process = Interpreter(
                    self._python, arguments, environment, theirs.fileno(), errors_end
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
        self.pool.close()
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
        self.pool.open()

    def _on_frame(self, kind: bytes, text: str) -> None:
        if kind == protocol.LOADED:
            self._limit.cancel()
            self._is_loaded = not text
            self._failure = text or None
        elif kind == protocol.PAIR:
            fds, self._fds = self._fds[:FDS_PER_PAIR], self._fds[FDS_PER_PAIR:]
            self.pool.add(int(text), fds)
        elif kind == protocol.REFUSED:
            self.pool.refuse(text)
        elif kind == protocol.FAULT:
            self._failure = f"the launcher (pid {self._process.pid}) has failed: {text}"
            self._journal.log(logging.ERROR, "%s", self._failure)
        elif kind == protocol.LOST:
            pid, code, *stuck = map(int, text.split())
            self.pool.lose(pid, code, tuple(stuck))

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
        self.pool.end(failure, was_expected)
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
