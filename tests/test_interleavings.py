"""One thread loses the processor between two steps, and another one, or a callback, goes on."""

import gc
import os
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
    IS_FREE_THREADED,
    alarm,
    begin,
    children,
    descriptors,
    eventually,
    finish,
    within,
)
from programs import when_asked
from test_misbehaving_hosts import host  # noqa: F401
from test_untrusted import CHANNEL

from sidexec import starting
from sidexec.engine import waiting
from sidexec.engine.execution import State
from sidexec.engine.input import Input
from sidexec.engine.launcher import Launcher
from sidexec.engine.pair import Pair

READ = "return input()"
HANG = 30.0


def test_input_that_comes_while_a_pair_takes_its_request_is_sent(make_manager, monkeypatch):
    may_take, has_fed = threading.Event(), threading.Event()
    take, feed, add = Pair.wait_for_request, Pair.feed, Input.add

    def take_later(self):
        execution = take(self)
        may_take.wait(HANG)
        return execution

    def feed_and_tell(self, input):
        feed(self, input)
        has_fed.set()

    def add_later(self, data, *, close):
        may_take.set()
        assert has_fed.wait(HANG)
        return add(self, data, close=close)

    manager = make_manager()
    finish(manager, "pass")
    eventually(lambda: any(each.requests._spares for each in manager._engine._launchers))
    monkeypatch.setattr(Pair, "wait_for_request", take_later)
    monkeypatch.setattr(Pair, "feed", feed_and_tell)
    monkeypatch.setattr(Input, "add", add_later)
    id = manager.start_with_code(READ, stdin=subprocess.PIPE).id
    assert manager.send_input(id, "hello\n").success
    assert manager.wait(id, HANG).data.result == "hello"


def test_input_is_sent_while_on_output_waits_for_room_for_it(make_manager):
    manager, ids = make_manager(), []

    def answer(chunk):
        if len(ids) == 1:
            # Nothing is read any more, as the callback is too far behind.
            delivery = manager._engine.executions[ids[0]].delivery
            eventually(lambda: delivery._wake is not None, HANG)
            manager.send_input(ids[0], b"x" * 3_000_000, close=True)
            ids.append("answered")

    code = """
import os, sys, threading, time
def shout():
    for _ in range(40): os.write(1, b"y" * 65536)
thread = threading.Thread(target=shout)
thread.start()
time.sleep(0.3)  # its pipe is full by then
size = len(sys.stdin.buffer.read())
thread.join()
return size
"""
    go = threading.Event()
    started = manager.start_with_code(
        code, stdin=subprocess.PIPE, on_output=lambda chunk: (go.wait(HANG), answer(chunk))
    )
    ids.append(started.id)
    go.set()
    assert manager.wait(started.id, HANG).data.result == 3_000_000


@pytest.mark.slow
def test_what_has_ended_in_time_has_not_timed_out(make_manager, monkeypatch):
    look, has_slept = Pair.deadline, []

    def look_late(self):
        if not has_slept:
            has_slept.append(True)
            time.sleep(1.0)
        return look.fget(self)

    manager = make_manager()
    finish(manager, "pass")
    monkeypatch.setattr(Pair, "deadline", property(look_late))
    data = manager.run("return 5", timeout=0.5).data
    assert has_slept
    assert (data.status, data.result, data.stop_reason) == ("completed", 5, None)


@pytest.mark.slow
def test_a_timeout_does_not_shorten_the_grace_of_a_stop(make_manager):
    manager = make_manager(grace_period=0.1)
    code = when_asked("""
        while time.monotonic() < params["until"]:
            print("busy")
            time.sleep(0.02)
    """)
    until = time.monotonic() + 1.6
    id = manager.start_with_code(code, {"until": until}, timeout=1.2).id
    eventually(lambda: "ready\n" in manager.get_status(id).data.output)
    stopped = manager.stop(id, grace=60)
    assert (stopped.data.forced, stopped.data.exit_code) == (False, 143)
    assert stopped.data.stop_reason == "requested"


def test_what_a_signal_handler_raises_during_a_start_is_raised(preloading):
    manager = preloading({"slow_to_load": "import time\ntime.sleep(60)\n"})

    def raise_timeout(signum, frame):
        if manager.list_executions("running").data.count:  # or nothing has been handed over
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise TimeoutError("of the caller's own")

    with within(HANG), pytest.raises(TimeoutError, match="of the caller's own"):
        with alarm(raise_timeout, 0.3, 0.1):
            manager.start_with_code("pass")
    assert manager.list_executions("running").data.count == 1  # it may still be stopped


def test_callbacks_of_futures_can_close_the_manager(make_manager):
    manager = make_manager()
    with ThreadPoolExecutor(2) as pool:
        ids = list(pool.map(lambda _: begin(manager, when_asked("pass")), range(2)))
    closed = []
    for id in ids:
        manager.future(id).add_done_callback(lambda _: (manager.close(), closed.append(True)))
    manager.stop(ids[0])
    eventually(lambda: len(closed) == 2, HANG)
    with within(HANG):
        manager.close()


def test_callbacks_of_futures_have_the_signal_mask_of_whoever_asked_for_the_future(make_manager):
    """What a process that they start inherits; all threads of the library block all signals."""
    manager = make_manager()
    masks = []

    def note(future):
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    own = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        for on_output in (None, lambda chunk: None):
            id = begin(manager, when_asked("pass"), on_output=on_output)
            manager.future(id).add_done_callback(note)
            manager.future(id).cancel()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, own)
    eventually(lambda: len(masks) == 2)
    assert masks == [{*own, signal.SIGUSR2}] * 2


def test_a_start_that_comes_while_a_launcher_is_let_go_of_is_not_stopped(make_manager, monkeypatch):
    retire, is_late, has_begun = Launcher.retire, threading.Event(), threading.Event()

    def retire_late(self):
        is_late.set()
        assert has_begun.wait(HANG)
        retire(self)

    manager = make_manager()
    own = {**os.environ, "OWN": "1"}
    monkeypatch.setattr(Launcher, "retire", retire_late)
    manager.start_with_code("pass", env=own)
    assert is_late.wait(HANG)
    id = manager.start_with_code("import time; time.sleep(0.3); return 5", env=own).id
    eventually(lambda: manager._engine.executions[id].state is State.RUNNING, HANG)
    has_begun.set()
    data = manager.wait(id).data
    assert (data.status, data.result) == ("completed", 5), data
    eventually(lambda: not manager._engine._launchers, HANG)


def test_a_pair_that_ends_leaves_one_with_the_same_number_alone(make_manager):
    manager = make_manager()
    finish(manager, "pass")
    (launcher,) = manager._engine._launchers
    eventually(lambda: launcher._pairs)
    ((number, pair),) = launcher._pairs.items()

    class Another:
        keeper_pid = number

    launcher.release(Another())
    assert launcher._pairs == {number: pair}


def test_a_forked_worker_waits_for_no_callback_and_stops_nothing(host):  # noqa: F811
    answers = host("""
        manager = sidexec.ExecutionManager(grace_period=30)
        code = "import time\\nprint('ready')\\ntime.sleep(60)"
        id = manager.start_with_code(code, on_output=lambda chunk: None).id
        next(manager.follow(id))
        future = manager.future(id)
        pid = os.fork()
        if pid == 0:
            future.cancel()
            report(["forked" in manager.stop(id).error, "forked" in manager.wait(id).error])
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert manager.wait(id, timeout=0.2).data.status == "running"
        assert manager.stop(id).data.status == "stopped"
        manager.close()
    """)
    assert answers == [True, True]


def test_a_callback_of_what_could_not_begin_can_close_the_manager(
    make_manager, tmp_path, monkeypatch
):
    """The pair that has its request is lost, and no other interpreter can be started."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    take, has_taken, may_go_on = Pair.wait_for_request, threading.Event(), threading.Event()

    def take_late(self):
        execution = take(self)
        if execution is not None and "late" in execution.id:
            has_taken.set()
            assert may_go_on.wait(HANG)
        return execution

    monkeypatch.setattr(Pair, "wait_for_request", take_late)
    manager = make_manager(python=python)
    finish(manager, "pass")
    (launcher,) = manager._engine._launchers
    eventually(lambda: launcher.requests._spares)
    monkeypatch.setattr(os, "urandom", lambda size: Name(b"late"))
    id = manager.start_with_code("return 1").id
    assert has_taken.wait(HANG)
    closed = []
    manager.future(id).add_done_callback(lambda _: (manager.close(), closed.append(True)))
    python.unlink()
    os.kill(launcher._process.pid, signal.SIGKILL)
    eventually(lambda: launcher.is_gone, HANG)
    may_go_on.set()
    eventually(lambda: closed, HANG)


class Name(bytes):
    def hex(self):
        return self.decode()


def test_a_launcher_too_many_is_dropped_unless_it_is_used(make_manager):
    manager = make_manager()
    before = set(children())
    finish(manager, "pass")
    (first,) = launchers = manager._engine._launchers

    def another():
        made = Launcher(first._settings, {}, first.identity, manager._engine._on_gone)
        launchers.append(made)
        return made

    unused, used = another(), another()
    used.boot()
    eventually(lambda: used._process)
    for each in unused, used:
        each.discard()
    assert launchers == [first, used]
    unused.boot()
    assert unused.is_gone and unused._process is None
    manager.close()
    assert set(children()) <= before


def test_close_waits_for_no_thread_that_has_dropped_a_launcher(make_manager, monkeypatch):
    monkeypatch.setattr(waiting, "MUST_JOIN", True)
    manager = make_manager()
    finish(manager, "pass")
    (first,) = manager._engine._launchers
    with ThreadPoolExecutor(1) as pool:
        made = Launcher(first._settings, {}, first.identity, manager._engine._on_gone)
        pool.submit(made.discard).result()
        caller = pool.submit(threading.get_native_id).result()
        assert made.is_gone and caller not in waiting._ending


def test_what_has_ended_holds_no_more_than_its_output_and_result(make_manager):
    class Held:
        pass

    def use(manager):
        held = Held()
        id = manager.start_with_code("print('x')", on_output=lambda chunk: held).id
        manager.wait(id)
        return weakref.ref(held)

    manager = make_manager()
    held = use(manager)
    eventually(lambda: gc.collect() is not None and held() is None)
    code = (
        CHANNEL
        + """
send(frame(b"v", b"[" * 1_000_000))
send(frame(b"v", b"1" * 1_000_000, length=2_000_000))
"""
    )
    for timeout in 0.0, 30.0:
        id = manager.start_with_code(code, {"large": "x" * 5_000_000}, timeout=timeout).id
        manager.wait(id)
        execution = manager._engine.executions[id]
        assert (execution.request, execution.reported) == (b"", None)
        eventually(lambda: not left_in_pairs())


def left_in_pairs():
    """How many bytes all pairs hold that were not sent, or not taken."""
    if IS_FREE_THREADED:
        gc.collect()  # settles the references to what a launcher's thread has made
    pairs = [each for each in gc.get_objects() if type(each) is Pair]
    return sum(len(each._unsent) + len(each._snippet_inbox._data) for each in pairs)


def test_what_runs_holds_no_copy_of_the_environment(start, monkeypatch):
    class Environment(dict):
        pass

    def current():
        made = Environment(os.environ)
        copies.append(weakref.ref(made))
        return made

    copies = []
    monkeypatch.setattr(starting, "_current_environment", current)
    for _ in range(5):
        start(FOREVER)
    # The launcher holds the one that it runs in.
    eventually(lambda: gc.collect() is not None and sum(each() is not None for each in copies) == 1)
    assert len(copies) == 5


def test_what_was_stopped_before_it_was_sent_holds_no_params(make_manager, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    never, unsent = make_manager(python=python), make_manager()
    finish(unsent, "pass")
    monkeypatch.setattr(Pair, "_send_rest", lambda self: None)
    for manager in never, unsent:
        start = threading.Thread(target=manager.start_with_code, args=("pass", {"a": "x" * 5000}))
        start.start()
        (found,) = eventually(lambda: manager.list_executions("running").data.executions)
        execution = manager._engine.executions[found.side_execution_id]
        if manager is unsent:
            eventually(lambda: execution.owner and execution.owner._unsent)
        manager.stop(execution.id, force=True)
        start.join()
        assert execution.request == b""
        eventually(lambda: not left_in_pairs())


@pytest.mark.skipif(not IS_FREE_THREADED, reason="elsewhere the last reference closes it at once")
def test_descriptors_of_a_start_are_closed_while_its_thread_is_in_a_call_of_c_code(make_manager):
    manager = make_manager()
    finish(manager, "pass", input="")
    reader, writer = os.pipe()

    def with_a_spare_pair():
        (launcher,) = manager._engine._launchers
        eventually(lambda: launcher.requests._spares)
        return len(descriptors())

    def stop():
        eventually(lambda: ids)
        manager.stop(ids[0], force=True)
        after.append(with_a_spare_pair())
        os.close(writer)

    before, after, ids = with_a_spare_pair(), [], []
    thread = threading.Thread(target=stop)
    thread.start()
    ids.append(manager.start_with_code("import time; time.sleep(60)", stdin=subprocess.PIPE).id)
    os.read(reader, 1)
    thread.join()
    os.close(reader)
    assert after == [before]
