"""The command line, as real processes and in pipelines."""

import configparser
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from commands import (
    ENDLESS,
    HELLO,
    LIMIT,
    ROOT,
    STOPPING,
    STUBBORN,
    UNTIL_FILE,
    WAITING,
    cli,  # noqa: F401
    finish,
    in_process,  # noqa: F401
    unread,
)
from conftest import eventually, is_alive, state_of

import sidexec

# -- exit codes, and the line that says what happened


INTERRUPTED = """
import sys
sys.excepthook = lambda kind, *_: print(kind.__name__, file=sys.stderr)
raise KeyboardInterrupt
"""
BOTH = "import sys\nprint('out \u2713')\nprint('err', file=sys.stderr)"
ENDINGS = [
    (HELLO, [], (0, "hello\n", "")),
    (HELLO, ["--timeout", "inf"], (0, "hello\n", "")),
    (BOTH, [], (0, "out \u2713\n", "err\n")),
    ("import sys; sys.exit(3)", [], (3, "", "")),
    ("import os; os._exit(125)", [], (125, "", "")),
    ("raise SystemExit('why')", [], (1, "", "why\n")),
    ("import os; os.kill(os.getpid(), 9)", [], (137, "", "sidexec: killed by SIGKILL\n")),
    (INTERRUPTED, [], (130, "", "KeyboardInterrupt\n")),
]
# The same of what is stopped, perhaps before it has printed anything.
STOPS = [
    (WAITING, ["--timeout", "0.3"], 124, "timed out after 0.3 s"),
    (WAITING, ["--stop-after", "0.3"], 0, "stopped"),
    (STUBBORN, ["--stop-after", ".3", "--grace", "0"], 0, "stopped, by force"),
    (STUBBORN, ["--timeout", ".3", "--grace", "0"], 124, "timed out after 0.3 s, by force"),
]


def test_the_exit_code_and_a_line_say_how_it_ended(cli):
    ends = cli.each(*(["run", *options, "-c", code] for code, options, *_ in ENDINGS + STOPS))
    assert ends[: len(ENDINGS)] == [end for _, _, end in ENDINGS]
    for (returncode, _, err), (code, _, expected, line) in zip(ends[len(ENDINGS) :], STOPS):
        assert (returncode, err) == (expected, f"sidexec: {line}\n"), code


# -- bad usage


BAD_USAGE = [
    [],
    ["fly"],
    ["run"],
    ["run", "-c", HELLO, "file.py"],
    ["run", "-c", os.fsdecode(b"print('\xff')")],
    ["run", "-c", HELLO, "-"],
    ["run", "-", "argument"],
    ["run", "--json"],
    ["run", "-c"],
    ["run", "-c", HELLO, "--two\nlines"],
    ["run", "--time", "3", "a.py"],
    ["run", ""],
    ["blocks", "no-such-directory"],
]
BAD_VALUES = {
    "--params": ["{", "[1]", "[" * 100_000, "@no-such-file", "@/dev/null", '{"a": NaN}'],
    "--timeout": ["-1", "soon"],
    "--grace": ["nan"],
    "--stop-after": ["-0.5"],
    "--python": [""],
    "--cwd": [""],
    "--time": ["3"],
}
for option, values in BAD_VALUES.items():
    BAD_USAGE += [["run", "-c", HELLO, option, value] for value in values]


@pytest.mark.parametrize("arguments", BAD_USAGE, ids=range(len(BAD_USAGE)))
def test_bad_usage_is_one_line_and_exit_code_2(in_process, arguments):
    returncode, out, err = in_process(*arguments)
    assert (returncode, out) == (2, "")
    assert err.startswith("python -m sidexec") and err.find("\n") == len(err) - 1


FAILING = [
    (["--python", "/no/such/python", "-c", HELLO], "no such interpreter: '/no/such/python'"),
    (["--cwd", "nowhere", "-c", HELLO], "no such directory: "),
    ([os.fsdecode(b"no \xff such file.py")], "no such action block: "),
    (["."], "no such action block: '.' is a directory without"),
    (["--python", "/bin/false", "-c", HELLO], "the interpreter '/bin/false' did not start"),
]


def as_json(in_process, *arguments):
    """The exit code, the response on standard output, and what is on standard error."""
    returncode, out, err = in_process("run", "--json", *arguments)
    assert out.find("\n") == len(out) - 1
    return returncode, json.loads(out), err


@pytest.mark.parametrize("arguments, line", FAILING)
def test_a_start_that_fails_is_one_line_and_exit_code_125(in_process, arguments, line):
    returncode, out, err = in_process("run", *arguments)
    assert (returncode, out) == (125, "")
    assert err.startswith(f"sidexec: {line}") and err.count("\n") == 1
    returncode, response, said = as_json(in_process, *arguments)
    assert (returncode, said) == (125, err)
    assert (response["type"], response["success"]) == ("startSideExecutionResponse", False)
    assert line in response["error"]


# -- where the code comes from


def test_code_and_params_come_from_files_and_it_runs_where_it_is_told(in_process, tmp_path):
    for name in ("block", "elsewhere"):
        (tmp_path / name).mkdir()
    helper = "import os\ndef greet(name): print('hello', name, 'in', os.getcwd())\n"
    (tmp_path / "block" / "helper.py").write_text(helper)
    (tmp_path / "block" / "__main__.py").write_text("import helper\nhelper.greet(params['name'])\n")
    (tmp_path / "params.json").write_bytes('{"name": "\u00e9"}'.encode())
    for path in ("block", "block/__main__.py", tmp_path / "block"):
        for options, said in (
            (["--params", '{"name": "you"}'], f"hello you in {tmp_path}\n"),
            (
                ["--params", "@params.json", "--cwd", "elsewhere"],
                f"hello \u00e9 in {tmp_path}/elsewhere\n",
            ),
        ):
            assert in_process("run", *options, path) == (0, said, "")


def test_all_after_a_path_is_the_snippets(in_process, tmp_path):
    (tmp_path / "block.py").write_text("import sys; print(ascii(sys.argv[1:]))")
    arguments = ["--json", "-c", "--", "--timeout", "soon", "--no=1", "", "-", "--", "\u00e9", "-h"]
    for given, shown in (
        (["block.py", *arguments], ascii(arguments)),
        (["--timeout", "9", "--", "block.py", "--", "x"], "['--', 'x']"),
        (["block.py"], "[]"),
    ):
        assert in_process("run", *given) == (0, f"{shown}\n", "")


def test_code_comes_from_standard_input(in_process):
    for source, out in (
        (HELLO.encode(), "hello\n"),
        (b"", ""),
        # There is none left for the snippet.
        (b"import sys\nprint(sys.stdin.readline())\n", "\n"),
        ("# coding: latin-1\nprint('\u00e9')\n".encode("latin-1"), "\u00e9\n"),
    ):
        assert in_process("run", "-", input=source) == (0, out, "")
    for bad in (b"print('\xff')", b"# coding: nonsense\n"):
        returncode, out, err = in_process("run", "-", input=bad)
        assert (returncode, out, err.count("\n")) == (2, "", 1)


# -- output


@pytest.mark.slow
def test_a_slow_reader_gets_everything(cli, tmp_path):
    size = 32 * 1024 * 1024
    code = (
        "import os\n"
        f"for n in range({size >> 16}): os.pwrite(count, b'x', n); os.write(1, b'x' * 65536)"
    )
    process = cli.start("run", "-c", f"count = __import__('os').open('count', 65)\n{code}")
    select.select([process.stdout], [], [], LIMIT)
    written = -1
    while written < (written := os.path.getsize(tmp_path / "count")):
        time.sleep(0.3)  # until it waits for the reader, or all of it is produced
    returncode, out, err = finish(process)
    assert (returncode, len(out), err) == (0, size, "")


def test_ctrl_c_while_params_are_read(cli, tmp_path):
    os.mkfifo(tmp_path / "params")
    process = cli.start("run", "--params", "@params", "-c", "pass")
    # Opened for writing without waiting: only possible once the command reads it.
    writer = eventually(lambda: opened(tmp_path / "params"))
    process.send_signal(signal.SIGINT)
    os.close(writer)  # one that came just before a call that blocks waits for its end
    assert finish(process) == (130, "", "")


def opened(fifo):
    with contextlib.suppress(OSError):
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)


def test_code_of_no_text_encoding_is_bad_usage(cli):
    returncode, _, err = cli.run("run", "-", input=b"# coding: rot13\npass")
    assert returncode == 2 and "can't read code from standard input" in err


def test_a_docstring_that_is_no_text_is_listed(cli, tmp_path):
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "__main__.py").write_text('"\\ud800"')
    assert cli.run("blocks")[:2] == (0, f"block  \\ud800  {tmp_path / 'block'}\n")


def test_a_reader_that_waits_does_not_keep_a_stop_from_it(cli, tmp_path):
    code = "try:\n    while True: print('x' * 10_000)\nfinally:\n    open('cleaned', 'w')"
    process = cli.start("run", "-c", code)
    eventually(lambda: unread(process.stdout) >= 32768)  # and soon the pipe is full
    process.send_signal(signal.SIGINT)
    eventually((tmp_path / "cleaned").exists)
    returncode, out, err = finish(process)
    assert (returncode, err) == (130, f"{STOPPING}\nsidexec: stopped\n")
    assert set(out.split()[:-1]) == {"x" * 10_000}


def test_descriptors_that_are_closed_do_no_harm(cli):
    command = '"$@" <&- >&- 2>&-'
    process = cli.popen(["sh", "-c", command, "-", *cli.argv("run", "-c", "open('ran', 'w')")])
    assert finish(process) == (0, "", "")
    assert os.path.exists(os.path.join(cli.cwd, "ran"))


@pytest.mark.parametrize("arguments", [["-c", ENDLESS], ["--json", "-c", "pass"]])
def test_an_output_that_can_not_be_written_is_told_and_ends_it(cli, arguments):
    with open("/dev/full", "wb") as full:
        returncode, _, err = cli.run("run", *arguments, stdout=full)
    assert returncode == 1
    assert err == "sidexec: could not write the output: No space left on device\n"


def test_a_pipe_that_does_not_block_gets_everything_in_order(cli):
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    process = cli.start("run", "-c", "print(' '.join(map(str, range(50_000))))", stdout=theirs)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as stream:
        eventually(lambda: unread(stream) >= 32768)
        pieces = iter(lambda: stream.read(1000), b"")  # so few that no write is whole
        assert b"".join(pieces).split() == [b"%d" % n for n in range(50_000)]
    assert finish(process) == (0, "", "")


# -- a closed pipe


def test_standard_error_goes_on_when_standard_output_is_closed(cli):
    code = f"import sys\ntry:\n    {ENDLESS}\nfinally:\n    print('cleaned', file=sys.stderr)"
    process = cli.start("run", "-c", code)
    process.stdout.readline()
    process.stdout.close()
    assert finish(process) == (141, "", "cleaned\n")


def test_a_pipe_that_nobody_reads_makes_no_noise(cli, tmp_path):
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "__main__.py").write_text("pass")
    commands = {
        "-h": 0,
        "run -h": 0,
        "--version": 0,
        f"run -c {HELLO}": 141,
        f"run --json -c {HELLO}": 141,
        f"blocks {tmp_path}": 141,
        "blocks --json": 141,
    }
    ours, theirs = os.pipe()
    os.close(ours)
    ends = cli.each(*(command.split() for command in commands), stdout=theirs)
    os.close(theirs)
    shown = ["hello\n" if "run --json" in command else "" for command in commands]
    assert [(each[0], each[2]) for each in ends] == list(zip(commands.values(), shown))


# -- --json


def test_json_is_the_status_of_what_ended_by_itself(in_process):
    code = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nreturn {'n': params['n'] + 1}"
    returncode, response, err = as_json(in_process, "--params", '{"n": 1}', "-c", code)
    assert sorted(err) == sorted("out\nerr\n")  # in any order
    data = response["data"]
    assert (returncode, response["type"]) == (0, "getSideExecutionStatusResponse")
    assert (response["success"], data["status"], data["exitCode"]) == (True, "completed", 0)
    assert (data["result"], data["output"], data["errorOutput"]) == ({"n": 2}, "out\n", "err\n")


@pytest.mark.slow
def test_json_is_the_response_to_the_stop_of_what_was_stopped(in_process):
    code = f"results = [1]\n{WAITING}\nreturn results"
    returncode, response, err = as_json(in_process, "--stop-after", "1", "-c", code)
    assert (returncode, response["type"]) == (0, "stopSideExecutionResponse")
    assert err == "ready\ncleaned\nsidexec: stopped\n"
    data = response["data"]
    assert (data["status"], data["stopReason"], data["forced"]) == ("stopped", "requested", False)
    assert (data["result"], data["output"]) == ([1], "ready\ncleaned\n")


def test_json_is_the_status_of_what_timed_out(in_process):
    returncode, response, _ = as_json(in_process, "--timeout", "0.1", "-c", WAITING)
    data = response["data"]
    assert (returncode, data["status"], data["stopReason"]) == (124, "stopped", "timeout")


def test_json_is_the_status_of_what_failed_whose_traceback_is_printed_once(in_process):
    returncode, response, err = as_json(in_process, "-c", "\n1 / 0")
    assert (returncode, response["data"]["status"]) == (1, "failed")
    line = "ZeroDivisionError: division by zero\n"
    assert response["data"]["error"].startswith(line)
    assert err.startswith("Traceback (most recent call last):\n") and err.endswith(line)
    assert (err.count("ZeroDivisionError"), err.count("sidexec")) == (1, 0)


# -- signals


def start_and_wait(cli, code, *options):
    process = cli.start("run", *options, "-c", code)
    assert process.stdout.readline() == b"ready\n"
    return process


def test_an_interrupt_stops_it_gracefully_and_output_goes_on_meanwhile(cli, tmp_path):
    code = f"{UNTIL_FILE}\ntry:\n    print('ready')\n    until_file('never')\nfinally:\n"
    code += "    print('cleaning', end='')\n    until_file('go')\n    print(' up')"
    process = start_and_wait(cli, code, "--grace", "60")
    process.send_signal(signal.SIGINT)
    assert os.read(process.stdout.fileno(), 100) == b"cleaning"
    assert process.poll() is None
    (tmp_path / "go").touch()
    assert finish(process) == (130, " up\n", f"{STOPPING}\nsidexec: stopped\n")


@pytest.mark.slow
def test_signals_count_while_stop_after_is_stopping_it(cli):
    options = ["--json", "--grace", "600", "--stop-after", "1"]
    process = cli.start("run", *options, "-c", STUBBORN)
    assert [process.stderr.readline() for _ in range(2)] == [b"ready\n", b"asked\n"]
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    returncode, out, err = finish(process)
    data = json.loads(out)["data"]
    assert (returncode, err) == (130, f"{STOPPING}\nsidexec: stopped, by force\n")
    assert (data["status"], data["forced"]) == ("stopped", True)  # of the stop that has won


def test_a_sigterm_stops_it_gracefully_and_an_ignored_interrupt_stays_ignored(cli):
    command = 'trap "" INT; exec "$@"'
    process = cli.popen(["sh", "-c", command, "-", *cli.argv("run", "-c", WAITING)])
    assert process.stdout.readline() == b"ready\n"
    with open(f"/proc/{process.pid}/status") as file:
        ignored = next(line for line in file if line.startswith("SigIgn"))
    assert int(ignored.split()[1], 16) >> (signal.SIGINT - 1) & 1
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (143, "cleaned\n", "sidexec: stopped\n")


def test_an_interrupt_while_standard_input_is_read_is_quiet(cli):
    process = cli.start("run", "-", stdin=subprocess.PIPE)
    process.stdin.write(b"\n")
    process.stdin.flush()
    eventually(lambda: unread(process.stdin) == 0)
    eventually(lambda: state_of(process.pid) == "S")
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 130
    assert process.stderr.read() == b""


def test_an_interrupt_before_the_interpreter_is_up_ends_it(cli, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntouch started\nexec sleep 1000\n")
    python.chmod(0o755)
    process = cli.start("run", "--python", python, "-c", HELLO)
    eventually((tmp_path / "started").exists)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", f"{STOPPING}\nsidexec: stopped\n")


def impatient(code):
    """The command, which waits less long for a reader than it does as a rule."""
    command = "import sys; from sidexec import __main__, running; running.LAST_WORDS = 0.2\n"
    return [sys.executable, "-c", f"{command}sys.exit(__main__.main())", "run", "-c", code]


@pytest.mark.slow
@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_two_signals_end_it_even_where_nobody_reads_its_output(cli, tmp_path, stderr):
    code = "import os\nprint('x' * 1_000_000)\nprint(os.getpid(), file=open('pid', 'w'))\n"
    process = cli.popen(impatient(code + WAITING), stderr=stderr)
    eventually((tmp_path / "pid").exists)
    pid = int(eventually((tmp_path / "pid").read_text))
    process.send_signal(signal.SIGINT)
    eventually(lambda: not is_alive(pid))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 130


# Standard error takes a line when it is asked, and is full by the time that it is written.
FULL_ONCE_ASKED = """
import os, select
ask = select.select
def ask_and_fill(*arguments):
    answer = ask(*arguments)
    os.set_blocking(2, False)
    try:
        while True: os.write(2, bytes(4096))
    except BlockingIOError:
        os.set_blocking(2, True)
    return answer
select.select = ask_and_fill
"""


@pytest.mark.slow
def test_an_output_that_fills_up_just_now_does_not_hold_a_signal_up(cli, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FULL_ONCE_ASKED)
    cli.env["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    code = WAITING + "    print('x' * 1_000_000)\n    open('said', 'w').close()\n"
    process = cli.popen(impatient(code), stderr=subprocess.STDOUT)
    eventually(lambda: unread(process.stdout) == len("ready\n"))
    process.send_signal(signal.SIGINT)
    eventually((tmp_path / "said").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 130


def test_two_signals_at_the_same_moment_are_two(cli):
    process = start_and_wait(cli, STUBBORN, "--grace", "600")
    for signum in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(signum)
    returncode, _, err = finish(process)
    # Which of them is the first is for the system to say: two threads may take them.
    assert returncode in (130, 143) and err.endswith("sidexec: stopped, by force\n")


# -- standard input


def test_the_snippet_reads_the_commands_standard_input_and_the_rest_is_left(cli, tmp_path):
    code = "import os; os.write(1, os.read(0, 4).upper())"
    (tmp_path / "read.py").write_text(code)
    commands = '"$@" -c "$CODE"; "$@" read.py; cat'
    cli.env["CODE"] = code
    process = cli.popen(["sh", "-c", commands, "-", *cli.argv("run")], stdin=subprocess.PIPE)
    assert finish(process, b"one\ntwo\nten\n") == (0, "ONE\nTWO\nten\n", "")


# -- blocks


def test_blocks_lists_names_descriptions_and_paths(in_process, tmp_path, monkeypatch):
    library = tmp_path / "blocks"
    for path, source in [
        ("tools/sort", '"""Sorts.\n\nAt length."""\n'),
        ("tools/deep/er", "pass\n"),
    ]:
        (library / path).mkdir(parents=True)
        (library / path / "__main__.py").write_text(source)
    expected = f"er    -       {library}/tools/deep/er\nsort  Sorts.  {library}/tools/sort\n"
    assert in_process("blocks", library) == (0, expected, "")
    monkeypatch.chdir(library)
    assert in_process("blocks") == (0, expected, "")
    returncode, out, err = in_process("blocks", library, "--json")
    response = json.loads(out)
    assert (returncode, err, out.count("\n")) == (0, "", 1)
    assert response["type"] == "listActionBlocksResponse"
    assert [block["name"] for block in response["data"]["actionBlocks"]] == ["er", "sort"]
    assert response["data"]["searchPath"] == str(library)


def test_blocks_says_where_there_are_none(in_process, tmp_path):
    assert in_process("blocks") == (0, "", f"sidexec: no action blocks below {tmp_path}\n")
    told = "python -m sidexec blocks: PATH must be a path, not ''\n"
    assert in_process("blocks", "") == (2, "", told)
    _, out, err = in_process("blocks", "--json")
    assert (json.loads(out)["data"]["count"], err) == (0, "")


# -- the name it goes by, and what it imports


def test_it_imports_nothing_to_ask_for_the_width_of_a_help_that_nobody_reads(cli):
    argv = [sys.executable, "-X", "importtime", *cli.argv("run", "-c", HELLO)[1:]]
    _, _, err = finish(cli.popen(argv))
    imported = {line.split("|")[-1].strip() for line in err.splitlines()}
    assert "argparse" in imported and "shutil" not in imported


def test_a_vendored_copy_goes_by_its_own_name(cli, tmp_path):
    (tmp_path / "_vendor").mkdir()
    (tmp_path / "_vendor" / "runner").symlink_to(os.path.join(ROOT, "sidexec"))
    cli.env["PYTHONDONTWRITEBYTECODE"] = "1"
    argv = [sys.executable, "-m", "_vendor.runner"]
    commands = (["-h"], ["run", "--stop-after", "0", "-c", WAITING], ["--version"])
    usage, stopped, version = map(finish, [cli.popen([*argv, *each]) for each in commands])
    assert usage[1].startswith("usage: python -m _vendor.runner ")
    assert stopped[2] == "runner: stopped\n"
    assert version == (0, f"runner {sidexec.__version__}\n", "")


def test_the_installed_command_is_the_same(cli, tmp_path):
    config = configparser.ConfigParser()
    config.read(os.path.join(ROOT, "setup.cfg"))
    name, _, target = config["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    script = tmp_path / name
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())")
    commands = (["--version"], ["run", "-c", "raise SystemExit(3)"], ["run"])
    started = [cli.popen([sys.executable, str(script), *each]) for each in commands]
    version, exited, bad = map(finish, started)
    assert (version, exited) == ((0, f"sidexec {sidexec.__version__}\n", ""), (3, "", ""))
    assert bad[2].startswith("sidexec run: pass either ")
