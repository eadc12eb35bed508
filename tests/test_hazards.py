"""One test for each hazard that was seen to happen, named after it.

What stands elsewhere:
- asking the group kills a helper, a second SIGTERM, exit handlers: test_stopping (ASKED)
- a grandchild holds the pipe: test_no_survivors (pipe_holder)
- asyncio swallows the ask, also in callbacks: test_stopping (ASYNC)
- an ask that a bare `except` swallows, a stopped snippet: test_stopping (deaf, stopped)
- an ask before the handler stands: here, and test_stopping (right after the start)
- a thread that delays the exit does not delay the result: test_stopping, test_snippet
- a stopped process never sees SIGTERM, of descendants: test_no_survivors (stopped)
- `PR_SET_PDEATHSIG` fires when the creating thread ends: test_host_death (in_ended_thread)
- a worker that the host forks keeps the sockets open: test_host_death (with_worker)
- `Thread.start()` at interpreter exit raises: test_host_death (exit handlers)
- a process outside of the tree holds the pipe: test_output (a_stranger_holds)
- a host that ignores or blocks signals, or reaps everything: test_misbehaving_hosts (SETUPS)
- `killpg(pid, 0)` succeeds on a group of zombies, without /proc: test_without_kernel_help
- `Popen.send_signal` reaps and so frees the pid: here, and test_no_survivors (the_pid_of)
"""

import concurrent.futures
import contextlib
import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
from conftest import (
    HOST_ENVIRONMENT,
    alarm,
    begin,
    children,
    eventually,
    finish,
    one_in,
    run_as_host,
    within,
)
from conftest import swept_manager as manager  # noqa: F401
from programs import (
    CLEAN_UP,
    Bystander,
    attempts,
    needs_pids,
    program,
    spawned,
    with_descendant,
)

from sidexec import procfs
from sidexec.child import masking
from sidexec.engine import pair, thread
from sidexec.engine.descriptors import close_all

HANG = 30.0
ASKED = 128 + signal.SIGTERM


# -- asking


def test_concurrent_stops_ask_once(manager, start):
    id = start("""
        import signal, time
        count = 0
        def asked(signum, frame):
            global count
            count += 1
        signal.signal(signal.SIGTERM, asked)
        print("ready")
        while not count: time.sleep(0.01)
        time.sleep(0.15)
        print(count)
    """)
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        found = []
        for grace in (40, 30, 20, 10, 5):  # each but the first brings the end nearer
            found.append(pool.submit(manager.stop, id, grace=grace))
            time.sleep(0.02)
    assert [each.result().data.output for each in found] == ["ready\n1\n"] * 5


def test_a_sigterm_before_the_handler_stands_does_not_kill(preloading):
    # Every fork takes a while, so that the ask finds a snippet that has just come up.
    slow = "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(0.1))\n"
    manager = preloading({"slow_fork": slow}, grace_period=10.0)
    data = manager.stop(manager.start_with_code("while True: pass").id).data
    assert (data.status, data.forced, data.exit_code) == ("stopped", False, ASKED)


def test_an_ask_that_a_finalizer_swallows_is_not_lost(manager, start):
    id = start("""
        import time
        class Held:
            def __del__(self):
                print("ready")
                time.sleep(60)
        try:
            Held()
            time.sleep(60)
        finally:
            print("cleaned up")
    """)
    stopped = manager.stop(id)
    assert stopped.data.output == "ready\ncleaned up\n"
    assert (stopped.data.forced, stopped.data.exit_code) == (False, ASKED)


# -- sweeping


def test_a_member_that_ignores_sigterm_is_killed_although_the_leader_left_politely(
    make_manager, trace, monkeypatch
):
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 600.0)  # not by the watchdog, but the keeper
    manager = make_manager(grace_period=60.0)
    id = begin(manager, with_descendant("deaf", CLEAN_UP), trace.params)
    manager.future(id).cancel()  # asks, and does not wait
    eventually(lambda: not trace.noted("snippet")[0].is_alive)
    assert trace.noted("descendant")[0].is_alive
    stopped = manager.stop(id, grace=0.1)
    assert trace.left() == set()
    assert (stopped.data.exit_code, stopped.data.forced) == (ASKED, True)
    assert len(trace.noted("cleaned")) == 1


def test_a_group_of_zombies_counts_as_gone(make_manager, trace):
    code = 'in_child(lambda: note("zombie"))\nwait_for_note("zombie")\nreturn 1'
    with within(40):
        assert finish(make_manager(grace_period=60.0), program(code), trace.params).result == 1
    assert trace.left() == set()


def leave_a_deaf_stray(manager, trace, spawn):
    """An execution whose leader has ended, while a stray has its grace period."""
    stray = spawned(spawn, 'quiet(); deaf(); linger("descendant")')
    code = program(stray, "wait_for_note('descendant')\nos._exit(0)")
    id = manager.start_with_code(code, trace.params).id
    eventually(lambda: trace.noted("descendant") and not trace.noted("snippet")[0].is_alive)
    return id


@needs_pids
def test_nobody_gets_the_pid_of_a_leader_whose_group_has_a_member(make_manager, trace, tmp_path):
    manager = make_manager(grace_period=60.0)
    id = leave_a_deaf_stray(manager, trace, "in_child")
    assert Bystander.with_pid(tmp_path / "log", trace.noted("snippet")[0].pid, tries=3) is None
    assert trace.noted("descendant")[0].is_alive
    trace.noted("descendant")[0].kill()
    assert manager.wait(id, 30).data.status == "completed"
    assert trace.left() == set()


@needs_pids
@pytest.mark.parametrize("killed", one_in(2, [True, False]))
def test_whoever_gets_the_pid_of_a_leader_whose_group_is_gone_is_not_touched(
    make_manager, tmp_path, killed
):
    """Nor when keeper and launcher are killed, and the host, who knows less, kills the group."""
    for trace in attempts(tmp_path):  # somebody else on this machine may be quicker to get it
        before = set(children())
        manager = make_manager(grace_period=30.0 if killed else 0.6)
        id = leave_a_deaf_stray(manager, trace, "daemon")
        (launcher,) = set(children()) - before
        # Who begins within the same tick of /proc as the snippet can't be told from that.
        next_tick = procfs.now() + 1 / os.sysconf("SC_CLK_TCK")
        eventually(lambda: procfs.now() > next_tick)
        # A leader too, so that a signal to the old group would reach it.
        other = Bystander.with_pid(tmp_path / "log", trace.noted("snippet")[0].pid, tries=10)
        with other or contextlib.nullcontext():
            was_in_time = trace.noted("descendant")[0].is_alive
            if killed:
                os.kill(launcher, signal.SIGSTOP)  # so that it does not sweep
                trace.noted("keeper")[0].kill()
                os.kill(launcher, signal.SIGKILL)
            data = manager.wait(id, 30).data
            assert data.status == ("failed" if killed else "completed")
            assert killed == ("gone" in (data.error or ""))
            assert killed or trace.left() == set()
            manager.close()  # now it has done all that it may do
            assert other is None or other.is_untouched
        if other is not None and was_in_time:
            return


@needs_pids
@pytest.mark.parametrize("ends", one_in(2, [False, True]))
def test_a_stray_that_gets_the_pid_of_the_leader_is_a_stray_like_any_other(
    make_manager, trace, ends
):
    manager = make_manager(grace_period=0.5)
    code = program(f"""
leader = os.getpid()
def body():
    quiet()
    deaf()
    while True:
        try: os.kill(leader, 0)
        except ProcessLookupError: break
        time.sleep(0.0005)
    for _ in range(200):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(leader - 1))
        pid = os.fork()
        if pid == 0:
            if os.getpid() == leader:
                os.setsid()
                note("descendant")
                if {ends}: time.sleep(0.05); os._exit(7)
                time.sleep(60)
            os._exit(0)
        if pid == leader: os._exit(0)
        os.waitpid(pid, 0)
    os._exit(0)
daemon(body)
os._exit(0)
""")
    for _ in range(10):
        with within(HANG):
            data = finish(manager, code, trace.params)
        assert (data.status, data.exit_code) == ("completed", 0)
        assert trace.left() == set()
        if trace.noted("descendant"):
            return
    raise AssertionError("the pid was always taken")


# -- the host


HANDLER_HOST = """
import faulthandler, signal, sys
faulthandler.dump_traceback_later(20, exit=True)
import sidexec
interrupted, call, interval = sys.argv[1:]
manager = sidexec.ExecutionManager(grace_period=5.0)
id = manager.start_with_code("import time\\nprint('ready', flush=True)\\ntime.sleep(60)").id
def handler(signum, frame):
    answers.append(eval(call))
answers = []
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.1, float(interval))
exec(interrupted)
print(manager.get_status(id).data.status, manager.get_status(id).data.stop_reason)
manager.close()
"""
WAIT_AGAIN_AND_AGAIN = """
while len(answers) < 300: manager.wait(id, 0.0)
signal.setitimer(signal.ITIMER_REAL, 0)
assert {each.data.status for each in answers} == {"running"}
manager.stop(id)
"""


@pytest.mark.parametrize(
    "interrupted, call, interval",
    [
        ("manager.wait(id, 10)", "manager.stop(id)", 0),
        ("list(manager.follow(id))", "manager.stop_all()", 0),
        ("manager.wait(id, 10)", "manager.close()", 0),
        ("list(manager.follow(id))", "(manager.run('pass'), manager.stop(id))", 0),
        # Nearly all the time is spent where a lock of the execution's would be held.
        (WAIT_AGAIN_AND_AGAIN, "manager.wait(id, 0.0)", 0.001),
    ],
    ids=("stop", "stop_all", "close", "run", "wait"),
)
def test_a_call_in_a_signal_handler_does_not_deadlock(interrupted, call, interval):
    reason = "closed" if "close" in call else "requested"
    assert run_as_host(HANDLER_HOST, interrupted, call, str(interval)) == f"stopped {reason}\n"


class Interrupted(Exception):
    pass


def test_a_handler_that_raises_inside_a_start_loses_no_execution(make_manager, trace):
    manager = make_manager(grace_period=5.0)
    finish(manager, "pass")
    code = program("while True: time.sleep(60)")
    raised = began = 0
    armed = False
    gc.collect()  # or the handler may raise in what is collected meanwhile

    def handler(signum, frame):
        if armed:
            raise Interrupted

    with alarm(handler, 0):
        for number in range(60):
            armed = True
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.00005 + number % 30 * 0.00005)
                    manager.start_with_code(code, trace.params).raise_for_error()
                    began += 1
                finally:
                    armed = False
            except Interrupted:
                raised += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert raised > 5
    # All that is running can be found and stopped: nothing else runs.
    assert manager.list_executions("running").data.count >= began
    finish(manager, "pass")  # one that was interrupted at once may be on its way there still
    stopped = manager.stop_all()
    assert len(stopped) >= began and all(each.success for each in stopped)
    assert trace.left() == set()


PRELOADED = """
import logging, multiprocessing, os, random, tempfile, threading, uuid
directory = tempfile.TemporaryDirectory()
"""


def test_nothing_of_the_launcher_survives_the_fork(preloading):
    manager = preloading({"preloaded": PRELOADED})
    code = """
import logging, multiprocessing, os, preloaded, random, tempfile, threading, uuid
return {
    "own": [
        os.getpid() == multiprocessing.current_process().pid,
        multiprocessing.parent_process() is None,
        logging.LogRecord("", 0, "", 0, "", (), None).process == os.getpid(),
        threading.main_thread().native_id == threading.get_native_id() == os.getpid(),
        os.path.isdir(preloaded.directory.name),
    ],
    "random": random.random(),
    "file": next(tempfile._get_candidate_names()),
    "uuid": str(uuid.uuid1()) + str(uuid.uuid4()),
}
"""
    results = []
    for _ in range(3):
        results.append(finish(manager, code).result)
        assert results[-1].pop("own") == [True] * 5
    for name in results[0]:
        assert len({each[name] for each in results}) == 3, name


# -- what must not bring the host's thread down


def test_a_host_that_closes_all_descriptors_is_not_held_up():
    """Those of the manager, too: what runs is stopped, and the next start works."""
    code = """
import os, sidexec, time
from sidexec.engine import launcher, pair, thread
thread.SWEEP_ALLOWANCE = 0.2
launcher.EXIT_LIMIT = 60
waits = []
wait = pair.Pair.wait
pair.Pair.wait = lambda *args, **options: waits.append(1) or wait(*args, **options)
manager = sidexec.ExecutionManager(grace_period=0.2)
def wait_for_spare():
    while not manager._engine._launchers[-1].requests._spares: time.sleep(0.005)
for is_idle in (False, True):  # at once, and when all threads wait
    id = manager.start_with_code("import time; time.sleep(60)").id
    if is_idle: wait_for_spare()
    os.closerange(3, 200)
    response = manager.stop(id)
    assert response.data.status == "stopped", response
    assert len(waits) < 100, len(waits)
assert manager.wait(manager.start_with_code("return 1").id).data.result == 1
wait_for_spare()
os.closerange(3, 200)
manager.close()
os._exit(0)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=HOST_ENVIRONMENT, timeout=HANG, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_pair_that_can_not_be_set_up_closes_no_descriptor_twice(monkeypatch):
    """By the second time another thread may have a file with that number."""
    ends = [*socket.socketpair(), *socket.socketpair()]
    control, channel, out, err = fds = [each.detach() for each in ends]

    def sender(fd, sender=pair.Sender):
        if fd == channel:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return sender(fd)

    closed = []
    monkeypatch.setattr(pair, "Sender", sender)
    monkeypatch.setattr(pair, "close_all", lambda fds: closed.extend(fds) or close_all(fds))
    made = pair.Pair(0, fds, False)
    assert made.wait_until_ready() == pair.NO_DESCRIPTORS
    made.close()
    assert sorted(closed) == sorted([channel, out, err])
    with pytest.raises(OSError):  # its sender has closed it
        os.fstat(control)


def test_a_snippet_that_stops_its_keeper_and_breaks_the_protocol_is_ended(
    make_manager, monkeypatch
):
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 0.2)
    manager = make_manager(grace_period=0.2, default_timeout=None)
    id = manager.start_with_code("""
import os, signal, time
os.kill(os.getppid(), signal.SIGSTOP)
for fd in range(3, 2000):
    try: os.write(fd, b"garbage!!!!")
    except OSError: pass
time.sleep(100)
""").id
    assert manager.wait(id, HANG).data.status == "failed"


def test_a_handler_that_raises_while_signals_are_being_masked_leaves_no_mask(monkeypatch):
    def pthread_sigmask(how, signals):
        before = signal.pthread_sigmask(how, signals)
        if how == signal.SIG_BLOCK and signals:
            raise ZeroDivisionError  # as a handler that was due
        return before

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    replaced = types.SimpleNamespace(**{**vars(signal), "pthread_sigmask": pthread_sigmask})
    monkeypatch.setattr(masking, "_signal", replaced)
    with pytest.raises(ZeroDivisionError):
        with masking.Masked():
            pass
    try:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
