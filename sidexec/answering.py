"""Responses, built from what is known about an execution.

Any thread may call these at any time. They change nothing in an execution but its last sample
of memory and processor use.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from . import procfs
from .engine.execution import NOT_ENDED, Execution, Sample, State
from .engine.input import Input
from .engine.results import parse_result
from .engine.waiting import monotonic
from .responses import (
    ExecutionSummary,
    GetSideExecutionStatusResponse,
    ListExecutionsData,
    ListSideExecutionsResponse,
    SideExecutionError,
    StartSideExecutionResponse,
    StatusData,
    StopData,
    StopSideExecutionResponse,
    StopStatus,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

# How old a figure of memory or processor use may be, in seconds, before it is read again.
USAGE_AGE = 0.1
# How long to wait for an execution to begin, in seconds, before its use is given as unknown.
USAGE_PATIENCE = 1.0


def status_of(
    id: str, execution: Execution | None, foreign: str | None
) -> GetSideExecutionStatusResponse:
    """`foreign` is an error message if the manager belongs to another process, else None."""
    if execution is None or execution.state is State.REFUSED:
        data = StatusData(id, "not_found")
        return GetSideExecutionStatusResponse(data, False, None, _unknown(id))
    end = execution.end or NOT_ENDED
    memory = cpu = None
    if end is NOT_ENDED:
        memory, cpu = _usage(execution)
    data = StatusData(
        side_execution_id=id,
        status=end.status,
        start_time=execution.start_time,
        end_time=end.time,
        duration=monotonic() - execution.started_at if end is NOT_ENDED else end.duration,
        result=_parse(execution.reported),
        output=execution.output.text("stdout"),
        error=end.error,
        progress=execution.progress,
        memory_usage=memory,
        cpu_usage=cpu,
        peak_memory=end.peak_memory,
        cpu_time=end.cpu_time,
        error_output=execution.output.text("stderr"),
        exit_code=end.exit_code,
        stop_reason=execution.stop_reason,
        output_dropped=execution.output.dropped,
    )
    error = end.error if end.stuck else None
    if end is NOT_ENDED:
        error = foreign  # the data is from before the fork
    message = f"the execution is {data.status}"
    return GetSideExecutionStatusResponse(
        data, error is None, message, error, thread_id=execution.thread_id
    )


def status_of_none(started: StartSideExecutionResponse) -> GetSideExecutionStatusResponse:
    """The status of an execution that could not be started."""
    return GetSideExecutionStatusResponse(
        StatusData("", "failed", error=started.error),
        False,
        started.message,
        started.error,
        thread_id=started.thread_id,
    )


def not_sent(
    response: GetSideExecutionStatusResponse, input: Input | None
) -> GetSideExecutionStatusResponse:
    """What `send_input` answers where not all of it could be sent."""
    if response.data.status != "running":
        problem = f"the execution is {response.data.status}: it reads no more input"
    elif input is None:
        problem = "its standard input is empty: start it with stdin=subprocess.PIPE"
    else:
        problem = f"nothing more can be sent: {input.closed_by}"
    return dataclasses.replace(response, success=False, error=response.error or problem)


def future_of(
    execution: Execution, foreign: str | None, stop: Callable[[], object]
) -> Future[GetSideExecutionStatusResponse]:
    """A future of its status at its end, whose `cancel` calls `stop`.

    Raises `SideExecutionError` if it runs in the process of a `foreign` manager, see above.
    """
    from concurrent.futures import Future

    if foreign is not None and not execution.is_through():
        raise SideExecutionError(status_of(execution.id, execution, foreign))

    future: Future[GetSideExecutionStatusResponse] = Future()
    future.set_running_or_notify_cancel()

    def cancel() -> bool:
        stop()
        return False

    def finish() -> None:
        del future.cancel  # which holds the execution
        if execution.end is None:  # it could not be started
            future.set_exception(SideExecutionError(status_of(execution.id, None, None)))
        else:
            future.set_result(status_of(execution.id, execution, None))

    future.cancel = cancel  # type: ignore[method-assign]
    execution.when_through(finish)
    return future


def stop_of(
    id: str, execution: Execution | None, caller: object, unended: str
) -> StopSideExecutionResponse:
    """`unended` is the error message if it has not ended although it was waited for."""
    if execution is None or execution.state is State.REFUSED:
        return StopSideExecutionResponse(StopData(id, "not_found"), False, None, _unknown(id))
    end = execution.end or NOT_ENDED
    status: StopStatus = end.status
    error = None
    if end is NOT_ENDED:
        error = unended
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
        stopped_at=end.time if end.status == "stopped" else None,
        result=None if end is NOT_ENDED else _parse(execution.reported),
        output=execution.output.text("stdout"),
        error_output=execution.output.text("stderr"),
        exit_code=end.exit_code,
        forced=end.forced,
        stop_reason=execution.stop_reason,
        output_dropped=execution.output.dropped,
    )
    return StopSideExecutionResponse(
        data, error is None, f"the execution is {status}", error, thread_id=execution.thread_id
    )


def list_of(executions: Iterable[Execution], status: str | None) -> ListSideExecutionsResponse:
    """Those with the status `status`, or all of them."""
    found = []
    for each in executions:
        end = each.end or NOT_ENDED  # read once: it may end meanwhile
        # Before a summary is made: most of what is known has ended, and nobody asks for it.
        if status in (None, end.status):
            summary = ExecutionSummary(
                each.id,
                end.status,
                each.start_time,
                end.time,
                each.stop_reason,
                each.action_block,
            )
            found.append(summary)
    return ListSideExecutionsResponse(ListExecutionsData(tuple(found), len(found)))


def _unknown(id: str) -> str:
    return (
        f"no execution {id!r} is known: take the id from a start's response; of those"
        " that have finished, the newest max_history are remembered"
    )


def _parse(result: bytes | None) -> Any:
    """A new object for each response, so that changing one does not change another."""
    if result is None:
        return None
    try:
        return parse_result(result)
    except ValueError:
        return None  # while it runs, the result is not checked yet


def _usage(execution: Execution) -> tuple[int | None, float | None]:
    """Memory in bytes and processor time in percent, at most `USAGE_AGE` seconds old."""
    # A pair that is ready may not have begun it yet.
    execution.changed.wait_for(execution.is_decided, USAGE_PATIENCE)
    owner = execution.owner
    if owner is None or sys.is_finalizing():  # when `open` may be gone
        return None, None
    at = monotonic()
    last = execution.usage
    if last is not None and at - last.at < USAGE_AGE:
        return last.memory, last.percent
    used = procfs.usage_of_tree(owner.keeper_pid)
    if used is None:
        return None, None
    memory, cpu = used
    since, before = (execution.started_at, 0.0) if last is None else (last.at, last.cpu)
    percent = max(0.0, 100 * (cpu - before) / max(at - since, 1e-3))
    execution.usage = Sample(at, cpu, memory, percent)
    return memory, percent
