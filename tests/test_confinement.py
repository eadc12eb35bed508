"""What a confined execution can't do, what it still can, and what refuses its start."""

import errno
import functools
import json
import os
import pathlib
import pickle
import platform
import resource
import struct
import subprocess
import sys
import termios
import textwrap
import types

import programs
import pytest
from commands import in_process  # noqa: F401
from conftest import (
    FOREVER,
    ROOT,
    begin,
    children,
    eventually,
    is_alive,
    one_in,
    run_as_host,
    stat_of,
)
from conftest import swept_manager as manager  # noqa: F401
from test_no_survivors import ENDS, GRACE, bring_to_its_end

import sidexec
from sidexec import Confinement, confining

# Each try raises OSError, or has got out. `o` is a directory outside, with the files `f` and
# `g`; `i` is the one that may be written; `pids` are processes that are not its own.
FILES = """
mapped: mmap.mmap(os.open(o + "/f", os.O_RDONLY), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE)
create: open(o + "/new", "x")
create by call: call(257, -100, o.encode() + b"/new2", 0o101, 0o600)
write: open(o + "/f", "r+")
append: open(o + "/f", "a")
truncate: os.truncate(o + "/f", 0)
truncate by open: os.open(o + "/f", os.O_RDONLY | os.O_TRUNC)
truncate by call: call(76, o.encode() + b"/f", 0)
rename within: os.rename(o + "/f", o + "/h")
rename out: (open(i + "/mine", "w"), os.rename(i + "/mine", o + "/mine"))
rename in: os.rename(o + "/f", i + "/f")
link out: (open(i + "/mine2", "w"), os.link(i + "/mine2", o + "/mine2"))
link in: os.link(o + "/f", i + "/linked")
symbolic link: os.symlink("/", o + "/link")
make a directory: os.mkdir(o + "/d")
make a fifo: os.mkfifo(o + "/fifo")
remove: os.unlink(o + "/g")
remove a directory: os.rmdir(o + "/empty")
unnamed: os.open(o, os.O_TMPFILE | os.O_RDWR)
through a link: (os.path.lexists(i + "/l") or os.symlink(o, i + "/l"), open(i + "/l/f", "r+"))
through its root: open("/proc/self/root" + o + "/f", "r+")
through a directory: os.open("f", os.O_RDWR, dir_fd=os.open(o, os.O_RDONLY))
set user id: (open(i + "/su", "w"), os.chmod(i + "/su", 0o4755))
made set user id: os.close(os.open(i + "/m", os.O_CREAT | os.O_RDWR, 0o4755))
made set group id: call(257, -100, i.encode() + b"/m2", 0o102, 0o2755)
made by creat: call(85, i.encode() + b"/m3", 0o4755)
made by mknod: os.mknod(i + "/m4", 0o104755)
made by openat2: call(437, -100, i.encode() + b"/m5", words(0o102, 0o4755, 0), 24)
set group id: (open(i + "/sg", "w"), os.chmod(os.open(i + "/sg", os.O_RDONLY), 0o2755))
set user id out: os.chmod(o + "/f", 0o4755)
set user id by call: call(452, -100, o.encode() + b"/f", 0o4755, 0)
reopened: open("/proc/self/fd/%d" % os.open(o + "/f", os.O_RDONLY), "r+")
descriptor link in: call(265, *own(os.open(o + "/f", 0)), -100, i.encode() + b"/l2", 0x400)
descriptor link out: call(265, *own(os.open(i, 0o20200002)), -100, o.encode() + b"/t", 0x400)
exchange: (open(i + "/x", "w"), call(316, -100, i.encode() + b"/x", -100, o.encode() + b"/g", 2))
memory of its own: open("/proc/self/mem", "r+b")
terminal: open("/dev/tty", "w")
"""
SOCKETS = """
inet: socket.socket()
inet6: socket.socket(socket.AF_INET6)
unix: socket.socket(socket.AF_UNIX)
udp: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
raw: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
netlink: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
by call: call(41, 2, 1, 0)
datagram pair: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
raw pair: call(53, 1, 3, 0, ctypes.create_string_buffer(8))
pair of x32: call(0x40000000 + 41, 2, 1, 0)
connect: socket.socketpair()[0].connect("/run/x")
"""
NAMESPACES = """
user: call(272, 0x10000000)
mount: call(272, 0x20000)
clone: child(call(56, 0x10000000 | 17, 0, 0, 0, 0))
clone3: call(435, b"\\0" * 64, 64)
io_uring: call(425, 8, ctypes.create_string_buffer(120))
userfaultfd: call(323, 1)
bpf: call(321, 0, ctypes.create_string_buffer(128), 128)
perf_event_open: call(298, (b"\\1\\0\\0\\0\\x70\\0\\0\\0" + bytes(104)), 0, -1, -1, 0)
keyctl: call(250, 0, -3, 1)
add_key: call(248, b"user", b"k", b"v", 1, -3)
shared memory: call(29, 0x5157, 4096, 0o1600)
"""
AS_ROOT = """
chown out: os.chown(o + "/f", 1234, 1234)
setgid: os.setgid(1234)
groups: os.setgroups([1234])
ports: call(172, 3)
accounting: call(163, i.encode())
file capabilities: (open(i + "/a", "w"), os.setxattr(i + "/a", "security.capability", capable))
new mount: call(430, b"tmpfs", 0)
kernel log: open("/dev/kmsg", "w")
device: os.mknod(i + "/disk", 0o60600, os.makedev(1, 0))
character device: os.mknod(i + "/mem", 0o20600, os.makedev(1, 1))
chown: (open(i + "/c", "w"), os.chown(i + "/c", 1234, 1234))
setuid: os.setuid(1234)
chroot: os.chroot(i)
host name: socket.sethostname(socket.gethostname())
clock: time.clock_settime(0, time.time())
module: call(313, os.open("/dev/null", 0), b"", 0)
mount: call(165, b"none", i.encode(), b"tmpfs", 0, 0)
priority: os.setpriority(0, 0, -5)
"""
# For each other process.
PROCESSES = """
kill: os.kill(pid, 0)
tgkill: call(234, pid, pid, 0)
tkill: call(200, pid, 0)
sigqueue: call(129, pid, 0, b"\\0" * 8 + b"\\xff\\xff\\xff\\xff" + bytes(116))
pidfd_send_signal: signal.pidfd_send_signal(os.pidfd_open(pid), 0)
pidfd_getfd: call(438, os.pidfd_open(pid), 0, 0)
attach: call(101, 16, pid, 0, 0)
seize: call(101, 0x4206, pid, 0, 0)
read memory: call(310, pid, *2 * [ctypes.create_string_buffer(iov), 1], 0)
write memory: call(311, pid, *2 * [ctypes.create_string_buffer(iov), 1], 0)
mem: open(f"/proc/{pid}/mem", "r+b")
environment: open(f"/proc/{pid}/environ")
command line: open(f"/proc/{pid}/cmdline")
maps: open(f"/proc/{pid}/maps")
descriptors: os.listdir(f"/proc/{pid}/fd")
descriptor: open(f"/proc/{pid}/fd/0", "w")
program: os.readlink(f"/proc/{pid}/exe")
root: os.listdir(f"/proc/{pid}/root")
state: open(f"/proc/{pid}/stat")
compare: call(312, pid, pid, 3, 0, 0)
move pages: call(279, pid, 0, None, None, None, 0)
migrate pages: call(256, pid, 8, words(1), words(1))
robust list: call(274, pid, here, here)
advise: call(440, os.pidfd_open(pid), ctypes.create_string_buffer(iov), 1, 20, 0)
namespaces: call(308, os.pidfd_open(pid), 0x20000)
group: os.setpgid(0, os.getpgid(pid))
score: open(f"/proc/{pid}/oom_score_adj", "w")
limits: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))
affinity: os.sched_setaffinity(pid, [0])
scheduler: os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))
priority: os.setpriority(os.PRIO_PROCESS, pid, 10)
priority of the user: os.setpriority(os.PRIO_USER, 0, 10)
io priority: call(251, 1, pid, 0)
"""

PROGRAM = """
import ctypes, json, mmap, os, resource, signal, socket, sys, time
tries, o, i, pids = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
here = ctypes.create_string_buffer(8)
def call(*arguments):
    result = libc.syscall(*[ctypes.c_long(a) if type(a) is int else a for a in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def words(*values):
    return b"".join(value.to_bytes(8, "little") for value in values)
def child(pid):
    if pid == 0:
        os._exit(0)
iov = words(ctypes.addressof(here), 8)
capable = words(1 << 25 | 1 << 40, 0, 0)[:20]
def own(fd):
    return -100, b"/proc/self/fd/%d" % fd
got_out = []
def go(name, code, **names):
    try:
        exec(code, {**globals(), **names})
    except OSError:
        return
    got_out.append(name)
for line in tries.splitlines():
    name, _, code = line.partition(": ")
    if "pid" in code:
        for role, pid in pids.items():
            go(f"{name} of {role}", code, pid=pid)
    elif name:
        go(name, code)
print(json.dumps(got_out))
"""
# Permits everything, on top of what there is: a Landlock rule for the root, and a filter.
ON_TOP = """
rules = call(444, words(0x7fff), 8, 0)
call(445, rules, 1, words(0x7fff)[:8] + os.open("/", os.O_PATH).to_bytes(4, "little"), 0)
call(446, rules, 0)
allow = ctypes.create_string_buffer(bytes.fromhex("060000000000ff7f"))
call(157, 22, 2, words(1, ctypes.addressof(allow)))
"""
PLACES = {
    "snippet": "sys.argv.append(given)\nexec(program)",
    "beneath": """
        sys.argv.append(given)
        exec(program.replace("got_out = []", on_top + "got_out = []"))
        """,
    "child": "subprocess.check_call([sys.executable, '-c', program, given])",
    "daemon": """
        end, other = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.dup2(other, 1)
                os.execve(sys.executable, [sys.executable, "-c", program, given], {})
            os._exit(0)
        os.close(other)
        os.wait()
        print(open(end).read())
        """,
}


@pytest.fixture
def places(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    inside.mkdir()
    outside.mkdir()
    (outside / "empty").mkdir()
    for name in "fg":
        (outside / name).write_text("untouched")
    return str(outside), str(inside)


def run(manager, code, params=None, **options):
    """Run code to its end, confined unless told otherwise: what it returned."""
    options = {"confinement": Confinement(), **options}
    return manager.run(code, params, **options).check().data.result


def attempt(manager, tries, places, place, pids=(), confinement=None):
    """The names of the tries that have got out."""
    params = {
        "program": PROGRAM,
        "given": json.dumps([tries, *places, dict(pids)]),
        "on_top": ON_TOP,
    }
    code = "import os, subprocess, sys\nprogram, given, on_top = params.values()\n"
    code += textwrap.dedent(PLACES[place])
    return json.loads(manager.run(code, params, confinement=confinement).check().data.output)


x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are of x86-64")
everywhere = pytest.mark.parametrize("place", PLACES)


@x86
@everywhere
@pytest.mark.parametrize("tries", [FILES, SOCKETS, NAMESPACES, AS_ROOT])
def test_nothing_gets_out(manager, places, place, tries):
    confinement = Confinement(write=[places[1]])
    assert attempt(manager, tries, places, place, confinement=confinement) == []
    assert sorted(os.listdir(places[0])) == ["empty", "f", "g"]
    assert pathlib.Path(places[0], "f").read_text() == "untouched"


@x86
def test_the_same_tries_get_out_unconfined(manager, places):
    got_out = attempt(manager, FILES, places, "snippet")
    # The first `rename` takes the file away from those after it.
    assert {"create", "write", "truncate", "rename within", "rename out", "remove"} < {*got_out}
    assert {"made set user id", "made by creat", "made by openat2", "made by mknod"} < {*got_out}
    got_out = attempt(manager, SOCKETS, places, "snippet")
    assert {"inet", "unix", "udp", "by call", "datagram pair", "raw pair"} < {*got_out}


@pytest.fixture
def stranger():
    with subprocess.Popen([sys.executable, "-c", "open(0).read()"], stdin=-1) as process:
        yield process


@pytest.fixture
def others(manager, stranger):
    """Processes that are not a confined snippet's own, by their roles."""
    ids = [begin(manager, FOREVER), begin(manager, FOREVER, confinement=Confinement())]
    keeper, another = (manager._engine.executions[id].owner.keeper_pid for id in ids)
    yield {
        "stranger": stranger.pid,
        "other": children(keeper)[0],
        "confined": children(another)[0],
        "keeper": keeper,
        "launcher": int(stat_of(keeper)[1]),
        "host": os.getpid(),
    }
    stranger.stdin.close()
    assert stranger.wait(20) == 0


@x86
@everywhere
def test_no_other_process_is_reached(manager, places, others, place):
    confinement = Confinement(write=[places[1]])
    assert attempt(manager, PROCESSES, places, place, others, confinement) == []
    assert all(map(is_alive, others.values()))


@x86
def test_the_same_tries_reach_others_unconfined(manager, places, stranger):
    harmful = ("attach", "seize", "limits", "write memory", "score", "priority of")
    tries = "\n".join(each for each in PROCESSES.splitlines() if not each.startswith(harmful))
    got_out = attempt(manager, tries, places, "snippet", {"stranger": stranger.pid})
    expected = "kill tgkill pidfd_send_signal environment maps descriptors affinity".split()
    assert {f"{name} of stranger" for name in expected} < {*got_out}


# Has the kernel send SIGKILL to the owner of a pipe when that can be read.
OWNER = """
import fcntl, os, time
end, other = os.pipe()
fcntl.fcntl(end, fcntl.F_SETOWN, params["pid"])
fcntl.fcntl(end, 10, 9)
fcntl.fcntl(end, fcntl.F_SETFL, os.O_ASYNC)
os.write(other, b"x")
"""


def test_no_other_process_is_signalled_by_the_kernel(manager, stranger):
    params = {"pid": stranger.pid}
    run(manager, OWNER, params)
    assert stranger.poll() is None
    run(manager, OWNER, params, confinement=None)
    assert stranger.wait(20) == -9


def test_no_other_process_is_reached_by_the_descriptors_of_a_snippet(manager):
    code = """
    import os, signal, socket
    fds = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
    if len(fds) != 4: return fds
    channel = socket.socket(fileno=os.dup(max(fds)))
    try: other = int.from_bytes(channel.getsockopt(socket.SOL_SOCKET, 77, 4), "little")
    except OSError: return "there is no SO_PEERPIDFD"
    signal.pidfd_send_signal(other, 0)
    """
    confinement = Confinement(write=["/tmp"], read=["/usr"])
    data = manager.run(code, confinement=confinement, input="x").data
    assert data.result == "there is no SO_PEERPIDFD" or "PermissionError" in data.error, data


@pytest.mark.parametrize(
    "request_",
    [0x5000940E, 0x5000BC0E, 0x50006F0E, 0x5000660E]
    + [termios.TIOCSTI, termios.TIOCSCTTY, termios.TIOCSETD],
)
def test_no_file_is_made_and_no_terminal_typed_into_by_ioctl(manager, request_):
    """Some file systems make files by it where a directory is open for reading only."""
    code = """
    import fcntl, os
    try: fcntl.ioctl(os.open("/usr", 0), params["request"], bytes(999))
    except OSError as error: return os.strerror(error.errno)
    """
    refused = os.strerror(errno.EOPNOTSUPP)
    assert run(manager, code, {"request": request_}, confinement=None) != refused
    assert run(manager, code, {"request": request_}) == refused


def test_a_start_whose_descriptors_do_not_come_fails(manager, tmp_path, monkeypatch):
    monkeypatch.setattr("sidexec.engine.descriptors.Sender.send_with", lambda *given: 0)
    for options in ({"input": "x"}, {"confinement": Confinement(write=[tmp_path])}):
        data = manager.run("print('it runs')", **options).data
        assert (data.status, data.output) == ("failed", "")
        assert data.error.startswith("OSError: its descriptors did not come")


def test_no_core_is_dumped_outside(manager, places):
    with open("/proc/sys/kernel/core_pattern") as file:
        if "/" in file.read() or resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
            pytest.skip("cores go elsewhere, or nowhere")
    code = """
    import os, resource
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
    if os.fork() == 0: os.abort()
    return os.WCOREDUMP(os.wait()[1])
    """
    assert not run(manager, code, cwd=places[0])
    assert sorted(os.listdir(places[0])) == ["empty", "f", "g"]


def test_a_thread_that_runs_already_refuses(preloading):
    """It would be confined by nothing, and could be given the code to run."""
    source = """
    import os, threading, time
    start = lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    os.register_at_fork(after_in_child=start)
    """
    manager = preloading({"preloaded": source})
    data = manager.run("print('it runs')", confinement=Confinement()).data
    assert (data.status, data.output) == ("failed", "")
    assert "a preloaded module has started a thread" in data.error


def test_what_it_writes_where_modules_are_found_is_not_imported_by_the_launcher(
    make_manager, tmp_path
):
    code = """
    import os, sys
    for name in sys.stdlib_module_names:
        with open(f"{params['path']}/{name}.py", "w") as file:
            file.write("try: open(%r, 'x')\\nexcept OSError: pass\\n" % params["out"])
            file.write("raise ImportError")
    """
    (tmp_path / "path").mkdir()
    params = {"path": str(tmp_path / "path"), "out": str(tmp_path / "out")}
    manager = make_manager(env={"PYTHONPATH": params["path"]})
    confinement = Confinement(write=[params["path"]])
    assert manager.run(code, params, confinement=confinement).data.status == "completed"
    for _ in range(2):  # the second one in a pair that was forked ahead
        data = manager.run("return {'a': 1 / 1}", confinement=confinement).data
        assert data.result == {"a": 1.0}, data.error
    assert not (tmp_path / "out").exists()


def _answer(code, architecture, number, *arguments):
    """What a filter says of a system call."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    at = loaded = 0
    while True:
        operation, yes, no, value = struct.unpack_from("=HBBI", code, 8 * at)
        at += 1
        if operation == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        elif operation == 0x54:
            loaded &= value
        elif operation == 0x06:
            return "allowed" if value == 0x7FFF0000 else errno.errorcode[value - 0x50000]
        else:
            holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: loaded & value != 0}
            at += yes if holds[operation] else no


@pytest.mark.parametrize(
    "machine, architecture, answers",
    [
        (
            "x86_64",
            0xC000003E,
            {
                "allowed": [(0,), (302, 0, 1), (16, 0, 0x5401), (469,)],
                "EPERM": [(41, 2, 1), (0x40000000,), (302, 2**32 - 1, 1)],
                "ENOTSUP": [(16, 0, 2**32 + 0x5412)],
                "ENOSYS": [(470,)],  # newer than what is known
            },
        ),
        (
            "aarch64",
            0xC00000B7,
            {
                "allowed": [(63,), (199, 1, 1), (56, 0, 0, 0, 0o755)],
                "EPERM": [(198, 2, 1), (199, 1, 2), (261, 7, 1), (220, 0x10000000)]
                + [(56, 0, 0, 0, 0o4755)],
                "ENOTSUP": [(29, 0, 0x5412)],
                "ENOSYS": [(470,)],
            },
        ),
    ],
)
def test_the_filter_of_each_machine(monkeypatch, machine, architecture, answers):
    monkeypatch.setattr("os.uname", lambda: types.SimpleNamespace(machine=machine))
    code = confining._filter.__wrapped__(False)
    for answer, calls in answers.items():
        assert {_answer(code, architecture, *call) for call in calls} == {answer}
        assert {_answer(code, 0x40000003, *call) for call in calls} == {"EPERM"}


@x86
def test_32_bit_calls_are_refused(manager):
    code = """
    import ctypes, mmap
    # mov eax, 20 (getpid); int 0x80; ret
    memory = mmap.mmap(-1, 4096, prot=7)
    memory.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return ctypes.CFUNCTYPE(ctypes.c_int)(at)()
    """
    assert run(manager, code) < 0


@pytest.mark.parametrize(
    "code",
    [
        "import tempfile\nwith tempfile.NamedTemporaryFile() as f:\n"
        "  assert f.name.startswith(params['i'])",
        "import os\nassert os.environ['TMPDIR'] == params['i']",
        "import subprocess\nassert subprocess.check_output(['sh', '-c', 'echo hi']) == b'hi\\n'",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import asyncio\nawait asyncio.sleep(0)",
        "import asyncio\np = await asyncio.create_subprocess_exec('true')\n"
        "assert await p.wait() == 0",
        "import multiprocessing as m\nc = m.get_context('fork')\np = c.Process(target=print)\n"
        "p.start()\np.join()\nassert p.exitcode == 0\nassert c.Pipe()",
        "import sqlite3\nd = sqlite3.connect(params['i'] + '/db')\n"
        "d.execute('create table t (a)')\nd.commit()\nd.close()",
        "open('/dev/null', 'w').write('x')\nassert open('/dev/urandom', 'rb').read(4)",
        "import zoneinfo, locale, ssl\nlocale.setlocale(locale.LC_ALL, '')\n"
        "ssl.create_default_context()",
        "import os, shutil\nos.makedirs(params['i'] + '/a/b')\nopen(params['i'] + '/a/f', 'w')\n"
        "os.rename(params['i'] + '/a/f', params['i'] + '/a/b/f')\n"
        "os.symlink('b', params['i'] + '/a/l')\nshutil.rmtree(params['i'] + '/a')",
        "import os, signal, subprocess\np = subprocess.Popen(['sleep', '60'])\n"
        "os.kill(p.pid, signal.SIGTERM)\nassert p.wait() == -15",
        "report_progress(50)\nreport_result([1])\nopen('/etc/passwd').read()",
    ],
)
def test_works_inside(manager, tmp_path, code):
    run(manager, code, {"i": str(tmp_path)}, confinement=Confinement(write=[tmp_path]))


def test_where_read_is_given_the_interpreter_still_works_and_nothing_else_is_read(
    manager, tmp_path
):
    (tmp_path / "given").write_text("given")
    (tmp_path / "other").write_text("other")
    code = """
    import os, sys, subprocess, json, sqlite3, ssl, ctypes, pathlib, email, zoneinfo
    subprocess.check_call([sys.executable, "-c", "import decimal, ssl"])
    refused = []
    for path in ("/etc/passwd", params["d"] + "/other"):
        try: open(path)
        except PermissionError: refused.append(path)
    for path in (os.path.expanduser("~"), params["d"], "/", "/tmp", "/etc/ssl", "/etc/pki"):
        try: os.listdir(path)
        except (PermissionError, FileNotFoundError): refused.append(path)
    return open(params["d"] + "/given").read(), len(refused)
    """
    confinement = Confinement(read=[tmp_path / "given"])
    assert run(manager, code, {"d": str(tmp_path)}, confinement=confinement) == ["given", 8]


def test_a_manager_works_in_a_child_that_may_not_read_its_own_entry_in_proc(manager):
    program = """
try: open("/proc/self/status")
except PermissionError: import sidexec; print(sidexec.run("return 1").check().data.result)
"""
    code = """
    import subprocess, sys
    command = [sys.executable, "-c", params["program"]]
    return subprocess.check_output(command, cwd=params["root"], text=True)
    """
    params = {"program": program, "root": ROOT}
    assert run(manager, code, params, confinement=Confinement(read=[ROOT])) == "1\n"


@pytest.mark.parametrize("entry", ["{home}/", "{home}/..", "{link}"])
def test_a_home_directory_on_the_path_of_modules_is_not_read(make_manager, tmp_path, entry):
    home, link = tmp_path / "home", tmp_path / "link"
    home.mkdir()
    link.symlink_to(home)
    (home / "secret").write_text("secret")
    environment = {"HOME": str(home), "PYTHONPATH": entry.format(home=home, link=link)}
    manager = make_manager(env=environment, confinement=Confinement(read=[]))
    data = manager.run("open(params['secret'])", {"secret": f"{home}/secret"}).data
    assert data.error.startswith("PermissionError")


def test_a_directory_of_modules_that_was_replaced_is_not_read(make_manager, tmp_path):
    for name in ("modules", "secret"):
        (tmp_path / name).mkdir()
    (tmp_path / "modules" / "mine.py").touch()
    (tmp_path / "secret" / "mine.py").write_text("secret = 1")
    for name in ("modules", "secret"):  # or what is known of the one would be listed anew
        os.utime(tmp_path / name, (1, 1))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "modules")}
    manager = make_manager(env=environment, confinement=Confinement(read=[]))
    assert manager.run("import mine").data.status == "completed"
    (tmp_path / "modules").rename(tmp_path / "moved")
    (tmp_path / "modules").symlink_to("secret")
    data = manager.run("import mine").data
    assert data.error and data.error.startswith("PermissionError")


def test_a_block_that_is_replaced_once_it_is_read_widens_nothing(preloading, tmp_path):
    block, secret = tmp_path / "block", tmp_path / "secret"
    for each in (block, secret):
        each.mkdir()
        (each / "file").write_text("read")
    (block / "__main__.py").write_text(f"print(open({str(secret / 'file')!r}).read())")
    source = f"""
        import os
        stat, block, secret = os.stat, {str(block)!r}, {str(secret)!r}
        def replace(path, **options):
            if path == "/proc/self/task":  # the confinement begins
                os.rename(block, block + "-moved")
                os.symlink(secret, block)
            return stat(path, **options)
        os.stat = replace
        """
    # A home directory is not read, even on the path of modules.
    manager = preloading({"preloaded": source}, env={"HOME": str(tmp_path)})
    started = manager.start_with_action_block(block, confinement=Confinement(read=[]))
    data = manager.wait(started.id).data
    assert block.is_symlink()
    assert data.error and data.error.startswith("PermissionError"), data


def test_a_new_program_regains_no_capability(manager):
    code = """
    import os, sys
    status = "print(open('/proc/%d/status').read())" % os.getpid()
    os.execv(sys.executable, [sys.executable, "-c", status])
    """
    output = manager.run(code, confinement=Confinement()).data.output
    lines = dict(line.split(":\t") for line in output.splitlines() if ":\t" in line)
    assert {int(lines[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {0}
    assert (lines["NoNewPrivs"].strip(), lines["Seccomp"].strip()) == ("1", "2")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can have several users and groups")
def test_a_real_or_saved_user_or_group_of_the_host_is_not_taken_again():
    host = """
    import os, sidexec
    os.setresgid(0, 1234, 0)
    os.setresuid(1234, 0, 0)
    code = "import os; print(os.getresuid(), os.getresgid()); os.setegid(0)"
    data = sidexec.run(code, cwd="/", confinement=sidexec.Confinement()).data
    print(data.output, data.error)
    """
    printed = run_as_host(textwrap.dedent(host))
    assert printed.startswith("(0, 0, 0) (1234, 1234, 1234)\n PermissionError"), printed


@pytest.mark.parametrize("option", ["read", "write"])
def test_bad_paths_raise(option):
    for path in ("/", "/proc", "/proc/sys", "/proc/self/root"):
        with pytest.raises(ValueError, match="without /proc"):
            Confinement(**{option: [path]})
    with pytest.raises(ValueError, match="250"):
        Confinement(**{option: ["/usr"] * 251})


def test_it_is_a_value(tmp_path):
    made = Confinement(write=[tmp_path], read=[])
    assert made == pickle.loads(pickle.dumps(made)) == Confinement(write=[str(tmp_path)], read=[])
    assert hash(made)
    with pytest.raises(AttributeError):
        made.network = True


def test_a_path_that_is_replaced_widens_nothing_and_refuses_later_starts(manager, places):
    outside, inside = places
    confinement = Confinement(write=[inside])
    code = """
    import os, time
    print("ready", flush=True)
    while not os.path.islink(params["i"]): time.sleep(0.005)
    try: open(params["i"] + "/new", "w")
    except PermissionError: return "refused"
    """
    id = begin(manager, code, {"i": inside}, confinement=confinement)
    os.rename(inside, f"{inside}-moved")
    os.symlink(outside, inside)
    assert manager.wait(id).data.result == "refused"
    started = manager.start_with_code("", confinement=confinement)
    assert not started.success and "is not what it was" in started.error
    os.unlink(inside)
    started = manager.start_with_code("", confinement=confinement)
    assert not started.success and inside in started.error


# Takes a system call away from the host, and so from the launcher and the snippets.
WITHOUT = """
import ctypes, sys
number, errno = map(int, sys.argv[1:3])
code = b"".join(
    op.to_bytes(2, "little") + bytes((yes, no)) + k.to_bytes(4, "little") for op, yes, no, k in
    [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50000 | errno), (6, 0, 0, 0x7FFF0000)])
buffer = ctypes.create_string_buffer(code)
program = (4).to_bytes(8, "little") + ctypes.addressof(buffer).to_bytes(8, "little")
libc = ctypes.CDLL(None)
import sidexec.confining
if sys.argv[3] == "snippet":
    sidexec.confining.missing()
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, program, 0, 0) == 0
with sidexec.ExecutionManager() as manager:
    response = manager.run("print('it runs')", confinement=sidexec.Confinement())
    print(response.error, response.data.output, response.data.error)
"""


@pytest.mark.parametrize(
    "lacking",
    one_in(
        2,
        [
            (444, 38, "host", "Landlock ABI 3, which is there since Linux 6.2"),
            (444, 95, "host", "Landlock ABI 3, which is there since Linux 6.2"),
            (157, 22, "host", "seccomp filters, which are there since Linux 3.5"),
            (444, 38, "snippet", "Landlock ABI 3 is missing (Linux 6.2)"),
            (445, 22, "snippet", "a Landlock rule was refused"),
            (446, 1, "snippet", "the Landlock ruleset was refused"),
            (126, 1, "snippet", "capabilities could not be dropped"),
            (157, 22, "snippet", "no_new_privs was refused"),
        ],
    ),
)
@x86
def test_what_is_missing_refuses_the_start(lacking):
    number, errno, who, text = lacking
    printed = run_as_host(WITHOUT, str(number), str(errno), who)
    assert text in printed and "it runs" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", programs.DESCENDANTS)
def test_nothing_is_left_of_a_confined_execution(make_manager, trace, monkeypatch, kind, end):
    # It can't read when others have begun: the lock and the directory tell of them all.
    begins = 'file.read().rpartition(")")[2].split()[19]'
    prelude = programs.PRELUDE.replace('with open(f"/proc/{pid}/stat") as file:', "if True:")
    monkeypatch.setattr(programs, "PRELUDE", prelude.replace(begins, "0"))
    confinement = Confinement(write=[trace.directory])
    manager = functools.partial(sidexec.ExecutionManager, confinement=confinement)
    monkeypatch.setattr(sidexec, "ExecutionManager", manager)
    confined = make_manager(grace_period=GRACE, default_timeout=60.0)
    assert bring_to_its_end(confined, trace, kind, end) == set()
    assert trace.noted("descendant")


def test_it_stops_as_gracefully(manager):
    code = """
    import os, signal, time
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
            os.write(2, b"%d\\n" % os.getpid())
            time.sleep(60)
        os._exit(0)
    try:
        os.write(1, b"ready\\n")
        time.sleep(60)
    finally:
        print("cleaned up")
        report_result("partial")
    """
    id = begin(manager, code, confinement=Confinement())
    pid = eventually(lambda: manager.get_status(id).data.error_output)
    manager.future(id).cancel()  # asks, and does not wait
    eventually(lambda: manager.get_status(id).data.result)
    assert is_alive(int(pid))
    data = manager.stop(id, grace=0.1).data
    assert (data.stop_reason, data.output, data.result) == (
        "requested",
        "ready\ncleaned up\n",
        "partial",
    )
    assert not is_alive(int(pid))


WRITES = "open('x', 'w')"
CONNECTS = (
    "import socket\ns = socket.create_server(('127.0.0.1', 0))\n"
    "socket.create_connection(s.getsockname())"
)


@pytest.mark.parametrize(
    "options, program, code, line",
    [
        (["--confine"], WRITES, 1, "PermissionError"),
        (["--confine", "--write", "."], WRITES, 0, ""),
        ([], WRITES, 0, ""),
        (["--write", "."], WRITES, 2, "--write and --network need --confine"),
        (["--network"], WRITES, 2, "--write and --network need --confine"),
        (["--confine", "--write", "nowhere"], WRITES, 2, "there is no such file or directory"),
        (["--confine"], CONNECTS, 1, "PermissionError"),
        (["--confine", "--network"], CONNECTS, 0, ""),
    ],
)
def test_command_line(in_process, tmp_path, options, program, code, line):
    returncode, _, err = in_process("run", *options, "-c", program)
    assert returncode == code and line in err
    assert os.path.exists(tmp_path / "x") == (code == 0 and program == WRITES)


def test_the_confinement_of_a_start_replaces_that_of_its_manager(make_manager, tmp_path):
    manager = make_manager(confinement=Confinement())
    code = "open(params['path'], 'w').write(input())"
    options = {"params": {"path": str(tmp_path / "file")}, "input": "x"}
    for run in (manager.run, functools.partial(sidexec.run, confinement=Confinement())):
        assert run(code, **options).data.error.startswith("PermissionError")
    manager.run(code, confinement=Confinement(write=[tmp_path], read=["/etc"]), **options).check()
    assert (tmp_path / "file").read_text() == "x"


def test_a_block_is_confined_too(manager, tmp_path):
    (tmp_path / "block.py").write_text("import other\n")
    (tmp_path / "other.py").write_text("open('/tmp/not-to-be', 'w')\n")
    block = tmp_path / "block.py"
    id = manager.start_with_action_block(block, confinement=Confinement(read=[])).id
    assert "PermissionError" in manager.wait(id).data.error


@pytest.mark.parametrize(
    "code",
    [
        "open(o + '/f').read()",
        "os.chmod(o + '/f', 0o600)",
        "os.utime(o + '/f', (1, 1))",
        "os.setxattr(o + '/f', 'user.x', b'1')",
        "fcntl.flock(os.open(o + '/f', os.O_RDONLY), fcntl.LOCK_EX)",
        "os.stat('/root')",
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "assert libc.inotify_add_watch(libc.inotify_init(), o.encode(), 2) > 0",
        "most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))\n"
        "for _ in range(150): os.dup(0)",
    ],
)
def test_what_it_does_not_stop(manager, places, code):
    code = f"import fcntl, os, resource\no = params['o']\n{code}"
    run(manager, code, {"o": places[0]}, limits=sidexec.Limits(open_files=100))


def test_code_may_lower_its_own_limits_for_good(manager):
    code = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))\nreturn 7"
    assert run(manager, code, limits=sidexec.Limits(open_files=100)) == 7


def test_what_a_preloaded_module_has_opened_stays_open(preloading, tmp_path):
    manager = preloading({"preloaded": f"file = open({str(tmp_path / 'file')!r}, 'w')"})
    run(manager, "import preloaded; preloaded.file.write('written')")
    assert (tmp_path / "file").read_text() == "written"


@pytest.mark.parametrize(
    "code",
    [
        *["open('/proc/self/stat')", "os.listdir('/')", "os.listdir('/proc')", "os.openpty()"],
        *["open('/dev/shm/x', 'w')", "os.kill(keeper, 9)", "os.kill(keeper, 19)"],
        "open(f'/proc/{keeper}/environ')",
    ],
)
def test_what_does_not_work_inside_either(manager, code):
    code = f"""
    import os
    keeper = os.getppid()
    if os.fork() == 0:
        try: {code}
        except OSError: os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.wait()[1])
    """
    assert run(manager, code) == 7
