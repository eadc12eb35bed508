"""Tiny named programs, and what tells from outside whether a process of theirs is left."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import eventually, stat_of

# Each descendant notes its pid and start time, stands in the trace's directory and
# inherits a locked descriptor. A forgotten one ends by itself after a minute.
PRELUDE = """
import fcntl, os, signal, sys, time

os.chdir(params["directory"])
lock = os.open("lock", os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_SH)
os.set_inheritable(lock, True)

def note(name, pid=None):
    pid = os.getpid() if pid is None else pid
    with open(f"/proc/{pid}/stat") as file:
        started = file.read().rpartition(")")[2].split()[19]
    with open(params["directory"] + "/pids", "a") as file:
        file.write(f"{name} {pid} {started}\\n")

def wait_for_note(name):
    while True:
        with open(params["directory"] + "/pids") as file:
            if any(line.split()[0] == name for line in file):
                return
        time.sleep(0.001)

def quiet():
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)

def in_child(body):
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return pid

def daemon(body):
    def middle():
        os.setsid()
        in_child(body)
    os.waitpid(in_child(middle), 0)

def stopped_child(body):
    os.waitpid(in_child(body), os.WUNTRACED)

def linger(name):
    note(name)
    time.sleep(60)

def deaf():
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)

note("keeper", os.getppid())
note("snippet")
"""


def spawned(how, *lines):
    """Code that has a descendant run the lines; `how` is a function of the prelude."""
    return "def body():\n" + textwrap.indent("\n".join(lines), "    ") + f"\n{how}(body)\n"


DESCENDANTS = {
    "plain": spawned("in_child", 'quiet(); linger("descendant")'),
    "deaf": spawned("in_child", 'quiet(); deaf(); linger("descendant")'),
    "own_session": spawned("in_child", 'quiet(); os.setsid(); linger("descendant")'),
    "daemon": spawned("daemon", 'quiet(); linger("descendant")'),
    "daemon_without_environment": spawned(
        "daemon",
        'quiet(); os.chdir("/"); note("descendant")',
        'os.execve("/bin/sleep", ["sleep", "60"], {})',
    ),
    "stopped": spawned(
        "stopped_child",
        'quiet(); note("descendant")',
        "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)",
    ),
    "pipe_holder": spawned("in_child", 'os.setsid(); linger("descendant")'),
    "storm": """
def body():
    quiet()
    note("descendant")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if os.fork():
            os._exit(0)
for _ in range(params.get("storms", 1)):
    in_child(body)
""",
}

STARTED = 'wait_for_note("descendant")\n'

WAIT = """
print("ready", flush=True)
while True:
    time.sleep(60)
"""

CLEAN_UP = """
try:
    print("ready", flush=True)  # in the `try`, or the ask could come before it
    while True:
        time.sleep(60)
finally:
    print("cleaning up", flush=True)
    print("x" * 200_000, flush=True)
    note("cleaned")
"""

# Is asked, says so, and stays.
STUBBORN = """
import time
word = 'ready'
while True:
    try:
        if word:
            text, word = word, None
            print(text)
        time.sleep(60)
    except SystemExit:
        print('asked')
"""
DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT


def when_asked(body, clause="finally"):
    """Code that waits, and what it does when it is asked.

    `ready` and its newline are one write: a stop may come between two.
    """
    body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    waits = (
        "import os, signal, sys, time\ntry:\n    print('ready\\n', end='')\n    time.sleep(60)\n"
    )
    return f"{waits}{clause}:\n{body}\n"


POLITE = when_asked("print('out')")


def program(*parts):
    """A program whose processes note who they are."""
    return "".join((PRELUDE, *parts))


def with_descendant(kind, ending=WAIT):
    return program(DESCENDANTS[kind], STARTED, ending)


def start_time(pid):
    """What tells a process from a later one of the same pid; None where there is none."""
    fields = stat_of(pid)
    return fields and int(fields[19])


class Process:
    """One process, not any that has its pid later."""

    def __init__(self, pid, started=None):
        self.pid = pid
        self.started = start_time(pid) if started is None else started

    def __repr__(self):
        return f"pid {self.pid}"

    @property
    def exists(self):
        """Whether it is there, be it as a zombie."""
        return self.started is not None and start_time(self.pid) == self.started

    @property
    def state(self):
        fields = stat_of(self.pid)
        return fields[0] if fields and int(fields[19]) == self.started else None

    @property
    def is_alive(self):
        return self.state not in (None, "Z", "X")

    def kill(self, signum=signal.SIGKILL):
        if self.exists:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signum)


class Trace:
    """What tells whether processes of an execution are left, however they hide."""

    def __init__(self, directory):
        self.directory = os.path.realpath(directory)
        os.makedirs(self.directory, exist_ok=True)
        for name in ("lock", "pids"):
            open(os.path.join(self.directory, name), "a").close()
        self.params = {"directory": self.directory}

    def noted(self, name=None):
        found = []
        with open(os.path.join(self.directory, "pids")) as file:
            for line in file:
                said, pid, started = line.split()
                if name is None or said == name:
                    found.append(Process(int(pid), int(started)))
        return found

    def left(self):
        """What is left of the execution, zombies too; the keeper does not count."""
        keepers = {each.pid for each in self.noted("keeper")}
        others = [each for each in self.noted() if each.pid not in keepers]
        found = {f"pid {each.pid}" for each in others if each.exists}
        found |= {f"pid {pid} by its directory" for pid in self._standing_here()}
        if self._is_locked():
            found.add(f"a holder of the lock: {self._lock_holders()}")
        return found

    def kill(self):
        """End what is left; for tests in which something may be left on purpose."""
        for each in self.noted():
            each.kill()
        for pid in (*self._standing_here(), *self._lock_holders()):
            Process(pid).kill()

    def _is_locked(self):
        """Whether any process, of whatever pid, still has the inherited descriptor."""
        with open(os.path.join(self.directory, "lock"), "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _lock_holders(self):
        lock = os.path.join(self.directory, "lock")
        found = set()
        for pid in _pids():
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == lock:
                        found.add(pid)
        return found

    def _standing_here(self):
        found = set()
        for pid in _pids():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/cwd") == self.directory:
                    found.add(pid)
        return found


def _pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


# It waits for signals that are blocked: one that came before a sleep would wait for its end.
BYSTANDER = """
import os, signal, sys
signals = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(text): os.write(log, f"{text}\\n".encode())
note("ready")
while True:
    note(int(signal.sigwait(signals)))
"""


class Bystander:
    """A process next to the executions that writes down every signal it gets."""

    def __init__(self, log, process=None):
        self._log = str(log)
        self.process = process or self._popen(log)
        self._expected = "ready\n"
        eventually(lambda: self._read() == self._expected)

    @classmethod
    def with_pid(cls, log, pid, tries=100):
        """One of just this pid; None where that is still taken."""
        for _ in range(tries):
            with open(log, "w"), open("/proc/sys/kernel/ns_last_pid", "w") as file:
                file.write(str(pid - 1))
            process = cls._popen(log)
            if process.pid == pid:
                return cls(log, process)
            process.kill()  # it is taken, or somebody else was quicker
            process.wait()
        return None

    @property
    def is_untouched(self):
        """Whether no signal has come but ours, which comes behind all others."""
        self._expected += f"{int(signal.SIGRTMAX)}\n"
        self.process.send_signal(signal.SIGRTMAX)
        eventually(
            lambda: self.process.poll() is not None or len(self._read()) >= len(self._expected)
        )
        return self.process.poll() is None and self._read() == self._expected

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        self.process.kill()
        self.process.wait()

    def _read(self):
        with open(self._log, "a+") as file:
            file.seek(0)
            return file.read()

    @staticmethod
    def _popen(log):
        command = [sys.executable, "-S", "-E", "-c", BYSTANDER, str(log)]
        return subprocess.Popen(command, start_new_session=True)


def _can_choose_pids():
    try:
        with open("/proc/sys/kernel/ns_last_pid", "r+") as file:
            last = file.read()
            file.seek(0)
            file.write(last)
    except OSError:
        return False
    return True


needs_pids = pytest.mark.skipif(
    not _can_choose_pids(), reason="only root may say which pid comes next"
)


def attempts(directory, count=10):
    """A new trace for each try to get a pid before somebody else does; `return` when it worked."""
    for number in range(count):
        trace = Trace(os.path.join(directory, str(number)))
        try:
            yield trace
        finally:
            trace.kill()
    raise AssertionError("other processes have always been quicker")
