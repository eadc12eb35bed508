"""Small programs, run by `python -c` and as a snippet: output, errors and exit code are the same.

With a top-level `return` they are compiled in another way, and with `await` as well they run in
an event loop: they mean the same nevertheless.
"""

import functools
import glob
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from conftest import (
    ENVIRONMENT,
    HOST_ENVIRONMENT,
    IS_FREE_THREADED,
    begin,
    finish,
    has_printed,
    is_alive,
    nothing_left,
    one_in,
)
from small_programs import ALONE, ENDS, FLAGS, NOT_ASYNC, OTHERS, PROGRAMS, VARIABLES, run_plain

import sidexec

# Each in a fork of one interpreter, which takes a fraction of a start, and as `python -c` runs
# it: by the interpreter's own function for that, in a `__main__` that is still as it was.
FORKS = """
import ctypes, json, os, sys, tempfile
results = os.dup(1)
for code in json.load(sys.stdin):
    files = [tempfile.TemporaryFile() for _ in range(2)]
    pid = os.fork()
    if pid == 0:
        os.close(results)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, file in enumerate(files, 1):
            os.dup2(file.fileno(), fd)
        del files, file
        sys.exit(1 if ctypes.pythonapi.PyRun_SimpleStringFlags(code.encode(), None) else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [os.pread(file.fileno(), 10**6, 0).decode() for file in files]
    os.write(results, json.dumps([*texts, code]).encode() + b"\\n")
"""
MODES = {
    "plain": "{}",
    "return": "{}\nif 0:\n    return\n",
    "await": "{}\nif 0:\n    return await nothing\n",
}
SHOWS_LINES = sys.version_info >= (3, 13)


class PlainOnes:
    """What programs do in a plain interpreter, one after the other, as soon as it is known."""

    def __init__(self, names):
        self._names = iter(names)
        self._known = {}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"exec({FORKS!r}, {{}})"],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with self._process.stdin as file:
            json.dump([PROGRAMS[name] for name in names], file)

    def __getitem__(self, name):
        if name in ALONE:
            return plain(PROGRAMS[name], lines=False)
        while name not in self._known:
            line = self._process.stdout.readline()
            self._known[next(self._names)] = outcome(*json.loads(line), lines=False)
        return self._known[name]

    def close(self):
        with self._process:
            self._process.kill()


@pytest.fixture(scope="module")
def plain_ones(request):
    items = [item for item in request.session.items if "plain_ones" in item.fixturenames]
    names = dict.fromkeys(item.callspec.params["name"] for item in items)
    plain_ones = PlainOnes([name for name in names if name not in ALONE])
    yield plain_ones
    plain_ones.close()


@functools.lru_cache(None)
def plain(code, python=sys.executable, *, lines=SHOWS_LINES, **variables):
    done = run_plain("-c", code, python=python, env=variables)
    return outcome(done.stdout, done.stderr, done.returncode, lines=lines)


def outcome(output, errors, exit_code, *, lines=SHOWS_LINES):
    """What a program did, less addresses, and less the source lines that `-c` does not show."""
    errors = errors.replace('"<string>"', '"<snippet>"').replace("<string>:", "<snippet>:")
    output, errors = (re.sub(r"0x\w+", "0x", text) for text in (output, errors))
    if not lines or "Warning: " in errors or "SyntaxError: " in errors:
        errors = re.sub(r"^(?! *File ) .*\n", "", errors, flags=re.MULTILINE)
    return output, errors, exit_code


def snippet(manager, name, mode="plain", *, lines=SHOWS_LINES):
    data = finish(manager, MODES[mode].replace("{}", PROGRAMS.get(name, name)))
    return outcome(data.output, data.error_output, data.exit_code, lines=lines)


NOTES = [name for name in PROGRAMS if "annotations: " in name]
OTHER_ONES = [name for name in PROGRAMS if name not in (*NOTES, *ENDS)]
# What the documentation names is always tried.
PROMISED = ["global", "pickle", "line numbers", "stdin", "environment", "streams"]
IN_A_LOOP = [
    name for name in [*OTHER_ONES, *NOTES] if name not in NOT_ASYNC and name not in PROMISED
]


@pytest.mark.parametrize("name", ENDS)
def test_an_end_is_that_of_a_plain_interpreter(shared, plain_ones, name):
    data = finish(shared, ENDS[name])
    output, errors, exit_code = plain_ones[name]
    ours = outcome(data.output, data.error_output, data.exit_code, lines=False)
    if name == "exit 2**70":
        errors = ""  # of Python 3.12: an OverflowError
    if IS_FREE_THREADED and "__del__" in name:  # whose collector goes by addresses
        output, ours = sorted(output.splitlines()), (sorted(ours[0].splitlines()), *ours[1:])
    if sys.version_info < (3, 11):  # where the traceback module and the interpreter differ
        errors = errors.replace("__main__.", "")
    assert ours == (output, errors, exit_code)
    assert data.status == ("failed" if exit_code else "completed")
    told = errors.splitlines()[-1].removeprefix("__main__.") if errors else ""
    if exit_code < 0 and not told:
        told = f"killed by {signal.Signals(-exit_code).name}"
    elif "Traceback" not in errors:
        told = f"exit code {exit_code}: {told}".removesuffix(": ")
    assert (data.error or "").partition("\n")[0] == (told if exit_code else "")


@pytest.mark.parametrize("name", [*OTHER_ONES, *one_in(15, NOTES)])
def test_a_program_does_what_it_does_in_a_plain_interpreter(shared, plain_ones, name):
    for mode in "plain", "return":
        assert (mode, snippet(shared, name, mode, lines=False)) == (mode, plain_ones[name])


@pytest.mark.parametrize("name", [*PROMISED, *one_in(6, IN_A_LOOP)])
def test_a_program_in_a_loop_does_what_it_does_in_a_plain_interpreter(
    with_asyncio, plain_ones, name
):
    assert snippet(with_asyncio, name, "await", lines=False) == plain_ones[name]


def test_an_ignored_error_has_the_lines_that_a_plain_interpreter_shows(shared):
    name = "exception in __del__"
    assert snippet(shared, name) == plain(PROGRAMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "return"])
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ENDS])
def test_a_program_does_what_it_does_in_an_interpreter_of_its_own(shared, name, mode):
    assert snippet(shared, name, mode) == plain(PROGRAMS[name])


# -- a host of one version, and snippets of another


HOST = """
import json, sys, sidexec
with sidexec.ExecutionManager(python=sys.argv[1], default_timeout=60) as manager:
    for code in json.loads(sys.argv[2]):
        data = manager.run(code).data
        print(json.dumps([data.output, data.error_output, data.exit_code]))
    code = "try:\\n    print('up\\\\n', end='')\\n    while True: pass\\nfinally: print('down')"
    id = manager.start_with_code(code).id
    for chunk in manager.follow(id):
        manager.stop(id)
    data = manager.wait(id).data
    print(json.dumps([data.status, data.output]))
"""
VERSIONS = ["3.10", "3.11", "3.12", "3.13", "3.14", "3.15"]


def interpreter(version):
    """Where pyenv has it, no free-threaded build; None where it has not."""
    found = glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*[!t]/bin/python"))
    return max(found, default=None)


PAIRS = [
    pytest.param(host, other, marks=() if (host, other) == ("3.10", "3.15") else pytest.mark.slow)
    for host in VERSIONS
    for other in VERSIONS
    if host != other
]


@pytest.mark.parametrize("host, other", PAIRS)
def test_a_host_runs_snippets_by_an_interpreter_of_another_version(host, other):
    host, other = interpreter(host), interpreter(other)
    if not host or not other:
        pytest.skip("not installed")
    done = subprocess.run(
        [host, "-c", HOST, other, json.dumps(OTHERS)],
        env={**HOST_ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *ended, stopped = map(json.loads, done.stdout.splitlines())
    variables = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": HOST_ENVIRONMENT["PYTHONPATH"]}
    plain_ones = [plain(code, other, lines=False, **variables) for code in OTHERS]
    assert [outcome(*each, lines=False) for each in ended] == plain_ones
    assert stopped == ["stopped", "up\ndown\n"]


# -- what the environment says to the interpreter


@pytest.fixture
def perf_files():
    """Remove what the interpreters of a test leave for `perf`."""

    def found():
        return {*glob.glob("/tmp/perf-*.map"), *glob.glob("/tmp/jit-*.dump")}

    before = found()
    yield
    for path in found() - before:
        if not is_alive(re.sub(r"\D", "", path)):
            os.unlink(path)


@pytest.mark.usefixtures("perf_files")
@pytest.mark.parametrize("name", one_in(4, VARIABLES))
def test_what_the_environment_says_to_the_interpreter_holds_for_a_snippet(name):
    variables = {name: VARIABLES[name]}
    env = {**ENVIRONMENT, **variables}
    with nothing_left(), sidexec.ExecutionManager(env=env, default_timeout=60) as manager:
        for mode in "plain", "return":
            assert snippet(manager, FLAGS, mode) == plain(FLAGS, **variables)


@pytest.mark.parametrize("option", ["-I", "-E", "-P"])
def test_what_a_script_says_to_the_interpreter_holds_for_a_snippet(tmp_path, option):
    if option == "-P" and sys.version_info < (3, 11):
        pytest.skip("there is no such option yet")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {option} "$@"\n')
    python.chmod(0o755)
    with nothing_left(), sidexec.ExecutionManager(env=ENVIRONMENT, python=python) as manager:
        assert snippet(manager, FLAGS) == plain(FLAGS, str(python))


def test_the_environment_has_imports_timed():
    env = {**ENVIRONMENT, "PYTHONPROFILEIMPORTTIME": "1"}
    with nothing_left(), sidexec.ExecutionManager(env=env, default_timeout=60) as manager:
        last = finish(manager, "import colorsys").error_output.splitlines()[-1]
    assert re.fullmatch(r"import time: +\d+ \| +\d+ \| colorsys", last)


@pytest.mark.skipif(not hasattr(sys, "remote_exec"), reason="new in Python 3.14")
def test_a_debugger_may_attach_to_a_snippet(shared, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import __main__\nprint('attached', __main__.n, flush=True)\n")
    code = "import os, time\nn = 7\nprint(os.getpid(), flush=True)\nwhile True: time.sleep(0.01)"
    id = begin(shared, code, ready="\n")
    sys.remote_exec(int(shared.get_status(id).data.output), str(script))
    has_printed(shared, id, "attached 7")
    assert not shared.stop(id).data.forced


ZIPPED = [
    "import json, os, sys\nprint(json.__file__, os.__file__, sys.path)",
    "import asyncio\nasync def f(): print(asyncio.__file__)\nasyncio.run(f())",
    "import json\njson.loads('{')",
]


@pytest.mark.slow
def test_the_standard_library_may_stand_in_a_zip(tmp_path):
    library = sysconfig.get_path("stdlib")
    name = os.path.basename(library)
    (tmp_path / "lib" / name).mkdir(parents=True)
    (tmp_path / "lib" / name / "lib-dynload").symlink_to(os.path.join(library, "lib-dynload"))
    with zipfile.ZipFile(tmp_path / "lib" / (name.replace(".", "") + ".zip"), "w") as file:
        for place, directories, names in os.walk(library):
            left_out = {"__pycache__", "test", "site-packages", "lib-dynload"}
            directories[:] = set(directories) - left_out
            for each in names:
                path = os.path.join(place, each)
                if each.endswith(".py"):
                    file.write(path, os.path.relpath(path, library))
    env = {**ENVIRONMENT, "PYTHONHOME": str(tmp_path)}
    with nothing_left(), sidexec.ExecutionManager(env=env, default_timeout=60) as manager:
        for code in ZIPPED:
            expected = plain(code, PYTHONHOME=str(tmp_path))
            assert ".zip" in expected[0] + expected[1] or "JSONDecodeError" in expected[1]
            assert snippet(manager, code) == snippet(manager, code, "return") == expected
        code = "import asyncio\ntry:\n    print('ready')\n    await asyncio.sleep(60)\n"
        code += "except asyncio.CancelledError: print('cancelled'); return 7"
        data = manager.stop(begin(manager, code)).data
        assert (data.forced, data.output, data.result) == (False, "ready\ncancelled\n", 7)
