"""Passing an execution's output to `on_output`, in a thread of its own.

Every chunk is passed on, in order. While the callback is far behind, no more output is
read, and the snippet waits as it would for any slow reader; but not once it is asked to
stop, since that may have been done by this very callback, nor while this callback waits
for the end. The bytes that are never passed on are counted in the log.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import queue
from collections.abc import Callable, Iterator
from typing import Any

from .output import STREAMS, Decoder, OutputChunk, Stream
from .waiting import Bell, log, mask, masked, native, note_end, start_thread

logger = logging.getLogger(__name__)

# The backlog, in bytes, at which reading pauses, and at which output is dropped if it can't.
PAUSE_AT = 1024 * 1024
MOST = 16 * 1024 * 1024


class Delivery:
    def __init__(self, id: str, call: Callable[[OutputChunk], object]) -> None:
        self._id = id
        self._call = call
        self._queue: Any = native("queue", "SimpleQueue")()
        self._put = self._taken = self._dropped = 0
        self._ends = {stream: 0 for stream in STREAMS}  # how many bytes have come on each
        self._waits = False  # the callback, for the end of this very execution
        self.is_over = False
        self._when_over: Callable[[], object] | None = None
        self._over = Bell()
        self._thread: int | None = None
        self._mask = mask()  # the caller's, for the callback
        self._wake: Callable[[], object] | None = None

    def start(self) -> None:
        """Raises `RuntimeError` where there are no threads left."""
        start_thread(self._run)

    # -- from the execution's thread

    def put(self, stream: Stream, data: bytes) -> None:
        self._put += len(data)
        self._queue.put((stream, self._ends[stream], data))
        self._ends[stream] += len(data)
        while self._backlog > MOST:
            try:
                self._dropped += len(self._queue.get_nowait()[2])
            except queue.Empty:
                break

    def is_full(self, wake: Callable[[], object]) -> bool:
        """Whether to read no further; `wake` is called when there is room."""
        if self._backlog <= PAUSE_AT or self._waits:
            return False
        self._wake = wake
        # Check again: the other thread may have made room, or begun to wait for the end,
        # before `wake` was set.
        return self._backlog > PAUSE_AT // 2 and not self._waits

    def end(self, when_over: Callable[[], object]) -> None:
        """No more output follows; `when_over` is called when all has been passed on."""
        self._when_over = when_over
        if self.is_over:  # it was abandoned, perhaps before the line above: the caller checks
            self._when_over = None
        self._queue.put(None)

    # -- from any thread

    @property
    def _backlog(self) -> int:
        return self._put - self._taken - self._dropped

    def _is_own_thread(self) -> bool:
        return self._thread == _thread.get_ident()

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """Within it, the calling thread waits for the end.

        Where that is the callback's own thread, nothing shrinks the backlog: reading goes on.
        """
        is_own = self._is_own_thread()
        if is_own:
            self._waits = True
            self._wake_reader()
        try:
            yield
        finally:
            if is_own:
                self._waits = False

    def wait(self, timeout: float | None) -> bool:
        """Wait until all is passed on, but not in its own thread; returns whether it is."""
        if self._is_own_thread():
            return True
        return self._over.wait_for(lambda: self.is_over, timeout)

    def abandon(self) -> None:
        """Pass on nothing more once the callback returns, and log that."""
        if not self.is_over:
            self._finish()
            self._log_loss(self._put - self._taken)

    def _finish(self) -> None:
        self.is_over = True  # first: what is taken from here on is not passed on
        self._call = bool  # which the execution would keep as long as it is remembered
        self._over.ring()
        when_over, self._when_over = self._when_over, None  # it holds the execution
        if when_over is not None:
            when_over()

    # -- its own thread

    def _run(self) -> None:
        self._thread = _thread.get_ident()
        decoders = {stream: Decoder(stream) for stream in STREAMS}
        while True:
            item = self._queue.get()
            if item is None:
                break
            stream, offset, data = item
            if self.is_over:
                continue
            self._taken += len(data)
            self._hand_over(decoders[stream].feed(offset, data))
            if self._backlog <= PAUSE_AT // 2:
                self._wake_reader()
        if not self.is_over:
            for stream, decoder in decoders.items():
                self._hand_over(decoder.feed(self._ends[stream], b"", final=True))
            note_end()
            self._finish()
            self._log_loss(self._dropped)

    def _wake_reader(self) -> None:
        wake = self._wake
        if wake is not None:
            self._wake = None
            wake()

    def _log_loss(self, size: int) -> None:
        if size:
            log(logger, logging.WARNING, "on_output of %s never got %d bytes", self._id, size)

    def _hand_over(self, chunks: Iterator[OutputChunk]) -> None:
        for chunk in chunks:
            try:
                with masked(self._mask):
                    self._call(chunk)
            except BaseException:
                # Even `SystemExit`: it would end this thread, and the output after it
                # would be lost.
                log(logger, logging.ERROR, "on_output of %s raised", self._id, exc_info=True)
