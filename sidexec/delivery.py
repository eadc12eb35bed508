"""Handing an execution's output to `on_output`, in a thread of its own.

Every chunk is handed over, in order, unless it falls far behind during a stop. While the callback is far behind, the loop
reads no further, and the snippet waits as it would for any slow reader: never once
it is asked to stop, since its cleanup must not wait for the very callback that stops
it. The loop's thread puts, this thread takes; neither ever waits for a lock.
"""

from __future__ import annotations

import _thread
import collections
import logging
import signal
import time
from collections.abc import Callable, Iterator

from .output import STREAMS, Decoder, OutputChunk, Stream
from .waiting import Bell

logger = logging.getLogger(__package__)

# In bytes: so far behind, the callback is waited for.
BEHIND = 1024 * 1024
# As much is kept for it where it can't be waited for; the oldest is let go of.
MOST = 16 * 1024 * 1024
# How long, in seconds, a method waits for callbacks to be through at the end.
WAIT_LIMIT = 1.0


class Delivery:
    def __init__(self, id: str, call: Callable[[OutputChunk], object]) -> None:
        self._id = id
        self._call = call
        self._chunks: collections.deque[tuple[Stream, bytes]] = collections.deque()
        self._changed = Bell()
        self._put = self._taken = self._dropped = 0
        self._has_ended = False
        self._is_over = False
        self._over = Bell()
        self._thread: int | None = None
        self._is_started = False
        # The caller's: what the callback starts inherits it.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._resume: Callable[[], object] | None = None

    # -- from the loop's thread

    def put(self, stream: Stream, data: bytes) -> None:
        self._chunks.append((stream, data))
        self._put += len(data)
        while self._backlog > MOST:
            try:
                self._dropped += len(self._chunks.popleft()[1])
            except IndexError:
                break
        self._changed.ring()

    def wait_for_room(self, resume: Callable[[], object]) -> bool:
        """Whether to read no further; `resume` is then called when there is room."""
        if self._backlog <= BEHIND:
            return False
        self._resume = resume
        # Looked at again: room that was made meanwhile has resumed nothing.
        if self._backlog <= BEHIND // 2:
            self._resume = None
        return self._resume is not None

    def start(self) -> None:
        """Raises `RuntimeError` where there are no threads left."""
        _thread.start_new_thread(self._run, ())
        self._is_started = True

    def end(self) -> None:
        """Nothing more will be put."""
        self._has_ended = True
        self._is_over = not self._is_started
        self._changed.ring()

    # -- from any thread

    @property
    def _backlog(self) -> int:
        return self._put - self._taken - self._dropped

    def wait(self, until: float) -> None:
        """Wait until all of it is handed over, but not for oneself, and not for ever."""
        if self._thread != _thread.get_ident():
            self._over.wait_for(lambda: self._is_over, max(0.0, until - time.monotonic()))

    # -- its own thread

    def _run(self) -> None:
        self._thread = _thread.get_ident()
        decoders = {stream: Decoder(stream) for stream in STREAMS}
        while True:
            has_ended = self._has_ended  # looked at first: then all of it is there
            while self._chunks:
                try:
                    stream, data = self._chunks.popleft()
                except IndexError:
                    break  # let go of, just now
                self._hand_over(decoders[stream].feed(data))
                self._taken += len(data)
                resume = self._resume
                if resume is not None and self._backlog <= BEHIND // 2:
                    self._resume = None
                    resume()
            if has_ended:
                break
            self._changed.wait_for(lambda: bool(self._chunks) or self._has_ended)
        for decoder in decoders.values():
            self._hand_over(decoder.feed(b"", final=True))
        self._is_over = True
        self._over.ring()

    def _hand_over(self, chunks: Iterator[OutputChunk]) -> None:
        for chunk in chunks:
            # Blocked otherwise, as in the loop's thread, from which this one inherits
            # it: a signal meant for the host must not come where no handler can run.
            blocked = signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            try:
                self._call(chunk)
            except BaseException:
                # Whatever it is, it is the callback's own affair: even `SystemExit`
                # would only end this thread, and the output after it would be lost.
                logger.exception("on_output of %s raised", self._id)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
