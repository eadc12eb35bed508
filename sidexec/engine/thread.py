"""One execution's thread: from a ready pair to the end, and who is told.

    a ready pair -> a request -> RUN -> output, frames, time -> END, or LOST -> the end

It does everything for one execution, and decides how it ended. It may wait as long as it
likes, since nobody else waits for this thread. It leaves processes to the keeper, and trusts
what the keeper says about the end; the snippet only says what the result is, and the text of
an error.
"""

from __future__ import annotations

import enum
import logging
import os
import signal
from typing import Protocol

from .. import procfs, protocol
from ..responses import Status
from .descriptors import READ_SIZE
from .execution import End, Execution, describe_exit
from .pair import Pair, Pids
from .requests import Requests
from .results import parse_result
from .waiting import log, monotonic

logger = logging.getLogger(__name__)

# How long to wait for END past the grace period, or past the last SWEEPING, in seconds, before
# the keeper is killed; and then for the LOST of the launcher, which sweeps in its place.
SWEEP_ALLOWANCE = 4.0


class Launcher(Protocol):
    """What a pair's thread asks of the launcher that has forked the pair."""

    grace: float
    requests: Requests

    def kill_keeper(self, pid: int) -> None: ...
    def release(self, pair: Pair) -> None: ...
    def why_ended(self) -> str | None: ...


class Keeper(enum.Enum):
    """What has become of a keeper; each value says what this side still waits for."""

    AT_WORK = "its END"
    KILLED = "END or the launcher's LOST, as it did not answer, or the launcher has ended"
    GONE = "the launcher's LOST, as its socket has ended"
    DONE = "nothing any more"


def main(pair: Pair, launcher: Launcher) -> None:
    """The thread of a pair that the launcher has just forked."""
    execution = None
    try:
        problem = pair.wait_until_ready()
        if problem is not None:
            launcher.kill_keeper(pair.keeper_pid)
            launcher.requests.miss(pair.is_ahead, problem)
            return
        execution = launcher.requests.take(pair)
        if execution is not None:
            _Run(execution, pair, launcher).run()
    except Exception:
        if execution is not None and execution.end is None:
            execution.finish(End("failed", error="internal error: see the log"))
        log(logger, logging.ERROR, "internal error in the thread of a pair", exc_info=True)
    finally:
        pair.close()
        launcher.release(pair)
        for each in pair.left_requests():
            each.place()


class _Run:
    def __init__(self, execution: Execution, pair: Pair, launcher: Launcher) -> None:
        self._execution = execution
        self._pair = pair
        self._launcher = launcher
        self._keeper = Keeper.AT_WORK
        self._patience: float | None = None  # until when the keeper, or LOST, is waited for
        self._end = End("failed", forced=True)  # as far as others have told
        self._is_orphaned = False  # the keeper has heard that the launcher has ended
        self._error: str | None = None  # what the snippet says of its own failure
        self._fault: str | None = None  # what is wrong with the snippet, or its keepers
        self._keeper_fault: str | None = None  # what the keeper says of its own failure

    def run(self) -> None:
        execution, pair = self._execution, self._pair
        delivery = execution.delivery
        execution.begin()
        pair.send(execution)
        for deadline in list(execution.deadlines):
            pair.ask(max(0.0, deadline - monotonic()))
        pair.watch()
        self._launcher.requests.fork_ahead()
        began = monotonic()
        times_out = None if execution.timeout is None else began + execution.timeout
        while self._keeper is not Keeper.DONE:
            if execution.input is not None:
                pair.feed(execution.input)
            is_asked = pair.deadline is not None
            waits = delivery is not None and not is_asked and delivery.is_full(pair.wake)
            until = times_out if not is_asked and self._patience is None else self._patience
            # Before the wait: this thread may lose seconds after it, on a busy machine, and
            # what has come meanwhile is heard before anybody is judged.
            now = monotonic()
            for fd in pair.wait(until, only_urgent=waits):
                if fd == pair.control_fd:
                    self._hear_keeper()
                elif pair.reads(fd):  # or it was closed by an earlier event of this round
                    self._hear_snippet(fd)
            if not is_asked and times_out is not None and now >= times_out:
                self._time_out()
            self._look_after_keeper(now)
        # Not all: the snippet may have handed a descriptor to a process that is none of its
        # descendants, and that goes on writing.
        for fd, size in pair.there_now(*pair.streams, pair.channel):
            self._hear_snippet(fd, size)
        # Before anybody is told: all descriptors are closed then, and a callback may close the
        # manager, which waits for the pairs.
        pair.close()
        self._launcher.release(pair)
        self._finish()

    # -- what the other side says

    def _hear_keeper(self) -> None:
        frames, is_open = self._pair.read_control()
        for kind, text in frames:
            if kind == protocol.END:
                code, forced, orphaned, microseconds, peak, *stuck = text.split()
                self._end = End(
                    "failed",
                    None if code == "None" else int(code),
                    forced == "1",
                    stuck=tuple(map(int, stuck)),
                    cpu_time=int(microseconds) / 1e6,
                    peak_memory=int(peak),
                )
                self._is_orphaned = orphaned == "1"
                self._keeper = Keeper.DONE
            elif kind == protocol.SWEEPING:
                self._pair.swept_at = monotonic()
            elif kind == protocol.FAULT:
                self._keeper_fault = text
        if not is_open and self._keeper is not Keeper.DONE:
            # The launcher sweeps what it has left, and says LOST; where it can't, we do.
            self._keeper = Keeper.GONE
            self._patience = monotonic() + 2 * SWEEP_ALLOWANCE
            if not self._pair.has_tree:
                self._kill_group()

    def _hear_snippet(self, fd: int, size: int = READ_SIZE) -> None:
        pair, execution = self._pair, self._execution
        if fd == pair.channel:
            try:
                for kind, payload in pair.read_channel(size):
                    self._take(kind, payload)
            except (protocol.ProtocolError, ValueError) as error:
                pair.drop_channel()
                self._fault = f"the snippet broke the protocol on its channel: {error}"
                pair.ask(0.0)
            return
        stream, data = pair.read_stream(fd, size)
        if data:
            # What was reported before a line was written is known once that line is.
            for report in pair.there_now(pair.channel):
                self._hear_snippet(*report)
            execution.output.add(stream, data)
            if execution.delivery is not None:
                execution.delivery.put(stream, data)

    def _take(self, kind: bytes, payload: bytes) -> None:
        if kind == protocol.PROGRESS:
            progress = float(payload)
            if not 0 <= progress <= 100:
                raise ValueError("a progress that is not between 0 and 100")
            self._execution.progress = progress
        elif kind == protocol.RESULT:
            self._execution.reported = payload
        else:
            self._error = payload.decode("utf-8", "replace")

    def _time_out(self) -> None:
        """Stop it, unless it has ended in time, and only this thread is late."""
        if self._keeper is not Keeper.DONE:
            self._execution.stop("timeout", self._launcher.grace)

    # -- keepers and launchers that end, or do not answer

    def _look_after_keeper(self, now: float) -> None:
        """End it if the keeper does not."""
        pair = self._pair
        if self._keeper is Keeper.DONE:
            return
        if pair.lost is not None:
            if self._keeper is not Keeper.GONE:
                self._hear_keeper()  # both may have come at once, and its last words say why
            self._take_loss(*pair.lost)
            return
        if pair.launcher_fault is not None:
            if self._keeper is Keeper.GONE:
                self._kill_group()
                self._lose(pair.launcher_fault)
                return
            if self._fault is None:
                # The keeper notices as well, and asks and sweeps: its END is still to come.
                self._fault = pair.launcher_fault
                self._keeper = Keeper.KILLED
                self._patience = monotonic() + self._launcher.grace + SWEEP_ALLOWANCE
        if self._keeper is Keeper.AT_WORK and pair.deadline is not None:
            self._patience = pair.deadline + SWEEP_ALLOWANCE
        if self._patience is None:
            return
        self._patience = max(self._patience, pair.swept_at + SWEEP_ALLOWANCE)
        if now < self._patience:
            return
        if self._keeper is Keeper.AT_WORK:
            self._launcher.kill_keeper(pair.keeper_pid)
            self._keeper = Keeper.KILLED
            self._patience = monotonic() + SWEEP_ALLOWANCE
        else:
            self._end = self._end._replace(stuck=(pair.keeper_pid,))
            self._keeper = Keeper.DONE

    def _take_loss(self, code: int, stuck: Pids) -> None:
        if self._keeper is not Keeper.DONE:
            self._end = self._end._replace(stuck=stuck)
            how = self._keeper_fault or describe_exit(code)
            self._lose(f"the keeper (pid {self._pair.keeper_pid}) of this execution is gone: {how}")

    def _lose(self, reason: str) -> None:
        self._fault = reason
        self._keeper = Keeper.DONE

    def _kill_group(self) -> None:
        """All that can be done on systems without subreapers, once a keeper has been killed.

        The keeper may have reaped the leader of a group that had no other member, and
        its number may have gone to somebody else: who then began after the snippet, which can
        be told where it was in a later tick of /proc.
        """
        leader = self._pair.snippet_pid
        if (procfs.began_at(leader) or 0.0) > self._pair.ready_at:
            return
        try:
            os.killpg(leader, signal.SIGKILL)
        except OSError:
            pass  # the group has ended by itself

    # -- the end

    def _finish(self) -> None:
        execution, end = self._execution, self._end
        if execution.reported is not None:
            try:
                parse_result(execution.reported)
            except ValueError as problem:
                self._fault = self._fault or f"the snippet sent a result that is {problem}"
                execution.reported = None
        if self._fault is None and self._is_orphaned and end.exit_code != 0:
            # The keeper has heard first that the launcher has ended, and asked.
            self._fault = self._launcher.why_ended()
        code, error = end.exit_code, self._fault
        status: Status
        if execution.settle_stop():
            status, error = "stopped", self._fault if self._keeper_fault else None
        elif error is None and code == 0:
            status = "completed"
        else:
            status = "failed"
            if error is None and code is not None:
                told = code > 0 or code == -signal.SIGINT  # by an uncaught KeyboardInterrupt
                error = (self._error if told else None) or describe_exit(code)
        if end.stuck:
            pids = ", ".join(map(str, end.stuck))
            error = f"process {pids} can't be killed, the kernel holds it: end it by hand"
        execution.finish(end._replace(status=status, error=error))
        # Afterwards, since whoever waits may hold the lock of a log's handler.
        if self._fault is not None:
            level = logging.ERROR if self._keeper_fault else logging.WARNING
            log(logger, level, "%s: %s", execution.id, self._fault)
        level = logging.WARNING if end.stuck else logging.INFO if end.forced else logging.DEBUG
        how = "by force" if end.forced else "as asked" if execution.stopping else "by itself"
        log(logger, level, "%s is %s, %s", execution.id, status, how)
