"""The command line's standard output and error, and the progress bar.

The cursor stays at the beginning of the bar. If a window is made narrower and the terminal
wraps the bar, all its rows are after the cursor, and are cleared too.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import os
import select
import threading

NAME = (__package__ or "").rpartition(".")[2]
STDOUT = 1
STDERR = 2

CLEAR = b"\r\x1b[J"  # from the beginning of the line to the end of the screen


def encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")  # as Python decoded paths and arguments
    except UnicodeEncodeError:  # such as in a docstring
        return text.encode("utf-8", "backslashreplace")


def one_line(text: str, who: str = NAME) -> bytes:
    return encode(f"{who}: {' '.join(text.split())}\n")


def tell(text: str, who: str = NAME) -> None:
    with contextlib.suppress(OSError):
        write(STDERR, one_line(text, who))


def write(fd: int, data: bytes) -> None:
    """Write all of it now, so that no buffer is left that could fail at exit."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # another process has made the terminal or pipe non-blocking
            select.select([], [fd], [])


class Screen:
    def __init__(self) -> None:
        self.failure: OSError | None = None  # of the first write that failed
        self._terminals = {fd for fd in (STDOUT, STDERR) if os.isatty(fd)}
        self.has_bar = STDERR in self._terminals and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()  # for the terminal, not for pipes
        self._percent: float | None = None
        self._bar = b""  # as it is drawn
        self._line_is_open = False  # the terminal's last line has no end yet
        self._notices: collections.deque[bytes] = collections.deque()

    def write(self, fd: int, data: bytes) -> None:
        """Write what the snippet has written; `failure` says if that has ever failed."""
        if fd not in self._terminals:
            self._write(fd, data)
            return
        with self._lock:
            self._clear()
            self._write(fd, data)
            self._line_is_open = not data.endswith(b"\n")
        self.refresh()

    def notify(self, line: bytes) -> None:
        """Write a line of ours to standard error, from another thread.

        For signal handlers: they may have interrupted a call that holds the lock. And a
        pipe that takes a line now may be full by the time that it is written.
        """
        self._notices.append(line)
        if STDERR in self._terminals:
            self._show()
        else:
            _thread.start_new_thread(self._show, ())

    def refresh(self, percent: float | None = None) -> None:
        """Draw notices and the bar, unless something is being written."""
        if percent is not None:
            self._percent = percent
        if self.has_bar:
            self._show()

    def _show(self) -> None:
        while select.select([], [STDERR], [], 0)[1] and self._lock.acquire(blocking=False):
            try:
                self._draw()
            finally:
                self._lock.release()
            if not self._notices:  # or a signal handler came while the lock was held
                break

    def hide_bar(self) -> None:
        """Clear the bar until the next `refresh`."""
        if self._lock.acquire(blocking=False):
            self._clear()
            self._lock.release()

    def end(self, lines: list[bytes], response: bytes) -> None:
        """Write the last lines to standard error, a response to standard output."""
        with self._lock:
            self._notices += lines  # after those whose thread has yet to come
            while self._notices:
                self._say(self._notices.popleft())
            self._clear()
            self.has_bar = False
            if response and self._line_is_open and STDOUT in self._terminals:
                response = b"\n" + response
            self._write(STDOUT, response)

    def _write(self, fd: int, data: bytes) -> None:
        try:
            write(fd, data)
        except OSError as error:
            self.failure = self.failure or error

    def _draw(self) -> None:
        while self._notices:
            self._say(self._notices.popleft())
        if self.has_bar and self._percent is not None and not self._line_is_open:
            bar = _bar(self._percent)
            if bar != self._bar:
                self._put(CLEAR + bar + b"\r")
                self._bar = bar

    def _say(self, line: bytes) -> None:
        if STDERR in self._terminals:
            if self._line_is_open:
                line = b"\n" + line
            elif self.has_bar:
                line = CLEAR + line  # of the bar, and of the ^C that the terminal shows
            self._bar = b""
            self._line_is_open = False
        self._put(line)

    def _clear(self) -> None:
        if self._bar:
            self._put(CLEAR)
            self._bar = b""

    def _put(self, data: bytes) -> None:
        try:
            write(STDERR, data)
        except OSError:
            self.has_bar = False  # the terminal is gone


def _bar(percent: float) -> bytes:
    try:
        columns = os.get_terminal_size(STDERR).columns or 80
    except OSError:
        columns = 80
    label = f"{int(percent):3d}%"
    width = min(40, columns - 8)
    if width < 5:
        return label.encode()
    done = int(width * percent / 100)
    return f"[{'#' * done}{'.' * (width - done)}] {label}".encode()
