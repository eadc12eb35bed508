"""What observes the user's code: trace and profile functions, and monitoring tools.

They are off while our own code runs at a snippet's end. What is called here is no function of
Python's, nor a built-in one, so that none of them sees the call.
"""

from __future__ import annotations

import _functools  # type: ignore[import-not-found]
import atexit
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

set_trace = _functools.partial(sys.settrace)
set_profile = _functools.partial(sys.setprofile)
run_exit_handlers = _functools.partial(atexit._run_exitfuncs)
_monitoring: Any = getattr(sys, "monitoring", None)
get_tool = _functools.partial(getattr(_monitoring, "get_tool", bool))
set_events = _functools.partial(getattr(_monitoring, "set_events", bool))


class Observers:
    """What the code has left, as `payload.BOOT` has found it."""

    def __init__(self) -> None:
        self.trace: Any = None
        self.profile: Any = None
        self.tools: dict[int, int] = {}  # and the events of each
        self.mask: set[int] | None = None  # the blocked signals
