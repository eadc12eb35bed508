"""The engine under a host, or with processes, that do not do what they should."""

import _imp
import collections
import copy
import gc
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import (
    FOREVER,
    begin,
    children,
    descriptors,
    eventually,
    finish,
    is_alive,
    state_of,
    within,
)
from test_misbehaving_hosts import host  # noqa: F401
from test_untrusted import CHANNEL
from test_without_kernel_help import taken_away

import sidexec
from sidexec import protocol
from sidexec.engine import engine, thread
from sidexec.engine.delivery import Delivery
from sidexec.engine.launcher import Launcher
from sidexec.engine.pair import Pair
from sidexec.engine.process import Process
from sidexec.engine.requests import Requests
from sidexec.engine.waiting import Bell


def result_of(manager, code):
    return finish(manager, code).result


# -- starts that would hang


@pytest.fixture
def looks_often(monkeypatch):
    """A start looks ten times a second whether what it waits for has been stopped."""
    for name in ("engine", "launcher", "pair"):
        monkeypatch.setattr(f"sidexec.engine.{name}.LOOK_INTERVAL", 0.1)


@pytest.fixture
def launcher_of(make_manager, looks_often):
    """A manager, and the pid of its launcher, which has forked a pair ahead of need."""
    before = set(children())
    # An environment of its own: pytest changes that of this process from phase to phase.
    manager = make_manager(grace_period=1, env=dict(os.environ))
    assert result_of(manager, "return 1") == 1
    (launcher,) = set(children()) - before
    eventually(lambda: children(launcher))
    return manager, launcher


def spare_of(manager):
    (launcher,) = manager._engine._launchers
    return eventually(lambda: [*launcher.requests._spares])[0]


@pytest.fixture
def with_spare(launcher_of):
    """A manager, and the pair that its launcher has forked ahead of need."""
    manager, _ = launcher_of
    return manager, spare_of(manager)


def test_a_launcher_whose_host_has_ended_does_not_take_another_process_for_it(manager, monkeypatch):
    """The host's number may be somebody else's when the launcher comes up."""

    def make(self, python, environment, config, make=Process.__init__):
        make(self, python, environment, {**config, "host": os.getppid()})

    monkeypatch.setattr(Process, "__init__", make)
    started = manager.start_with_code("pass")
    assert not started.success and "did not start (exit code 0)" in started.error


@pytest.mark.parametrize("runs", [False, True])
def test_a_launcher_that_is_stopped_fails_one_start(launcher_of, runs):
    manager, launcher = launcher_of
    running = manager.start_with_code(FOREVER).id
    if not runs:
        manager.stop(running)
    os.kill(launcher, signal.SIGSTOP)
    for _ in range(3):  # the first ones take what pairs are there
        started = manager.start_with_code("pass")
        if not started.success:
            break
    assert not started.success and f"pid {launcher}) was stopped" in started.error
    assert result_of(manager, "return 2") == 2
    if runs:
        assert manager.get_status(running).data.status == "running"
        assert manager.stop(running).data.status == "stopped"


def test_a_launcher_that_is_killed_while_nothing_runs_is_followed_by_another(launcher_of):
    manager, launcher = launcher_of
    os.kill(launcher, signal.SIGKILL)
    eventually(lambda: launcher not in children())
    assert result_of(manager, "return 2") == 2


def test_an_interpreter_that_is_stopped_while_it_comes_up(make_manager, looks_often, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -STOP $$\n")
    python.chmod(0o755)
    manager = make_manager(python=python)
    started = manager.start_with_code("pass")
    assert not started.success and "was stopped by a signal" in started.error
    python.unlink()
    python.symlink_to(sys.executable)
    assert result_of(manager, "return 1") == 1


def test_a_keeper_that_is_stopped_before_it_is_ready(make_manager, looks_often, tmp_path):
    flag = tmp_path / "stop"
    stop = f"""
def stop_first(self, kind, *args, send=Keeper._send):
    if kind == READY and os.path.exists({str(flag)!r}): os.kill(os.getpid(), 19)
    send(self, kind, *args)
Keeper._send = stop_first
"""
    flag.touch()
    with taken_away({"keeper": stop}):
        manager = make_manager(grace_period=1)
        started = manager.start_with_code("pass")
        assert not started.success and "stopped by a signal before it was ready" in started.error
        flag.unlink()
        assert result_of(manager, "return 1") == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_a_spare_that_ends_as_it_is_handed_a_request(launcher_of, stopped):
    manager, launcher = launcher_of
    spare = spare_of(manager)
    for pid in (launcher, spare.snippet_pid):  # which close what is the keeper's
        eventually(lambda pid=pid: state_of(pid) == "S")
    if stopped:
        os.kill(launcher, signal.SIGSTOP)
    os.kill(spare.keeper_pid, signal.SIGKILL)
    eventually(lambda: not is_alive(spare.keeper_pid))
    data = manager.run("return 2").data
    assert data.result == (None if stopped else 2)
    assert not stopped or f"pid {launcher}) was stopped by a signal" in data.error


def test_a_spare_that_is_released_as_it_is_handed_a_request(with_spare, monkeypatch):
    manager, _ = with_spare
    released = []

    def release_first(pair, execution):
        if not released:
            released.append(pair)
            pair.release()
            eventually(lambda: not pair.reads(pair.channel))  # closed by its thread
        return hand_over(pair, execution)

    hand_over = Pair.hand_over
    monkeypatch.setattr(Pair, "hand_over", release_first)
    assert result_of(manager, "return 2") == 2
    assert len(released) == 1


def test_a_spare_that_is_being_released_as_it_is_handed_a_request(with_spare, monkeypatch):
    manager, _ = with_spare
    looked = threading.Event()
    is_gone, caller = Pair.is_gone, threading.get_ident()

    def release_it(pair):
        if looked.is_set():
            return is_gone(pair)
        pair.release()
        return False

    def get(pair):
        if threading.get_ident() == caller:
            looked.set()
        return vars(pair).get("is_released", False)

    def set_late(pair, value):
        # Its thread has waited in vain, and says so only when the call has looked.
        if value:
            looked.wait(10)
        vars(pair)["is_released"] = value

    monkeypatch.setattr(Pair, "is_gone", release_it)
    monkeypatch.setattr(Pair, "_is_released", property(get, set_late), raising=False)
    id = manager.start_with_code("return 2").id
    assert manager.wait(id, 20).data.result == 2


def test_a_snippet_that_is_killed_before_its_pair_is_ready_takes_no_request(manager, monkeypatch):
    read = Pair.read_control

    def kill_first(pair):
        frames, is_open = read(pair)
        monkeypatch.setattr(Pair, "read_control", read)
        os.kill(int(frames[-1][1].split()[0]), signal.SIGKILL)
        while frames[-1][0] != protocol.END:
            frames += read(pair)[0]
        return frames, is_open

    monkeypatch.setattr(Pair, "read_control", kill_first)
    assert "ended before it was ready" in manager.start_with_code("pass").error
    assert result_of(manager, "return 1") == 1


def test_a_spare_whose_snippet_is_gone_is_not_taken_though_its_keeper_has_not_said_so(with_spare):
    manager, spare = with_spare
    os.kill(spare.keeper_pid, signal.SIGSTOP)
    os.kill(spare.snippet_pid, signal.SIGKILL)
    eventually(spare.is_gone)  # the launcher holds the channel for a moment as well
    with within(20):
        assert result_of(manager, "return 2") == 2


@pytest.fixture
def with_lost_spare(with_spare, monkeypatch):
    """A manager whose next request is handed to a spare pair that is gone by then.

    It is placed anew, and the launcher takes no requests any more: `prepare` comes before that.
    """
    manager, spare = with_spare
    is_gone, hand_over = Pair.is_gone, Pair.hand_over
    promised = threading.Event()
    prepare = []

    def hand_over_when_lost(pair, execution):
        os.kill(spare.keeper_pid, signal.SIGKILL)
        eventually(lambda: is_gone(pair))
        manager._engine._launchers[0].is_up = False
        prepare.pop()()
        return hand_over(pair, execution)

    def start(code, preparation):
        prepare.append(preparation)
        started = manager.start_with_code(code)
        promised.set()
        return started.id

    monkeypatch.setattr(Pair, "hand_over", hand_over_when_lost)
    monkeypatch.setattr(Pair, "is_gone", lambda pair: promised.wait(10) and is_gone(pair))
    return manager, start


def test_a_request_that_no_thread_is_left_to_place_anew_fails(with_lost_spare, monkeypatch):
    manager, start = with_lost_spare
    boot = Launcher.boot

    def fail(launcher):
        if launcher._unstarted:
            raise RuntimeError("can't start new thread")

    id = start("return 1", lambda: monkeypatch.setattr(Launcher, "boot", fail))
    with within(10):
        data = manager.wait(id, 20).data
    with within(10):
        manager.close()
    monkeypatch.setattr(Launcher, "boot", boot)
    assert data.status == "failed" and "can't start new thread" in data.error
    assert manager.stop(id, force=True).data.status == "failed"


def test_a_stop_is_not_held_up_by_a_request_that_is_placed_anew(with_lost_spare, tmp_path):
    manager, start = with_lost_spare
    engine = manager._engine
    settings = engine._settings._replace(python=never_up(tmp_path))
    id = start("return 1", lambda: setattr(engine, "_settings", settings))
    with within(20):
        assert manager.stop(id, force=True).data.status == "stopped"


def never_up(directory):
    """An interpreter that is not up until there is a file `end`, and then fails."""
    python = directory / "python"
    python.write_text(f"#!/bin/sh\nwhile [ ! -e {directory}/end ]; do sleep 0.01; done\nexit 3\n")
    python.chmod(0o755)
    return str(python)


def test_whoever_waits_for_a_start_that_then_fails_is_told(make_manager, tmp_path):
    manager = make_manager(python=never_up(tmp_path))
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(manager.start_with_code, "pass")
        id = eventually(lambda: manager.list_executions().data.executions)[0].side_execution_id
        waiting = pool.submit(manager.wait, id)
        following = pool.submit(list, manager.follow(id))
        done = manager.future(id)
        (tmp_path / "end").touch()
        assert not starting.result(20).success
        assert waiting.result(20).data.status == "not_found"
        assert following.result(20) == []
        assert isinstance(done.exception(20), sidexec.SideExecutionError)


def test_a_start_that_comes_while_a_manager_is_closed_leaves_no_launcher(make_manager, monkeypatch):
    manager = make_manager()
    launcher_for = manager._engine._launcher

    def close_first(*arguments):
        manager.close()
        return launcher_for(*arguments)

    monkeypatch.setattr(manager._engine, "_launcher", close_first)
    assert "closed" in manager.start_with_code("pass").error
    eventually(lambda: not manager._engine._launchers)


def test_a_pair_that_takes_its_request_just_as_its_manager_is_closed_is_stopped(
    with_spare, monkeypatch
):
    manager, _ = with_spare
    listed, submitted = threading.Event(), threading.Event()
    running, submit = manager._engine.running, Launcher.submit

    def list_early():
        found = running()
        listed.set()
        submitted.wait(20)
        return found

    def submit_late(launcher, execution):
        pool.submit(manager.close)
        listed.wait(20)
        is_placed = submit(launcher, execution)
        eventually(execution.is_decided)
        submitted.set()
        return is_placed

    monkeypatch.setattr(manager._engine, "running", list_early)
    monkeypatch.setattr(Launcher, "submit", submit_late)
    with ThreadPoolExecutor() as pool:
        id = manager.start_with_code(FOREVER).id
        monkeypatch.undo()
        try:
            data = manager.wait(id, 10).data
        finally:
            manager.close()
    assert (data.status, data.stop_reason) == ("stopped", "closed")


@pytest.mark.parametrize("before, after, is_known", [(0, 1, True), (2, 0, False)])
def test_an_execution_that_ends_before_its_start_knows_of_it_is_counted_once(
    make_manager, monkeypatch, before, after, is_known
):
    manager = make_manager(max_history=2)
    engine = manager._engine
    know, caller = engine.know, threading.get_ident()

    def know_late(execution):
        if threading.get_ident() == caller:
            eventually(execution.is_through)
            monkeypatch.setattr(engine, "know", know)
            for _ in range(before):
                manager.run("pass")
        know(execution)

    assert manager.run("pass").success
    spare_of(manager)
    monkeypatch.setattr(engine, "know", know_late)
    id = manager.start_with_code("pass").id
    for _ in range(after):
        manager.run("pass")
    assert (manager.get_status(id).data.status != "not_found") is is_known
    assert manager.list_executions("running").data.count == 0


def test_an_internal_error_fails_one_execution(manager, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(thread._Run, "_hear_snippet", lambda *args: 1 / 0)
        data = manager.run("print()").data
    assert (data.status, data.error) == ("failed", "internal error: see the log")
    eventually(lambda: "ZeroDivisionError" in caplog.text)
    assert result_of(manager, "return 1") == 1


def test_a_first_start_within_another_shares_its_launcher(make_manager, monkeypatch):
    """As one by a signal handler, or by another thread."""
    manager = make_manager()
    make = engine.Launcher

    def start_first(*arguments):
        monkeypatch.setattr(engine, "Launcher", make)
        begin(manager, FOREVER)
        return make(*arguments)

    monkeypatch.setattr(engine, "Launcher", start_first)
    begin(manager, FOREVER)
    assert len(manager._engine._launchers) == 1


@pytest.mark.parametrize("step", ["know", "wait"])
def test_a_run_that_is_interrupted_is_stopped(with_spare, monkeypatch, step):
    """As its request has just been handed over, and while its end is waited for."""
    manager, _ = with_spare
    call, caller = getattr(manager._engine, step), threading.get_ident()

    def interrupt(*args):
        if threading.get_ident() != caller:
            return call(*args)  # the thread that begins it knows it, too
        monkeypatch.setattr(manager._engine, step, call)
        raise KeyboardInterrupt

    monkeypatch.setattr(manager._engine, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        manager.run(FOREVER)
    assert manager.list_executions().data.executions[-1].status == "stopped"
    assert manager.list_executions("running").data.count == 0


def test_a_spare_that_a_handler_keeps_from_its_request_is_released(with_spare, monkeypatch):
    manager, spare = with_spare
    with monkeypatch.context() as patch:
        patch.setattr(Pair, "hand_over", lambda pair, execution: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            manager.start_with_code("pass")
    eventually(lambda: not spare.reads(spare.channel))
    assert result_of(manager, "return 2") == 2


def test_a_start_needs_no_lock_of_the_import_system(with_spare):
    """A handler that raises in `importlib` leaves it taken, on Python 3.10 for one."""
    manager, _ = with_spare
    with ThreadPoolExecutor() as pool:
        _imp.acquire_lock()
        try:
            assert pool.submit(result_of, manager, "return 2").result(20) == 2
        finally:
            _imp.release_lock()


@pytest.mark.parametrize("use", ["wait", "on_output", "future", "stop"])
def test_what_is_forgotten_is_freed_at_once(make_manager, use):
    manager = make_manager(max_history=2)
    on_output = (lambda chunk: None) if use == "on_output" else None
    executions, futures = [], []
    gc.disable()
    try:
        for _ in range(10):
            id = begin(manager, "input()", stdin=subprocess.PIPE, ready="", on_output=on_output)
            executions.append(weakref.ref(manager._engine.executions[id]))
            if use == "future":
                futures.append(manager.future(id))  # which the host may keep
            if use == "stop":
                manager.stop(id)
            else:
                manager.send_input(id, "x\n")
            manager.wait(id)
        eventually(lambda: sum(each() is not None for each in executions) <= 3)
    finally:
        gc.enable()


# -- what a snippet sends


HOSTILE = r"""
threading.stack_size(256 * 1024)
sys.setrecursionlimit(10**6)
manager = sidexec.ExecutionManager()
for data in ('b"[" * 10**5 + b"]" * 10**5', "b'{\"a\":' * 10**5"):
    status = manager.run(f"{sys.argv[2]}\nsend(frame(b'v', {data}))").data
    assert (status.status, status.result) == ("failed", None), status
value = [[[{"a": ["[" * 1000, "\\", '"[[', "\\\\", []]}]]]
assert manager.run("return params['value']", {"value": value}).data.result == value
manager.close()
report("done")
"""


def test_nesting_harms_no_host_whatever_its_stacks_and_its_recursion_limit(host):
    assert host(HOSTILE, CHANNEL) == "done"


# -- executions run as the host is


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="takes root")
def test_who_has_dropped_its_privileges_runs_no_snippet_with_them(host, tmp_path):
    tmp_path.chmod(0o755)
    script = """
    import os
    manager = sidexec.ExecutionManager(cwd="/")
    code = "import os; return [os.getresuid(), os.getresgid(), os.getgroups(), os.umask(0)]"
    found = [manager.run(code).data.result]
    os.umask(0o027)
    found.append(manager.run(code).data.result)
    os.setgroups([12345])
    found.append(manager.run(code).data.result)
    manager.close()
    report(found)
    """
    first, second, third = host(script)
    assert second == [*first[:3], 0o027]
    assert third == [first[0], first[1], [12345], 0o027]


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="takes root")
def test_a_manager_is_closed_although_its_launcher_is_another_user_s_by_now(host, tmp_path):
    (tmp_path / "slow_to_load.py").write_text("import time\ntime.sleep(2)\n")
    script = """
    import os, sys, threading, time
    manager = sidexec.ExecutionManager(
        preload=["slow_to_load"], env={**os.environ, "PYTHONPATH": sys.argv[2]}
    )
    threading.Thread(target=manager.start_with_code, args=("pass",)).start()
    while not any(each._process for each in manager._engine._launchers): time.sleep(0.01)
    report("before")  # afterwards it could write no file here
    os.setresuid(1234, 1234, 1234)
    manager.close()
    """
    assert host(script, tmp_path) == "before"


def test_who_has_changed_its_limits_runs_snippets_with_those(host):
    script = """
    import resource
    limit = lambda: list(resource.getrlimit(resource.RLIMIT_NOFILE))
    manager = sidexec.ExecutionManager()
    code = "import resource; return resource.getrlimit(resource.RLIMIT_NOFILE)"
    soft, hard = limit()
    found = []
    for soft in (soft, 100, soft - 1):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        found.append([manager.run(code).data.result, limit()])
    manager.close()
    report(found)
    """
    for found, expected in host(script):
        assert found == expected


# -- on_output at the end


@pytest.mark.parametrize("end", ["stop", "close"])
def test_what_on_output_never_got_is_logged(make_manager, caplog, end):
    is_called, release = threading.Event(), threading.Event()
    manager = make_manager(grace_period=60)
    id = manager.start_with_code(
        "import time\nprint('x' * 999)\ninput()\nprint('x' * 18_999)\ntime.sleep(60)",
        on_output=lambda chunk: (is_called.set(), release.wait(60)),
        stdin=subprocess.PIPE,
    ).id
    assert is_called.wait(30)
    manager.send_input(id, "\n")
    eventually(lambda: len(manager.get_status(id).data.output) == 20_000)
    manager.future(id).cancel()  # a callback that never returns holds up no stop
    eventually(lambda: manager.get_status(id).data.exit_code == 143)
    with caplog.at_level(logging.WARNING), within(30):
        manager.stop(id, grace=0.1) if end == "stop" else manager.close(grace=0.1)
    release.set()
    (record,) = [each for each in caplog.records if "never got" in each.message]
    assert record.levelname == "WARNING" and id in record.message
    assert int(record.message.split()[-2]) in (19_000, 19_001)  # `print` writes twice


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="which has no such fault")
def test_no_thread_is_left_to_end_when_a_manager_is_closed(make_manager, monkeypatch):
    """Python 3.10 may crash if the interpreter ends while a thread does."""
    monkeypatch.setattr(Delivery, "_log_loss", lambda self, size: time.sleep(0.02))  # the last
    before = len(os.listdir("/proc/self/task"))
    for _ in range(50):
        with make_manager() as manager:
            id = begin(manager, "print('ready')", on_output=lambda chunk: None)
            assert manager.wait(id).data.status == "completed"
        assert len(os.listdir("/proc/self/task")) <= before


def test_what_a_keeper_has_said_is_heard_before_it_is_judged(make_manager, monkeypatch):
    """On a busy machine a thread may lose seconds between its wait and its look at the clock."""
    wait, killed = Pair.wait, []

    def starve(self, until, *, only_urgent):
        found = wait(self, until, only_urgent=only_urgent)
        if self.deadline is not None:  # late just when the keeper's words are there
            eventually(lambda: select.select([self.control_fd], [], [], 0)[0])
            time.sleep(0.2)
        return found

    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 0.1)
    monkeypatch.setattr(Pair, "wait", starve)
    monkeypatch.setattr(Launcher, "kill_keeper", lambda self, pid: killed.append(pid))
    manager = make_manager()
    id = begin(manager, FOREVER)
    assert manager.stop(id, force=True).data.status == "stopped"
    assert killed == []


def test_managers_are_closed_side_by_side_and_each_three_times_at_once(make_manager):
    with ThreadPoolExecutor(6) as pool:
        for _ in range(8):
            managers = [make_manager() for _ in range(2)]
            for manager in managers:
                assert result_of(manager, "return 1") == 1
            list(pool.map(lambda manager: manager.close(), managers * 3))


# -- logs that raise


class Raising(logging.Handler):
    """As the default one does where `sys.stderr` is closed."""

    def emit(self, record):
        raise ValueError("I/O operation on closed file.")


@pytest.fixture
def raising_log(monkeypatch):
    """Handlers that raise; what raises in the end of a thread would be shown."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    handler, loggers = Raising(), [logging.getLogger(), logging.getLogger("sidexec")]
    for each in loggers:
        each.addHandler(handler)
    yield
    for each in loggers:
        each.removeHandler(handler)
    assert shown == []


def raise_error(*args):
    raise ZeroDivisionError


def test_where_the_log_raises_all_callbacks_are_called_though_they_raise(manager, raising_log):
    got, done = [], []

    def on_output(chunk):
        got.append(chunk)
        raise_error()

    id = begin(manager, FOREVER, on_output=on_output)
    futures = [manager.future(id) for _ in range(3)]
    for each in futures:
        each.add_done_callback(lambda each: done.append(each) or raise_error())
    assert manager.stop(id).data.status == "stopped"
    assert [each.result(20).data.status for each in futures] == ["stopped"] * 3
    eventually(lambda: done == futures and got)


def test_where_the_log_raises_what_on_output_loses_keeps_no_stop(manager, raising_log):
    over = threading.Event()
    ids = [
        begin(manager, FOREVER, on_output=lambda chunk: over.wait(60)),
        begin(manager, FOREVER, on_output=lambda chunk: over.wait(60)),
    ]
    for id in ids:
        eventually(lambda id=id: manager._engine.executions[id].delivery._taken)
        manager._engine.executions[id].delivery.put("stdout", b"never passed on")
    try:
        assert [each.data.status for each in manager.stop_all(grace=0.1)] == ["stopped"] * 2
    finally:
        over.set()


def test_where_the_log_raises_a_launcher_or_a_pair_that_fails_keeps_nobody(
    make_manager, preloading, monkeypatch, raising_log
):
    manager = preloading({"no_forks": "import os; os.fork = None"})
    with within(20):
        assert "has failed" in manager.start_with_code("pass").error
        manager.close()
    manager = make_manager()
    with monkeypatch.context() as patch, within(20):
        patch.setattr(Process, "hear", raise_error)
        assert "internal error" in manager.start_with_code("pass").error
    with monkeypatch.context() as patch, within(20):
        patch.setattr(Pair, "watch", raise_error)
        assert manager.run("pass").data.error == "internal error: see the log"


# -- threads that are none


# As gevent does it: what would block a thread is replaced, the originals can be had.
PATCHED = r"""
import types, _thread, queue, select, selectors, socket, subprocess, time
originals = {}
def forbidden(*args, **options):
    raise AssertionError("a function that is patched was called")
def patch():
    monkey = types.ModuleType("gevent.monkey")
    def get_original(module, name):
        return originals.get((module, name)) or getattr(sys.modules[module], name)
    monkey.get_original = get_original
    sys.modules["gevent.monkey"] = monkey  # first: threads of ours are at work meanwhile
    for module, name in (
        (_thread, "start_new_thread"), (threading, "Thread"), (queue, "SimpleQueue"),
        (select, "poll"), (selectors, "DefaultSelector"), (socket, "socketpair"),
        (subprocess, "Popen"), (os, "posix_spawn"), (os, "fork"), (time, "sleep"),
    ):
        originals[module.__name__, name] = getattr(module, name)
        setattr(module, name, forbidden)
    subprocess._fork_exec = None
    originals["_thread", "allocate_lock"] = _thread.allocate_lock
    _thread.allocate_lock = Lock
class Lock:
    # gevent's raises LoopExit where all greenlets wait without a limit.
    def __init__(self):
        self._lock = originals["_thread", "allocate_lock"]()
        self.release = self._lock.release
    def acquire(self, blocking=True, timeout=-1):
        if blocking and timeout < 0 and self._lock.locked():
            raise AssertionError("a wait without a limit")
        return self._lock.acquire(blocking, timeout)
    def __enter__(self):
        return self.acquire()
    def __exit__(self, *exc_info):
        self.release()
mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
place = os.path.dirname(sys.argv[1])
with open(os.path.join(place, "ends_late.py"), "w") as file:
    file.write("import atexit, time\natexit.register(time.sleep, 0.2)")
environment = {**os.environ, "PYTHONPATH": place}
manager = sidexec.ExecutionManager(grace_period=5, preload=["ends_late"], env=environment)
raised, before = [], len(os.listdir("/proc/self/task"))
sys.unraisablehook = lambda unraisable: raised.append(unraisable.exc_value)
def run(n):
    got = []
    data = manager.run("print(1); return params['n']", {"n": n}, on_output=got.append).data
    assert (data.result, data.output, got[0].text[:1]) == (n, "1\n", "1"), (data, got)
if sys.argv[2] == "after":
    run(0)
patch()
for n in range(5):
    run(n)
code = "import time\ntry: print('up', flush=True); time.sleep(60)\nfinally: print('down')"
id = manager.start_with_code(code).id
while manager.get_status(id).data.output != "up\n":
    originals["time", "sleep"](0.005)
assert manager.stop(id).data.output == "up\ndown\n"
manager.close()
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
while len(os.listdir("/proc/self/task")) > before:
    originals["time", "sleep"](0.005)
assert raised == []
report("done")
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_works_where_gevent_has_patched_the_standard_library(host, when):
    assert host(PATCHED, when) == "done"


def test_where_eventlet_has_patched_threads_a_start_says_so(manager, monkeypatch):
    patcher = type(sys)("eventlet.patcher")
    patcher.is_monkey_patched = lambda name: name == "thread"
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    started = manager.start_with_code("pass")
    assert not started.success and "monkey_patch(thread=False)" in started.error


# -- managers


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_manager_can_not_be_copied(manager, make):
    with pytest.raises(TypeError, match="make one where it is used"):
        make(manager)


def test_a_manager_says_how_many_run(make_manager):
    manager = make_manager()
    manager.start_with_code(FOREVER)
    assert repr(manager) == "<ExecutionManager, 1 running>"
    manager.close()
    assert repr(manager) == "<ExecutionManager, closed>"


def test_the_descriptors_of_an_execution_are_closed_when_its_end_is_told(launcher_of):
    manager, launcher = launcher_of
    ids = [begin(manager, FOREVER) for _ in range(2)]
    (pairs,) = [each._pairs for each in manager._engine._launchers]
    eventually(lambda: len(pairs) == 3 and all(pair.ready_at for pair in pairs.values()))
    left = len(descriptors())
    for id in ids:
        left -= 5  # the control socket, the channel, both outputs and what wakes the thread
        told = []

        def is_told(done, left=left, told=told):
            # The call that has woken the thread may let go of the last one a moment later.
            told.append(eventually(lambda: len(descriptors()) == left, 5))

        manager.future(id).add_done_callback(is_told)
        manager.stop(id)
        eventually(lambda told=told: told)


class Interrupt(Exception):
    pass


def test_a_start_that_is_interrupted_while_it_asks_for_a_pair_takes_none_from_the_next(
    manager, monkeypatch
):
    env = {**os.environ, "OWN": "1"}  # for which no pair is forked ahead
    begin(manager, FOREVER, env=env)

    def interrupt(*args):
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(Launcher, "_send", interrupt)
        with pytest.raises(Interrupt):
            manager.start_with_code("pass", env=env)
    assert manager.run("return 1", env=env).data.result == 1


class Request:
    """As much of an execution as `Requests` knows of."""

    refusal = place = None

    def claim(self, owner):
        return True

    def refuse(self, reason):
        self.refusal = reason


class ReadyPair:
    execution = None

    def __init__(self, is_ahead):
        self.is_ahead = is_ahead

    def is_gone(self):
        return False

    def wait_for_request(self):
        return self.execution

    def hand_over(self, execution):
        self.execution = execution
        return True


def open_requests(ask=bool, keeps_spare=True):
    requests = Requests(ask)
    requests.keeps_spare = keeps_spare
    requests.open()
    return requests


def test_a_pair_that_fails_refuses_no_request_for_which_another_comes():
    requests = open_requests(keeps_spare=False)
    first, second = Request(), Request()
    requests.put(first)
    assert requests.take(ReadyPair(is_ahead=True)) is first  # so one pair too many comes
    requests.put(second)
    requests.miss(False, "the first")
    assert second.refusal is None
    requests.miss(False, "the second")
    assert second.refusal == "the second"


def test_one_pair_is_kept_ahead_and_no_more():
    asked = []
    requests = open_requests(asked.append, keeps_spare=False)
    requests.take(ReadyPair(is_ahead=False))
    assert not requests._spares  # nothing is to be kept yet
    requests.keeps_spare = True
    requests.fork_ahead()
    requests.fork_ahead()  # one is on its way
    requests.take(ReadyPair(is_ahead=True))
    requests.fork_ahead()
    requests.take(ReadyPair(is_ahead=False))  # its request went to another pair
    assert (asked, len(requests._spares)) == ([protocol.FORK_AHEAD], 1)


def test_no_pair_is_forked_ahead_where_one_comes_whose_request_has_gone_to_another():
    asked = []
    requests = open_requests(asked.append)
    requests.put(Request())
    requests.take(ReadyPair(is_ahead=True))
    requests.fork_ahead()
    assert asked == [protocol.FORK]


def test_a_handler_that_raises_as_a_pair_is_asked_for_leaves_none_to_wait_for():
    asked = []
    requests = open_requests(lambda frame: asked.append(frame) or 1 / (len(asked) - 1))
    with pytest.raises(ZeroDivisionError):
        requests.put(Request())
    requests.refuse_all("")
    requests.fork_ahead()
    assert asked == [protocol.FORK, protocol.FORK_AHEAD]


@pytest.mark.parametrize("moment", ["put", "close"])
def test_what_comes_as_a_pair_is_made_the_spare_one_is_seen(moment):
    class Spares(collections.deque):
        def append(self, pair):
            requests.put(request) if moment == "put" else requests.close()
            super().append(pair)

    requests, request = open_requests(), Request()
    requests._spares = Spares()
    taken = requests.take(ReadyPair(is_ahead=True))
    assert (taken, len(requests._spares)) == (request if moment == "put" else None, 0)


def test_a_spare_pair_may_be_taken_at_once():
    class Spares(collections.deque):
        def append(self, pair):
            super().append(pair)
            assert requests.put(first)
            assert not requests.put(second)

    requests, first, second = open_requests(), Request(), Request()
    requests._spares = Spares()
    assert requests.take(ReadyPair(is_ahead=True)) is first


def test_a_request_that_waits_for_a_launcher_that_is_let_go_of_is_placed_anew():
    requests, request, placed = Requests(bool), Request(), []
    request.place = lambda: placed.append(request)
    requests.put(request)
    requests.close()
    assert requests.take(ReadyPair(is_ahead=False)) is None
    assert placed == [request]


def test_what_another_thread_takes_in_the_same_step_is_passed_over():
    def gone(kind):
        """There when it is looked at, and taken just then."""

        class Gone(kind):
            def __bool__(self):
                was_there = len(self) > 0
                self.clear()
                return was_there

        return Gone

    def come_and_raise(frame):
        requests.take(ReadyPair(is_ahead=False))
        raise Interrupt

    requests, bell = Requests(come_and_raise), Bell()
    requests._wanted = gone(collections.deque)([None])
    requests.open()
    assert not requests._coming
    requests._waiting = gone(collections.deque)([Request()])
    assert requests.take(ReadyPair(is_ahead=False)) is None
    bell._waiting = gone(dict)({1: None})
    bell.ring()
    requests._wanted = collections.deque()
    with pytest.raises(Interrupt):
        requests.put(Request())
