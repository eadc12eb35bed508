"""Standard streams that keep nothing back.

What a snippet prints has to be in the pipe before the next line runs, since SIGKILL
leaves no time to flush. `python -u` writes through as well, but lets go of the rest
of a large write that a signal has cut short.
"""

from __future__ import annotations

import io
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# A write to a pipe of at most 4096 bytes is never cut short: so many items, at most 8
# bytes each, need no second look.
_SMALL = 512


class _Whole(io.FileIO):
    """An unbuffered file whose writes are never cut short."""

    # The arguments with defaults are globals that are looked up twice for each `print`.
    def write(self, data: Any, write: Any = io.FileIO.write, size: Any = len) -> Any:
        written = write(self, data)
        if written != size(data) or written > _SMALL:
            return self._write_rest(data, written)
        return written

    def seekable(self) -> bool:
        return False  # a pipe, whatever has its number when this is made

    def _write_rest(self, data: Any, written: int | None) -> int | None:
        view = memoryview(data).cast("B")
        # None: the snippet has set the descriptor to non-blocking, and it is full.
        while written is not None and written < len(view):
            more = super().write(view[written:])
            if more is None:
                break
            written += more
        return written


def replace() -> None:
    """Put such streams in the place of standard output and standard error."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        raw = _Whole(fd, "w", closefd=False)
        raw.name = f"<{name}>"
        stream = io.TextIOWrapper(
            raw, encoding="utf-8", errors=old.errors, newline="\n", write_through=True
        )
        stream.mode = "w"  # type: ignore[misc]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
