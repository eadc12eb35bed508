"""However the host's process ends: its executions clean up, and nothing is left of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import (
    HOST_ENVIRONMENT,
    children,
    crossed,
    eventually,
    one_in,
    run_as_host,
    tree,
)
from programs import CLEAN_UP, Process, program, when_asked, with_descendant

GRACE = 4.0  # in which a busy machine comes to the end of a cleanup
DEAF_GRACE = 0.4
MOMENT = 10.0  # that only a hang uses up
HANG = 30.0

BEGIN = """
import atexit, json, os, sys, threading, time
import sidexec

grace, params, *codes = json.loads(sys.argv[1])
manager = sidexec.ExecutionManager(grace_period=grace)

def begin(code=codes[0]):
    id = manager.start_with_code(code, params, None).id
    while "ready\\n" not in manager.get_status(id).data.output:
        assert manager.get_status(id).data.status == "running", manager.get_status(id)
        time.sleep(0.002)
    return id
"""

# Starts executions, forks perhaps a worker, and does what it is told.
HOST = (
    BEGIN
    + """
if "in thread" in sys.argv:
    thread = threading.Thread(target=lambda: list(map(begin, codes)))
    thread.start()
    thread.join()
else:
    list(map(begin, codes))
worker = os.fork() if "worker" in sys.argv else None
if worker == 0:
    time.sleep(60)
    os._exit(0)
print(worker or 0, flush=True)
exec(sys.stdin.readline())
"""
)

DEATHS = {
    "SIGKILL": -signal.SIGKILL,
    "SIGTERM": -signal.SIGTERM,
    "SIGINT": -signal.SIGINT,
    "raise RuntimeError": 1,
    "sys.exit(3)": 3,
}

POLITE = program(CLEAN_UP)
POLITE_WITH_DAEMON = with_descendant("daemon", CLEAN_UP)
DEAF = with_descendant("deaf", "deaf()\nprint('ready')\nwhile True: time.sleep(60)")


@contextlib.contextmanager
def running_host(trace, *codes, grace=GRACE, options=(), prelude=""):
    """A host whose executions are all under way: the host, its descendants, its worker."""
    given = json.dumps([grace, trace.params, *codes])
    command = [sys.executable, "-c", prelude + HOST, given, *options]
    host = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=HOST_ENVIRONMENT,
        text=True,
        start_new_session=True,  # a worker of its own must not outlive the test
    )
    worker = None
    with host.stdin, host.stdout, host.stderr:
        try:
            pid = int(host.stdout.readline() or host.stderr.read())
            worker = Process(pid) if pid else None
            # The list may miss some while another process, or a thread of the host, ends.
            found = eventually(lambda: tree(host.pid) == tree(host.pid) and tree(host.pid))
            yield host, [Process(each) for each in found if each != pid], worker
        finally:
            host.kill()
            host.wait()
            if worker is not None:
                worker.kill()


def die(host, death="SIGKILL"):
    if death.startswith("SIG"):
        host.send_signal(getattr(signal, death))
        death = ""  # a signal just before a call that blocks would wait for its end
    with contextlib.suppress(BrokenPipeError):
        os.write(host.stdin.fileno(), f"{death}\n".encode())
    return host.wait(HANG)


def check_that_nothing_is_left(trace, others, grace=GRACE):
    deadline = time.monotonic() + grace + MOMENT
    while time.monotonic() < deadline and (trace.left() or any(p.is_alive for p in others)):
        time.sleep(0.01)
    assert trace.left() == set()
    assert [each for each in others if each.is_alive] == []


@pytest.mark.parametrize("has_worker", one_in(2, (True, False)), ids=("with_worker", "alone"))
@pytest.mark.parametrize("death, in_ended_thread", crossed(2, DEATHS, (True, False)))
def test_executions_clean_up_and_nothing_is_left(trace, death, has_worker, in_ended_thread):
    codes = POLITE, POLITE_WITH_DAEMON
    options = has_worker * ["worker"] + in_ended_thread * ["in thread"]
    with running_host(trace, *codes, options=options) as (host, others, worker):
        assert len(others) >= 6  # the launcher, two keepers, two snippets, the daemon
        assert die(host, death) == DEATHS[death]
        check_that_nothing_is_left(trace, others)
        assert len(trace.noted("cleaned")) == 2
        assert worker is None or worker.is_alive


def test_what_is_deaf_is_killed_after_the_grace(trace):
    with running_host(trace, DEAF, grace=DEAF_GRACE, options=["worker"]) as (host, others, _):
        die(host)
        check_that_nothing_is_left(trace, others, DEAF_GRACE)


def test_a_worker_forked_by_the_host_can_end_without_harm(trace):
    with running_host(trace, POLITE, options=["worker"]) as (host, others, worker):
        worker.kill()
        time_up = time.monotonic() + 0.25
        while time.monotonic() < time_up:
            assert all(each.is_alive for each in others)
            time.sleep(0.02)
        assert trace.noted("cleaned") == []
        die(host)
        check_that_nothing_is_left(trace, others)


@pytest.mark.parametrize("kind", ("daemon_without_environment", "stopped", "storm"))
def test_nothing_is_left_of_what_hides(trace, kind):
    code = with_descendant(kind, CLEAN_UP)
    with running_host(trace, code, options=["in thread"]) as (host, others, _):
        die(host)
        check_that_nothing_is_left(trace, others)
        assert len(trace.noted("cleaned")) == 1


@pytest.mark.parametrize("who", ("keeper", "launcher"))
def test_who_is_stopped_hears_of_the_hosts_death(trace, who):
    with running_host(trace, POLITE) as (host, others, _):
        (stopped,) = trace.noted("keeper")
        if who == "launcher":
            (stopped,) = [each for each in others if stopped.pid in children(each.pid)]
        stopped.kill(signal.SIGSTOP)
        try:
            die(host)
            check_that_nothing_is_left(trace, others)
            assert len(trace.noted("cleaned")) == 1
        finally:
            stopped.kill(signal.SIGCONT)


def test_a_launcher_that_is_stopped_hears_of_it_without_a_keeper(trace):
    with running_host(trace, DEAF) as (host, others, _):
        (keeper,) = trace.noted("keeper")
        (launcher,) = [each for each in others if keeper.pid in children(each.pid)]
        launcher.kill(signal.SIGSTOP)
        try:
            keeper.kill()
            die(host)
            check_that_nothing_is_left(trace, others)
        finally:
            launcher.kill(signal.SIGCONT)


WHO_IS_STOPPED = {
    "keeper": "os.getppid()",
    "launcher": "int(open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[1])",
}


@pytest.mark.slow
@pytest.mark.parametrize("who", WHO_IS_STOPPED)
def test_who_is_stopped_again_and_again_is_ended(trace, who):
    keep_it_stopped = f"""
deaf()
print("ready", flush=True)
pid = {WHO_IS_STOPPED[who]}
while True:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.01)
"""
    code = with_descendant("daemon", keep_it_stopped)
    with running_host(trace, code, grace=DEAF_GRACE) as (host, others, _):
        die(host)
        # The launcher gives its keepers four seconds more than their grace.
        check_that_nothing_is_left(trace, others, DEAF_GRACE + 4)


# -- the host's own way out

EXIT = (
    BEGIN
    + """
def say(text, write=os.write):
    write(1, f"{text}\\n".encode())

class Last:
    def __init__(self, call):
        self.call = call
    def __del__(self):
        self.call()

def start(manager=manager, code=codes[0], params=params, say=say, **options):
    answer = manager.start_with_code(code, params, **options)
    say("answered" if answer.success or answer.error else answer)
"""
)

# What the host does, and what it says. `last` is let go of when no other thread runs any more.
EXITS = {
    "a manager that was never closed": ("begin()", ""),
    "a daemon thread in wait": (
        """
id = begin()
threading.Thread(target=manager.wait, args=(id,), daemon=True).start()
threading.Thread(target=lambda: list(manager.follow(id)), daemon=True).start()
time.sleep(0.1)
""",
        "",
    ),
    "a daemon thread in stop": (
        "threading.Thread(target=manager.stop, args=(begin(),), daemon=True).start()",
        "",
    ),
    "on_output under way": (
        """
entered = threading.Event()
def on_output(chunk):
    entered.set()
    time.sleep(60)
manager.start_with_code(codes[0], params, None, on_output=on_output).raise_for_error()
entered.wait(20)
""",
        "",
    ),
    "stop and close in an exit handler": (
        """
one, other = begin(), begin()
@atexit.register
def end():
    say(manager.stop(one).data.status)
    manager.close()
    say(manager.get_status(other).data.stop_reason)
""",
        "stopped\nclosed\n",
    ),
    "all calls at the interpreter's teardown": (
        """
def call(manager=manager, id=begin(), say=say):
    answer = manager.stop(id)
    say(answer.success or answer.error)
    say(manager.get_status(id).data.status)
    manager.wait(id)
    manager.stop_all()
    manager.close()
    say("gone through")
time.sleep(0.2)  # figures of what it uses that are this old are not answered again
last = Last(call)
""",
        "the interpreter is shutting down: its executions are stopped when it has ended\n"
        "running\ngone through\n",
    ),
    "a start at the interpreter's teardown": ("last = Last(start)\nbegin()", "answered\n"),
    "the first start in an exit handler": ("atexit.register(start)", "answered\n"),
    "a later start in an exit handler": (
        "begin()\natexit.register(start, on_output=print)",
        "answered\n",
    ),
    "stop when the package itself has been torn down": (
        """
def call(manager=manager, id=begin(), error=Exception):
    try:
        manager.stop(id)
    except error:
        pass  # its modules are empty
sys.last_of_all = Last(call)
""",
        "",
    ),
}


@pytest.mark.parametrize("name", one_in(3, EXITS), ids=lambda name: name.replace(" ", "_"))
def test_the_host_neither_hangs_nor_complains_at_its_exit(trace, name):
    script, said = EXITS[name]
    assert run_as_host(EXIT + script, json.dumps([1.0, trace.params, POLITE])) == said
    check_that_nothing_is_left(trace, [], 1.0)
    eventually(lambda: not any(each.is_alive for each in trace.noted("keeper")))


KILLED_WHILE_IT_STOPS = (
    BEGIN
    + """
import signal
from sidexec.engine.descriptors import Sender

def die(sender, data, send=Sender.send):
    if sys.argv[2] == "after":
        send(sender, data)
    os.kill(os.getpid(), signal.SIGKILL)

id = begin()
Sender.send = die
manager.stop(id)
"""
)


@pytest.mark.parametrize("when", ("before", "after"))
def test_a_host_killed_right_before_or_after_it_has_said_that_it_asks(tmp_path, when):
    path = tmp_path / "cleaned up"
    arguments = json.dumps([10.0, {"path": str(path)}, when_asked("open(params['path'], 'w')")])
    command = [sys.executable, "-c", KILLED_WHILE_IT_STOPS, arguments, when]
    done = subprocess.run(command, env=HOST_ENVIRONMENT, timeout=HANG)
    assert done.returncode == -signal.SIGKILL
    eventually(path.exists, timeout=9)
