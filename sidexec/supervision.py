"""One execution under way: stop, timeout, frames, and which end it comes to.

The only place where an execution's state changes; all of it in the loop's thread.
It leaves processes to the keeper and goes by what the keeper says of the end. The
snippet's own frames say only what the result and the text of an error are.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import procfs, protocol
from .execution import End, Execution, FinalStatus, StopReason, describe_exit, now, parse_result
from .journal import Journal
from .loop import Loop, Timer
from .output import Stream
from .pair import Owner, Pair, Pids

if TYPE_CHECKING:
    from .launching import Launcher

# How long past the grace period a keeper may take for its sweep before it counts as
# one that does not answer, and then how long the launcher may take over its sweep.
SWEEP_ALLOWANCE = 4.0


class Supervision(Owner):
    def __init__(
        self,
        execution: Execution,
        request: bytes,
        grace: float,
        loop: Loop,
        journal: Journal,
        on_end: Callable[[Supervision], None],
    ) -> None:
        self.execution = execution
        self._request = request
        self._grace = grace
        self._loop = loop
        self._journal = journal
        self._on_end = on_end
        self._launcher: Launcher | None = None
        self._pair: Pair | None = None
        self._timeout: Timer | None = None
        self._watchdog: Timer | None = None
        self._deadline: float | None = None
        self._keeper_is_gone = False
        self._error: str | None = None  # what the snippet says of its own failure
        self._fault: str | None = None  # what is wrong with the snippet or its keepers

    # -- what the host does

    def start(self, launcher: Launcher) -> None:
        self._launcher = launcher
        launcher.pool.request(self)

    def begin(self, pair: Pair) -> None:
        """A keeper and a snippet are there: run the code."""
        execution = self.execution
        self._pair = pair
        execution.keeper_pid = pair.keeper_pid
        if execution.delivery is not None:
            try:
                execution.delivery.start()
            except RuntimeError as problem:
                self.refuse(f"could not start a thread for on_output: {problem}")
                return
        if execution.timeout is not None:
            self._timeout = self._loop.at(time.monotonic() + execution.timeout, self._time_out)
        execution.is_started = True
        execution.changed.ring()
        # Last, since the snippet may take this processor as soon as it has its request.
        pair.run(self._request)
        self._request = b""

    def refuse(self, reason: str) -> None:
        """It can't be started."""
        self.execution.refused = reason
        self._finish(None, forced=False, stuck=())

    def stop(self, reason: StopReason, grace: float, caller: object = None) -> None:
        """Ask, or bring the end nearer; the first caller is the one that stops it."""
        execution = self.execution
        if execution.end is not None:
            return
        if execution.stop_reason is None:
            execution.stop_reason = reason
            execution.stopped_by = caller
        deadline = time.monotonic() + grace
        if self._deadline is None or deadline < self._deadline:
            self._deadline = deadline
            if self._pair is None:
                assert self._launcher is not None
                self._launcher.pool.cancel(self)
                self._finish(None, forced=False, stuck=())
            else:
                self._pair.stop(grace)
                self._pair.resume()
                self._watch_keeper(deadline + SWEEP_ALLOWANCE, self._end_keeper)
                self._journal.log(logging.DEBUG, "%s is to stop (%s)", execution.id, reason)

    # -- what the clock does

    def _time_out(self) -> None:
        self.stop("timeout", self._grace)

    def _watch_keeper(self, when: float, call: Callable[[], None]) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = self._loop.at(when, call)

    def _end_keeper(self) -> None:
        """The keeper does not answer, so the launcher ends it and sweeps its tree."""
        assert self._pair is not None and self._launcher is not None
        self._launcher.kill_keeper(self._pair.keeper_pid)
        self._watch_keeper(time.monotonic() + SWEEP_ALLOWANCE, self._give_up)

    def _give_up(self) -> None:
        assert self._pair is not None
        self._finish(None, forced=True, stuck=(self._pair.keeper_pid,))

    # -- what the other side does

    def on_output(self, stream: Stream, data: bytes) -> None:
        self.execution.output.add(stream, data)
        delivery = self.execution.delivery
        if delivery is not None:
            delivery.put(stream, data)
            if self._deadline is None and delivery.wait_for_room(self._on_room):
                assert self._pair is not None
                self._pair.pause()

    def _on_room(self) -> None:
        """`on_output`, in its own thread, has caught up."""
        assert self._pair is not None
        self._loop.post(self._pair.resume)

    def on_snippet_frame(self, kind: bytes, payload: bytes) -> None:
        if kind == protocol.PROGRESS:
            progress = float(payload)
            if not 0 <= progress <= 100:
                raise ValueError("a progress that is not between 0 and 100")
            self.execution.progress = progress
        elif kind == protocol.RESULT:
            self.execution.reported = payload
        else:
            self._error = payload.decode("utf-8", "replace")

    def on_violation(self, reason: str) -> None:
        self._fault = f"the snippet broke the protocol on its channel: {reason}"
        if self._pair is not None and self._deadline is None:
            self._pair.stop(0.0)
            self._watch_keeper(time.monotonic() + SWEEP_ALLOWANCE, self._end_keeper)

    def on_end(self, pair: Pair, code: int | None, forced: bool, stuck: Pids) -> None:
        self._finish(code, forced, stuck)

    def on_keeper_gone(self, pair: Pair) -> None:
        """Its control socket ended without an END: the launcher sweeps, then says LOST."""
        assert self._launcher is not None
        self._keeper_is_gone = True
        if not pair.has_tree or not self._launcher.is_up:
            self._kill_group()
        if self._launcher.is_up:
            self._watch_keeper(time.monotonic() + 2 * SWEEP_ALLOWANCE, self._give_up)
        else:
            self._lose(f"the keeper (pid {pair.keeper_pid}) and its launcher are gone", ())

    def on_lost(self, pair: Pair, code: int, stuck: Pids) -> None:
        keeper = f"the keeper (pid {pair.keeper_pid}) of this execution is gone"
        self._lose(f"{keeper}: {pair.fault or describe_exit(code)}", stuck, pair.fault)

    def on_launcher_gone(self, reason: str) -> None:
        """The keeper notices as well, and asks and sweeps: its END is still to come."""
        self._fault = reason
        if self._pair is not None:
            self._pair.is_asked = True  # by the keeper, and once is enough
        if self._keeper_is_gone:
            self._kill_group()
            self._lose(reason, ())
        else:
            self._watch_keeper(time.monotonic() + self._grace + SWEEP_ALLOWANCE, self._give_up)

    def _kill_group(self) -> None:
        """All that can be done where nobody adopts what a keeper leaves.

        The keeper may have reaped the leader of a group that had no other member, and
        its number may have gone to somebody else: who then began after the snippet.
        """
        assert self._pair is not None
        leader = self._pair.snippet_pid
        if (procfs.began_at(leader) or 0.0) > self._pair.ready_at:
            return
        try:
            os.killpg(leader, signal.SIGKILL)
        except OSError:
            pass  # the group has ended by itself

    # -- the end

    def _lose(self, reason: str, stuck: Pids, fault: str = "") -> None:
        self._fault = reason
        level = logging.ERROR if fault else logging.WARNING
        self._journal.log(level, "%s: %s", self.execution.id, reason)
        self._finish(None, forced=True, stuck=stuck)

    def _finish(self, code: int | None, forced: bool, stuck: Pids) -> None:
        execution = self.execution
        if execution.end is not None:
            return
        for timer in (self._timeout, self._watchdog):
            if timer is not None:
                timer.cancel()
        if self._pair is not None:
            self._pair.close()  # before anybody is told: all descriptors are closed then
        status, error, result = self._judge(code)
        if stuck:
            pids = ", ".join(map(str, stuck))
            error = f"the kernel does not let go of process {pids}: end it by hand, if it can be"
        execution.end = End(
            status=status,
            time=now(),
            duration=time.monotonic() - execution.started_at,
            exit_code=code,
            forced=forced,
            error=error,
            result=result,
            stuck=stuck,
        )
        level = logging.WARNING if stuck else logging.INFO if forced else logging.DEBUG
        how = "by force" if forced else "by itself" if execution.stop_reason is None else "as asked"
        self._journal.log(level, "%s is %s, %s", execution.id, status, how)
        if self._launcher is not None:
            self._launcher.pool.release(self, self._pair)
        self._on_end(self)
        execution.changed.ring()
        execution.output.changed.ring()
        if execution.delivery is not None:
            execution.delivery.end()

    def _judge(self, code: int | None) -> tuple[FinalStatus, str | None, bytes | None]:
        execution = self.execution
        result = execution.reported
        if result is not None:
            try:
                parse_result(result)
            except ValueError as problem:
                self._fault = self._fault or f"the snippet sent a result that is {problem}"
                result = None
        if execution.stop_reason is not None:
            has_failed = self._pair is not None and self._pair.fault  # the keeper, not the snippet
            return "stopped", self._fault if has_failed else None, result
        error = execution.refused or self._fault
        if error is None and code == 0:
            return "completed", None, result
        if error is None and code is not None:
            told = code > 0 or code == -signal.SIGINT  # by an uncaught KeyboardInterrupt
            error = (self._error if told else None) or describe_exit(code)
        return "failed", error, result

