"""A snippet's standard input, until it is written.

Any thread adds to it; the execution's own thread writes as much as there is room for. It
never blocks that thread, and waits for no lock that another one could hold.
"""

from __future__ import annotations

import os
from collections import deque

from .descriptors import Descriptor
from .waiting import Bell

# How much may be unread, in bytes, before whoever adds more has to wait.
MOST = 1024 * 1024


class Input:
    def __init__(self, writer: Descriptor, data: bytes, *, is_open: bool) -> None:
        """`data` is all of it, unless it `is_open` for more."""
        os.set_blocking(writer.fd, False)
        self.writer: Descriptor | None = writer
        # Why there can be no more of it, in words; None as long as it is open.
        self.closed_by = None if is_open else "`input` was all of its standard input"
        self.changed = Bell()  # when there is less of it
        self._arrived: deque[bytes] = deque([data] if data else [])
        # Changed by the execution's thread alone.
        self._waiting: deque[memoryview] = deque()
        self._size = 0  # of what waits, in bytes
        self._has_lost = False

    # -- from any thread

    def add(self, data: bytes, *, close: bool) -> bool:
        """False if it is closed."""
        if self.closed_by is not None or self.writer is None:
            return False
        if data:
            self._arrived.append(data)
        if close:
            self.closed_by = "its standard input was closed by an earlier call"
        return True

    def is_lost(self) -> bool:
        """Whether it has ended before all that was added was written."""
        # What is added beside the end, too late to be cleared, is still there.
        return self._has_lost or (self.writer is None and bool(self._arrived))

    def has_room(self) -> bool:
        size = self._size + sum(map(len, self._arrived.copy()))
        return size <= MOST or self.writer is None

    # -- from the execution's thread

    def write(self) -> bool:
        """Write as much as there is room for, and close it after the last; whether more waits."""
        writer = self.writer
        is_all = self.closed_by is not None  # looked at first: what came before is there then
        while self._arrived:
            self._size += len(self._arrived[0])  # first, so that nobody sees too little
            self._waiting.append(memoryview(self._arrived.popleft()))
        try:
            while writer is not None and self._waiting:
                data = self._waiting[0]
                sent = os.write(writer.fd, data)
                self._size -= sent
                if sent == len(data):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = data[sent:]
        except BlockingIOError:
            pass
        except OSError:
            self.closed_by = "nobody reads its standard input any more"
            self.end()
        if not self._waiting and is_all:
            self.end()
        self.changed.ring()
        return bool(self._waiting)

    def end(self) -> None:
        """Nothing of it will be read any more."""
        self._has_lost = bool(self._waiting or self._arrived) or self._has_lost
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()
        self._arrived.clear()
        self._waiting.clear()
        self._size = 0
        self.changed.ring()
