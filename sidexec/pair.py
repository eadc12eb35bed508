"""A keeper and its snippet as the host sees them: four descriptors, and often a pidfd.

Responsible for reading and writing these without ever blocking, for closing them, and
for asking the snippet. What is read goes to the owner; what it means is the owner's
business. It signals nothing else, and nothing by its pid.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import sys
import termios
import time

from . import procfs, protocol
from .loop import Loop
from .output import STREAMS, Stream

READ_SIZE = 256 * 1024
CONTROL_SIZE = 4096
PIPE_SIZE = 1024 * 1024

# A stream that brings little at a time, again and again, is left alone for a moment:
# to wake for each line costs more than to read it. The first bytes after a silence
# are read at once, and nothing is lost meanwhile, as it waits in the pipe.
BUSY_GAP = 0.001  # between two reads, in seconds
BUSY_READS = 8
BUSY_PAUSE = 0.005
# So long after a stop, all of them are left alone.
STOP_PAUSE = 0.003

DEFAULT_PIPE_SIZE = 64 * 1024
F_SETPIPE_SZ = 1031  # Linux; in `fcntl` since Python 3.10

Pids = tuple[int, ...]


class Owner:
    """Who hears what a pair has to say: the pool, and then the supervision."""

    def on_ready(self, pair: Pair) -> None: ...
    def on_refused(self, pair: Pair, reason: str) -> None: ...
    def on_output(self, stream: Stream, data: bytes) -> None: ...
    def on_snippet_frame(self, kind: bytes, payload: bytes) -> None: ...
    def on_violation(self, reason: str) -> None: ...
    def on_keeper_gone(self, pair: Pair) -> None: ...
    def on_lost(self, pair: Pair, code: int, stuck: Pids) -> None: ...
    def on_end(self, pair: Pair, code: int | None, forced: bool, stuck: Pids) -> None: ...


class _Rhythm:
    """How often a stream has brought something lately."""

    def __init__(self) -> None:
        self.last = 0.0
        self.is_wide = False
        self._reads = 0

    def is_busy(self, size: int) -> bool:
        now = time.monotonic()
        is_close = now - self.last < BUSY_GAP + BUSY_PAUSE
        self._reads = self._reads + 1 if is_close else 0
        self.last = now
        return self._reads >= BUSY_READS and size < READ_SIZE


def _boot_time() -> float:
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return math.inf if clock is None else time.clock_gettime(clock)


class Pair:
    def __init__(self, loop: Loop, owner: Owner, keeper_pid: int, fds: list[int]) -> None:
        self.keeper_pid = keeper_pid
        self.snippet_pid = 0
        self.ready_at = 0.0  # in seconds of CLOCK_BOOTTIME, as /proc counts
        self.has_tree = False
        self.is_asked = False
        self.fault = ""  # what the keeper says of its own failure
        self.owner = owner
        self._loop = loop
        self._control, self._channel = fds[:2]
        self._streams: dict[Stream, int] = dict(zip(STREAMS, fds[2:]))
        self._keeper_inbox = protocol.Inbox(protocol.FROM_KEEPER)
        self._snippet_inbox = protocol.Inbox(protocol.FROM_SNIPPET)
        self._unsent = memoryview(b"")
        self._pidfd = -1  # the snippet's
        self._open = set(fds)
        self._is_paused = False
        self._rhythms = {stream: _Rhythm() for stream in STREAMS}
        for fd in fds:
            os.set_blocking(fd, False)
        loop.watch(self._control, self.hear_keeper)

    def run(self, request: bytes) -> None:
        """Send the request to the waiting snippet, and read what it writes."""
        for stream, fd in self._streams.items():
            self._watch_stream(stream, fd)
        self._unsent = memoryview(request)
        self._on_channel()

    def stop(self, grace: float) -> None:
        """Ask the snippet, and have the keeper end it after `grace` seconds."""
        asks = grace > 0 and not self.is_asked and self._pidfd in self._open
        # Told before it is asked: or the keeper might find it gone, and no stop.
        self._tell_keeper(grace, asks or self.is_asked)
        if asks and not self._ask():
            self._tell_keeper(grace, False)
        # What a short cleanup writes is read at its end: to wake for each piece, and for
        # the end of each descriptor, would take the processor from those who work on it.
        if not self._unsent:
            self._unwatch(self._channel, *self._streams.values())
            self._loop.at(time.monotonic() + STOP_PAUSE, self._resume_all)

    def _tell_keeper(self, grace: float, is_asked: bool) -> None:
        text = f"{grace!r} {int(is_asked)}"
        self._write(self._control, protocol.pack(protocol.STOP, text.encode()))

    def _ask(self) -> bool:
        """Ask at once, and not by the keeper: it would have to wake first."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
            self.is_asked = True
        except (AttributeError, OSError):
            pass  # it has ended, or it is for the keeper to ask
        return self.is_asked

    def _open_pidfd(self) -> None:
        # Before it runs: nothing is closed yet, so this gets the number of no descriptor
        # that an event still to come takes for the one it was.
        try:
            self._pidfd = os.pidfd_open(self.snippet_pid)
        except (AttributeError, OSError):
            return  # the keeper asks
        self._open.add(self._pidfd)
        # The keeper may have reaped it since it said READY, and its number may be somebody
        # else's: but then not of a child of the keeper.
        if procfs.parent_of(self.snippet_pid) != self.keeper_pid:
            self._close(self._pidfd)

    def _resume_all(self) -> None:
        if self._channel in self._open:
            self._loop.watch(self._channel, self._on_channel, writing=bool(self._unsent))
        for stream, fd in self._streams.items():
            self._resume(stream, fd)

    def pause(self) -> None:
        """Read no more output until `resume`, or the end."""
        self._is_paused = True
        self._unwatch(*self._streams.values())

    def resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._resume_all()

    def close(self) -> None:
        for fd in list(self._open):
            self._close(fd)

    # -- reading

    def hear_keeper(self) -> None:
        data = self._read(self._control, CONTROL_SIZE)
        if data is None:
            return
        for kind, payload in self._keeper_inbox.feed(data):
            text = payload.decode("utf-8", "replace")
            if kind == protocol.READY:
                snippet_pid, has_tree = text.split()
                self.snippet_pid = int(snippet_pid)
                self.ready_at = _boot_time()
                self.has_tree = has_tree == "1"
                self._open_pidfd()
                self.owner.on_ready(self)
            elif kind == protocol.REFUSED:
                self.owner.on_refused(self, text)
            elif kind == protocol.FAULT:
                self.fault = text
            elif kind == protocol.END:
                code, forced, *stuck = text.split()
                self.drain()
                self.close()
                exit_code = None if code == "None" else int(code)
                self.owner.on_end(self, exit_code, forced == "1", tuple(map(int, stuck)))
        if not data and self._control in self._open:
            self._close(self._control)
            self.owner.on_keeper_gone(self)

    def _on_channel(self) -> None:
        if self._unsent:
            try:
                sent = os.write(self._channel, self._unsent)
                self._unsent = self._unsent[sent:]
            except BlockingIOError:
                pass
            except OSError:
                self._unsent = memoryview(b"")  # it has ended, as the keeper will say
        if self._channel in self._open:
            self._loop.watch(self._channel, self._on_channel, writing=bool(self._unsent))
            self._hear_snippet(READ_SIZE)

    def _hear_snippet(self, size: int) -> int:
        data = self._read(self._channel, size)
        if data is None:
            return 0
        if not data:
            self._close(self._channel)
            return 0
        try:
            for kind, payload in self._snippet_inbox.feed(data):
                self.owner.on_snippet_frame(kind, payload)
        except (protocol.ProtocolError, ValueError) as error:
            self._close(self._channel)
            self.owner.on_violation(str(error))
        return len(data)

    def _watch_stream(self, stream: Stream, fd: int) -> None:
        self._loop.watch(fd, lambda: self._on_stream(stream, fd))

    def _on_stream(self, stream: Stream, fd: int) -> None:
        size = self._hear_stream(stream, fd, READ_SIZE)
        rhythm = self._rhythms[stream]
        is_busy = rhythm.is_busy(size)
        if (is_busy or size >= DEFAULT_PIPE_SIZE) and not rhythm.is_wide:
            rhythm.is_wide = True
            self._widen(fd)
        if is_busy and fd in self._open and not self._is_paused:
            self._loop.unwatch(fd)
            self._loop.at(rhythm.last + BUSY_PAUSE, lambda: self._resume(stream, fd))

    def _resume(self, stream: Stream, fd: int) -> None:
        if fd in self._open and not self._is_paused:
            self._watch_stream(stream, fd)

    def _widen(self, fd: int) -> None:
        """Let the pipe take more at a time, where the system has a way, and the memory."""
        try:
            fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            pass  # over what one user may have

    def _hear_stream(self, stream: Stream, fd: int, size: int) -> int:
        data = self._read(fd, size)
        if data:
            self.owner.on_output(stream, data)
        elif data is not None:
            self._close(fd)
        return len(data or b"")

    def drain(self) -> None:
        """Take what is still there of a snippet that has ended.

        Not to the end of the file: the snippet may have handed a descriptor to a
        process that is none of its descendants, and that goes on writing.
        """
        for stream, fd in self._streams.items():
            left = self._available(fd)
            while left > 0:
                got = self._hear_stream(stream, fd, min(left, READ_SIZE))
                left = left - got if got else 0
        left = self._available(self._channel)
        while left > 0:
            got = self._hear_snippet(min(left, READ_SIZE))
            left = left - got if got else 0

    def _available(self, fd: int) -> int:
        if fd not in self._open:
            return 0
        count = bytearray(4)
        fcntl.ioctl(fd, termios.FIONREAD, count)
        return int.from_bytes(count, sys.byteorder)

    # -- descriptors

    def _read(self, fd: int, size: int) -> bytes | None:
        """What is there; empty at the end of the file; None where there is nothing."""
        if fd not in self._open:
            return None  # closed by an earlier event of the same round
        try:
            return os.read(fd, size)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _write(self, fd: int, data: bytes) -> None:
        if fd in self._open:
            try:
                os.write(fd, data)
            except OSError:
                pass  # the keeper is gone, or stopped: the watchdog sees to it

    def _unwatch(self, *fds: int) -> None:
        for fd in fds:
            if fd in self._open:  # or its number may be another execution's by now
                self._loop.unwatch(fd)

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            self._loop.unwatch(fd)
            os.close(fd)
