"""The command line, as real processes, in pipelines and in a real terminal."""

import contextlib
import fcntl
import json
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

from conftest import eventually, is_alive, one_in

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 30  # only a hang takes so long

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


@pytest.fixture(autouse=True)
def interruptible():
    """Have the commands start with SIGINT as a shell's foreground job has it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
        options = {"stdin": subprocess.DEVNULL, "cwd": self.cwd, "env": self.env, **options}
        for stream in ("stdout", "stderr"):
            options.setdefault(stream, subprocess.PIPE)
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
        for process in commands.started:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


# -- exit codes, and the line that says what happened


@pytest.mark.parametrize(
    "code, options, expected, line",
    [
        (HELLO, [], 0, ""),
        ("import sys; sys.exit(0)", [], 0, ""),
        ("import sys; sys.exit(3)", [], 1, "sidexec: exit code 3\n"),
        ("import os; os.kill(os.getpid(), 9)", [], 1, "sidexec: killed by SIGKILL\n"),
        (WAITING, ["--timeout", "0.3"], 124, "sidexec: timed out after 0.3 s\n"),
        (WAITING, ["--stop-after", "0.3"], 130, "sidexec: stopped\n"),
        (STUBBORN, ["--stop-after", ".3", "--grace", ".1"], 130, "sidexec: stopped, by force\n"),
        (STUBBORN, ["--timeout", ".3", "--grace", "0"], 124, "timed out after 0.3 s, by force\n"),
    ],
)
def test_the_exit_code_and_a_line_say_how_it_ended(cli, code, options, expected, line):
    returncode, out, err = cli.run("run", *options, "-c", code)
    assert returncode == expected
    assert err.endswith(line) and err.count("\n") == bool(line)
    assert out in ("", "hello\n", "ready\n", "ready\ncleaned\n", "ready\nasked\n")


def test_what_a_snippet_prints_on_its_way_out_is_shown(cli):
    _, out, _ = cli.run("run", "--stop-after", "0.3", "-c", WAITING)
    assert out == "ready\ncleaned\n"


def test_a_busy_loop_runs_its_finally_block(cli):
    code = "try:\n    print('ready')\n    while True: pass\nfinally:\n    print('cleaned')"
    _, out, _ = cli.run("run", "--stop-after", "0.3", "-c", code)
    assert out == "ready\ncleaned\n"


def test_the_first_statement_of_a_try_block_may_be_the_loop(cli):
    code = "try:\n    while True: pass\nfinally:\n    print('cleaned')"
    _, out, _ = cli.run("run", "--stop-after", "0.3", "-c", code)
    assert out == "cleaned\n"


def test_a_traceback_is_printed_once_and_nothing_more(cli):
    returncode, out, err = cli.run("run", "-c", "\n1 / 0")
    assert (returncode, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("ZeroDivisionError: division by zero\n")
    assert err.count("ZeroDivisionError") == 1 and "sidexec" not in err


def test_there_is_no_time_limit_unless_one_is_given(cli):
    _, out, _ = cli.run("run", "--json", "-c", HELLO)
    assert json.loads(out)["data"]["status"] == "completed"
    assert cli.run("run", "--timeout", "inf", "-c", HELLO)[0] == 0


# -- bad usage


BAD_USAGE = [
    [],
    ["fly"],
    ["run"],
    ["run", "-c", HELLO, "file.py"],
    ["run", "a.py", "b.py"],
    ["run", "-c"],
    ["run", "-c", HELLO, "--params", "{"],
    ["run", "-c", HELLO, "--params", "[1]"],
    ["run", "-c", HELLO, "--params", "[" * 100_000],
    ["run", "-c", HELLO, "--params", '{"a": NaN}'],
    ["run", "-c", HELLO, "--timeout", "-1"],
    ["run", "-c", HELLO, "--timeout", "soon"],
    ["run", "-c", HELLO, "--grace", "nan"],
    ["run", "-c", HELLO, "--stop-after", "-0.5"],
    ["run", "-c", HELLO, "--python", ""],
    ["run", "-c", HELLO, "--time", "3"],
    ["run", "-c", HELLO, "--two\nlines"],
    ["run", os.fsdecode(b"no \xff such file.py")],
    ["run", "no-such-file.py"],
    ["run", "."],
    ["run", ""],
    ["blocks", "no-such-directory"],
]


@pytest.mark.parametrize("arguments", one_in(3, BAD_USAGE))
def test_bad_usage_is_one_line_and_exit_code_2(cli, arguments):
    returncode, out, err = cli.run(*arguments)
    assert (returncode, out) == (2, "")
    assert err.startswith("python -m sidexec") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err


def test_code_that_is_not_utf8_is_bad_usage(cli):
    returncode, out, err = cli.run("run", "-c", os.fsdecode(b"print('\xff')"))
    assert (returncode, out, err.count("\n")) == (2, "", 1)


def test_a_start_that_fails_is_one_line_and_exit_code_1(cli):
    returncode, out, err = cli.run("run", "--python", "/no/such/python", "-c", HELLO)
    assert (returncode, out) == (1, "")
    assert err.startswith("sidexec: no such interpreter: '/no/such/python'")
    assert err.count("\n") == 1


def test_an_interpreter_that_is_none_is_one_line_and_exit_code_1(cli):
    returncode, out, err = cli.run("run", "--python", "/bin/false", "--json", "-c", HELLO)
    assert returncode == 1
    assert err.startswith("sidexec: ") and err.count("\n") == 1
    response = json.loads(out)
    assert response["type"] == "startSideExecutionResponse"
    assert response["success"] is False and "/bin/false" in response["error"]


# -- where the code comes from


def test_code_comes_from_a_file_or_a_directory(cli, tmp_path):
    block = tmp_path / "block"
    block.mkdir()
    (block / "helper.py").write_text("def greet(name): print('hello', name)\n")
    (block / "__main__.py").write_text("import helper\nhelper.greet(params['name'])\n")
    for path in ("block", "block/__main__.py", tmp_path / "block"):
        returncode, out, err = cli.run("run", path, "--params", '{"name": "you"}')
        assert (returncode, out, err) == (0, "hello you\n", "")


def test_code_comes_from_standard_input(cli):
    assert cli.run("run", "-", input=HELLO.encode()) == (0, "hello\n", "")
    assert cli.run("run", "-", input=b"") == (0, "", "")


def test_code_from_standard_input_may_say_its_encoding(cli):
    source = "# coding: latin-1\nprint('\u00e9')\n".encode("latin-1")
    assert cli.run("run", "-", input=source) == (0, "\u00e9\n", "")
    for bad in (b"print('\xff')", b"# coding: nonsense\n"):
        returncode, out, err = cli.run("run", "-", input=bad)
        assert (returncode, out, err.count("\n")) == (2, "", 1)


def test_a_snippet_finds_its_standard_input_empty(cli):
    code = "import sys; print(repr(sys.stdin.read()))"
    assert cli.run("run", "-c", code, input=b"for somebody else")[1] == "''\n"


# -- output


def test_the_two_streams_are_kept_apart(cli):
    code = "import sys\nprint('out \u2713')\nprint('err', file=sys.stderr)"
    assert cli.run("run", "-c", code) == (0, "out \u2713\n", "err\n")


def test_output_arrives_as_it_is_written(cli, tmp_path):
    code = f"{UNTIL_FILE}\nprint('first', end='')\nuntil_file('go')\nprint('last')"
    process = cli.start("run", "-c", code)
    assert os.read(process.stdout.fileno(), 100) == b"first"
    assert process.poll() is None
    (tmp_path / "go").touch()
    assert finish(process) == (0, "last\n", "")


def test_all_of_a_long_output_arrives_in_order(cli):
    code = "for number in range(200_000): print(number)"
    _, out, err = cli.run("run", "-c", code)
    assert out.split() == [str(number) for number in range(200_000)] and err == ""


def test_a_slow_reader_gets_everything(cli):
    size = 64 * 1024 * 1024
    code = f"import os\nfor _ in range({size >> 16}): os.write(1, b'x' * 65536)"
    process = cli.start("run", "-c", code)
    select.select([process.stdout], [], [], LIMIT)
    time.sleep(0.5)  # time enough to produce all of it, were it not waited for
    returncode, out, err = finish(process)
    assert (returncode, len(out), err) == (0, size, "")


def test_a_reader_that_waits_does_not_keep_a_stop_from_it(cli, tmp_path):
    code = "try:\n    while True: print('x' * 10_000)\nfinally:\n    open('cleaned', 'w')"
    process = cli.start("run", "-c", code)
    select.select([process.stdout], [], [], LIMIT)
    process.send_signal(signal.SIGINT)
    eventually((tmp_path / "cleaned").exists)
    returncode, out, err = finish(process)
    assert (returncode, err) == (130, "sidexec: stopped\n")
    assert set(out.split()[:-1]) == {"x" * 10_000}


def test_descriptors_that_are_closed_do_no_harm(cli):
    command = '"$@" <&- >&- 2>&-'
    process = cli.popen(["sh", "-c", command, "-", *cli.argv("run", "-c", "open('ran', 'w')")])
    assert finish(process) == (0, "", "")
    assert os.path.exists(os.path.join(cli.cwd, "ran"))


def test_an_output_that_can_not_be_written_is_told_and_ends_it(cli):
    with open("/dev/full", "wb") as full:
        returncode, _, err = cli.run("run", "-c", ENDLESS, stdout=full)
    assert returncode == 1
    assert err == "sidexec: could not write the output: No space left on device\n"


def test_a_response_that_can_not_be_written_is_told(cli):
    with open("/dev/full", "wb") as full:
        returncode, _, err = cli.run("run", "--json", "-c", "pass", stdout=full)
    assert returncode == 1
    assert err == "sidexec: could not write the output: No space left on device\n"


def test_a_pipe_that_does_not_block_gets_everything(cli):
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    process = cli.start("run", "-c", "print('x' * 1_000_000)", stdout=theirs)
    os.close(theirs)
    with open(ours, "rb") as stream:
        assert len(stream.read()) == 1_000_001
    assert finish(process) == (0, "", "")


# -- a closed pipe


def test_a_reader_that_leaves_ends_it_quietly(cli):
    code = f"try:\n    {ENDLESS}\nfinally:\n    open('cleaned', 'w')"
    process = cli.start("run", "-c", code)
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(LIMIT) == 130
    assert os.path.exists(os.path.join(cli.cwd, "cleaned"))


@pytest.mark.parametrize("pipe", ["|", "2>&1 |"])
def test_a_pipeline_with_head_ends_quietly(cli, pipe):
    command = f'"$@" {pipe} head -n 1'
    process = cli.popen(["sh", "-c", command, "-", *cli.argv("run", "-c", ENDLESS)])
    assert finish(process) == (0, "line\n", "")


def test_standard_error_goes_on_when_standard_output_is_closed(cli):
    code = f"import sys\ntry:\n    {ENDLESS}\nfinally:\n    print('cleaned', file=sys.stderr)"
    process = cli.start("run", "-c", code)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"cleaned\n"
    assert process.wait(LIMIT) == 130


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["-h"], 0),
        (["run", "-h"], 0),
        (["run", "-c", HELLO], 0),
        (["run", "--json", "-c", HELLO], 0),
        (["blocks", "HERE"], 0),
        (["blocks", "--json"], 0),
    ],
)
def test_a_pipe_that_nobody_reads_makes_no_noise(cli, tmp_path, arguments, expected):
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "__main__.py").write_text("pass")
    arguments = [str(tmp_path) if each == "HERE" else each for each in arguments]
    ours, theirs = os.pipe()
    os.close(ours)
    process = cli.start(*arguments, stdout=theirs)
    os.close(theirs)
    returncode, _, err = finish(process)
    assert returncode == expected or arguments == ["run", "-c", HELLO] and returncode == 130
    assert err == ("hello\n" if arguments[:2] == ["run", "--json"] else "")


# -- --json


def test_json_is_the_status_of_what_ended_by_itself(cli):
    code = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nreturn {'n': params['n'] + 1}"
    returncode, out, err = cli.run("run", "--json", "--params", '{"n": 1}', "-c", code)
    assert returncode == 0
    assert sorted(err.split()) == ["err", "out"]
    assert out.count("\n") == 1
    response = json.loads(out)
    assert response["type"] == "getSideExecutionStatusResponse"
    assert response["success"] is True
    data = response["data"]
    assert (data["status"], data["result"], data["exitCode"]) == ("completed", {"n": 2}, 0)
    assert (data["output"], data["errorOutput"]) == ("out\n", "err\n")


def test_json_is_the_response_to_the_stop_of_what_was_stopped(cli):
    code = f"results = [1]\n{WAITING}\nreturn results"
    returncode, out, err = cli.run("run", "--json", "--stop-after", "0.3", "-c", code)
    assert returncode == 130
    assert err == "ready\ncleaned\nsidexec: stopped\n"
    response = json.loads(out)
    assert response["type"] == "stopSideExecutionResponse"
    data = response["data"]
    assert (data["status"], data["result"]) == ("stopped", [1])
    assert (data["stopReason"], data["forced"]) == ("requested", False)
    assert data["output"] == "ready\ncleaned\n"


def test_json_is_the_status_of_what_timed_out_or_failed(cli):
    returncode, out, _ = cli.run("run", "--json", "--timeout", "0.3", "-c", WAITING)
    data = json.loads(out)["data"]
    assert (returncode, data["status"], data["stopReason"]) == (124, "stopped", "timeout")
    returncode, out, err = cli.run("run", "--json", "-c", "raise ValueError('x')")
    data = json.loads(out)["data"]
    assert (returncode, data["status"]) == (1, "failed")
    assert data["error"].splitlines()[0] == "ValueError: x"
    assert err.count("ValueError: x") == 1


# -- signals


def start_and_wait(cli, code, *options, ready=b"ready\n"):
    process = cli.start("run", *options, "-c", code)
    assert process.stdout.readline() == ready
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_gracefully(cli, signum):
    process = start_and_wait(cli, WAITING)
    process.send_signal(signum)
    assert finish(process) == (130, "cleaned\n", "sidexec: stopped\n")


def test_output_goes_on_while_a_stop_is_under_way(cli, tmp_path):
    code = f"{UNTIL_FILE}\ntry:\n    print('ready')\n    until_file('never')\nfinally:\n"
    code += "    print('cleaning')\n    until_file('go')\n    print('cleaned')"
    process = start_and_wait(cli, code, "--grace", "60")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"cleaning\n"
    assert process.poll() is None
    (tmp_path / "go").touch()
    assert finish(process) == (130, "cleaned\n", "sidexec: stopped\n")


def test_a_second_signal_stops_it_by_force(cli):
    code = STUBBORN.replace("import time", "import time, subprocess, sys") + (
        "    subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    )
    process = start_and_wait(cli, code, "--grace", "600")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"asked\n"
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "sidexec: stopped, by force\n")


def test_json_of_a_stop_by_force_is_the_stop_that_won(cli):
    process = cli.start("run", "--json", "--grace", "600", "-c", STUBBORN)
    assert process.stderr.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == b"asked\n"
    process.send_signal(signal.SIGINT)
    returncode, out, _ = finish(process)
    data = json.loads(out)["data"]
    assert (returncode, data["status"], data["forced"]) == (130, "stopped", True)


def test_signals_count_while_stop_after_is_stopping_it(cli):
    process = start_and_wait(cli, STUBBORN, "--grace", "600", "--stop-after", "0.3")
    assert process.stdout.readline() == b"asked\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (130, "", "sidexec: stopped, by force\n")


def test_an_ignored_interrupt_stays_ignored(cli):
    command = 'trap "" INT; exec "$@"'
    process = cli.popen(["sh", "-c", command, "-", *cli.argv("run", "-c", WAITING)])
    assert process.stdout.readline() == b"ready\n"
    with open(f"/proc/{process.pid}/status") as file:
        ignored = next(line for line in file if line.startswith("SigIgn"))
    assert int(ignored.split()[1], 16) >> (signal.SIGINT - 1) & 1
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (130, "cleaned\n", "sidexec: stopped\n")


def test_an_interrupt_while_standard_input_is_read_is_quiet(cli):
    process = cli.start("run", "-", stdin=subprocess.PIPE)
    process.stdin.write(b"\n")
    process.stdin.flush()
    eventually(lambda: not any(fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4))))
    eventually(lambda: is_asleep(process.pid))
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 130
    assert process.stderr.read() == b""


def is_asleep(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def test_an_interrupt_before_the_interpreter_is_up_ends_it(cli, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntouch started\nexec sleep 1000\n")
    python.chmod(0o755)
    process = cli.start("run", "--python", python, "-c", HELLO)
    eventually((tmp_path / "started").exists)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "sidexec: stopped\n")


def test_two_signals_end_it_even_where_nobody_reads_its_output(cli, tmp_path):
    code = "import os\nprint('x' * 1_000_000)\nprint(os.getpid(), file=open('pid', 'w'))\n"
    process = cli.start("run", "-c", code + WAITING)
    eventually((tmp_path / "pid").exists)
    pid = int(eventually((tmp_path / "pid").read_text))
    process.send_signal(signal.SIGINT)
    eventually(lambda: not is_alive(pid))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 130


def test_two_signals_at_the_same_moment_are_two(cli):
    process = start_and_wait(cli, STUBBORN, "--grace", "600")
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    returncode, _, err = finish(process)
    assert (returncode, err) == (130, "sidexec: stopped, by force\n")


def test_nothing_is_left_when_the_command_is_killed(cli):
    code = "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
    process = start_and_wait(cli, code + WAITING, "--grace", "1")
    process.kill()
    process.wait()
    eventually(lambda: not cli.left())


# -- in a terminal


class Terminal:
    """A command in a terminal of its own, and what the terminal shows."""

    def __init__(self, cli, *arguments, columns=80, **options):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        streams = {"stdin": slave, "stdout": slave, "stderr": slave, **options}
        argv = cli.argv(*arguments)
        argv[1:1] = ["-c", IN_TERMINAL]
        self.process = cli.popen(argv, start_new_session=True, **streams)
        os.close(slave)
        self.data = b""
        self._columns = columns

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

    def press(self, key):
        os.write(self._master, key)

    def finish(self):
        deadline = time.monotonic() + LIMIT
        while self.read():
            assert time.monotonic() < deadline, self.lines()
        os.close(self._master)
        return self.process.wait(LIMIT)

    def lines(self):
        """The lines that the terminal shows, without blanks at their ends."""
        rows, column = [[]], 0
        text = iter(self.data.decode())
        for char in text:
            if char == "\r":
                column = 0
            elif char == "\n":
                rows.append([])
            elif char == "\x1b":
                assert next(text) + next(text) == "[K"
                del rows[-1][column:]
            else:
                if column == self._columns:
                    rows.append([])
                    column = 0
                rows[-1] += " " * (column + 1 - len(rows[-1]))
                rows[-1][column] = char
                column += 1
        return ["".join(row).rstrip() for row in rows]


def test_a_terminal_shows_a_bar_of_the_progress(cli, tmp_path):
    code = f"{UNTIL_FILE}\nprint('one')\nreport_progress(50)\nuntil_file('go')\nprint('two')"
    terminal = Terminal(cli, "run", "-c", code)
    terminal.until(lambda: "%" in terminal.lines()[-1])
    assert terminal.lines() == ["one", "[" + "#" * 20 + "." * 20 + "]  50%"]
    (tmp_path / "go").touch()
    assert terminal.finish() == 0
    assert terminal.lines() == ["one", "two", ""]


def test_a_bar_never_tears_the_snippets_lines(cli):
    code = """
import time
for number in range(30):
    report_progress(number)
    print("partial", number, end="")
    if number % 7 == 0: time.sleep(0.15)
    print(" whole")
    if number % 5 == 0: time.sleep(0.12)
"""
    terminal = Terminal(cli, "run", "-c", code)
    assert terminal.finish() == 0
    assert b"%" in terminal.data
    assert terminal.lines() == [f"partial {number} whole" for number in range(30)] + [""]


def test_a_bar_does_not_tear_lines_of_standard_error(cli):
    code = """
import sys, time
for number in range(3):
    report_progress(20 * number)
    print("partial", end="", file=sys.stderr)
    time.sleep(0.15)
    print(" whole", file=sys.stderr)
    time.sleep(0.15)
"""
    terminal = Terminal(cli, "run", "-c", code)
    assert terminal.finish() == 0
    assert b"%" in terminal.data
    assert terminal.lines() == ["partial whole"] * 3 + [""]


@pytest.mark.parametrize("columns", [4, 30])
def test_a_bar_fits_into_a_narrow_terminal(cli, columns):
    code = "import time\nfor n in range(2):\n    report_progress(n * 100)\n    time.sleep(0.15)"
    terminal = Terminal(cli, "run", "-c", code, columns=columns)
    assert terminal.finish() == 0
    assert b"%" in terminal.data
    assert terminal.lines() == [""]


def test_a_bar_is_on_standard_error_while_standard_output_is_a_pipe(cli, tmp_path):
    code = f"{UNTIL_FILE}\nreport_progress(7)\nprint('partial', end='')\nuntil_file('go')\nprint()"
    terminal = Terminal(cli, "run", "-c", code, stdout=subprocess.PIPE)
    terminal.until(lambda: terminal.lines()[-1].endswith("]   7%"))
    (tmp_path / "go").touch()
    assert terminal.finish() == 0
    assert terminal.process.stdout.read() == b"partial\n"
    assert terminal.lines() == [""]


def test_there_is_no_bar_without_progress(cli):
    terminal = Terminal(cli, "run", "-c", "import time\nprint('one')\ntime.sleep(0.3)")
    assert terminal.finish() == 0
    assert terminal.data == b"one\r\n"


PROGRESS = "import time\nreport_progress(50)\nprint('one')\ntime.sleep(0.3)"


def test_there_is_no_bar_where_standard_error_is_no_terminal(cli):
    assert cli.run("run", "-c", PROGRESS) == (0, "one\n", "")
    terminal = Terminal(cli, "run", "-c", PROGRESS, stderr=subprocess.PIPE)
    assert terminal.finish() == 0
    assert (terminal.data, terminal.process.stderr.read()) == (b"one\r\n", b"")


def test_there_is_no_bar_in_a_dumb_terminal(cli):
    cli.env["TERM"] = "dumb"
    terminal = Terminal(cli, "run", "-c", PROGRESS)
    assert terminal.finish() == 0
    assert terminal.data == b"one\r\n"


def test_ctrl_c_stops_it_gracefully(cli):
    terminal = Terminal(cli, "run", "-c", WAITING)
    terminal.until(lambda: "ready" in terminal.lines()[:-1])
    terminal.press(b"\x03")
    assert terminal.finish() == 130
    assert terminal.lines() == ["ready", "^Ccleaned", "sidexec: stopped", ""]


def test_a_second_ctrl_c_stops_it_by_force(cli):
    terminal = Terminal(cli, "run", "--grace", "600", "-c", STUBBORN)
    terminal.until(lambda: "ready" in terminal.lines()[:-1])
    terminal.press(b"\x03")
    terminal.until(lambda: terminal.lines()[-2:] == ["^Casked", ""])
    terminal.press(b"\x03")
    assert terminal.finish() == 130
    assert terminal.lines() == ["ready", "^Casked", "sidexec: stopped, by force", ""]


@pytest.mark.parametrize("columns", [18, 80])
def test_ctrl_c_leaves_no_bar_behind(cli, columns):
    code = "report_progress(90)\n" + WAITING
    terminal = Terminal(cli, "run", "-c", code, columns=columns)
    terminal.until(lambda: terminal.lines()[-1].endswith("90%"))
    terminal.press(b"\x03")
    assert terminal.finish() == 130
    assert terminal.lines() == ["ready", "cleaned", "sidexec: stopped", ""]


def test_the_last_line_stands_on_a_line_of_its_own(cli):
    terminal = Terminal(cli, "run", "-c", "print('partial', end='')\nraise SystemExit(3)")
    assert terminal.finish() == 1
    assert terminal.lines() == ["partial", "sidexec: exit code 3", ""]


def test_nothing_is_added_to_a_line_left_open(cli):
    terminal = Terminal(cli, "run", "-c", "print('partial', end='')")
    assert terminal.finish() == 0
    assert terminal.data == b"partial"


def test_a_response_in_a_terminal_stands_on_a_line_of_its_own(cli):
    terminal = Terminal(cli, "run", "--json", "-c", "print('partial', end='')", columns=5000)
    assert terminal.finish() == 0
    partial, response, rest = terminal.lines()
    assert (partial, rest) == ("partial", "")
    assert json.loads(response)["data"]["output"] == "partial"


def test_a_file_gets_no_line_end_for_the_terminals_sake(cli):
    code = "print('partial', end='')\nraise SystemExit(3)"
    terminal = Terminal(cli, "run", "-c", code, stderr=subprocess.PIPE)
    assert terminal.finish() == 1
    assert terminal.process.stderr.read() == b"sidexec: exit code 3\n"


def test_a_terminal_that_goes_away_ends_it(cli):
    terminal = Terminal(cli, "run", "-c", "report_progress(1)\n" + WAITING)
    terminal.until(lambda: "%" in terminal.lines()[-1])
    os.close(terminal._master)
    assert terminal.process.wait(LIMIT) != 0
    eventually(lambda: not cli.left())


# -- blocks


@pytest.fixture
def library(tmp_path):
    for path, source in [
        ("tools/sort", '"""Sorts.\n\nAt length."""\n__version__ = "2.0"\n'),
        ("tools/deep/er", "pass\n"),
    ]:
        directory = tmp_path / "blocks" / path
        directory.mkdir(parents=True)
        (directory / "__main__.py").write_text(source)
    return tmp_path / "blocks"


def test_blocks_lists_names_descriptions_and_paths(cli, library):
    expected = f"er    -       {library}/tools/deep/er\nsort  Sorts.  {library}/tools/sort\n"
    assert cli.run("blocks", library) == (0, expected, "")
    assert cli.run("blocks", cwd=library) == (0, expected, "")


def test_blocks_as_json_is_the_wire_form(cli, library):
    returncode, out, err = cli.run("blocks", library, "--json")
    response = json.loads(out)
    assert (returncode, err, out.count("\n")) == (0, "", 1)
    assert response["type"] == "listActionBlocksResponse"
    assert [block["name"] for block in response["data"]["actionBlocks"]] == ["er", "sort"]
    assert response["data"]["searchPath"] == str(library)


def test_blocks_says_where_there_are_none(cli):
    assert cli.run("blocks") == (0, "", f"sidexec: no action blocks below {cli.cwd}\n")
    _, out, err = cli.run("blocks", "--json")
    assert (json.loads(out)["data"]["count"], err) == (0, "")


def test_what_blocks_lists_can_be_run(cli, library):
    path = cli.run("blocks", library)[1].splitlines()[1].split()[-1]
    assert cli.run("run", path) == (0, "", "")


# -- the name it goes by


def test_a_vendored_copy_goes_by_its_own_name(cli, tmp_path):
    vendored = tmp_path / "_vendor"
    vendored.mkdir()
    os.symlink(os.path.join(ROOT, "sidexec"), vendored / "runner")
    cli.env["PYTHONDONTWRITEBYTECODE"] = "1"
    argv = [sys.executable, "-m", "_vendor.runner"]
    _, out, _ = finish(cli.popen([*argv, "-h"]))
    assert out.startswith("usage: python -m _vendor.runner ")
    ended = finish(cli.popen([*argv, "run", "-c", "print(1); raise SystemExit(3)"]))
    assert ended == (1, "1\n", "runner: exit code 3\n")
