"""The command line: `run` executes a snippet or an action block, `blocks` lists them.

In a run the main thread waits, shows the progress and takes the signals. It never
waits for whoever reads the output: a thread of its own, the printer, writes that.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import io
import json
import os
import queue
import select
import signal
import sys
import threading
import time
import tokenize
from types import FrameType
from typing import Any, NoReturn

from . import (
    ExecutionManager,
    GetSideExecutionStatusResponse,
    OutputChunk,
    StopSideExecutionResponse,
)
from .blocks import why_not_runnable
from .output import Stream
from .responses import Response

COMPLETED = 0
FAILED = 1
BAD_USAGE = 2
TIMED_OUT = 124
STOPPED = 130

EXIT_CODES = {"completed": COMPLETED, "failed": FAILED, "stopped": STOPPED}

NAME = (__package__ or "").rpartition(".")[2]
STDOUT = 1
STDERR = 2

CLEAR_LINE = b"\r\x1b[K"
TICK = 0.1
# In characters: so far ahead of the printer, the snippet is made to wait.
AHEAD = 1024 * 1024
# After the second signal: how long a reader may take over the rest of the output.
LAST_WORDS = 1.0
# Between the end of an execution and the answer of the call that has stopped it.
ANSWER_LIMIT = 5.0


def main() -> int:
    arguments = _parser().parse_args()
    try:
        code: int = arguments.call(arguments.parser, arguments)
    except KeyboardInterrupt:  # before there was anything to stop
        code = STOPPED
    return code


# -- arguments


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: object = None) -> None:
        with contextlib.suppress(OSError):
            _write(STDOUT, _encode(self.format_help()))

    def error(self, message: str) -> NoReturn:
        """One line, where `argparse` would show the usage as well."""
        _tell(message, self.prog)
        sys.exit(BAD_USAGE)


def _parser() -> _Parser:
    parser = _Parser(
        prog=f"python -m {__package__}",
        description="Run Python on the side, and be able to stop it.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run",
        help="run Python code or an action block",
        description="Run Python code and stream its output. Ctrl-C stops it gracefully,"
        " a second one by force.",
        epilog="Exit code: 0 completed, 1 failed, 2 bad usage, 124 timed out, 130 stopped.",
        allow_abbrev=False,
    )
    source = run.add_mutually_exclusive_group(required=True)
    source.add_argument("-c", dest="code", metavar="CODE", help="the code itself")
    source.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="a .py file, a directory with a __main__.py, or - for standard input",
    )
    run.add_argument(
        "--params", type=_params, metavar="JSON", help="a JSON object: the code's `params`"
    )
    run.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="stop it after so many seconds, as timed out (default: no limit)",
    )
    run.add_argument(
        "--grace",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="how long it may clean up when it is stopped (default: 5 seconds)",
    )
    run.add_argument(
        "--stop-after", type=_seconds, metavar="S", help="stop it after so many seconds"
    )
    run.add_argument(
        "--python", default=sys.executable, metavar="EXE", help="the interpreter to run it with"
    )
    run.add_argument(
        "--json",
        action="store_true",
        help="write the final response to standard output, all else to standard error",
    )
    run.set_defaults(call=_run, parser=run)

    blocks = commands.add_parser(
        "blocks",
        help="list action blocks",
        description="List the directories that have a __main__.py: name, description, path.",
        allow_abbrev=False,
    )
    blocks.add_argument("path", nargs="?", default=".", metavar="PATH", help="where to look")
    blocks.add_argument("--json", action="store_true", help="write the response itself")
    blocks.set_defaults(call=_list_blocks, parser=blocks)
    return parser


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if value >= 0:
            return value
    raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, not {text!r}")


def _params(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, such as {{}}, not {text!r}")
    return value


def _read_standard_input(parser: _Parser) -> str:
    try:
        with open(0, "rb", closefd=False) as stream:
            source = stream.read()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        return source.decode(encoding)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        parser.error(f"can't read code from standard input: {error}")


# -- the terminal


class _Screen:
    """Both output streams, and the progress bar that must not tear what they show."""

    def __init__(self) -> None:
        self.failure: OSError | None = None  # of the first stream that could not be written
        self._terminals = {fd for fd in (STDOUT, STDERR) if os.isatty(fd)}
        self.has_bar = STDERR in self._terminals and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()
        self._broken: set[int] = set()
        self._percent: float | None = None
        self._is_drawn = False
        self._line_is_open = False  # the snippet has not ended the terminal's last line

    def write(self, fd: int, data: bytes) -> None:
        """Write to a descriptor, unless it has failed before; `failure` says if it has."""
        with self._lock:
            if fd in self._broken:
                return
            if fd in self._terminals:
                self._hide()
                self._line_is_open = not data.endswith(b"\n")
            try:
                _write(fd, data)
            except OSError as error:
                self._broken.add(fd)
                self.failure = self.failure or error
            self._draw()

    def show_progress(self, percent: float) -> None:
        """Draw the bar anew, unless something is being written: never blocks for that."""
        if percent != self._percent and self._lock.acquire(blocking=False):
            try:
                self._percent = percent
                self._draw()
            finally:
                self._lock.release()

    def end(self, lines: list[str], more: bool) -> None:
        """Take the bar away for good, and write last lines; `more` follow elsewhere."""
        with self._lock:
            self._hide()
            if lines or more:
                if self._line_is_open and STDERR in self._terminals:
                    self._put(b"\n")
                elif self.has_bar:
                    self._put(CLEAR_LINE)  # of the ^C that the terminal shows
            self.has_bar = False
            for line in lines:
                _tell(line)

    def _draw(self) -> None:
        if self.has_bar and self._percent is not None and not self._line_is_open:
            self._put(CLEAR_LINE + _bar(self._percent, _columns()).encode())
            self._is_drawn = self.has_bar

    def _hide(self) -> None:
        if self._is_drawn:
            self._put(CLEAR_LINE)
            self._is_drawn = False

    def _put(self, data: bytes) -> None:
        try:
            _write(STDERR, data)
        except OSError:
            self.has_bar = False  # the terminal is gone


def _bar(percent: float, columns: int) -> str:
    label = f"{int(percent):3d}%"
    width = min(40, columns - 16)  # less than a line, even when ^C is echoed behind it
    if width < 5:
        return label
    done = int(width * percent / 100)
    return f"[{'#' * done}{'.' * (width - done)}] {label}"


def _columns() -> int:
    try:
        return os.get_terminal_size(STDERR).columns or 80
    except OSError:
        return 80


def _write(fd: int, data: bytes) -> None:
    """Write all of it now: nothing stays in a buffer that could fail at the exit."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # whoever else holds the terminal or pipe set it so
            select.select([], [fd], [])


def _tell(text: str, who: str = NAME) -> None:
    """One line on standard error."""
    with contextlib.suppress(OSError):
        _write(STDERR, _encode(f"{who}: {' '.join(text.split())}\n"))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # as paths and arguments come


# -- run


def _run(parser: _Parser, arguments: argparse.Namespace) -> int:
    code: str | None = arguments.code
    if arguments.path == "-":
        code = _read_standard_input(parser)
    elif arguments.path is not None:
        problem = why_not_runnable(arguments.path)
        if problem is not None:
            parser.error(problem)
    try:
        manager = ExecutionManager(
            python=arguments.python,
            default_timeout=arguments.timeout,
            grace_period=arguments.grace,
        )
    except ValueError as error:
        parser.error(str(error))
    except NotImplementedError as error:
        _tell(str(error))
        return FAILED
    with manager:
        return _Run(manager, parser, arguments).run(code)


class _Run:
    """One execution, from its start to the exit code."""

    def __init__(
        self, manager: ExecutionManager, parser: _Parser, arguments: argparse.Namespace
    ) -> None:
        self._manager = manager
        self._parser = parser
        self._arguments = arguments
        self._screen = _Screen()
        self._signals = 0
        self._is_asked = False
        self._answers: queue.SimpleQueue[StopSideExecutionResponse] = queue.SimpleQueue()
        self._received = 0
        self._printed = 0
        self._progressed = threading.Event()

    def run(self, code: str | None) -> int:
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as `nohup` and `&` want it
                signal.signal(signum, self._on_signal)
        id = self._start(code)
        if id is None:
            return FAILED
        printer = threading.Thread(target=self._print, args=(id,), daemon=True)
        printer.start()
        if self._signals:  # they may have come before there was anything to stop
            self._ask(force=self._signals > 1)
        self._watch(id, printer)
        status = self._manager.wait(id)
        printer.join(LAST_WORDS)
        if printer.is_alive():
            return STOPPED  # nobody reads what is written, nor would they read more
        return self._finish(status)

    def _start(self, code: str | None) -> str | None:
        params = self._arguments.params
        start: Any = self._manager.start_with_code
        if code is None:
            start, code = self._manager.start_with_action_block, self._arguments.path
        try:
            started = start(code, params, on_output=self._hold_back)
        except ValueError as error:
            self._parser.error(str(error))
        if not started.success:
            self._screen.end([started.error or "not started"], more=False)
            if self._arguments.json:
                self._screen.write(STDOUT, _encode(started.to_json() + "\n"))
        id: str | None = started.data.side_execution_id
        return id

    def _watch(self, id: str, printer: threading.Thread) -> None:
        """Until all is over and written, or a second signal hurries the end.

        In short waits: where the system hands a signal to another thread, Python runs
        the handler only when this one wakes.
        """
        stop_after: float | None = self._arguments.stop_after
        stop_at = None if stop_after is None else time.monotonic() + stop_after
        while printer.is_alive() and self._signals < 2:
            pause = TICK if stop_at is None else min(TICK, stop_at - time.monotonic())
            printer.join(max(0.0, pause))
            if stop_at is not None and time.monotonic() >= stop_at:
                stop_at = None
                self._ask()
            if self._screen.has_bar:
                progress = self._manager.get_status(id).data.progress
                if progress is not None:
                    self._screen.show_progress(progress)

    # -- stopping

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._ask(force=self._signals > 1)

    def _ask(self, force: bool = False) -> None:
        """Have it stopped, without waiting for that: a signal handler must be short."""
        self._is_asked = True
        _thread.start_new_thread(self._stop, (force,))

    def _stop(self, force: bool) -> None:
        for answer in self._manager.stop_all(force=force):
            if answer.data.status == "stopped":
                self._answers.put(answer)

    # -- output

    def _print(self, id: str) -> None:
        streams: dict[Stream, int] = {"stdout": STDOUT, "stderr": STDERR}
        if self._arguments.json:
            streams["stdout"] = STDERR
        has_failed = False
        for chunk in self._manager.follow(id):
            self._screen.write(streams[chunk.stream], _encode(chunk.text))
            self._printed += len(chunk.text)
            self._progressed.set()
            if self._screen.failure is not None and not has_failed:
                has_failed = True
                self._ask()

    def _hold_back(self, chunk: OutputChunk) -> None:
        """Keep the snippet from running away from a slow reader of the output.

        `follow` would skip what it is too late for; `on_output` is waited for.
        """
        self._received += len(chunk.text)
        while self._received - self._printed > AHEAD and not self._is_asked:
            self._progressed.wait(TICK)
            self._progressed.clear()

    # -- the end

    def _finish(self, status: GetSideExecutionStatusResponse) -> int:
        """Say what is to be said, and return the exit code."""
        screen = self._screen
        lines = [line for line in (self._what_happened(status), self._what_is_lost()) if line]
        if screen.failure is not None and status.success:
            lines = []  # it has been stopped for that, as the failure itself says
        screen.end(lines, more=self._arguments.json)
        if self._arguments.json:
            screen.write(STDOUT, _encode(self._final_response(status).to_json() + "\n"))
        if screen.failure is not None and screen.failure.errno != errno.EPIPE:
            _tell(f"could not write the output: {screen.failure.strerror}")
            return FAILED  # and where a pipe was closed, whoever did so knows
        if not status.success:
            return FAILED
        if status.data.stop_reason == "timeout":
            return TIMED_OUT
        return EXIT_CODES[status.data.status]

    def _final_response(self, status: GetSideExecutionStatusResponse) -> Response:
        if status.data.stop_reason == "requested":
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=ANSWER_LIMIT)
        return status

    def _what_happened(self, status: GetSideExecutionStatusResponse) -> str | None:
        """In words, where the snippet's own output does not show it."""
        data = status.data
        if not status.success:
            return status.error
        if data.status == "completed":
            return None
        if data.status == "failed":
            error = data.error or "failed"
            return None if "\n" in error else error  # a traceback is there already
        what = "stopped"
        if data.stop_reason == "timeout":
            what = f"timed out after {self._arguments.timeout:g} s"
        forced = self._manager.stop(data.side_execution_id).data.forced
        return f"{what}, by force" if forced else what

    def _what_is_lost(self) -> str | None:
        lost = self._received - self._printed
        if lost <= 0:
            return None
        return f"{lost} characters of output are lost: who reads it is too slow"


# -- blocks


def _list_blocks(parser: _Parser, arguments: argparse.Namespace) -> int:
    try:
        with ExecutionManager() as manager:
            response = manager.list_action_blocks(arguments.path)
    except ValueError as error:
        parser.error(str(error))
    except NotImplementedError as error:
        _tell(str(error))
        return FAILED
    if arguments.json:
        text = response.to_json() + "\n"
    elif response.success and not response.data.count:
        text = ""
        _tell(f"no action blocks below {response.data.search_path}")
    else:
        rows = [
            (block.name, (block.description or "-").partition("\n")[0], block.path)
            for block in response.data.action_blocks
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        text = "".join(line + "\n" for line in lines)
    try:
        _write(STDOUT, _encode(text))
    except BrokenPipeError:
        pass
    except OSError as error:
        _tell(f"could not write the output: {error.strerror}")
        return FAILED
    if not response.success:
        parser.error(str(response.error))
    return COMPLETED


def _open_standard_descriptors() -> None:
    """Where one of the three is closed, a descriptor of ours would take its number."""
    for fd in (0, STDOUT, STDERR):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    _open_standard_descriptors()
    sys.exit(main())
