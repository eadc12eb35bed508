"""The end of a snippet: what an interpreter does at its own end, without the 4 ms it takes.

It runs exit handlers and the finalizers of globals, and writes everything that is buffered.
If more than a flush is left to do, it leaves that to the interpreter's own end.
"""

from __future__ import annotations

import _functools  # type: ignore[import-not-found]
import _signal  # type: ignore[import-not-found]
import _thread
import atexit
import gc
import io
import os
import sys

from . import kernel, library
from .asking import LEAVING, SETTLING, Ask, StopRequested
from .streams import Whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

INTERRUPTED = -_signal.SIGINT  # the exit code after a KeyboardInterrupt

# Classes go by their ids here: one of the user's may have a metaclass that makes it unhashable,
# or that raises where it is compared.
# An interpreter's end only flushes these. Not their subclasses, which may have a `close` of
# their own.
_BUFFERS = set(map(id, (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)))
# With these it does nothing.
_HARMLESS = set(
    map(id, (io.FileIO, io.BufferedReader, io.BufferedRWPair, io.BytesIO, io.StringIO, Whole))
)
_FILE = io.IOBase.__base__  # what all files are: it has the finalizer that closes them

# Not followed: through these, every object is reachable from every other.
_OPAQUE = (type, type(sys), type(lambda: 0))

# Frees what `take` returns, and then collects garbage, unless told otherwise. A warning that
# this causes, such as of a coroutine that was never awaited, names its file and line: they are
# those that such a warning names at an interpreter's own end.
_NOWHERE = ("<sys>", 0) if sys.version_info >= (3, 13) else ("sys", 1)
_free = eval(
    compile("lambda take=bool, then=collect: (take(), None)[1] or then()", _NOWHERE[0], "eval"),
    {"collect": gc.collect},
)
_free.__code__ = _free.__code__.replace(co_firstlineno=_NOWHERE[1])

# No functions of Python's, nor built-in ones, so that what observes the code sees no call.
_set_trace = _functools.partial(sys.settrace)
_set_profile = _functools.partial(sys.setprofile)
_run_exit_handlers = _functools.partial(atexit._run_exitfuncs)
_monitoring: Any = getattr(sys, "monitoring", None)
_get_tool = _functools.partial(getattr(_monitoring, "get_tool", bool))
_set_events = _functools.partial(getattr(_monitoring, "set_events", bool))


class Observers:
    """What observed the code when it ended, and its signal handlers, to put back for exit handlers.

    `payload.BOOT` takes the trace and profile functions and the monitoring tools off.
    """

    def __init__(self) -> None:
        self.trace: Any = None
        self.profile: Any = None
        self.tools: dict[int, int] = {}  # of `sys.monitoring`, and the events of each
        self._handlers: dict[int, Any] = {}  # of the signals that are put off
        self._late: dict[int, object] = {}  # the signals that have come meanwhile

    def put_off_signals(self) -> None:
        """Have no signal handler of the user's run until `take_signals`.

        Were the signals blocked, what the user's code starts meanwhile would inherit that; and
        one that comes to another thread has its handler run in this one all the same.
        """
        for number in _signal.valid_signals() - {_signal.SIGTERM, _signal.SIGURG}:
            handler = _signal.getsignal(number)
            if callable(handler) and number not in self._handlers:
                self._handlers[number] = handler
                _signal.signal(number, self._late.setdefault)

    def take_signals(self) -> None:
        while self._handlers:
            _signal.signal(*self._handlers.popitem())
        while self._late:
            _signal.raise_signal(self._late.popitem()[0])


def leave(
    ask: Ask,
    take_globals: Callable[[], object],
    preloaded: list[Any],
    is_snippet: bool,
    exit_code: int,
    observers: Observers,
) -> NoReturn:
    """End the process.

    `preloaded` is what `find_open` has found before the snippet was forked; `is_snippet` is
    false in a child that the snippet itself has forked.
    """
    _shut_down(ask, observers, is_snippet)
    ask.phase = SETTLING
    # Not while threads run, which would lose their globals: the interpreter's end waits for them.
    is_quick = not _thread._count()
    try:
        if is_quick:
            # At an interpreter's end its warnings can't import this, to advise using it.
            sys.modules.setdefault("tracemalloc", None)  # type: ignore[arg-type]
            # As the interpreter does: their frames hold the globals.
            names = ("last_exc", "last_type", "last_value", "last_traceback")
            drop([vars(sys).pop(name, None) for name in names])
            let_go(take_globals)
        else:
            take_globals()
        flush([getattr(sys, name, None) for name in ("stdout", "stderr")])
        is_done = not finish(preloaded, may_close=is_quick)
        if not is_done and is_quick and "t" in sys.abiflags:
            # A free-threaded interpreter's end loses what is buffered for many of these, since
            # its collector takes them as they lie in memory.
            _close(_without_finalizer(find_open()))
    except MemoryError:
        is_done = False
    if not is_done:
        gc.unfreeze()  # else what is reachable only from an older module would be missed
    if not is_done or not is_quick:
        library.loaded.clear()  # what a module keeps open is closed first if nothing refers to it
        # They are the launcher's: other snippets still need its temporary files, for example.
        kernel.keep_for_ever([each for each in preloaded if not _is_file(each)])
        if exit_code == INTERRUPTED:
            sys.excepthook = lambda *error: None  # it has been reported
            raise KeyboardInterrupt
        raise SystemExit(exit_code)
    kernel.flush_c()
    if exit_code == INTERRUPTED:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
        os.kill(os.getpid(), _signal.SIGINT)
        exit_code = 128 + _signal.SIGINT  # where it is blocked
    os._exit(exit_code)


def _shut_down(ask: Ask, observers: Observers, is_snippet: bool) -> None:
    """Wait for threads and run exit handlers, observed as the code has left it."""
    try:
        ask.phase = LEAVING
        observers.take_signals()
        if ask.has_come and is_snippet and "multiprocessing.process" in sys.modules:
            # Else it would wait for these; the sweep would terminate them, too.
            for child in sys.modules["multiprocessing.process"].active_children():
                child.terminate()
        profile = observers.profile if callable(observers.profile) else None
        for tool, events in observers.tools.items():
            _set_events(tool, events)
        _set_trace(observers.trace)
        _set_profile(profile)
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        _run_exit_handlers()
        ask.phase = SETTLING
    except StopRequested:
        _run_exit_handlers()
    except BaseException as error:
        ask.phase = SETTLING
        # Less this frame. Not to the user's hook, which may raise: an interpreter reports what
        # ends the wait for threads, without that hook, and goes on.
        BaseException.with_traceback(error, error.__traceback__ and error.__traceback__.tb_next)
        sys.__excepthook__(type(error), error, error.__traceback__)
        _run_exit_handlers()  # those that are left, if the wait for threads has raised
    _set_profile(None)
    _set_trace(None)
    for tool in observers.tools:
        if _get_tool(tool):
            _set_events(tool, 0)


def drop(held: list[Any]) -> None:
    """Free what `held` holds."""
    _free(held.clear, bool)


def let_go(take_globals: Callable[[], object]) -> None:
    """Run the finalizers of globals."""
    kept = _apart_from_globals(finish([], may_close=True))
    sys.modules.pop("__main__", None)
    _free(take_globals)  # only their own functions still refer to them
    drop(kept)


def _apart_from_globals(objects: list[Any]) -> list[Any]:
    """The files among these and their parts, less those whose classes hold globals.

    A collector closes files, and what they write to, in an order of its own. While these are
    kept from it, whatever else is freed can still write to them.
    """
    found: list[Any] = []
    bound: set[int] = set()
    for each in _from_inside_out(list(filter(_is_file, objects))):
        if _is_of_library(type(each)) and bound.isdisjoint(map(id, gc.get_referents(each))):
            found.append(each)
        else:
            bound.add(id(each))
    return found


def _without_finalizer(objects: list[Any]) -> list[Any]:
    """The files among these, less those of objects whose finalizers may still use them."""
    others = [each for each in objects if not _is_file(each)]
    used = set(map(id, _from_inside_out(others)))
    return [each for each in objects if _is_file(each) and id(each) not in used]


def _is_of_library(kind: type) -> bool:
    try:
        module = type.__getattribute__(kind, "__module__")
    except AttributeError:
        return False
    return type(module) is str and module.partition(".")[0] in sys.stdlib_module_names


def finish(preloaded: list[Any], *, may_close: bool) -> list[Any]:
    """Write what is still open; returns all of it if there are finalizers left to run."""
    left = find_open() + [each for each in preloaded if _is_file(each) and not _is_done(each)]
    flush_buffers(left)
    if not all(id(type(each)) in _BUFFERS for each in left):
        if not (may_close and all(map(_is_file, left))):
            return left  # finalizers may still write to these
        _close(left)
    return []


def _close(files: list[Any]) -> None:
    """Close what is no mere buffer, and flush those.

    Each before what it writes to: a collector has an order of its own.
    """
    special = {id(each) for each in files if id(type(each)) not in _BUFFERS}
    for each in reversed(_from_inside_out(files)):
        if id(each) in special:
            try:
                each.close()
            except Exception:
                pass  # an interpreter's own end would pass over it, too
    flush_buffers(files)


def _from_inside_out(objects: list[Any]) -> list[Any]:
    """The objects and all that they refer to, each after what it refers to."""
    found, seen, pending = [], set(), [(each, False) for each in reversed(objects)]
    while pending:
        each, is_through = pending.pop()
        if is_through:
            found.append(each)
        elif id(each) not in seen:
            seen.add(id(each))
            pending.append((each, True))
            inner = gc.get_referents(each)
            pending += [(part, False) for part in inner if not issubclass(type(part), _OPAQUE)]
    return found


def flush_buffers(files: list[Any]) -> None:
    flush([each for each in files if id(type(each)) in _BUFFERS])


def find_open() -> list[Any]:
    """The files that are not closed, and everything else with a finalizer still to run."""
    objects = gc.get_objects()
    every = list(map(type, objects))
    found = dict(zip(map(id, every), every))
    kinds = {number for number in found if _has_finalizer(found[number])} - _HARMLESS
    if not kinds:
        return []
    return [each for each in objects if id(type(each)) in kinds and not _is_done(each)]


def _is_file(each: Any) -> bool:
    # `isinstance` would also ask, and so run, what only poses as a file; `issubclass`, for a hash.
    return any(kind is _FILE for kind in type.__getattribute__(type(each), "__mro__"))


def _has_finalizer(kind: type) -> bool:
    try:
        type.__getattribute__(kind, "__del__")  # of a metaclass, nothing is run
    except AttributeError:
        return False
    return True


def _is_done(each: Any) -> bool:
    if _is_file(each):
        try:
            return bool(each.closed)
        except Exception:
            return True  # an interpreter's own end would pass over it, too
    if type(each).__name__ in ("generator", "coroutine", "async_generator"):
        names = ("gi_frame", "cr_frame", "ag_frame")
        return all(getattr(each, name, None) is None for name in names)
    return False


def flush(files: list[Any]) -> None:
    for file in files:
        try:
            if not file.closed:
                file.flush()
        except Exception:
            pass
