"""`run`: one snippet in a new manager."""

from __future__ import annotations

from typing import Any

from .manager import ExecutionManager
from .responses import GetSideExecutionStatusResponse


def run(
    code: str,
    params: dict[str, Any] | None = None,
    timeout: float | None = 300.0,
    **options: Any,
) -> GetSideExecutionStatusResponse:
    """Run Python source in a new manager, close the manager, and return the status.

    `options` are those of `ExecutionManager` and of its method `run`.
    """
    manager_only = {
        "python",
        "grace_period",
        "default_timeout",
        "max_output",
        "max_history",
        "preload",
    }
    own = {name: options.pop(name) for name in manager_only & options.keys()}
    with ExecutionManager(**own) as manager:
        return manager.run(code, params, timeout, **options)
