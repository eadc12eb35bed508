"""One execution as the host knows it: what came of it so far, and how it ended.

The loop's thread is the only one that changes it; any thread may read it, at any
time. It neither talks to processes nor decides anything.
"""

from __future__ import annotations

import json
import math
import re
import signal
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from .delivery import Delivery
from .output import Output
from .protocol import is_too_deep
from .waiting import Bell

StopReason = Literal["requested", "timeout", "closed"]
FinalStatus = Literal["completed", "failed", "stopped"]


def describe_exit(code: int) -> str:
    """An exit code in words; a negative one is the signal that killed the process."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


# What may stand for a number that no float holds, and that Python would read as infinite.
_HUGE = re.compile(rb"[0-9]{300}|[eE][+]?[0-9]{3}")


def parse_result(data: bytes) -> Any:
    """The value of a result's JSON; raises `ValueError` for what no response can hold."""
    try:
        number = _finite if _HUGE.search(data) else None
        value = json.loads(data, parse_constant=_finite, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if is_too_deep(value):
        raise ValueError("nested too deeply")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number in JSON")
    return value


def now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class End:
    """How an execution ended; set once, after which nothing of it changes."""

    status: FinalStatus
    time: datetime
    duration: float
    exit_code: int | None
    forced: bool
    error: str | None
    result: bytes | None  # JSON
    stuck: tuple[int, ...]  # pids that the kernel does not let go of


@dataclass(frozen=True)
class Sample:
    """What the tree was last seen to use."""

    at: float
    cpu: float
    memory: int
    percent: float


class Execution:
    def __init__(
        self,
        id: str,
        output: Output,
        *,
        thread_id: str | None,
        action_block: str | None,
        timeout: float | None,
    ) -> None:
        self.id = id
        self.output = output
        self.thread_id = thread_id
        self.action_block = action_block
        self.timeout = timeout
        self.start_time = now()
        self.started_at = time.monotonic()
        self.is_started = False
        self.refused: str | None = None  # why it could not be started
        self.keeper_pid: int | None = None
        self.progress: float | None = None
        self.reported: bytes | None = None  # JSON
        self.stop_reason: StopReason | None = None
        self.stopped_by: object = None  # whoever called first, of those that wait for it
        self.end: End | None = None
        self.delivery: Delivery | None = None
        self.usage: Sample | None = None  # readers keep it here, as it serves them alone
        self.changed = Bell()  # when it is started, refused or ended

    @property
    def status(self) -> str:
        return "running" if self.end is None else self.end.status

    @property
    def bytes_held(self) -> int:
        """The bytes of output and result that are kept of it."""
        result = self.reported if self.end is None else self.end.result
        return self.output.size + len(result or b"")
