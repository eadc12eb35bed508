"""The standard library, for what a snippet does on its own account.

Whatever the user's code has put on `sys.path` or into `sys.modules`, these are the
interpreter's own modules; and whatever the user's code has put there stays.
"""

from __future__ import annotations

import _imp
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

_HOME = os.path.dirname(os.__file__) + os.sep


class Library:
    def __init__(self, path: list[str]) -> None:
        self._path = [each for each in path if each]
        self._modules: dict[str, Any] = {}

    def module(self, name: str) -> Any:
        module = self._modules.get(name)
        if module is None:
            module = sys.modules.get(name)
            if module is None or not _is_own(name):
                module = self._load(name)
            self._modules[name] = module
        return module

    def _load(self, name: str) -> ModuleType:
        theirs = {each: sys.modules.pop(each) for each in _shadows(name)}
        path = sys.path[:]
        sys.path[:] = self._path
        try:
            # What this one imports has to be our own as well, and the same.
            sys.modules.update({each: self._modules[each] for each in self._modules if each in theirs})
            __import__(name)
            return sys.modules[name]
        finally:
            sys.path[:] = path
            for each in [each for each in sys.modules if each.partition(".")[0] in theirs]:
                del sys.modules[each]
            sys.modules.update(theirs)


def _shadows(name: str) -> list[str]:
    """What stands in `sys.modules` in the place of the standard library's modules."""
    names = getattr(sys, "stdlib_module_names", None)
    if names is None:  # before Python 3.10
        names = {each.partition(".")[0] for each in os.listdir(_HOME)}
    found = {each for each in {name, *names} if each in sys.modules and not _is_own(each)}
    return [each for each in sys.modules if each.partition(".")[0] in found]


def _is_own(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    if not isinstance(file, str):
        return name in sys.builtin_module_names or _imp.is_frozen(name)
    return file.startswith(_HOME) and "-packages" not in file[len(_HOME) :].partition(os.sep)[0]
