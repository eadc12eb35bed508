"""What an execution may touch: checked here, set by the snippet's own process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from . import checks

# One message passes 253 descriptors at most, and standard input is one of them.
MOST_PATHS = 250


@dataclass(frozen=True)
class Confinement:
    """Confines an execution's processes, for code that nobody has read.

    write: directories and files that it may write, and what is below them.
    read: directories and files that it may read, besides those to write and what the
        interpreter needs; None for all files.
    network: whether it may use sockets other than pairs of its own.

    Keyword-only. Raises `TypeError` for wrong types, and `ValueError` for paths that do not
    exist or that lead into /proc. Each start opens the paths anew, and fails where one leads
    elsewhere by then.
    """

    write: tuple[str, ...] = ()
    read: tuple[str, ...] | None = None
    network: bool = False

    def __init__(
        self,
        *,
        write: Iterable[str | os.PathLike[str]] = (),
        read: Iterable[str | os.PathLike[str]] | None = None,
        network: bool = False,
    ) -> None:
        object.__setattr__(self, "write", _paths("write", write))
        object.__setattr__(self, "read", None if read is None else _paths("read", read))
        object.__setattr__(self, "network", checks.instance("network", network, bool))
        if len(self._all_paths()) > MOST_PATHS:
            raise ValueError(f"write and read can't hold more than {MOST_PATHS} paths")
        object.__setattr__(self, "_found", [os.stat(path) for path in self._all_paths()])

    def _all_paths(self) -> tuple[str, ...]:
        """Those to write, then those to read."""
        return self.write + (self.read or ())


def _paths(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be paths, such as ['/tmp/work'], not {value!r}")
    found = []
    for each in value:
        path = checks.absolute(checks.path(f"each of {name}", each))
        if not os.path.exists(path):
            raise ValueError(f"{name} can't hold {path!r}: there is no such file or directory")
        # A rule for either would hold for the entries of other processes as well.
        if os.path.samefile(path, "/") or _is_in_proc(path):
            raise ValueError(
                f"{name} can't hold {path!r}: name the directories in question, without /proc,"
                " of which a snippet finds what is its own anyway; for all files, read is None"
            )
        found.append(path)
    return tuple(found)


def _is_in_proc(path: str) -> bool:
    try:
        return os.stat(path).st_dev == os.stat("/proc/self").st_dev
    except OSError:
        return False
