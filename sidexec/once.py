"""`run`: one snippet in a new manager."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from .manager import ExecutionManager
from .responses import GetSideExecutionStatusResponse
from .starting import DEFAULT, Default, Path, StartOptions

if TYPE_CHECKING:
    from .starting import Unpack


class RunOptions(StartOptions, total=False):
    check: bool
    python: Path | None
    default_timeout: float | None
    grace_period: float
    max_output: int
    max_history: int
    preload: Iterable[str]


def run(
    code: str,
    params: dict[str, Any] | None = None,
    timeout: float | None | Literal[Default.DEFAULT] = DEFAULT,
    **options: Unpack[RunOptions],
) -> GetSideExecutionStatusResponse:
    """Run Python source in a new manager, close the manager, and return the status.

    `timeout` is in seconds, 300 by default, None for no limit. `options` are those of
    `ExecutionManager` and of its method `run`.
    """
    given: dict[str, Any] = dict(options)
    of_manager = RunOptions.__annotations__.keys() - StartOptions.__annotations__.keys() - {"check"}
    own = {name: given.pop(name) for name in of_manager & given.keys()}
    with ExecutionManager(**own) as manager:
        return manager.run(code, params, timeout, **given)
