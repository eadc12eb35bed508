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

_write = io.FileIO.write


class _Whole(io.FileIO):
    """An unbuffered file whose writes are never cut short."""

    def write(self, data: Any) -> int:
        written = _write(self, data)
        if type(data) is not bytes or written != len(data):
            view = memoryview(data).cast("B")
            # None: the snippet has set the descriptor to non-blocking, and it is full.
            while written is not None and written < len(view):
                more = _write(self, view[written:])
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
