"""The engine of one manager: its launchers, its executions, and what is remembered of them.

It decides which launcher a start goes to, how long to wait until it has begun, and in which
order everything is closed. Any thread and any signal handler may call every method: state
that they share changes in one atomic step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from collections import deque
from collections.abc import Callable

from .execution import NOBODY, Execution, State
from .launcher import Launcher, Settings
from .pair import LOOK_INTERVAL
from .process import Environment
from .waiting import join_ending, monotonic, native

logger = logging.getLogger(__name__)

CLOSED = "this manager is closed: make a new ExecutionManager"
# What finished executions may hold together, of output and results.
MAX_REMEMBERED_BYTES = 256 * 1024 * 1024
# The longest that a start may take, whatever becomes of the processes that it needs.
START_LIMIT = 60.0
# What `on_output` has at least to take the rest, also after a stop that has no grace.
LEAST_FOR_CALLBACKS = 0.25
RESOURCES = {value for name, value in vars(resource).items() if name.startswith("RLIMIT_")}


class Engine:
    def __init__(self, settings: Settings, max_history: int) -> None:
        """Starts nothing: the first `start` does."""
        self.executions: dict[str, Execution] = {}
        self.is_closing = False
        self.process: int | None = None  # in which it was first used
        self._settings = settings
        self._max_history = max_history
        self._launchers: list[Launcher] = []
        self._ended: deque[Execution] = deque()
        # Only used by whoever holds the lock, for which nobody waits.
        self._counting = native("_thread", "allocate_lock")()
        self._counted: deque[Execution] = deque()
        self._bytes_held = 0

    def start(self, execution: Execution, environment: Environment, *, is_default: bool) -> None:
        """Start it; its state and its `refusal` tell whether that worked.

        In the default environment a pair is forked ahead of need. If a signal handler
        raises in here, either nothing is left, or an execution that runs and is listed.
        """
        self.process = self.process or os.getpid()
        try:
            execution.on_begin, execution.on_end = self.know, self.on_end
            execution.place = lambda: self._place(execution, environment, is_default)
            if execution.delivery is None or self._begins(execution, execution.delivery.start):
                execution.place()
            if not execution.promise():
                execution.changed.wait_for(execution.is_decided)
        except BaseException:  # a signal handler's
            if execution.is_queued or not self._refuse(execution, "its start was interrupted"):
                self.know(execution)  # or nobody could stop it
            raise

    def _place(self, execution: Execution, environment: Environment, is_default: bool) -> None:
        """Hand it to a pair that is ready, or wait until one has begun it."""
        until = monotonic() + START_LIMIT
        is_placed = False
        while not is_placed and not execution.is_decided():
            if self.is_closing and self._refuse(execution, CLOSED):
                return
            is_placed = self._begin(execution, self._launcher(environment, is_default), until)

    def _begins(self, execution: Execution, start_thread: Callable[[], object]) -> bool:
        """Start a thread that `execution` needs; where that fails, it is refused."""
        # Around this alone: what a signal handler raises during a wait is the caller's.
        try:
            start_thread()
        except RuntimeError as problem:
            self._refuse(execution, f"could not start a thread: {problem}")
            return False
        return True

    def _begin(self, execution: Execution, launcher: Launcher, until: float) -> bool:
        """Have it begin on `launcher`, as long as that is up; returns whether a pair has it."""
        if not self._begins(execution, launcher.boot):
            return False
        is_placed = launcher.submit(execution)
        # Not earlier: a signal handler that waited for it would wait for the very call that
        # it has interrupted.
        self.know(execution)
        if self.is_closing:
            if not self._refuse(execution, CLOSED):
                execution.stop("closed", 0.0)  # a pair has just begun it
            launcher.let_go()  # `close` may not have seen it
        while not is_placed and not execution.is_decided() and launcher.is_up:
            if execution.changed.wait_for(execution.is_decided, LOOK_INTERVAL):
                return True
            if execution.deadlines and min(execution.deadlines) <= monotonic():
                self._refuse(execution, "")  # it was to stop meanwhile, and so it has
            elif launcher.is_stopped():
                launcher.abandon("was stopped by a signal: try again")
            elif monotonic() >= until:
                launcher.abandon(f"did not answer for {START_LIMIT:g} s: try again")
                self._refuse(execution, f"it could not be started within {START_LIMIT:g} s")
        return is_placed

    def know(self, execution: Execution) -> None:
        """Add it to the executions; its start and the thread that begins it both do."""
        self.executions[execution.id] = execution
        if execution.is_through():
            self.on_end(execution)  # which may have come before

    @property
    def foreign(self) -> str | None:
        """An error message if this process was forked from the manager's, else None."""
        if self.process in (None, os.getpid()):
            return None
        return (
            f"this manager belongs to process {self.process}, from which this one was"
            " forked: make a new ExecutionManager here"
        )

    def is_over(self, execution: Execution) -> Callable[[], bool]:
        process = self.process
        return lambda: execution.is_through() or os.getpid() != process

    def wait(self, execution: Execution, limit: float | None) -> None:
        """Wait until it has ended and `on_output` has had everything, at most so long."""
        until = None if limit is None else monotonic() + limit
        delivery = execution.delivery
        with contextlib.nullcontext() if delivery is None else delivery.waited_for():
            is_over = execution.changed.wait_for(self.is_over(execution), limit)
        if is_over and delivery is not None and self.foreign is None:
            delivery.wait(None if until is None else max(0.0, until - monotonic()))

    def send_input(self, execution: Execution, data: bytes, close: bool) -> bool:
        """Returns whether its standard input takes it; waits while too much is unread."""
        input = execution.input
        if input is None or self.foreign is not None or not input.add(data, close=close):
            return False
        owner = execution.owner  # afterwards: a pair that takes it only now finds the data
        if owner is not None:
            owner.wake()
        is_over = self.is_over(execution)
        input.changed.wait_for(lambda: input.has_room() or is_over())
        return not input.is_lost()

    def ask(self, execution: Execution, grace: float, caller: object = None) -> None:
        """Ask it to stop; never blocks."""
        if self.foreign is None:
            execution.stop("requested", grace, caller)
            logger.debug("stopping %s", execution.id)

    def stop(self, executions: list[Execution], grace: float, caller: object) -> None:
        """Stop them side by side, and wait until they have ended."""
        if self.foreign is not None:
            return
        for execution in executions:
            self.ask(execution, grace, caller)
        self._abandon_what_is_cut_off()
        for execution in executions:
            execution.changed.wait_for(self.is_over(execution))
        self._wait_for_callbacks(executions, grace)

    def running(self) -> list[Execution]:
        return [each for each in list(self.executions.values()) if not each.is_through()]

    def close(self, grace: float, *, wait: bool) -> None:
        """Stop everything, then end the launchers; a second call hurries the first."""
        self.is_closing = True
        if self.foreign is not None:
            return
        running = self.running()
        for execution in running:
            execution.stop("closed", grace)
        self._abandon_what_is_cut_off()
        # Before the waits: what a signal handler raises may end those, and nobody closes again.
        for launcher in list(self._launchers):
            launcher.let_go()
        if not wait:
            return
        for execution in running:
            execution.changed.wait_for(self.is_over(execution))
        launchers = list(self._launchers)
        for launcher in launchers:
            launcher.retire()
        for launcher in launchers:
            launcher.changed.wait_for(lambda: launcher.is_through() or self.foreign is not None)
        self._wait_for_callbacks(list(self.executions.values()), grace)
        join_ending()

    def _wait_for_callbacks(self, executions: list[Execution], grace: float) -> None:
        """Wait until `on_output` has had everything, about `grace` seconds at most."""
        # Even one that keeps up gets nothing in no time: its thread has to be scheduled.
        until = monotonic() + max(grace, LEAST_FOR_CALLBACKS)
        for execution in executions:
            delivery = execution.delivery
            if delivery is not None and not delivery.wait(max(0.0, until - monotonic())):
                delivery.abandon()

    # -- launchers

    def _abandon_what_is_cut_off(self) -> None:
        """Where the host has closed all descriptors, nothing else wakes the threads in `poll`."""
        for each in list(self._launchers):
            each.abandon_if_cut_off()

    def _launcher(self, environment: Environment, is_default: bool) -> Launcher:
        """One that is up and runs snippets as the host is now: user, limits, environment."""
        users = os.getuid(), os.geteuid(), os.getgid(), os.getegid(), os.getgroups()
        identity = users, list(map(resource.getrlimit, RESOURCES))

        def find() -> Launcher | None:
            for each in list(self._launchers):
                if each.environment == environment and each.identity == identity:
                    if each.is_up and not each.abandon_if_cut_off():
                        return each
            return None

        found = find()
        if found is None:
            made = Launcher(self._settings, environment, identity, self._on_gone)
            # Another call may do the same just now: the first of them in the list counts.
            self._launchers.append(made)
            found = find() or made
            if found is not made:
                made.discard()  # unless yet another call uses it already
        if is_default and not found.requests.keeps_spare:
            for each in list(self._launchers):
                if each.requests.keeps_spare and each is not found:
                    each.let_go()
            found.requests.keeps_spare = True
        return found

    def _on_gone(self, launcher: Launcher) -> None:
        if launcher in self._launchers:
            self._launchers.remove(launcher)

    def _refuse(self, execution: Execution, reason: str) -> bool:
        """Refuse it, unless a pair has it already; returns whether that was done."""
        is_free = execution.claim(NOBODY)
        if is_free:
            execution.refuse(reason)
        return is_free

    # -- what is remembered

    def on_end(self, execution: Execution) -> None:
        """It has ended, or was refused."""
        for launcher in list(self._launchers):
            launcher.withdraw(execution)
        if execution.state is State.REFUSED or execution.is_forgotten:
            self.executions.pop(execution.id, None)
        else:
            self._ended.append(execution)
        # Whoever does not get the lock leaves its own to whoever has it.
        while self._ended and self._counting.acquire(False):
            try:
                self._count_and_forget()
            finally:
                self._counting.release()

    def _count_and_forget(self) -> None:
        while self._ended:
            execution = self._ended.popleft()
            if not execution.is_counted:  # it may be told more than once that it has ended
                execution.is_counted = True
                self._counted.append(execution)
                self._bytes_held += execution.bytes_held
        newest = 1  # the newest is always kept, however large it is
        while len(self._counted) > self._max_history or (
            self._bytes_held > MAX_REMEMBERED_BYTES and len(self._counted) > newest
        ):
            oldest = self._counted.popleft()
            self._bytes_held -= oldest.bytes_held
            oldest.is_forgotten = True
            self.executions.pop(oldest.id, None)
