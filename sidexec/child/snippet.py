"""The snippet: runs the user's code in a process of its own.

It provides what the code finds (a clean `__main__`, its parameters, the functions to
report with) and sends progress, results and the text of an error to the host. `asking`
is how it is asked to stop, `leaving` how it ends. It never handles other processes: the
keeper does that, and trusts how this process ends, not what it says.
"""

from __future__ import annotations

import _collections  # type: ignore[import-not-found]  # `collections` takes its time
import _functools  # type: ignore[import-not-found]
import atexit
import marshal
import os
import resource
import sys

from ..protocol import ERROR, HEADER, MAX_ERROR, PROGRESS, RESULT
from . import confinement, kernel, leaving, library, source
from .asking import ASKED_EXIT_CODE, LEAVING, RUNNING, SETTLING, Ask, StopRequested
from .channel import Channel
from .failures import FILENAME, Failures
from .results import to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import CodeType
    from typing import Any, NoReturn

REHEARSAL: dict[str, Any] = {
    "code": "import sys\nprint(end='')",
    "params": {},
    "block": None,
}


class Forked(BaseException):
    """Raised in a new snippet, to get from where it was forked to the bottom of the stack."""

    args: tuple[Snippet, bool]  # and whether it is to rehearse


class Snippet:
    """What `payload.BOOT` runs in a process of its own.

    BOOT calls the user's code itself, so that no other frame of ours is below that.
    """

    def __init__(self, channel: int, path: list[str], preloaded: list[Any]) -> None:
        self.ask = Ask()
        self.returned: dict[int, object] = {}
        self.failure: BaseException | None = None
        self.observers = leaving.Observers()
        self._channel = Channel(channel)
        self._failures = Failures()
        self._path = path
        self._preloaded = preloaded  # what has a finalizer
        self._pid = os.getpid()
        self._request: dict[str, Any] = {}
        self._namespace: dict[str, Any] = {}
        self._coroutine: Coroutine[Any, Any, object] | None = None
        self._partial: CodeType | None = None
        self._reported: object = None
        self._descriptors: list[int] = []  # that have come with the request
        self._lifted: list[tuple[int, tuple[int, int]]] = []

    def prepare(self, *, rehearse: bool) -> None:
        """Do what does not depend on the request, and then wait for the request."""
        _forget_launcher()
        self.ask.listen()
        if rehearse:
            # The pages that this writes to need not be copied when the request comes,
            # which then runs in a third of the time.
            path = sys.path[:]
            code = self._load(REHEARSAL)
            eval(code, self._namespace)
            leaving.let_go(self._take_globals)
            leaving.finish([], may_close=True)
            kernel.flush_c()
            sys.path[:] = path
            library.module("linecache").cache.pop(FILENAME, None)  # the lines of this code
        header, self._descriptors = self._channel.receive(HEADER)
        length = int.from_bytes(header[1:], "big")
        umask, request = marshal.loads(self._channel.read(length))
        if umask is not None:
            os.umask(umask)
        self._request = marshal.loads(request)
        if self._request["joins_stderr"]:
            os.dup2(1, 2)

    def begin(self) -> None:
        """Prepare `returned`: reading its item 0 calls the user's code."""
        request = self._request
        if len(self._descriptors) != request["descriptors"]:
            raise OSError("its descriptors did not come: too many may be on their way or open")
        if request["has_input"]:
            os.dup2(self._descriptors[0], 0)
            os.close(self._descriptors.pop(0))
        if request["cwd"] is None:  # the host's, which has been removed
            os.fchdir(self._descriptors[0])
            os.close(self._descriptors.pop(0))
        else:
            os.chdir(request["cwd"])
        code = self._load(request)
        if request["confinement"] is not None:
            confinement.confine(request["confinement"], self._descriptors)
        self._lifted = kernel.set_limits(request["limits"])
        call = _functools.partial(eval, code, self._namespace)
        if code.co_flags & source.CO_COROUTINE:
            asyncio = library.module("asyncio")
            self._failures.show_source()
            run, self.ask.clean_up = _run_and_close(asyncio)
            self._coroutine = call()
            call = _functools.partial(run, self._coroutine)
        # It calls the code and keeps what that returns in one opcode: between two opcodes, an
        # ask could be raised.
        self.returned = _collections.defaultdict(call)
        self.ask.phase = RUNNING

    def end(self) -> NoReturn:
        """Send the result or the error, and exit."""
        failure, self.failure = self.failure, None
        exit_code = 0
        if self._coroutine is not None:
            if isinstance(failure, StopRequested) and not self.returned:
                self.returned.update(_returned_in_spite_of(failure))
            try:
                self._coroutine.close()  # if it has not begun
            except BaseException as error:
                failure = failure or error
        if isinstance(failure, SystemExit):
            is_asked = isinstance(failure, StopRequested)
            exit_code = ASKED_EXIT_CODE if is_asked else self._take_exit_code(failure)
            ended_by: list[Any] = [failure]
            failure = None
            leaving.drop(ended_by)
        for kind, limits in self._lifted:
            try:
                resource.setrlimit(kind, limits)
            except (ValueError, OSError):
                pass  # the code has lowered it for good
        # Before threads are waited for: one that is no daemon may take for ever.
        if os.getpid() == self._pid:
            failure = self._send_result(failure)
        if failure is not None:
            self._send_error(self._failures.report(failure, self._call_hook))
            exit_code = leaving.INTERRUPTED if _is_interrupt(failure) else 1
            if self._failures.exit is not None:
                exit_code, self._failures.exit = self._take_exit_code(self._failures.exit), None
            ended_by, failure = [failure], None  # its traceback holds the globals
            leaving.drop(ended_by)
        is_snippet = os.getpid() == self._pid
        leaving.leave(
            self.ask, self._take_globals, self._preloaded, is_snippet, exit_code, self.observers
        )

    def _call_hook(self, error: BaseException) -> None:
        """Call the user's `sys.excepthook`, where signals and an ask come as in its code."""
        try:
            self.ask.phase = LEAVING
            self.observers.take_signals()
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            self.ask.phase = SETTLING
            self.observers.put_off_signals()

    def _take_globals(self) -> object:
        """Take out all that may refer to objects of the user's code, for the caller to free."""
        held = (self._namespace, self._reported, self._coroutine, self.returned)
        self._namespace, self.returned = {}, {}
        self._partial = self._reported = self._coroutine = None
        self._request.clear()
        return held, self.ask.take_loop()

    # -- what the user's code finds

    def _load(self, request: dict[str, Any]) -> CodeType:
        sys.modules["__main__"] = main = type(sys)("__main__")
        self._namespace = namespace = vars(main)
        namespace["__builtins__"] = sys.modules["builtins"]
        if sys.version_info < (3, 14):
            namespace["__annotations__"] = {}
        namespace["__loader__"] = sys.modules["_frozen_importlib"].BuiltinImporter
        namespace["params"] = request["params"]
        namespace["report_progress"] = self._report_progress
        namespace["report_result"] = self._report_result
        block: str | None = request["block"]
        code: Any = request["code"]  # None for a block
        self._failures.text = code
        if block is None:
            path = self._path
            sys.argv[:] = ["-c"]
        else:
            file = os.path.join(block, "__main__.py") if os.path.isdir(block) else block
            # Of a link to a file the modules beside the file are found, as by `python`.
            place, name = os.path.split(file if file != block else os.path.realpath(file))
            path = [place, *(each for each in self._path if each)]
            code = confinement.read_in(place, name)
            self._failures.filename = namespace["__file__"] = file
            loaders = sys.modules["_frozen_importlib_external"]
            namespace["__loader__"] = loaders.SourceFileLoader("__main__", file)
            sys.argv[:] = [block, *request["args"]]
        program, self._partial = source.prepare(code, self._failures.filename, namespace)
        # From 3.15 on, the interpreter shows lines of what it ignores, which needs no import.
        if isinstance(code, str) and ("import" in code or sys.version_info >= (3, 15)):
            self._failures.show_source()
        sys.path[:] = path  # last, so that no file of the user's shadows our imports
        return program

    def _report_progress(self, percent: float) -> None:
        """Set the execution's progress, from 0 to 100."""
        if isinstance(percent, bool) or not hasattr(type(percent), "__float__"):
            raise TypeError(f"percent must be a number, not {type(percent).__name__}")
        if not 0 <= percent <= 100:
            raise ValueError(f"percent must be between 0 and 100, not {percent!r}")
        self._channel.send(PROGRESS, repr(float(percent)).encode())

    def _report_result(self, value: object) -> None:
        """Record `value` as the partial result; it is read again when asked to stop."""
        if os.getpid() != self._pid:
            raise RuntimeError("report_result works in the snippet's own process only")
        data = to_json(value, "the reported value")
        # Kept first: an ask that comes while it is sent is raised before this returns.
        previous, self._reported = self._reported, value
        try:
            self._channel.send(RESULT, data)
        except OSError:
            self._reported = previous
            raise

    # -- what came of it

    def _send_result(self, failure: BaseException | None) -> BaseException | None:
        """Send the result, if there is one; returns the failure, perhaps a new one."""
        try:
            self._channel.flush()
        except OSError:
            pass  # the snippet closed the channel
        candidates: list[tuple[str, Callable[[], object]]] = []
        returned = self.returned.get(0)
        if returned is not None:
            candidates.append(("the returned value", lambda: returned))
        asked = self.ask.has_come
        if asked and self._reported is not None:
            candidates.append(("the reported value", lambda: self._reported))
        elif asked and (partial := self._partial) is not None:
            candidates.append(("the partial result", lambda: eval(partial, self._namespace)))
        for what, candidate in candidates:
            try:
                self._channel.send(RESULT, to_json(candidate(), what))
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
            if error is not self._failures.exit:  # else the failure itself has been told
                self._send_error(f"exit code 1: {text}")
            print(text, file=sys.stderr or sys.__stderr__)
        except Exception:
            pass  # its standard error is gone; the exit code still tells
        return 1

    def _send_error(self, text: str) -> None:
        if os.getpid() == self._pid:
            try:
                self._channel.send(ERROR, text.encode("utf-8", "replace")[:MAX_ERROR])
            except OSError:
                pass  # the snippet closed the channel; the exit code still tells


def _is_interrupt(failure: BaseException) -> bool:
    """Whether `python -c` ends by SIGINT: of a subclass, it does so from Python 3.14 on."""
    if sys.version_info >= (3, 14):
        return isinstance(failure, KeyboardInterrupt)
    return type(failure) is KeyboardInterrupt


def _run_and_close(asyncio: Any) -> tuple[Callable[..., object], Callable[[], object]]:
    """`asyncio.run` in two parts: the result is kept if the second part is stopped."""
    if hasattr(asyncio, "Runner"):
        runner = asyncio.Runner()
        return runner.run, runner.close
    loop = asyncio.new_event_loop()  # before Python 3.11
    asyncio.set_event_loop(loop)

    def close() -> None:
        try:
            asyncio.runners._cancel_all_tasks(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    return loop.run_until_complete, close


def _returned_in_spite_of(error: BaseException) -> dict[int, object]:
    """What the main task returned after the ask, although the loop raised."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "run_until_complete":
            task: Any = trace.tb_frame.f_locals.get("future")
            # It may also be a function of the user's own, and anything its `future`.
            if getattr(task, "done", bool)() and not task.cancelled() and task.exception() is None:
                return {0: task.result()}
        trace = trace.tb_next
    return {}


def _forget_launcher() -> None:
    """Undo what would make this process act like the one it was forked from."""
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
