"""The process of a launcher: starting an interpreter, sending it its code, reading, reaping.

Only the launcher's own thread uses it, unless a method says otherwise. `launcher` knows what
the frames mean.
"""

from __future__ import annotations

import _socket
import array
import contextlib
import functools
import os
import select
import signal
from typing import Any

from .. import procfs, protocol
from . import payload
from .descriptors import Descriptor, Sender, close_all, pipe
from .execution import describe_exit
from .waiting import monotonic, native, native_subprocess

Environment = dict[bytes, bytes]
MAX_FDS = 64
# How long it may take to read the code that it is sent, in seconds.
PAYLOAD_LIMIT = 20.0
# How long the launcher may take to end once it is told to, in seconds.
EXIT_LIMIT = 5.0


class Process:
    def __init__(self, python: str, environment: Environment, config: dict[str, Any]) -> None:
        """Start the interpreter; raises `OSError` where the system does not let it."""
        self._python = python
        self._config = config
        self.failure: str | None = None
        self.is_greeted = False  # it has its code, and will read what is sent to it
        self.fds: list[int] = []  # that have come with PAIR, in order
        self._is_over = False
        self._said = b""  # the end of what it has written to its standard error
        self._inbox = protocol.Inbox(protocol.FROM_LAUNCHER)
        ours, theirs = _socket.socketpair()
        theirs.setblocking(True)  # the host may have set a default timeout
        self._sender: Sender | None = Sender(ours.detach())
        stdin = Descriptor(theirs.detach)
        self._errors, stderr = pipe()
        self._spawn(environment, stdin.fd, stderr.fd)
        stdin.close()
        stderr.close()
        self.pid: int = self._popen.pid
        self._socket = self._sender.socket
        self._host_status = _open_host_status()
        os.set_blocking(self._errors.fd, False)
        self._poll = native("select", "poll")()
        self._poll.register(self._socket.fileno(), select.POLLIN)
        self._poll.register(self._errors.fd, select.POLLIN)
        # A worker that the host forks just now holds the launcher's end of the socket as
        # well, which then never comes to its end of file.
        self._pidfd = procfs.open_pidfd(self.pid)
        if self._pidfd is not None:
            self._poll.register(self._pidfd, select.POLLIN)
        with contextlib.suppress(Exception):  # which is told when it is sent
            payload.load(False)  # meanwhile the interpreter comes up

    def _spawn(self, environment: Environment, stdin: int, stderr: int) -> None:
        subprocess = native_subprocess()
        # Its descriptors, its session and its directory are left alone, and it sees to
        # them itself: so `subprocess` takes `posix_spawn`, and waits for no pipe that a
        # worker which the host forks just now would hold open.
        python = _find(self._python, environment)
        self._popen = subprocess.Popen(
            [python, "-u", *payload.options(python), "-c", payload.BOOT],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**environment, payload.MARK.encode(): b"1"},
            close_fds=False,
        )

    def kill(self) -> None:
        """From any thread; not where the host has become another user."""
        with contextlib.suppress(PermissionError):
            self._popen.kill()

    def is_cut_off(self) -> bool:
        """From any thread: whether the host has closed the socket, as daemons close all."""
        sender = self._sender
        return sender is not None and not sender.is_open()

    def umask(self) -> int | None:
        """From any thread: the host's own, without setting it; None where that can't be told."""
        status = self._host_status
        try:
            return None if status is None else procfs.umask_in(os.pread(status.fd, 4096, 0))
        except OSError:  # the host has closed all its descriptors
            return None

    def send(self, frame: bytes) -> bool:
        """From any thread; false where there is no room for it now."""
        sender = self._sender
        return sender is None or sender.send(frame)

    def quit(self, *, at_once: bool) -> None:
        """From any thread: tell it to end once its keepers have."""
        if at_once:
            self.kill()
        sender = self._sender
        if sender is not None:
            sender.shut()

    def hear(self, seconds: float | None) -> list[tuple[bytes, str]] | None:
        """Wait for frames, at most `seconds`; None once there will be no more."""
        if self._is_over:
            return None
        limit = None if seconds is None else 1000 * max(0.0, seconds)
        ready = {fd for fd, _ in self._poll.poll(limit)}
        if self._errors.fd in ready and not self._read_errors():
            self._poll.unregister(self._errors.fd)
        frames: list[tuple[bytes, str]] = []
        if self._socket.fileno() in ready:  # first: it may have said why it ends
            self._receive(frames)
        elif self._pidfd in ready or (self._pidfd is None and self._popen.poll() is not None):
            self._is_over = True
        return frames

    def kill_tree(self) -> None:
        """Kill it and what it has started, as `python` may be a script."""
        procfs.signal_below(self.pid, signal.SIGKILL)
        self.kill()

    def end(self) -> str:
        """Reap it, and kill it if it does not end by itself; returns how it has ended."""
        code: int | None = None
        for _ in range(2):
            code = self._wait(0.0 if procfs.is_stopped(self.pid) else EXIT_LIMIT)
            if code is not None:
                break
            self.kill()
        if code is None:
            self._popen.returncode = -signal.SIGKILL  # or it would warn that it still runs
        while self._read_errors():
            pass
        self._sender = self._host_status = None
        self._errors.close()
        close_all(fd for fd in (self._pidfd, *self.fds) if fd is not None)
        return "it can't be killed" if code is None else describe_exit(code)

    def _wait(self, seconds: float) -> int | None:
        """Its exit code; None if it has not ended in time. `Popen.wait` is not native."""
        until = monotonic() + seconds
        code: int | None = self._popen.poll()
        while code is None and monotonic() < until:
            native("time", "sleep")(0.001)
            code = self._popen.poll()
        return code

    @property
    def said(self) -> str:
        return self._said.decode("utf-8", "replace").strip()

    def _receive(self, frames: list[tuple[bytes, str]]) -> None:
        """Add what has come to `frames`."""
        try:
            data = self._receive_data()
            if data and not self.is_greeted:
                self._send_payload(data)
                return
            for kind, body in self._inbox.feed(data):
                frames.append((kind, body.decode("utf-8", "replace")))
        except BlockingIOError:
            pass
        except protocol.ProtocolError as error:
            self._fail(f"the interpreter {self._python!r} sent {error}")
        except OSError:
            self._is_over = True

    def _receive_data(self) -> bytes:
        flags = getattr(_socket, "MSG_CMSG_CLOEXEC", 0)
        space = _socket.CMSG_SPACE(4 * MAX_FDS)
        data, rights, _, _ = self._socket.recvmsg(65536, space, flags)
        for level, kind, content in rights:
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self.fds += fds
        self._is_over = self._is_over or not data
        return data

    def _send_payload(self, greeting: bytes) -> None:
        try:
            modules = payload.pack(greeting, self._config)
        except Exception as error:  # such as a package without its source, for another version
            self._fail(f"could not read this package's own code: {error}")
            return
        socket = self._socket
        socket.settimeout(PAYLOAD_LIMIT)
        try:
            socket.sendall(modules)
            self.is_greeted = True
        finally:
            socket.settimeout(0.0)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.kill()
        self._is_over = True

    def _read_errors(self) -> bool:
        """Read what it says while it comes up, which it would wait for otherwise."""
        try:
            data = os.read(self._errors.fd, 65536)
        except OSError:
            return False
        self._said = (self._said + data)[-2000:]
        return bool(data)


def _open_host_status() -> Descriptor | None:
    """The host's own status in /proc, for `umask`: each start costs less if it stays open."""
    if not procfs.is_ours():
        return None
    try:
        return Descriptor(
            functools.partial(os.open, "/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        )
    except OSError:
        return None


def _find(python: str, environment: Environment) -> str:
    """The path of a bare name, which `subprocess` would not start by `posix_spawn`."""
    if os.sep in python:
        return python
    import shutil

    path = environment.get(b"PATH")
    return shutil.which(python, path=None if path is None else os.fsdecode(path)) or python
