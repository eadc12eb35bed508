"""One execution as the host knows it: its results so far, its stop, and its end.

Any thread may read and stop it at any time. All else is set by its one owner: the thread
that took its request, or whoever claimed it before one did. It reads no descriptors, and
does not decide how an execution has ended.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import signal
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import NamedTuple, Protocol, cast

from ..responses import Status, StopReason
from .delivery import Delivery
from .descriptors import Descriptor
from .input import Input
from .output import Output
from .waiting import Bell, log, mask, masked, monotonic, note_end, start_thread

logger = logging.getLogger(__name__)


class State(enum.Enum):
    WAITING = "it waits for a keeper and a snippet"
    RUNNING = "its code has been sent to a snippet"
    ENDED = "nothing of it is left"
    REFUSED = "it could not be started"


class End(NamedTuple):
    """How an execution ended; set once, after which nothing of it changes."""

    status: Status
    exit_code: int | None = None
    forced: bool = False
    error: str | None = None
    stuck: tuple[int, ...] = ()  # pids that can't be killed
    cpu_time: float | None = None
    peak_memory: int | None = None
    # Filled in by `finish`.
    time: datetime | None = None
    duration: float | None = None


NOT_ENDED = End("running")


class Stop(NamedTuple):
    """Why an execution is stopped, and by which call."""

    reason: StopReason
    caller: object


class Sample(NamedTuple):
    """The last figures of what the tree uses."""

    at: float
    cpu: float
    memory: int
    percent: float


class Owner(Protocol):
    """The pair that runs an execution."""

    keeper_pid: int

    def ask(self, grace: float) -> None: ...
    def wake(self) -> None: ...


# The owner of an execution that no pair may take any more, or that has ended.
NOBODY = object()


class Execution:
    def __init__(
        self,
        id: str,
        request: bytes,
        output: Output,
        delivery: Delivery | None,
        input: Input | None,
        descriptors: Sequence[Descriptor],
        *,
        thread_id: str | None,
        action_block: str | None,
        timeout: float | None,
    ) -> None:
        self.id = id
        self.request = request
        self.output = output
        self.delivery = delivery
        self.input = input
        self.descriptors = descriptors  # that go with the request
        self.thread_id = thread_id
        self.action_block = action_block
        self.timeout = timeout
        self.start_time = now()
        self.started_at = monotonic()
        self.state = State.WAITING
        self.is_queued = False  # and so will begin, or be refused
        self.deadlines: list[float] = []  # of stops since `promise`, for a pair that begins it
        # Set by its start: `place` finds a pair for it, and may wait for one; the other two tell
        # the engine.
        self.place: Callable[[], object] = bool
        self.on_begin: Callable[[Execution], object] = bool
        self.on_end: Callable[[Execution], object] = bool
        self.umask: int | None = None  # the host's at its start
        self.is_counted = self.is_forgotten = False  # see `Engine.on_end`
        self.refusal: str | None = None  # why it could not be started
        self.progress: float | None = None
        self.reported: bytes | None = None  # JSON, checked once it has ended
        self.usage: Sample | None = None  # set by readers, for readers
        self.changed = Bell()  # when the state has changed
        self._calls: list[tuple[set[int], Callable[[], object]]] = []  # each with a signal mask
        # Filled by `setdefault`, which is atomic: the first one is the one that counts. Only
        # the owner is replaced, at the end.
        self._claims: dict[str, object] = {}

    # -- from any thread

    @property
    def owner(self) -> Owner | None:
        """Its pair, while it has one."""
        owner = self._claims.get("owner")
        return None if owner is NOBODY else cast("Owner | None", owner)

    @property
    def stopping(self) -> Stop | None:
        return cast("Stop | None", self._claims.get("stop"))

    @property
    def stop_reason(self) -> StopReason | None:
        return None if self.stopping is None else self.stopping.reason

    @property
    def bytes_held(self) -> int:
        """What is kept of it once it has ended, in bytes: output, result and error."""
        error = (self.end and self.end.error) or ""
        return self.output.size + len(self.reported or b"") + len(error)

    @property
    def end(self) -> End | None:
        return cast("End | None", self._claims.get("end"))

    def is_decided(self) -> bool:
        """Whether it has begun or was refused."""
        return self.state is not State.WAITING

    def is_through(self) -> bool:
        """Whether nothing of it runs, nor will."""
        return self.state in (State.ENDED, State.REFUSED)

    def claim(self, owner: object) -> bool:
        """Make `owner` the owner; false if another one was first."""
        return self._claims.setdefault("owner", owner) is owner

    def settle_stop(self) -> bool:
        """Decide whether it ends as stopped, and say so; a stop from here on comes too late."""
        return self._claims.setdefault("stop", None) is not None

    def stop(self, reason: StopReason, grace: float, caller: object = None) -> None:
        """Ask it to stop, or shorten its grace period; the first caller is the one that stops it.

        Never blocks. A handler may raise between the two steps, so every call asks; the
        keeper passes on the first of them.
        """
        if self._claims.setdefault("stop", Stop(reason, caller)) is None:
            return  # it has come to its end by itself
        if self._claims.get("promise"):
            self.deadlines.append(monotonic() + grace)  # for the pair that begins it
        else:
            self.claim(NOBODY)
        owner = self.owner
        if owner is not None:
            owner.ask(grace)
        elif self._claims.get("owner") is NOBODY:
            self.finish(End("stopped"))

    def when_through(self, call: Callable[[], object]) -> None:
        """Call `call` once, when this has ended and `on_output` has had everything.

        It has the signal mask of this thread, whichever calls it.
        """
        self._calls.append((mask(), call))
        self._call_if_through()

    def _call_if_through(self) -> None:
        # Each call is taken by whoever comes first: this, or the end, which may come just now.
        while self.is_through():
            if self.delivery is not None and not self.delivery.is_over:
                return
            try:
                own, call = self._calls.pop(0)
            except IndexError:
                return
            try:
                with masked(own):
                    call()
            except BaseException:  # of a callback of the user's: the others want theirs
                message = "a callback of a future of %s raised"
                log(logger, logging.ERROR, message, self.id, exc_info=True)

    # -- from its owner

    def promise(self) -> bool:
        """Say that it runs, though it may not have begun yet; false where it was refused."""
        return self._claims.setdefault("promise", True) is True

    def close_descriptors(self) -> None:
        for each in self.descriptors:
            each.close()
        self.descriptors = ()

    def begin(self) -> None:
        self.place = bool  # it holds an environment
        self.on_begin(self)
        self.state = State.RUNNING
        self.changed.ring()

    def refuse(self, reason: str) -> None:
        """For whoever has claimed it for nobody; what has ended or was refused stays as it is."""
        if self.is_through():
            return
        if self.settle_stop():
            self.finish(End("stopped"))
        elif self._claims.setdefault("promise", False):
            self.finish(End("failed", error=reason))
        else:
            self.refusal = reason
            self._come_to(State.REFUSED)

    def finish(self, end: End) -> None:
        """Set how it ended; the first call counts, and every call wakes those who wait."""
        duration = monotonic() - self.started_at
        self._claims.setdefault("end", end._replace(time=now(), duration=duration))
        self._come_to(State.ENDED)

    def _come_to(self, last: State) -> None:
        try:
            self.state = last
            self._tell()
        except BaseException:  # a signal handler's: who waits would never hear the rest
            self.state = last
            self._tell()
            raise

    def _tell(self) -> None:
        is_nobodys = self._claims.get("owner") is NOBODY
        self._claims["owner"] = NOBODY  # lets go of the pair, and of what is left in it
        self.place = bool
        # What is remembered of it is what is counted: its output and its result.
        self.request = b""
        self.close_descriptors()
        if self.input is not None:
            self.input.end()
        self.on_end(self)
        self.changed.ring()
        self.output.changed.ring()
        if self.delivery is not None:
            self.delivery.end(self._call_if_through)
        if is_nobodys and self._calls:
            # This may be a launcher's thread, which what a callback calls may wait for.
            with contextlib.suppress(RuntimeError):
                start_thread(self._call_beside)
                return
        self._call_if_through()

    def _call_beside(self) -> None:
        self._call_if_through()
        note_end()


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
