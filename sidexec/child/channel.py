"""Sending frames to the host, whole, from any thread or signal handler.

Nothing is ever written to another file that has been given the number of the channel's
descriptor.
"""

from __future__ import annotations

import _socket
import _thread
import errno
import os
import sys

from ..protocol import pack
from . import kernel
from .masking import Masked

# Above the descriptors that daemons close when they begin, most often 3 to 256.
OUT_OF_REACH = 1000
# A longer frame may be sent in parts, between which another process could send.
ATOMIC_SIZE = 4096
MOST_DESCRIPTORS = 253  # that the kernel passes at once


class Channel:
    def __init__(self, fd: int) -> None:
        self._fd = _move(fd)
        self._file = kernel.identity(self._fd)
        self._is_shared = False  # this is a process that the snippet has forked
        self._lock = _thread.RLock()
        self._unsent: list[bytes] = []
        os.register_at_fork(after_in_child=self._after_fork_in_child)

    def _after_fork_in_child(self) -> None:
        self._lock = _thread.RLock()
        self._unsent = []
        self._is_shared = True

    def read(self, size: int) -> bytes:
        """Read `size` bytes; if the host is gone, the process exits."""
        parts = []
        while size:
            part = os.read(self._fd, size)
            if not part:
                os._exit(0)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def receive(self, size: int) -> tuple[bytes, list[int]]:
        """The first bytes of the request, and the descriptors that come with it."""
        socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, self._fd)
        socket.setblocking(True)  # a preloaded module may have set a timeout for all sockets
        try:
            data, rights, _, _ = socket.recvmsg(size, _socket.CMSG_SPACE(4 * MOST_DESCRIPTORS))
        finally:
            socket.detach()
        fds = [
            int.from_bytes(each[at : at + 4], sys.byteorder)
            for _, _, each in rights
            for at in range(0, len(each), 4)
        ]
        return data + self.read(size - len(data)), fds

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send a frame, or leave it to the call that this one has interrupted."""
        self._unsent.append(pack(kind, payload))
        self.flush()

    def flush(self) -> None:
        """Send what an ask has kept from being sent."""
        # A signal handler's report is sent by the call that it has interrupted.
        while self._unsent and not self._lock._is_owned():  # type: ignore[attr-defined]
            # What a signal handler raises would cut a frame in two, or leave the lock taken.
            with Masked(), self._lock:
                self._send_all()

    def _send_all(self) -> None:
        while self._unsent:
            self._write(self._unsent[0])
            del self._unsent[0]

    def _write(self, frame: bytes) -> None:
        must_lock = self._is_shared or len(frame) > ATOMIC_SIZE
        if must_lock:
            self._check()
            os.lockf(self._fd, os.F_LOCK, 0)
        try:
            view = memoryview(frame)
            while view:
                self._check()
                view = view[os.write(self._fd, view) :]
        finally:
            if must_lock:
                os.lockf(self._fd, os.F_ULOCK, 0)

    def _check(self) -> None:
        if kernel.identity(self._fd) != self._file:
            raise OSError(
                errno.EBADF,
                f"nothing can be reported any more, since descriptor {self._fd} has been"
                " closed: leave it open, as the manager reads from it",
            )


def _move(fd: int) -> int:
    """Move a descriptor to a number that programs rarely close, if there is room."""
    if kernel.identity(OUT_OF_REACH) is None:
        try:
            os.dup2(fd, OUT_OF_REACH, inheritable=False)
        except OSError:
            return fd  # the limit of open files is lower
        os.close(fd)
        return OUT_OF_REACH
    return fd
