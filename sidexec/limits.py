"""Resource limits: checked here, set in the snippet's process."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import checks


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one execution's processes may each use, by the system's own limits.

    memory: bytes of address space; more is a `MemoryError`. Not on a free-threaded Python.
    cpu: seconds of processor time, rounded up to whole ones; at the limit, SIGXCPU.
    processes: how many the user may have when one more is forked (root is exempt).
    open_files: the number of descriptors.

    Keyword-only. Invalid limits raise `TypeError` or `ValueError`.
    """

    memory: int | None = None
    cpu: float | None = None
    processes: int | None = None
    open_files: int | None = None

    def __post_init__(self) -> None:
        for name in ("memory", "processes", "open_files"):
            value = getattr(self, name)
            if value is not None:
                checks.count(name, value, 1)
        seconds = checks.seconds_or_none("cpu", self.cpu)
        if seconds is not None:
            checks.count("cpu", math.ceil(seconds), 0)
        object.__setattr__(self, "cpu", seconds)

    def _to_request(self) -> dict[str, int]:
        wanted = {
            "RLIMIT_AS": self.memory,
            "RLIMIT_CPU": None if self.cpu is None else max(1, math.ceil(self.cpu)),
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": self.open_files,
        }
        # As plain `int`: `marshal` takes no subclass.
        return {name: int(value) for name, value in wanted.items() if value is not None}
