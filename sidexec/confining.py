"""What a confined start needs: a system that can, descriptors of the paths, a seccomp filter.

Imported by the first such start. The filter is made here, once, and not by each snippet.
"""

from __future__ import annotations

import functools
import os
import struct
import sys
from typing import Any

from .confinement import Confinement
from .engine.descriptors import Descriptor

# Numbers on x86-64 and aarch64.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_SOCKETS = [(41, 198), (42, 203), (49, 200)]  # socket, connect, bind
_SOCKETPAIR = (53, 199)
_REFUSED = [
    *((425, 425), (426, 426), (427, 427)),  # io_uring_*, which no filter looks into
    *((272, 97), (308, 268)),  # unshare, setns: a namespace would have capabilities
    *((321, 280), (298, 241), (323, 282)),  # bpf, perf_event_open, userfaultfd
    *((248, 217), (249, 218), (250, 219)),  # add_key, request_key, keyctl
    # System V shared memory, semaphores and messages, and mq_open and mq_unlink: Landlock
    # leaves others' alone.
    *((29, 194), (30, 196), (31, 195), (64, 190), (65, 193), (66, 191), (220, 192)),
    *((68, 186), (69, 189), (70, 188), (71, 187), (240, 180), (241, 181)),
]
# prlimit64, sched_setparam, sched_setscheduler, sched_setaffinity, sched_setattr: for pid 0
_OF_A_PID = [(302, 261), (142, 118), (144, 119), (203, 122), (314, 274)]
_PRIORITIES = [((141, 140), 0), ((251, 30), 1)]  # setpriority, ioprio_set: of one process, 0
# chmod (-1: there is none on aarch64), fchmod, fchmodat, fchmodat2, open, creat, openat, mknod,
# mknodat, and which argument is the mode. A set-user-id or set-group-id bit in it is refused: no
# such program is left for others to run.
_MODES = [
    *(((90, -1), 1), ((91, 52), 1), ((268, 53), 2), ((452, 452), 2)),
    *(((2, -1), 2), ((85, -1), 1), ((257, 56), 3), ((133, -1), 1), ((259, 33), 2)),
]
_SET_ID = 0o6000
# ioctl, and the file systems that make files by it, wherever a directory can be read: btrfs,
# which FICLONE belongs to, bcachefs, OCFS2, and Lustre and BeeGFS, which share theirs with what
# sets flags of files, such as that nobody may ever write to one again (fs-verity).
_IOCTL, _MAKE_FILES = (16, 29), (0x9400, 0xBC00, 0x6F00, 0x6600)
# TIOCSCTTY, TIOCSTI, TIOCLINUX and TIOCSETD: standard input may be a terminal, and what is
# typed into that is read by others.
_TERMINALS = (0x540E, 0x5412, 0x541C, 0x5423)
_CLONE = (56, 220)
# clone3 and openat2, whose arguments are in memory; what takes them then does without.
_UNKNOWN = [(435, 435), (437, 437)]
_NEWER = 470  # calls that are newer than Linux 6.18: nobody has looked at what they do
_NAMESPACES = 0x7E020000  # of the flags of clone

# Of the filter's instructions, and its answers: EPERM, ENOSYS and EOPNOTSUPP.
_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _IF_SET, _ANSWER = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _NOT_THERE, _NOT_SUPPORTED = 0x7FFF0000, 0x50001, 0x50026, 0x5005F


def open_paths(confinement: Confinement) -> list[Descriptor]:
    """Those to write, then those to read; raises `OSError` where one is not what it was."""
    found: list[Descriptor] = []
    for path, expected in zip(confinement._all_paths(), vars(confinement)["_found"]):
        try:
            opened = Descriptor(functools.partial(os.open, path, os.O_PATH | os.O_CLOEXEC))
            found.append(opened)
        except OSError as problem:
            raise OSError(f"could not be confined: {problem}") from None
        if not os.path.samestat(os.fstat(found[-1].fd), expected):
            raise OSError(
                f"could not be confined: {path!r} is not what it was when the Confinement was"
                " made: make a new one"
            )
    return found


def to_request(confinement: Confinement) -> dict[str, Any]:
    return {
        "write": len(confinement.write),
        "read_all": confinement.read is None,
        "filter": _filter(confinement.network),
        "tmpdir": next(filter(os.path.isdir, confinement.write), None),
    }


@functools.cache
def missing() -> str | None:
    """What this system lacks to confine anything; asked once."""
    if not sys.platform.startswith("linux"):
        return "confinement needs Linux 6.2 or newer: start it without, or in a container"
    machine = os.uname().machine
    if machine not in _MACHINES or sys.maxsize < 2**32:
        return f"confinement needs x86-64 or aarch64, in 64 bits; this is {machine}"
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
    except (ImportError, OSError):
        return "confinement needs the module ctypes, which this interpreter does not have"
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 3:
        there = f"has ABI {version}" if version > 0 else "does not have it, or has it turned off"
        return (
            "confinement needs Landlock ABI 3, which is there since Linux 6.2; this kernel"
            f" {there} (see /sys/kernel/security/lsm)"
        )
    # A filter at address 0: EFAULT (14) where filters are there.
    if libc.prctl(22, 2, None, 0, 0) != -1 or ctypes.get_errno() != 14:
        return "confinement needs seccomp filters, which are there since Linux 3.5"
    return None


class _Program:
    """A seccomp filter, as instructions: operation, how many to skip if so and if not, value."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.code = b""

    def add(self, operation: int, value: int, yes: int = 0, no: int = 0) -> None:
        self.code += struct.pack("HBBI", operation, yes, no, value)

    def on(
        self, call: tuple[int, int], *checks: tuple[int, int, int, bool], last: int = _ALLOW
    ) -> None:
        """Refuse `call` where a check (argument, operation, value, wanted) fails."""
        number = call[self.column]
        if number < 0:
            return
        self.add(_IF_EQUAL, number, 0, 3 * len(checks) + 1)
        for argument, operation, value, wanted in checks:
            self.add(_LOAD, 16 + 8 * argument)  # its lower half, on these architectures
            self.add(operation, value, 1 if wanted else 0, 0 if wanted else 1)
            self.add(_ANSWER, _REFUSE)
        self.add(_ANSWER, last)


@functools.cache
def _filter(network: bool) -> bytes:
    """The seccomp filter, for one of the architectures whose numbers are known."""
    column, audit = _MACHINES[os.uname().machine]
    program = _Program(column)
    add, on = program.add, program.on
    add(_LOAD, 4)
    add(_IF_EQUAL, audit, 1)  # else a 32-bit call, whose numbers are others
    add(_ANSWER, _REFUSE)
    add(_LOAD, 0)
    if column == 0:
        add(_IF_AT_LEAST, 0x40000000, 0, 1)  # the calls of x32
        add(_ANSWER, _REFUSE)
    add(_IF_AT_LEAST, _NEWER, 0, 1)
    add(_ANSWER, _NOT_THERE)
    for call in _REFUSED:
        on(call, last=_REFUSE)
    for call in _UNKNOWN:
        on(call, last=_NOT_THERE)
    on(_CLONE, (0, _IF_SET, _NAMESPACES, False))
    for call in _OF_A_PID:
        on(call, (0, _IF_EQUAL, 0, True))
    for call, which in _PRIORITIES:
        on(call, (0, _IF_EQUAL, which, True), (1, _IF_EQUAL, 0, True))
    for call, argument in _MODES:
        on(call, (argument, _IF_SET, _SET_ID, False))
    if not network:
        for call in _SOCKETS:
            on(call, last=_REFUSE)
        # Of Unix, and no datagrams: those can be sent to any path. 0xA are the bits of
        # types other than 1 and 5, SOCK_STREAM and SOCK_SEQPACKET; 4 is none of a socket's.
        on(_SOCKETPAIR, (0, _IF_EQUAL, 1, True), (1, _IF_SET, 0xA, False))
    add(_IF_EQUAL, _IOCTL[column], 1)
    add(_ANSWER, _ALLOW)
    for mask, values in ((0xFFFFFFFF, _TERMINALS), (0xFF00, _MAKE_FILES)):
        add(_LOAD, 16 + 8)
        add(_AND, mask)
        for value in values:
            add(_IF_EQUAL, value, 0, 1)
            add(_ANSWER, _NOT_SUPPORTED)
    add(_ANSWER, _ALLOW)
    return program.code
