"""The snippet: runs the user's code in a process of its own, and ends as asked.

Responsible for what the code finds (a clean `__main__`, its parameters, the
functions to report with) and for what is sent to the host (progress, results, the
text of an error). How it hears that it is to stop is `asking`, how it ends `leaving`.
It never looks after processes: the keeper does that, and goes by how this process
ends, not by what it says.
"""

from __future__ import annotations

import _thread
import atexit
import gc
import marshal
import os
import sys

from ..protocol import (
    ERROR,
    HEADER,
    MAX_DEPTH,
    MAX_ERROR,
    MAX_RESULT,
    PROGRESS,
    RESULT,
    is_too_deep,
    pack,
)
from . import leaving, source, streams
from .asking import ASKED_EXIT_CODE, RUNNING, SETTLING, Ask, StopRequested
from .library import Library
from .masking import Masked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import CodeType, ModuleType
    from typing import Any, NoReturn

FILENAME = "<snippet>"
# A write of as many bytes to the channel is done at once, or not at all.
UNDIVIDED = 4096

REHEARSAL: dict[str, Any] = {
    "code": "try:\n import sys\n params['ask'](sys._getframe())\nfinally: print(end='')",
    "block": None,
    "cwd": None,
    "limits": {},
}


class Snippet:
    def __init__(self, channel: int, path: list[str], flush_c: Callable[[], object]) -> None:
        self._channel = channel
        self._path = path
        self._flush_c = flush_c
        self._pid = os.getpid()
        self._main_thread = _thread.get_ident()
        self._library = Library(path)
        self._ask = Ask(self._library)
        self._send_lock = _thread.RLock()
        self._is_sending = False
        self._unsent: list[tuple[bytes, bytes]] = []
        self._filename = FILENAME
        self._text: str | None = None
        self._namespace: dict[str, Any] = {}
        self._partial: CodeType | None = None
        self._value: object = None
        self._reported: object = None
        self._progress = b""  # that was sent last
        self._lifted: list[tuple[Callable[..., object], int, tuple[int, int]]] = []

    def prepare(self, *, rehearse: bool) -> None:
        """Do ahead of the request whatever does not depend on it."""
        _forget_launcher()
        self._ask.listen()
        os.register_at_fork(after_in_child=self._after_fork_in_child)
        if rehearse:
            # The pages that this writes to are the process's own once the request
            # comes, which then runs in a third of the time.
            path = sys.path[:]
            try:
                eval(self._load({**REHEARSAL, "params": {"ask": self._ask.rehearse}}), self._namespace)
            except StopRequested:
                leaving.let_go(self._namespace)
                leaving.flush(leaving.open_files())
                gc.collect()
            self._flush_c()
            self._library.module("linecache").cache.pop(FILENAME, None)
            sys.path[:] = path

    def receive(self) -> dict[str, Any]:
        """Wait for the request; a host that is gone ends the wait and the process."""
        length = int.from_bytes(self._read(HEADER)[1:], "big")
        request: dict[str, Any] = marshal.loads(self._read(length))
        return request

    def run(self, request: dict[str, Any]) -> NoReturn:
        """Run the user's code, send what came of it, and leave."""
        failure: BaseException | None = None
        exit_code = 0
        try:
            code = self._load(request)
            try:
                self._ask.phase = RUNNING
                self._execute(code)
            finally:
                self._ask.phase = SETTLING
        except StopRequested:
            exit_code = ASKED_EXIT_CODE
        except SystemExit as error:
            exit_code = self._take_exit_code(error)
        except BaseException as error:
            failure = error
        for set_limit, kind, limits in self._lifted:
            set_limit(kind, limits)
        # Before threads are waited for: one that is no daemon may take for ever.
        if os.getpid() == self._pid:
            failure = self._send_result(failure)
        if failure is not None:
            self._report_failure(failure)
            exit_code = 130 if isinstance(failure, KeyboardInterrupt) else 1
            failure = None  # its traceback holds the globals
        is_snippet = os.getpid() == self._pid
        leaving.leave(self._ask, self._take_globals, self._flush_c, is_snippet, exit_code)

    def _take_globals(self) -> dict[str, Any]:
        namespace, self._namespace = self._namespace, {}
        self._partial = self._value = self._reported = None
        return namespace

    # -- what the user's code finds

    def _load(self, request: dict[str, Any]) -> CodeType:
        if request["cwd"] is not None:
            os.chdir(request["cwd"])
        main: ModuleType = type(sys)("__main__")
        sys.modules["__main__"] = main
        self._namespace = namespace = vars(main)
        namespace["__builtins__"] = sys.modules["builtins"]
        namespace["__annotations__"] = {}
        namespace["__loader__"] = sys.modules["_frozen_importlib"].BuiltinImporter
        namespace["params"] = request["params"]
        namespace["report_progress"] = self._report_progress
        namespace["report_result"] = self._report_result
        block: str | None = request["block"]
        code: str | bytes
        if block is None:
            path = self._path
            self._text = code = request["code"]
            sys.argv[:] = ["-c"]
        else:
            file = os.path.join(block, "__main__.py") if os.path.isdir(block) else block
            # Of a link to a file the modules beside the file are found, as by `python`.
            place = block if file != block else os.path.dirname(os.path.realpath(file))
            path = [place, *(each for each in self._path if each)]
            with open(file, "rb") as stream:
                code = stream.read()
            self._filename = namespace["__file__"] = file
            loaders = sys.modules["_frozen_importlib_external"]
            namespace["__loader__"] = loaders.SourceFileLoader("__main__", file)
            sys.argv[:] = [block, *request["args"]]
        program, self._partial = source.prepare(code, self._filename, namespace)
        if self._text is not None and "import" in self._text:
            self._show_source()
        sys.path[:] = path  # last, so that no file of the user's shadows our imports
        self._set_limits(request["limits"])
        return program

    def _show_source(self) -> None:
        """Let tracebacks, wherever they are made, find the snippet's lines."""
        if self._text is not None:
            linecache = self._library.module("linecache")
            linecache.cache[FILENAME] = (len(self._text), None, self._lines(), FILENAME)

    def _lines(self) -> list[str]:
        """As the compiler counts them: `str.splitlines` splits at form feeds, too."""
        text = (self._text or "").replace("\r\n", "\n").replace("\r", "\n")
        return [line + "\n" for line in text.split("\n")]

    def _report_progress(self, percent: float) -> None:
        """Set the execution's progress, from 0 to 100."""
        if isinstance(percent, bool) or not hasattr(type(percent), "__float__"):
            raise TypeError(f"percent must be a number, not {type(percent).__name__}")
        if not 0 <= percent <= 100:
            raise ValueError(f"percent must be between 0 and 100, not {percent!r}")
        self._send(PROGRESS, repr(float(percent)).encode())

    def _report_result(self, value: object) -> None:
        """Keep `value` as the partial result, and again as it is when asked to stop."""
        if os.getpid() != self._pid:
            raise RuntimeError("report_result works in the snippet's own process only")
        data = self._to_json(value, "the reported value")
        # Kept first: an ask that comes while it is sent is raised before this returns.
        previous, self._reported = self._reported, value
        try:
            self._send(RESULT, data)
        except OSError:
            self._reported = previous
            raise

    # -- running and asking

    def _execute(self, code: CodeType) -> None:
        value = eval(code, self._namespace)
        if code.co_flags & source.CO_COROUTINE:
            # Asked to stop, it cancels the snippet's tasks, and what the snippet
            # returns while it unwinds is kept although `run` raises.
            main = self._await(value)
            try:
                asyncio = self._library.module("asyncio")
                self._show_source()
                asyncio.run(main)
            finally:
                main.close()
                value.close()
        else:
            self._value = value

    async def _await(self, coroutine: Coroutine[Any, Any, object]) -> None:
        self._value = await coroutine

    # -- the channel

    def _after_fork_in_child(self) -> None:
        self._send_lock = _thread.RLock()
        self._is_sending = False
        self._unsent = []

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._channel, size)
            if not part:
                os._exit(0)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _send(self, kind: bytes, payload: bytes) -> None:
        self._unsent.append((kind, payload))
        while True:
            with self._send_lock:
                if self._is_sending:
                    return  # a signal handler's report: the call that it interrupted sends it
                self._is_sending = True
                try:
                    self._send_all()
                finally:
                    self._is_sending = False
            if not self._unsent:  # or a handler came after the last look
                return

    def _send_all(self) -> None:
        in_main_thread = _thread.get_ident() == self._main_thread
        if in_main_thread:
            self._ask.hold()
        try:
            while self._unsent:
                kind, payload = self._unsent.pop(0)
                if kind == PROGRESS:
                    # Looked at here, as another thread may have sent a progress meanwhile.
                    if payload == self._progress:
                        continue
                    self._progress = payload
                frame = pack(kind, payload)
                if len(frame) <= UNDIVIDED:
                    self._write(frame)
                else:
                    # Not for the ask alone: what a handler of the user's raises would
                    # cut it in two as well.
                    with Masked():
                        self._write(frame)
        finally:
            if in_main_thread:
                self._ask.resume()

    def _write(self, frame: bytes) -> None:
        view = memoryview(frame)
        while view:
            view = view[os.write(self._channel, view) :]

    def _to_json(self, value: object, what: str) -> bytes:
        json = self._library.module("json")
        try:
            data: bytes = json.dumps(value, allow_nan=False).encode()
            if is_too_deep(value):
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"{what} must be JSON: {error}") from None
        if len(data) > MAX_RESULT:
            raise ValueError(
                f"{what} takes {len(data)} bytes as JSON, more than {MAX_RESULT}:"
                " write it to a file and report the file's path"
            )
        return data

    def _send_result(self, failure: BaseException | None) -> BaseException | None:
        """Send the result there is; returns the failure that there is afterwards."""
        candidates: list[tuple[str, Callable[[], object]]] = []
        if self._value is not None:
            candidates.append(("the returned value", lambda: self._value))
        asked = self._ask.has_come
        if asked and self._reported is not None:
            candidates.append(("the reported value", lambda: self._reported))
        if asked and self._partial is not None and self._reported is None:
            partial = self._partial
            candidates.append(("the partial result", lambda: eval(partial, self._namespace)))
        for what, candidate in candidates:
            try:
                self._send(RESULT, self._to_json(candidate(), what))
                break
            except BaseException as error:
                if not asked and failure is None:
                    failure = error.with_traceback(None)
        return failure

    def _take_exit_code(self, error: SystemExit) -> int:
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            fits = -(2**63) <= error.code < 2**63
            return error.code & 0xFF if fits else 0xFF
        try:
            text = str(error.code)
            self._send_error(f"exit code 1: {text}")
            print(text, file=sys.stderr)
        except Exception:
            pass  # its standard error is gone; the exit code still tells
        return 1

    def _report_failure(self, error: BaseException) -> None:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != self._filename:
            trace = trace.tb_next
        error.__traceback__ = trace
        text = type(error).__name__
        try:
            self._show_source()
            if isinstance(error, SyntaxError):
                self._add_line(error)
            headline, formatted = self._describe(error)
            text = f"{headline}\n\n{formatted}"
            if sys.excepthook is not sys.__excepthook__:
                formatted = self._call_excepthook(error, formatted)
            sys.stderr.write(formatted)
        except BaseException:
            pass  # its standard error is gone; the exit code still tells
        self._send_error(text)

    def _send_error(self, text: str) -> None:
        if os.getpid() == self._pid:
            try:
                self._send(ERROR, text.encode("utf-8", "replace")[:MAX_ERROR])
            except OSError:
                pass  # the snippet closed the channel; the exit code still tells

    def _add_line(self, error: SyntaxError) -> None:
        """The line that the compiler's later stages would look for in a file."""
        if error.text is None and error.filename == self._filename and self._text is not None:
            lines = self._lines()
            if error.lineno is not None and 0 < error.lineno <= len(lines):
                error.text = lines[error.lineno - 1]

    def _call_excepthook(self, error: BaseException, formatted: str) -> str:
        """What is left to be written once the user's own hook has been called."""
        try:
            sys.excepthook(type(error), error, error.__traceback__)
            return ""
        except BaseException as another:
            failed = self._describe(another)[1]
            return f"Error in sys.excepthook:\n{failed}\nOriginal exception was:\n{formatted}"

    def _describe(self, error: BaseException) -> tuple[str, str]:
        traceback = self._library.module("traceback")
        kind = type(error)
        details = traceback.TracebackException(kind, error, error.__traceback__)
        pending = [details]
        while pending:
            each = pending.pop()
            each.stack[:] = [frame for frame in each.stack if frame.filename not in _OWN_FILES]
            linked = [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]
            pending += [another for another in linked if another is not None]
        lines = list(details.format_exception_only())
        name = kind.__qualname__
        if kind.__module__ not in ("builtins", "__main__"):
            name = f"{kind.__module__}.{name}"
        headline = next((line for line in lines if line.startswith(name)), lines[-1])
        return headline.strip().partition("\n")[0], "".join(details.format())

    # -- leaving

    # -- the rest of the surroundings

    def _set_limits(self, limits: dict[str, int]) -> None:
        if not limits:
            return
        resource = self._library.module("resource")
        for name, value in limits.items():
            kind = getattr(resource, name)
            soft, hard = resource.getrlimit(kind)
            # The soft limit only: reporting that it was hit takes memory and files.
            # For processor time the hard one follows, in case SIGXCPU is ignored.
            ceiling = value + 5 if name == "RLIMIT_CPU" else hard
            if hard != resource.RLIM_INFINITY:
                value, ceiling = min(value, hard), min(ceiling, hard)
            resource.setrlimit(kind, (value, ceiling))
            if name != "RLIMIT_CPU":
                self._lifted.append((resource.setrlimit, kind, (soft, hard)))


# Their frames are left out of what the user sees of an error.
_OWN_CODE = (
    Snippet.run,
    Ask.resume,
    Library.module,
    Masked.__exit__,
    leaving.leave,
    source.prepare,
    streams.replace,
    pack,
)
_OWN_FILES = {each.__code__.co_filename for each in _OWN_CODE}


def _forget_launcher() -> None:
    """Undo what would make this process act as the one it was forked from."""
    modules = sys.modules
    # Exit handlers belong to the process in which they were registered: a module
    # loaded ahead would have every snippet remove the launcher's temporary files.
    atexit._clear()
    if "weakref" in modules:
        modules["weakref"].finalize._registry.clear()
        modules["weakref"].finalize._registered_with_atexit = False
    if "logging" in modules:
        atexit.register(modules["logging"].shutdown)
    if "multiprocessing.util" in modules:
        atexit.register(modules["multiprocessing.util"]._exit_function)
    if "threading" in modules:
        main_thread = modules["threading"].main_thread()
        if hasattr(main_thread, "_set_native_id"):
            main_thread._set_native_id()
    # `random` sees to itself after a fork; NumPy's generator does not.
    if "numpy.random" in modules:
        modules["numpy.random"].seed()
