"""One run of the command line, from the start of its execution to the exit code.

The main thread waits, draws the progress and handles signals. It never writes output, which
could block: `on_output` does, in a thread of its own.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import math
import os
import queue
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from . import (
    ExecutionManager,
    GetSideExecutionStatusResponse,
    OutputChunk,
    StartSideExecutionResponse,
    StopSideExecutionResponse,
    procfs,
)
from .responses import Response
from .starting import INHERITED
from .terminal import STDERR, STDOUT, Screen, encode, one_line, tell

# Exit codes, where it is not the snippet's own.
FAILED = 1
TIMED_OUT = 124
NOT_STARTED = 125
BY_SIGNAL = 128

TICK = 0.1
# How long to wait for a reader of the output, in seconds, after a stop by force.
LAST_WORDS = 1.0
# Between the end of an execution and the answer of the call that has stopped it.
ANSWER_LIMIT = 5.0


class Run:
    """One execution, from its start to the exit code."""

    def __init__(self, manager: ExecutionManager, arguments: argparse.Namespace) -> None:
        self._manager = manager
        self._arguments = arguments
        self._screen = Screen()
        self._signals: list[int] = []
        self._must_suspend = False
        self._answers: queue.SimpleQueue[StopSideExecutionResponse] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[GetSideExecutionStatusResponse] = queue.SimpleQueue()

    def run(self, code: str | None) -> int:
        _handle(signal.SIGINT, self._on_signal)
        _handle(signal.SIGTERM, self._on_signal)
        _handle(signal.SIGTSTP, self._on_suspend)
        started = self._start(code)
        id = started.data.side_execution_id
        if id is None:
            self._end(started.error, started)
            return NOT_STARTED
        if self._signals:  # a signal may have come before the start
            self._ask(force=len(self._signals) > 1)
        _thread.start_new_thread(lambda: self._ended.put(self._manager.wait(id)), ())
        try:
            status = self._watch(id)
        except queue.Empty:  # nobody reads the output
            self._screen.hide_bar()
            return BY_SIGNAL + self._signals[0]
        _handle(signal.SIGTSTP, signal.SIG_DFL)  # there is nothing left to suspend
        response: Response = status
        if status.data.stop_reason == "requested":
            with contextlib.suppress(queue.Empty):
                response = self._answers.get(timeout=ANSWER_LIMIT)
        exit_code, line = self._judge(status)
        if self._screen.failure is not None and status.success:
            line = None  # the failure is what ended it
        self._end(line, response)
        failure = self._screen.failure
        return exit_code if failure is None else report(failure)

    def _start(self, code: str | None) -> StartSideExecutionResponse:
        path, *args = self._arguments.block or [None]
        options = {
            "params": self._arguments.params,
            "on_output": self._write,
            # Unless the code was read from it.
            "stdin": None if path == "-" else INHERITED,
        }
        try:
            if code is not None:
                return self._manager.start_with_code(code, **options)
            return self._manager.start_with_action_block(path, args=args, **options)
        except ValueError as error:
            parser: argparse.ArgumentParser = self._arguments.parser
            parser.error(str(error))

    def _watch(self, id: str) -> GetSideExecutionStatusResponse:
        """Wait until it has ended and its output is written; `queue.Empty` if nobody reads it.

        In short waits: if the system delivers a signal to another thread, Python runs
        the handler only when this one wakes up.
        """
        stop_at = time.monotonic() + self._arguments.stop_after
        while True:
            pause = min(TICK, stop_at - time.monotonic())
            with contextlib.suppress(queue.Empty):
                return self._ended.get(timeout=max(0.0, pause))
            if self._must_suspend:
                self._suspend()
            if time.monotonic() >= stop_at:
                stop_at = math.inf
                self._ask()
            is_hurried = len(self._signals) > 1
            if self._screen.has_bar or is_hurried:
                data = self._manager.get_status(id).data
                if is_hurried and data.status != "running":
                    return self._ended.get(timeout=LAST_WORDS)
                self._screen.refresh(data.progress)

    # -- signals

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signals.append(signum)
        if self._signals == [signal.SIGINT]:
            self._screen.notify(one_line("stopping; Ctrl-C again kills"))
        self._ask(force=len(self._signals) > 1)

    def _on_suspend(self, signum: int, frame: FrameType | None) -> None:
        self._must_suspend = True  # not here: this may have interrupted drawing the bar

    def _suspend(self) -> None:
        """Ctrl-Z reaches this process alone: the snippet has a session of its own."""
        self._must_suspend = False
        self._signal_tree(signal.SIGSTOP)
        self._screen.hide_bar()
        _handle(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # returns when the shell continues this process
        _handle(signal.SIGTSTP, self._on_suspend)
        self._signal_tree(signal.SIGCONT)

    def _signal_tree(self, signum: int) -> None:
        """Signal the snippet and its descendants; without /proc or pidfds, nothing."""
        for owner in (each.owner for each in self._manager._engine.running()):
            launcher = None if owner is None else procfs.parent_of(owner.keeper_pid)
            # Else the keeper has ended, and its number may be another process's.
            if owner and launcher and procfs.parent_of(launcher) == os.getpid():
                procfs.signal_below(owner.keeper_pid, signum)

    def _ask(self, force: bool = False) -> None:
        """Start to stop it, and don't wait: this is called by signal handlers."""
        _thread.start_new_thread(self._stop, (force,))

    def _stop(self, force: bool) -> None:
        for answer in self._manager.stop_all(force=force):
            if answer.data.status == "stopped":
                self._answers.put(answer)

    # -- output

    def _write(self, chunk: OutputChunk) -> None:
        failure = self._screen.failure
        is_error = chunk.stream == "stderr" or self._arguments.json
        self._screen.write(STDERR if is_error else STDOUT, encode(chunk.text))
        if self._screen.failure is not failure:
            self._ask()  # for the first failure

    def _end(self, line: str | None, response: Response) -> None:
        """Write the last lines; after a second signal, don't wait for a reader of them."""
        wire = encode(response.to_json() + "\n") if self._arguments.json else b""
        lines = [one_line(line)] if line else []
        written: queue.SimpleQueue[None] = queue.SimpleQueue()

        def write() -> None:
            self._screen.end(lines, wire)
            written.put(None)

        _thread.start_new_thread(write, ())
        while True:
            with contextlib.suppress(queue.Empty):
                return written.get(timeout=LAST_WORDS)
            if len(self._signals) > 1:
                return

    def _judge(self, status: GetSideExecutionStatusResponse) -> tuple[int, str | None]:
        """The exit code, and a message if neither that nor the snippet's output says it all."""
        data = status.data
        if not status.success:
            return FAILED, status.error
        if data.status == "completed":
            return 0, None
        if data.status == "failed":
            code = data.exit_code or 0
            if code > 0:
                return code, None
            # A traceback, of `KeyboardInterrupt`, is on standard error already.
            line = None if "\n" in (data.error or "") else data.error
            return (BY_SIGNAL - code if code else FAILED), line
        forced = self._manager.stop(data.side_execution_id).data.forced
        how = ", by force" if forced else ""
        if data.stop_reason == "timeout":
            return TIMED_OUT, f"timed out after {self._arguments.timeout:g} s{how}"
        code = BY_SIGNAL + self._signals[0] if self._signals else 0
        return code, f"stopped{how}"


def _handle(signum: int, handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    if signal.getsignal(signum) is not signal.SIG_IGN:  # set by `nohup` and `&`, and kept
        signal.signal(signum, handler)


def report(failure: OSError) -> int:
    """Say that the output could not be written; returns the exit code."""
    if failure.errno == errno.EPIPE:
        return BY_SIGNAL + signal.SIGPIPE  # no message: whoever closed the pipe knows
    tell(f"could not write the output: {failure.strerror}")
    return FAILED
