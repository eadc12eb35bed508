"""Run Python on the side, and be able to stop it.

    from sidexec import ExecutionManager

    with ExecutionManager() as manager:
        started = manager.start_with_code("while True: print('working')")
        stopped = manager.stop(started.id)
        print(stopped.data.status, len(stopped.data.output))

An `ExecutionManager` runs snippets in child processes and stops them: gracefully,
then by force, with everything that they have spawned. Importing starts nothing.
"""

from __future__ import annotations

from typing import Any

from .limits import Limits
from .manager import ExecutionManager
from .starting import DEFAULT
from .engine.output import OutputChunk
from .responses import (
    ActionBlock,
    ExecutionSummary,
    GetSideExecutionStatusResponse,
    ListActionBlocksData,
    ListActionBlocksResponse,
    ListExecutionsData,
    ListSideExecutionsResponse,
    SideExecutionError,
    StartData,
    StartSideExecutionResponse,
    StatusData,
    StopData,
    StopSideExecutionResponse,
)

__all__ = [
    "DEFAULT",
    "ActionBlock",
    "ExecutionManager",
    "ExecutionSummary",
    "GetSideExecutionStatusResponse",
    "Limits",
    "ListActionBlocksData",
    "ListActionBlocksResponse",
    "ListExecutionsData",
    "ListSideExecutionsResponse",
    "OutputChunk",
    "SideExecutionError",
    "StartData",
    "StartSideExecutionResponse",
    "StatusData",
    "StopData",
    "StopSideExecutionResponse",
    "run",
]

__version__ = "0.1.0"


def run(
    code: str,
    params: dict[str, Any] | None = None,
    timeout: float | None = 300.0,
    **options: Any,
) -> GetSideExecutionStatusResponse:
    """Run Python source in a manager of its own, which is closed afterwards; its status.

    `options` are those of `ExecutionManager` and of its method `run`.
    """
    manager_only = {"python", "grace_period", "max_output", "max_history", "preload"}
    own = {name: options.pop(name) for name in manager_only & options.keys()}
    with ExecutionManager(**own) as manager:
        return manager.run(code, params, timeout, **options)
