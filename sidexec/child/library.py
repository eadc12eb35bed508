"""The standard library, for our own code in a snippet.

Whatever the user's code has put on `sys.path` or into `sys.modules`, these are the
interpreter's own modules; and whatever the user's code has put there stays.
"""

from __future__ import annotations

import _imp
import _thread
import os
import sys
from _frozen_importlib_external import PathFinder

from .masking import Masked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_HOME = os.path.dirname(os.__file__) + os.sep


def own(path: list[str]) -> list[str]:
    """`path` from the standard library on: less what comes before, such as PYTHONPATH."""
    home = _HOME.rstrip(os.sep)
    if home not in path:
        return [each for each in path if each]
    at = path.index(home)
    # Just before it stands where it would be if it were in a zip file.
    name = os.path.basename(path[at - 1]) if at else ""
    return path[at - 1 if name.startswith("python") and name.endswith(".zip") else at :]


class Library:
    def __init__(self, path: list[str]) -> None:
        self._path = own(path)
        self._modules: dict[str, Any] = {}

    def module(self, name: str) -> Any:
        module = self._modules.get(name)
        if module is None:
            module = sys.modules.get(name)
            if module is None or not _is_own(name):
                # Else a signal handler of the user's could find a half-loaded module.
                with Masked():
                    module = self._load(name)
            elif getattr(module.__spec__, "_initializing", False):
                __import__(name)  # waits for the thread that is importing it
            self._modules[name] = module
        return module

    def _load(self, name: str) -> ModuleType:
        theirs = {each: sys.modules.pop(each) for each in _shadows(name)}
        finders = sys.meta_path
        # A new list, as another thread may be iterating over the old one.
        own_first = sys.meta_path = [_Finder(self._path), *finders]
        try:
            # What it imports has to be the interpreter's as well, and the same as before.
            known = dict(self._modules)
            sys.modules.update({each: known[each] for each in known if each in theirs})
            __import__(name)
            return sys.modules[name]
        finally:
            if sys.meta_path is not own_first:  # another thread loads as well
                finders = [each for each in sys.meta_path if each is not own_first[0]]
            sys.meta_path = finders
            for each in _modules_of(theirs):
                del sys.modules[each]
            sys.modules.update(theirs)


class _Finder:
    """Finds the interpreter's own modules, and for one thread only: others import theirs."""

    def __init__(self, path: list[str]) -> None:
        self._path = path
        self._thread = _thread.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if _thread.get_ident() != self._thread:
            return None
        return PathFinder.find_spec(name, self._path if path is None else path, target)


def _shadows(name: str) -> list[str]:
    """What stands in `sys.modules` in the place of the standard library's modules."""
    names = {name, *sys.stdlib_module_names}
    found = {each for each in names if each in sys.modules and not _is_own(each)}
    return _modules_of(found)


def _modules_of(packages: Container[str]) -> list[str]:
    return [each for each in list(sys.modules) if each.partition(".")[0] in packages]


def _is_own(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    if not isinstance(file, str):
        return name in sys.builtin_module_names or _imp.is_frozen(name)
    return file.startswith(_HOME) and "-packages" not in file[len(_HOME) :].partition(os.sep)[0]
