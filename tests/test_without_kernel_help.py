"""Where the kernel offers neither subreapers nor pidfds nor /proc: the group is swept."""

import concurrent.futures
import contextlib
import ctypes
import inspect
import os
import threading
import time

import programs
import pytest
from conftest import (
    argument,
    begin,
    children,
    crossed,
    eventually,
    finish,
    nothing_left,
    within,
)
from programs import Trace
from test_host_death import die, running_host

import sidexec
from sidexec.engine import payload

GRACE = 2.0  # that only what is deaf waits out
MOMENT = 10.0  # that only a hang uses up
PR_SET_CHILD_SUBREAPER = 36

# What a platform without them would answer, put after the real functions.
WITHOUT = {
    "kernel": """

def become_subreaper():
    return False

def children(fd, known=()):
    return set()
""",
    "procfs": """

def is_ours():
    return False

def open_pidfd(pid):
    return None
""",
}

IN_GROUP = ("plain", "deaf", "stopped")


@contextlib.contextmanager
def taken_away(without=WITHOUT):
    """Add code to modules of the other side, by their names."""
    load = payload.load

    def variant(as_source=False):
        texts = {name: text for name, _, text in load(True)}
        for name, is_package, code in load(as_source):
            more = without.get(name.rpartition(".")[2])
            if more is not None:
                code = texts[name] + more
                if not as_source:
                    code = compile(code, name, "exec", dont_inherit=True)
            yield name, is_package, code

    payload.load = lambda as_source=False: [*variant(as_source)]
    try:
        yield
    finally:
        payload.load = load


@contextlib.contextmanager
def orphans_reaped():
    """As by an init that is quick; some look for orphans every two seconds only."""
    prctl = ctypes.CDLL(None).prctl
    over = threading.Event()

    def reap():
        while not over.wait(0.005):
            for pid in children():
                with contextlib.suppress(OSError):
                    # Launchers are in sessions of their own, other children of ours in ours.
                    if os.getsid(pid) not in (pid, os.getsid(0)):
                        os.waitpid(pid, os.WNOHANG)

    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reaper = threading.Thread(target=reap)
    reaper.start()
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        over.set()
        reaper.join()


@pytest.fixture(autouse=True)
def without_help():
    with taken_away():
        yield


@pytest.fixture
def manager(without_help):
    with nothing_left():
        with sidexec.ExecutionManager(grace_period=GRACE, default_timeout=60.0) as manager:
            yield manager


def test_it_is_what_runs(manager, trace):
    """The orphan of an execution under way is no child of its keeper here."""
    id = begin(manager, programs.with_descendant("daemon"), trace.params)
    (daemon,) = trace.noted("descendant")
    (keeper,) = trace.noted("keeper")
    assert daemon.pid not in children(keeper.pid)
    manager.stop(id)
    daemon.kill()


# For each end: what ends the snippet, and the status, error, exit code and reason then.
ENDS = {
    "return": ('return {"done": True}', "completed", None, 0, None),
    "exception": ('raise RuntimeError("no")', "failed", "RuntimeError: no", 1, None),
    "os._exit": ("os._exit(7)", "failed", "exit code 7", 7, None),
    "SIGKILL": ("os.kill(os.getpid(), 9)\ntime.sleep(60)", "failed", "killed by SIGKILL", -9, None),
    "graceful_stop": (programs.CLEAN_UP, "stopped", None, 143, "requested"),
    "forced_stop": (programs.WAIT, "stopped", None, -9, "requested"),
    "timeout": (programs.WAIT, "stopped", None, 143, "timeout"),
}


def bring_to_its_end(manager, trace, kind, end):
    """The final answer, and which processes of the group were alive when it came."""
    code = programs.with_descendant(kind, ENDS[end][0])
    for timeout in (0.5, 20.0):  # a busy machine may need longer to get ready
        if end.endswith("stop"):
            id = begin(manager, code, trace.params)
            manager.stop(id, force=end == "forced_stop")
        else:
            timeout = timeout if end == "timeout" else None
            id = manager.start_with_code(code, trace.params, timeout).id
        answer = manager.wait(id, 60)
        if trace.noted("descendant"):
            break
    return answer, [each for each in group(trace) if each.is_alive]


def group(trace):
    return trace.noted("descendant") + trace.noted("snippet")


@pytest.fixture(scope="module")
def ends(request, tmp_path_factory):
    """All pairs that are selected, side by side."""
    with taken_away(), nothing_left(), orphans_reaped(), contextlib.ExitStack() as stack:
        manager = sidexec.ExecutionManager(grace_period=GRACE, default_timeout=60.0)
        stack.enter_context(manager)
        pairs = [
            (argument(item, "kind"), argument(item, "end"))
            for item in request.session.items
            if item.module is request.module and "ends" in item.fixturenames
        ]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(pairs)))
        found = {}
        for pair in pairs:
            trace = Trace(tmp_path_factory.mktemp("trace"))
            stack.callback(trace.kill)
            found[pair] = trace, pool.submit(bring_to_its_end, manager, trace, *pair)
        return {pair: (trace, *future.result()) for pair, (trace, future) in found.items()}


@pytest.mark.parametrize("kind, end", crossed(3, IN_GROUP, ENDS))
def test_every_end_sweeps_the_group(ends, kind, end):
    trace, answer, alive = ends[kind, end]
    assert answer.success, answer.error
    assert alive == []
    assert len(group(trace)) >= 2
    data = answer.data
    error = data.error and data.error.splitlines()[0]
    assert (data.status, error, data.exit_code, data.stop_reason) == ENDS[end][1:]
    assert data.result == ({"done": True} if end == "return" else None)
    if end == "graceful_stop":
        assert data.output == "ready\ncleaning up\n" + "x" * 200_000 + "\n"
        assert len(trace.noted("cleaned")) == 1


def test_a_daemon_that_holds_the_pipes_does_not_hold_up_the_end(manager, trace):
    id = begin(manager, programs.with_descendant("pipe_holder"), trace.params)
    with within(GRACE + 10):
        stopped = manager.stop(id)
    assert (stopped.success, stopped.data.status) == (True, "stopped")
    trace.kill()  # left, as nothing but the group can be told here


def test_a_stray_that_leaves_when_asked_ends_the_sweep(trace):
    """Nobody is told of its end here, so the keeper looks again and again."""
    code = programs.with_descendant("plain", "return 1")
    with nothing_left(), orphans_reaped():
        with sidexec.ExecutionManager(grace_period=60.0) as manager:
            answer = manager.wait(manager.start_with_code(code, trace.params).id, 30)
            assert (answer.data.status, answer.data.result) == ("completed", 1)


@pytest.mark.slow
def test_a_zombie_in_the_group_is_not_taken_for_a_process_that_cannot_be_killed(manager, trace):
    """Its parent, in a session of its own, never reaps it: signal 0 still finds the group."""
    code = programs.program("""
def body():
    quiet()
    in_child(lambda: note("zombie"))
    os.setsid()
    linger("descendant")
in_child(body)
wait_for_note("descendant")
wait_for_note("zombie")
return 1
""")
    answer = manager.wait(manager.start_with_code(code, trace.params).id, 30)
    (zombie,) = trace.noted("zombie")
    assert zombie.state == "Z"
    trace.kill()
    assert answer.success, answer.error
    assert (answer.data.status, answer.data.result) == ("completed", 1)


def test_a_killed_keeper(manager, trace):
    id = begin(manager, programs.with_descendant("deaf"), trace.params)
    trace.noted("keeper")[0].kill()
    data = manager.wait(id, 30).data
    assert data.status == "failed"
    assert "the keeper" in data.error and "SIGKILL" in data.error
    eventually(lambda: not any(each.is_alive for each in trace.noted()))
    assert finish(manager, "return 5").result == 5


# -- the host's death: the control sockets, and the launcher's look at its parent

PRELUDE = f"""
import contextlib
from sidexec.engine import payload
{inspect.getsource(taken_away).replace("=WITHOUT", f"={WITHOUT!r}")}
help_is_gone = taken_away()
help_is_gone.__enter__()
"""


SLOW = [
    pytest.param(kind, has_worker, marks=pytest.mark.slow)
    for kind, has_worker in (("plain", False), ("deaf", True), ("deaf", False))
]


@pytest.mark.parametrize("kind, has_worker", [("plain", True), *SLOW])
def test_the_hosts_death_is_noticed(trace, kind, has_worker):
    code = programs.with_descendant(kind, programs.CLEAN_UP)
    options = {"grace": GRACE, "options": has_worker * ["worker"], "prelude": PRELUDE}
    with orphans_reaped():
        with running_host(trace, code, **options) as (host, others, worker):
            assert len(others) >= 4  # the launcher, the keeper, the snippet, its child
            die(host)
            deadline = time.monotonic() + GRACE + MOMENT
            while time.monotonic() < deadline and any(each.is_alive for each in group(trace)):
                time.sleep(0.01)
            assert [each for each in group(trace) if each.is_alive] == []
            assert len(trace.noted("cleaned")) == 1
            # Until init has reaped the group, a keeper can't tell its zombies from a member.
            eventually(lambda: not any(each.is_alive for each in others))
            for each in others:  # which are reaped but for the launcher
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(each.pid, 0)
        eventually(lambda: worker is None or not worker.exists)
