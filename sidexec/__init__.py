"""Run Python snippets in child processes, and stop them with all that they have started.

    from sidexec import ExecutionManager

    with ExecutionManager() as manager:
        started = manager.start_with_code("while True: print('working')")
        stopped = manager.stop(started.id)
        print(stopped.data.status, len(stopped.data.output))

`ExecutionManager` stops a snippet gracefully, then by force. Importing starts nothing.
"""

from .confinement import Confinement
from .engine.output import OutputChunk
from .limits import Limits
from .manager import ExecutionManager
from .once import run
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
from .starting import DEFAULT

__all__ = [
    "DEFAULT",
    "ActionBlock",
    "Confinement",
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

__version__ = "0.2.0"
