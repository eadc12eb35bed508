"""The standard library, for our own code in a snippet.

Most of what that needs is imported when the launcher starts. `traceback` and a few others
take too long for that (6 ms and more), so the launcher imports them once its first snippet
runs. That one imports them itself, when the user's code may have put anything on `sys.path`
or into `sys.modules`: it gets the interpreter's own modules, and the user's stay.
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
    from importlib.machinery import ModuleSpec
    from typing import Any

_HOME = os.path.dirname(os.__file__)


def _own_path(path: list[str]) -> list[str]:
    """`path` from the standard library on, without what comes before it, such as PYTHONPATH."""
    if _HOME not in path:
        return [each for each in path if each]
    at = path.index(_HOME)
    # The entry before it is where the standard library would be in a zip file.
    return path[at - 1 if at and _is_zip(path[at - 1]) else at :]


def _is_zip(place: str) -> bool:
    name = os.path.basename(place)
    return name.startswith("python") and name.endswith(".zip")


def _is_own(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    if not isinstance(file, str):
        return name in sys.builtin_module_names or _imp.is_frozen(name)
    for home in _HOMES:
        if file.startswith(home + os.sep):
            return "-packages" not in file[len(home) + 1 :].partition(os.sep)[0]
    return False


# As the launcher starts: no code of the user's has run.
PATH = _own_path(sys.path)
# Frozen modules say that they are in the directory, also where the others are in the zip file.
_HOMES = {_HOME, *filter(_is_zip, PATH[:1])}
loaded: dict[str, Any] = {each: sys.modules[each] for each in list(sys.modules) if _is_own(each)}


def module(name: str) -> Any:
    """Import a module, if that has not been done before; for the main thread only."""
    if name not in loaded:
        # Else a signal handler of the user's could find a half-loaded module.
        with Masked(), OwnImports():
            __import__(name)
            loaded[name] = sys.modules[name]
    return loaded[name]


class OwnImports:
    """Within it, this thread's imports find the interpreter's own modules.

    Other threads go on to import the user's.
    """

    def __enter__(self) -> None:
        self._thread = _thread.get_ident()
        self._shadowed = {
            each for each in sys.stdlib_module_names if each in sys.modules and not _is_own(each)
        }
        self._theirs = {each: sys.modules.pop(each) for each in _modules_of(self._shadowed)}
        sys.modules.update({each: loaded[each] for each in self._theirs if each in loaded})
        self._finders = sys.meta_path
        # A new list, as another thread may be iterating over the old one.
        sys.meta_path = [self, *self._finders]

    def __exit__(self, *_: object) -> None:
        sys.meta_path = self._finders
        for each in _modules_of(self._shadowed):
            del sys.modules[each]
        sys.modules.update(self._theirs)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if _thread.get_ident() != self._thread:
            return None
        return PathFinder.find_spec(name, PATH if path is None else path, target)


def _modules_of(packages: set[str]) -> list[str]:
    return [each for each in list(sys.modules) if each.partition(".")[0] in packages]
