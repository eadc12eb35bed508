"""Standard streams without buffers.

What a snippet prints has to be in the pipe before the next line runs, since SIGKILL
leaves no time to flush. `python -u` writes through as well, but drops the rest
of a large write that a signal has interrupted.
"""

from __future__ import annotations

import io
import sys
from select import POLLOUT, poll  # the user's code may take them out of the module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Whole(io.FileIO):
    """An unbuffered file whose writes are never cut short."""

    def write(self, data: Any) -> Any:
        return self._write_rest(data, super().write(data))

    @property
    def raw(self) -> Whole:
        """Nothing is buffered, so that this is its own raw file, too."""
        return self

    def seekable(self) -> bool:
        return False  # a pipe, even if another file has its number when this is made

    def _write_rest(self, data: Any, written: int | None) -> int:
        view = memoryview(data).cast("B")
        written = written or 0
        while written < len(view):
            more = super().write(view[written:])
            if more is None:  # the code has set the pipe to non-blocking, and it is full
                full = poll()
                full.register(self.fileno(), POLLOUT)
                full.poll()
            else:
                written += more
        return written


def _quicken(stream: io.TextIOWrapper, raw: Whole) -> None:
    """Give `stream` a `write` that does without the class's own, which calls ours.

    `print` calls it twice, for the text and for its end.
    """
    errors = stream.errors or "strict"
    quick: type | None = str
    encode = str.encode
    size = len
    write_any = stream.write
    write_raw = super(Whole, raw).write

    def write(text: str, /) -> int:
        if type(text) is not quick:
            return write_any(text)
        data = encode(text, "utf-8", errors)
        written = write_raw(data)
        if written != size(data):
            raw._write_rest(data, written)
        return size(text)

    def slow_from_now_on(method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal quick
            quick = None
            return method(*arguments, **options)

        return call

    stream.write = write  # type: ignore[method-assign]
    for name in ("reconfigure", "detach", "close"):
        setattr(stream, name, slow_from_now_on(getattr(stream, name)))


def replace() -> None:
    """Put such streams in the place of standard output and standard error."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        raw = Whole(fd, "w", closefd=False)
        raw.name = f"<{name}>"
        stream = io.TextIOWrapper(
            raw, encoding="utf-8", errors=old.errors, newline="\n", write_through=True
        )
        stream.mode = "w"  # type: ignore[misc]
        _quicken(stream, raw)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
