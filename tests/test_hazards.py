"""One test for each hazard that was seen to happen, named after it.

What stands elsewhere:
- a stopped process never sees SIGTERM, of descendants: test_no_survivors (stopped)
- `PR_SET_PDEATHSIG` fires when the creating thread ends: test_host_death (ended_thread)
- a worker that the host forks keeps the sockets open: test_host_death (with_worker)
- `Thread.start()` at interpreter exit raises: test_host_death (exit handlers)
- `killpg(pid, 0)` succeeds on a group of zombies, without /proc: test_without_kernel_help
- `Popen.send_signal` reaps and so frees the pid: here, and test_no_survivors (the_pid_of)
"""

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import types

import programs
import pytest
from conftest import children, eventually, one_in
from programs import Bystander, Trace

import sidexec
from sidexec.child import masking
from sidexec.engine import thread

HANG = 30.0
ASKED = 128 + signal.SIGTERM


def run_host(code, *arguments):
    """Run a host of its own to its end: what it printed."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(sidexec.__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": package},
        text=True,
        timeout=HANG,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


# -- asking


def test_asking_leaves_the_helper_alone_that_a_finally_needs(manager, start):
    id = start(
        """
import subprocess, time
helper = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    time.sleep(0.1)
    print(helper.communicate(b"written by the helper")[0].decode(), helper.returncode)
"""
    )
    stopped = manager.stop(id)
    assert stopped.data.output == "ready\nwritten by the helper 0\n"
    assert not stopped.data.forced


def test_a_second_sigterm_does_not_abort_the_cleanup(manager, start):
    id = start(
        """
import os, signal, time
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
    print("cleaned up")
"""
    )
    stopped = manager.stop(id)
    assert stopped.data.output == "ready\ncleaned up\n"
    assert (stopped.data.exit_code, stopped.data.forced) == (ASKED, False)


def test_concurrent_stops_ask_once(manager, start):
    id = start(
        """
import signal, time
count = 0
def asked(signum, frame):
    global count
    count += 1
    if count == 1:
        print("asked", flush=True)
signal.signal(signal.SIGTERM, asked)
print("ready", flush=True)
until = time.monotonic() + 60
while not count and time.monotonic() < until:
    time.sleep(0.01)
time.sleep(0.3)
print(count)
"""
    )
    found = []
    threads = [
        threading.Thread(target=lambda grace=grace: found.append(manager.stop(id, grace=grace)))
        for grace in (40, 30, 20, 10, 5)  # each but the first brings the end nearer
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(HANG)
    assert [each.data.output for each in found] == ["ready\nasked\n1\n"] * 5


def test_a_sigterm_before_the_handler_stands_does_not_kill(tmp_path, make_manager):
    # Every fork takes a while, so that the ask finds a snippet that has just come up.
    (tmp_path / "slow_fork.py").write_text(
        "import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(0.2))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    manager = make_manager(env=env, preload=["slow_fork"], grace_period=10.0)
    id = manager.start_with_code("while True: pass").raise_for_error().data.side_execution_id
    stopped = manager.stop(id)
    assert (stopped.data.status, stopped.data.forced) == ("stopped", False)
    assert stopped.data.exit_code == ASKED


def test_a_stop_right_after_a_start_either_finds_nothing_begun_or_lets_it_clean_up(manager):
    code = """
import os
os.write(1, b"begun ")
try:
    while True:
        pass
finally:
    os.write(1, b"cleaned")
"""
    for number in range(40):
        id = manager.start_with_code(code).raise_for_error().data.side_execution_id
        time.sleep(number * 0.0002)
        stopped = manager.stop(id)
        assert (stopped.data.status, stopped.data.forced) == ("stopped", False)
        # In the two lines before the `try`, it ends without.
        assert stopped.data.output in ("", "begun ", "begun cleaned"), stopped.data.output
        assert stopped.data.exit_code in (None, ASKED)


@pytest.mark.parametrize("how", ("call_soon", "signal handler", "await"))
def test_asyncio_does_not_swallow_the_ask(manager, start, how):
    in_callback = {
        "call_soon": "asyncio.get_running_loop().call_soon(spin)",
        "signal handler": "asyncio.get_running_loop().call_later(0.001, spin)",
        "await": "print('ready', flush=True)",
    }[how]
    id = start(
        f"""
import asyncio, time
def spin():
    print("ready", flush=True)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        pass
try:
    {in_callback}
    await asyncio.sleep(60)
finally:
    print("cleaned up")
"""
    )
    stopped = manager.stop(id)
    assert stopped.data.output == "ready\ncleaned up\n"
    assert (stopped.data.forced, stopped.data.exit_code) == (False, ASKED)


def test_an_ask_that_is_swallowed_ends_with_the_grace(manager, start):
    id = start(
        """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
except:
    pass
while True:
    time.sleep(60)
"""
    )
    began = time.monotonic()
    stopped = manager.stop(id, grace=0.4)
    # Less than it takes until a keeper counts as one that does not answer.
    assert 0.4 <= time.monotonic() - began < 4.0
    assert (stopped.success, stopped.data.status, stopped.data.forced) == (True, "stopped", True)
    assert stopped.data.exit_code == -signal.SIGKILL


def test_an_ask_that_a_finalizer_swallows_is_not_lost(manager, start):
    id = start(
        """
import time
class Held:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
try:
    Held()
    while True:
        time.sleep(60)
finally:
    print("cleaned up")
"""
    )
    stopped = manager.stop(id)
    assert stopped.data.output == "ready\ncleaned up\n"
    assert (stopped.data.forced, stopped.data.exit_code) == (False, ASKED)


def test_a_stopped_snippet_is_continued_to_clean_up(manager, trace):
    code = (
        programs.PRELUDE
        + """
try:
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
finally:
    print("cleaned up")
"""
    )
    started = manager.start_with_code(code, trace.params).raise_for_error()
    id = started.data.side_execution_id
    eventually(lambda: trace.noted("snippet"))
    eventually(lambda: trace.noted("snippet")[0].state == "T")
    stopped = manager.stop(id)
    assert stopped.data.output == "ready\ncleaned up\n"
    assert (stopped.data.forced, stopped.data.exit_code) == (False, ASKED)


@pytest.mark.parametrize("how", ("ignored", "blocked"))
def test_a_host_that_ignores_or_blocks_signals_does_not_hand_that_down(make_manager, how):
    signums = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD]
    code = """
import signal, subprocess, time
names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGCHLD")
odd = [n for n in names if signal.getsignal(getattr(signal, n)) == signal.SIG_IGN]
print(odd, sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
with open("/proc/self/status") as file:
    own = [line.split()[1] for line in file if line.startswith(("SigBlk", "SigIgn"))]
show = ["/bin/grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]
shown = subprocess.run(show, stdout=subprocess.PIPE, text=True).stdout
print([int(line.split()[1], 16) & MASK for line in shown.splitlines()])
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("cleaned up")
""".replace("MASK", str(sum(1 << (signum - 1) for signum in signums)))
    before = {signum: signal.getsignal(signum) for signum in signums}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        if how == "ignored":
            for signum in signums:
                signal.signal(signum, signal.SIG_IGN)
        else:
            signal.pthread_sigmask(signal.SIG_BLOCK, signums)
        manager = make_manager(grace_period=5.0)
        id = manager.start_with_code(code).raise_for_error().data.side_execution_id
        eventually(
            lambda: (
                "ready\n" in manager.get_status(id).data.output
                or manager.get_status(id).data.status != "running"
            )
        )
        stopped = manager.stop(id)
        manager.close()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert stopped.data.output == "[] []\n[0, 0]\nready\ncleaned up\n"
    assert (stopped.data.forced, stopped.data.exit_code) == (False, ASKED)


def test_a_thread_that_delays_the_exit_does_not_delay_the_result(manager):
    code = """
import threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
return "early"
"""
    id = manager.start_with_code(code).raise_for_error().data.side_execution_id
    eventually(lambda: manager.get_status(id).data.result == "early")
    assert manager.get_status(id).data.status == "running"
    stopped = manager.stop(id, grace=0.2)
    assert (stopped.data.status, stopped.data.result) == ("stopped", "early")


# -- sweeping


def test_a_member_that_ignores_sigterm_is_killed_although_the_leader_left_politely(manager, trace):
    code = programs.with_descendant("deaf", programs.CLEAN_UP)
    started = manager.start_with_code(code, trace.params).raise_for_error()
    id = started.data.side_execution_id
    eventually(lambda: "ready\n" in manager.get_status(id).data.output)
    began = time.monotonic()
    stopped = manager.stop(id, grace=0.4)
    assert time.monotonic() - began < 4.0
    assert trace.left() == set()
    assert (stopped.data.exit_code, stopped.data.forced) == (ASKED, True)
    assert len(trace.noted("cleaned")) == 1


@pytest.mark.parametrize("kind", ("pipe_holder", "daemon"))
def test_a_grandchild_that_holds_the_pipe_does_not_hold_up_the_end(manager, trace, kind):
    code = programs.with_descendant(kind, "print('last')\nreturn 1").replace("    quiet()\n", "")
    started = manager.start_with_code(code, trace.params).raise_for_error()
    data = manager.wait(started.data.side_execution_id, 30).data
    assert (data.status, data.result, data.output) == ("completed", 1, "last\n")
    assert trace.left() == set()


def test_a_process_outside_the_tree_that_holds_the_pipe_does_not_hold_up_the_end(manager, trace):
    """The snippet hands its standard output to a process that is none of its own."""
    import socket

    address = os.path.join(trace.directory, "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        code = (
            programs.PRELUDE
            + """
import socket
with socket.socket(socket.AF_UNIX) as client:
    client.connect("socket")
    socket.send_fds(client, [b"x"], [1])
    client.recv(1)
print("last")
"""
        )
        started = manager.start_with_code(code, trace.params).raise_for_error()
        connection, _ = server.accept()
        _, (fd,), _, _ = socket.recv_fds(connection, 1, 1)
        connection.close()
        try:
            data = manager.wait(started.data.side_execution_id, 30).data
            assert (data.status, data.output) == ("completed", "last\n")
        finally:
            os.close(fd)


def test_a_group_of_zombies_counts_as_gone(make_manager, trace):
    manager = make_manager(grace_period=60.0)
    code = (
        programs.PRELUDE
        + """
in_child(lambda: note("zombie"))
wait_for_note("zombie")
return 1
"""
    )
    began = time.monotonic()
    started = manager.start_with_code(code, trace.params).raise_for_error()
    answer = manager.wait(started.data.side_execution_id, 50)
    assert (answer.success, answer.data.status) == (True, "completed")
    assert time.monotonic() - began < 40
    assert trace.left() == set()


needs_pids = pytest.mark.skipif(
    not programs.can_choose_pids(), reason="only root may say which pid comes next"
)


def leave_a_deaf_stray(manager, trace, spawn):
    """An execution whose leader has ended, while a stray has its grace period."""
    code = (
        programs.PRELUDE
        + f"""
def body():
    quiet()
    deaf()
    linger("descendant")
{spawn}(body)
wait_for_note("descendant")
os._exit(0)
"""
    )
    started = manager.start_with_code(code, trace.params).raise_for_error()
    eventually(lambda: trace.noted("descendant") and not trace.noted("snippet")[0].is_alive)
    return started.data.side_execution_id


@needs_pids
def test_nobody_gets_the_pid_of_a_leader_whose_group_has_a_member(make_manager, trace, tmp_path):
    manager = make_manager(grace_period=1.0)
    id = leave_a_deaf_stray(manager, trace, "in_child")
    assert Bystander.with_pid(tmp_path / "log", trace.noted("snippet")[0].pid, tries=3) is None
    assert trace.noted("descendant")[0].is_alive
    assert manager.wait(id, 30).data.status == "completed"
    assert trace.left() == set()


@needs_pids
def test_whoever_gets_the_pid_of_a_leader_whose_group_is_gone_is_not_touched(
    make_manager, tmp_path
):
    manager = make_manager(grace_period=1.0)
    for number in range(5):  # somebody else on this machine may be quicker to get it
        trace = Trace(tmp_path / str(number))
        id = leave_a_deaf_stray(manager, trace, "daemon")
        # A leader too, so that a signal to the old group would reach it.
        other = Bystander.with_pid(tmp_path / "log", trace.noted("snippet")[0].pid, tries=10)
        try:
            was_in_time = trace.noted("descendant")[0].is_alive
            assert manager.wait(id, 30).data.status == "completed"
            assert trace.left() == set()
            assert other is None or other.is_untouched
        finally:
            if other is not None:
                other.close()
        if other is not None and was_in_time:
            return
    raise AssertionError("the pid was always taken")


@needs_pids
def test_nor_is_it_when_keeper_and_launcher_are_killed(make_manager, tmp_path):
    """Where the host itself kills the group, as nobody is left who would know better."""
    for number in range(5):
        before = set(children())
        manager = make_manager(grace_period=30.0)
        trace = Trace(tmp_path / str(number))
        id = leave_a_deaf_stray(manager, trace, "daemon")
        (launcher,) = set(children()) - before
        other = Bystander.with_pid(tmp_path / "log", trace.noted("snippet")[0].pid, tries=10)
        try:
            os.kill(launcher, signal.SIGSTOP)  # so that it does not sweep
            trace.noted("keeper")[0].kill()
            os.kill(launcher, signal.SIGKILL)
            data = manager.wait(id, 30).data
            assert data.status == "failed"
            assert "is gone" in data.error or "are gone" in data.error
            assert other is None or other.is_untouched
        finally:
            trace.kill()
            if other is not None:
                other.close()
        if other is not None:
            return
    raise AssertionError("the pid was always taken")


@needs_pids
@pytest.mark.parametrize("ends", [False, True])
def test_a_stray_that_gets_the_pid_of_the_leader_is_a_stray_like_any_other(
    make_manager, trace, ends
):
    manager = make_manager(grace_period=1.0)
    code = (
        programs.PRELUDE
        + f"""
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
"""
    )
    for _ in range(5):
        started = manager.start_with_code(code, trace.params).raise_for_error()
        answer = manager.wait(started.data.side_execution_id, HANG)
        assert (answer.data.status, answer.data.exit_code) == ("completed", 0)
        assert trace.left() == set()
        if trace.noted("descendant"):
            return
    raise AssertionError("the pid was always taken")


# -- the host


def alarm_every(seconds, handler):
    """Interrupt the main thread again and again, until the returned call is made."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    def cease():
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    return cease


HANDLER_HOST = """
import faulthandler, signal, sys
faulthandler.dump_traceback_later(20, exit=True)
import sidexec
manager = sidexec.ExecutionManager(grace_period=5.0)
def begin():
    id = manager.start_with_code("import time\\nprint('ready', flush=True)\\ntime.sleep(60)")
    return id.raise_for_error().data.side_execution_id
id = begin()
def handler(signum, frame):
    answers.append(CALL)
answers = []
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.1)
INTERRUPTED
print(manager.get_status(id).data.status, manager.get_status(id).data.stop_reason)
manager.close()
"""


@pytest.mark.parametrize("interrupted", ("manager.wait(id, 10)", "list(manager.follow(id))"))
@pytest.mark.parametrize(
    "call", one_in(3, ("manager.stop(id)", "manager.stop_all()", "manager.close()"))
)
def test_a_stop_in_a_signal_handler_does_not_deadlock(interrupted, call):
    code = HANDLER_HOST.replace("INTERRUPTED", interrupted).replace("CALL", call)
    reason = "closed" if "close" in call else "requested"
    assert run_host(code) == f"stopped {reason}\n"


def test_calls_in_signal_handlers_interrupt_any_other_call(make_manager):
    manager = make_manager(grace_period=5.0)
    ids = []
    count = 0

    def handler(signum, frame):
        nonlocal count
        count += 1
        manager.list_executions()
        manager.stop("unknown")
        if ids:
            manager.get_status(ids[-1])
            manager.wait(ids[-1], 0.0)
            manager.stop(ids[-1])
        if count % 20 == 0:
            manager.wait(manager.start_with_code("pass").data.side_execution_id)

    cease = alarm_every(0.002, handler)
    try:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            answer = manager.start_with_code("while True: print('x')").raise_for_error()
            ids.append(answer.data.side_execution_id)
            manager.get_status(ids[-1])
            for _ in manager.follow(ids[-1]):
                pass
            assert manager.wait(ids[-1]).data.status == "stopped"
    finally:
        cease()
    assert count > 20 and len(ids) > 5


def test_a_handler_may_interrupt_a_wait_at_any_point_and_wait_itself():
    """Nearly all the time is spent where a lock of the execution's would be held."""
    said = run_host(
        """
import faulthandler, signal, time
faulthandler.dump_traceback_later(20, exit=True)
import sidexec
count = 0
def handler(signum, frame):
    global count
    count += 1
    assert manager.wait(id, 0.0).data.status == "running"
with sidexec.ExecutionManager(grace_period=5.0) as manager:
    id = manager.start_with_code("import time\\ntime.sleep(60)")
    id = id.raise_for_error().data.side_execution_id
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    until = time.monotonic() + 0.7
    while time.monotonic() < until or count < 20:
        manager.wait(id, 0.0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(manager.stop(id).data.status)
"""
    )
    assert said == "stopped\n"


class Interrupted(Exception):
    pass


def test_a_handler_that_raises_inside_a_start_loses_no_execution(make_manager, trace):
    manager = make_manager(grace_period=5.0)
    manager.wait(manager.start_with_code("pass").raise_for_error().data.side_execution_id)
    code = programs.PRELUDE + "while True: time.sleep(60)"
    raised = 0
    began = 0
    armed = False
    gc.collect()  # or the handler may raise in what is collected meanwhile

    def handler(signum, frame):
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    try:
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
    finally:
        signal.signal(signal.SIGALRM, before)
    assert raised > 5
    # All that is running can be found and stopped: nothing else runs.
    assert manager.list_executions("running").data.count >= began
    # One that was interrupted at once may be on its way there still.
    manager.wait(manager.start_with_code("pass").raise_for_error().data.side_execution_id)
    stopped = manager.stop_all()
    assert len(stopped) >= began and all(each.success for each in stopped)
    assert trace.left() == set()


def test_an_execution_whose_start_was_interrupted_while_it_waited_is_listed(tmp_path, make_manager):
    (tmp_path / "slow_load.py").write_text("import time\ntime.sleep(0.5)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    manager = make_manager(env=env, preload=["slow_load"], grace_period=5.0)

    def handler(signum, frame):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Interrupted):
            manager.start_with_code("import time\ntime.sleep(60)")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (listed,) = manager.list_executions("running").data.executions
    stopped = manager.stop(listed.side_execution_id)
    assert (stopped.success, stopped.data.status) == (True, "stopped")


STATUSES_HOST = """
import os, signal, sys, threading, time
SETTING
import sidexec
with sidexec.ExecutionManager(grace_period=5.0) as manager:
    for code in ("pass", "raise SystemExit(3)", "import os\\nos.kill(os.getpid(), 9)"):
        started = manager.start_with_code(code).raise_for_error()
        data = manager.wait(started.data.side_execution_id).data
        print(data.status, data.exit_code)
print("closed")
"""


@pytest.mark.parametrize("how", ("SIGCHLD ignored", "waitpid(-1)"))
def test_a_host_that_reaps_everything_steals_no_exit_code(how):
    setting = {
        "SIGCHLD ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "waitpid(-1)": """
def reap():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.0005)
threading.Thread(target=reap, daemon=True).start()
""",
    }[how]
    said = run_host(STATUSES_HOST.replace("SETTING", setting))
    assert said == "completed 0\nfailed 3\nfailed -9\nclosed\n"


def test_a_call_wakes_the_thread_that_waits_for_descriptors():
    """Nothing is to be read, so only the loop's own socket ends its wait."""
    said = run_host(
        """
import faulthandler, time
faulthandler.dump_traceback_later(20, exit=True)
import sidexec
with sidexec.ExecutionManager(grace_period=5.0, default_timeout=None) as manager:
    id = manager.start_with_code("import time\\ntime.sleep(60)").raise_for_error().data
    time.sleep(0.3)
    print(manager.stop(id.side_execution_id).data.status)
    time.sleep(0.3)
print("closed")
"""
    )
    assert said == "stopped\nclosed\n"


def test_on_output_that_calls_stop_is_not_what_drains_the_pipe(manager):
    answers = queue.SimpleQueue()
    known = threading.Event()
    ids = []

    def on_output(chunk):
        known.wait(HANG)
        if "ready" in chunk.text:
            answers.put(manager.stop(ids[0]))

    code = """
import time
try:
    print("ready\\n", end="")
    time.sleep(60)
finally:
    print("x" * 3_000_000, flush=True)
    print("cleaned up")
"""
    started = manager.start_with_code(code, on_output=on_output).raise_for_error()
    ids.append(started.data.side_execution_id)
    known.set()
    stopped = answers.get(timeout=HANG)
    assert (stopped.data.status, stopped.data.forced) == ("stopped", False)
    assert stopped.data.output == "ready\n" + "x" * 3_000_000 + "\ncleaned up\n"


def test_an_on_output_that_never_returns_holds_up_neither_output_nor_stop(manager):
    release = threading.Event()
    try:
        code = "import time\nprint('x' * 1_000_000)\nprint('ready', flush=True)\ntime.sleep(60)"
        started = manager.start_with_code(code, on_output=lambda chunk: release.wait(60))
        id = started.raise_for_error().data.side_execution_id
        eventually(lambda: manager.get_status(id).data.output.endswith("ready\n"))
        began = time.monotonic()
        stopped = manager.stop(id)
        assert time.monotonic() - began < 15
        assert (stopped.data.status, stopped.data.forced) == ("stopped", False)
    finally:
        release.set()


PRELOADED = """
import atexit, os, random, tempfile, weakref

def mark(name):
    with open(os.environ["MARKS"], "a") as file:
        file.write(name + "\\n")

class Held:
    pass

held = Held()
atexit.register(mark, "atexit")
weakref.finalize(held, mark, "finalize")
directory = tempfile.TemporaryDirectory()
"""


def test_nothing_of_the_launcher_survives_the_fork(tmp_path, make_manager):
    (tmp_path / "preloaded.py").write_text(PRELOADED)
    (tmp_path / "marks").touch()
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "MARKS": str(tmp_path / "marks")}
    manager = make_manager(
        env=env, preload=["preloaded", "random", "tempfile", "multiprocessing", "uuid", "logging"]
    )
    code = """
import logging, multiprocessing, os, preloaded, random, tempfile, uuid
return {
    "random": random.random(),
    "file": next(tempfile._get_candidate_names()),
    "uuid": str(uuid.uuid1()) + str(uuid.uuid4()),
    "own": [
        os.getpid() == multiprocessing.current_process().pid,
        multiprocessing.parent_process() is None,
        logging.LogRecord("", 0, "", 0, "", (), None).process == os.getpid(),
    ],
    "directory": preloaded.directory.name,
}
"""
    results = []
    for _ in range(3):
        started = manager.start_with_code(code).raise_for_error()
        data = manager.wait(started.data.side_execution_id).data
        assert data.status == "completed", data.error
        results.append(data.result)
        assert (tmp_path / "marks").read_text() == ""
        assert os.path.isdir(data.result["directory"])
    for name in ("random", "file", "uuid"):
        assert len({each[name] for each in results}) == 3, name
    assert [each["own"] for each in results] == [[True] * 3] * 3


def test_the_main_threads_native_id_is_the_snippets_own(make_manager):
    manager = make_manager(preload=["threading"])
    code = """
import os, threading
return [threading.main_thread().native_id == os.getpid(), threading.get_native_id() == os.getpid()]
"""
    started = manager.start_with_code(code).raise_for_error()
    assert manager.wait(started.data.side_execution_id).data.result == [True, True]


def test_exit_handlers_of_the_snippet_itself_run_once(tmp_path, make_manager):
    manager = make_manager()
    code = """
import atexit, os
atexit.register(lambda: os.write(1, b"left "))
"""
    for _ in range(2):
        started = manager.start_with_code(code).raise_for_error()
        assert manager.wait(started.data.side_execution_id).data.output == "left "


# -- what must not bring the host's thread down


def test_a_host_that_closes_all_descriptors_is_not_held_up():
    """Those of the manager, too: what runs is stopped, and the next start works."""
    code = """
import os, sidexec
manager = sidexec.ExecutionManager(grace_period=1)
id = manager.start_with_code("import time; time.sleep(60)").data.side_execution_id
os.closerange(3, 200)
response = manager.stop(id)
assert response.data.status == "stopped", response
assert manager.wait(manager.start_with_code("return 1").id).data.result == 1
manager.close()
os._exit(0)
"""
    package = os.path.dirname(os.path.dirname(os.path.abspath(sidexec.__file__)))
    env = {**os.environ, "PYTHONPATH": package}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=HANG).returncode == 0


def test_a_snippet_that_stops_its_keeper_and_breaks_the_protocol_is_ended(
    make_manager, monkeypatch
):
    monkeypatch.setattr(thread, "SWEEP_ALLOWANCE", 0.5)
    manager = make_manager(grace_period=0.5, default_timeout=None)
    started = manager.start_with_code("""
import os, signal, time
os.kill(os.getppid(), signal.SIGSTOP)
for fd in range(3, 2000):
    try: os.write(fd, b"garbage!!!!")
    except OSError: pass
time.sleep(100)
""")
    data = manager.wait(started.data.side_execution_id, HANG).data
    assert data.status == "failed"


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
