"""System calls, for all processes of this side, and what the `os` module does not have."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import resource
import sys

from .. import procfs

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PTRACE_DETACH = 17
_PID_LIMIT = 2**22  # Linux gives no pid higher than this
_PIDS_AT_FIRST = 2**15  # on small machines, none higher than this


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
_ADDRESSES = {name: _find(name) for name in ("prctl", "ptrace", "fflush", "syscall", "capset")}


def call(name: str, *arguments: int | bytes | None) -> int:
    """What a function of the C library returns; -1 for an error, and where it can't be called.

    `bytes` are passed as their address.
    """
    address = _ADDRESSES[name]
    result: int = -1 if address is None else _ctypes.call_function(address, arguments)
    return result


def prctl(*arguments: int | bytes) -> int:
    return call("prctl", *arguments, *[0] * (5 - len(arguments)))


def become_subreaper() -> bool:
    """Adopt the orphans among this process's descendants, instead of init."""
    return prctl(_PR_SET_CHILD_SUBREAPER, 1) == 0


def be_continued_when_parent_ends() -> None:
    """Have the kernel continue this process when its parent ends: it may be stopped then."""
    prctl(_PR_SET_PDEATHSIG, _signal.SIGCONT)


def set_name(name: bytes) -> None:
    """What `ps` and `top` call this process; Linux takes 15 bytes of it.

    Without a blank, which the interpreter takes for the next field of its `stat`.
    """
    prctl(_PR_SET_NAME, name)


def open_children() -> int:
    """A descriptor for `children`; -1 where /proc has no such list of this process's.

    Opened ahead: a snippet may lower how many descriptors its keeper may open.
    """
    pid = os.getpid()
    try:
        return os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY) if procfs.is_ours() else -1
    except OSError:
        return -1


def children(fd: int, known: set[int]) -> set[int]:
    """The pids of this process's children, zombies too; at least one that is not known.

    /proc may miss a child while another one ends: that nothing is left, only `waitpid`
    knows.
    """
    data = b""
    try:
        while part := os.pread(fd, 65536, len(data)):
            data += part
        return set(map(int, data.split()))
    except OSError:
        return _find_children(known)


def _find_children(known: set[int]) -> set[int]:
    """The same without /proc: `waitid` says of any number whether it is a child's."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        youngest = os.fork()
        if youngest == 0:
            os._exit(0)
        signal_process(youngest, _signal.SIGKILL)  # in case somebody has stopped it
        os.waitpid(youngest, 0)
    except ChildProcessError:
        return set()
    except OSError:
        youngest = 0  # nobody knows
    return _search(os.getpid(), youngest, known)


def _search(own: int, youngest: int, known: set[int]) -> set[int]:
    """Find the children of the process `own`: they are younger, and so have higher pids.

    Once pids have wrapped around, they may have any; to try each of them takes 10 seconds.
    """
    if own < youngest and (found := set(filter(_is_child, range(own + 1, youngest)))):
        return found
    found = set()
    for numbers in (
        range(own + 1, own + _PIDS_AT_FIRST),
        range(1, min(youngest, own)),
        range(1, _PID_LIMIT),
    ):
        found |= set(filter(_is_child, numbers))
        if not found <= known:
            break
    return found


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    except ChildProcessError:
        return False


def reap() -> tuple[int, int] | None:
    """Reap a child that has ended: its pid and exit code; None where none has.

    Raises `ChildProcessError` where there are no children.
    """
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return None
        if not os.WIFSTOPPED(status):
            return pid, os.waitstatus_to_exitcode(status)
        # It has asked to be traced by its parent, and so is held at each signal. Once detached,
        # it gets this one, unless that was only sent because it executes a program.
        signum = os.WSTOPSIG(status)
        call("ptrace", _PTRACE_DETACH, pid, None, 0 if signum == _signal.SIGTRAP else signum)


def used_by_children() -> tuple[float, int]:
    """The processor time of the children that have been reaped, and of theirs, in seconds.

    And the memory of the largest of these processes, in bytes.
    """
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return used.ru_utime + used.ru_stime, used.ru_maxrss * unit


def flush_c() -> None:
    """Write out what C code of this process has printed and still buffers."""
    call("fflush", None)


def set_limits(limits: dict[str, int]) -> list[tuple[int, tuple[int, int]]]:
    """Set limits of this process; returns those before, to restore when it reports its end."""
    if "RLIMIT_AS" in limits and "t" in sys.abiflags:
        raise ValueError(
            "memory can't be limited on a free-threaded Python, which reserves address space"
            " ahead: leave memory out of limits, or use a build with the GIL"
        )
    before = []
    for name, value in limits.items():
        kind = getattr(resource, name)
        soft, hard = resource.getrlimit(kind)
        # The soft limit only: reporting that it was hit takes memory and files.
        # For processor time the hard one follows, in case SIGXCPU is ignored.
        ceiling = value + 5 if name == "RLIMIT_CPU" else hard
        if hard != resource.RLIM_INFINITY:
            value, ceiling = min(value, hard), min(ceiling, hard)
        resource.setrlimit(kind, (value, ceiling))
        if name != "RLIMIT_CPU":
            before.append((kind, (soft, hard)))
    return before


def keep_for_ever(objects: list[object]) -> None:
    """Keep the finalizers of `objects` from being called, at the interpreter's end as well."""
    if _ctypes is not None:
        for each in objects:
            _ctypes.Py_INCREF(each)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


def identity(file: int | str) -> tuple[int, int] | None:
    """What identifies an open file, or the one at a path; None where there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def signal_process(pid: int, signum: int) -> None:
    """Signal a child, or with a negative pid its group; one that is gone is fine."""
    try:
        os.kill(pid, signum)
    except (ProcessLookupError, PermissionError):
        pass  # a process of another user stays, and is reported as stuck


def describe(error: BaseException) -> str:
    """What has gone wrong in this process, and where; needs no module and no file."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return f"{error!a} at {', '.join(places)}"[:4096]
