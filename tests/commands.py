"""Commands that tests start, in pipelines and in terminals, and what they show."""

import contextlib
import fcntl
import logging
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import uuid

import pytest
from conftest import nothing_left

from sidexec import __main__

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 30  # only a hang takes so long
STOPPING = "sidexec: stopping; Ctrl-C again kills"

# Named tiny programs. Those that wait do so until they are stopped.
HELLO = "print('hello')"
ENDLESS = "while True: print('line')"
WAITING = """
import time
try:
    print("ready")
    while True: time.sleep(1)
finally:
    print("cleaned")
"""
STUBBORN = """
import time
line = "ready"
while True:
    try:
        print(line)
        while True: time.sleep(1)
    except BaseException:
        line = "asked"
"""
UNTIL_FILE = """
import os, time
def until_file(name):
    while not os.path.exists(name): time.sleep(0.01)
"""

# Takes the terminal on its standard input as its controlling one, and becomes the command.
IN_TERMINAL = """
import os, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
# The same as a shell with job control does it, which continues the command when a line comes.
IN_SHELL = """
import os, signal, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
while os.WIFSTOPPED(status := os.waitpid(pid, os.WUNTRACED)[1]):
    os.tcsetpgrp(0, os.getpgrp())
    os.write(0, b"suspended\\n")
    sys.stdin.readline()
    os.tcsetpgrp(0, pid)
    os.killpg(pid, signal.SIGCONT)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def marked(mark):
    """The pids of the processes with `mark` in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark.encode() in file.read():
                    found.append(int(pid))
    return found


class Commands:
    """Starts commands whose processes can be told from all others."""

    def __init__(self, cwd):
        self.cwd = str(cwd)
        self.mark = uuid.uuid4().hex
        self.env = {**os.environ, "PYTHONPATH": ROOT, "TERM": "xterm", "MARK": self.mark}
        self.started = []

    def argv(self, *arguments):
        return [sys.executable, "-m", "sidexec", *map(str, arguments)]

    def popen(self, argv, **options):
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        options = {**streams, "cwd": self.cwd, "env": self.env, **options}
        process = subprocess.Popen(argv, **options)
        self.started.append(process)
        return process

    def start(self, *arguments, **options):
        return self.popen(self.argv(*arguments), **options)

    def run(self, *arguments, input=None, **options):
        """Run to the end: the exit code, standard output, standard error."""
        if input is not None:
            options["stdin"] = subprocess.PIPE
        return finish(self.start(*arguments, **options), input)

    def each(self, *commands, **options):
        """What `run` returns of each; they run side by side."""
        started = [self.start(*arguments, **options) for arguments in commands]
        return [finish(process) for process in started]

    def left(self):
        return marked(self.mark)


def finish(process, input=None):
    out, err = process.communicate(input, timeout=LIMIT)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


@pytest.fixture
def cli(tmp_path):
    commands = Commands(tmp_path)
    try:
        yield commands
        for process in commands.started:
            process.wait(LIMIT)
        assert commands.left() == []
    finally:
        for pid in commands.left():  # also what a shell has started
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in commands.started:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def in_process(capfd, monkeypatch, tmp_path):
    """What `cli.run` returns, where it is not the process that is tested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("sidexec"), "handlers", [])

    def in_process(*arguments, input=None):
        monkeypatch.setattr(sys, "argv", [__main__.__file__, *map(str, arguments)])
        with contextlib.ExitStack() as stack:
            if input is not None:
                before = os.dup(0)
                stack.callback(os.close, before)
                stack.callback(os.dup2, before, 0)
                with open(tmp_path / "stdin", "wb+", buffering=0) as file:
                    file.write(input)
                    file.seek(0)
                    os.dup2(file.fileno(), 0)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP):
                stack.callback(signal.signal, signum, signal.getsignal(signum))
            try:
                returncode = __main__.main()
            except SystemExit as error:
                returncode = error.code
        return returncode, *capfd.readouterr()

    with nothing_left():
        yield in_process


def unread(pipe):
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


class Terminal:
    """A command in a terminal of its own, and what the terminal shows."""

    def __init__(self, cli, *arguments, columns=80, starter=IN_TERMINAL, **options):
        self._master, slave = pty.openpty()
        self._sizes = []  # from how many bytes of the data on, and how many columns
        self.data = b""
        self.resize(columns)
        streams = {"stdin": slave, "stdout": slave, "stderr": slave, **options}
        argv = cli.argv(*arguments)
        argv[1:1] = ["-S", "-c", starter]
        self.process = cli.popen(argv, start_new_session=True, **streams)
        os.close(slave)

    def resize(self, columns):
        self._sizes.append((len(self.data), columns))
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self):
        """Read what there is, for at most a moment; false at the end."""
        if select.select([self._master], [], [], 0.05)[0]:
            try:
                part = os.read(self._master, 65536)
            except OSError:  # nobody has the terminal open any more
                return False
            self.data += part
        return True

    def until(self, condition):
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.read(), self.lines()
            assert time.monotonic() < deadline, self.lines()

    def is_ready(self):
        """Wait until the snippet has said so."""
        self.until(lambda: "ready" in self.lines()[:-1])

    def press(self, key):
        os.write(self._master, key)

    def finish(self):
        """Read to the end: the exit code, and the lines that it shows."""
        deadline = time.monotonic() + LIMIT
        while self.read():
            assert time.monotonic() < deadline, self.lines()
        self.close()
        return self.process.wait(LIMIT), self.lines()

    def close(self):
        os.close(self._master)

    def lines(self):
        """What it shows, without blanks at the ends: a list of lines, each of them whole.

        A line that is longer than the window goes on in the next row, as also one does
        that was there when the window was made narrower. The cursor stays where it was in
        its line.
        """
        lines, at = [[]], 0
        for start, (begin, columns) in enumerate(self._sizes):
            end = self._sizes[start + 1][0] if start + 1 < len(self._sizes) else None
            chars = iter(self.data[begin:end].decode())
            for char in chars:
                row = (at - 1 if char == "\r" and at == len(lines[-1]) else at) // columns * columns
                if char == "\r":
                    at = max(0, row)
                elif char == "\n":
                    lines.append([])
                    at = 0
                elif char == "\x1b":
                    code = next(chars) + next(chars)
                    rest = row + columns if code == "[K" else len(lines[-1])
                    assert code in ("[K", "[J")
                    lines[-1][at:rest] = " " * max(0, min(rest, len(lines[-1])) - at)
                else:
                    lines[-1] += " " * (at + 1 - len(lines[-1]))
                    lines[-1][at] = char
                    at += 1
        return ["".join(line).rstrip() for line in lines]
