"""One execution as this side knows it: what came of it so far, how it is stopped, how it ended.

Any thread may read it, at any time, and stop it. All else is set by its one owner: the
thread that took its request, or whoever claimed it before one did. It neither reads
descriptors nor judges an end.
"""

from __future__ import annotations

import enum
import json
import logging
import math
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal, Protocol, cast

from ..protocol import is_too_deep
from ..responses import Status, StopReason
from .delivery import Delivery
from .descriptors import Descriptor
from .input import Input
from .output import Output
from .waiting import Bell

FinalStatus = Literal["completed", "failed", "stopped"]


logger = logging.getLogger(__name__)


class State(enum.Enum):
    WAITING = "it waits for a keeper and a snippet"
    RUNNING = "its code has been sent to a snippet"
    ENDED = "nothing of it is left"
    REFUSED = "it could not be started"


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
class Stop:
    """Why an execution is stopped, and by which call."""

    reason: StopReason
    caller: object


@dataclass(frozen=True)
class Sample:
    """What the tree was last seen to use."""

    at: float
    cpu: float
    memory: int
    percent: float


class Owner(Protocol):
    """Who runs an execution: its pair, once it has one."""

    keeper_pid: int

    def ask(self, grace: float) -> None: ...
    def wake(self) -> None: ...


class _Nobody:
    keeper_pid = 0

    def ask(self, grace: float) -> None:
        pass

    def wake(self) -> None:
        pass


# Who owns an execution that no pair shall take any more: nothing runs then.
NOBODY: Owner = _Nobody()


class Execution:
    def __init__(
        self,
        id: str,
        request: bytes,
        output: Output,
        delivery: Delivery | None,
        input: Input | None,
        descriptors: Sequence[Descriptor] = (),
        *,
        thread_id: str | None,
        action_block: str | None,
        timeout: float | None,
        on_begin: Callable[[Execution], None],
        on_end: Callable[[Execution], None],
    ) -> None:
        self.id = id
        self.request = request
        self.output = output
        self.delivery = delivery
        self.input = input
        self.descriptors = descriptors  # that go with the request, until it has begun
        self.thread_id = thread_id
        self.action_block = action_block
        self.timeout = timeout
        self.start_time = now()
        self.started_at = time.monotonic()
        self.state = State.WAITING
        self.is_queued = False  # and so will begin, or be refused
        self.is_forgotten = False
        self.refusal: str | None = None  # why it could not be started
        self.progress: float | None = None
        self.reported: bytes | None = None  # JSON
        self.usage: Sample | None = None  # readers keep it here, as it serves them alone
        self.changed = Bell()  # when the state has changed
        self._on_begin = on_begin
        self._on_end = on_end
        self._calls: list[Callable[[], object]] = []
        # Filled by `setdefault`, which is atomic: the first one is the one that counts.
        self._claims: dict[str, object] = {}

    # -- from any thread

    @property
    def owner(self) -> Owner | None:
        return cast("Owner | None", self._claims.get("owner"))

    @property
    def stopping(self) -> Stop | None:
        return cast("Stop | None", self._claims.get("stop"))

    @property
    def stop_reason(self) -> StopReason | None:
        return None if self.stopping is None else self.stopping.reason

    @property
    def status(self) -> Status:
        return "running" if self.end is None else self.end.status

    @property
    def bytes_held(self) -> int:
        """The bytes of output and result that are kept of it."""
        result = self.reported if self.end is None else self.end.result
        return self.output.size + len(result or b"")

    @property
    def end(self) -> End | None:
        return cast("End | None", self._claims.get("end"))

    def is_decided(self) -> bool:
        """Whether it has begun, or will not."""
        return self.state is not State.WAITING

    def claim(self, owner: Owner) -> bool:
        """Make `owner` the one that says what becomes of it; false if another one was first."""
        return self._claims.setdefault("owner", owner) is owner

    def is_first_to_count(self) -> bool:
        """True once: for whoever is to count it among those that have ended."""
        token = object()
        return self._claims.setdefault("counted", token) is token

    def is_stopped(self) -> bool:
        """Whether it is to end as stopped; one that is not can't be stopped from here on."""
        return self._claims.setdefault("stop", None) is not None

    def stop(self, reason: StopReason, grace: float, caller: object = None) -> None:
        """Ask it to stop, or bring its end nearer; the first caller is the one that stops it.

        Never blocks. A handler may raise between the two steps, so every call asks; the
        keeper passes on the first of them.
        """
        if self._claims.setdefault("stop", Stop(reason, caller)) is None:
            return  # it has come to its end by itself
        self.claim(NOBODY)
        if self.owner is NOBODY:
            self.finish("stopped")
        else:
            assert self.owner is not None
            self.owner.ask(grace)

    def when_through(self, call: Callable[[], object]) -> None:
        """Call it once, when this has ended and `on_output` has had everything."""
        self._calls.append(call)
        self._call_if_through()

    def _call_if_through(self) -> None:
        # Each call is taken by whoever comes first: this, or the end, which may come just now.
        while self.state in (State.ENDED, State.REFUSED):
            if self.delivery is not None and not self.delivery.is_over:
                return
            try:
                call = self._calls.pop(0)
            except IndexError:
                return
            try:
                call()
            except BaseException:  # of a callback of the user's: the others want theirs
                logger.exception("a callback of a future of %s raised", self.id)

    # -- from its owner

    def begin(self) -> bool:
        """False where it has been refused meanwhile, as its start was interrupted."""
        if self._claims.setdefault("fate", self) is not self:
            return False
        self.request, self.descriptors = b"", ()
        self._on_begin(self)
        self.state = State.RUNNING
        self.changed.ring()
        return True

    def refuse(self, reason: str) -> None:
        refusal = object()
        if self._claims.setdefault("fate", refusal) is not refusal:
            return  # it runs, or was refused before
        if self.is_stopped():
            self.finish("stopped")
        else:
            self.refusal = reason
            self.state = State.REFUSED
            self._tell()

    def finish(
        self,
        status: FinalStatus,
        exit_code: int | None = None,
        *,
        forced: bool = False,
        error: str | None = None,
        result: bytes | None = None,
        stuck: tuple[int, ...] = (),
    ) -> None:
        """Say how it ended; the first call counts, and every call tells whoever waits."""
        duration = time.monotonic() - self.started_at
        end = End(status, now(), duration, exit_code, forced, error, result, stuck)
        self._claims.setdefault("end", end)
        self.state = State.ENDED
        self._tell()

    def _tell(self) -> None:
        self.descriptors = ()
        if self.input is not None:
            self.input.end()
        self._on_end(self)
        self.changed.ring()
        self.output.changed.ring()
        if self.delivery is not None:
            self.delivery.end(self._call_if_through)
        self._call_if_through()


def now() -> datetime:
    return datetime.now(timezone.utc)


def describe_exit(code: int) -> str:
    """An exit code in words; a negative one is the signal that killed the process."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


# Numerals that may overflow a float: Python would read them as infinity.
_HUGE = re.compile(rb"[0-9]{300}|[eE][+]?[0-9]{3}")


def parse_result(data: bytes) -> Any:
    """The value of a result's JSON; raises `ValueError` for what no response can hold."""
    # Judged first: the interpreter's parser recurses in C, on the stack of this thread.
    if is_too_deep(data):
        raise ValueError("JSON that is nested too deeply")
    try:
        number = _finite if _HUGE.search(data) else None
        return json.loads(data, parse_constant=_finite, parse_float=number)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number in JSON")
    return value
