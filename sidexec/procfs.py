"""Reading /proc, for both sides.

Imports next to nothing. A pid may belong to another process by now: `signal_below` opens
a pidfd before it signals one. Everything returns None or is empty if there is no /proc, or
only that of another PID namespace, in which the same pid is another process.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import time


def is_ours() -> bool:
    """Whether /proc is that of this process's PID namespace."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


def usage_of_tree(keeper_pid: int) -> tuple[int, float] | None:
    """Resident memory, in bytes, and processor time, in seconds, of all its descendants."""
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
    return memory, ticks * _tick()


def parent_of(pid: int) -> int | None:
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process; false where that can't be told."""
    fields = _stat(pid)
    return fields is not None and fields[0] in (b"T", b"t")


def is_running(pid: int) -> bool:
    """Whether a process's main thread uses a processor or is waiting for one."""
    fields = _stat(pid)
    return fields is not None and fields[0] == b"R"


def now() -> float:
    """The time by the clock of `began_at`; infinite where there is none."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return float("inf") if clock is None else time.clock_gettime(clock)


def began_at(pid: int) -> float | None:
    """When a process began, in seconds of CLOCK_BOOTTIME, rounded down to a tick."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19]) * _tick()


def children(pid: int) -> list[int]:
    found: list[int] = []
    if is_ours():
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                    found += map(int, file.read().split())
        except OSError:
            pass  # it has ended meanwhile, or there is no such file here
    return found


def open_pidfd(pid: int) -> int | None:
    """A descriptor that turns readable when the process ends, whoever reaps it."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def signal_below(pid: int, signum: int) -> None:
    """Signal all descendants of a process, as far as they can be found, and not itself.

    A pidfd is opened first, and then the process is looked at. If its parent is known to be
    a descendant, whose number has not been given to another since, then the pidfd is a
    descendant's, or of a process that has ended.
    """
    pending: list[tuple[int, int | None]] = [(pid, None)]
    while pending:
        parent, parent_fd = pending.pop()
        # A stopped parent can't fork a child that would be missed. But the children of one that
        # is killed get another parent: these are looked for first.
        if signum != _signal.SIGKILL:
            _send(parent_fd, signum)
        for child in children(parent):
            fd = open_pidfd(child)
            if fd is not None:
                if parent_of(child) == parent and _send(parent_fd, 0):
                    pending.append((child, fd))
                else:
                    os.close(fd)
        if signum == _signal.SIGKILL:
            _send(parent_fd, signum)
        if parent_fd is not None:
            os.close(parent_fd)


def _send(pidfd: int | None, signum: int) -> bool:
    """Signal a descendant, if it is one; returns false if it has been reaped."""
    try:
        if pidfd is not None:
            _signal.pidfd_send_signal(pidfd, signum)
        return True
    except OSError:
        return False


def group(leader: int) -> list[int] | None:
    """The members of a process group that are no zombies."""
    found = []
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()] if is_ours() else []
    except OSError:
        return None
    for pid in pids:
        fields = _stat(pid)
        if fields is not None and int(fields[2]) == leader and fields[0] not in (b"Z", b"X"):
            found.append(pid)
    return found if pids else None


def umask_in(status: bytes) -> int | None:
    """The umask of a process, in what its file `status` says."""
    found = status.partition(b"\nUmask:")[2].split(None, 1)
    return int(found[0], 8) if found else None


def _tick() -> float:
    return 1 / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[bytes] | None:
    """The fields after the name, which may contain anything, brackets and spaces too."""
    if not is_ours():
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return file.read(4096).rpartition(b")")[2].split()
    except OSError:
        return None
