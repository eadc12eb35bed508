"""The public methods: ids, validation, and responses made of what is known.

Nothing here talks to a process or changes an execution: requests are posted to the
host's loop, and what came of them is read. No method holds a lock, so that a signal
handler may interrupt any of them and call any other.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import marshal
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union

from . import blocks, checks, payload, procfs, protocol, suspending
from .delivery import WAIT_LIMIT, Delivery
from .execution import Execution, Sample, parse_result
from .limits import Limits
from .output import Output, OutputChunk, Stream
from .responses import (
    ExecutionSummary,
    GetSideExecutionStatusResponse,
    ListActionBlocksResponse,
    ListExecutionsData,
    ListSideExecutionsResponse,
    SideExecutionError,
    StartData,
    StartSideExecutionResponse,
    Status,
    StatusData,
    StopData,
    StopSideExecutionResponse,
    StopStatus,
)

if os.name == "posix":  # elsewhere the constructor says so, not an import
    from .host import CLOSED, Host, Settings

logger = logging.getLogger(__package__)

STATUSES = ("running", "completed", "failed", "stopped")
# How old a figure of memory or processor use may be before it is read anew.
USAGE_AGE = 0.1

Path = Union[str, "os.PathLike[str]"]


class Default(enum.Enum):
    DEFAULT = "the manager's default_timeout"


DEFAULT: Literal[Default.DEFAULT] = Default.DEFAULT
"""As a `timeout`: the one that the manager was made with."""


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
        self._settings = Settings(
            python=_interpreter(python),
            cwd=self._cwd,
            preload=checks.names("preload", preload),
            grace=self._grace,
            max_history=checks.count("max_history", max_history, 0),
        )
        self._executions: dict[str, Execution] = {}
        self._texts: dict[Stream, tuple[object, int, str]] = {}
        self._is_closed = False
        self._process = os.getpid()

    def __enter__(self) -> ExecutionManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        host = self.__dict__.get("_host")
        if host is not None and not self._is_closed and self._process == os.getpid():
            grace = self._grace
            host.loop.post(lambda: host.close(grace))

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
        source = checks.utf8("code", code).removeprefix("\ufeff")  # as of a file
        lines = (line for line in source.splitlines() if line.strip())
        if next(lines, "")[:1] in (" ", "\t"):
            source = textwrap.dedent(source)
        return self._start(
            code, None, source, params, timeout, thread_id, cwd, env, limits, on_output
        )

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
        return self._start(
            None, block, None, params, timeout, thread_id, cwd, env, limits, on_output, arguments
        )

    def _start(
        self,
        code: str | None,
        block: str | None,
        source: str | None,
        params: object,
        timeout: object,
        thread_id: object,
        cwd: Path | None,
        env: object,
        limits: Limits | None,
        on_output: Callable[[OutputChunk], object] | None,
        args: tuple[str, ...] = (),
    ) -> StartSideExecutionResponse:
        copied = checks.params("params", params)
        seconds = self._default_timeout
        if timeout is not DEFAULT:
            seconds = checks.seconds_or_none("timeout", timeout)
        thread = None if thread_id is None else checks.text("thread_id", thread_id)
        directory = self._cwd if cwd is None else checks.absolute(checks.path("cwd", cwd))
        environment = checks.environment("env", env)
        bounds = Limits._check(limits) or self._limits
        if on_output is not None and not callable(on_output):
            raise TypeError(f"on_output must be callable, not {type(on_output).__name__}")

        def answer(
            execution: Execution | None, error: str | None
        ) -> StartSideExecutionResponse:
            data = StartData(
                side_execution_id=None if execution is None else execution.id,
                code=code,
                action_block=block,
                status="failed" if execution is None else "running",
                start_time=None if execution is None else execution.start_time,
                params=copied,
                timeout=seconds,
            )
            message = "not started" if execution is None else "started"
            return StartSideExecutionResponse(data, error is None, message, error, thread_id=thread)

        error = self._why_not(directory, block)
        if error is not None:
            return answer(None, error)
        try:
            host = self._running_host()
        except (OSError, RuntimeError) as problem:
            return answer(None, f"could not start the manager's thread: {problem}")
        if self._is_closed:
            self.close()  # a call of it has come in between, and found no host yet
            return answer(None, CLOSED)
        execution = Execution(
            os.urandom(16).hex(),
            Output(self._max_output, self._texts),
            thread_id=thread,
            action_block=block,
            timeout=seconds,
        )
        if on_output is not None:
            execution.delivery = Delivery(execution.id, on_output)
        request = {
            "code": source,
            "block": None if block is None else checks.absolute(block),
            "args": args,
            "params": copied,
            "cwd": directory or _current_directory(),
            "limits": bounds._to_request(),
        }
        frame = protocol.pack(protocol.RUN, marshal.dumps(request, 2))
        inherited = environment is None
        if environment is None:
            environment = self._environment
        if environment is None:
            environment = _current_environment()
        host.journal.level = logger.getEffectiveLevel()
        # The loop makes it known before it sends it: whatever a signal handler raises
        # in here, there is either nothing to lose or an execution that can be listed.
        host.loop.post(lambda: host.start(execution, frame, environment, inherited))
        execution.changed.wait_for(
            lambda: execution.is_started or execution.end is not None or host.loop.ended
        )
        if not execution.is_started and execution.stop_reason is None:
            return answer(None, execution.refused or CLOSED)
        logger.debug("%s is started", execution.id)
        return answer(execution, None)

    def _why_not(self, cwd: str | None, block: str | None) -> str | None:
        """What can be seen to be wrong before anything is started."""
        if self._is_closed:
            return CLOSED
        if self._is_foreign():
            return self._foreign()
        if cwd is not None and not checks.is_directory(cwd):
            return f"no such directory: {cwd!r}; cwd must be one that exists"
        if block is not None:
            return blocks.why_not_runnable(block)
        return None

    def _running_host(self) -> Host:
        host: Host | None = self.__dict__.get("_host")
        if host is None:
            made = Host(self._settings, self._executions)
            # Atomic, where a lock could be held by what this interrupts.
            host = self.__dict__.setdefault("_host", made)
            assert host is not None
            if host is not made:
                made.loop.close_unstarted()
            self._process = os.getpid()
        host.loop.start()
        return host

    # -- asking

    def get_status(self, side_execution_id: str) -> GetSideExecutionStatusResponse:
        """What is known of an execution now: status, output, result, progress, usage.

        For an unknown id `success` is false and the status `not_found`.
        """
        id = checks.text("side_execution_id", side_execution_id)
        return self._status_response(id, self._executions.get(id))

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
        execution = self._executions.get(id)
        if execution is not None:
            began = time.monotonic()
            if execution.changed.wait_for(self._is_over(execution), limit):
                left = math.inf if limit is None else limit - (time.monotonic() - began)
                self._wait_for_callbacks([execution], left)
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
        execution = self._executions.get(id)
        if execution is None:
            raise SideExecutionError(self.get_status(id))
        return execution.output.follow(self._is_over(execution))

    def list_executions(self, status: str | None = None) -> ListSideExecutionsResponse:
        """The executions that are known, or those of them that are of `status`."""
        if status is not None and checks.text("status", status) not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {status!r}")
        found = []
        for execution in list(self._executions.values()):
            end = execution.end
            current: Status = "running" if end is None else end.status
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
        running = [each.id for each in list(self._executions.values()) if each.end is None]
        return self._stop(running, self._grace_of(grace, force))

    def close(self, *, grace: float | None = None) -> None:
        """Stop everything and give all processes, threads and descriptors back.

        Later starts fail; what has ended can still be asked about. A second call
        waits for the first one.
        """
        seconds = self._grace_of(grace, False)
        self._is_closed = True
        host: Host | None = self.__dict__.get("_host")
        if host is None or self._is_foreign():
            return
        host.is_closing = True  # from here on, what a start has posted already is refused
        host.loop.close_unstarted()
        host.loop.post(lambda: host.close(seconds))
        host.loop.ending.wait_for(lambda: host.loop.is_closed)
        self._wait_for_callbacks(list(self._executions.values()))

    def _grace_of(self, grace: float | None, force: bool) -> float:
        own = self._grace if grace is None else checks.seconds("grace", grace)
        return 0.0 if checks.flag("force", force) else own

    def _stop(self, ids: list[str], grace: float) -> list[StopSideExecutionResponse]:
        host: Host | None = self.__dict__.get("_host")
        executions = {id: self._executions.get(id) for id in ids}
        caller = object()
        for id, execution in executions.items():
            if execution is not None and execution.end is None and host is not None:
                host.loop.post(functools.partial(host.stop, id, "requested", grace, caller))
        for execution in executions.values():
            if execution is not None:
                execution.changed.wait_for(self._is_over(execution))
        self._wait_for_callbacks([each for each in executions.values() if each is not None])
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
            error = self._foreign() if self._is_foreign() else _why_lost()
        elif end.stuck:
            error = end.error
        elif status != "stopped":
            error = f"the execution {id} has {status} already: there is nothing to stop"
        if status == "stopped" and execution.stopped_by is not caller:
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
        for execution in list(self._executions.values()):
            if execution.end is None and execution.keeper_pid is not None:
                suspending.signal_tree(execution.keeper_pid, signum)

    # -- what the methods share

    def _is_foreign(self) -> bool:
        """Whether this process was forked from the one that the manager works in."""
        return self._process != os.getpid() and "_host" in self.__dict__

    def _foreign(self) -> str:
        return (
            f"this manager belongs to process {self._process}, from which this one was"
            " forked: make a new ExecutionManager here"
        )

    def _is_over(self, execution: Execution) -> Callable[[], bool]:
        loop = self.__dict__["_host"].loop
        process = self._process
        return lambda: execution.end is not None or loop.ended or os.getpid() != process

    def _wait_for_callbacks(
        self, executions: list[Execution], timeout: float = WAIT_LIMIT
    ) -> None:
        """Let `on_output` come to an end for all of them, `timeout` seconds at most."""
        until = time.monotonic() + timeout
        for execution in executions:
            if execution.delivery is not None:
                execution.delivery.wait(until)

    def _usage(self, execution: Execution) -> tuple[int | None, float | None]:
        """Memory in bytes and processor time in percent, read anew when they are old."""
        if execution.keeper_pid is None:
            return None, None
        at = time.monotonic()
        last = execution.usage
        if last is not None and at - last.at < USAGE_AGE:
            return last.memory, last.percent
        used = procfs.usage_of_tree(execution.keeper_pid)
        if used is None:
            return None, None
        since, before = (execution.started_at, 0.0) if last is None else (last.at, last.cpu)
        percent = max(0.0, 100 * (used.cpu - before) / max(at - since, 1e-3))
        execution.usage = Sample(at, used.cpu, used.memory, percent)
        return used.memory, percent


def _why_lost() -> str:
    if sys.is_finalizing():
        return "the interpreter is shutting down: its executions are stopped when it has ended"
    return "somebody has closed this manager's descriptors: make a new ExecutionManager"


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


def _current_environment() -> dict[str, str]:
    while True:
        try:
            return dict(os.environ)
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
