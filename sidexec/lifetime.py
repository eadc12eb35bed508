"""What happens when a manager is garbage-collected, leaves its `with` block, or is copied."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from .engine.engine import Engine

_Self = TypeVar("_Self", bound="Lifetime")


class Lifetime:
    _engine: Engine
    _grace: float

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        running = len(self._engine.running())
        state = "closed" if self._engine.is_closing else f"{running} running"
        return f"<{type(self).__name__}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a manager can't be copied or pickled: it belongs to the process that has made it;"
            " make one where it is used"
        )

    def __del__(self) -> None:
        engine = self.__dict__.get("_engine")
        if engine is None or engine.is_closing or sys.is_finalizing() or engine.foreign:
            return  # the launcher stops the executions when the host has ended
        runs = bool(engine.running())
        text = f"unclosed {self!r}: call close(), or use it in a `with` block"
        engine.close(self._grace, wait=False)
        if runs:  # last, as warnings may be raised as errors
            warnings.warn(text, ResourceWarning, source=self)
