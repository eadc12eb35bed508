"""Run Python snippets in child processes, and stop them with all that they have started.

    from sidexec import ExecutionManager

    with ExecutionManager() as manager:
        started = manager.start_with_code("while True: print('working')")
        stopped = manager.stop(started.id)
        print(stopped.data.status, len(stopped.data.output))

`ExecutionManager` stops a snippet gracefully, then by force. Importing starts nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
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
del TYPE_CHECKING

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


def __getattr__(name: str) -> object:
    """Load the rest when the first of it is used: an import alone costs next to nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import confinement, limits, manager, once, responses, starting
    from .engine import output

    for module in (confinement, limits, manager, once, responses, starting, output):
        for each in __all__:
            if each in vars(module):
                globals()[each] = vars(module)[each]
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
