"""What is said when a manager is made, what it remembers, and how it ends."""

import concurrent.futures
import enum
import functools
import gc
import glob
import inspect
import json
import os
import pathlib
import resource
import subprocess
import sys
import threading
import time

import pytest
from conftest import (
    ENVIRONMENT,
    FOREVER,
    IS_FREE_THREADED,
    alarm,
    begin,
    eventually,
    finish,
    has_printed,
    is_alive,
    nothing_left,
    one_in,
    tree,
    within,
)
from programs import DEAF, POLITE, STUBBORN, when_asked

import sidexec
import sidexec.engine.engine
from sidexec import ExecutionManager, Limits, SideExecutionError
from sidexec.engine import thread
from sidexec.engine.process import Process


@pytest.fixture
def patient(make_manager, monkeypatch):
    """A manager whose grace period is never over, and which has no watchdog either."""
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 600.0)
    return make_manager(grace_period=40)


# -- timeouts


@pytest.mark.parametrize("default, timeout", [(0.2, sidexec.DEFAULT), (None, 0), (60, 0.1)])
def test_a_timeout_at_the_start_replaces_the_default(make_manager, default, timeout):
    manager = make_manager(default_timeout=default)
    started = manager.start_with_code("import time; time.sleep(600)", None, timeout)
    assert started.data.timeout == (default if timeout is sidexec.DEFAULT else timeout)
    data = manager.wait(started.id).data
    assert (data.status, data.stop_reason) == ("stopped", "timeout")
    assert data.duration >= started.data.timeout


def test_a_timeout_of_none_is_no_limit_and_the_default_is_five_minutes(make_manager):
    manager = make_manager(default_timeout=0.1)
    assert finish(manager, "import time; time.sleep(0.2); return 1", timeout=None).result == 1
    assert make_manager(default_timeout=None).start_with_code("pass").data.timeout is None
    assert make_manager().start_with_code("pass").data.timeout == 300.0


# -- states


@pytest.mark.parametrize("hurry", [{"force": True}, {"grace": 0.2}, {"grace": 0}])
def test_a_stop_under_way_can_be_hurried(patient, monkeypatch, hurry):
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 60.0)  # by its keeper, not past that
    id = begin(patient, STUBBORN)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, within(30):
        future = pool.submit(patient.stop, id)
        has_printed(patient, id, "asked\n")
        second = patient.stop(id, **hurry)
        first = future.result(20)
    assert (first.data.status, second.data.status) == ("stopped", "already_stopped")
    assert first.data.forced and second.data.forced
    assert first.data.stopped_at == second.data.stopped_at
    assert first.data.output == "ready\nasked\n"


@pytest.mark.slow
def test_no_ask_is_lost(make_manager):
    """A signal may fall between the interpreter's look at it and a call that blocks."""
    manager = make_manager(grace_period=30)
    for n in range(3000):
        id = manager.start_with_code("import time; time.sleep(600)").id
        time.sleep(n % 40 / 10_000)
        assert not manager.stop(id).data.forced


@pytest.mark.parametrize("force", [False, True])
def test_a_stop_before_the_interpreter_is_up(make_manager, force):
    manager = make_manager()
    stop_all = functools.partial(manager.stop_all, force=force)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(manager.start_with_code, FOREVER)
        (response,) = eventually(stop_all)
        assert response.data.status == "stopped"
        assert future.result(20).success
        assert manager.list_executions().data.executions[0].status == "stopped"


# -- stop_all


def test_stop_all_with_force(patient):
    ids = [begin(patient, DEAF) for _ in range(3)]
    with within(30):
        responses = patient.stop_all(force=True)
    stopped = [(each.data.side_execution_id, each.data.forced) for each in responses]
    assert stopped == [(id, True) for id in ids]


# -- list_executions


def listed(manager, status=None):
    response = manager.list_executions(status)
    assert response.success
    assert response.data.count == len(response.data.executions)
    return [each.side_execution_id for each in response.data.executions]


def test_executions_are_listed_in_the_order_of_their_starts(make_manager, tmp_path):
    manager = make_manager()
    assert (manager.list_executions().data.executions, listed(manager)) == ((), [])
    path = str(tmp_path / "block.py")
    pathlib.Path(path).write_text("pass")
    first = begin(manager, FOREVER)
    second, third = (finish(manager, code).side_execution_id for code in ("pass", "1 / 0"))
    fourth = begin(manager, FOREVER)
    manager.stop(fourth)
    fifth = manager.start_with_action_block(path).id
    manager.wait(fifth)
    executions = manager.list_executions().data.executions
    said = [(each.status, each.stop_reason, each.action_block) for each in executions]
    assert listed(manager) == [first, second, third, fourth, fifth]
    assert said == [
        ("running", None, None),
        ("completed", None, None),
        ("failed", None, None),
        ("stopped", "requested", None),
        ("completed", None, path),
    ]
    for status in ("running", "completed", "failed", "stopped"):
        expected = [each.side_execution_id for each in executions if each.status == status]
        assert listed(manager, status) == expected
    assert executions[0].end_time is None
    assert all(each.start_time <= each.end_time for each in executions[1:])


# -- history


def test_the_newest_finished_executions_are_remembered(make_manager):
    assert inspect.signature(ExecutionManager).parameters["max_history"].default == 10_000
    manager = make_manager(max_history=2)
    running = begin(manager, FOREVER)
    ids = [finish(manager, "return 1").side_execution_id for _ in range(4)]
    assert listed(manager) == [running, *ids[2:]]
    for id in ids[:2]:
        assert manager.get_status(id).data.status == "not_found"
        assert manager.stop(id).data.status == "not_found"
        with pytest.raises(SideExecutionError):
            manager.follow(id)
    assert manager.get_status(running).data.status == "running"


def test_without_history_stop_and_wait_still_answer_for_what_they_waited_for(make_manager):
    manager = make_manager(max_history=0)
    id = begin(manager, FOREVER)
    assert manager.stop(id).data.status == "stopped"
    assert manager.get_status(id).data.status == "not_found"
    data = finish(manager, "import time; time.sleep(0.1); return 5")
    assert (data.status, data.result) == ("completed", 5)


def test_without_history_run_still_answers_for_what_has_ended_before_it_waits(
    make_manager, monkeypatch
):
    manager = make_manager(max_history=0)
    start = manager._engine.start

    def start_and_end(execution, *args, **options):
        start(execution, *args, **options)
        eventually(lambda: execution.is_forgotten)

    monkeypatch.setattr(manager._engine, "start", start_and_end)
    data = manager.run("print(1)\nreturn 5").check().data
    assert (data.status, data.result, data.output) == ("completed", 5, "1\n")


@pytest.mark.parametrize(
    "code, kept",
    [("print('x' * 399)", 2), ("return 'x' * 398", 2), ("print('x' * 5000)", 1)],
    ids=["output", "result", "the newest whatever it holds"],
)
def test_the_bytes_that_are_remembered_are_bounded(make_manager, monkeypatch, code, kept):
    monkeypatch.setattr(sidexec.engine.engine, "MAX_REMEMBERED_BYTES", 1000)
    manager = make_manager()
    ids = [finish(manager, code).side_execution_id for _ in range(4)]
    statuses = [manager.get_status(id).data.status for id in ids]
    assert statuses == ["not_found"] * (4 - kept) + ["completed"] * kept
    assert "5000" not in code or len(manager.get_status(ids[-1]).data.output) == 5001


def test_the_bytes_of_errors_are_bounded_as_well(make_manager, monkeypatch):
    monkeypatch.setattr(sidexec.engine.engine, "MAX_REMEMBERED_BYTES", 1000)
    manager = make_manager()
    code = "import sys\nsys.stderr = None\nraise ValueError('x' * 400)"
    ids = [finish(manager, code).side_execution_id for _ in range(3)]
    statuses = [manager.get_status(id).data.status for id in ids]
    assert statuses == ["not_found", "not_found", "failed"]


# -- close


def test_what_has_ended_can_be_read_after_closes_and_nothing_be_started(make_manager):
    manager = make_manager()
    id = finish(manager, "print('out')\nreturn 1").side_execution_id
    for _ in range(3):
        manager.close()
    data, chunks = manager.get_status(id).data, list(manager.follow(id))
    assert (data.result, data.output, chunks[0].text) == (1, "out\n", "out\n")
    assert manager.wait(id).data == data
    assert manager.stop(id).data.status == "completed"
    assert (listed(manager, "completed"), manager.stop_all()) == ([id], [])
    assert manager.list_action_blocks(os.path.dirname(__file__)).success
    assert manager.get_status("nobody").data.status == "not_found"
    for start, what in (
        (manager.start_with_code, "pass"),
        (manager.start_with_action_block, __file__),
    ):
        response = start(what)
        assert (response.success, response.data.side_execution_id) == (False, None)
        assert "closed" in response.error


def test_concurrent_closes_all_return_when_it_is_closed(make_manager):
    manager = make_manager()
    id = begin(manager, when_asked("time.sleep(0.2)"))

    def close(_):
        manager.close()
        return manager.get_status(id).data.status

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(close, range(6))) == ["stopped"] * 6


def test_a_second_close_hurries_the_first(patient):
    id = begin(patient, STUBBORN)
    thread = threading.Thread(target=patient.close)
    thread.start()
    with within(30):
        has_printed(patient, id, "asked\n")
        patient.close(grace=0)
        thread.join()
    assert patient.get_status(id).data.exit_code == -9


def test_with_closes_and_close_stops_everything():
    with nothing_left():
        with ExecutionManager() as manager:
            id = begin(manager, POLITE)
        data = manager.get_status(id).data
        assert (data.status, data.stop_reason, data.output) == ("stopped", "closed", "ready\nout\n")
        with pytest.raises(ZeroDivisionError), ExecutionManager() as manager:
            manager.start_with_code(FOREVER)
            1 / 0


def test_a_close_that_is_interrupted_leaves_nothing_once_all_has_ended(tmp_path):
    def interrupt(signum, frame):
        if "asked" in manager.get_status(id).data.output:
            raise KeyboardInterrupt

    code = "print('asked', flush=True)\nwhile not os.path.exists(params['go']): time.sleep(0.01)"
    with nothing_left():
        manager = ExecutionManager(grace_period=60)
        id = begin(manager, when_asked(code), {"go": str(tmp_path / "go")})
        with pytest.raises(KeyboardInterrupt), alarm(interrupt, 0.05, 0.05):
            manager.close()
        assert manager.get_status(id).data.status == "running"
        (tmp_path / "go").touch()


def test_a_manager_that_is_dropped_stops_what_runs(tmp_path):
    code = when_asked("open(params['down'], 'w').close()")
    with nothing_left():
        manager = ExecutionManager()
        begin(manager, code, {"down": str(tmp_path / "down")}, on_output=lambda chunk: None)
        with pytest.warns(ResourceWarning, match="1 running"):
            del manager
            gc.collect()
        eventually((tmp_path / "down").exists)


def test_making_a_manager_starts_nothing_and_dropping_or_closing_it_leaves_nothing():
    def held():
        """Threads, of whatever module, and descriptors."""
        return {
            (kind, each) for kind in ("task", "fd") for each in os.listdir(f"/proc/self/{kind}")
        }

    with nothing_left():
        before = held()
        manager = ExecutionManager(preload=["json"])
        assert held() <= before
        assert tree("self") == []
        del manager
        gc.collect()
        manager = ExecutionManager()
        for _ in range(2):
            manager.close()
        assert not manager.start_with_code("pass").success


# -- the surroundings of a snippet


def as_plain_python(env):
    command = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    return json.loads(subprocess.check_output(command, env=env))


def test_env_replaces_the_environment_as_it_is_at_the_call(make_manager, monkeypatch):
    monkeypatch.setenv("FROM_HOST", "1")
    own, other = {"A": "1", "B": "é"}, {"B": "2"}
    env = dict(own)
    manager = make_manager(env=env)
    env["A"] = "2"
    code = "import os; return dict(os.environ)"
    ids = [manager.start_with_code(code, env=env).id for env in (other, None, {}, other)]
    found = [manager.wait(id).data.result for id in ids]
    assert found == [as_plain_python(env) for env in (other, own, {}, other)]


def test_later_snippets_see_what_the_host_changed_in_its_environment(make_manager, monkeypatch):
    run = functools.partial(finish, make_manager())
    code = "import os; return [os.environ.get(name) for name in ('ONE', 'TWO')]"
    monkeypatch.setenv("ONE", "1")
    monkeypatch.delenv("TWO", raising=False)
    assert run(code).result == ["1", None]
    monkeypatch.setenv("TWO", "2")
    assert run(code).result == ["1", "2"]
    monkeypatch.delenv("ONE")
    assert run(code).result == [None, "2"]
    monkeypatch.setenv("TWO", "3")
    assert run(code).result == run(code).result == [None, "3"]
    # An old environment keeps no processes: the one as it is now, and what it holds ready.
    eventually(lambda: len(tree("self")) <= 3)


def test_cwd_of_the_manager_and_of_a_start(make_manager, tmp_path, monkeypatch):
    cwd_of = functools.partial(finish, code="import os; return os.getcwd()")
    here = os.path.realpath(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    manager = make_manager(cwd=tmp_path / "a", env=ENVIRONMENT)
    assert cwd_of(manager).result == f"{here}/a"
    assert cwd_of(manager, cwd=str(tmp_path / "b")).result == f"{here}/b"
    assert cwd_of(manager, cwd="b").result == f"{here}/b"
    assert cwd_of(manager).result == f"{here}/a"
    manager = make_manager()
    assert cwd_of(manager).result == here
    assert cwd_of(manager, cwd=pathlib.Path("a")).result == f"{here}/a"


INTERPRETERS = [
    path
    for path in sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python")))
    if int(path.split("versions/3.")[1].split(".")[0]) >= 10
]


@pytest.mark.parametrize("python", one_in(3, INTERPRETERS or [sys.executable]))
def test_python_may_be_of_another_version(make_manager, python, tmp_path, monkeypatch):
    # Python 3.13 and 3.14 import it themselves, before any code of `-c`.
    (tmp_path / "linecache.py").write_text("raise Exception('the wrong one')")
    monkeypatch.chdir(tmp_path)
    manager = make_manager(python=python)
    id = begin(
        manager,
        "import asyncio, sys, time\nreport_result(list(sys.version_info[:2]))\n"
        "print('ready')\nawait asyncio.sleep(600)\nreturn 1",
    )
    code = "import sys; print(list(sys.version_info[:2]))"
    version = json.loads(subprocess.check_output([python, "-c", code], cwd="/"))
    data = manager.stop(id).data
    assert (data.status, data.result, data.forced) == ("stopped", version, False)
    assert finish(manager, "1 / 0").error.startswith("ZeroDivisionError: division by zero\n")


def test_preloaded_modules_are_there_before_the_snippet(preloading, make_manager, tmp_path):
    log = tmp_path / "log"
    names = ["fractions", "xml.dom", "once"]
    manager = preloading({"once": f"open({str(log)!r}, 'a').write('x')"}, *names[:2])
    code = "import sys\nreturn [name in sys.modules for name in params['names']]"
    for _ in range(3):
        assert finish(manager, code, {"names": names}).result == [True] * 3
    assert log.read_text() == "x"
    names = ["fractions", "sidexec", "pytest"]
    assert finish(make_manager(), code, {"names": names}).result == [False] * 3


FAILING = {
    "ModuleNotFoundError": None,
    "ZeroDivisionError": "1 / 0",
    "SystemExit": "import sys; sys.exit(3)",
    "SyntaxError": "x = = 1",
    "exit code 7": "import os; os._exit(7)",
}


@pytest.mark.parametrize("error", one_in(2, FAILING))
@pytest.mark.parametrize("is_late", [False, True])
def test_a_preload_that_fails_is_named(preloading, monkeypatch, error, is_late):
    def hear_late(process, seconds):
        """What it has said is read when it has ended."""
        if process.is_greeted:
            eventually(lambda: not is_alive(process.pid))
        return hear(process, seconds)

    hear = Process.hear
    if is_late:
        monkeypatch.setattr(Process, "hear", hear_late)
    before = tree("self")
    if FAILING[error] is None:
        manager = preloading({}, "json", "no_such_module")
    else:
        manager = preloading({"no_such_module": FAILING[error]}, "json")
    for _ in range(2):
        response = manager.start_with_code("pass")
        assert not response.success
        assert ("preload" if "exit code" in error else "no_such_module") in response.error
        assert error in response.error
        eventually(lambda: tree("self") == before)
    assert manager.list_executions().data.count == 0


# -- limits


@pytest.mark.skipif(not IS_FREE_THREADED, reason="memory can be limited with the GIL")
def test_a_limit_of_memory_that_can_not_work_is_an_error(run):
    data = run("pass", limits=Limits(memory=10**9))
    assert data.status == "failed"
    assert data.error.startswith("ValueError: memory can't be limited on a free-threaded Python")
    assert "snippet" not in data.error and data.error.count("File") == 0


def test_limits_at_a_start_replace_those_of_the_manager(make_manager):
    manager = make_manager(limits=Limits(open_files=50, cpu=1000))
    names = ("RLIMIT_NOFILE", "RLIMIT_CPU", "RLIMIT_NPROC")
    code = f"import resource\nreturn [resource.getrlimit(getattr(resource, n))[0] for n in {names}]"
    files, seconds, processes = (resource.getrlimit(getattr(resource, n))[0] for n in names)
    assert finish(manager, code).result == [50, 1000, processes]
    assert finish(manager, code, limits=Limits(processes=500)).result == [files, seconds, 500]
    assert finish(manager, code, limits=Limits()).result == [files, seconds, processes]


def test_limits_are_frozen_and_comparable():
    limits = Limits(memory=10, cpu=1.5, processes=5, open_files=6)
    assert limits == eval(repr(limits)) != Limits(memory=10)
    with pytest.raises(AttributeError):
        limits.memory = 5


def test_limits_may_be_of_a_subclass_of_int(run):
    many = enum.IntEnum("Many", {"FILES": 100}).FILES
    code = "import resource\nreturn resource.getrlimit(resource.RLIMIT_NOFILE)[0]"
    assert run(code, limits=Limits(open_files=many)).result == 100


# -- threads and hosts


def test_time_that_tests_of_the_host_have_frozen_does_not_concern_executions(
    make_manager, monkeypatch
):
    manager = make_manager()
    running = begin(manager, FOREVER, timeout=100)
    monkeypatch.setattr(time, "monotonic", lambda: 10.0**9)
    data = finish(manager, "import time; time.sleep(5)", timeout=0.1)
    assert (data.status, data.stop_reason) == ("stopped", "timeout")
    assert manager.wait(running, timeout=0.1).data.status == "running"
    monkeypatch.undo()
    assert manager.stop(running).data.status == "stopped"


def test_managers_do_not_know_of_each_other(make_manager):
    one, two = make_manager(), make_manager()
    id = begin(one, FOREVER)
    assert two.get_status(id).data.status == "not_found"
    assert two.stop(id).data.status == "not_found"
    two.start_with_code("pass")
    two.close()
    assert one.get_status(id).data.status == "running"
