"""Whatever an execution has spawned and however it ends: nothing of it is left."""

import contextlib
import os
import time

import pytest
from conftest import begin, crossed, eventually, finish, nothing_left, time_out, within
from programs import (
    DESCENDANTS,
    STARTED,
    WAIT,
    Bystander,
    Trace,
    attempts,
    needs_pids,
    program,
    spawned,
    when_asked,
    with_descendant,
)
from test_misbehaving_hosts import busy_cores

import sidexec

GRACE = 0.2
SHARED = {"grace_period": GRACE}
TICKS = os.sysconf("SC_CLK_TCK")
# Code, and the status, error and result then.
BY_ITSELF = {
    "return": ('return {"done": True}', "completed", None, {"done": True}),
    "exception": ('raise RuntimeError("on purpose")', "failed", "RuntimeError: on purpose", None),
    "os._exit": ("os._exit(7)", "failed", "exit code 7", None),
    "SIGKILL": (
        "os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)",
        "failed",
        "killed by SIGKILL",
        None,
    ),
}
ENDS = ("graceful_stop", "forced_stop", *BY_ITSELF, "timeout", "close")


@pytest.fixture(scope="module")
def bystander(tmp_path_factory):
    found = Bystander(tmp_path_factory.mktemp("bystander") / "log")
    yield found
    found.close()


def bring_to_its_end(manager, trace, kind, end, **params):
    """Run a snippet with a descendant, end it, and say what was left at that moment."""
    params = {**trace.params, **params}
    code = with_descendant(kind, BY_ITSELF[end][0] if end in BY_ITSELF else WAIT)
    if end in BY_ITSELF:
        data = finish(manager, code, params)
        left = trace.left()
        error = data.error and data.error.splitlines()[0]
        assert (data.status, error, data.result) == BY_ITSELF[end][1:]
        return left
    if end == "timeout":
        data = manager.wait(time_out(manager, code, params)).data
        left = trace.left()
        assert (data.status, data.stop_reason) == ("stopped", "timeout")
        return left
    if end == "close":
        with sidexec.ExecutionManager(grace_period=GRACE) as manager:
            id = begin(manager, code, params)
        left = trace.left()
        data = manager.get_status(id).data
        assert (data.status, data.stop_reason) == ("stopped", "closed")
        return left | {f"{each} " for each in trace.noted("keeper") if each.is_alive}
    stopped = manager.stop(begin(manager, code, params), force=end == "forced_stop")
    left = trace.left()
    assert (stopped.success, stopped.data.status) == (True, "stopped"), stopped
    assert stopped.data.forced or (end != "forced_stop" and kind != "deaf")
    return left


@pytest.mark.parametrize("kind, end", crossed(4, DESCENDANTS, ENDS))
def test_nothing_is_left(shared, trace, bystander, kind, end):
    left = bring_to_its_end(shared, trace, kind, end)
    assert left == set()
    assert trace.noted("descendant") and trace.noted("keeper")
    eventually(lambda: not any(each.exists for each in trace.noted("keeper")))
    assert bystander.is_untouched


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_of_a_storm_of_32_processes(shared, trace, bystander, end):
    assert bring_to_its_end(shared, trace, "storm", end, storms=32) == set()
    assert trace.noted("descendant")
    assert bystander.is_untouched


def test_nothing_is_left_of_all_kinds_at_once(shared, tmp_path, bystander):
    with contextlib.ExitStack() as stack:
        traces = {}
        for kind in DESCENDANTS:
            traces[kind] = Trace(tmp_path / kind)
            stack.callback(traces[kind].kill)
            begin(shared, with_descendant(kind), traces[kind].params)
        responses = shared.stop_all()
        left = {kind: trace.left() for kind, trace in traces.items()}
        assert [each.data.status for each in responses] == ["stopped"] * len(traces)
        assert not any(left.values()), left
        assert bystander.is_untouched


def test_children_forked_while_the_sweep_runs_are_gone(trace):
    # Asked, each goes on in one more process, in a session of its own.
    code = program(
        spawned(
            "daemon",
            "quiet()",
            "def fork_on(signum, frame):",
            "    if os.fork() == 0: os.setsid(); note('child')",
            "signal.signal(signal.SIGTERM, fork_on)",
            "linger('descendant')",
        ),
        "wait_for_note('descendant')\nreturn 1",
    )
    for grace in (GRACE, 10 * GRACE, 50 * GRACE):  # a busy machine may need longer to get there
        with sidexec.ExecutionManager(grace_period=grace) as manager:
            assert finish(manager, code, trace.params).result == 1
        assert trace.left() == set()
        if trace.noted("child"):
            return
    raise AssertionError("nothing was forked")


@pytest.mark.parametrize("how", ["daemon", "stopped_child"])
def test_what_the_snippet_leaves_is_asked_before_it_is_killed(make_manager, trace, how):
    """And hears of it where it has been stopped."""
    stop = "os.kill(os.getpid(), signal.SIGSTOP)" if how == "stopped_child" else "pass"
    code = program(
        spawned(
            how,
            "quiet(); os.setsid()",
            "signal.signal(signal.SIGTERM, lambda *args: (note('asked'), time.sleep(0.1), os._exit(0)))",
            f"note('descendant'); {stop}",
            "time.sleep(60)",
        ),
        "wait_for_note('descendant')",
    )
    manager = make_manager(grace_period=60.0)
    assert finish(manager, code, trace.params).status == "completed"
    assert trace.left() == set()
    assert len(trace.noted("asked")) == 1


def test_nothing_is_left_of_what_the_executions_own_cleanup_starts(shared, trace):
    code = program(when_asked(spawned("daemon", 'quiet(); deaf(); linger("descendant")') + STARTED))
    assert shared.stop(begin(shared, code, trace.params)).data.status == "stopped"
    assert trace.left() == set()
    assert trace.noted("descendant")


def take_pids(stack, directory, trace, *names):
    """Start bystanders that have the pids of processes that have ended.

    None where a stranger's process has been quicker to get one of them.
    """
    ended = [each for name in names for each in trace.noted(name)]
    assert len(ended) == len(names)
    # Start times are told in ticks, and no two processes of a pid may have the same one.
    last = max(each.started for each in ended)
    eventually(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS > last + 2)
    found = []
    # From the highest down, or a stranger's process would take the next one meanwhile.
    for each in sorted(ended, key=lambda each: each.pid, reverse=True):
        eventually(lambda each=each: not each.exists)
        other = Bystander.with_pid(directory / f"log {each.pid}", each.pid, tries=10)
        if other is None:
            return None
        stack.callback(other.close)
        found.append(other)
    return found


@needs_pids
@pytest.mark.parametrize("force", (False, True))
def test_a_process_with_the_pid_of_an_ended_descendant_is_not_touched(shared, tmp_path, force):
    code = program(
        DESCENDANTS["deaf"],
        """
wait_for_note("descendant")
os.waitpid(in_child(lambda: note("member")), 0)
os.waitpid(in_child(lambda: (os.setsid(), note("leader"))), 0)
daemon(lambda: note("daemon"))
wait_for_note("daemon")
""",
        WAIT,
    )
    for trace in attempts(tmp_path):
        with contextlib.ExitStack() as stack:
            id = begin(shared, code, trace.params)
            others = take_pids(stack, tmp_path, trace, "member", "leader", "daemon")
            shared.stop(id, force=force).raise_for_error()
            assert trace.left() == set()
            assert all(each.is_untouched for each in others or ())
            if others is not None:
                return


@needs_pids
def test_a_process_with_the_pid_of_an_ended_execution_is_not_touched(tmp_path):
    for trace in attempts(tmp_path):
        with contextlib.ExitStack() as stack:
            with sidexec.ExecutionManager(grace_period=GRACE) as manager:
                id = begin(manager, with_descendant("daemon"), trace.params)
                manager.stop(id).raise_for_error()
                others = take_pids(stack, tmp_path, trace, "keeper", "snippet", "descendant")
                assert manager.stop(id, force=True).data.status == "already_stopped"
                assert manager.get_status(id).data.memory_usage is None
                assert manager.start_with_code("pass").success
            assert all(each.is_untouched for each in others or ())
            if others is not None:
                return


@pytest.mark.slow
def test_200_rounds_with_both_cores_busy(tmp_path, bystander):
    with busy_cores(), nothing_left(), sidexec.ExecutionManager(grace_period=5.0) as manager:
        for number in range(200):
            trace = Trace(tmp_path / str(number))
            id = begin(manager, with_descendant("daemon"), trace.params)
            with within(15):
                stopped = manager.stop(id, force=number % 3 == 0)
            assert (stopped.data.status, trace.left()) == ("stopped", set())
    assert bystander.is_untouched
