"""What the package takes of Python that no document promises: it is there, and what it is for.

Where one of these fails on a new version, the last column says what breaks without it.
"""

import ast
import asyncio
import atexit
import collections
import importlib
import multiprocessing.util
import pathlib
import sys
import threading
import weakref

import pytest

import sidexec

# The C module, what is taken of it, and what breaks if that goes.
MODULES = {
    "_ctypes": (
        ["dlopen", "dlsym", "call_function", "Py_INCREF"],
        "orphans are not adopted (prctl), a traced child's exit is not heard (ptrace), what C"
        " code has printed is lost (fflush), a preloaded module's temporary files are removed",
    ),
    "_signal": (
        ["pthread_sigmask", "set_wakeup_fd", "pidfd_send_signal", "valid_signals", "getsignal"],
        "the other side does not start; `signal` instead costs 5 ms a launcher",
    ),
    "_socket": (
        ["socket", "socketpair", "CMSG_SPACE", "SCM_RIGHTS"],
        "nothing starts; `socket` instead costs 5 ms, at import too",
    ),
    "_thread": (
        ["start_new_thread", "allocate_lock", "get_ident", "_count", "TIMEOUT_MAX"],
        "nothing starts; without `_count`, threads that are left see their globals vanish",
    ),
    "_collections": (["defaultdict", "deque"], "no snippet runs; `collections` takes its time"),
    "_json": (
        ["make_encoder", "encode_basestring_ascii"],
        "no result is sent; `json` instead costs a first result 3 ms and more",
    ),
    "_functools": (["partial"], "no snippet runs; `functools` takes its time"),
    "_imp": (["is_frozen"], "a user's module is taken for one of the standard library"),
    "_frozen_importlib_external": (
        ["PathFinder", "SourceFileLoader", "MAGIC_NUMBER"],
        "the launcher does not start: it could not say which bytecode it takes",
    ),
}
LOOP = asyncio.new_event_loop()
LOOP.close()
# What is taken of documented modules: where it is, and what breaks if it goes.
NAMES = {
    "_run_exitfuncs": (atexit, "no exit handler runs"),
    "_clear": (atexit, "a preloaded module's exit handlers run in every snippet"),
    "_shutdown": (threading, "threads are not waited for at the end"),
    "_getframe": (sys, "a stop in a loop's round may pass by its `finally`"),
    "_exit_function": (multiprocessing.util, "workers of `multiprocessing` are not joined"),
    "_registry": (weakref.finalize, "a preloaded module's finalizers run in every snippet"),
    "_registered_with_atexit": (weakref.finalize, "finalizers of a snippet do not run"),
    "_get_running_loop": (asyncio.events, "a stop leaves tasks of asyncio without cleanup"),
    "_cancel_all_tasks": (asyncio.runners, "the cleanup of tasks is not waited for in a stop"),
    "_ready": (LOOP, "a callback that was due holds up a stop"),
    "_scheduled": (LOOP, "the same, of one that waits"),
    "_callback": (asyncio.Handle, "the same"),
    "_is_owned": (threading.RLock(), "a report by a signal handler waits for ever"),
    "_set_native_id": (threading.Thread, "a snippet's main thread has the launcher's native id"),
}
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields"}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_no_document_promises_is_there(name):
    names, what_breaks = MODULES[name]
    module = importlib.import_module(name)
    assert [each for each in names if not hasattr(module, each)] == [], what_breaks


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_document_promises_is_there(name):
    place, what_breaks = NAMES[name]
    assert hasattr(place, name), what_breaks


def test_call_function_calls_with_numbers_bytes_and_none():
    _ctypes = pytest.importorskip("_ctypes")
    library = _ctypes.dlopen(None, 0)
    assert _ctypes.call_function(_ctypes.dlsym(library, "abs"), (-7,)) == 7
    assert _ctypes.call_function(_ctypes.dlsym(library, "strlen"), (b"four",)) == 4
    assert _ctypes.call_function(_ctypes.dlsym(library, "fflush"), (None,)) == 0


def test_nothing_else_that_no_document_promises_is_used_and_each_in_one_place():
    own, found = set(), collections.defaultdict(set)
    files = list(pathlib.Path(sidexec.__file__).parent.rglob("*.py"))
    trees = {str(file): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    for _, node in nodes:
        own.add(getattr(node, "name", None))
        if isinstance(getattr(node, "ctx", None), ast.Store):
            own.add(getattr(node, "attr", getattr(node, "id", None)))
    for file, node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Attribute) and node.attr not in own:
            names = [node.attr]
        else:
            names = []
        for name in names:
            if name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED:
                found[name].add(file)
    assert set(found) - set(MODULES) - set(NAMES) - {"_count"} == set()
    # These are what documented modules are made of, and as steady.
    several = {name for name in found if len(found[name]) > 1}
    assert several <= {"_functools", "_signal", "_socket", "_thread"}, found
