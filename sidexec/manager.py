"""The public methods: ids, validation, and responses made of what is known.

Nothing here talks to a process or changes an execution: that is the engine's business. No
method holds a lock, so that a signal handler may interrupt any of them and call any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import marshal
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, Union

from . import checks, procfs, suspending
from .engine.output import Output, OutputChunk, Stream
from .limits import Limits
from .responses import (
    ExecutionSummary,
    GetSideExecutionStatusResponse,
    ListActionBlocksResponse,
    ListExecutionsData,
    ListSideExecutionsResponse,
    SideExecutionError,
    StartData,
    StartSideExecutionResponse,
    StatusData,
    StopData,
    StopSideExecutionResponse,
    StopStatus,
)

if os.name == "posix":  # elsewhere the constructor says so, not an import
    from .engine import payload
    from .engine.delivery import Delivery
    from .engine.engine import CLOSED, Engine
    from .engine.execution import Execution, Sample, State, parse_result
    from .engine.launcher import Settings

logger = logging.getLogger(__name__)

SHUTTING_DOWN = "the interpreter is shutting down: its executions are stopped when it has ended"
STATUSES = ("running", "completed", "failed", "stopped")
# How old a figure of memory or processor use may be before it is read anew.
USAGE_AGE = 0.1

Path = Union[str, "os.PathLike[str]"]


class Default(enum.Enum):
    DEFAULT = "the manager's default_timeout"


DEFAULT: Literal[Default.DEFAULT] = Default.DEFAULT
"""As a `timeout`: the one that the manager was made with."""


@dataclasses.dataclass(frozen=True)
class _Request:
    """What a start was called with."""

    code: str | None
    block: str | None
    args: tuple[str, ...]
    params: object
    timeout: object
    thread_id: object
    cwd: Path | None
    env: object
    limits: object
    on_output: Callable[[OutputChunk], object] | None


class ExecutionManager:
    """Runs Python snippets in processes of their own, and stops them.

    python: the interpreter to run them with, by default `sys.executable`. A program
        that is none, as a frozen one or a server that embeds Python, has to pass it.
    cwd, env: their current directory and environment; by default the host's, as
        they are at each start.
    default_timeout: seconds until an execution is stopped, unless its start says
        otherwise; None for no limit.
    grace_period: seconds that an execution has, once asked, to clean up.
    max_output: bytes kept of each stream of each execution, the newest.
    max_history: how many finished executions are remembered, the newest.
    preload: names of modules to import once, ahead of all executions.
    limits: what each execution's processes may use.

    Making a manager starts nothing; its first start does. Every method may be called
    from any thread, from `on_output`, and from a signal handler. Leaving a `with`
    block closes it. A manager that is let go of without `close` closes itself, and
    when the host ends, however it does, its executions are stopped.

    Here and in every method, arguments that can't be raise `TypeError` or `ValueError`;
    what goes wrong at run time is in the response. Where the platform is not POSIX,
    this raises `NotImplementedError`.
    """

    def __init__(
        self,
        *,
        python: Path | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        default_timeout: float | None = 300.0,
        grace_period: float = 5.0,
        max_output: int = 16 * 1024 * 1024,
        max_history: int = 10_000,
        preload: Iterable[str] = (),
        limits: Limits | None = None,
    ) -> None:
        if os.name != "posix":
            raise NotImplementedError(
                "sidexec needs a POSIX system, such as Linux: others lack what it takes to"
                " stop a process with all that it has started"
            )
        self._cwd = None if cwd is None else checks.absolute(checks.path("cwd", cwd))
        self._environment = checks.environment("env", env)
        self._default_timeout = checks.seconds_or_none("default_timeout", default_timeout)
        self._grace = checks.seconds("grace_period", grace_period)
        self._max_output = checks.count("max_output", max_output, 1)
        self._limits = Limits._check(limits) or Limits()
        settings = Settings(
            python=_interpreter(python),
            cwd=self._cwd,
            preload=checks.names("preload", preload),
            grace=self._grace,
        )
        self._engine = Engine(settings, checks.count("max_history", max_history, 0))
        self._texts: dict[Stream, tuple[object, int, str]] = {}

    def __enter__(self) -> ExecutionManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        engine = self._engine
        state = "closed" if engine.is_closing else f"{len(engine.running())} running"
        return f"<{type(self).__name__}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} can't be copied or pickled: it belongs to the process"
            " that has made it; make one where it is used"
        )

    def __del__(self) -> None:
        engine = self.__dict__.get("_engine")
        if engine is None or engine.is_closing or self._is_foreign() or sys.is_finalizing():
            return  # the launcher sees to it when the host has ended
        runs = bool(engine.running())
        text = f"unclosed {self!r}: call close(), or use it in a `with` block"
        engine.close(self._grace, wait=False)
        if runs:  # last, as a warning may be an error
            warnings.warn(text, ResourceWarning, source=self)

    # -- starting

    def start_with_code(
        self,
        code: str,
        params: dict[str, Any] | None = None,
        timeout: float | None | Literal[Default.DEFAULT] = DEFAULT,
        *,
        thread_id: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        on_output: Callable[[OutputChunk], object] | None = None,
    ) -> StartSideExecutionResponse:
        """Start Python source; returns as soon as it is on its way.

        The code finds `params`, `report_progress(percent)` and `report_result(value)`;
        `return` and `await` work at its top level. `timeout` is in seconds, None for
        no limit. `cwd`, `env` and `limits` replace the manager's. `on_output` is
        called with each `OutputChunk`, in order, in a thread of its own; what it
        raises is logged.

        A start that fails has a response whose `success` is false and whose `error`
        says what to do; there is no `side_execution_id` then. The first start also
        brings up an interpreter, which may take 60 seconds at the very most.
        """
        checked = checks.utf8("code", code)
        options = (params, timeout, thread_id, cwd, env, limits, on_output)
        return self._start(_Request(checked, None, (), *options))

    def start_with_action_block(
        self,
        path: Path,
        params: dict[str, Any] | None = None,
        timeout: float | None | Literal[Default.DEFAULT] = DEFAULT,
        *,
        args: Sequence[str] = (),
        thread_id: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        on_output: Callable[[OutputChunk], object] | None = None,
    ) -> StartSideExecutionResponse:
        """Start a `.py` file, or a directory that has a `__main__.py`.

        A relative path is relative to the host's current directory. `args` is its
        `sys.argv[1:]`. All else is as for `start_with_code`.
        """
        block = checks.path("path", path)
        arguments = checks.arguments("args", args)
        options = (params, timeout, thread_id, cwd, env, limits, on_output)
        return self._start(_Request(None, block, arguments, *options))

    def _start(self, request: _Request) -> StartSideExecutionResponse:
        params = checks.params("params", request.params)
        timeout = self._default_timeout
        if request.timeout is not DEFAULT:
            timeout = checks.seconds_or_none("timeout", request.timeout)
        thread_id = request.thread_id
        thread = None if thread_id is None else checks.text("thread_id", thread_id)
        cwd = self._cwd
        if request.cwd is not None:
            cwd = checks.absolute(checks.path("cwd", request.cwd))
        environment = checks.environment("env", request.env)
        limits = Limits._check(request.limits) or self._limits
        on_output = request.on_output
        if on_output is not None and not callable(on_output):
            raise TypeError(f"on_output must be callable, not {type(on_output).__name__}")
        block = request.block

        def answer(execution: Execution | None, error: str | None) -> StartSideExecutionResponse:
            data = StartData(
                side_execution_id=None if execution is None else execution.id,
                code=request.code,
                action_block=block,
                status="failed" if execution is None else "running",
                start_time=None if execution is None else execution.start_time,
                params=params,
                timeout=timeout,
            )
            message = "not started" if execution is None else "started"
            return StartSideExecutionResponse(data, error is None, message, error, thread_id=thread)

        error = self._why_not(cwd, block)
        if error is not None:
            return answer(None, error)
        frame = {
            "code": None if request.code is None else _dedent(request.code),
            "block": None if block is None else checks.absolute(block),
            "args": request.args,
            "params": params,
            "cwd": cwd or _current_directory(),
            "limits": limits._to_request(),
        }
        id = os.urandom(16).hex()
        engine = self._engine
        execution = Execution(
            id,
            marshal.dumps(frame, 2),
            Output(self._max_output, self._texts),
            None if on_output is None else Delivery(id, on_output),
            thread_id=thread,
            action_block=block,
            timeout=timeout,
            on_end=engine.on_end,
        )
        inherited = environment is None
        if environment is None:
            environment = self._environment
        if environment is None:
            environment = _current_environment()
        engine.start(execution, environment, is_default=inherited)
        if execution.state is State.REFUSED:
            return answer(None, execution.refusal)
        logger.debug("%s is started", id)
        return answer(execution, None)

    def _why_not(self, cwd: str | None, block: str | None) -> str | None:
        """What can be seen to be wrong before anything is started."""
        if self._engine.is_closing:
            return CLOSED
        if sys.is_finalizing():
            return SHUTTING_DOWN
        if self._is_foreign():
            return self._foreign()
        patcher = sys.modules.get("eventlet.patcher")
        if patcher is not None and patcher.is_monkey_patched("thread"):
            return (
                "eventlet has replaced the threads of this process, which are needed here:"
                " call eventlet.monkey_patch(thread=False), or use gevent"
            )
        if cwd is not None and not checks.is_directory(cwd):
            return f"no such directory: {cwd!r}; cwd must be one that exists"
        if block is not None:
            from .blocks import why_not_runnable

            return why_not_runnable(block)
        return None

    # -- asking

    def get_status(self, side_execution_id: str) -> GetSideExecutionStatusResponse:
        """What is known of an execution now: status, output, result, progress, usage.

        For an unknown id `success` is false and the status `not_found`.
        """
        id = checks.text("side_execution_id", side_execution_id)
        return self._status_response(id, self._engine.executions.get(id))

    def _status_response(
        self, id: str, execution: Execution | None
    ) -> GetSideExecutionStatusResponse:
        if execution is None:
            return GetSideExecutionStatusResponse(
                StatusData(id, "not_found"), False, None, _unknown(id)
            )
        end = execution.end
        memory = cpu = None
        if end is None:
            memory, cpu = self._usage(execution)
            duration = time.monotonic() - execution.started_at
        else:
            duration = end.duration
        result = execution.reported if end is None else end.result
        data = StatusData(
            side_execution_id=id,
            status="running" if end is None else end.status,
            start_time=execution.start_time,
            end_time=None if end is None else end.time,
            duration=duration,
            result=_parse(result),
            output=execution.output.text("stdout"),
            error=None if end is None else end.error,
            progress=execution.progress,
            memory_usage=memory,
            cpu_usage=cpu,
            error_output=execution.output.text("stderr"),
            exit_code=None if end is None else end.exit_code,
            stop_reason=execution.stop_reason,
            output_dropped=execution.output.dropped,
        )
        error = None
        if end is not None and end.stuck:
            error = end.error
        elif end is None and self._is_foreign():
            error = self._foreign()  # what it was when that process was forked
        return GetSideExecutionStatusResponse(
            data,
            error is None,
            f"the execution is {data.status}",
            error,
            thread_id=execution.thread_id,
        )

    def wait(
        self, side_execution_id: str, timeout: float | None = None
    ) -> GetSideExecutionStatusResponse:
        """Wait until an execution has ended, at most `timeout` seconds; its status then.

        It returns once `on_output` has had everything. Past the timeout the status may
        still be `running`. An unknown id answers at once.
        """
        id = checks.text("side_execution_id", side_execution_id)
        limit = checks.seconds_or_none("timeout", timeout)
        execution = self._engine.executions.get(id)
        if execution is not None:
            until = None if limit is None else time.monotonic() + limit
            if execution.changed.wait_for(self._is_over(execution), limit):
                if execution.delivery is not None:
                    left = None if until is None else max(0.0, until - time.monotonic())
                    execution.delivery.wait(left)
        # Of the one that was waited for, which may be forgotten already.
        return self._status_response(id, execution)

    def follow(self, side_execution_id: str) -> Iterator[OutputChunk]:
        """Iterate over an execution's output, from the first byte kept to its end.

        Blocks between chunks until there is more. Every call has an iterator of its
        own. Where it is read too slowly for `max_output`, the chunk after the gap says
        in `dropped` how many bytes are missing. Raises `SideExecutionError` at the call
        for an unknown id. In a process that was forked meanwhile it ends with what is
        known there.
        """
        id = checks.text("side_execution_id", side_execution_id)
        execution = self._engine.executions.get(id)
        if execution is None:
            raise SideExecutionError(self.get_status(id))
        return execution.output.follow(self._is_over(execution))

    def list_executions(self, status: str | None = None) -> ListSideExecutionsResponse:
        """The executions that are known, or those of them that are of `status`."""
        if status is not None and checks.text("status", status) not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {status!r}")
        found = []
        for execution in list(self._engine.executions.values()):
            end = execution.end
            current = "running" if end is None else end.status
            if status is None or status == current:
                found.append(
                    ExecutionSummary(
                        execution.id,
                        current,
                        execution.start_time,
                        None if end is None else end.time,
                        execution.stop_reason,
                        execution.action_block,
                    )
                )
        return ListSideExecutionsResponse(ListExecutionsData(tuple(found), len(found)))

    def list_action_blocks(self, path: Path = ".") -> ListActionBlocksResponse:
        """The directories below `path` that have a `__main__.py`; runs nothing.

        `success` is false where there is no such directory.
        """
        from . import blocks

        return blocks.find(checks.path("path", path))

    # -- stopping

    def stop(
        self, side_execution_id: str, *, grace: float | None = None, force: bool = False
    ) -> StopSideExecutionResponse:
        """Stop an execution and all that it has spawned; returns when nothing is left.

        It is asked first, and killed when `grace` seconds are over, by default the
        manager's grace period; with `force` at once. Of any number of calls exactly
        one gets the status `stopped`, the others `already_stopped` and the same data;
        a shorter grace or `force` also hurries a stop that is under way.
        """
        id = checks.text("side_execution_id", side_execution_id)
        return self._stop([id], self._grace_of(grace, force))[0]

    def stop_all(
        self, *, grace: float | None = None, force: bool = False
    ) -> list[StopSideExecutionResponse]:
        """Stop everything that runs, side by side; one response for each of them."""
        running = [each.id for each in list(self._engine.executions.values()) if each.end is None]
        return self._stop(running, self._grace_of(grace, force))

    def close(self, *, grace: float | None = None) -> None:
        """Stop everything and give all processes, threads and descriptors back.

        Later starts fail; what has ended can still be asked about. A second call
        waits for the first one.
        """
        seconds = self._grace_of(grace, False)
        self._engine.is_closing = True
        if not self._is_foreign():
            self._engine.close(seconds, wait=True)
            self._wait_for_callbacks(list(self._engine.executions.values()), seconds)

    def _grace_of(self, grace: float | None, force: bool) -> float:
        own = self._grace if grace is None else checks.seconds("grace", grace)
        return 0.0 if checks.flag("force", force) else own

    def _stop(self, ids: list[str], grace: float) -> list[StopSideExecutionResponse]:
        executions = {id: self._engine.executions.get(id) for id in ids}
        known = [each for each in executions.values() if each is not None]
        caller = object()
        if not self._is_foreign():
            for execution in known:
                execution.stop("requested", grace, caller)
                logger.debug("%s is to stop", execution.id)
        for execution in known:
            execution.changed.wait_for(self._is_over(execution))
        self._wait_for_callbacks(known, grace)
        return [self._stop_response(id, executions[id], caller) for id in ids]

    def _stop_response(
        self, id: str, execution: Execution | None, caller: object
    ) -> StopSideExecutionResponse:
        if execution is None:
            return StopSideExecutionResponse(
                StopData(id, "not_found"), False, None, _unknown(id)
            )
        end = execution.end
        status: StopStatus = "running" if end is None else end.status
        error = None
        if end is None:
            error = self._foreign() if self._is_foreign() else SHUTTING_DOWN
        elif end.stuck:
            error = end.error
        elif status != "stopped":
            error = f"the execution {id} has {status} already: there is nothing to stop"
        stopping = execution.stopping
        if status == "stopped" and (stopping is None or stopping.caller is not caller):
            status = "already_stopped"
        data = StopData(
            side_execution_id=id,
            status=status,
            stopped_at=None if end is None or end.status != "stopped" else end.time,
            result=None if end is None else _parse(end.result),
            output=execution.output.text("stdout"),
            error_output=execution.output.text("stderr"),
            exit_code=None if end is None else end.exit_code,
            forced=end is not None and end.forced,
            stop_reason=execution.stop_reason,
            output_dropped=execution.output.dropped,
        )
        return StopSideExecutionResponse(
            data, error is None, f"the execution is {status}", error, thread_id=execution.thread_id
        )

    def _signal_all(self, signum: int) -> None:
        """Signal the processes of all executions: for the command line's Ctrl-Z."""
        for execution in self._engine.running():
            if execution.owner is not None:
                suspending.signal_tree(execution.owner.keeper_pid, signum)

    # -- what the methods share

    def _is_foreign(self) -> bool:
        """Whether this process was forked from the one that the manager works in."""
        return self._engine.process not in (None, os.getpid())

    def _foreign(self) -> str:
        return (
            f"this manager belongs to process {self._engine.process}, from which this one was"
            " forked: make a new ExecutionManager here"
        )

    def _is_over(self, execution: Execution) -> Callable[[], bool]:
        process = self._engine.process
        return lambda: execution.end is not None or os.getpid() != process

    def _wait_for_callbacks(self, executions: list[Execution], grace: float) -> None:
        """Let `on_output` have the rest, for so long in all; what it has not got is lost."""
        until = time.monotonic() + grace
        for execution in executions:
            delivery = execution.delivery
            if delivery is not None and not delivery.wait(max(0.0, until - time.monotonic())):
                delivery.abandon()

    def _usage(self, execution: Execution) -> tuple[int | None, float | None]:
        """Memory in bytes and processor time in percent, read anew when they are old."""
        owner = execution.owner
        if owner is None or not owner.keeper_pid:
            return None, None
        at = time.monotonic()
        last = execution.usage
        if last is not None and at - last.at < USAGE_AGE:
            return last.memory, last.percent
        used = procfs.usage_of_tree(owner.keeper_pid)
        if used is None:
            return None, None
        since, before = (execution.started_at, 0.0) if last is None else (last.at, last.cpu)
        percent = max(0.0, 100 * (used.cpu - before) / max(at - since, 1e-3))
        execution.usage = Sample(at, used.cpu, used.memory, percent)
        return used.memory, percent


def _dedent(code: str) -> str:
    """`code` without the indentation of its first line, if it has one, or a BOM."""
    code = code.removeprefix("\ufeff")  # as of a file
    lines = (line for line in code.splitlines() if line.strip())
    if next(lines, "")[:1] not in (" ", "\t"):
        return code
    import textwrap

    return textwrap.dedent(code)


def _unknown(id: str) -> str:
    return (
        f"no execution {id!r} is known: take the id from a start's response; of those"
        " that have finished, the newest max_history are remembered"
    )


def _interpreter(python: Path | None) -> str:
    """An absolute path, unless it is a bare name, to be looked up on PATH."""
    if payload.MARK in os.environ:
        raise ValueError(
            "an ExecutionManager has started this program as if it were a Python"
            " interpreter: pass python there, the path of an interpreter"
        )
    if python is None:
        if not sys.executable:
            raise ValueError("sys.executable is empty: pass python, the path of an interpreter")
        if _is_embedded():
            raise ValueError(
                f"sys.executable, {sys.executable!r}, is this program itself: pass python,"
                " the path of a Python interpreter"
            )
        python = sys.executable
    path = checks.path("python", python)
    return checks.absolute(path) if os.sep in path else path


def _is_embedded() -> bool:
    """Whether `sys.executable` is a program that has Python inside, frozen or as a library."""
    if getattr(sys, "frozen", False):
        return True
    # Python's own `main` sets it; a program that calls the library instead may not.
    if getattr(sys, "orig_argv", True):
        return False
    return os.path.realpath(sys.executable) == os.path.realpath("/proc/self/exe")


def _current_environment() -> dict[Any, Any]:
    # As the system has it, where `os.environ` keeps that: its own copy decodes each item.
    raw: dict[bytes, bytes] | None = getattr(os.environ, "_data", None)
    while True:
        try:
            return dict(os.environ if raw is None else raw)
        except (KeyError, RuntimeError):
            pass  # another thread has just changed it


def _current_directory() -> str | None:
    with contextlib.suppress(OSError):  # it may have been removed
        return os.getcwd()
    return None


def _parse(result: bytes | None) -> Any:
    """A result of its own for each response, so that none can change another's."""
    if result is None:
        return None
    try:
        return parse_result(result)
    except ValueError:
        return None  # of one that is still running it may be anything
