"""The command line in a real terminal: the progress bar, Ctrl-C and Ctrl-Z."""

import json
import subprocess

import pytest
from commands import (
    ENDLESS,
    IN_SHELL,
    LIMIT,
    STOPPING,
    STUBBORN,
    UNTIL_FILE,
    WAITING,
    Terminal,
    cli,  # noqa: F401
    unread,
)
from conftest import eventually, one_in, state_of


@pytest.mark.slow
def test_a_bar_never_tears_the_snippets_lines(cli, tmp_path):
    code = f"""{UNTIL_FILE}
import sys, time
stream = getattr(sys, params["stream"])
for number in range(8):
    report_progress(number)
    until_file("go")
    print("partial", number, end="", file=stream)
    if number % 7 == 0: time.sleep(0.15)
    print(" whole", file=stream)
    if number % 5 == 0: time.sleep(0.12)
"""
    params = ({"stream": "stdout"}, {"stream": "stderr"})
    arguments = [["run", "--params", json.dumps(each), "-c", code] for each in params]
    terminals = [Terminal(cli, *each) for each in arguments]
    for terminal in terminals:
        terminal.until(lambda terminal=terminal: b"%" in terminal.data)
    (tmp_path / "go").touch()
    for terminal in terminals:
        lines = [f"partial {number} whole" for number in range(8)]
        assert terminal.finish() == (0, [*lines, ""])


def test_a_prompt_is_answered_at_the_terminal(cli):
    terminal = Terminal(cli, "run", "-c", "print('hello', input('name? '))")
    terminal.until(lambda: terminal.lines() == ["name?"])
    terminal.press(b"Ada\n")
    assert terminal.finish() == (0, ["name? Ada", "hello Ada", ""])


@pytest.mark.parametrize("columns", one_in(2, [30, 12]))
def test_a_bar_leaves_nothing_behind_when_the_window_is_resized(cli, tmp_path, columns):
    code = f"{UNTIL_FILE}\nprint('one')\nreport_progress(50)\nuntil_file('go')\nprint('two')"
    terminal = Terminal(cli, "run", "-c", code)
    bar = {80: f"[{'#' * 20}{'.' * 20}]  50%", 30: f"[{'#' * 11}{'.' * 11}]  50%", 12: " 50%"}
    for size in (80, columns, 80):
        if size != 80 or len(terminal.lines()) > 1:
            terminal.resize(size)
        terminal.until(lambda: terminal.lines() == ["one", bar[size]])
    (tmp_path / "go").touch()
    assert terminal.finish() == (0, ["one", "two", ""])


def test_a_bar_fits_into_a_narrow_terminal(cli, tmp_path):
    code = (
        f"{UNTIL_FILE}\nfor n in (0, 100):\n    report_progress(n)\n    until_file(f'{{n}} seen')"
    )
    terminal = Terminal(cli, "run", "-c", code, columns=4)
    for percent in ("0%", "100%"):
        terminal.until(lambda percent=percent: percent in terminal.lines()[0])
        (tmp_path / f"{percent[:-1]} seen").touch()
    assert terminal.finish() == (0, [""])


def test_a_bar_is_on_standard_error_while_standard_output_is_a_pipe(cli, tmp_path):
    code = f"{UNTIL_FILE}\nreport_progress(7)\nprint('partial', end='')\nuntil_file('go')\nprint()"
    terminal = Terminal(cli, "run", "-c", code, stdout=subprocess.PIPE)
    terminal.until(lambda: terminal.lines()[-1].endswith("]   7%"))
    (tmp_path / "go").touch()
    assert terminal.finish() == (0, [""])
    assert terminal.process.stdout.read() == b"partial\n"


def test_there_is_no_bar_without_progress_or_terminal(cli):
    terminals = []
    for percent, term, options in [
        (None, "xterm", {}),
        (50, "dumb", {}),
        (50, "xterm", {"stderr": subprocess.PIPE}),
        (50, "xterm", {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}),
    ]:
        code = f"import time\nif {percent}: report_progress({percent})\nprint('one')\n"
        cli.env["TERM"] = term
        terminals.append(Terminal(cli, "run", "-c", code + "time.sleep(0.2)", **options))
    for terminal in terminals:
        assert terminal.finish()[0] == 0
        streams = (terminal.process.stdout, terminal.process.stderr)
        shown = [terminal.data.replace(b"\r", b""), *(each.read() for each in streams if each)]
        assert b"".join(shown) == b"one\n"


@pytest.mark.parametrize(
    "columns, progress", [(80, ""), (18, "90"), pytest.param(80, "90", marks=pytest.mark.slow)]
)
def test_ctrl_c_stops_it_gracefully_and_leaves_no_bar_behind(cli, columns, progress):
    code = (f"report_progress({progress})\n" if progress else "") + WAITING
    terminal = Terminal(cli, "run", "-c", code, columns=columns)
    terminal.is_ready()
    terminal.until(lambda: progress in terminal.lines()[-1])
    terminal.press(b"\x03")
    assert terminal.finish() == (130, ["ready", STOPPING, "cleaned", "sidexec: stopped", ""])


def test_a_second_ctrl_c_stops_it_by_force(cli):
    terminal = Terminal(cli, "run", "--grace", "600", "-c", STUBBORN)
    terminal.is_ready()
    terminal.press(b"\x03")
    terminal.until(lambda: terminal.lines() == ["ready", STOPPING, "asked", ""])
    terminal.press(b"\x03")
    lines = ["ready", STOPPING, "asked", "sidexec: stopped, by force", ""]
    assert terminal.finish() == (130, lines)


def test_ctrl_c_is_answered_while_the_terminal_is_written_to(cli):
    terminal = Terminal(cli, "run", "-c", f"try:\n    {ENDLESS}\nfinally:\n    print('cleaned')")
    terminal.until(lambda: "line" in terminal.lines()[:-1])
    terminal.press(b"\x03")
    returncode, lines = terminal.finish()
    assert returncode == 130 and STOPPING in lines


@pytest.mark.slow
def test_ctrl_c_is_answered_where_nobody_reads_the_output(cli, tmp_path):
    # More than two pipes hold.
    code = f"print('line' * 50_000)\nopen('printed', 'w')\n{ENDLESS}"
    terminal = Terminal(cli, "run", "-c", code, stdout=subprocess.PIPE)
    eventually((tmp_path / "printed").exists)
    terminal.press(b"\x03")
    terminal.until(lambda: STOPPING in terminal.lines())
    terminal.press(b"\x03")
    assert terminal.finish()[0] == 130


def test_ctrl_z_suspends_the_snippet_and_what_it_has_started(cli):
    code = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
report_progress(50)
print(os.getpid(), child.pid)
while True: pass
"""
    terminal = Terminal(cli, "run", "-c", code, starter=IN_SHELL)
    bar = f"[{'#' * 20}{'.' * 20}]  50%"
    # The line may come after the bar.
    terminal.until(lambda: terminal.lines()[-1] == bar and len(terminal.lines()) == 2)
    pids = terminal.lines()[0].split()
    for _ in range(2):
        terminal.press(b"\x1a")
        terminal.until(lambda: terminal.lines()[-2:] == ["suspended", ""])
        eventually(lambda: [state_of(pid) for pid in pids] == ["T", "T"])
        terminal.press(b"fg\n")
        terminal.until(lambda: terminal.lines()[-1] == bar)
        eventually(lambda: [state_of(pid) for pid in pids] == ["R", "S"])
    terminal.press(b"\x03")
    shown = ["suspended", "fg", "suspended", "fg", STOPPING, "sidexec: stopped", ""]
    assert terminal.finish() == (130, [" ".join(pids), *shown])


def test_ctrl_z_suspends_it_while_its_response_waits_for_a_reader(cli):
    code = "return 'x' * 1_000_000"
    terminal = Terminal(cli, "run", "--json", "-c", code, stdout=subprocess.PIPE, starter=IN_SHELL)
    out = terminal.process.stdout
    eventually(lambda: unread(out) >= 32768)
    terminal.press(b"\x1a")
    terminal.until(lambda: "suspended" in terminal.lines()[0])
    terminal.press(b"fg\n")
    assert len(json.loads(out.read())["data"]["result"]) == 1_000_000
    assert terminal.finish()[0] == 0


def test_the_last_line_stands_on_a_line_of_its_own_in_a_terminal_only(cli):
    line = "import os\nprint('partial', end='')"
    die = line + "\nos.kill(os.getpid(), 9)"
    killed = Terminal(cli, "run", "-c", die)
    open_line = Terminal(cli, "run", "-c", line)
    to_a_file = Terminal(cli, "run", "-c", die, stderr=subprocess.PIPE)
    as_json = Terminal(cli, "run", "--json", "-c", line, columns=5000)
    said = "sidexec: killed by SIGKILL"
    assert killed.finish() == (137, ["partial", said, ""])
    assert (open_line.finish()[0], open_line.data) == (0, b"partial")
    assert (to_a_file.finish()[0], to_a_file.process.stderr.read()) == (137, f"{said}\n".encode())
    returncode, (partial, response, rest) = as_json.finish()
    assert (returncode, partial, rest) == (0, "partial", "")
    assert json.loads(response)["data"]["output"] == "partial"


def test_a_terminal_that_goes_away_ends_it(cli):
    terminal = Terminal(cli, "run", "-c", "report_progress(1)\n" + WAITING)
    terminal.until(lambda: "%" in terminal.lines()[-1])
    terminal.close()
    assert terminal.process.wait(LIMIT) != 0
    eventually(lambda: not cli.left())
