"""Asking a snippet to stop: SIGTERM raises one exception in its main thread.

This module decides where it is raised, so that the `finally` blocks of plain code, of
every asyncio task and of exit handlers run, and so that it is neither lost nor raised
twice. It never ends the process by itself while user code runs, and never sends anything.
"""

from __future__ import annotations

import _functools  # type: ignore[import-not-found]
import _signal  # type: ignore[import-not-found]  # `signal` costs 5 ms, for its enums
import _thread
import os
import sys
import time

from . import library, loops, tasks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, NoReturn

ASKED_EXIT_CODE = 128 + _signal.SIGTERM

# What SIGTERM does in each phase of a snippet.
WAITING = 0  # for its request: the process exits at once
RUNNING = 1  # user code: it raises
LEAVING = 2  # exit handlers, joining threads: it raises in those that take long
SETTLING = 3  # our own code at the end: nothing, until it is LEAVING
MAY_RAISE = (RUNNING, LEAVING)

# How long an exit handler or a callback that begins after the ask may take, in seconds, before
# the ask interrupts it, too.
PATIENCE = 0.1


class StopRequested(SystemExit):
    """Raised once in the main thread of a snippet that is asked to stop.

    A `SystemExit`, since asyncio swallows every other exception raised in a
    callback, and since code that cleans up at its end handles it already.
    """


class Ask:
    def __init__(self) -> None:
        self.phase = WAITING
        self.has_come = False
        self._is_scheduled = False
        self._has_raised = False
        # What is left to clean up once the code has ended: `payload.BOOT` calls it.
        self.clean_up: Callable[[], object] | None = None
        self._loop: Any = None  # that runs when it is raised
        self._main_task: Any = None  # for whose end it runs
        self._due_at: float | None = None  # when it is raised after all, where it was put off
        self._spared: set[Any] = set()  # tasks, while those that may cancel them clean up
        self._spared_until = 0.0
        self._undo_trace: Callable[[], None] | None = None
        self._hooks = (Ask._before_fork.__code__, Ask._after_fork_in_parent.__code__)
        self._fork_masks: dict[int, set[int]] = {}

    def listen(self) -> None:
        _signal.signal(_signal.SIGTERM, self._on_ask)
        _signal.signal(_signal.SIGURG, self._on_nudge)
        # Blocked since before the fork: a SIGTERM in between would have killed the
        # snippet without its cleanup.
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork_in_parent,
            after_in_child=self._after_fork_in_child,
        )

    def _on_ask(self, signum: int, frame: FrameType | None) -> None:
        if self.has_come:
            return  # a second one would abort the cleanup
        self.has_come = True
        try:
            self._begin(frame)
        except RecursionError:  # so deep is the code just now: the next nudge tries again
            self._is_scheduled = True

    def _begin(self, frame: FrameType | None) -> None:
        if self.phase == WAITING:
            os._exit(ASKED_EXIT_CODE)
        report = sys.unraisablehook

        def raise_again(unraisable: Any) -> None:
            # It was raised in a finalizer or an exit handler, and has ended that.
            if unraisable.exc_type is not StopRequested:
                report(unraisable)
            elif self.phase in MAY_RAISE:
                self._interrupt(sys._getframe(1), at_once=False)

        sys.unraisablehook = raise_again
        if self.phase != RUNNING:
            self._put_off()  # it would end a handler that has just begun to clean up
        else:
            self._interrupt(frame)

    def _interrupt(
        self, frame: FrameType | None, *, at_once: bool = True, is_late: bool = False
    ) -> None:
        """Raise the exception at a place where the code around it can handle it."""
        events = sys.modules.get("asyncio.events")
        if events is not None:
            maker = loops.maker_of_a_loop(frame)
            if maker is not None:
                self._raise_at_next_opcode(maker)  # a half-made loop could not be closed
                return
            running = events._get_running_loop()
            loop = running or loops.loop_about_to_run(frame)
            if loop is not None:
                self._main_task = loops.main_task_of(frame)
                self._prepare_loop(loop)
            caller = frame
            while caller is not None and caller.f_globals.get("__name__") == "selectors":
                caller = caller.f_back  # the loop's, or the code's own
            outside = loops.first_outside_asyncio(caller)
            if loop is not None and (running is None or outside is not caller):
                # Raised there, the exception could take the wakeup of a task with it,
                # and that task's cleanup would never run. So: by the loop itself, or
                # where the code that has called asyncio goes on, whichever comes first.
                loop.call_soon_threadsafe(self._raise_if_scheduled)
                if running is not None and outside is not None:
                    self._raise_at_next_opcode(outside)
                # Last: a nudge that came in between would raise it here, in asyncio's code.
                self._is_scheduled = True
                return
        if frame is not None and frame.f_code in self._hooks and frame.f_back is not None:
            self._raise_at_next_opcode(frame.f_back)  # what a hook raises is ignored
        else:
            later = None if is_late else _at_a_jump(frame) if at_once else frame
            if later is None:
                self._raise()  # at once, or a blocking call would just be resumed
            # What observes the code may keep opcodes from being events, or the user's handler
            # of a signal, which has interrupted the loop there, may block.
            self._put_off()
            self._raise_at_next_opcode(later)

    def _on_nudge(self, signum: int, frame: FrameType | None) -> None:
        """Handle the keeper's SIGURG, which interrupts a call that began just after the ask."""
        # An exit handler or a callback is still at work, or the loop has not come to it:
        # the handler, callback or task holds it up, and may do so for ever.
        due_at = self._due_at
        is_due = self._is_scheduled if due_at is None else time.monotonic() >= due_at
        if (is_due or self._is_held_up()) and self.phase in MAY_RAISE:
            self._due_at = None
            is_late = due_at is not None and self._undo_trace is not None
            try:
                self._disarm()
                self._interrupt(frame, is_late=is_late)
            except RecursionError:  # see `_on_ask`
                self._is_scheduled = True

    def _spare(self, waiting: set[Any]) -> None:
        self._spared = waiting
        self._spared_until = time.monotonic() + 2 * PATIENCE

    def _is_held_up(self) -> bool:
        """Whether a task that was spared keeps the loop from cancelling it, as it blocks."""
        if self._loop is None or not self._spared or time.monotonic() < self._spared_until:
            return False
        return sys.modules["asyncio"].current_task(self._loop) in self._spared

    def _put_off(self) -> None:
        self._due_at = time.monotonic() + PATIENCE

    def _raise_if_scheduled(self) -> None:
        if self._is_scheduled:
            self._raise()

    def _prepare_loop(self, loop: Any) -> None:
        """Let every task finish its cleanup, whichever of them was asked.

        The task in which the exception is raised ends with it, and passes it on to
        whoever waits for that task: out of the loop, during the cleanup of the others.
        """
        if isinstance(loop, sys.modules["asyncio"].BaseEventLoop):
            self._loop = loop
        call_handler = loop.call_exception_handler
        expected = (StopRequested, sys.modules["asyncio.exceptions"].CancelledError)

        def call_exception_handler(context: dict[str, Any]) -> None:
            if not isinstance(context.get("exception"), expected):
                call_handler(context)

        try:
            loop.call_exception_handler = call_exception_handler
        except AttributeError:
            pass  # a loop that is no Python object
        runners = sys.modules.get("asyncio.runners")
        if hasattr(runners, "_cancel_all_tasks"):
            runners._cancel_all_tasks = self._cancel_all  # type: ignore[union-attr]
        if self.clean_up is None:
            self.clean_up = _functools.partial(self._leave_loop, loop)

    def _cancel_all(self, loop: Any) -> None:
        tasks.cancel_all(loop, self._main_task, PATIENCE, self._spare)

    def _leave_loop(self, loop: Any) -> None:
        """End the tasks of a loop that the code has run itself, instead of by `asyncio.run`."""
        if not loop.is_closed() and not loop.is_running():
            self._cancel_all(loop)

    def take_loop(self) -> object:
        """Take out all that may refer to objects of the user's code, for the caller to free."""
        held = self.clean_up, self._loop, self._main_task, self._spared
        self.clean_up = self._loop = self._main_task = None
        self._spared = set()
        return held

    def _raise_at_next_opcode(self, asked: FrameType) -> None:
        """Raise at the next opcode, not at the jump that ends a loop's iteration.

        From CPython 3.11 on, an exception at such a jump can pass by the `finally` of
        the `try` that the loop stands in: the jump is not in that block's range.
        """
        self._disarm()
        tracer = sys.gettrace()
        # With a profile function, no opcode of a loop without calls is an event from CPython
        # 3.13 on. One that is no function of Python's can't be put back.
        profiler = sys.getprofile() if sys.version_info >= (3, 13) else None

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            if frame is not asked:
                return None
            if event != "opcode":
                return trace
            self._raise()

        def disarm() -> None:
            asked.f_trace_opcodes = False
            asked.f_trace = None
            sys.settrace(tracer)
            if callable(profiler):
                sys.setprofile(profiler)

        self._undo_trace = disarm
        # From CPython 3.13 on, last: where a tool of `sys.monitoring` such as cProfile is on, no
        # opcode would be an event otherwise. Before, first, or the first opcode would be none.
        asked.f_trace_opcodes = sys.version_info < (3, 13)
        asked.f_trace = trace
        if profiler is not None:
            sys.setprofile(None)
        sys.settrace(trace)
        asked.f_trace_opcodes = True

    def _disarm(self) -> None:
        """Cancel what would raise the exception later."""
        self._is_scheduled = False
        if self._undo_trace is not None:
            undo, self._undo_trace = self._undo_trace, None
            undo()

    def _raise(self) -> NoReturn:
        self._disarm()
        if self._loop is not None and not self._has_raised:
            for handle in (*self._loop._ready.copy(), *self._loop._scheduled.copy()):
                self._guard(handle)
        self._has_raised = True
        self._due_at = None
        raise StopRequested(ASKED_EXIT_CODE)

    def _guard(self, handle: Any) -> None:
        """Keep a callback that was due before the ask from delaying the cleanup for ever.

        The exception went to the code that was running: this one begins later, and knows
        nothing of it. So it gets one of its own, which ends it and leaves the loop alone.
        """
        callback = handle._callback
        task: Any = getattr(callback, "__self__", None)
        is_future = sys.modules["asyncio"].isfuture

        def call(*arguments: Any) -> None:
            is_cleanup = getattr(task, "_must_cancel", False) or any(
                is_future(each) and each.cancelled() for each in arguments
            )
            if not is_cleanup:
                self._put_off()
            try:
                callback(*arguments)
            except StopRequested:
                pass
            finally:
                self._due_at = None

        handle._callback = call

    # A child of the snippet is ended by SIGTERM, like any program's. SIGTERM is blocked during
    # the fork: one that came before its handler is removed would be lost.

    def _before_fork(self) -> None:
        mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGTERM,))
        self._fork_masks[_thread.get_ident()] = mask

    def _after_fork_in_parent(self) -> None:
        mask = self._fork_masks.pop(_thread.get_ident())
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)

    def _after_fork_in_child(self) -> None:
        if _signal.getsignal(_signal.SIGTERM) == self._on_ask:
            self._disarm()
            _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)
        self._after_fork_in_parent()


def _at_a_jump(frame: FrameType | None) -> FrameType | None:
    """The frame that ends a loop's iteration: this one, or one that it has interrupted there.

    What Python calls there (a signal's handler, a finalizer) would pass the exception on to
    the jump.
    """
    jumps = _backward_jumps()
    while frame is not None and jumps:
        if frame.f_code.co_code[frame.f_lasti] in jumps:
            return frame
        frame = frame.f_back
    return None


def _backward_jumps() -> set[int]:
    """The opcodes that end a loop's iteration, at which Python checks for signals."""
    if sys.version_info < (3, 11):
        return set()  # there, each such jump is in its block's range
    opcodes = library.module("opcode").opmap
    return {opcodes[name] for name in opcodes if "JUMP_BACKWARD" in name}
