"""Blocking signals for a moment, so that no handler of the user's runs.

Only the calling thread's signals are blocked. One that comes meanwhile is handled right
afterwards; if the snippet has more threads, the system may deliver it to one of those, and
Python then runs the handler all the same.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]

_ALL = _signal.valid_signals()


class Masked:
    def __enter__(self) -> None:
        self._before = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
        try:
            # A handler that is due runs within this call, and may raise.
            _signal.pthread_sigmask(_signal.SIG_BLOCK, _ALL)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, self._before)
