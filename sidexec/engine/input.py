"""What a snippet reads from its standard input, on its way there.

Any thread adds to it; the execution's own thread writes it, as far as there is room. It
never blocks that thread, and waits for no lock that another one could hold.
"""

from __future__ import annotations

import os
from collections import deque

from .descriptors import Descriptor
from .waiting import Bell

# So much may wait to be read, in bytes, before whoever adds to it has to wait.
MOST = 1024 * 1024


class Input:
    def __init__(self, writer: Descriptor, data: bytes, *, is_open: bool) -> None:
        """`data` is all of it, unless it `is_open` for more."""
        os.set_blocking(writer.fd, False)
        self.writer: Descriptor | None = writer
        self.is_open = is_open
        self.changed = Bell()  # when there is less of it
        self._waiting: deque[bytes] = deque([data] if data else [])
        self._size = len(data)

    # -- from any thread

    def add(self, data: bytes, *, close: bool) -> bool:
        """False where it takes no more."""
        if not self.is_open or self.writer is None:
            return False
        if data:
            self._size += len(data)
            self._waiting.append(data)
        if close:
            self.is_open = False
        return True

    def has_room(self) -> bool:
        return self._size <= MOST or self.writer is None

    # -- from the execution's thread

    def wants_to_write(self) -> bool:
        return self.writer is not None and bool(self._waiting)

    def write(self) -> None:
        """Write as much as there is room for, and close it after the last."""
        writer = self.writer
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
            self.end()  # nobody reads it any more
        if not self._waiting and not self.is_open:
            self.end()
        self.changed.ring()

    def end(self) -> None:
        """Nothing of it will be read any more."""
        self.is_open = False
        self.writer = None
        self._waiting.clear()
        self._size = 0
        self.changed.ring()
