"""The snippet: runs the user's code in a process of its own, and ends as asked.

Responsible for what the code finds (a clean `__main__`, its parameters, the
functions to report with), for the ask (one exception in the main thread), for
what is sent to the host (progress, results, the text of an error), and for an
end that loses nothing. It never looks after processes: the keeper does that, and
goes by how this process ends, not by what it says.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` costs 5 ms, for its enums
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
from . import source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import CodeType, FrameType, ModuleType
    from typing import Any, NoReturn

FILENAME = "<snippet>"
ASKED_EXIT_CODE = 128 + _signal.SIGTERM

REHEARSAL: dict[str, Any] = {
    "code": "try: print(end='')\nfinally: raise SystemExit",
    "block": None,
    "params": {},
    "cwd": None,
    "limits": {},
}

# What the ask does depends on how far the snippet is.
WAITING = 0  # for its code: it leaves at once
RUNNING = 1  # the user's code, exit handlers and joined threads included: it raises
SETTLING = 2  # our own code, on the way out anyway: nothing


class StopRequested(SystemExit):
    """Raised once in the main thread of a snippet that is asked to stop.

    A `SystemExit`, since asyncio swallows every other exception raised in a
    callback, and since code that cleans up on its way out knows it already.
    """


class Snippet:
    def __init__(self, channel: int, path: list[str], flush_c: Callable[[], object]) -> None:
        self._channel = channel
        self._path = path
        self._flush_c = flush_c
        self._pid = os.getpid()
        self._main_thread = _thread.get_ident()
        self._phase = WAITING
        self._asked = False
        self._sending = False
        self._ask_deferred = False
        self._is_scheduled = False
        self._undo_trace: Callable[[], None] | None = None
        self._send_lock = _thread.allocate_lock()
        self._filename = FILENAME
        self._text: str | None = None
        self._namespace: dict[str, Any] = {}
        self._partial: CodeType | None = None
        self._value: object = None
        self._reported: object = None
        self._progress: float | None = None
        hooks = (Snippet._before_fork, Snippet._after_fork_in_parent)
        self._hooks = frozenset(hook.__code__ for hook in hooks)
        self._fork_masks: dict[int, set[int]] = {}
        self._lifted: list[tuple[int, tuple[int, int]]] = []

    def prepare(self, *, rehearse: bool) -> None:
        """Do ahead of the request whatever does not depend on it."""
        _forget_launcher()
        _signal.signal(_signal.SIGTERM, self._on_ask)
        _signal.signal(_signal.SIGURG, self._on_nudge)
        # Blocked since before the fork: a SIGTERM in between would have killed the
        # snippet without its cleanup.
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork_in_parent,
            after_in_child=self._after_fork_in_child,
        )
        if rehearse:
            # The pages that this writes to are the process's own once the request
            # comes, which then runs in a third of the time.
            path = sys.path[:]
            try:
                eval(self._load(REHEARSAL), self._namespace)
            except SystemExit:
                _let_go(self._namespace)
                _flush(_open_files())
                gc.collect()
            self._flush_c()
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
                self._phase = RUNNING
                self._execute(code)
            finally:
                self._phase = SETTLING
        except StopRequested:
            exit_code = ASKED_EXIT_CODE
        except SystemExit as error:
            exit_code = _exit_code(error)
        except BaseException as error:
            failure = error
        self._lift_limits()
        # Before threads are waited for: one that is no daemon may take for ever.
        if os.getpid() == self._pid:
            failure = self._send_result(failure)
        if failure is not None:
            self._report_failure(failure)
            exit_code = 130 if isinstance(failure, KeyboardInterrupt) else 1
            failure = None  # its traceback holds the globals
        self._leave(exit_code)

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
            sys.argv[:] = [block]
        program, self._partial = source.prepare(code, self._filename, namespace)
        if self._text is not None and "import" in self._text:
            self._show_source()
        sys.path[:] = path  # last, so that no file of the user's shadows our imports
        self._set_limits(request["limits"])
        return program

    def _show_source(self) -> None:
        """Let tracebacks, wherever they are made, find the snippet's lines."""
        if self._text is not None:
            linecache = self._import("linecache")
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
        number = float(percent)
        if number != self._progress:
            self._progress = number
            self._send(PROGRESS, repr(number).encode())

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
                asyncio = self._import("asyncio")
                self._show_source()
                asyncio.run(main)
            finally:
                main.close()
                value.close()
        else:
            self._value = value

    async def _await(self, coroutine: Coroutine[Any, Any, object]) -> None:
        self._value = await coroutine

    def _on_ask(self, signum: int, frame: FrameType | None) -> None:
        if self._asked:
            return  # a second one would abort the cleanup
        self._asked = True
        if self._phase == WAITING:
            os._exit(ASKED_EXIT_CODE)
        report = sys.unraisablehook

        def raise_again(unraisable: Any) -> None:
            # A finalizer or an exit handler that it was raised in has ended by it.
            if unraisable.exc_type is not StopRequested:
                report(unraisable)
            elif self._phase == RUNNING:
                self._interrupt(sys._getframe(1), at_once=False)

        sys.unraisablehook = raise_again
        if self._sending:
            self._ask_deferred = True  # an exception here would cut a frame in two
        elif self._phase == RUNNING:
            self._interrupt(frame)

    def _interrupt(self, frame: FrameType | None, *, at_once: bool = True) -> None:
        """Raise the exception, where it does what the code around it expects."""
        events = sys.modules.get("asyncio.events")
        if events is not None:
            maker = _maker_of_a_loop(frame)
            if maker is not None:
                self._raise_at_next_opcode(maker)  # half a loop could not be closed
                return
            running = events._get_running_loop()
            loop = running or _loop_about_to_run(frame)
            if loop is not None:
                self._prepare_loop(loop)
            caller = frame
            while caller is not None and caller.f_globals.get("__name__") == "selectors":
                caller = caller.f_back  # the loop's, or the code's own
            outside = _first_outside_asyncio(caller)
            if loop is not None and (running is None or outside is not caller):
                # Raised there, the exception could take the wakeup of a task with it,
                # and that task's cleanup would never run. So: by the loop itself, or
                # where the code that has called asyncio goes on, whichever comes first.
                self._is_scheduled = True
                loop.call_soon_threadsafe(self._raise_if_scheduled)
                if running is not None and outside is not None:
                    self._raise_at_next_opcode(outside)
                return
        if frame is not None and frame.f_code in self._hooks and frame.f_back is not None:
            self._raise_at_next_opcode(frame.f_back)  # what a hook raises is ignored
        elif frame is not None and (
            not at_once or frame.f_code.co_code[frame.f_lasti] in _backward_jumps()
        ):
            self._raise_at_next_opcode(frame)
        else:
            self._raise()  # at once, or what blocks would only be resumed

    def _on_nudge(self, signum: int, frame: FrameType | None) -> None:
        """The keeper's, that interrupts a call which began too late to hear the ask."""
        if self._is_scheduled and self._phase == RUNNING:
            # The loop has not come to it: a task holds it up, and may do so for ever.
            self._disarm()
            self._interrupt(frame)

    def _raise_if_scheduled(self) -> None:
        if self._is_scheduled:
            self._disarm()
            self._raise()

    def _prepare_loop(self, loop: Any) -> None:
        """Let the cleanup of every task come to its end, whichever of them was asked.

        The task in which the exception is raised ends with it, and passes it on to who
        waits for that task: out of the loop again, in the middle of the others' cleanup.
        """
        call_handler = loop.call_exception_handler
        expected = (StopRequested, sys.modules["asyncio.exceptions"].CancelledError)

        def call_exception_handler(context: dict[str, Any]) -> None:
            if not isinstance(context.get("exception"), expected):
                call_handler(context)

        def cancel_all_tasks(loop: Any) -> None:
            tasks = sys.modules["asyncio"].all_tasks(loop)
            left = set(tasks)

            def on_done(task: Any) -> None:
                left.discard(task)
                if not left:
                    loop.stop()

            for task in tasks:
                task.cancel()
                task.add_done_callback(on_done)
            while left:
                try:
                    loop.run_forever()
                except SystemExit:
                    pass  # passed on by a task, as said
            for task in tasks:
                if not task.cancelled() and task.exception() is not None:
                    message = "unhandled exception during the stop"
                    context = {"message": message, "exception": task.exception(), "task": task}
                    loop.call_exception_handler(context)

        try:
            loop.call_exception_handler = call_exception_handler
        except AttributeError:
            pass  # a loop that is no Python object
        runners = sys.modules.get("asyncio.runners")
        if hasattr(runners, "_cancel_all_tasks"):
            runners._cancel_all_tasks = cancel_all_tasks  # type: ignore[union-attr]

    def _raise_at_next_opcode(self, asked: FrameType) -> None:
        """Raise where the code has got to, not at the jump that ends a loop's round.

        From CPython 3.11 on, an exception at such a jump can pass by the `finally` of
        the `try` that the loop stands in: the jump is not in that block's range.
        """
        self._disarm(scheduled=self._is_scheduled)
        tracer = sys.gettrace()

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            if frame is not asked:
                return None
            if event != "opcode":
                return trace
            self._disarm()
            self._raise()

        def disarm() -> None:
            asked.f_trace_opcodes = False
            asked.f_trace = None
            sys.settrace(tracer)

        self._undo_trace = disarm
        asked.f_trace_opcodes = True
        asked.f_trace = trace
        sys.settrace(trace)

    def _disarm(self, *, scheduled: bool = False) -> None:
        """Take back what is to raise the exception later."""
        self._is_scheduled = scheduled
        if self._undo_trace is not None:
            undo, self._undo_trace = self._undo_trace, None
            undo()

    def _raise(self) -> NoReturn:
        raise StopRequested(ASKED_EXIT_CODE)

    # What the snippet forks is ended by SIGTERM, as children of any program are. Blocked
    # meanwhile: one that came before its handler is gone would be noted, and forgotten.

    def _before_fork(self) -> None:
        mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGTERM,))
        self._fork_masks[_thread.get_ident()] = mask

    def _after_fork_in_parent(self) -> None:
        mask = self._fork_masks.pop(_thread.get_ident())
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)

    def _after_fork_in_child(self) -> None:
        self._send_lock = _thread.allocate_lock()
        if _signal.getsignal(_signal.SIGTERM) == self._on_ask:
            self._disarm()
            _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)
        self._after_fork_in_parent()

    # -- the channel

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = os.read(self._channel, size - len(data))
            if not part:
                os._exit(0)
            data = data + part if data else part
        return data

    def _send(self, kind: bytes, payload: bytes) -> None:
        in_main_thread = _thread.get_ident() == self._main_thread
        if in_main_thread:
            self._sending = True
        try:
            with self._send_lock:
                view = memoryview(pack(kind, payload))
                while view:
                    view = view[os.write(self._channel, view) :]
        finally:
            if in_main_thread:
                self._sending = False
        if self._ask_deferred and in_main_thread and self._phase == RUNNING:
            self._ask_deferred = False
            self._raise()

    def _to_json(self, value: object, what: str) -> bytes:
        json = self._import("json")
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
        if self._asked and self._reported is not None:
            candidates.append(("the reported value", lambda: self._reported))
        if self._asked and self._partial is not None and self._reported is None:
            partial = self._partial
            candidates.append(("the partial result", lambda: eval(partial, self._namespace)))
        for what, candidate in candidates:
            try:
                self._send(RESULT, self._to_json(candidate(), what))
                break
            except BaseException as error:
                if not self._asked and failure is None:
                    failure = error.with_traceback(None)
        return failure

    def _report_failure(self, error: BaseException) -> None:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != self._filename:
            trace = trace.tb_next
        error.__traceback__ = trace
        if isinstance(error, SyntaxError) and error.filename == self._filename:
            if error.text is None and self._text is not None and error.lineno:
                # The compiler's later stages look for the line in a file.
                error.text = self._lines()[error.lineno - 1]
        text = type(error).__name__
        try:
            self._show_source()
            headline, formatted = self._describe(error)
            text = f"{headline}\n\n{formatted}"
            if sys.excepthook is sys.__excepthook__:
                sys.stderr.write(formatted)
            else:
                sys.excepthook(type(error), error, trace)
        except BaseException as another:
            try:
                sys.__excepthook__(type(another), another, another.__traceback__)
            except BaseException:
                pass  # its standard error is gone; the exit code still tells
        if os.getpid() == self._pid:
            try:
                self._send(ERROR, text.encode("utf-8", "replace")[:MAX_ERROR])
            except OSError:
                pass  # the snippet closed the channel; the exit code still tells

    def _describe(self, error: BaseException) -> tuple[str, str]:
        traceback = self._import("traceback")
        kind = type(error)
        details = traceback.TracebackException(kind, error, error.__traceback__)
        pending = [details]
        while pending:
            each = pending.pop()
            each.stack[:] = [frame for frame in each.stack if frame.filename != _FILE]
            linked = [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]
            pending += [another for another in linked if another is not None]
        lines = list(details.format_exception_only())
        name = kind.__qualname__
        if kind.__module__ not in ("builtins", "__main__"):
            name = f"{kind.__module__}.{name}"
        headline = next((line for line in lines if line.startswith(name)), lines[-1])
        return headline.strip().partition("\n")[0], "".join(details.format())

    # -- leaving

    def _leave(self, exit_code: int) -> NoReturn:
        """What an interpreter does at its end, less the 4 ms that it takes for it."""
        try:
            self._phase = RUNNING
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()
            atexit._run_exitfuncs()
            self._phase = SETTLING
        except StopRequested:
            atexit._run_exitfuncs()
        except BaseException as error:
            self._phase = SETTLING
            sys.excepthook(type(error), error, error.__traceback__)
        self._phase = SETTLING
        files = _open_files()
        namespace, self._namespace = self._namespace, {}
        self._partial = self._value = self._reported = None
        if _thread._count() or os.getpid() != self._pid:
            # Threads would see their globals vanish: the interpreter knows how to
            # silence them. A child that the snippet forked is not ours to hurry.
            _flush(files)
            raise SystemExit(exit_code)
        # The files are held meanwhile, as a collector may close one in a cycle before
        # what it buffers is written.
        _let_go(namespace)
        del namespace
        sys.modules.pop("__main__", None)
        gc.collect()
        _flush(files)
        self._flush_c()
        os._exit(exit_code)

    # -- the rest of the surroundings

    def _import(self, name: str) -> Any:
        """A module of the standard library, whatever the user's code did to the path."""
        path = sys.path[:]
        sys.path[:] = [each for each in self._path if each]
        try:
            __import__(name)
        finally:
            sys.path[:] = path
        return sys.modules[name]

    def _set_limits(self, limits: dict[str, int]) -> None:
        if not limits:
            return
        resource = self._import("resource")
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
                self._lifted.append((kind, (soft, hard)))

    def _lift_limits(self) -> None:
        for kind, limit in self._lifted:
            sys.modules["resource"].setrlimit(kind, limit)


_FILE = Snippet.run.__code__.co_filename


def _backward_jumps() -> frozenset[int]:
    """The opcodes that end a loop's round, and at which signals are looked for."""
    if sys.version_info < (3, 11):
        return frozenset()  # there, each such jump is in its block's range
    import opcode

    return frozenset(code for name, code in opcode.opmap.items() if "JUMP_BACKWARD" in name)


def _first_outside_asyncio(frame: FrameType | None) -> FrameType | None:
    """The frame that has called into asyncio's code; None if that is the loop alone."""
    while frame is not None and frame.f_code.co_name != "_run_once":
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in ("asyncio", "selectors"):
            return frame
        frame = frame.f_back
    return None


def _loop_about_to_run(frame: FrameType | None) -> Any:
    """The event loop that `frame`, of asyncio's own code, is about to run, or has run."""
    found = None
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] != "asyncio":
            break
        for name in ("self", "loop"):
            value = frame.f_locals.get(name)
            loop: Any = getattr(value, "_loop", value)
            if hasattr(loop, "call_soon_threadsafe") and not loop.is_closed():
                found = loop
        frame = frame.f_back
    return found


def _maker_of_a_loop(frame: FrameType | None) -> FrameType | None:
    """The frame that waits for a new event loop, where `frame` is making one."""
    found = None
    while frame is not None:
        if frame.f_code.co_name == "new_event_loop":
            found = frame.f_back
        frame = frame.f_back
    return found


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        fits = -(2**63) <= error.code < 2**63
        return error.code & 0xFF if fits else 0xFF
    try:
        print(error.code, file=sys.stderr)
    except Exception:
        pass  # its standard error is gone; the exit code still tells
    return 1


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


def _open_files() -> list[Any]:
    """What may hold something that is not yet written, in the order to write it."""
    io = sys.modules["io"]
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    # By type: `isinstance` would also ask, and so run, what only poses as a file.
    files = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    files.sort(key=lambda each: not isinstance(each, io.TextIOWrapper))
    return [*files, sys.stdout, sys.stderr]


def _flush(files: list[Any]) -> None:
    for file in files:
        try:
            if not file.closed:
                file.flush()
        except Exception:
            pass  # an interpreter's own end would pass over it, too


def _let_go(namespace: dict[str, Any]) -> None:
    """Let go of the globals that may have finalizers, in order; these find the rest."""
    kept = (type, type(sys), type(_let_go))
    for name in list(namespace):
        kind = type(namespace[name])
        if kind.__module__ != "builtins" and not issubclass(kind, kept) and name[:2] != "__":
            namespace[name] = None
