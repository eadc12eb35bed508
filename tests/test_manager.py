"""The manager's methods and the states of its executions."""

import concurrent.futures
import os
import shutil
import signal
import sys
import time

import pytest
from conftest import FOREVER, alarm, eventually, finish, has_printed, one_in, time_out, within
from conftest import swept_manager as manager  # noqa: F401
from programs import STUBBORN, when_asked

from sidexec import ExecutionManager, Limits, SideExecutionError

# -- starting


def test_a_start_returns_at_once_with_what_was_started(manager):
    code, params = "import time; time.sleep(600)", {"n": [1, {"a": None}]}
    with within(20):
        response = manager.start_with_code(code, params, 40.0)
    data = response.data
    assert response.success and response.error is None
    assert isinstance(data.side_execution_id, str) and data.side_execution_id
    assert (data.code, data.action_block, data.status) == (code, None, "running")
    assert (data.params, data.timeout) == (params, 40.0)
    assert data.start_time.utcoffset().total_seconds() == 0
    assert abs(data.start_time.timestamp() - time.time()) < 20


def test_an_action_block_is_started_with_params_and_timeout(manager, tmp_path):
    (tmp_path / "block.py").write_text("return params['n'] + 1")
    path = str(tmp_path / "block.py")
    response = manager.start_with_action_block(path, {"n": 1}, 30, thread_id="t")
    data = response.data
    assert (data.action_block, data.code, data.timeout) == (path, None, 30)
    status = manager.wait(response.id)
    assert (status.data.result, status.thread_id) == (2, "t")


def test_params_are_a_copy_or_an_empty_dict(run, manager):
    params = {"list": [1]}
    response = manager.start_with_code("import time\ntime.sleep(0.05)\nreturn params", params)
    params["list"].append(2)
    assert response.data.params == manager.wait(response.id).data.result == {"list": [1]}
    assert run("return params").result == manager.start_with_code("pass").data.params == {}


@pytest.mark.parametrize(
    "call",
    [
        lambda manager: manager.start_with_code("pass", {}, 5, "thread"),
        lambda manager: manager.start_with_action_block(".", {}, 5, "thread"),
        lambda manager: manager.stop("id", 5),
        lambda manager: ExecutionManager(sys.executable),
        lambda manager: Limits(5),
    ],
)
def test_what_follows_is_keyword_only(manager, call):
    with pytest.raises(TypeError):
        call(manager)


# -- states


@pytest.mark.parametrize("options", [{}, {"force": True}], ids=repr)
@pytest.mark.parametrize(
    "code, status, exit_code", [("", "completed", 0), ("\n1 / 0", "failed", 1)]
)
def test_stop_on_an_execution_that_has_ended_by_itself(
    manager, run, code, status, exit_code, options
):
    before = run("print('out')\nreport_result(5)" + code)
    id = before.side_execution_id
    response = manager.stop(id, **options)
    data = response.data
    assert id in response.error and status in response.error and "stop" in response.error
    assert (data.status, data.exit_code, data.forced) == (status, exit_code, False)
    assert (data.output, data.result) == ("out\n", 5)
    assert (data.stop_reason, data.stopped_at) == (None, None)
    with pytest.raises(SideExecutionError):
        response.raise_for_error()
    assert manager.get_status(id).data == before


@pytest.mark.parametrize("id", ["nobody", "", "\ud800", "x" * 100_000], ids=lambda id: id[:1] + ".")
def test_an_unknown_id_is_not_found(manager, id):
    for method in (manager.stop, manager.get_status, manager.wait):
        with within(10):
            response = method(id)
        assert not response.success
        assert (response.data.status, response.data.side_execution_id) == ("not_found", id)
        assert repr(id) in response.error
        assert response.to_json()
    with pytest.raises(SideExecutionError) as caught:
        manager.follow(id)  # at the call
    assert caught.value.response.data.status == "not_found"
    assert repr(id) in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"force": True}], ids=repr)
def test_stop_during_a_timeout_finds_it_already_stopped(manager, tmp_path, options):
    go_on = tmp_path / "go_on"
    code = when_asked("print('asked')\nwhile not os.path.exists(params['go']): time.sleep(0.005)")
    id = time_out(manager, code, {"go": str(go_on)})
    has_printed(manager, id, "asked\n")
    assert manager.get_status(id).data.status == "running"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(manager.stop, id, **options)
        if not options:
            with pytest.raises(concurrent.futures.TimeoutError):
                future.result(0.1)
            go_on.touch()
        data = future.result(20).data
    assert (data.status, data.stop_reason) == ("already_stopped", "timeout")
    assert data.forced is bool(options)


def test_a_longer_grace_does_not_prolong_a_stop(manager, start):
    id = start(STUBBORN)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, within(60):
        future = pool.submit(manager.stop, id, grace=0.3)
        has_printed(manager, id, "asked\n")
        assert manager.stop(id, grace=120).data.forced
        assert future.result(20).data.status == "stopped"


# -- stop_all


def test_stop_all_stops_side_by_side(manager, start, tmp_path):
    assert manager.stop_all() == []
    # Each one's cleanup waits until all of them have been asked.
    code = when_asked("""
        open(os.path.join(params["dir"], str(os.getpid())), "w").close()
        while len(os.listdir(params["dir"])) < 5: time.sleep(0.005)
    """)
    ids = [start(code, {"dir": str(tmp_path)}) for _ in range(5)]
    responses = manager.stop_all(grace=60)
    assert [each.data.side_execution_id for each in responses] == ids
    assert [(each.data.status, each.data.forced) for each in responses] == [("stopped", False)] * 5
    assert manager.stop_all() == []


# -- wait


def test_wait_returns_past_its_timeout_and_at_the_end(manager, start):
    id = start(FOREVER)
    began = time.monotonic()
    assert manager.wait(id, 0.1).raise_for_error().data.status == "running"
    assert time.monotonic() - began >= 0.1
    assert manager.wait(id, 0).data.status == "running"
    id = start("import time; print('ready'); time.sleep(0.1); return 1")
    with within(20):
        assert manager.wait(id, timeout=60).data.result == 1
    assert manager.wait(id, 0).data.status == "completed"


def test_many_threads_wait_for_one_execution(manager, start):
    id = start(FOREVER)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(manager.wait, id) for _ in range(8)]
        manager.stop(id)
        assert {future.result(20).data.status for future in futures} == {"stopped"}


def test_a_ctrl_c_ends_a_wait_and_harms_nothing(manager, start):
    id = start(FOREVER)
    # And again: a signal that comes just before the wait blocks does not end it.
    with pytest.raises(KeyboardInterrupt), alarm(signal.default_int_handler, 0.1, 5):
        manager.wait(id)
    assert manager.get_status(id).data.status == "running"
    assert manager.stop(id).data.status == "stopped"


# -- the surroundings of a snippet


def test_later_snippets_see_the_directory_that_the_host_moved_to(run, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_module.py").write_text(f"value = {name!r}")
        monkeypatch.chdir(tmp_path / name)
        code = "import os, own_module; return [os.getcwd(), own_module.value]"
        assert run(code).result == [os.path.realpath(tmp_path / name), name]
    shutil.rmtree(tmp_path / "b")
    assert run("return 2").result == 2


# -- limits


def test_processor_time_beyond_the_limit_is_sigxcpu(run):
    data = run("while True: pass", limits=Limits(cpu=1))
    assert (data.status, data.exit_code) == ("failed", -signal.SIGXCPU)
    assert data.error.splitlines()[0] == "killed by SIGXCPU"
    code = "import resource; return resource.getrlimit(resource.RLIMIT_CPU)[0]"
    assert run(code, limits=Limits(cpu=2.5)).result == 3  # a limit may be a fraction


def test_descriptors_beyond_the_limit_are_an_os_error(run):
    code = "files = []\nwhile len(files) < 100: files.append(open('/dev/null'))"
    data = run(code, limits=Limits(open_files=30))
    assert data.status == "failed"
    assert data.error.splitlines()[0].startswith("OSError: [Errno 24]")


# -- thread_id and message_id


def test_responses_have_the_thread_id_of_the_start_and_an_id_of_their_own(manager, start):
    id, other = start(FOREVER, thread_id="t"), start(FOREVER)
    responses = [
        manager.start_with_code("pass", thread_id="t"),
        manager.start_with_action_block("/nowhere", thread_id="t"),
        *(manager.get_status(id) for _ in range(2)),
        manager.wait(id, 0),
        *(manager.stop(id) for _ in range(2)),
    ]
    assert {(each.thread_id, each.to_dict()["threadId"]) for each in responses} == {("t", "t")}
    manager.wait(responses[0].id)
    others = [
        *manager.stop_all(),
        manager.get_status(other),
        *(manager.list_executions() for _ in range(2)),
        manager.list_action_blocks(os.path.dirname(__file__)),
        manager.stop("nobody"),
    ]
    assert {each.thread_id for each in others} == {None}
    ids = [each.message_id for each in responses + others]
    assert all(isinstance(each, str) and each for each in ids)
    assert len(set(ids)) == len(ids)


# -- usage


def test_memory_and_processor_time_are_those_of_the_whole_tree(manager, start):
    def usage(id):
        data = manager.get_status(id).data
        return data.memory_usage, data.cpu_usage

    child = "x = b'x' * 80_000_000\nprint('ready', flush=True)\nwhile True: pass"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    id, sleeping = start(code), start(FOREVER)
    # A figure may be a moment old. The snippet itself sleeps.
    memory, cpu = eventually(lambda: usage(id)[0] > 80_000_000 and usage(id)[1] > 1 and usage(id))
    assert isinstance(memory, int) and memory < 400_000_000 and isinstance(cpu, float)
    memory, cpu = eventually(lambda: usage(sleeping)[1] < 5 and usage(sleeping))
    assert 100_000 < memory < 100_000_000
    manager.stop(id)
    assert usage(id) == (None, None)


@pytest.mark.parametrize("preload", one_in(2, [[], ["json"]]))
def test_after_the_end_there_is_what_the_whole_tree_has_used(make_manager, preload):
    manager = make_manager(preload=preload)
    child = "x = bytearray(80_000_000)\\nfor i in range(0, len(x), 4096): x[i] = 1"
    busy = "import time\\nwhile time.process_time() < 0.2: pass"
    code = f"""
import os, subprocess, sys, time
subprocess.run([sys.executable, "-c", "{child}"], check=True)
if os.fork() == 0:
    os.setsid()
    subprocess.run([sys.executable, "-c", "{busy}"], check=True)
    os._exit(0)
os.wait()
"""
    small, large = finish(manager, "pass"), finish(manager, code)
    assert 0 <= small.cpu_time < 0.2 <= large.cpu_time < large.duration * os.cpu_count()
    assert 1_000_000 < small.peak_memory < 80_000_000 < large.peak_memory < 160_000_000
