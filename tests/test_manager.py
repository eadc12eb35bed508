"""The manager's methods and the states of its executions."""

import concurrent.futures
import contextlib
import functools
import gc
import glob
import inspect
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
from conftest import eventually, is_alive, nothing_left, tree

import sidexec
import sidexec.engine.engine
from sidexec import ExecutionManager, Limits, SideExecutionError

FOREVER = "import time\nprint('ready')\ntime.sleep(600)"
# Is asked, says so, and stays.
STUBBORN = """
import time
word = 'ready'
while True:
    try:
        if word:
            text, word = word, None
            print(text)
        time.sleep(600)
    except SystemExit:
        print('asked')
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('ready')
while True: time.sleep(600)
"""


def has_printed(manager, id, text):
    eventually(lambda: text in manager.get_status(id).data.output)


@contextlib.contextmanager
def within(seconds):
    """A bound that only a hang breaks, or a grace period that should not count."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


# -- starting


def test_a_start_returns_at_once_with_what_was_started(manager):
    params = {"n": [1, {"a": None}]}
    with within(20):
        response = manager.start_with_code("import time; time.sleep(600)", params, 40.0)
    data = response.data
    assert response.success and response.error is None
    assert isinstance(data.side_execution_id, str) and data.side_execution_id
    assert data.code == "import time; time.sleep(600)"
    assert data.action_block is None
    assert data.status == "running"
    assert data.params == params
    assert data.timeout == 40.0
    assert data.start_time.utcoffset().total_seconds() == 0
    assert abs(data.start_time.timestamp() - time.time()) < 20


def test_an_action_block_is_started_with_params_and_timeout(manager, tmp_path):
    (tmp_path / "block.py").write_text("return params['n'] + 1")
    path = str(tmp_path / "block.py")
    response = manager.start_with_action_block(path, {"n": 1}, 30, thread_id="t")
    assert response.data.action_block == path
    assert response.data.code is None
    assert response.data.timeout == 30
    status = manager.wait(response.data.side_execution_id)
    assert status.data.result == 2
    assert status.thread_id == "t"


def test_ids_are_all_different(manager):
    ids = {manager.start_with_code("pass").data.side_execution_id for _ in range(20)}
    assert len(ids) == 20


def test_params_are_a_copy(run, manager):
    params = {"list": [1]}
    response = manager.start_with_code("import sys\nsys.stdin.read()\nreturn params", params)
    params["list"].append(2)
    assert response.data.params == {"list": [1]}
    assert manager.wait(response.data.side_execution_id).data.result == {"list": [1]}


def test_without_params_there_is_an_empty_dict(run, manager):
    assert run("return params").result == {}
    assert manager.start_with_code("pass").data.params == {}


def test_what_follows_the_timeout_is_keyword_only(manager):
    with pytest.raises(TypeError):
        manager.start_with_code("pass", {}, 5, "thread")
    with pytest.raises(TypeError):
        manager.start_with_action_block(".", {}, 5, "thread")
    with pytest.raises(TypeError):
        manager.stop("id", 5)
    with pytest.raises(TypeError):
        ExecutionManager(sys.executable)
    with pytest.raises(TypeError):
        Limits(5)


# -- timeouts


def test_the_default_timeout_applies(make_manager):
    manager = make_manager(default_timeout=0.2)
    started = manager.start_with_code(FOREVER)
    assert started.data.timeout == 0.2
    data = manager.wait(started.data.side_execution_id).data
    assert (data.status, data.stop_reason) == ("stopped", "timeout")
    assert data.duration >= 0.2


def test_the_default_of_the_default_timeout_is_five_minutes(make_manager):
    assert make_manager().start_with_code("pass").data.timeout == 300.0


@pytest.mark.parametrize("timeout", [0.2, 0, sidexec.DEFAULT])
def test_a_timeout_at_the_start_replaces_the_default(make_manager, timeout):
    manager = make_manager(default_timeout=0.3 if timeout is sidexec.DEFAULT else None)
    started = manager.start_with_code("import time; time.sleep(600)", None, timeout)
    data = manager.wait(started.data.side_execution_id).data
    assert (data.status, data.stop_reason) == ("stopped", "timeout")


def test_a_timeout_of_none_is_no_limit(make_manager):
    manager = make_manager(default_timeout=0.1)
    for response in (
        manager.start_with_code("import time; time.sleep(0.4); return 1", timeout=None),
        make_manager(default_timeout=None).start_with_code("pass"),
    ):
        assert response.data.timeout is None
    first = manager.list_executions().data.executions[0].side_execution_id
    assert manager.wait(first).data.result == 1


def test_a_timeout_is_graceful_then_forced(make_manager):
    manager = make_manager(grace_period=0.3)
    polite = manager.start_with_code(
        "import time\ntry: time.sleep(600)\nfinally: print('bye')", timeout=0.5
    ).data.side_execution_id
    deaf = manager.start_with_code(DEAF, timeout=0.5).data.side_execution_id
    assert manager.wait(polite).data.output == "bye\n"
    data = manager.wait(deaf).data
    assert (data.status, data.stop_reason, data.exit_code) == ("stopped", "timeout", -9)
    assert data.error is None
    assert manager.stop(deaf).data.forced
    assert not manager.stop(polite).data.forced


def test_an_execution_that_ends_in_time_is_not_timed_out(manager):
    id = manager.start_with_code("return 1", timeout=30).data.side_execution_id
    data = manager.wait(id).data
    assert (data.status, data.stop_reason) == ("completed", None)


# -- states


def test_a_running_execution(manager, start):
    id = start(FOREVER)
    response = manager.get_status(id)
    assert response.success
    assert response.data.status == "running"
    assert response.data.end_time is None
    assert response.data.exit_code is None
    assert response.data.stop_reason is None
    assert 0 < response.data.duration < 60


def test_a_completed_execution(run):
    data = run("print('x')\nreturn [1]")
    assert (data.status, data.result, data.output) == ("completed", [1], "x\n")
    assert (data.exit_code, data.error, data.stop_reason) == (0, None, None)
    assert data.duration > 0
    assert abs((data.end_time - data.start_time).total_seconds() - data.duration) < 1


@pytest.mark.parametrize(
    "code, error, exit_code",
    [
        ("raise ValueError('bad')", "ValueError: bad", 1),
        ("import sys; sys.exit(3)", "exit code 3", 3),
        ("import os; os._exit(4)", "exit code 4", 4),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV", -11),
        ("return {1, 2}", "TypeError: ", 1),
        ("x = = 1", "SyntaxError: ", 1),
    ],
)
def test_a_failed_execution(run, code, error, exit_code):
    data = run(code)
    assert data.status == "failed"
    assert data.error.splitlines()[0].startswith(error)
    assert data.exit_code == exit_code
    assert data.stop_reason is None


def test_an_exit_code_of_0_completes(run):
    data = run("import sys; sys.exit(0)")
    assert (data.status, data.error, data.exit_code) == ("completed", None, 0)


def test_stop_on_a_running_execution(manager, start):
    id = start(FOREVER, thread_id="t")
    response = manager.stop(id)
    assert response.success and response.error is None
    assert response.data.side_execution_id == id
    assert response.data.status == "stopped"
    assert response.data.stop_reason == "requested"
    assert response.data.forced is False
    assert response.data.output == "ready\n"


def test_stop_on_a_stopped_execution(manager, start):
    id = start("import time\nreport_result(7)\n" + FOREVER)
    first = manager.stop(id).data
    response = manager.stop(id)
    assert response.success
    assert response.data.status == "already_stopped"
    for name in ("stopped_at", "result", "output", "error_output", "forced", "exit_code"):
        assert getattr(response.data, name) == getattr(first, name)
    assert response.data.result == 7


@pytest.mark.parametrize("code, status", [("", "completed"), ("\n1 / 0", "failed")])
def test_stop_on_an_execution_that_has_ended_by_itself(manager, run, code, status):
    id = run("print('out')\nreport_result(5)" + code).side_execution_id
    before = manager.get_status(id).data
    response = manager.stop(id)
    assert not response.success
    assert response.data.status == status
    assert id in response.error and status in response.error
    assert response.data.output == "out\n"
    assert response.data.result == 5
    assert response.data.stop_reason is None
    with pytest.raises(SideExecutionError):
        response.raise_for_error()
    assert manager.get_status(id).data == before


@pytest.mark.parametrize("method", ["stop", "get_status", "wait"])
@pytest.mark.parametrize("id", ["nobody", "", "\ud800", "x" * 100_000])
def test_an_unknown_id_is_not_found(manager, method, id):
    with within(10):
        response = getattr(manager, method)(id)
    assert not response.success
    assert response.data.status == "not_found"
    assert response.data.side_execution_id == id
    assert repr(id) in response.error
    assert response.to_json()


def test_follow_raises_at_the_call_for_an_unknown_id(manager):
    with pytest.raises(SideExecutionError, match="nobody") as caught:
        manager.follow("nobody")
    assert caught.value.response.data.status == "not_found"


def test_one_of_many_concurrent_stops_stopped_it(manager, start):
    for _ in range(3):
        id = start(
            "import time\nreport_result([1])\n"
            "try: print('ready'); time.sleep(600)\nfinally: print('bye')",
        )
        barrier = threading.Barrier(12)

        def stop(_, id=id, barrier=barrier):
            barrier.wait()
            return manager.stop(id)

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            responses = list(pool.map(stop, range(12)))

        statuses = sorted(each.data.status for each in responses)
        assert statuses == ["already_stopped"] * 11 + ["stopped"]
        assert all(each.success for each in responses)
        assert len({each.data.stopped_at for each in responses}) == 1
        assert {each.data.output for each in responses} == {"ready\nbye\n"}
        assert all(each.data.result == [1] for each in responses)


def test_stop_during_a_timeout_finds_it_already_stopped(manager, tmp_path):
    go_on = tmp_path / "go_on"
    id = manager.start_with_code(
        """
        import os, time
        try:
            time.sleep(600)
        finally:
            print("asked")
            while not os.path.exists(params["go_on"]): time.sleep(0.005)
        """,
        {"go_on": str(go_on)},
        0.2,
    ).data.side_execution_id
    has_printed(manager, id, "asked\n")
    assert manager.get_status(id).data.status == "running"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(manager.stop, id)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(0.1)
        go_on.touch()
        data = future.result(20).data
    assert (data.status, data.stop_reason, data.forced) == ("already_stopped", "timeout", False)


@pytest.mark.parametrize("hurry", [{"force": True}, {"grace": 0.2}, {"grace": 0}])
def test_a_stop_under_way_can_be_hurried(make_manager, hurry):
    manager = make_manager(grace_period=120)
    id = manager.start_with_code(STUBBORN).data.side_execution_id
    has_printed(manager, id, "ready\n")
    with concurrent.futures.ThreadPoolExecutor(1) as pool, within(60):
        future = pool.submit(manager.stop, id)
        has_printed(manager, id, "asked\n")
        second = manager.stop(id, **hurry)
        first = future.result(20)
    assert (first.data.status, second.data.status) == ("stopped", "already_stopped")
    assert first.data.forced and second.data.forced
    assert first.data.stopped_at == second.data.stopped_at
    assert first.data.output == "ready\nasked\n"


def test_a_longer_grace_does_not_prolong_a_stop(manager, start):
    id = start(STUBBORN)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, within(60):
        future = pool.submit(manager.stop, id, grace=0.3)
        has_printed(manager, id, "asked\n")
        assert manager.stop(id, grace=120).data.forced
        assert future.result(20).data.status == "stopped"


def test_force_skips_the_grace(make_manager):
    manager = make_manager(grace_period=120)
    id = manager.start_with_code(DEAF).data.side_execution_id
    has_printed(manager, id, "ready\n")
    with within(60):
        data = manager.stop(id, force=True).data
    assert (data.status, data.forced, data.exit_code) == ("stopped", True, -9)


def test_a_stop_right_after_the_start(manager):
    for _ in range(5):
        id = manager.start_with_code("import time; time.sleep(600)").data.side_execution_id
        assert manager.stop(id).data.status == "stopped"


@pytest.mark.slow
def test_no_ask_is_lost(make_manager):
    """A signal may fall between the interpreter's look at it and a call that blocks."""
    manager = make_manager(grace_period=30)
    for n in range(3000):
        id = manager.start_with_code("import time; time.sleep(600)").data.side_execution_id
        time.sleep(n % 40 / 10_000)
        assert not manager.stop(id).data.forced


def test_a_stop_before_the_interpreter_is_up(make_manager):
    for force in (False, True):
        manager = make_manager()
        stop_all = functools.partial(manager.stop_all, force=force)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(manager.start_with_code, FOREVER)
            (response,) = eventually(stop_all)
            assert response.data.status == "stopped"
            assert future.result(20).success
            assert manager.list_executions().data.executions[0].status == "stopped"


def test_a_snippet_that_returns_when_asked_is_stopped_all_the_same(manager, start):
    id = start(
        "import time\ntry: print('ready'); time.sleep(600)\nexcept SystemExit: pass\nreturn 'late'"
    )
    data = manager.stop(id).data
    assert (data.status, data.result) == ("stopped", "late")


def test_a_snippet_that_fails_when_asked_is_stopped_all_the_same(manager, start):
    id = start("import time\ntry: print('ready'); time.sleep(600)\nexcept SystemExit: 1 / 0")
    data = manager.stop(id).data
    assert (data.status, data.stop_reason) == ("stopped", "requested")
    assert "ZeroDivisionError" in data.error_output


# -- stop_all


def test_stop_all_stops_side_by_side(manager, start, tmp_path):
    # Each one's cleanup waits until all of them have been asked.
    code = """
    import os, time
    try:
        print("ready")
        time.sleep(600)
    finally:
        open(os.path.join(params["dir"], str(os.getpid())), "w").close()
        while len(os.listdir(params["dir"])) < 5: time.sleep(0.005)
    """
    ids = [start(code, {"dir": str(tmp_path)}) for _ in range(5)]
    responses = manager.stop_all(grace=60)
    assert [each.data.side_execution_id for each in responses] == ids
    assert [each.data.status for each in responses] == ["stopped"] * 5
    assert not any(each.data.forced for each in responses)


def test_stop_all_with_force(make_manager):
    manager = make_manager(grace_period=120)
    ids = [manager.start_with_code(DEAF).data.side_execution_id for _ in range(3)]
    for id in ids:
        has_printed(manager, id, "ready\n")
    with within(60):
        responses = manager.stop_all(force=True)
    assert [each.data.forced for each in responses] == [True] * 3


def test_stop_all_of_nothing(manager, run):
    assert manager.stop_all() == []
    run("pass")
    assert manager.stop_all() == []


# -- wait


def test_wait_returns_past_its_timeout(manager, start):
    id = start(FOREVER)
    begin = time.monotonic()
    response = manager.wait(id, 0.1)
    assert time.monotonic() - begin >= 0.1
    assert response.success
    assert response.data.status == "running"
    assert manager.wait(id, 0).data.status == "running"
    assert manager.wait(id, timeout=0.01).data.output == "ready\n"


def test_wait_returns_at_the_end(manager, start):
    id = start("import time; print('ready'); time.sleep(0.2); return 1")
    with within(20):
        assert manager.wait(id, 60).data.result == 1
    assert manager.wait(id, 0).data.status == "completed"


def test_many_threads_wait_for_one_execution(manager, start):
    id = start(FOREVER)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(manager.wait, id) for _ in range(8)]
        manager.stop(id)
        assert {future.result(20).data.status for future in futures} == {"stopped"}


def test_a_ctrl_c_ends_a_wait_and_harms_nothing(manager, start):
    class Interrupted(Exception):
        pass

    def handler(signum, frame):
        raise Interrupted

    id = start(FOREVER)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupted):
            manager.wait(id)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert manager.get_status(id).data.status == "running"
    assert manager.stop(id).data.status == "stopped"


def test_a_signal_handler_may_stop_what_it_interrupted_the_wait_for(manager, start):
    id = start(FOREVER)
    responses = []
    before = signal.signal(signal.SIGALRM, lambda *_: responses.append(manager.stop(id)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with within(20):
            assert manager.wait(id).data.status == "stopped"
    finally:
        signal.signal(signal.SIGALRM, before)
    assert responses[0].data.status == "stopped"


def test_a_signal_handler_may_call_anything_during_anything(manager):
    calls = []

    def handler(signum, frame):
        calls.append(manager.list_executions().data.count)
        id = manager.start_with_code("pass").data.side_execution_id
        manager.get_status(id)
        manager.stop(id)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.02)
        with within(60):
            while len(calls) < 15:
                id = manager.start_with_code("print(1)").data.side_execution_id
                manager.get_status(id)
                assert list(manager.follow(id))
                assert manager.wait(id).data.status == "completed"
                manager.stop_all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- list_executions


def test_executions_are_listed_in_the_order_of_their_starts(manager, start, run, tmp_path):
    (tmp_path / "block.py").write_text("pass")
    first = start(FOREVER)
    second = run("pass").side_execution_id
    third = run("1 / 0").side_execution_id
    fourth = start(FOREVER)
    manager.stop(fourth)
    path = str(tmp_path / "block.py")
    fifth = manager.start_with_action_block(path).data.side_execution_id
    manager.wait(fifth)

    def listed(status=None):
        response = manager.list_executions(status)
        assert response.success
        assert response.data.count == len(response.data.executions)
        return [each.side_execution_id for each in response.data.executions]

    assert listed() == [first, second, third, fourth, fifth]
    assert listed("running") == [first]
    assert listed("completed") == [second, fifth]
    assert listed("failed") == [third]
    assert listed("stopped") == [fourth]
    executions = manager.list_executions().data.executions
    assert [each.status for each in executions] == [
        "running", "completed", "failed", "stopped", "completed"
    ]  # fmt: skip
    assert executions[4].action_block == path and executions[0].action_block is None
    assert executions[3].stop_reason == "requested" and executions[0].stop_reason is None
    assert executions[0].end_time is None
    for each in executions[1:]:
        assert each.start_time <= each.end_time


def test_a_manager_that_has_started_nothing_lists_nothing(manager):
    assert manager.list_executions().data.executions == ()
    assert manager.list_executions().data.count == 0


# -- history


def test_ten_thousand_finished_executions_are_remembered_by_default():
    parameters = inspect.signature(ExecutionManager).parameters
    assert parameters["max_history"].default == 10_000


def test_the_newest_finished_executions_are_remembered(make_manager):
    manager = make_manager(max_history=2)
    running = manager.start_with_code(FOREVER).data.side_execution_id
    ids = []
    for _ in range(4):
        ids.append(manager.start_with_code("return 1").data.side_execution_id)
        manager.wait(ids[-1])
    listed = [each.side_execution_id for each in manager.list_executions().data.executions]
    assert listed == [running, *ids[2:]]
    for id in ids[:2]:
        assert manager.get_status(id).data.status == "not_found"
        assert manager.stop(id).data.status == "not_found"
        with pytest.raises(SideExecutionError):
            manager.follow(id)
    assert manager.get_status(running).data.status == "running"


def test_without_history_stop_and_wait_still_answer_for_what_they_waited_for(make_manager):
    manager = make_manager(max_history=0)
    id = manager.start_with_code(FOREVER).data.side_execution_id
    assert manager.stop(id).data.status == "stopped"
    assert manager.get_status(id).data.status == "not_found"
    id = manager.start_with_code("import time; time.sleep(0.1); return 5").data.side_execution_id
    data = manager.wait(id).data
    assert (data.status, data.result) == ("completed", 5)


@pytest.mark.parametrize("code", ["print('x' * 399)", "return 'x' * 398"])
def test_the_bytes_that_are_remembered_are_bounded(make_manager, monkeypatch, code):
    monkeypatch.setattr(sidexec.engine.engine, "MAX_REMEMBERED_BYTES", 1000)
    manager = make_manager()
    ids = []
    for _ in range(4):
        ids.append(manager.start_with_code(code).data.side_execution_id)
        manager.wait(ids[-1])
    statuses = [manager.get_status(id).data.status for id in ids]
    assert statuses == ["not_found", "not_found", "completed", "completed"]


def test_the_newest_is_remembered_whatever_it_holds(make_manager, monkeypatch):
    monkeypatch.setattr(sidexec.engine.engine, "MAX_REMEMBERED_BYTES", 1000)
    manager = make_manager()
    small = manager.start_with_code("print(1)").data.side_execution_id
    manager.wait(small)
    big = manager.start_with_code("print('x' * 5000)").data.side_execution_id
    assert len(manager.wait(big).data.output) == 5001
    assert manager.get_status(small).data.status == "not_found"


# -- close


def test_close_stops_everything(make_manager):
    manager = make_manager()
    id = manager.start_with_code(
        "import os, time\ntry: print(os.getpid(), 'ready'); time.sleep(600)\nfinally: print('bye')"
    ).data.side_execution_id
    has_printed(manager, id, "ready\n")
    manager.close()
    data = manager.get_status(id).data
    assert (data.status, data.stop_reason) == ("stopped", "closed")
    assert data.output.endswith("bye\n")
    assert not is_alive(int(data.output.split()[0]))
    assert tree("self") == []


def test_what_has_ended_can_be_read_after_close(make_manager):
    manager = make_manager()
    id = manager.start_with_code("print('out')\nreturn 1").data.side_execution_id
    manager.wait(id)
    manager.close()
    assert manager.get_status(id).data.result == 1
    assert manager.wait(id).data.output == "out\n"
    assert manager.stop(id).data.status == "completed"
    assert "".join(chunk.text for chunk in manager.follow(id)) == "out\n"
    assert manager.list_executions("completed").data.count == 1
    assert manager.stop_all() == []
    assert manager.list_action_blocks(os.path.dirname(__file__)).success
    assert manager.get_status("nobody").data.status == "not_found"


def test_a_start_after_close_fails(make_manager):
    manager = make_manager()
    manager.start_with_code("pass")
    manager.close()
    response = manager.start_with_code("pass")
    assert not response.success
    assert response.data.side_execution_id is None
    assert "closed" in response.error
    assert not manager.start_with_action_block(__file__).success


@pytest.mark.parametrize("used", [False, True])
def test_close_can_be_called_again(used):
    with nothing_left():
        manager = ExecutionManager()
        if used:
            manager.start_with_code("pass")
        for _ in range(3):
            manager.close()
        assert not manager.start_with_code("pass").success


def test_concurrent_closes_all_return_when_it_is_closed():
    with nothing_left():
        manager = ExecutionManager()
        id = manager.start_with_code(
            "import time\ntry: print('ready'); time.sleep(600)\nfinally: time.sleep(0.2)"
        ).data.side_execution_id
        has_printed(manager, id, "ready\n")

        def close(_):
            manager.close()
            return manager.get_status(id).data.status

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert list(pool.map(close, range(6))) == ["stopped"] * 6


def test_close_and_starts_at_once_lose_nothing():
    for _ in range(3):
        with nothing_left():
            manager = ExecutionManager()
            manager.start_with_code("pass")
            responses = []

            def start_until_closed(manager=manager, responses=responses):
                while not responses or responses[-1].success:
                    responses.append(manager.start_with_code("import time; time.sleep(600)"))

            thread = threading.Thread(target=start_until_closed)
            thread.start()
            eventually(lambda responses=responses: len(responses) > 3)
            manager.close()
            thread.join(20)
            assert not thread.is_alive()
            for response in responses[:-1]:
                data = manager.get_status(response.data.side_execution_id).data
                assert (data.status, data.stop_reason) == ("stopped", "closed")


def test_close_takes_a_grace(make_manager):
    manager = make_manager(grace_period=120)
    id = manager.start_with_code(DEAF).data.side_execution_id
    has_printed(manager, id, "ready\n")
    with within(60):
        manager.close(grace=0.1)
    assert manager.get_status(id).data.exit_code == -9


def test_a_second_close_hurries_the_first(make_manager):
    manager = make_manager(grace_period=120)
    id = manager.start_with_code(STUBBORN).data.side_execution_id
    has_printed(manager, id, "ready\n")
    thread = threading.Thread(target=manager.close)
    thread.start()
    with within(60):
        has_printed(manager, id, "asked\n")
        manager.close(grace=0)
        thread.join()


def test_with_closes():
    with nothing_left():
        with ExecutionManager() as manager:
            assert isinstance(manager, ExecutionManager)
            id = manager.start_with_code(FOREVER).data.side_execution_id
        assert manager.get_status(id).data.stop_reason == "closed"
        with pytest.raises(ZeroDivisionError):
            with ExecutionManager() as manager:
                manager.start_with_code(FOREVER)
                1 / 0


def test_a_manager_that_is_dropped_stops_what_runs(tmp_path):
    with nothing_left():
        manager = ExecutionManager()
        manager.start_with_code(
            "import time\n"
            "try: open(params['up'], 'w').close(); time.sleep(600)\nfinally: open(params['down'], 'w').close()",
            {"up": str(tmp_path / "up"), "down": str(tmp_path / "down")},
            on_output=lambda chunk: None,
        )
        eventually((tmp_path / "up").exists)
        with pytest.warns(ResourceWarning, match="1 running"):
            del manager
            gc.collect()
        eventually((tmp_path / "down").exists)


def test_a_manager_that_has_started_nothing_is_dropped_without_trace():
    with nothing_left():
        ExecutionManager()
        gc.collect()


def test_making_a_manager_starts_nothing():
    with nothing_left():
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        manager = ExecutionManager(preload=["json"])
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
        assert tree("self") == []
        manager.close()


# -- the surroundings of a snippet

ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"


def as_plain_python(env):
    command = [sys.executable, "-c", ENVIRONMENT]
    return json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize("env", [{"A": "1", "B": "é"}, {}])
def test_env_replaces_the_environment(make_manager, env):
    manager = make_manager(env=env)
    id = manager.start_with_code(ENVIRONMENT).data.side_execution_id
    assert json.loads(manager.wait(id).data.output) == as_plain_python(env)


def test_env_at_a_start_replaces_that_of_the_manager(make_manager, monkeypatch):
    monkeypatch.setenv("FROM_HOST", "1")
    manager = make_manager(env={"A": "1"})
    ids = [
        manager.start_with_code(ENVIRONMENT, env=env).data.side_execution_id
        for env in ({"B": "2"}, None, {}, {"B": "2"})
    ]
    found = [json.loads(manager.wait(id).data.output) for id in ids]
    assert found == [as_plain_python(env) for env in ({"B": "2"}, {"A": "1"}, {}, {"B": "2"})]


def test_an_env_is_taken_as_it_is_at_the_call(make_manager):
    env = {"A": "1"}
    manager = make_manager(env=env)
    env["A"] = "2"
    id = manager.start_with_code("import os; return os.environ['A']").data.side_execution_id
    assert manager.wait(id).data.result == "1"


def test_later_snippets_see_what_the_host_changed_in_its_environment(run, monkeypatch):
    code = "import os; return [os.environ.get(name) for name in ('ONE', 'TWO')]"
    monkeypatch.setenv("ONE", "1")
    monkeypatch.delenv("TWO", raising=False)
    assert run(code).result == ["1", None]
    monkeypatch.setenv("TWO", "2")
    assert run(code).result == ["1", "2"]
    monkeypatch.delenv("ONE")
    assert run(code).result == [None, "2"]
    monkeypatch.setenv("TWO", "3")
    assert run(code).result == [None, "3"]
    assert run(code).result == [None, "3"]


def test_an_old_environment_does_not_keep_its_processes(run, monkeypatch):
    for value in "abc":
        monkeypatch.setenv("CHANGED", value)
        run("pass")
    # The one with the environment as it is now, and what it holds ready.
    eventually(lambda: len(tree("self")) <= 3)


def test_cwd_of_the_manager_and_of_a_start(make_manager, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    code = "import os; return os.getcwd()"

    def cwd_of(manager, **options):
        id = manager.start_with_code(code, **options).data.side_execution_id
        return manager.wait(id).data.result

    here = os.path.realpath(tmp_path)
    manager = make_manager(cwd=tmp_path / "a")
    assert cwd_of(manager) == f"{here}/a"
    assert cwd_of(manager, cwd=str(tmp_path / "b")) == f"{here}/b"
    assert cwd_of(manager, cwd="b") == f"{here}/b"
    assert cwd_of(manager) == f"{here}/a"
    manager = make_manager()
    assert cwd_of(manager) == here
    assert cwd_of(manager, cwd=pathlib.Path("a")) == f"{here}/a"


def test_later_snippets_see_the_directory_that_the_host_moved_to(run, tmp_path, monkeypatch):
    code = "import os; return os.getcwd()"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert run(code).result == os.path.realpath(tmp_path / name)


def test_modules_are_imported_from_the_current_directory(run, tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text("value = 5")
    monkeypatch.chdir(tmp_path)
    assert run("import own_module; return own_module.value").result == 5


def test_a_current_directory_that_is_gone(run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    assert run("return 1").result == 1
    (tmp_path / "gone").rmdir()
    assert run("return 2").result == 2


def test_python_is_the_interpreter_that_runs_the_snippets(make_manager, tmp_path):
    link = tmp_path / "python"
    link.symlink_to(os.path.realpath(sys.executable))
    for python in (link, str(link)):
        manager = make_manager(python=python)
        id = manager.start_with_code("import sys; return sys.executable").data.side_execution_id
        assert manager.wait(id).data.result == str(link)


INTERPRETERS = [
    path
    for path in sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python")))
    if int(path.split("versions/3.")[1].split(".")[0]) >= 10
]


@pytest.mark.parametrize("python", INTERPRETERS or [sys.executable])
def test_python_may_be_of_another_version(make_manager, python):
    manager = make_manager(python=python)
    id = manager.start_with_code(
        "import asyncio, sys, time\nprint('ready')\n"
        "report_result(list(sys.version_info[:2]))\nawait asyncio.sleep(600)\nreturn 1"
    ).data.side_execution_id
    has_printed(manager, id, "ready\n")
    code = "import sys; print(list(sys.version_info[:2]))"
    version = json.loads(subprocess.check_output([python, "-c", code]))
    data = manager.stop(id).data
    assert (data.status, data.result, data.forced) == ("stopped", version, False)
    failed = manager.wait(manager.start_with_code("1 / 0").data.side_execution_id).data
    assert failed.error.startswith("ZeroDivisionError: division by zero\n")


def test_preloaded_modules_are_there_before_the_snippet(make_manager, tmp_path):
    (tmp_path / "once.py").write_text(f"open({str(tmp_path / 'log')!r}, 'a').write('x')")
    manager = make_manager(
        preload=["fractions", "once", "xml.dom"], env={"PYTHONPATH": str(tmp_path)}
    )
    code = "import sys\nreturn [n in sys.modules for n in ('fractions', 'once', 'xml.dom')]"
    for _ in range(3):
        id = manager.start_with_code(code).data.side_execution_id
        assert manager.wait(id).data.result == [True] * 3
    assert (tmp_path / "log").read_text() == "x"


def test_what_is_not_preloaded_is_not_there(run):
    code = "import sys\nreturn sorted({'fractions', 'sidexec', 'pytest'} & set(sys.modules))"
    assert run(code).result == []


def test_preload_may_be_any_iterable_of_names(make_manager):
    manager = make_manager(preload=iter(("fractions", "decimal")))
    code = "import sys; return {'fractions', 'decimal'} <= set(sys.modules)"
    for _ in range(2):
        id = manager.start_with_code(code).data.side_execution_id
        assert manager.wait(id).data.result is True


@pytest.mark.parametrize(
    "body, error",
    [
        (None, "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("x = = 1", "SyntaxError"),
    ],
)
def test_a_preload_that_fails_is_named(make_manager, tmp_path, body, error):
    if body is not None:
        (tmp_path / "no_such_module.py").write_text(body)
    manager = make_manager(preload=["json", "no_such_module"], env={"PYTHONPATH": str(tmp_path)})
    for _ in range(2):
        response = manager.start_with_code("pass")
        assert not response.success
        assert "no_such_module" in response.error
        assert error in response.error
        eventually(lambda: tree("self") == [])
    assert manager.list_executions().data.count == 0


def test_a_preload_that_ends_the_interpreter(make_manager, tmp_path):
    (tmp_path / "crash.py").write_text("import os; os._exit(7)")
    response = make_manager(preload=["crash"], env={"PYTHONPATH": str(tmp_path)}).start_with_code(
        "pass"
    )
    assert not response.success
    assert "exit code 7" in response.error


# -- limits


def test_memory_beyond_the_limit_is_a_memory_error(make_manager):
    manager = make_manager(limits=Limits(memory=300_000_000))
    code = "x = b'x' * params['size']\nreturn len(x)"
    big = manager.start_with_code(code, {"size": 10**9}).data.side_execution_id
    data = manager.wait(big).data
    assert data.status == "failed"
    assert data.error.splitlines()[0].startswith("MemoryError")
    small = manager.start_with_code(code, {"size": 10**6}).data.side_execution_id
    assert manager.wait(small).data.result == 10**6


def test_processor_time_beyond_the_limit_is_sigxcpu(run):
    data = run("while True: pass", limits=Limits(cpu=1))
    assert data.status == "failed"
    assert data.error.splitlines()[0] == "killed by SIGXCPU"
    assert data.exit_code == -signal.SIGXCPU


def test_a_limit_of_processor_time_may_be_a_fraction(run):
    code = "import resource; return resource.getrlimit(resource.RLIMIT_CPU)[0]"
    assert run(code, limits=Limits(cpu=2.5)).result == 3


def test_descriptors_beyond_the_limit_are_an_os_error(run):
    data = run(
        "files = []\nwhile len(files) < 100: files.append(open('/dev/null'))",
        limits=Limits(open_files=30),
    )
    assert data.status == "failed"
    assert data.error.splitlines()[0].startswith("OSError: [Errno 24]")


def test_limits_at_a_start_replace_those_of_the_manager(make_manager):
    manager = make_manager(limits=Limits(open_files=50, memory=10**9))
    code = """
    import resource
    return [resource.getrlimit(kind)[0] for kind in
            (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_NPROC)]
    """
    names = ("RLIMIT_NOFILE", "RLIMIT_AS", "RLIMIT_NPROC")
    resource = pytest.importorskip("resource")
    files, memory, processes = (resource.getrlimit(getattr(resource, n))[0] for n in names)

    def limits_of(**options):
        id = manager.start_with_code(code, **options).data.side_execution_id
        return manager.wait(id).data.result

    assert limits_of() == [50, 10**9, processes]
    assert limits_of(limits=Limits(processes=500)) == [files, memory, 500]
    assert limits_of(limits=Limits()) == [files, memory, processes]


def test_limits_are_frozen_and_comparable():
    limits = Limits(memory=10, cpu=1.5, processes=5, open_files=6)
    assert (limits.memory, limits.cpu, limits.processes, limits.open_files) == (10, 1.5, 5, 6)
    assert limits == Limits(memory=10, cpu=1.5, processes=5, open_files=6) != Limits()
    with pytest.raises(AttributeError):
        limits.memory = 5
    assert "memory=10" in repr(limits)


# -- thread_id and message_id


def test_each_response_has_the_thread_id_of_the_start(manager, start):
    id = start(FOREVER, thread_id="thread-7")
    other = start(FOREVER)
    responses = [
        manager.get_status(id),
        manager.wait(id, 0),
        manager.stop(id),
        manager.stop(id),
        manager.wait(id),
    ]
    assert {each.thread_id for each in responses} == {"thread-7"}
    assert {each.to_dict()["threadId"] for each in responses} == {"thread-7"}
    assert manager.stop_all()[0].thread_id is None
    assert manager.get_status(other).thread_id is None
    assert manager.start_with_code("pass", thread_id="x").thread_id == "x"
    assert manager.start_with_action_block("/nowhere", thread_id="x").thread_id == "x"


def test_each_response_has_a_message_id_of_its_own(manager, start):
    id = start(FOREVER)
    responses = [
        *(manager.get_status(id) for _ in range(3)),
        manager.list_executions(),
        manager.list_executions(),
        manager.list_action_blocks(os.path.dirname(__file__)),
        manager.start_with_code("pass"),
        manager.stop(id),
        manager.stop(id),
        manager.stop("nobody"),
    ]
    ids = [each.message_id for each in responses]
    assert all(isinstance(each, str) and each for each in ids)
    assert len(set(ids)) == len(ids)


# -- usage


def test_memory_and_processor_time_are_those_of_the_whole_tree(manager, start):
    id = start(
        """
        import subprocess, sys, time
        child = "x = b'x' * 80_000_000\\nprint('ready', flush=True)\\nwhile True: pass"
        subprocess.Popen([sys.executable, "-c", child])
        time.sleep(600)
        """
    )
    # A figure may be a moment old.
    eventually(lambda: manager.get_status(id).data.memory_usage > 80_000_000)
    data = manager.get_status(id).data
    assert isinstance(data.memory_usage, int)
    assert data.memory_usage < 400_000_000
    assert isinstance(data.cpu_usage, float)
    # The snippet itself sleeps.
    eventually(lambda: manager.get_status(id).data.cpu_usage > 10)
    manager.stop(id)
    data = manager.get_status(id).data
    assert (data.memory_usage, data.cpu_usage) == (None, None)


def test_a_sleeping_execution_uses_next_to_nothing(manager, start):
    id = start(FOREVER)
    assert 100_000 < manager.get_status(id).data.memory_usage < 100_000_000
    eventually(lambda: manager.get_status(id).data.cpu_usage < 5)


# -- progress


def test_progress(manager, start, run):
    id = start("import time\nreport_progress(12.5)\n" + FOREVER)
    assert manager.get_status(id).data.progress == 12.5
    assert start(FOREVER) and manager.list_executions("running").data.count == 2
    assert run("report_progress(0)").progress == 0
    assert run("report_progress(100)").progress == 100
    assert run("pass").progress is None
    failed = run("report_progress(100.5)")
    assert (failed.status, failed.progress) == ("failed", None)
    assert failed.error.startswith("ValueError: ")


# -- threads


def test_a_manager_is_used_from_many_threads_at_once(manager):
    def use(n):
        started = manager.start_with_code("print(params['n'])\nreturn params['n']", {"n": n})
        id = started.data.side_execution_id
        manager.get_status(id)
        manager.list_executions()
        text = "".join(chunk.text for chunk in manager.follow(id))
        data = manager.wait(id).data
        assert (data.status, data.result, data.output, text) == ("completed", n, f"{n}\n", f"{n}\n")
        return id

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(use, range(40)))) == 40


def test_managers_do_not_know_of_each_other(make_manager):
    one, two = make_manager(), make_manager()
    id = one.start_with_code(FOREVER).data.side_execution_id
    assert two.get_status(id).data.status == "not_found"
    assert two.stop(id).data.status == "not_found"
    two.start_with_code("pass")
    two.close()
    assert one.get_status(id).data.status == "running"


# -- the host process


def test_the_host_never_imports_the_child():
    code = """
import sys, sidexec
with sidexec.ExecutionManager(preload=["json"]) as manager:
    id = manager.start_with_code("1 / 0").data.side_execution_id
    manager.wait(id)
    manager.stop(manager.start_with_code("import time; time.sleep(60)").data.side_execution_id)
print([name for name in sys.modules if name.startswith("sidexec.child")])
"""
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(sidexec.__file__))}
    assert subprocess.check_output([sys.executable, "-c", code], env=env) == b"[]\n"


def in_a_fork(check):
    """Call `check()` in a fork of this process: what it returns, as JSON carries it."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            signal.alarm(60)
            try:
                result = check()
            except BaseException as error:
                result = repr(error)
            os.write(write_end, json.dumps(result).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    try:
        data = b""
        while True:
            ready, _, _ = select.select([read_end], [], [], 90)
            assert ready
            part = os.read(read_end, 65536)
            if not part:
                break
            data += part
        return json.loads(data)
    finally:
        os.close(read_end)
        os.waitpid(pid, 0)


def test_a_fork_of_the_host_gets_clear_errors_and_the_host_goes_on(manager, start, run):
    running = start(FOREVER)
    ended = run("print('out')\nreturn 1").side_execution_id

    def check():
        started = manager.start_with_code("pass")
        stopped = manager.stop(running)
        status = manager.wait(running)
        text = "".join(chunk.text for chunk in manager.follow(running))
        stopped_all = manager.stop_all(force=True)
        manager.close()
        return {
            "started": [started.success, started.error],
            "stopped": [stopped.success, stopped.data.status, stopped.error],
            "stopped_all": [each.success for each in stopped_all],
            "status": [status.success, status.data.status, text],
            "ended": manager.wait(ended).data.result,
        }

    said = in_a_fork(check)

    assert isinstance(said, dict), said
    assert said["started"][0] is False and "fork" in said["started"][1]
    assert said["stopped"][0] is False and "fork" in said["stopped"][2]
    assert said["stopped"][1] == "running"
    assert said["stopped_all"] == [False]
    assert said["status"] == [False, "running", "ready\n"]
    assert said["ended"] == 1
    assert manager.get_status(running).data.status == "running"
    assert run("return 2").result == 2
    assert manager.stop(running).data.status == "stopped"


def test_a_fork_of_the_host_may_have_a_manager_of_its_own(manager, run):
    run("pass")

    def check():
        with ExecutionManager() as own:
            id = own.start_with_code("return 3").data.side_execution_id
            return own.wait(id, 30).data.result

    assert in_a_fork(check) == 3
    assert run("return 4").result == 4


def test_a_manager_that_was_not_used_yet_works_in_a_fork(make_manager):
    manager = make_manager()

    def check():
        with manager:
            id = manager.start_with_code("return 3").data.side_execution_id
            return manager.wait(id, 30).data.result

    assert in_a_fork(check) == 3
    id = manager.start_with_code("return 4").data.side_execution_id
    assert manager.wait(id).data.result == 4


def test_a_fork_that_lives_on_keeps_nothing_running(start, manager):
    """What the host's fork holds open of the host's does not keep an execution."""
    id = start(FOREVER)
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    try:
        with within(30):
            assert manager.stop(id).data.status == "stopped"
            manager.close()
    finally:
        os.close(write_end)
        os.waitpid(pid, 0)
