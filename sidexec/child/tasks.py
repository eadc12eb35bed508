"""Ending the tasks of an event loop in a stop: each is cancelled once, and cleans up.

It stands in for `asyncio.runners._cancel_all_tasks`, which cancels those again that the code
has cancelled itself.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def cancel_all(loop: Any, main: Any, patience: float, spare: Callable[[set[Any]], object]) -> None:
    """Cancel all tasks, and let them and the generators that they leave finish their cleanup.

    `spare` is told each time which of them are not to be cancelled before `patience` is over.
    """
    _finish_tasks(loop, main, patience, spare)
    _finish_generators(loop)  # now that no frame of ours refers to a task, and so to its own


def _finish_tasks(
    loop: Any, main: Any, patience: float, spare: Callable[[set[Any]], object]
) -> None:
    """Cancel all tasks, each of them once, and wait for them.

    A task group cancels its tasks when the task that it belongs to leaves it, and the main task
    may cancel the others in its cleanup: if they were cancelled before that, they would be twice,
    and the second time would cut their cleanup short. So they are cancelled here only if that
    task has not done it for a while, as it waits for them or cleans up first, or if the main task
    has ended.
    """
    tasks = sys.modules["asyncio"].all_tasks(loop)
    if main not in tasks or not hasattr(main, "cancelling"):
        main = None  # before Python 3.11 no task tells whether it has been cancelled
    left, waiting = set(tasks), set(tasks)
    parents = {task: _parent_of(task, main) for task in tasks}
    timer: Any = None

    def cancel_outermost() -> None:
        nonlocal timer
        for task in [each for each in waiting if parents[each] not in waiting]:
            waiting.remove(task)
            if parents[task] is None or not task.cancelling():
                task.cancel()
        spare(waiting)
        if timer is not None:
            timer.cancel()
        timer = loop.call_later(patience, cancel_outermost) if waiting else None

    def on_done(task: Any) -> None:
        left.discard(task)
        if task is main:
            cancel_outermost()
        if not left:
            loop.stop()

    cancel_outermost()
    for task in tasks:
        task.add_done_callback(on_done)
    while left:
        try:
            loop.run_forever()
        except SystemExit:
            pass  # passed on by a task
    for task in tasks:
        if not task.cancelled() and task.exception() is not None:
            message = "unhandled exception during the stop"
            context = {"message": message, "exception": task.exception(), "task": task}
            loop.call_exception_handler(context)


def _finish_generators(loop: Any) -> None:
    """Wait for the tasks in which asyncio closes asynchronous generators that were let go of."""
    asyncio = sys.modules["asyncio"]
    while True:
        try:
            loop.run_until_complete(asyncio.sleep(0))  # asyncio makes them in a callback
            left = [each for each in asyncio.all_tasks(loop) if _closes_generator(each)]
            if not left:
                return
            loop.run_until_complete(asyncio.wait(left))
        except SystemExit:
            pass  # passed on by a task


def _closes_generator(task: Any) -> bool:
    return type(task.get_coro()).__name__ == "async_generator_athrow"


def _parent_of(task: Any, main: Any) -> Any:
    """The task in whose group this one is, else the main task; None for the main task itself."""
    kind = getattr(sys.modules["asyncio"], "TaskGroup", ())
    for callback, *_ in getattr(task, "_callbacks", None) or ():
        group = getattr(callback, "__self__", None)
        if isinstance(group, kind):
            return getattr(group, "_parent_task", None)
    return None if task is main else main
