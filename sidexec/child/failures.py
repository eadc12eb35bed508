"""The text of a snippet's error: a traceback without any frame of ours.

It adds the snippet's source lines to tracebacks, calls the user's `excepthook`, and writes to
standard error. It sends nothing.
"""

from __future__ import annotations

import _thread
import sys

from . import library

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

FILENAME = "<snippet>"


class Failures:
    def __init__(self) -> None:
        self.filename = FILENAME
        self.exit: SystemExit | None = None  # what the user's `excepthook` has raised
        self.text: str | None = None  # None for an action block: its lines are in its file

    def show_source(self) -> None:
        """Let tracebacks, wherever they are made, find the snippet's lines."""
        if self.text is not None:
            linecache = library.module("linecache")
            linecache.cache[FILENAME] = (len(self.text), None, self._lines(), FILENAME)

    def _lines(self) -> list[str]:
        """As the compiler counts them: `str.splitlines` splits at form feeds, too."""
        text = (self.text or "").replace("\r\n", "\n").replace("\r", "\n")
        return [line + "\n" for line in text.split("\n")]

    def report(self, error: BaseException, call_hook: Callable[[BaseException], object]) -> str:
        """Write an uncaught error to standard error; returns the text for the host.

        `call_hook` calls `sys.excepthook`, as the user's code may have set it.
        """
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != self.filename:
            trace = trace.tb_next
        BaseException.with_traceback(error, trace)  # its class may let nobody set an attribute
        text = type(error).__name__
        # Hooks and exit handlers ask for these; `leaving` takes them away again.
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
        if sys.version_info >= (3, 12):
            sys.last_exc = error
        try:
            self.show_source()
            if isinstance(error, SyntaxError):
                self._add_line(error)
            # `traceback` imports some modules only when it meets what it needs them for.
            with library.OwnImports():
                headline, formatted = self._describe(error)
        except Exception:
            return self._report_plainly(call_hook, error)
        try:
            # Without a traceback, the first line is the one that a user looks for.
            text = formatted if formatted.startswith(headline) else f"{headline}\n\n{formatted}"
            if sys.excepthook is not sys.__excepthook__:
                formatted = self._use_hook(call_hook, error, formatted)
            sys.stderr.write(formatted)
        except BaseException:
            pass  # its standard error is gone; the exit code still tells
        return text

    def _report_plainly(
        self, call_hook: Callable[[BaseException], object], error: BaseException
    ) -> str:
        """Report it with less: perhaps no more files can be opened, or no memory is left."""
        text = type(error).__name__
        try:
            call_hook(error)
            text += f": {error}"
        except BaseException:
            pass
        return text

    def _add_line(self, error: SyntaxError) -> None:
        """The line that the compiler's later stages would look for in a file."""
        if error.text is None and error.filename == self.filename and self.text is not None:
            lines = self._lines()
            if error.lineno is not None and 0 < error.lineno <= len(lines):
                error.text = lines[error.lineno - 1]

    def _use_hook(
        self, call_hook: Callable[[BaseException], object], error: BaseException, formatted: str
    ) -> str:
        """Call the user's hook; returns what is still to be written."""
        try:
            call_hook(error)
            return ""
        except SystemExit as another:
            self.exit = another
            return ""
        except BaseException as another:
            failed = self._describe(another)[1]
            return f"Error in sys.excepthook:\n{failed}\nOriginal exception was:\n{formatted}"

    def _describe(self, error: BaseException) -> tuple[str, str]:
        traceback = library.module("traceback")
        kind = type(error)
        limit = getattr(sys, "tracebacklimit", None)
        # The innermost calls, as the interpreter shows them: `traceback` has the outermost.
        limit = -max(limit, 0) if isinstance(limit, int) else None
        details = traceback.TracebackException(kind, error, error.__traceback__, limit=limit)
        pending: list[tuple[Any, Any]] = [(details, error)]
        while pending:
            each, told = pending.pop()
            each.stack[:] = [frame for frame in each.stack if not frame.filename.startswith(_OWN)]
            if sys.version_info < (3, 12) and type(told) in (AttributeError, NameError):
                each._str += _suggestion(told)
            linked = [(each.__cause__, told.__cause__), (each.__context__, told.__context__)]
            parts = getattr(each, "exceptions", None)
            linked += zip(parts, told.exceptions) if parts else ()
            pending += [pair for pair in linked if pair[0] is not None]
        lines = list(details.format_exception_only())
        name = kind.__qualname__
        if kind.__module__ not in ("builtins", "__main__"):
            name = f"{kind.__module__}.{name}"
        headline = next((line for line in lines if line.startswith(name)), lines[-1])
        return headline.strip().partition("\n")[0], "".join(details.format())


class _Catcher:
    """What this thread writes to standard error; that of others goes there."""

    def __init__(self) -> None:
        self.text = ""
        self.stream: Any = getattr(sys, "stderr", None)  # it may be gone
        self._thread = _thread.get_ident()

    def write(self, text: str) -> object:
        if _thread.get_ident() != self._thread:
            return self.stream.write(text)
        self.text += text
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _suggestion(error: Any) -> str:
    """What name may be meant: before Python 3.12, only the interpreter's own hook says so."""
    kind, trace = type(error), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # Of its own, with no message, context or calls: the hook would tell all of them.
    bare = kind().with_traceback(trace)
    bare.name = error.name
    if kind is AttributeError:
        bare.obj = error.obj
    catcher: Any = _Catcher()
    sys.stderr = catcher
    try:
        sys.__excepthook__(kind, bare, trace)
    finally:
        sys.stderr = catcher.stream
    _, mark, name = catcher.text.rstrip().rpartition(". Did you mean: ")
    return "" if "\n" in name else mark + name


# How the files of this package begin, `protocol` too: their frames are left out.
_OWN = Failures.report.__code__.co_filename.rpartition("child")[0]
