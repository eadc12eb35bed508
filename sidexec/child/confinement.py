"""Confines the snippet's process before its code runs; what it starts inherits all of it.

Landlock says which files may be written and read, and which processes signalled. The
seccomp filter refuses sockets and the calls that reach other processes. `no_new_privs` and
the loss of every capability keep set-user-id programs and root from undoing it. Whatever
fails raises `OSError`: code never runs less confined than asked for.
"""

from __future__ import annotations

import os
import sys

from . import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_VERSION = 1  # a flag of landlock_create_ruleset
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_IOCTL_DEVICE = 1 << 15  # ABI 5
_DEVICES = 1 << 6 | 1 << 11  # to make character and block devices, which nobody may
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_WRITE = 0x7FFF & ~_DEVICES
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_SCOPES = 3  # abstract Unix sockets and signals, ABI 6

_PR_SET_SECCOMP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 22, 28, 38
_NO_ROOT = 0b1111  # securebits NOROOT and NO_SETUID_FIXUP, both locked

# Read whatever `read` says. /proc has only the snippet's own entry: in one rule for all of
# it were the others' command lines. /dev has only what reads nobody's terminal or disk.
_DEVICE_FILES = [f"/dev/{name}" for name in ("zero", "full", "random", "urandom")]
_PROC = ("self", "cpuinfo", "meminfo", "stat", "loadavg", "uptime", "version", "filesystems", "sys")
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/sys/devices/system/cpu")
_ETC = (
    *("ld.so.cache", "localtime", "timezone", "ca-certificates", "mime.types"),
    # Not all of `ssl` and `pki`: private keys are there as well.
    *("ssl/certs", "ssl/cert.pem", "ssl/ca-bundle.pem", "ssl/openssl.cnf"),
    *("pki/ca-trust", "pki/tls/certs", "pki/tls/cert.pem", "pki/tls/openssl.cnf"),
    *("resolv.conf", "hosts", "nsswitch.conf", "host.conf", "gai.conf", "services", "protocols"),
    *("locale.conf", "locale.alias", "os-release"),
)


def confine(wanted: dict[str, Any], fds: list[int]) -> None:
    """Give up all but what is `wanted`; `fds` lead to the paths to write, then to read."""
    if os.stat("/proc/self/task").st_nlink > 3:  # two more than there are threads
        # It would stay unconfined, and shares its memory with the code.
        raise OSError("could not be confined: a preloaded module has started a thread in it")
    if kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1) != 0:
        raise OSError("could not be confined: _ctypes is missing, or no_new_privs was refused")
    _confine_files(fds[: wanted["write"]], fds[wanted["write"] :], wanted["read_all"])
    kernel.close_all(fds)
    _drop_capabilities()
    program: bytes = wanted["filter"]
    # struct sock_fprog: how many instructions, and where they are.
    where = id(program) + bytes.__basicsize__ - 1
    if kernel.prctl(_PR_SET_SECCOMP, 2, _words(len(program) // 8, where)) != 0:
        raise OSError("could not be confined: the seccomp filter was refused")
    if wanted["tmpdir"] is not None:
        os.environ["TMPDIR"] = wanted["tmpdir"]
        if "tempfile" in sys.modules:
            vars(sys.modules["tempfile"])["tempdir"] = None


def _words(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, sys.byteorder) for value in values)


# -- files, and signals


def _confine_files(write: list[int], read: list[int], read_all: bool) -> None:
    version = kernel.call("syscall", _CREATE_RULESET, None, 0, _VERSION)
    if version < 3:
        raise OSError("could not be confined: Landlock ABI 3 is missing (Linux 6.2)")
    handled = 0x7FFF | (_IOCTL_DEVICE if version >= 5 else 0)
    scopes = _SCOPES if version >= 6 else 0
    ruleset = kernel.call("syscall", _CREATE_RULESET, _words(handled, 0, scopes), 24, 0)
    if ruleset < 0:
        raise OSError("could not be confined: no Landlock ruleset could be made")
    for fd in write:
        _allow(ruleset, fd, _WRITE)
    for fd in read:
        _allow(ruleset, fd, _READ)
    _allow_paths(ruleset, ["/dev/null"], _READ_FILE | _WRITE_FILE | _TRUNCATE)
    _allow_paths(ruleset, [f"/proc/{name}" for name in _PROC] + _DEVICE_FILES, _READ)
    if read_all:
        _allow_paths(ruleset, ["/" + name for name in os.listdir("/")], _READ, ["/proc", "/dev"])
    else:
        _allow_paths(ruleset, [*_SYSTEM, *(f"/etc/{name}" for name in _ETC)], _READ)
        _allow_paths(ruleset, _interpreter(), _READ, _home())
    if kernel.call("syscall", _RESTRICT_SELF, ruleset, 0) != 0:
        raise OSError("could not be confined: the Landlock ruleset was refused")
    os.close(ruleset)


def _interpreter() -> set[str]:
    """What it reads by itself, and imports from."""
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, sys.executable}
    # Without an empty one, which is the current directory.
    return {each for each in paths.union(sys.path) if os.path.isabs(each)}


def _home() -> list[str]:
    """The home directory, and those that it is in."""
    path = os.path.realpath(os.path.expanduser("~"))
    found = [path]
    while path != (path := os.path.dirname(path)):
        found.append(path)
    return found


def _allow_paths(ruleset: int, paths: Iterable[str], access: int, but: Iterable[str] = ()) -> None:
    """Allow it for `paths` that are there, and that do not lead to the root or to one of `but`."""
    forbidden = {kernel.identity(each) for each in ("/", *but)}
    for path in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # it is not there, or not to be read anyway
        identity = kernel.identity(fd)
        if identity not in forbidden and identity == _AT_FIRST.get(path, identity):
            _allow(ruleset, fd, access)
        os.close(fd)


def _allow(ruleset: int, fd: int, access: int) -> None:
    if os.fstat(fd).st_mode & 0o170000 != 0o040000:
        access &= _ON_FILES
    rule = access.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
    if kernel.call("syscall", _ADD_RULE, ruleset, 1, rule, 0) != 0:
        raise OSError("could not be confined: a Landlock rule was refused")


# What they were before the first snippet ran: one that may write where such a directory is
# could replace it by a link, for the next ones to read what that leads to.
_AT_FIRST = {each: kernel.identity(each) for each in _interpreter()}  # None: nothing


def read_in(place: str, name: str) -> bytes:
    """Read the file of a block; what it imports from `place` can be read later."""
    directory = os.open(place, getattr(os, "O_PATH", os.O_RDONLY))
    try:
        # So that the two are one directory, even if another snippet replaces it meanwhile.
        with open(name, "rb", opener=lambda *given: os.open(*given, dir_fd=directory)) as stream:
            _AT_FIRST[place] = kernel.identity(directory)
            return stream.read()
    except OSError as error:
        error.filename = os.path.join(place, name)
        raise
    finally:
        os.close(directory)


# -- capabilities


def _drop_capabilities() -> None:
    # The effective ones: a real or saved one may be root's, and could be taken again.
    os.setresgid(*[os.getegid()] * 3)
    os.setresuid(*[os.geteuid()] * 3)
    # It takes CAP_SETPCAP: who lacks that is kept by no_new_privs alone from regaining any.
    kernel.prctl(_PR_SET_SECUREBITS, _NO_ROOT)
    version_3 = (0x20080522).to_bytes(4, sys.byteorder) + bytes(4)
    if kernel.call("capset", version_3, bytes(24)) != 0:
        raise OSError("could not be confined: capabilities could not be dropped")
