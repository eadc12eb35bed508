"""Sweeps where /proc, limits, tracing or sheer numbers are against them."""

import _signal
import contextlib
import ctypes
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import HOST_ENVIRONMENT, children, descriptors, eventually, is_alive, state_of
from programs import CLEAN_UP, WAIT, program, with_descendant

from sidexec import procfs
from sidexec.child import kernel, sweeping
from sidexec.child.keeper import Keeper
from sidexec.child.launcher import Launcher
from sidexec.engine.process import Process
from sidexec.running import Run

# Works in surroundings in which the processes can't note who they are.
DAEMONS = """
import fcntl, os, time
os.chdir(params["directory"])
lock = os.open("lock", os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_SH)
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1), os.dup2(null, 2)
            time.sleep(60)
        os._exit(0)
    os.wait()
print("ready")
"""

HOST = """
import json, sys, sidexec
code, params = json.loads(sys.argv[1])
manager = sidexec.ExecutionManager(grace_period=0.2)
id = manager.start_with_code(code, params).raise_for_error().data.side_execution_id
for chunk in manager.follow(id):
    break
usage = manager.get_status(id).data.memory_usage
if "sleep(600)" in code:
    manager.stop(id)
answer = manager.wait(id)
print(json.dumps([answer.success, answer.data.status, usage]), flush=True)
sys.stdin.readline()
"""

# How to come there: neither shows a process's own entry by its own pid.
SURROUNDINGS = {
    "another namespace's /proc": ["unshare", "--fork", "--pid"],
    "no /proc": ["unshare", "--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "sh"],
}


ASK_PROC = """
from sidexec import procfs
names = ("children", "group", "parent_of", "began_at", "usage_of_tree")
print([getattr(procfs, name)(1) for name in names])
"""


def unshared(surroundings, code, *arguments):
    """The command that runs code there."""
    prefix = SURROUNDINGS[surroundings]
    if subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("this user may not unshare namespaces")
    return [*prefix, sys.executable, "-c", code, *arguments]


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_of_nobody_is_anything_said_where_proc_is_not_ones_own(surroundings):
    """There, /proc says nothing of number 1, or what is true of another process."""
    said = subprocess.check_output(unshared(surroundings, ASK_PROC), env=HOST_ENVIRONMENT)
    assert said == b"[[], None, None, None, None]\n"


@pytest.mark.parametrize(
    "ending, status",
    (
        ("time.sleep(600)", "stopped"),
        pytest.param("return 1", "completed", marks=pytest.mark.slow),
        ("os.kill(os.getppid(), 9)\ntime.sleep(60)", "failed"),
    ),
    ids=("stopped", "completed", "keeper killed"),
)
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_nothing_is_left_where_proc_is_not_ones_own(trace, surroundings, ending, status):
    host = subprocess.Popen(
        unshared(surroundings, HOST, json.dumps([DAEMONS + ending, trace.params])),
        env=HOST_ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with host:
        try:
            assert json.loads(host.stdout.readline()) == [True, status, None]
            assert trace.left() == set()
        finally:
            host.stdin.close()


@pytest.mark.parametrize("limit, status", ((5, "completed"), (0, "failed")))
def test_a_keeper_whose_descriptors_were_limited_by_its_snippet(run, trace, limit, status):
    code = (
        "import resource\n"
        f"resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
    )
    data = run(with_descendant("daemon", code), trace.params)
    assert trace.left() == set()
    assert data.status == status
    assert status == "completed" or "the keeper" in data.error


TRACED = """
import ctypes
ctypes.CDLL(None).ptrace(0, 0, None, None)  # PTRACE_TRACEME
"""


def test_a_snippet_that_asks_to_be_traced_cleans_up(manager, start, trace):
    id = start(program(TRACED, CLEAN_UP), trace.params)
    data = manager.stop(id).raise_for_error().data
    assert (data.exit_code, data.forced) == (143, False)
    assert "cleaning up\n" in data.output


def test_a_snippet_that_asks_to_be_traced_executes_a_program(run):
    data = run(TRACED + "import os\nos.execv('/bin/echo', ['echo', 'done'])")
    assert (data.status, data.output) == ("completed", "done\n")


NESTED = program("""
deaf()
depth = 0
while depth < params["levels"] and os.fork() == 0:
    os.setsid()
    depth += 1
if depth == params["levels"]:
    os.write(1, b"ready\\n")
time.sleep(600)
""")


@pytest.mark.parametrize(
    "levels, victim",
    (
        (100, "snippet"),
        (100, "keeper"),
        # The kernel takes them down at some milliseconds a level, as they share their memory.
        pytest.param(600, "snippet", marks=pytest.mark.slow),
    ),
)
def test_sessions_within_sessions(manager, start, trace, levels, victim):
    id = start(NESTED, {**trace.params, "levels": levels}, ready=None, timeout=600)
    assert next(manager.follow(id)).text == "ready\n"
    if victim == "keeper":
        trace.noted("keeper")[0].kill()
        answer = manager.wait(id)
    else:
        answer = manager.stop(id, force=True)
    assert answer.success, answer.error
    assert trace.left() == set()


def test_a_chain_of_2000_processes_below_a_launcher_is_killed(monkeypatch):
    """Deeper than a function may recurse."""
    killed = []
    monkeypatch.setattr(procfs, "children", lambda pid: [pid + 1] if pid < 2000 else [])
    monkeypatch.setattr(procfs, "parent_of", lambda pid: pid - 1)
    monkeypatch.setattr(os, "pidfd_open", lambda pid: os.dup(2), raising=False)
    monkeypatch.setattr(
        _signal, "pidfd_send_signal", lambda fd, signum: killed.append(signum), raising=False
    )
    monkeypatch.setattr(signal, "pidfd_send_signal", _signal.pidfd_send_signal, raising=False)
    process = Process.__new__(Process)
    process.pid, process._popen = 0, subprocess.Popen(["sleep", "60"])
    process.kill_tree()
    monkeypatch.undo()  # `subprocess` may use pidfds, too
    assert killed.count(signal.SIGKILL) == 2000
    assert process._popen.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("rounds, stuck", ((900, set()), (1100, {1})), ids=("busy", "held"))
def test_what_is_stuck_is_told_by_rounds_and_not_by_the_clock(monkeypatch, rounds, stuck):
    """On a busy machine a killed process may take seconds until it gets a processor to end."""
    found = iter([{1}] * rounds)
    clock = SimpleNamespace(monotonic=itertools.count(step=1.0).__next__)
    monkeypatch.setattr(sweeping, "time", clock)
    monkeypatch.setattr(kernel, "signal_process", lambda *args: None)
    monkeypatch.setattr(procfs, "signal_below", lambda *args: None)
    assert sweeping.kill_all(lambda: next(found, None), lambda: None, lambda: None) == stuck


@pytest.mark.parametrize("is_reaped, found", ((False, {7, -7, 9}), (True, {9})))
def test_a_group_is_killed_as_one_while_its_number_is_the_snippet_s(is_reaped, found):
    """One by one, 300 processes that fork on and on outrun the sweep."""
    keeper = Keeper.__new__(Keeper)
    keeper._leader, keeper._leader_reaped = 7, is_reaped
    keeper._reap, keeper._strays = bool, lambda: {9}
    assert keeper._find_left() == found


@contextlib.contextmanager
def a_child(script):
    """A shell, and the process whose pid it says."""
    program = ["sh", "-c", "sleep 60 & echo $!; " + script]
    child = subprocess.Popen(program, stdout=subprocess.PIPE, start_new_session=True)
    try:
        yield child, int(child.stdout.readline())
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.mark.parametrize("parent", ("lives", "has ended"))
def test_a_number_that_has_gone_to_a_stranger_is_not_signalled(monkeypatch, parent):
    """It is still in a list of children, and perhaps its parent's number has gone too."""

    def changed_children(pid, children=procfs.children):
        if pid == child.pid:
            return [*children(pid), stranger.pid]
        if pid == below and parent == "has ended":
            os.kill(below, 9)
            eventually(lambda: not os.path.exists(f"/proc/{below}"))
            monkeypatch.setattr(procfs, "parent_of", lambda pid: below)
        return [stranger.pid] if pid == below else []

    monkeypatch.setattr(procfs, "children", changed_children)
    stranger = subprocess.Popen(["sleep", "60"])
    with a_child("wait; sleep 60") as (child, below):
        try:
            procfs.signal_below(child.pid, signal.SIGKILL)
            eventually(lambda: not is_alive(below))
            assert child.poll() is None  # it is for the caller to kill
        finally:
            stranger.terminate()
            assert stranger.wait() == -signal.SIGTERM


def test_nor_does_ctrl_z_signal_what_has_got_the_number_of_a_keeper():
    with a_child("wait $!; echo $?; sleep 60") as (child, below):
        execution = SimpleNamespace(owner=SimpleNamespace(keeper_pid=child.pid))
        run = Run.__new__(Run)
        run._manager = SimpleNamespace(_engine=SimpleNamespace(running=lambda: [execution]))
        run._signal_tree(signal.SIGKILL)
        os.kill(below, signal.SIGTERM)
        assert int(child.stdout.readline()) == 128 + signal.SIGTERM


def test_a_launcher_finds_what_the_list_misses_once_and_signals_nothing_that_it_has_reaped(
    monkeypatch,
):
    """The kernel may leave a child out while another one ends."""
    orphan = subprocess.Popen(["sleep", "60"])
    zombie = subprocess.Popen(["true"])
    eventually(lambda: not is_alive(zombie.pid))
    lists = iter([set(), {orphan.pid, zombie.pid}, {orphan.pid}])
    signalled = set()
    monkeypatch.setattr(
        kernel, "signal_process", lambda pid, signum: (signalled.add(pid), os.kill(pid, signum))
    )
    monkeypatch.setattr(kernel, "children", lambda *args: next(lists, set()))
    launcher = Launcher.__new__(Launcher)
    launcher._children, launcher._keepers, launcher._bystanders = -1, set(), set()
    launcher._quiet_rounds = 0
    try:
        assert sweeping.kill_all(launcher._find_orphans, lambda: None, lambda: None) == set()
        assert signalled == {orphan.pid}
        orphan.wait(10)
    finally:
        orphan.kill()
        orphan.wait(), zombie.wait()


@pytest.mark.parametrize(
    "own, youngest, living, known, found",
    (
        (400, 420, {410, 415}, {410, 415}, {410, 415}),
        (32760, 310, {32767, 305}, set(), {32767}),
        (32760, 310, {305, 32765}, {32765}, {305, 32765}),
        (4194300, 310, {305}, set(), {305}),
        (400, 0, {410}, set(), {410}),
    ),
    ids=("younger", "at the end", "gone round", "gone round late", "none can be forked"),
)
def test_a_search_for_children_without_proc_is_short(
    monkeypatch, own, youngest, living, known, found
):
    tried = []
    monkeypatch.setattr(kernel, "_is_child", lambda pid: tried.append(pid) or pid in living)
    assert kernel._search(own, youngest, known) == found
    assert len(tried) < 40000


def test_a_search_for_children_without_proc_misses_none(monkeypatch):
    living = {200_000, 300_000}
    monkeypatch.setattr(kernel, "_is_child", living.__contains__)
    assert kernel._search(32760, 310, {200_000}) == living


PIDFD_GETFD = 438


@pytest.fixture
def pids(start, trace):
    """An execution's launcher, keeper and snippet; it waits."""
    id = start(program(WAIT), trace.params)
    (keeper,), (snippet,) = trace.noted("keeper"), trace.noted("snippet")
    (launcher,) = [pid for pid in children() if keeper.pid in children(pid)]
    return id, launcher, keeper.pid, snippet.pid


def send_to_own_sockets(pid):
    """Send a byte through each socket that a process has made."""
    with open(os.pidfd_open(pid), "rb", buffering=0) as pidfd:
        for number, name in descriptors(pid).items():
            if name.startswith("socket:"):
                fd = ctypes.CDLL(None).syscall(PIDFD_GETFD, pidfd.fileno(), number, 0)
                if fd < 0:  # it has closed this one meanwhile
                    continue
                with socket.socket(fileno=fd) as end:
                    maker = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4)
                    if int.from_bytes(maker, sys.byteorder) == pid:
                        end.send(b"x")


def test_only_the_end_of_the_lifeline_ends_an_execution(manager, start, pids):
    id, launcher, keeper, snippet = pids
    other = start("import time" + WAIT)
    outputs = [os.readlink(f"/proc/{snippet}/fd/{fd}") for fd in (1, 2)]
    for pid in (keeper, launcher):
        for fd, name in descriptors(pid).items():
            if name.startswith("pipe:") and name not in outputs:
                with contextlib.suppress(FileNotFoundError):
                    pathlib.Path(f"/proc/{pid}/fd/{fd}").write_bytes(b"x")
    send_to_own_sockets(launcher)
    assert manager.wait(id, 0.3).data.status == "running"
    assert manager.wait(other, 0).data.status == "running"
    # It does not spin.
    eventually(lambda: all(state_of(keeper) == "S" for _ in range(20)), timeout=5)


def test_the_processes_have_names_and_sessions(pids):
    """The host's terminal is none of theirs, nor do they get its signals."""
    _, launcher, keeper, snippet = pids
    names = [pathlib.Path(f"/proc/{pid}/comm").read_text() for pid in pids[1:]]
    # The kernel cuts them off after 15 bytes.
    assert names == ["sidexec-launche\n", "sidexec-keeper\n", "sidexec-snippet\n"]
    assert [os.getsid(pid) for pid in pids[1:]] == [launcher, launcher, snippet]
    assert os.getpgid(snippet) == snippet
