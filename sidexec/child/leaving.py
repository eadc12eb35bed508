"""The end of a snippet: what an interpreter does at its own, less the 4 ms it takes for it.

Responsible for exit handlers, the finalizers of globals, and that everything which is
buffered gets written. It never tears modules down, nor waits for daemon threads.
"""

from __future__ import annotations

import _thread
import atexit
import gc
import io
import os
import sys

from .asking import LEAVING, SETTLING, Ask, StopRequested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn


def leave(
    ask: Ask,
    take_globals: Callable[[], dict[str, Any]],
    flush_c: Callable[[], object],
    is_snippet: bool,
    exit_code: int,
) -> NoReturn:
    """End the process; `is_snippet` is false in a child that the snippet has forked."""
    try:
        ask.phase = LEAVING
        if ask.has_come and is_snippet:
            _end_workers()
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        ask.phase = SETTLING
    except StopRequested:
        atexit._run_exitfuncs()
    except BaseException as error:
        ask.phase = SETTLING
        sys.excepthook(type(error), error, error.__traceback__)
    ask.phase = SETTLING
    files = open_files()
    namespace = take_globals()
    if _thread._count() or not is_snippet:
        # Threads would see their globals vanish: the interpreter knows how to
        # silence them. A child that the snippet forked is not ours to hurry.
        flush(files)
        raise SystemExit(exit_code)
    # The files are held meanwhile, as a collector may close one in a cycle before
    # what it buffers is written.
    let_go(namespace)
    del namespace
    sys.modules.pop("__main__", None)
    gc.collect()
    flush(files)
    flush_c()
    os._exit(exit_code)


def _end_workers() -> None:
    """Ask what `multiprocessing` would wait for, be it for ever, as the sweep would."""
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None:
        for child in processes.active_children():
            child.terminate()


def open_files() -> list[Any]:
    """What may hold something that is not yet written, in the order to write it."""
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    # By type: `isinstance` would also ask, and so run, what only poses as a file.
    files = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    files.sort(key=lambda each: not isinstance(each, io.TextIOWrapper))
    return [*files, sys.stdout, sys.stderr]


def flush(files: list[Any]) -> None:
    for file in files:
        try:
            if not file.closed:
                file.flush()
        except Exception:
            pass  # an interpreter's own end would pass over it, too


def let_go(namespace: dict[str, Any]) -> None:
    """Let go of the globals that may have finalizers, in order; these find the rest."""
    kept = (type, type(sys), type(let_go))
    for name in list(namespace):
        kind = type(namespace[name])
        if kind.__module__ != "builtins" and not issubclass(kind, kept) and name[:2] != "__":
            namespace[name] = None
