"""Where asyncio is, by the frames of its code: how an ask finds the loop that it interrupts.

Looks only: it neither imports asyncio nor changes anything.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any


def first_outside_asyncio(frame: FrameType | None) -> FrameType | None:
    """The frame that has called into asyncio's code; None if that is the loop alone.

    What asyncio calls on its own behalf, to start a thread or to hand it something,
    counts as its code: an exception there could leave a lock taken.
    """
    innermost = None
    while frame is not None and frame.f_code.co_name != "_run_once":
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in ("asyncio", "selectors"):
            innermost = None
        elif package in ("concurrent", "threading", "queue"):
            innermost = innermost or frame  # the user's call, unless asyncio comes next
        else:
            return innermost or frame
        frame = frame.f_back
    return innermost


def loop_about_to_run(frame: FrameType | None) -> Any:
    """The event loop that `frame`, of asyncio's own code, is about to run, or has run."""
    found = None
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] != "asyncio":
            break
        for value in map(frame.f_locals.get, ("self", "loop")):
            loop: Any = getattr(value, "_loop", value)
            if hasattr(loop, "call_soon_threadsafe") and not loop.is_closed():
                found = loop
        frame = frame.f_back
    return found


def maker_of_a_loop(frame: FrameType | None) -> FrameType | None:
    """The frame that waits for a new event loop, where `frame` is making one."""
    found = None
    while frame is not None:
        if frame.f_code.co_name == "new_event_loop":
            found = frame.f_back
        frame = frame.f_back
    return found


def main_task_of(frame: FrameType | None) -> Any:
    """The task for whose end a loop runs; None if it runs for ever, or is no loop of asyncio's."""
    while frame is not None:
        if frame.f_code.co_name == "run_until_complete":
            if frame.f_globals.get("__name__") == "asyncio.base_events":
                return frame.f_locals.get("future")
        frame = frame.f_back
    return None
