"""However the host's process ends: its executions clean up, and nothing is left of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import programs
import pytest
from conftest import children, crossed, eventually, one_in, tree
from programs import Process

import sidexec

GRACE = 4.0  # in which a busy machine comes to the end of a cleanup
DEAF_GRACE = 0.4
MOMENT = 2.0
HANG = 30.0

HOST = """
import json, os, signal, sys, threading, time
import sidexec

options = json.loads(sys.argv[1])
manager = sidexec.ExecutionManager(grace_period=options["grace"])

def start():
    for code in options["codes"]:
        started = manager.start_with_code(code, options["params"], None).raise_for_error()
        ids.append(started.data.side_execution_id)

ids = []
if options["in_thread"]:
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
else:
    start()
for id in ids:
    while "ready\\n" not in manager.get_status(id).data.output:
        assert manager.get_status(id).data.status == "running", manager.get_status(id)
        time.sleep(0.002)
worker = 0
if options["has_worker"]:
    worker = os.fork()
    if worker == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            time.sleep(60)
        finally:
            os._exit(0)
print(worker, flush=True)
while options["death"].startswith("SIG"):
    time.sleep(0.02)  # a signal just before a call that blocks would wait for its end
sys.stdin.readline()
if options["death"] == "exception":
    raise RuntimeError("on purpose")
if options["death"] == "exit":
    sys.exit(3)
"""

DEATHS = {
    "SIGKILL": -signal.SIGKILL,
    "SIGTERM": -signal.SIGTERM,
    "SIGINT": -signal.SIGINT,
    "exception": 1,
    "exit": 3,
}

POLITE = programs.PRELUDE + programs.CLEAN_UP
POLITE_WITH_DAEMON = programs.with_descendant("daemon", programs.CLEAN_UP)
DEAF = (
    programs.PRELUDE
    + programs.DESCENDANTS["deaf"]
    + programs.STARTED
    + """
deaf()
print("ready", flush=True)
while True:
    time.sleep(60)
"""
)


def environment():
    package = os.path.dirname(os.path.dirname(os.path.abspath(sidexec.__file__)))
    return {**os.environ, "PYTHONPATH": package}


@contextlib.contextmanager
def running_host(trace, death, *codes, has_worker=False, in_thread=False, grace=GRACE):
    """A host whose executions are all under way: the host, and its descendants."""
    options = {
        "codes": codes,
        "params": trace.params,
        "death": death,
        "has_worker": has_worker,
        "in_thread": in_thread,
        "grace": grace,
    }
    errors = open(os.path.join(trace.directory, "errors"), "w+")
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment(),
        text=True,
        start_new_session=True,  # a worker of its own must not outlive the test
    )
    worker = None
    try:
        said = host.stdout.readline()
        errors.seek(0)
        assert said, errors.read()
        if int(said):
            worker = Process(int(said))
        yield host, [Process(pid) for pid in tree(host.pid) if pid != int(said)], worker
    finally:
        if host.poll() is None:
            host.kill()
            host.wait()
        if worker is not None:
            worker.kill()
        for file in (host.stdin, host.stdout, errors):
            file.close()


def die(host, death):
    if death.startswith("SIG"):
        host.send_signal(getattr(signal, death))
    else:
        host.stdin.write("\n")
        host.stdin.flush()
    return host.wait(HANG)


def check_that_nothing_is_left(trace, others, grace=GRACE):
    deadline = time.monotonic() + grace + MOMENT
    while time.monotonic() < deadline and (trace.left() or any(p.is_alive for p in others)):
        time.sleep(0.01)
    assert trace.left() == set()
    assert [each for each in others if each.is_alive] == []


@pytest.mark.parametrize("has_worker", one_in(2, (True, False)), ids=("with_worker", "alone"))
@pytest.mark.parametrize("death, in_thread", crossed(2, DEATHS, (True, False)))
def test_executions_clean_up_and_nothing_is_left(trace, death, has_worker, in_thread):
    with running_host(
        trace,
        death,
        POLITE,
        POLITE_WITH_DAEMON,
        has_worker=has_worker,
        in_thread=in_thread,
    ) as (host, others, worker):
        assert len(others) >= 6  # the launcher, two keepers, two snippets, the daemon
        assert die(host, death) == DEATHS[death]
        check_that_nothing_is_left(trace, others)
        assert len(trace.noted("cleaned")) == 2
        assert worker is None or worker.is_alive


@pytest.mark.parametrize(
    "death, has_worker",
    (("SIGKILL", True), pytest.param("exit", False, marks=pytest.mark.slow)),
)
def test_what_is_deaf_is_killed_after_the_grace(trace, death, has_worker):
    with running_host(trace, death, DEAF, has_worker=has_worker, grace=DEAF_GRACE) as (
        host,
        others,
        worker,
    ):
        die(host, death)
        check_that_nothing_is_left(trace, others, DEAF_GRACE)


def test_a_worker_forked_by_the_host_can_end_without_harm(trace):
    with running_host(trace, "SIGKILL", POLITE, has_worker=True) as (host, others, worker):
        worker.kill()
        time_up = time.monotonic() + 0.25
        while time.monotonic() < time_up:
            assert all(each.is_alive for each in others)
            time.sleep(0.02)
        assert trace.noted("cleaned") == []
        die(host, "SIGKILL")
        check_that_nothing_is_left(trace, others)


@pytest.mark.parametrize("kind", ("daemon_without_environment", "stopped", "storm"))
def test_nothing_is_left_of_what_hides(trace, kind):
    code = programs.with_descendant(kind, programs.CLEAN_UP)
    with running_host(trace, "SIGKILL", code, in_thread=True) as (host, others, worker):
        die(host, "SIGKILL")
        check_that_nothing_is_left(trace, others)
        assert len(trace.noted("cleaned")) == 1


STOP_KEEPER = """
os.kill(os.getppid(), signal.SIGSTOP)
"""
KEEP_IT_STOPPED = """
deaf()
print("ready", flush=True)
while True:
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(0.01)
"""


def test_a_stopped_keeper_hears_of_the_hosts_death(trace):
    code = programs.PRELUDE + STOP_KEEPER + programs.CLEAN_UP
    with running_host(trace, "SIGKILL", code) as (host, others, worker):
        die(host, "SIGKILL")
        check_that_nothing_is_left(trace, others)
        assert len(trace.noted("cleaned")) == 1


def test_a_stopped_launcher_hears_of_the_hosts_death(trace):
    with running_host(trace, "SIGKILL", POLITE) as (host, others, worker):
        (keeper,) = trace.noted("keeper")
        (launcher,) = [each for each in others if keeper.pid in children(each.pid)]
        launcher.kill(signal.SIGSTOP)
        try:
            die(host, "SIGKILL")
            check_that_nothing_is_left(trace, others)
        finally:
            launcher.kill(signal.SIGCONT)


@pytest.mark.slow
def test_a_keeper_that_is_stopped_again_and_again_is_ended(trace):
    code = programs.with_descendant("daemon", KEEP_IT_STOPPED)
    with running_host(trace, "SIGKILL", code, grace=DEAF_GRACE) as (host, others, worker):
        die(host, "SIGKILL")
        # The launcher gives its keepers four seconds more than their grace.
        check_that_nothing_is_left(trace, others, DEAF_GRACE + 4)


# -- the host's own way out

EXIT_PRELUDE = """
import atexit, json, os, sys, threading, time
import sidexec

CODE, PARAMS = json.loads(sys.argv[1])

def begin(manager):
    started = manager.start_with_code(CODE, PARAMS, None).raise_for_error()
    id = started.data.side_execution_id
    while "ready\\n" not in manager.get_status(id).data.output:
        assert manager.get_status(id).data.status == "running", manager.get_status(id)
        time.sleep(0.002)
    return id

def say(text, write=os.write):
    write(1, f"{text}\\n".encode())
"""

EXITS = {
    "a manager that was never closed": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
begin(manager)
""",
        "",
    ),
    "a daemon thread in wait": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
id = begin(manager)
threading.Thread(target=manager.wait, args=(id,), daemon=True).start()
threading.Thread(target=lambda: list(manager.follow(id)), daemon=True).start()
time.sleep(0.1)
""",
        "",
    ),
    "a daemon thread in stop": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
id = begin(manager)
threading.Thread(target=manager.stop, args=(id,), daemon=True).start()
""",
        "",
    ),
    "on_output under way": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
entered = threading.Event()
def on_output(chunk):
    entered.set()
    time.sleep(60)
manager.start_with_code(CODE, PARAMS, None, on_output=on_output).raise_for_error()
entered.wait(20)
""",
        "",
    ),
    "stop in an exit handler": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
id = begin(manager)
atexit.register(lambda: say(manager.stop(id).data.status))
""",
        "stopped\n",
    ),
    "close in an exit handler": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
id = begin(manager)
@atexit.register
def close():
    manager.close()
    say(manager.get_status(id).data.stop_reason)
""",
        "closed\n",
    ),
    "stop at the interpreter's teardown": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
id = begin(manager)
class Last:
    def __del__(self, manager=manager, id=id, say=say):
        answer = manager.stop(id)
        say(answer.success or answer.error)
last = Last()  # is let go of when no other thread runs any more
""",
        "the interpreter is shutting down: its executions are stopped when it has ended\n",
    ),
    "wait and close at the interpreter's teardown": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
id = begin(manager)
class Last:
    def __del__(self, manager=manager, id=id, say=say):
        manager.wait(id)
        manager.stop_all()
        manager.close()
        say("gone through")
last = Last()
""",
        "gone through\n",
    ),
    "a start at the interpreter's teardown": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
class Last:
    def __del__(self, manager=manager, say=say, code=CODE, params=PARAMS):
        answer = manager.start_with_code(code, params)
        say("answered")
last = Last()
begin(manager)
""",
        "answered\n",
    ),
    "the first start in an exit handler": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
@atexit.register
def start():
    answer = manager.start_with_code(CODE, PARAMS)
    say("answered" if answer.success or answer.error else answer)
""",
        "answered\n",
    ),
    "a later start in an exit handler": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
begin(manager)
@atexit.register
def start():
    answer = manager.start_with_code(CODE, PARAMS, on_output=print)
    say("answered" if answer.success or answer.error else answer)
""",
        "answered\n",
    ),
    "stop when the package itself has been torn down": (
        """
manager = sidexec.ExecutionManager(grace_period=1.0)
id = begin(manager)
class Last:
    def __del__(self, manager=manager, id=id, error=Exception):
        try:
            manager.stop(id)
        except error:
            pass  # its modules are empty
sys.last_of_all = Last()
""",
        "",
    ),
    "with, left by sys.exit": (
        """
with sidexec.ExecutionManager(grace_period=1.0) as manager:
    begin(manager)
    sys.exit(0)
""",
        "",
    ),
}


@pytest.mark.parametrize("name", one_in(3, EXITS), ids=lambda name: name.replace(" ", "_"))
def test_the_host_neither_hangs_nor_complains_at_its_exit(trace, name):
    program, expected = EXITS[name]
    code = programs.PRELUDE + programs.CLEAN_UP
    done = subprocess.run(
        [sys.executable, "-c", EXIT_PRELUDE + program, json.dumps([code, trace.params])],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
        text=True,
        timeout=HANG,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout == expected
    check_that_nothing_is_left(trace, [], 1.0)
    eventually(lambda: not any(each.is_alive for each in trace.noted("keeper")))


KILLED_WHILE_IT_STOPS = """
import os, signal, sys, time
import sidexec
from sidexec.engine.descriptors import Sender

def die(sender, data, send=Sender.send):
    if sys.argv[2] == "after":
        send(sender, data)
    os.kill(os.getpid(), signal.SIGKILL)

manager = sidexec.ExecutionManager(grace_period=10.0)
code = "import time\\ntry:\\n  print('ready')\\n  time.sleep(60)\\nfinally:\\n  open(params['path'], 'w').close()"
id = manager.start_with_code(code, {"path": sys.argv[1]}).raise_for_error().data.side_execution_id
while manager.get_status(id).data.output != "ready\\n":
    time.sleep(0.002)
Sender.send = die
manager.stop(id)
"""


@pytest.mark.parametrize("when", ("before", "after"))
def test_a_host_killed_right_before_or_after_it_has_said_that_it_asks(tmp_path, when):
    path = tmp_path / "cleaned up"
    command = [sys.executable, "-c", KILLED_WHILE_IT_STOPS, str(path), when]
    done = subprocess.run(command, env=environment(), timeout=HANG)
    assert done.returncode == -signal.SIGKILL
    eventually(path.exists, timeout=9)
