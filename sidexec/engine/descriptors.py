"""Descriptors that several threads of the host use.

They are closed when the last thread releases them, and not before. Writing to one never
blocks.
"""

from __future__ import annotations

import _socket
import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence

# How much to read at once. Without the GIL, an object of more than 128 KiB that is freed
# stays in memory until every running thread has left the call of C code that it is in.
READ_SIZE = (64 if "t" in sys.abiflags else 256) * 1024
NO_SIGPIPE = getattr(_socket, "MSG_NOSIGNAL", 0)  # which may end the host


class Descriptor:
    """A descriptor that several threads use; it closes when the last releases it.

    If it closed earlier, a thread that is about to use it could use another file, which has
    been given the same number.

    Without the GIL, the thread that made it should also be the last to release it: references
    that other threads drop are only settled when the thread that made it runs again.
    """

    _open: list[int]

    def __init__(self, open: Callable[[], int]) -> None:
        """What `open` opens belongs to this at once: a signal handler may raise after any call."""
        self._open = []
        self._open.extend(itertools.islice(iter(open, None), 1))
        self.fd = self._open[0]

    def close(self) -> None:
        """Close it at once, which is for its only user."""
        # Nothing comes between taking it and closing it either.
        try:
            any(map(os.close, iter(self._open.pop, None)))
        except (IndexError, AttributeError):
            pass  # there is no more, or a handler that raised kept it from being opened
        except OSError:
            pass  # the host has closed all its descriptors

    __del__ = close


class _Ends(Descriptor):
    """Both ends of a pipe, until they have owners of their own."""

    def __init__(self) -> None:
        self._open = []
        self._open.extend(itertools.chain.from_iterable(itertools.islice(iter(os.pipe, None), 1)))


def pipe() -> tuple[Descriptor, Descriptor]:
    """The end to read from, and the end to write to."""
    ends = _Ends()
    writer = Descriptor(ends._open.pop)
    return Descriptor(ends._open.pop), writer


class Sender:
    """One end of a socket that several threads send on; closes as a `Descriptor` does."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._file = _identity(fd)
        self.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
        self.socket.setblocking(False)

    def __del__(self) -> None:
        # The host may have closed all its descriptors, also before there was a socket here.
        with contextlib.suppress(OSError, AttributeError):
            self.socket.close()

    def is_open(self) -> bool:
        try:
            return _identity(self.fd) == self._file
        except OSError:
            return False

    def send(self, data: bytes) -> bool:
        """False if it is full. If nobody reads it any more, it counts as sent."""
        try:
            self.send_some(data)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def send_some(self, data: bytes | memoryview) -> int:
        """Send as much as there is room for; raises what `socket.send` raises."""
        return self.socket.send(data, NO_SIGPIPE)

    def send_with(self, data: bytes, descriptors: Sequence[Descriptor]) -> int:
        """Send the beginning of `data` along with descriptors; how much that was."""
        fds = b"".join(each.fd.to_bytes(4, sys.byteorder) for each in descriptors)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)]
        try:
            return self.socket.sendmsg([data], rights, NO_SIGPIPE)
        except OSError:
            return 0  # the peer has ended: the next write fails

    def shut(self) -> None:
        """End the connection in both directions, which wakes the thread that reads from it."""
        try:
            self.socket.shutdown(_socket.SHUT_RDWR)
        except OSError:
            pass  # the peer has ended


class Wake:
    """Ends the wait of the thread that polls `fd`; closes as a `Descriptor` does."""

    def __init__(self) -> None:
        """Raises `OSError` where there are no descriptors left."""
        eventfd = getattr(os, "eventfd", None)
        self._ends = pipe() if eventfd is None else [Descriptor(functools.partial(eventfd, 0))]
        for end in self._ends:
            os.set_blocking(end.fd, False)
        self.fd = self._ends[0].fd

    def set(self) -> None:
        try:
            os.write(self._ends[-1].fd, b"\1\0\0\0\0\0\0\0")
        except OSError:
            pass  # full, so it wakes anyway; or the host has closed all its descriptors

    def clear(self) -> None:
        read(self.fd, 4096)


def _identity(fd: int) -> tuple[int, int]:
    """What identifies its file; not all that `fstat` returns, as each execution holds two."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def read(fd: int, size: int) -> bytes | None:
    """Read what is there: empty at the end of the file, None if there is nothing yet."""
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
