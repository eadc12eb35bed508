"""Keepers and launchers that are killed or stopped by somebody else."""

import contextlib
import gc
import os
import signal
import threading
import time

import programs
import pytest
from conftest import children, eventually, nothing_left
from programs import Process, Trace
from test_without_kernel_help import taken_away

import sidexec
from sidexec.engine import thread

GRACE = 0.5
# How long past its grace a stop may take when the keeper itself does not answer.
WITHOUT_KEEPER = 9.0

TREE = (
    programs.PRELUDE
    + programs.DESCENDANTS["deaf"]
    + programs.DESCENDANTS["daemon"]
    + programs.DESCENDANTS["daemon_without_environment"]
    + """
while True:
    with open("pids") as file:
        if file.read().count("descendant") == 3:
            break
    time.sleep(0.001)
"""
)
KILL_KEEPER = "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)\n"


@pytest.fixture
def manager():
    with nothing_left():
        with sidexec.ExecutionManager(grace_period=GRACE, default_timeout=60.0) as manager:
            yield manager


@pytest.fixture
def launcher_of(manager):
    """The manager's launchers: the host's children that were not there before."""
    before = set(children())

    def launcher_of():
        found = [Process(pid) for pid in set(children()) - before if Process(pid).is_alive]
        assert len(found) == 1
        return found[0]

    return launcher_of


def begin(manager, trace, code=TREE + programs.WAIT):
    started = manager.start_with_code(code, trace.params).raise_for_error()
    id = started.data.side_execution_id
    eventually(
        lambda: (
            "ready\n" in manager.get_status(id).data.output
            or manager.get_status(id).data.status != "running"
        )
    )
    assert manager.get_status(id).data.status == "running", manager.get_status(id)
    return id


def check_that_it_goes_on(manager):
    started = manager.start_with_code("print('fine')\nreturn 5").raise_for_error()
    data = manager.wait(started.data.side_execution_id, 30).data
    assert (data.status, data.result, data.output) == ("completed", 5, "fine\n")


# -- the keeper is killed


def test_a_keeper_killed_by_its_snippet(manager, trace):
    started = manager.start_with_code(TREE + KILL_KEEPER, trace.params).raise_for_error()
    data = manager.wait(started.data.side_execution_id, 30).data
    left = trace.left()
    (keeper,) = trace.noted("keeper")
    assert data.status == "failed"
    gone = f"the keeper (pid {keeper.pid}) of this execution is gone"
    assert data.error == f"{gone}: killed by SIGKILL"
    assert left == set()
    assert len(trace.noted("descendant")) == 3
    check_that_it_goes_on(manager)


def test_a_keeper_killed_by_anybody_harms_no_other_execution(manager, tmp_path):
    with contextlib.ExitStack() as stack:
        traces = [Trace(tmp_path / name) for name in ("one", "other")]
        for trace in traces:
            stack.callback(trace.kill)
        one, other = (begin(manager, trace) for trace in traces)
        traces[0].noted("keeper")[0].kill()
        data = manager.wait(one, 30).data
        assert data.status == "failed"
        assert "keeper" in data.error and "SIGKILL" in data.error
        assert traces[0].left() == set()
        assert manager.get_status(other).data.status == "running"
        assert all(each.is_alive for each in traces[1].noted())
        stopped = manager.stop(other)
        assert (stopped.success, stopped.data.status) == (True, "stopped")
        assert traces[1].left() == set()
        check_that_it_goes_on(manager)


def test_a_keeper_killed_during_a_stop(manager, trace):
    code = (
        programs.PRELUDE
        + programs.DESCENDANTS["deaf"]
        + programs.STARTED
        + """
deaf()
print("ready", flush=True)
while True:
    time.sleep(60)
"""
    )
    id = begin(manager, trace, code)
    manager.get_status(id)
    (keeper,) = trace.noted("keeper")
    # In the midst of the grace period, as the snippet is deaf.
    killer = threading.Timer(0.3, keeper.kill)
    killer.start()
    stopped = manager.stop(id)
    killer.join()
    assert trace.left() == set()
    assert stopped.data.status == "stopped"
    check_that_it_goes_on(manager)


def test_output_written_before_the_keeper_was_killed_is_there(manager, trace):
    code = programs.PRELUDE + 'os.write(1, b"x" * 50_000)\n' + KILL_KEEPER
    started = manager.start_with_code(code, trace.params).raise_for_error()
    data = manager.wait(started.data.side_execution_id, 30).data
    assert (data.status, len(data.output)) == ("failed", 50_000)
    assert trace.left() == set()


def test_processes_of_preloaded_modules_survive_the_sweep(tmp_path):
    (tmp_path / "starts_a_helper.py").write_text(
        "import subprocess\nhelper = subprocess.Popen(['/bin/sleep', '60'])\n"
    )
    trace = Trace(tmp_path / "trace")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    manager = sidexec.ExecutionManager(env=env, preload=["starts_a_helper"], grace_period=GRACE)
    with nothing_left(), manager:
        code = TREE + "import starts_a_helper\nnote('helper', starts_a_helper.helper.pid)\n"
        started = manager.start_with_code(code + KILL_KEEPER, trace.params).raise_for_error()
        manager.wait(started.data.side_execution_id, 30)
        (helper,) = trace.noted("helper")
        assert helper.is_alive
        assert all(not each.exists for each in trace.noted("descendant"))
        helper.kill()


# -- the launcher is killed


def test_a_killed_launcher(manager, trace, launcher_of):
    id = begin(manager, trace)
    launcher = launcher_of()
    launcher.kill()
    data = manager.wait(id, 30).data
    left = trace.left()
    assert data.status == "failed"
    assert data.error == (
        f"the launcher (pid {launcher.pid}) of this execution is gone: killed by SIGKILL"
    )
    assert left == set()
    check_that_it_goes_on(manager)
    assert launcher_of().pid != launcher.pid


def test_a_killed_launcher_lets_its_executions_clean_up(manager, trace, launcher_of):
    id = begin(manager, trace, programs.PRELUDE + programs.CLEAN_UP)
    launcher_of().kill()
    data = manager.wait(id, 30).data
    assert data.status == "failed"
    assert trace.left() == set()
    assert len(trace.noted("cleaned")) == 1
    assert data.output == "ready\ncleaning up\n" + "x" * 200_000 + "\n"


def test_a_launcher_killed_at_once_with_a_stop(manager, trace, launcher_of):
    id = begin(manager, trace)
    launcher_of().kill()
    stopped = manager.stop(id)
    assert trace.left() == set()
    assert stopped.data.status in ("stopped", "failed")
    check_that_it_goes_on(manager)


def test_a_launcher_that_is_stopped_harms_no_stop(manager, trace, launcher_of):
    id = begin(manager, trace)
    launcher = launcher_of()
    launcher.kill(signal.SIGSTOP)
    try:
        stopped = manager.stop(id)
        assert (stopped.success, stopped.data.status) == (True, "stopped")
        assert trace.left() == set()
    finally:
        launcher.kill(signal.SIGCONT)
    check_that_it_goes_on(manager)


@pytest.mark.slow
def test_close_ends_a_launcher_that_is_stopped(trace):
    with nothing_left():
        before = set(children())
        with sidexec.ExecutionManager(grace_period=GRACE) as manager:
            id = begin(manager, trace)
            (pid,) = set(children()) - before
            Process(pid).kill(signal.SIGSTOP)
            began = time.monotonic()
        assert time.monotonic() - began < GRACE + WITHOUT_KEEPER
        assert manager.get_status(id).data.stop_reason == "closed"
        assert trace.left() == set()


# -- both


@pytest.mark.parametrize("first", ("keeper", "launcher"))
def test_keeper_and_launcher_killed_together(manager, trace, launcher_of, first):
    code = programs.PRELUDE + programs.DESCENDANTS["deaf"] + programs.STARTED + programs.WAIT
    id = begin(manager, trace, code)
    both = [trace.noted("keeper")[0], launcher_of()]
    for each in both if first == "keeper" else reversed(both):
        each.kill()
    data = manager.wait(id, 30).data
    assert data.status == "failed"
    assert "is gone" in data.error or "are gone" in data.error
    # Whoever is their parent now may still have to reap them.
    eventually(lambda: not any(each.is_alive for each in trace.noted()))
    check_that_it_goes_on(manager)


# -- they fail by a fault of their own


def broken(name):
    module, _, method = name.rpartition(".")
    module, _, owner = module.rpartition(".")
    text = f"def broken(*args): raise ZeroDivisionError('on purpose')\n{owner}.{method} = broken\n"
    return taken_away({module: "\n\n" + text})


def check_that_it_is_told(fault, error, caplog):
    assert "ZeroDivisionError('on purpose')" in error and f" {fault}" in error
    logged = [each for each in caplog.records if each.levelname == "ERROR"]
    assert [error in each.getMessage() for each in logged] == [True]


@pytest.mark.parametrize(
    "method, force, status", (("_ask_strays", False, "failed"), ("_kill_all", True, "stopped"))
)
def test_what_a_keeper_fails_of_is_told(trace, caplog, method, force, status):
    with broken(f"keeper.Keeper.{method}"), nothing_left():
        with sidexec.ExecutionManager(grace_period=GRACE) as manager:
            id = begin(manager, trace, programs.with_descendant("daemon"))
            if force:
                manager.stop(id, force=True)
            else:
                trace.noted("snippet")[0].kill()
            data = manager.wait(id, 30).data
            assert trace.left() == set()
    assert data.status == status
    (keeper,) = trace.noted("keeper")
    assert f"the keeper (pid {keeper.pid})" in data.error
    check_that_it_is_told("_serve", data.error, caplog)


def test_what_a_launcher_fails_of_is_told(trace, caplog):
    with broken("launcher.Launcher._warm_up"), nothing_left():
        with sidexec.ExecutionManager(grace_period=GRACE) as manager:
            started = manager.start_with_code(TREE + programs.WAIT, trace.params)
            data = manager.wait(started.data.side_execution_id, 30).data
            assert trace.left() == set()
    assert data.status == "failed"
    assert data.error.startswith("the launcher (pid ")
    check_that_it_is_told("_step", data.error, caplog)


# -- stopped and idle ones


def test_a_stopped_keeper_does_not_hold_up_a_stop(manager, trace, monkeypatch):
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 1.0)
    id = begin(manager, trace)
    trace.noted("keeper")[0].kill(signal.SIGSTOP)
    began = time.monotonic()
    stopped = manager.stop(id)
    took = time.monotonic() - began
    left = trace.left()
    assert stopped.data.status == "stopped"
    assert took < GRACE + WITHOUT_KEEPER
    assert left == set()
    check_that_it_goes_on(manager)


@pytest.mark.parametrize("victim", ("keeper", "snippet"))
def test_a_killed_spare(manager, launcher_of, victim):
    check_that_it_goes_on(manager)
    launcher = launcher_of()
    # The spare is there when its keeper has a snippet, which waits.
    keeper = eventually(lambda: [pid for pid in children(launcher.pid) if children(pid)])[0]
    snippet = children(keeper)[0]
    found = Process(keeper if victim == "keeper" else snippet)
    found.kill()
    eventually(lambda: not found.exists)
    check_that_it_goes_on(manager)
    check_that_it_goes_on(manager)


@pytest.mark.parametrize("victim", ("keeper", "snippet"))
def test_a_spare_killed_at_the_very_moment_of_a_start(manager, launcher_of, victim):
    for _ in range(20):
        check_that_it_goes_on(manager)
        launcher = launcher_of()
        keepers = eventually(lambda: [pid for pid in children(launcher.pid) if children(pid)])
        snippets = children(keepers[0])
        if not snippets:
            continue
        os.kill(keepers[0] if victim == "keeper" else snippets[0], signal.SIGKILL)
        answer = manager.start_with_code("return 1")
        assert answer.success or answer.error
        if answer.success:
            data = manager.wait(answer.data.side_execution_id, 30).data
            assert data.status in ("completed", "failed")
            assert data.status == "completed" or "SIGKILL" in data.error
    check_that_it_goes_on(manager)


def test_a_spare_killed_when_no_start_follows(trace):
    with nothing_left():
        before = set(children())
        with sidexec.ExecutionManager(grace_period=GRACE) as manager:
            check_that_it_goes_on(manager)
            (launcher,) = set(children()) - before
            keeper = eventually(lambda: [pid for pid in children(launcher) if children(pid)])[0]
            os.kill(keeper, signal.SIGKILL)


# -- what the kernel holds

FREEZER = "/sys/fs/cgroup/freezer"


@contextlib.contextmanager
def freezer():
    """Freezes processes so that no signal ends them: a function that takes a pid."""
    group = f"{FREEZER}/sidexec-test-{os.getpid()}"
    os.mkdir(group)

    def write(name, text):
        with open(f"{group}/{name}", "w") as file:
            file.write(text)

    def is_frozen():
        with open(f"{group}/freezer.state") as file:
            return file.read() == "FROZEN\n"

    def freeze(pid):
        write("cgroup.procs", str(pid))
        write("freezer.state", "FROZEN")
        eventually(is_frozen)

    def is_empty():
        with open(f"{group}/cgroup.procs") as file:
            return not file.read()

    freeze.thaw = lambda: write("freezer.state", "THAWED")
    try:
        yield freeze
    finally:
        freeze.thaw()
        eventually(is_empty)
        os.rmdir(group)


needs_freezer = pytest.mark.skipif(
    not os.access(f"{FREEZER}/cgroup.procs", os.W_OK),
    reason="no writable freezer of cgroup v1, so no process that SIGKILL does not end",
)


@needs_freezer
@pytest.mark.slow
@pytest.mark.parametrize("name", ("snippet", "descendant"))
def test_a_process_that_cannot_be_killed_is_named(trace, name):
    with nothing_left(), sidexec.ExecutionManager(grace_period=0.2) as manager:
        id = begin(manager, trace, programs.with_descendant("daemon"))
        (held,) = trace.noted(name)
        with freezer() as freeze:
            freeze(held.pid)
            stopped = manager.stop(id)
            assert held.is_alive
            assert stopped.success is False
            assert str(held.pid) in stopped.error
            assert stopped.data.status == "stopped" and stopped.data.forced
            status = manager.get_status(id)
            assert status.success is False and str(held.pid) in status.error
            check_that_it_goes_on(manager)
            freeze.thaw()
            eventually(lambda: not held.exists)
        eventually(lambda: trace.left() == set())


@needs_freezer
@pytest.mark.slow
def test_a_stray_that_cannot_be_killed_is_named_when_its_keeper_was_killed(trace):
    with nothing_left(), sidexec.ExecutionManager(grace_period=0.2) as manager:
        id = begin(manager, trace, programs.with_descendant("daemon"))
        (held,) = trace.noted("descendant")
        with freezer() as freeze:
            freeze(held.pid)
            trace.noted("keeper")[0].kill()
            status = manager.wait(id, 30)
            assert status.data.status == "failed"
            assert status.success is False and str(held.pid) in status.error
            freeze.thaw()
        eventually(lambda: trace.left() == set())
        check_that_it_goes_on(manager)


@needs_freezer
@pytest.mark.slow
def test_what_one_execution_has_left_is_not_told_of_another(trace, tmp_path):
    with nothing_left(), sidexec.ExecutionManager(grace_period=0.2) as manager:
        id = begin(manager, trace, programs.with_descendant("daemon"))
        (held,) = trace.noted("descendant")
        with freezer() as freeze:
            freeze(held.pid)
            assert str(held.pid) in manager.stop(id).error
            started = manager.start_with_code(
                programs.PRELUDE + KILL_KEEPER, Trace(tmp_path / "other").params
            )
            answer = manager.wait(started.data.side_execution_id, 30)
            assert answer.success and "SIGKILL" in answer.data.error
            freeze.thaw()
        eventually(lambda: trace.left() == set())


@needs_freezer
@pytest.mark.slow
def test_what_is_below_a_process_that_cannot_be_killed_is_killed(trace):
    code = (
        programs.PRELUDE
        + """
def body():
    os.setsid()
    in_child(lambda: linger("below"))
    linger("held")
in_child(body)
wait_for_note("below")
wait_for_note("held")
"""
        + programs.WAIT
    )
    with nothing_left(), sidexec.ExecutionManager(grace_period=0.2) as manager:
        id = begin(manager, trace, code)
        (held,), (below,) = trace.noted("held"), trace.noted("below")
        with freezer() as freeze:
            freeze(held.pid)
            stopped = manager.stop(id)
            assert not below.is_alive
            assert stopped.error == (
                f"the kernel does not let go of process {held.pid}: end it by hand, if it can be"
            )
            freeze.thaw()
        eventually(lambda: trace.left() == set())


@needs_freezer
@pytest.mark.slow
def test_close_does_not_wait_for_what_cannot_be_killed(trace):
    with freezer() as freeze:
        manager = sidexec.ExecutionManager(grace_period=0.2)
        id = begin(manager, trace, programs.with_descendant("daemon"))
        (held,) = trace.noted("descendant")
        freeze(held.pid)
        began = time.monotonic()
        manager.close()
        assert time.monotonic() - began < 20
        status = manager.get_status(id)
        assert status.success is False and str(held.pid) in status.error
        freeze.thaw()
        eventually(lambda: not held.is_alive)


@needs_freezer
@pytest.mark.slow
def test_close_does_not_wait_for_a_launcher_that_cannot_be_killed(launcher_of, manager):
    check_that_it_goes_on(manager)
    launcher = launcher_of()
    with freezer() as freeze:
        freeze(launcher.pid)
        began = time.monotonic()
        manager.close()
        assert time.monotonic() - began < 25
        freeze.thaw()
        os.waitpid(launcher.pid, 0)  # nobody waits for it any more
    gc.collect()  # and nobody says that it is still there
