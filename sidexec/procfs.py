"""What /proc tells the host: what a tree uses, whose child a process is, when it began.

Reads only: nothing here signals a process, so a pid that has gone to somebody else
can at worst spoil one figure. Where there is no /proc, every answer is None.
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Usage(NamedTuple):
    memory: int  # resident, in bytes
    cpu: float  # seconds


def usage_of_tree(keeper_pid: int) -> Usage | None:
    """What all descendants of the keeper use together."""
    memory = 0
    ticks = 0
    pids = children(keeper_pid)
    if not pids:
        return None
    while pids:
        pid = pids.pop()
        fields = _stat(pid)
        if fields is None:
            continue  # it has ended meanwhile
        ticks += sum(map(int, fields[11:15]))  # its own, and that of reaped children
        memory += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        pids += children(pid)
    return Usage(memory, ticks * _tick())


def parent_of(pid: int) -> int | None:
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def began_at(pid: int) -> float | None:
    """When a process began, in seconds of CLOCK_BOOTTIME, rounded down to a tick."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19]) * _tick()


def _tick() -> float:
    return 1 / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[bytes] | None:
    """The fields behind the name, which may hold anything, brackets and blanks too."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return file.read(4096).rpartition(b")")[2].split()
    except OSError:
        return None


def children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                found += map(int, file.read(65536).split())
    except OSError:
        pass  # it has ended meanwhile, or there is no such file here
    return found
