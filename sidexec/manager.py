"""The public methods: they check arguments, call the engine, and build responses.

Only the engine talks to processes and changes executions. No method holds a lock, so that a
signal handler may interrupt any of them and call any other.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from . import answering, checks
from .confinement import Confinement
from .engine.output import Output, OutputChunk, Texts
from .engine.waiting import monotonic
from .lifetime import Lifetime
from .limits import Limits
from .responses import (
    GetSideExecutionStatusResponse,
    ListActionBlocksResponse,
    ListSideExecutionsResponse,
    SideExecutionError,
    StartSideExecutionResponse,
    StopSideExecutionResponse,
)
from .starting import DEFAULT, Default, Path, Request, StartOptions, interpreter

if os.name == "posix":  # elsewhere the constructor says so, not an import
    from .engine.engine import CLOSED, Engine
    from .engine.execution import Execution, State
    from .engine.launcher import Settings

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .starting import Unpack

logger = logging.getLogger(__name__)

SHUTTING_DOWN = "the interpreter is shutting down: its executions are stopped when it has ended"
STATUSES = ("running", "completed", "failed", "stopped")


class ExecutionManager(Lifetime):
    """Runs Python snippets in processes of their own, and stops them.

    python: the interpreter that runs them, by default `sys.executable`. A frozen
        program, or a server that embeds Python, has to pass it.
    cwd, env: their current directory and environment; by default the host's, as
        they are at each start.
    default_timeout: seconds until an execution is stopped, unless its start says
        otherwise; None for no limit.
    grace_period: seconds that an execution has, once asked, to clean up.
    max_output: bytes kept of each stream of each execution, the newest.
    max_history: how many finished executions are remembered, the newest.
    preload: names of modules to import once, ahead of all executions.
    limits: what each execution's processes may use.
    confinement: what they may touch, for code that nobody has read; None for anything.

    Making a manager starts nothing; its first start does. Every method may be called
    from any thread, from `on_output`, and from a signal handler. Leaving a `with`
    block closes it. A manager that is garbage-collected unclosed closes itself, and when
    the host ends, however it does, its executions are stopped. Invalid arguments raise
    `TypeError` or `ValueError`; what goes wrong at run time is in the response. Where
    the platform is not POSIX, this raises `NotImplementedError`.
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
        confinement: Confinement | None = None,
    ) -> None:
        if os.name != "posix":
            raise NotImplementedError(
                "sidexec needs a POSIX system, such as Linux: others lack what it takes to"
                " stop a process with all that it has started"
            )
        timeout = checks.seconds_or_none("default_timeout", default_timeout)
        self._default = Request(None, None, (), None, timeout, None, cwd, env, limits, confinement)
        self._default.check()
        self._grace = checks.seconds("grace_period", grace_period)
        self._max_output = checks.count("max_output", max_output, 1)
        settings = Settings(
            python=interpreter(python),
            cwd=self._default.cwd,
            preload=checks.names("preload", preload),
            grace=self._grace,
        )
        self._engine = Engine(settings, checks.count("max_history", max_history, 0))
        self._texts: Texts = {}

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
        confinement: Confinement | None = None,
        on_output: Callable[[OutputChunk], object] | None = None,
        input: str | bytes | None = None,
        stdin: int | None = None,
        stderr: int | None = None,
    ) -> StartSideExecutionResponse:
        """Start Python source; returns as soon as it is on its way.

        The code finds `params`, `report_progress(percent)` and `report_result(value)`;
        `return` and `await` work at its top level. `timeout` is in seconds, None for
        no limit. `cwd`, `env`, `limits` and `confinement` replace the manager's.
        `on_output` is called with each `OutputChunk`, in order, in a thread of its own;
        what it raises is logged. `input` is all of standard input, else empty;
        `stdin=subprocess.PIPE` leaves it open for `send_input`. `stderr=subprocess.STDOUT`
        puts standard error into standard output.

        A start that fails has a response whose `success` is false and whose `error`
        says what to do; there is no `side_execution_id` then. The first start also
        brings up an interpreter, which may take 60 seconds at the very most.
        """
        code = checks.text("code", code)
        options = (thread_id, cwd, env, limits, confinement, on_output, input, stdin, stderr)
        return self._start(Request(code, None, (), params, timeout, *options))[0]

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
        confinement: Confinement | None = None,
        on_output: Callable[[OutputChunk], object] | None = None,
        input: str | bytes | None = None,
        stdin: int | None = None,
        stderr: int | None = None,
    ) -> StartSideExecutionResponse:
        """Start a `.py` file, or a directory that has a `__main__.py`.

        A relative path is relative to the host's current directory. `args` is its
        `sys.argv[1:]`. All else is as for `start_with_code`.
        """
        block = checks.path("path", path)
        options = (thread_id, cwd, env, limits, confinement, on_output, input, stdin, stderr)
        return self._start(Request(None, block, args, params, timeout, *options))[0]

    def run(
        self,
        code: str,
        params: dict[str, Any] | None = None,
        timeout: float | None | Literal[Default.DEFAULT] = DEFAULT,
        *,
        check: bool = False,
        **options: Unpack[StartOptions],
    ) -> GetSideExecutionStatusResponse:
        """Start Python source, wait for its end, and return its status.

        `options` are those of `start_with_code`. What interrupts the wait, be it Ctrl-C,
        stops the execution before it is raised. Where the start fails, `success` is false
        and the status `failed`. With `check`, `SideExecutionError` is raised unless the
        execution has completed.
        """
        checks.options("run", options, StartOptions.__annotations__)
        checks.instance("check", check, bool)
        given: dict[str, Any] = dict(options)
        request = Request(checks.text("code", code), None, (), params, timeout, **given)
        try:
            started, execution = self._start(request)
            response = answering.status_of_none(started)
            if execution is not None:
                response = self._wait(execution, None)
        except BaseException:
            self._stop([request.id], self._grace)
            raise
        return response.check() if check else response

    def _start(self, request: Request) -> tuple[StartSideExecutionResponse, Execution | None]:
        request.fill_from(self._default)
        request.check()
        error = CLOSED if self._engine.is_closing else self._engine.foreign
        if sys.is_finalizing():
            error = SHUTTING_DOWN
        error = error or request.why_not()
        if error is not None:
            return request.answer(None, error), None
        try:
            execution = request.execution(Output(self._max_output, self._texts))
        except OSError as problem:
            return request.answer(None, str(problem)), None
        environment = request.environment(self._default)
        self._engine.start(execution, environment, is_default=request.env is None)
        if execution.state is State.REFUSED:
            return request.answer(None, execution.refusal), None
        logger.debug("%s is started", request.id)
        return request.answer(execution, None), execution

    def get_status(self, side_execution_id: str) -> GetSideExecutionStatusResponse:
        """What is known of an execution now: status, output, result, progress, usage.

        For an unknown id `success` is false and the status `not_found`.
        """
        id = checks.text("side_execution_id", side_execution_id)
        return answering.status_of(id, self._engine.executions.get(id), self._engine.foreign)

    def wait(
        self, side_execution_id: str, timeout: float | None = None
    ) -> GetSideExecutionStatusResponse:
        """Wait until an execution has ended, at most `timeout` seconds; returns its status.

        It returns once `on_output` has had everything. Past the timeout the status may
        still be `running`. An unknown id answers at once.
        """
        id = checks.text("side_execution_id", side_execution_id)
        limit = checks.seconds_or_none("timeout", timeout)
        execution = self._engine.executions.get(id)
        return self._wait(execution, limit) if execution else answering.status_of(id, None, None)

    def _wait(self, execution: Execution, limit: float | None) -> GetSideExecutionStatusResponse:
        # Not by its id, which may be forgotten as soon as it has ended.
        self._engine.wait(execution, limit)
        return answering.status_of(execution.id, execution, self._engine.foreign)

    def future(self, side_execution_id: str) -> Future[GetSideExecutionStatusResponse]:
        """A future of what `wait` returns; it takes no thread.

        It works with `concurrent.futures.wait` and `as_completed`, and with
        `asyncio.wrap_future`. Its `cancel` asks the execution to stop, without waiting,
        and returns false: the result still comes. Every call has a future of its own.
        An unknown id raises `SideExecutionError` at the call; in a forked process, so does
        one that runs.
        """
        execution, engine, grace = self._known(side_execution_id), self._engine, self._grace
        return answering.future_of(execution, engine.foreign, lambda: engine.ask(execution, grace))

    def follow(
        self, side_execution_id: str, *, lines: bool = False, timeout: float | None = None
    ) -> Iterator[OutputChunk]:
        """Iterate over an execution's output, from the first byte kept to its end.

        Blocks between chunks until there is more. With `lines`, every chunk is a whole
        line with its newline, the last one perhaps without. Past `timeout` seconds from
        the call on, the iterator raises `TimeoutError`. Every call has an iterator of its
        own. A chunk's `dropped` counts the bytes missing before it, where it was read too
        slowly for `max_output`; with `lines`, all bytes of a line that misses some. An
        unknown id raises `SideExecutionError` at the call.
        """
        limit = checks.seconds_or_none("timeout", timeout)
        checks.instance("lines", lines, bool)
        execution = self._known(side_execution_id)
        deadline = None if limit is None else monotonic() + limit
        is_over = self._engine.is_over(execution)
        return execution.output.follow(is_over, deadline, lines=lines)

    def send_input(
        self, side_execution_id: str, text: str | bytes, *, close: bool = False
    ) -> GetSideExecutionStatusResponse:
        """Add to the standard input of an execution that was started with `stdin=PIPE`.

        Blocks while more than a mebibyte waits to be read, until the execution ends. With
        `close`, this is the last of it. `success` is false where the execution has ended,
        or its standard input is not open, before all of it could be written.
        """
        id = checks.text("side_execution_id", side_execution_id)
        data = text if isinstance(text, bytes) else checks.utf8("text", text).encode()
        is_last = checks.instance("close", close, bool)
        execution = self._engine.executions.get(id)
        sent = execution is not None and self._engine.send_input(execution, data, is_last)
        response = answering.status_of(id, execution, self._engine.foreign)
        if sent or execution is None:
            return response
        return answering.not_sent(response, execution.input)

    def _known(self, side_execution_id: str) -> Execution:
        id = checks.text("side_execution_id", side_execution_id)
        execution = self._engine.executions.get(id)
        if execution is None:
            raise SideExecutionError(answering.status_of(id, None, None))
        return execution

    def list_executions(self, status: str | None = None) -> ListSideExecutionsResponse:
        """The executions that are known, or only those with the status `status`."""
        if status is not None and checks.text("status", status) not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {status!r}")
        return answering.list_of(list(self._engine.executions.values()), status)

    def list_action_blocks(self, path: Path = ".") -> ListActionBlocksResponse:
        """The directories below `path` that have a `__main__.py`; runs nothing.

        `success` is false where there is no such directory.
        """
        from . import blocks

        return blocks.find(checks.path("path", path))

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
        running = [each.id for each in self._engine.running()]
        return self._stop(running, self._grace_of(grace, force))

    def close(self, *, grace: float | None = None) -> None:
        """Stop everything, and release all processes, threads and descriptors.

        Later starts fail; the status of ended executions can still be read. A second call
        waits for the first one.
        """
        self._engine.close(self._grace_of(grace, False), wait=True)

    def _grace_of(self, grace: float | None, force: bool) -> float:
        own = self._grace if grace is None else checks.seconds("grace", grace)
        return 0.0 if checks.instance("force", force, bool) else own

    def _stop(self, ids: list[str], grace: float) -> list[StopSideExecutionResponse]:
        executions = {id: self._engine.executions.get(id) for id in ids}
        caller = object()
        self._engine.stop([each for each in executions.values() if each], grace, caller)
        unended = self._engine.foreign or SHUTTING_DOWN
        return [answering.stop_of(id, executions[id], caller, unended) for id in ids]
