"""Descriptors that several threads of this side use.

Responsible for closing them when the last thread lets go of them, and not before, and for
writing to them without ever blocking. What is written is no business of this module.
"""

from __future__ import annotations

import _socket
import os
import sys
from collections.abc import Iterable, Sequence


class Descriptor:
    """A descriptor that several threads use; it closes when the last lets go of it.

    Were it closed by its number, a thread that is about to use it could use what
    somebody has opened meanwhile under that number.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        close_all([self.fd])


class Sender:
    """One end of a socket that several threads send on; closes as a `Descriptor` does."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
        self.socket.setblocking(False)

    def __del__(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """False where it is full; what nobody reads any more counts as sent."""
        try:
            self.send_some(data)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def send_some(self, data: bytes | memoryview) -> int:
        """As much as there is room for; raises what `send` of a socket raises."""
        # The host may have SIGPIPE end it.
        return self.socket.send(data, getattr(_socket, "MSG_NOSIGNAL", 0))

    def send_with(self, data: bytes, descriptors: Sequence[Descriptor]) -> int:
        """Send the beginning of `data` along with descriptors; how much that was."""
        fds = b"".join(each.fd.to_bytes(4, sys.byteorder) for each in descriptors)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)]
        try:
            return self.socket.sendmsg([data], rights, getattr(_socket, "MSG_NOSIGNAL", 0))
        except OSError:
            return 0  # it has ended, as the next write will say

    def shut(self) -> None:
        """End the connection in both directions, which wakes the thread that reads from it."""
        try:
            self.socket.shutdown(_socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended by itself


class Wake:
    """Ends the wait of the thread that polls `fd`; closes as a `Descriptor` does."""

    def __init__(self) -> None:
        """Raises `OSError` where there are no descriptors left."""
        self._open: tuple[int, ...] = ()
        if hasattr(os, "eventfd"):
            self._open = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),)
        else:
            self._open = os.pipe()
            for fd in self._open:
                os.set_blocking(fd, False)
        self.fd = self._open[0]

    def __del__(self) -> None:
        close_all(self._open)

    def set(self) -> None:
        try:
            os.write(self._open[-1], b"\1\0\0\0\0\0\0\0")
        except OSError:
            pass  # full, so it wakes anyway; or the host has closed all its descriptors

    def clear(self) -> None:
        read(self.fd, 4096)


def read(fd: int, size: int) -> bytes | None:
    """What is there; empty at the end of the file; None where there is nothing."""
    try:
        return os.read(fd, size)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass  # the host has closed all its descriptors
