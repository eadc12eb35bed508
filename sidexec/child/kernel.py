"""What keeper and launcher ask of the kernel beyond the `os` module.

Each function says whether it could; where the platform has no such thing, the
callers fall back on the process group. Nothing here keeps state or decides.
"""

from __future__ import annotations

import os

_PR_SET_CHILD_SUBREAPER = 36


try:
    import _ctypes  # what `ctypes` adds to it costs a cold start 1.6 ms
except ImportError:
    _ctypes = None  # type: ignore[assignment]


def _find(name: str) -> int | None:
    """The address of a function of the C library."""
    try:
        return _ctypes.dlsym(_ctypes.dlopen(None, 0), name)  # type: ignore[arg-type]
    except (AttributeError, OSError):
        return None


# Looked up once, before any fork.
_prctl = _find("prctl")
_fflush = _find("fflush")


def become_subreaper() -> bool:
    """Adopt the orphans among this process's descendants, instead of init."""
    if _prctl is None:
        return False
    result: int = _ctypes.call_function(_prctl, (_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    return result == 0


def children() -> set[int] | None:
    """The pids of this process's children, zombies too; None where /proc can't tell.

    The list may miss a child while another one ends: that nothing is left, only
    `waitpid` knows.
    """
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb", buffering=0) as file:
            data = b""
            while True:
                part = file.read(65536)
                if not part:
                    return set(map(int, data.split()))
                data += part
    except OSError:
        return None


def group(leader: int) -> list[int] | None:
    """The members of a process group that are no zombies; None where /proc can't tell."""
    found = []
    try:
        pids = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return None
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
                state, _, pgrp, *_ = file.read(4096).rpartition(b")")[2].split()
        except (OSError, ValueError):
            continue  # it has ended meanwhile
        if int(pgrp) == leader and state not in (b"Z", b"X"):
            found.append(int(pid))
    return found if pids else None


def open_pidfd(pid: int) -> int | None:
    """A descriptor that turns readable when the process ends, whoever reaps it."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def flush_c() -> None:
    """Write out what C code of this process has printed and still buffers."""
    if _fflush is not None:
        _ctypes.call_function(_fflush, (None,))


def close_all(fds: list[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


def signal_process(pid: int, signum: int) -> None:
    """Signal a child, or with a negative pid its group; one that is gone is fine."""
    try:
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        pass  # a process of another user stays, and is reported as stuck
