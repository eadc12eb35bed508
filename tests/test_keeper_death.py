"""Keepers and launchers that are killed or stopped by somebody else."""

import contextlib
import gc
import os
import signal
import threading

import pytest
from conftest import (
    begin,
    children,
    eventually,
    finish,
    has_printed,
    nothing_left,
    state_of,
    within,
)
from programs import (
    CLEAN_UP,
    DESCENDANTS,
    PRELUDE,
    STARTED,
    STUBBORN,
    WAIT,
    Process,
    Trace,
    program,
    spawned,
    with_descendant,
)
from test_without_kernel_help import taken_away

import sidexec
from sidexec.engine import thread
from sidexec.engine.launcher import Launcher
from sidexec.engine.pair import Pair

GRACE = 0.25
# How long past its grace a stop may take when the keeper itself does not answer.
WITHOUT_KEEPER = 9.0

TREE = program(
    *(DESCENDANTS[kind] for kind in ("deaf", "daemon", "daemon_without_environment")),
    """
while True:
    with open("pids") as file:
        if file.read().count("descendant") == 3:
            break
    time.sleep(0.001)
""",
)
KILL_KEEPER = "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)\n"


@pytest.fixture
def manager(request):
    grace = getattr(request, "param", GRACE)
    with nothing_left():
        with sidexec.ExecutionManager(grace_period=grace, default_timeout=60.0) as manager:
            yield manager


@pytest.fixture
def launcher_of(manager):
    """The manager's launchers: the host's children that were not there before."""
    before = set(children())

    def launcher_of():
        (found,) = [each for each in map(Process, set(children()) - before) if each.is_alive]
        return found

    return launcher_of


def check_that_it_goes_on(manager):
    data = finish(manager, "print('fine')\nreturn 5")
    assert (data.status, data.result, data.output) == ("completed", 5, "fine\n")


def gone(who, pid):
    return f"the {who} (pid {pid}) of this execution is gone: killed by SIGKILL"


# -- the keeper is killed


def test_a_killed_keeper_harms_no_other_execution(manager, tmp_path, monkeypatch):
    # The launcher's word ends it, not that time is up.
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 60.0)
    with contextlib.ExitStack() as stack:
        traces = [Trace(tmp_path / name) for name in ("one", "other")]
        for trace in traces:
            stack.callback(trace.kill)
        other = begin(manager, TREE + WAIT, traces[1].params)
        code = TREE + 'os.write(1, b"x" * 50_000)\n' + KILL_KEEPER
        data = finish(manager, code, traces[0].params)
        (keeper,) = traces[0].noted("keeper")
        assert (data.status, data.error) == ("failed", gone("keeper", keeper.pid))
        assert (traces[0].left(), len(data.output)) == (set(), 50_000)
        assert manager.get_status(other).data.status == "running"
        assert all(each.is_alive for each in traces[1].noted())
        stopped = manager.stop(other)
        assert (stopped.success, stopped.data.status) == (True, "stopped")
        assert traces[1].left() == set()
        check_that_it_goes_on(manager)


@pytest.mark.parametrize("manager", [60.0], indirect=True)
def test_a_keeper_killed_during_a_stop(manager, trace):
    id = begin(manager, with_descendant("deaf", STUBBORN), trace.params)
    manager.future(id).cancel()  # asks, and does not wait
    has_printed(manager, id, "asked\n")
    trace.noted("keeper")[0].kill()
    assert manager.wait(id, 30).data.status == "stopped"
    assert trace.left() == set()
    check_that_it_goes_on(manager)


def test_processes_of_preloaded_modules_survive_the_sweep(preloading, trace):
    source = "import subprocess\nhelper = subprocess.Popen(['/bin/sleep', '60'])\n"
    manager = preloading({"starts_a_helper": source}, grace_period=GRACE)
    code = TREE + "import starts_a_helper\nnote('helper', starts_a_helper.helper.pid)\n"
    finish(manager, code + KILL_KEEPER, trace.params)
    (helper,) = trace.noted("helper")
    assert helper.is_alive
    assert all(not each.exists for each in trace.noted("descendant"))
    helper.kill()


# -- the launcher is killed


def test_a_killed_launcher(manager, trace, launcher_of):
    id = begin(manager, TREE + WAIT, trace.params)
    launcher = launcher_of()
    launcher.kill()
    data = manager.wait(id, 30).data
    assert trace.left() == set()
    assert (data.status, data.error) == ("failed", gone("launcher", launcher.pid))
    check_that_it_goes_on(manager)
    assert launcher_of().pid != launcher.pid


@pytest.mark.parametrize("manager", [10.0], indirect=True)
def test_a_killed_launcher_lets_its_executions_clean_up(manager, trace, launcher_of):
    id = begin(manager, program(CLEAN_UP), trace.params)
    launcher_of().kill()
    data = manager.wait(id, 30).data
    assert data.status == "failed"
    assert trace.left() == set()
    assert len(trace.noted("cleaned")) == 1
    assert data.output == "ready\ncleaning up\n" + "x" * 200_000 + "\n"


def test_a_killed_launcher_is_named_also_where_its_end_is_seen_last(
    manager, launcher_of, monkeypatch
):
    asked = threading.Event()
    end, why_ended = Launcher._end, Launcher.why_ended
    monkeypatch.setattr(Launcher, "_end", lambda self: asked.wait(20) and end(self))
    monkeypatch.setattr(Launcher, "why_ended", lambda self: asked.set() or why_ended(self))
    id = begin(manager, "import time" + WAIT)
    launcher = launcher_of()
    launcher.kill()
    assert manager.wait(id, 30).data.error == gone("launcher", launcher.pid)


def test_a_launcher_killed_at_once_with_a_stop(manager, trace, launcher_of):
    id = begin(manager, TREE + WAIT, trace.params)
    launcher_of().kill()
    stopped = manager.stop(id)
    assert trace.left() == set()
    assert stopped.data.status in ("stopped", "failed")
    check_that_it_goes_on(manager)


def test_a_handler_of_the_snippets_own_runs_once_when_its_launcher_is_gone(manager, launcher_of):
    code = "import signal, time\nsignal.signal(signal.SIGTERM, lambda *args: print('asked'))\n"
    id = begin(manager, code + WAIT)
    launcher_of().kill()
    has_printed(manager, id, "asked")
    assert manager.stop(id, grace=1).data.output == "ready\nasked\n"


def test_a_launcher_that_is_stopped_harms_neither_stop_nor_close(manager, trace, launcher_of):
    other = begin(manager, "import time" + WAIT)
    id = begin(manager, TREE + WAIT, trace.params)
    launcher_of().kill(signal.SIGSTOP)
    stopped = manager.stop(id)
    assert (stopped.success, stopped.data.status) == (True, "stopped")
    assert trace.left() == set()
    with within(GRACE + WITHOUT_KEEPER):
        manager.close()
    assert manager.get_status(other).data.stop_reason == "closed"


# -- both


@pytest.mark.parametrize("first", ("keeper", "launcher"))
def test_keeper_and_launcher_killed_together(manager, trace, launcher_of, first, monkeypatch):
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 60.0)  # their end is heard of, not waited for
    id = begin(manager, with_descendant("deaf"), trace.params)
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


def check_that_it_is_told(manager, fault, error, caplog):
    def logged():
        return [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]

    manager.close()
    assert "ZeroDivisionError('on purpose')" in error and f" {fault}" in error
    eventually(logged)  # which it is when everybody has been told
    assert [error in each for each in logged()] == [True]


@pytest.mark.parametrize(
    "method, force, status, is_late",
    (
        ("_ask_strays", False, "failed", False),
        ("_ask_strays", False, "failed", True),
        ("_kill_all", True, "stopped", False),
    ),
)
def test_what_a_keeper_fails_of_is_told(
    manager, trace, caplog, monkeypatch, method, force, status, is_late
):
    def wait_for_both(pair, *args, **options):
        """What the launcher says of it is there before its own words are read."""
        found = wait(pair, *args, **options)
        if pair.control_fd not in found:
            return found
        eventually(lambda: pair.lost)
        return []

    wait = Pair.wait
    if is_late:
        monkeypatch.setattr(Pair, "wait", wait_for_both)
    with broken(f"keeper.Keeper.{method}"):
        id = begin(manager, with_descendant("daemon"), trace.params)
        if force:
            manager.stop(id, force=True)
        else:
            trace.noted("snippet")[0].kill()
        data = manager.wait(id, 30).data
        assert trace.left() == set()
    assert data.status == status
    (keeper,) = trace.noted("keeper")
    assert f"the keeper (pid {keeper.pid})" in data.error
    check_that_it_is_told(manager, "_serve", data.error, caplog)


def test_what_a_launcher_fails_of_is_told(manager, trace, caplog):
    with broken("launcher.Launcher._warm_up"):
        data = finish(manager, TREE + WAIT, trace.params)
        assert trace.left() == set()
    assert data.status == "failed"
    assert data.error.startswith("the launcher (pid ")
    check_that_it_is_told(manager, "_step", data.error, caplog)


HALF_A_PAIR = """

def _fork(self, **options):
    ends = _socket.socketpair()
    rights = b"".join(each.fileno().to_bytes(4, sys.byteorder) for each in ends)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)]
    self._socket.sendmsg([pack(PAIR, b"1 0")[:3]], ancillary)
    os._exit(1)
Launcher._fork = _fork
"""


def test_descriptors_that_come_with_a_launchers_last_words_are_closed(manager):
    with taken_away({"launcher": HALF_A_PAIR}):
        assert "is gone: exit code 1" in manager.start_with_code("pass").error


# -- stopped and idle ones


def test_a_stopped_keeper_does_not_hold_up_a_stop(manager, trace, monkeypatch):
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 0.3)
    id = begin(manager, TREE + WAIT, trace.params)
    trace.noted("keeper")[0].kill(signal.SIGSTOP)
    future = manager.future(id)
    future.cancel()  # a stop that fails rather than hangs
    assert future.result(GRACE + WITHOUT_KEEPER).data.status == "stopped"
    assert trace.left() == set()
    check_that_it_goes_on(manager)


def spare_of(manager, launcher_of, whom):
    """The keeper or snippet that waits for a request.

    If the one before was lost while it came, there is none until an execution has begun.
    """

    def waits(pid):  # until then, it may hold the keeper's end of its socket
        return state_of(pid) == "S"

    def keepers():
        return [pid for pid in children(launcher_of().pid) if any(map(waits, children(pid)))]

    def keepers_after_a_start():
        check_that_it_goes_on(manager)
        with contextlib.suppress(AssertionError):
            return eventually(keepers, timeout=1)

    keeper = eventually(keepers_after_a_start)[0]
    return Process(keeper if whom == "keeper" else (children(keeper) or [0])[0])


@pytest.mark.parametrize("victim", ("keeper", "snippet"))
def test_a_killed_spare(manager, launcher_of, victim):
    for _ in range(2):  # at last, no start follows
        found = spare_of(manager, launcher_of, victim)
        found.kill()
        eventually(lambda: not found.exists)


@pytest.mark.parametrize("victim", ("keeper", "snippet"))
def test_a_spare_killed_at_the_very_moment_of_a_start(manager, launcher_of, victim):
    for _ in range(20):
        found = spare_of(manager, launcher_of, victim)
        found.kill()
        answer = manager.start_with_code("return 1")
        if answer.success:
            data = manager.wait(answer.id, 30).data
            failed = data.status == "failed" and "SIGKILL" in data.error
            assert failed or data.status == "completed"
        eventually(lambda: not found.exists)  # or it may yet be the next one's pair
    check_that_it_goes_on(manager)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["keeper", "launcher"])
def test_a_sweep_takes_as_long_as_it_takes(manager, trace, monkeypatch, who):
    """Who sweeps says so, and is not taken for one that does not answer."""
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 2.0)
    killed = []
    monkeypatch.setattr(Launcher, "kill_keeper", lambda launcher, pid: killed.append(pid))
    slow = """
SIGN_INTERVAL = 0.1
def kill_slowly(find, *arguments, rounds=[True] * 60, kill_all=kill_all):
    def find_slowly():
        time.sleep(0.1)
        return set() if rounds and rounds.pop() else find()
    return kill_all(find_slowly, *arguments)
kill_all = kill_slowly
"""
    with taken_away({"sweeping": slow}):
        id = begin(manager, TREE + WAIT, trace.params)
        if who == "launcher":
            trace.noted("keeper")[0].kill()
        stopped = manager.stop(id, force=True)
    assert (stopped.success, killed, trace.left()) == (True, [], set())


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


@pytest.fixture
def hold(trace):
    """Start an execution of a hasty manager, one process of which is held until the test is over."""
    with nothing_left(), sidexec.ExecutionManager(grace_period=0.2) as manager:
        with freezer() as freeze:

            def hold(name):
                lines = 'in_child(lambda: linger("below"))', 'linger("descendant")'
                code = program(spawned("daemon", *lines), 'wait_for_note("below")\n', STARTED, WAIT)
                id = begin(manager, code, trace.params)
                (process,) = trace.noted(name)
                freeze(process.pid)
                return manager, id, process

            yield hold
        eventually(lambda: trace.left() == set())


def names(answer, process):
    reason = f"process {process.pid} can't be killed, the kernel holds it: end it by hand"
    return (answer.success, answer.error) == (False, reason)


@needs_freezer
@pytest.mark.slow
@pytest.mark.parametrize("name", ("snippet", "descendant"))
def test_a_process_that_cannot_be_killed_is_named(hold, trace, tmp_path, name):
    manager, id, process = hold(name)
    stopped = manager.stop(id)
    assert process.is_alive and names(stopped, process)
    assert not trace.noted("below")[0].is_alive
    assert stopped.data.status == "stopped" and stopped.data.forced
    other = finish(manager, PRELUDE + KILL_KEEPER, Trace(tmp_path / "other").params)
    assert "SIGKILL" in other.error  # nor is it told of any other execution
    with within(20):
        manager.close()
    assert names(manager.get_status(id), process)


@needs_freezer
@pytest.mark.slow
def test_a_stray_that_cannot_be_killed_is_named_when_its_keeper_was_killed(hold, trace):
    manager, id, process = hold("descendant")
    trace.noted("keeper")[0].kill()
    status = manager.wait(id, 30)
    assert status.data.status == "failed" and names(status, process)
    check_that_it_goes_on(manager)


@needs_freezer
@pytest.mark.slow
def test_close_does_not_wait_for_a_launcher_that_cannot_be_killed(launcher_of, manager):
    check_that_it_goes_on(manager)
    launcher = launcher_of()
    with freezer() as freeze:
        freeze(launcher.pid)
        with within(25):
            manager.close()
        freeze.thaw()
        os.waitpid(launcher.pid, 0)  # nobody waits for it any more
    gc.collect()  # and nobody says that it is still there
