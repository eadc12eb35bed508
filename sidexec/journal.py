"""Logging for the loop's thread.

A log handler holds a lock while it writes. A signal handler that interrupts it and
calls `stop` would wait for the loop, and the loop, if it logged, for that lock. So
records go through a queue to a thread that nobody waits for.
"""

from __future__ import annotations

import _thread
import logging
import queue

logger = logging.getLogger(__package__)


class Journal:
    def __init__(self) -> None:
        self._records: queue.SimpleQueue[tuple[int, str, tuple[object, ...]] | None]
        self._records = queue.SimpleQueue()
        self._is_started = False
        self.level = logging.WARNING  # as asked of the logger, in a thread of the user's

    def log(self, level: int, message: str, *args: object) -> None:
        """From the loop's thread only. Never blocks."""
        if level < self.level:
            return
        if not self._is_started:
            try:
                _thread.start_new_thread(self._run, ())
            except RuntimeError:
                return  # no threads left, or the interpreter is on its way out
            self._is_started = True
        self._records.put((level, message, args))

    def close(self) -> None:
        if self._is_started:
            self._records.put(None)

    def _run(self) -> None:
        while True:
            record = self._records.get()
            if record is None:
                return
            level, message, args = record
            try:
                logger.log(level, message, *args)
            except Exception:
                pass  # `logging` reports its handlers' faults itself
