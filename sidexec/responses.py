"""The responses, and their wire form.

Python attributes hold Python values (seconds, aware datetimes); the wire form holds
milliseconds, ISO 8601 strings and camelCase keys. This module imports nothing of
ours and starts nothing, so a response can be unpickled anywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Literal, TypeVar

_Self = TypeVar("_Self", bound="Response")

Status = Literal["running", "completed", "failed", "stopped"]
StatusOrNotFound = Literal[Status, "not_found"]
StopStatus = Literal[StatusOrNotFound, "already_stopped"]
StopReason = Literal["requested", "timeout", "closed"]


class SideExecutionError(Exception):
    """What `raise_for_error`, `check` and a failed start's `id` raise.

    So do `run(check=True)`, and `follow` and `future` for an unknown id.
    `response` is the response, and the text its `error`. If it is made from text alone, as
    task queues do, its response has only this text.
    """

    def __init__(self, response: Response | str, text: str | None = None) -> None:
        if isinstance(response, str):
            response = Response(None, success=False, error=response)
        # `args` has the text alone; pickling and copying keep `response` as an attribute.
        super().__init__(text or response.error or response.message or response.type)
        self.response = response


def _wire_name(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _wire_value(name: str, value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, _Wire):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_wire_value(name, each) for each in value]
    if name in ("timeout", "duration", "cpu_time") and value is not None:
        return round(value * 1000) if value < 1e15 else round(value) * 1000
    return value


class _Wire:
    """A dataclass with a wire form of its fields."""

    def to_dict(self) -> dict[str, Any]:
        """The wire form: camelCase keys, milliseconds, ISO 8601; nothing is left out."""
        return {
            _wire_name(each.name): _wire_value(each.name, getattr(self, each.name))
            for each in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    def __repr__(self) -> str:
        parts = []
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if value is not None and value != "":
                text = repr(value)
                if not isinstance(value, _Wire) and len(text) > 80:
                    text = f"{text[:50]}...{text[-20:]}"
                parts.append(f"{each.name}={text}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class StartData(_Wire):
    """`side_execution_id` is what every other method takes; None if it did not start.

    `timeout` is in seconds, None for no limit.
    """

    side_execution_id: str | None
    code: str | None
    action_block: str | None
    status: Literal["running", "failed"]
    start_time: datetime | None
    params: dict[str, Any]
    timeout: float | None

    def to_dict(self) -> dict[str, Any]:
        """The wire form, with either `code` or `actionBlock`."""
        wire = super().to_dict()
        del wire["code" if self.code is None else "actionBlock"]
        return wire


@dataclass(frozen=True, repr=False)
class StatusData(_Wire):
    """`status` is running, completed, failed, stopped or, for an unknown id, not_found.

    `duration` is in seconds and runs until the end. `memory_usage` is in bytes and
    `cpu_usage` in percent of one core, both None after the end; `peak_memory` in bytes, of
    the largest process, and `cpu_time` in seconds, both None before it. `progress` is from 0
    to 100. `exit_code` is negative if a signal killed it. `output_dropped` counts the bytes
    of output that are not kept.
    """

    side_execution_id: str
    status: StatusOrNotFound
    start_time: datetime | None = None
    end_time: datetime | None = None
    duration: float | None = None
    result: Any = None
    output: str = ""
    error: str | None = None
    progress: float | None = None
    memory_usage: int | None = None
    cpu_usage: float | None = None
    peak_memory: int | None = None
    cpu_time: float | None = None
    error_output: str = ""
    exit_code: int | None = None
    stop_reason: StopReason | None = None
    output_dropped: int = 0


@dataclass(frozen=True, repr=False)
class StopData(_Wire):
    """`status` is stopped, already_stopped, completed, failed or not_found.

    It is running if the call could not stop it: in a process that was forked from the
    manager's.
    """

    side_execution_id: str
    status: StopStatus
    stopped_at: datetime | None = None
    result: Any = None
    output: str = ""
    error_output: str = ""
    exit_code: int | None = None
    forced: bool = False
    stop_reason: StopReason | None = None
    output_dropped: int = 0


@dataclass(frozen=True, repr=False)
class ExecutionSummary(_Wire):
    """One execution in a list."""

    side_execution_id: str
    status: Status
    start_time: datetime
    end_time: datetime | None
    stop_reason: StopReason | None
    action_block: str | None


@dataclass(frozen=True, repr=False)
class ListExecutionsData(_Wire):
    """The executions that are known, oldest first."""

    executions: tuple[ExecutionSummary, ...]
    count: int


@dataclass(frozen=True, repr=False)
class ActionBlock(_Wire):
    """A directory that can be run; its metadata is read without running anything."""

    name: str
    path: str
    description: str | None
    version: str | None
    author: str | None
    dependencies: tuple[str, ...]
    created_at: datetime | None
    updated_at: datetime | None


@dataclass(frozen=True, repr=False)
class ListActionBlocksData(_Wire):
    """The action blocks below `search_path`, by path."""

    action_blocks: tuple[ActionBlock, ...]
    count: int
    search_path: str


_counter = itertools.count()


def _new_id() -> str:
    """Another one each time, in all processes; random bytes would cost a call as much again."""
    return f"{os.getpid():x}-{time.time_ns():x}-{next(_counter):x}"


@dataclass(frozen=True, repr=False)
class Response(_Wire):
    """What every method returns: whether it succeeded, and its data.

    `message` says in words what happened, `error` what went wrong and what to do.
    `message_id` is new for each response; `thread_id` is the one given at start.

    Its subclasses only say what `data` is: made dataclasses of their own, they would add
    no field, and 0.6 ms each to the first use of this package.
    """

    type: ClassVar[str] = "response"

    data: Any
    success: bool = True
    message: str | None = None
    error: str | None = None
    message_id: str = field(default_factory=_new_id)
    thread_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The wire form: camelCase keys, milliseconds, ISO 8601; nothing is left out."""
        return {"type": self.type, **super().to_dict()}

    def to_json(self) -> str:
        """The wire form as JSON."""
        return json.dumps(self.to_dict())

    def raise_for_error(self: _Self) -> _Self:
        """Return the response, or raise `SideExecutionError` if `success` is false."""
        if not self.success:
            raise SideExecutionError(self)
        return self


class StartSideExecutionResponse(Response):
    """What `start_with_code` and `start_with_action_block` return."""

    type: ClassVar[str] = "startSideExecutionResponse"
    data: StartData

    @property
    def id(self) -> str:
        """The id for all other methods; raises `SideExecutionError` if it did not start."""
        id = self.data.side_execution_id
        if id is None:
            raise SideExecutionError(self)
        return id


class GetSideExecutionStatusResponse(Response):
    """What `get_status`, `wait`, `run`, `send_input` and a future return."""

    type: ClassVar[str] = "getSideExecutionStatusResponse"
    data: StatusData

    def check(self) -> GetSideExecutionStatusResponse:
        """Return the response, or raise `SideExecutionError` unless it completed.

        If the execution failed, the text is its error and traceback.
        """
        data = self.raise_for_error().data
        if data.status != "completed":
            reason = f" ({data.stop_reason})" if data.stop_reason else ""
            text = data.error or f"the execution is {data.status}{reason}"
            raise SideExecutionError(self, text)
        return self


class StopSideExecutionResponse(Response):
    """What `stop` returns, and `stop_all` a list of."""

    type: ClassVar[str] = "stopSideExecutionResponse"
    data: StopData


class ListSideExecutionsResponse(Response):
    """What `list_executions` returns."""

    type: ClassVar[str] = "listSideExecutionsResponse"
    data: ListExecutionsData


class ListActionBlocksResponse(Response):
    """What `list_action_blocks` returns."""

    type: ClassVar[str] = "listActionBlocksResponse"
    data: ListActionBlocksData
