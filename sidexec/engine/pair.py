"""A keeper and its snippet, as the host holds them: a control socket, a channel, two pipes.

The pair's thread waits for these here, reads and writes them without ever blocking, and
closes them. Other threads ask, hand over a request, release it or wake it, and pass on what
the launcher says about the keeper's end. Nothing here sends signals.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import queue
import select
import sys
import termios
from collections.abc import Iterator
from typing import Any

from .. import procfs, protocol
from .descriptors import READ_SIZE, Sender, Wake, close_all, read
from .execution import Execution
from .input import Input
from .output import STREAMS, Stream
from .waiting import monotonic, native

CONTROL_SIZE = 4096
PIPE_SIZE = 1024 * 1024
DEFAULT_PIPE_SIZE = 64 * 1024
F_SETPIPE_SZ = 1031  # Linux

# How long to leave a pipe alone that brings little at a time, in seconds: to wake up for
# each line costs more than to read it. The first bytes after a silence are read at once;
# the rest waits in the pipe.
BUSY_GAP = 0.006  # between two reads
BUSY_READS = 8
BUSY_PAUSE = 0.005

MAX_WAIT = 86400.0  # for `poll`, which does not take just any number
# How long a keeper may take to get ready, and how often to look whether it is stopped.
READY_LIMIT = 60.0
LOOK_INTERVAL = 1.0
NO_DESCRIPTORS = "this process has no descriptors left (see `ulimit -n`)"

Pids = tuple[int, ...]


class Pair:
    def __init__(self, keeper_pid: int, fds: list[int], is_ahead: bool) -> None:
        """`fds` are its own from here on; all else begins with its thread."""
        self.keeper_pid = keeper_pid
        self.is_ahead = is_ahead
        self.snippet_pid = 0
        self.has_tree = False
        self.ready_at = 0.0  # in seconds of CLOCK_BOOTTIME, as /proc counts
        self.swept_at = 0.0  # when its keeper, or the launcher, has last said that it sweeps
        # Set by the launcher's thread: what it says of the keeper's end, and of its own.
        self.lost: tuple[int, Pids] | None = None
        self.launcher_fault: str | None = None
        self.control_fd, self.channel, out, err = fds
        self._control: Sender | None = None
        self._channel: Sender | None = None
        self._wake: Wake | None = None
        self._open = set(fds)
        self._inbox: Any = native("queue", "SimpleQueue")()
        self.streams: dict[int, Stream] = {out: STREAMS[0], err: STREAMS[1]}
        self._wide: set[int] = set()
        self._is_released = False  # and so takes none
        self._deadlines: list[float] = []
        self._keeper_inbox = protocol.Inbox(protocol.FROM_KEEPER)
        self._snippet_inbox = protocol.Inbox(protocol.FROM_SNIPPET)
        self._unsent = memoryview(b"")
        self._read_at = 0.0
        self._quick_reads = 0
        self._is_busy = False
        # `_urgent` leaves out the channel and the output, whose reading may pause.
        self._everything = native("select", "poll")()
        self._urgent = native("select", "poll")()

    # -- from any thread

    def ask(self, grace: float) -> None:
        """Tell the keeper to ask the snippet, and kill it after `grace` seconds. Never blocks."""
        self._deadlines.append(monotonic() + grace)
        control = self._control
        if control is not None:
            # A keeper that is stopped, or gone, is left to the deadline.
            control.send(protocol.pack(protocol.STOP, repr(grace).encode()))
        self.wake()

    def hand_over(self, execution: Execution) -> bool:
        """Have a spare pair begin `execution`, in one step; false where it was released."""
        self._inbox.put(execution)
        # Its thread may have been released meanwhile: whoever finds it there has it.
        return not self._is_released or execution not in self.left_requests()

    def left_requests(self) -> list[Execution]:
        """Take out what was handed over when nobody waited for it any more."""
        found = []
        try:
            while True:
                found.append(self._inbox.get_nowait())
        except queue.Empty:
            return [each for each in found if each is not None]

    def release(self) -> None:
        """Close a pair that waits for a request."""
        self._inbox.put(None)

    def wake(self) -> None:
        wake = self._wake
        if wake is not None:
            wake.set()

    @property
    def deadline(self) -> float | None:
        """When the shortest grace period that it was given is over."""
        return min(self._deadlines, default=None)

    # -- from its own thread: waiting

    def _set_up(self) -> None:
        """Make, in the thread that lets go of them, what several threads use."""
        self._control = Sender(self.control_fd)
        self._open.discard(self.control_fd)  # which the sender closes, also if the next one fails
        self._channel = Sender(self.channel)
        self._wake = Wake()
        for poll in (self._everything, self._urgent):
            poll.register(self.control_fd, select.POLLIN)
            poll.register(self._wake.fd, select.POLLIN)
        for fd in self.streams:
            os.set_blocking(fd, False)

    def wait_until_ready(self) -> str | None:
        """Wait for the keeper's READY; else why it does not come."""
        try:
            self._set_up()
        except OSError:
            return NO_DESCRIPTORS
        keeper = f"the keeper (pid {self.keeper_pid})"
        fault = ""
        until = monotonic() + READY_LIMIT
        while monotonic() < until:
            # The launcher's thread may have had nothing to wake this one with.
            is_faulty = self.launcher_fault is not None
            if not is_faulty and not self._urgent.poll(LOOK_INTERVAL * 1000):
                if procfs.is_stopped(self.keeper_pid):
                    return f"{keeper} was stopped by a signal before it was ready"
                continue
            if self.launcher_fault is not None:
                return self.launcher_fault
            frames, is_open = self.read_control()
            for kind, text in frames:
                if kind == protocol.REFUSED:
                    return text
                if kind == protocol.FAULT:
                    fault = f": {text}"
                if kind == protocol.READY:
                    snippet_pid, has_tree = text.split()
                    self.snippet_pid = int(snippet_pid)
                    self.has_tree = has_tree == "1"
                    self.ready_at = procfs.now()
            if frames and frames[-1][0] == protocol.READY:  # or the snippet was killed at once
                return None
            if not is_open:
                return f"{keeper} ended before it was ready{fault}"
        return f"{keeper} was not ready after {READY_LIMIT:g} s"

    def is_gone(self) -> bool:
        """Whether nothing can begin on it any more."""
        # The channel tells that the snippet is gone before the keeper does.
        poll = native("select", "poll")()
        for fd in (self.control_fd, self.channel):
            poll.register(fd, select.POLLIN)
        return self._is_released or bool(poll.poll(0))

    def wait_for_request(self) -> Execution | None:
        execution: Execution | None = self._inbox.get()
        self._is_released = execution is None
        return execution

    def watch(self) -> None:
        """Begin to read what the snippet writes, and send it what it has not got yet."""
        for fd in self._open:
            self._everything.register(fd, select.POLLIN)
        if self._unsent:
            self._everything.modify(self.channel, select.POLLIN | select.POLLOUT)

    def feed(self, input: Input) -> None:
        """Write what waits for the snippet's standard input, and wait for room for the rest."""
        writer = input.writer
        if writer is not None:
            if input.write():
                for poll in (self._everything, self._urgent):  # `on_output` may wait for room
                    poll.register(writer.fd, select.POLLOUT)
            else:
                _unregister(writer.fd, self._everything, self._urgent)

    def wait(self, until: float | None, *, only_urgent: bool) -> list[int]:
        """The descriptors that can be read, once there are any; none when it is `until`.

        There may be none earlier: when another thread calls `wake`, or where there is room
        for input.
        """
        seconds = MAX_WAIT if until is None else until - monotonic()
        if self._is_busy and not only_urgent:
            self._is_busy = False
            seconds = min(seconds, BUSY_PAUSE)
            only_urgent = True
        poll = self._urgent if only_urgent else self._everything
        ready = poll.poll(1000 * min(max(0.0, seconds), MAX_WAIT))
        for fd, event in ready:
            if event & select.POLLNVAL:  # the host has closed all its descriptors
                _unregister(fd, self._everything, self._urgent)
            elif self._wake is not None and fd == self._wake.fd:
                self._wake.clear()
        return [fd for fd, _ in ready if fd == self.control_fd or fd in self._open]

    # -- reading

    def read_control(self) -> tuple[list[tuple[bytes, str]], bool]:
        """The frames that the keeper has sent, and whether more can come."""
        data = read(self.control_fd, CONTROL_SIZE)
        if data == b"":
            _unregister(self.control_fd, self._everything, self._urgent)
        frames = self._keeper_inbox.feed(data or b"")
        return [(kind, body.decode("utf-8", "replace")) for kind, body in frames], data != b""

    def read_channel(self, size: int) -> list[tuple[bytes, bytes]]:
        """The frames that the snippet has sent; `ProtocolError` if it sent anything else."""
        if self._unsent:
            self._send_rest()
            if not self._unsent:
                self._everything.modify(self.channel, select.POLLIN)
        data = self._read_some(self.channel, size)
        return self._snippet_inbox.feed(data) if data else []

    def reads(self, fd: int) -> bool:
        return fd in self._open

    def read_stream(self, fd: int, size: int) -> tuple[Stream, bytes]:
        return self.streams[fd], self._read_some(fd, size)

    def there_now(self, *fds: int) -> Iterator[tuple[int, int]]:
        """What can be read without waiting, in parts: descriptors, and how many bytes.

        Not up to the end of the file: whoever else has the other end may go on writing.
        """
        for fd in fds:
            size = _available(fd) if fd in self._open else 0
            while size > 0 and fd in self._open:
                part = min(size, READ_SIZE)
                yield fd, part
                size -= part

    def drop_channel(self) -> None:
        self._close(self.channel)

    def _read_some(self, fd: int, size: int) -> bytes:
        data = read(fd, size)
        if data == b"":
            self._close(fd)
        elif data:
            self._pace(fd, len(data))
        return data or b""

    def _pace(self, fd: int, size: int) -> None:
        now = monotonic()
        is_close = now - self._read_at < BUSY_GAP
        self._quick_reads = self._quick_reads + 1 if is_close else 0
        self._read_at = now
        # The channel is a socket, which never holds as much as a pipe.
        little = DEFAULT_PIPE_SIZE if fd == self.channel else READ_SIZE
        self._is_busy = self._quick_reads >= BUSY_READS and size < little
        if (self._is_busy or size >= DEFAULT_PIPE_SIZE) and fd not in self._wide:
            self._wide.add(fd)
            try:
                fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)
            except OSError:
                pass  # over what one user may have, or no pipe

    def send(self, execution: Execution) -> None:
        """Send its request to the snippet that waits for it, as far as there is room.

        Its descriptors go with the first bytes.
        """
        request = marshal.dumps((execution.umask, execution.request), 2)
        frame = protocol.pack(protocol.RUN, request)
        execution.request = b""
        self._unsent = memoryview(frame)
        if execution.descriptors and self._channel is not None:
            sent = self._channel.send_with(frame, execution.descriptors)
            self._unsent = self._unsent[sent:]
        execution.close_descriptors()
        self._send_rest()

    def _send_rest(self) -> None:
        assert self._channel is not None
        try:
            self._unsent = self._unsent[self._channel.send_some(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent = memoryview(b"")  # the snippet has ended, as the keeper will say

    # -- closing

    def close(self) -> None:
        """Close everything; what another thread is just writing to closes once it has."""
        if self._channel is not None:
            self._open.discard(self.channel)  # which the sender closes
        close_all(self._open)
        self._open.clear()
        self._control = self._channel = self._wake = None

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            _unregister(fd, self._everything)
            if fd == self.channel:
                self._channel = None
            else:
                close_all([fd])


def _unregister(fd: int, *polls: Any) -> None:
    for poll in polls:
        try:
            poll.unregister(fd)
        except KeyError:
            pass


def _available(fd: int) -> int:
    count = bytearray(4)
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except OSError:
        pass  # the host has closed all its descriptors
    return int.from_bytes(count, sys.byteorder)
