"""What can't be, raises at the call; what goes wrong later, is answered."""

import _thread
import concurrent.futures
import contextlib
import enum
import errno
import glob
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import (
    children,
    crossed,
    descriptors,
    eventually,
    finish,
    is_alive,
    nothing_left,
    one_in,
    tree,
)

import sidexec.engine.launcher
from sidexec import ExecutionManager, Limits
from sidexec.engine import payload

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

NAN = float("nan")
HUGE = 10**400
FOREVER = "import time\nprint('ready')\ntime.sleep(600)"

circular = {}
circular["self"] = circular
deep = []
for _ in range(100_000):
    deep = [deep]


class BytesPath:
    def __fspath__(self):
        return b"/tmp"


# -- wrong types and impossible values


def cases_of(argument, *values):
    return [pytest.param(argument, value, id=f"{argument}-{i}") for i, value in enumerate(values)]


TIMEOUTS = ("5", b"5", True, [5], -1, -0.001, NAN, float("-inf"))
COMMON = [
    *cases_of("params", "{}", [1], 5, b"", (1,), object()),
    *cases_of("params", {"a": {1}}, {"a": object()}, {"a": b"x"}, {"a": 1j}, {"a": print}),
    *cases_of("params", {"a": NAN}, {"a": [float("inf")]}, circular, {"a": deep}),
    *cases_of("params", {1: 2}, {None: 2}, {(1, 2): 3}, {"a": {1: 2}}, {"a": [{None: 2}]}),
    *cases_of("timeout", *TIMEOUTS, HUGE),
    *cases_of("thread_id", 5, b"x", ["x"]),
    *cases_of("cwd", 5, b"/tmp", True, "", "a\0b", "\ud800", BytesPath(), ["/tmp"]),
    *cases_of("env", 5, "A=1", ["A=1"], {"A": 1}, {1: "A"}, {b"A": b"1"}, {"A": None}),
    *cases_of("env", {"A=B": "1"}, {"": "1"}, {"A\0": "1"}, {"A": "1\0"}),
    *cases_of("env", {"A": "\ud800"}, {"\ud800": "1"}),
    *cases_of("limits", {"memory": 5}, 5, Limits),
    *cases_of("on_output", 5, "print", [print]),
]


@pytest.mark.parametrize("argument, value", COMMON)
def test_arguments_of_a_start(make_manager, argument, value):
    manager = make_manager()
    for start, what in (
        (manager.start_with_code, "pass"),
        (manager.start_with_action_block, __file__),
    ):
        with pytest.raises((TypeError, ValueError), match=argument):
            start(what, **{argument: value})
    assert manager.list_executions().data.count == 0
    assert tree("self") == []


@pytest.mark.parametrize("value", [None, 5, b"pass", ["pass"], compile("1", "", "exec"), "\ud800"])
def test_code_must_be_a_str(manager, value):
    with pytest.raises((TypeError, ValueError), match="code"):
        manager.start_with_code(value)


@pytest.mark.parametrize("value", [None, 5, b"/tmp", "", "a\0b", "\ud800", BytesPath(), True])
def test_path_of_an_action_block(manager, value):
    with pytest.raises((TypeError, ValueError), match="path"):
        manager.start_with_action_block(value)


@pytest.mark.parametrize("value", ["-x", b"-x", 5, None, {"-x"}, [5], [b"-x"], ["\0"], ["\ud800"]])
def test_args_of_an_action_block(manager, value):
    with pytest.raises((TypeError, ValueError), match="^(each of )?args "):
        manager.start_with_action_block(__file__, args=value)


@pytest.mark.parametrize("value", [None, 5, b"id", ["id"], 1.5])
@pytest.mark.parametrize("method", ["get_status", "wait", "follow", "stop"])
def test_an_id_must_be_a_str(manager, method, value):
    with pytest.raises(TypeError, match="side_execution_id"):
        getattr(manager, method)(value)


def test_the_timeout_of_a_wait(manager, start):
    id = start(FOREVER)
    for value in (*TIMEOUTS, HUGE):
        with pytest.raises((TypeError, ValueError), match="timeout"):
            manager.wait(id, value)


def test_the_options_of_a_stop(manager, start):
    id = start(FOREVER)
    for value in (*TIMEOUTS, HUGE):
        for method in (lambda **grace: manager.stop(id, **grace), manager.stop_all, manager.close):
            with pytest.raises((TypeError, ValueError), match="grace"):
                method(grace=value)
    for value in ("yes", 1, None):
        with pytest.raises((TypeError, ValueError), match="force"):
            manager.stop(id, force=value)
        with pytest.raises((TypeError, ValueError), match="force"):
            manager.stop_all(force=value)
    assert manager.get_status(id).data.status == "running"
    assert manager.start_with_code("pass").success


@pytest.mark.parametrize("value", ["done", "Running", "", "not_found"])
def test_a_status_that_there_is_not(manager, value):
    with pytest.raises(ValueError, match="status"):
        manager.list_executions(value)


@pytest.mark.parametrize("value", [5, b"running", ["running"]])
def test_a_status_must_be_a_str(manager, value):
    with pytest.raises(TypeError, match="status"):
        manager.list_executions(value)


@pytest.mark.parametrize("value", [None, 5, b".", "", "\ud800", BytesPath()])
def test_the_path_to_search(manager, value):
    with pytest.raises((TypeError, ValueError), match="path"):
        manager.list_action_blocks(value)


@pytest.mark.parametrize(
    "argument, value",
    [
        *cases_of("python", 5, b"python", "", "a\0b", "\ud800", BytesPath()),
        *cases_of("cwd", 5, b"/tmp", "", "a\0b", "\ud800"),
        *cases_of("env", 5, "A=1", {"A": 1}, {"A=": "1"}),
        *cases_of("default_timeout", *TIMEOUTS, HUGE),
        *cases_of("grace_period", *TIMEOUTS, HUGE, None),
        *cases_of("max_output", 0, -1, 1.5, "5", None, True),
        *cases_of("max_history", -1, 1.5, "5", None, True),
        *cases_of("preload", "json", 5, None, [5], [b"json"]),
        *cases_of("limits", {"memory": 5}, 5),
    ],
)
def test_arguments_of_a_manager(argument, value):
    with nothing_left():
        with pytest.raises((TypeError, ValueError), match=argument):
            ExecutionManager(**{argument: value})


@pytest.mark.parametrize(
    "argument, value",
    [
        *cases_of("memory", 0, -1, 1.5, "5", True, 2**80),
        *cases_of("cpu", -1, "5", NAN, True, HUGE, 1e30),
        *cases_of("processes", 0, -1, 1.5, "5", True, 2**80),
        *cases_of("open_files", 0, -1, 1.5, "5", True, 2**80),
    ],
)
def test_arguments_of_limits(argument, value):
    with pytest.raises((TypeError, ValueError), match=argument):
        Limits(**{argument: value})


def test_unknown_arguments(manager):
    for call in (
        lambda: manager.start_with_code("pass", nothing=1),
        lambda: manager.stop("id", nothing=1),
        lambda: ExecutionManager(nothing=1),
        lambda: Limits(nothing=1),
        lambda: manager.start_with_code(),
    ):
        with pytest.raises(TypeError):
            call()


# -- unusual values that are none the less possible


def test_odd_params(run):
    class Number(int):
        pass

    class Color(enum.IntEnum):
        RED = 1

    params = {
        "": "", "é": "\U0001f600", "lone": "\ud800", "zero": "\0", "deep": [[[[]]]],
        "tuple": (1, 2), "big": 2**200, "float": 1e-300, "number": Number(5), "color": Color.RED,
    }  # fmt: skip
    assert run("return params", params).result == {
        **params, "tuple": [1, 2], "number": 5, "color": 1
    }  # fmt: skip


def test_infinite_and_huge_times(make_manager):
    manager = make_manager(default_timeout=float("inf"), grace_period=float("inf"))
    id = manager.start_with_code(FOREVER, timeout=1e300).id
    eventually(lambda: manager.get_status(id).data.output)
    assert manager.stop(id).data.status == "stopped"
    id = manager.start_with_code(FOREVER).id
    eventually(lambda: manager.get_status(id).data.output)
    assert manager.stop(id, grace=1e300).data.status == "stopped"
    id = manager.start_with_code("return 1").id
    assert manager.wait(id, float("inf")).data.result == 1
    assert manager.wait(id, 1e300).data.result == 1


def test_code_that_nests_too_deeply_fails_by_itself(run):
    for code in ("(" * 5000, "x = " + "-" * 200_000 + "1"):
        assert run(code).status == "failed"
    assert run("return 1").result == 1


# -- what goes wrong at run time

PREFIX = "#!/bin/sh\n"


def script(directory, text, mode=0o755):
    path = directory / "interpreter"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def leaves_nothing(start):
    """Whether it is answered as a failure, again and again, and leaves nothing behind."""
    first = start()
    assert not first.success
    assert first.data.side_execution_id is None
    assert first.data.status == "failed"
    eventually(lambda: children() == [])
    before = set(descriptors())
    second = start()
    assert (second.success, second.error) == (False, first.error)
    eventually(lambda: children() == [])
    eventually(lambda: set(descriptors()) <= before)
    return first.error


BROKEN = {
    "missing": None,
    "no interpreter": ("just text", 0o755),
    "not executable": (PREFIX, 0o644),
    "empty": ("", 0o755),
    "exits at once": (PREFIX + "exit 0", 0o755),
    "exits with an error": (PREFIX + "echo it is broken >&2; exit 5", 0o755),
    "answers with garbage": (PREFIX + "echo garbage garbage garbage >&0", 0o755),
    "answers too little": (PREFIX + "printf ab >&0", 0o755),
    "kills itself": (PREFIX + "kill -9 $$", 0o755),
    "shebang to nowhere": ("#!/no/such/thing\n", 0o755),
}


@pytest.mark.parametrize("kind", one_in(2, BROKEN))
def test_an_interpreter_that_is_none(make_manager, tmp_path, kind):
    python = str(tmp_path / "interpreter")
    if BROKEN[kind] is not None:
        script(tmp_path, *BROKEN[kind])
    manager = make_manager(python=python)
    error = leaves_nothing(lambda: manager.start_with_code("pass"))
    assert python in error
    if kind == "exits with an error":
        assert "exit code 5" in error and "it is broken" in error
    if kind == "missing":
        assert "no such interpreter" in error and "3.10" in error
    # It is looked at anew each time, so that it can be mended.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(python)
    os.symlink(os.path.realpath(sys.executable), python)
    assert finish(manager, "return 1").result == 1


@pytest.mark.parametrize("python", ["/bin/false", "/bin/true", "/bin/cat", "/", "/etc/passwd"])
def test_a_program_that_is_no_interpreter(make_manager, python):
    manager = make_manager(python=python)
    error = leaves_nothing(lambda: manager.start_with_code("pass"))
    assert repr(python) in error


@pytest.mark.parametrize(
    "command", one_in(3, ["sleep 600\nexit", "exec sleep 600", "sleep 600 &\nexec cat"])
)
def test_an_interpreter_that_never_answers(make_manager, tmp_path, monkeypatch, command):
    monkeypatch.setattr(sidexec.engine.launcher, "BOOT_LIMIT", 0.3)
    pids = tmp_path / "pids"
    # All that the script starts is found by a name of its own in the environment.
    mark = f"SIDEXEC_TEST_MARK={tmp_path}"
    python = script(tmp_path, f"{PREFIX}echo $$ >> {pids}\n{command}\n")
    manager = make_manager(python=python, env={**os.environ, "SIDEXEC_TEST_MARK": str(tmp_path)})

    def marked():
        found = []
        for file in glob.glob("/proc/[0-9]*/environ"):
            with contextlib.suppress(OSError):
                pid = int(file.split("/")[2])
                if mark.encode() in pathlib.Path(file).read_bytes().split(b"\0"):
                    found += [pid] if is_alive(pid) else []
        return found

    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        response = pool.submit(manager.start_with_code, "pass").result(15)
        assert not response.success
        assert python in response.error and "0.3 s" in response.error
        assert int(pids.read_text())
        eventually(lambda: marked() == [], timeout=10)
    finally:
        for pid in marked():
            os.kill(pid, 9)
        pool.shutdown()


OLD = [
    path
    for pattern in ("2.*", "3.[0-9].*")
    for path in sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{pattern}/bin/python")))
]


@pytest.mark.parametrize("python", ["fake", *one_in(3, OLD)])
def test_an_interpreter_that_is_too_old(make_manager, tmp_path, python):
    if python == "fake":
        python = script(
            tmp_path,
            f"#!{os.path.realpath(sys.executable)}\n"
            "import sys\nsys.version_info = (3, 8, 18)\nsys.version = '3.8.18'\n"
            "exec(sys.argv[sys.argv.index('-c') + 1])",
        )
    manager = make_manager(python=python)
    error = leaves_nothing(lambda: manager.start_with_code("pass"))
    assert python in error
    assert "Python 3.10 or newer" in error
    assert "3.8.18" in error or "versions" in python


def test_a_broken_interpreter_does_not_harm_other_managers(make_manager, run):
    assert not make_manager(python="/bin/false").start_with_code("pass").success
    assert run("return 1").result == 1


@pytest.mark.parametrize("kind, of", crossed(2, ["missing", "file", "odd"], ["manager", "start"]))
def test_a_cwd_that_is_none(make_manager, tmp_path, kind, of):
    cwd = str(tmp_path / (os.fsdecode(b"odd \xff") if kind == "odd" else "cwd"))
    if kind == "file":
        pathlib.Path(cwd).touch()
    manager = make_manager(cwd=cwd if of == "manager" else None)
    options = {"cwd": cwd} if of == "start" else {}
    error = leaves_nothing(lambda: manager.start_with_code("pass", **options))
    assert repr(cwd) in error and "cwd" in error
    assert finish(manager, "return 1", cwd=tmp_path).result == 1


def test_a_cwd_that_goes_away(make_manager, tmp_path):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    manager = make_manager(cwd=cwd)
    assert finish(manager, "return 1").result == 1
    cwd.rmdir()
    response = manager.start_with_code("pass")
    assert not response.success and str(cwd) in response.error
    cwd.mkdir()
    assert finish(manager, "return 2").result == 2


@pytest.mark.parametrize("kind", one_in(2, ["missing", "text", "directory", "link", "fifo"]))
def test_an_action_block_that_is_none(manager, tmp_path, kind):
    path = tmp_path / "block.py"
    if kind == "directory":
        path.mkdir()
        (path / "main.py").touch()
    elif kind == "text":
        path = tmp_path / "block.txt"
        path.touch()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("nowhere")
    error = leaves_nothing(lambda: manager.start_with_action_block(path))
    assert str(path) in error
    if kind == "directory":
        assert "__main__.py" in error
    (tmp_path / "good.py").write_text("return 1")
    id = manager.start_with_action_block(tmp_path / "good.py").id
    assert manager.wait(id).data.result == 1


def test_an_action_block_that_can_not_be_read(manager, tmp_path):
    (tmp_path / "block.py").write_bytes(b"x = '\xff'\n")
    started = manager.start_with_action_block(tmp_path / "block.py")
    data = manager.wait(started.data.side_execution_id).data
    assert data.status == "failed"
    assert data.error.startswith("SyntaxError: ")


def test_directories_to_search_that_are_none(manager, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file", os.fsdecode(b"odd \xff")):
        response = manager.list_action_blocks(path)
        assert not response.success
        assert response.data.action_blocks == ()
        assert "no such directory" in response.error


def test_a_closed_manager(make_manager):
    manager = make_manager()
    manager.start_with_code("pass")
    manager.close()
    for start in (
        lambda: manager.start_with_code("pass"),
        lambda: manager.start_with_action_block(__file__),
    ):
        assert "closed" in leaves_nothing(start)
    with pytest.raises(TypeError, match="code"):
        manager.start_with_code(5)


def test_an_environment_that_is_too_big(make_manager):
    manager = make_manager()
    env = {"A": "x" * 10_000_000}
    error = leaves_nothing(lambda: manager.start_with_code("pass", env=env))
    assert os.strerror(errno.E2BIG) in error


# -- the system is out of something


def test_the_system_is_out_of_processes(make_manager, monkeypatch):
    def fail(*args, **options):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    manager = make_manager()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_spawn", fail)
        error = leaves_nothing(lambda: manager.start_with_code("pass"))
    assert os.strerror(errno.EAGAIN) in error
    assert finish(manager, "return 1").result == 1


def test_the_system_is_out_of_threads_but_for_one(make_manager, monkeypatch):
    real = [_thread.start_new_thread]

    def fail(*args):
        if not real:
            raise RuntimeError("can't start new thread")
        return real.pop()(*args)

    manager = make_manager()
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", fail)
        response = manager.start_with_code(FOREVER, on_output=lambda chunk: None)
        assert not response.success
        assert "thread" in response.error
        assert response.data.side_execution_id is None
    assert manager.list_executions("running").data.count == 0
    got = []
    started = manager.start_with_code("print(1)", on_output=got.append).raise_for_error()
    manager.wait(started.data.side_execution_id)
    assert "".join(chunk.text for chunk in got) == "1\n"


# -- what nobody expects


def test_code_of_ours_that_can_not_be_read_is_an_answer(make_manager, monkeypatch):
    def fail(as_source=False):
        raise ImportError("the archive has been replaced")

    manager = make_manager()
    with monkeypatch.context() as patch:
        patch.setattr(payload, "load", fail)
        error = leaves_nothing(lambda: manager.start_with_code("pass"))
    assert "the archive has been replaced" in error
    assert manager.start_with_code("pass").success


def test_code_of_ours_without_its_source_for_another_version_is_an_answer(
    make_manager, monkeypatch
):
    load = payload.load

    def fail(as_source=False):
        if as_source:
            raise OSError("there is no source")
        return load()

    manager = make_manager()
    monkeypatch.setattr(payload, "load", fail)
    monkeypatch.setattr(importlib.util, "MAGIC_NUMBER", b"\0\0\0\0")
    error = leaves_nothing(lambda: manager.start_with_code("pass"))
    assert "there is no source" in error


def test_an_environment_that_changes_while_it_is_copied(make_manager, monkeypatch):
    class Changing(dict):
        fails = 2

        def keys(self):
            if self.fails:
                self.fails -= 1
                raise KeyError("gone")
            return super().keys()

        def __iter__(self):
            return iter(self.keys())

    manager = make_manager()
    monkeypatch.setattr(os, "environ", Changing(os.environ))
    assert finish(manager, "return 1").result == 1


def test_an_interpreter_is_found_from_where_the_manager_was_made(
    make_manager, monkeypatch, tmp_path
):
    (tmp_path / "interpreter").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    manager = make_manager(python="./interpreter")
    monkeypatch.chdir("/")
    assert finish(manager, "return 1").result == 1


def test_a_relative_path_in_a_directory_that_is_gone_is_an_answer(
    make_manager, monkeypatch, tmp_path
):
    gone = tmp_path / "gone"
    gone.mkdir()
    manager = make_manager()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "no such directory" in manager.list_action_blocks().error
    assert "no such directory" in manager.start_with_code("pass", cwd="here").error
    assert "no such action block" in manager.start_with_action_block("block.py").error
    other = make_manager(cwd="here")
    assert "no such directory" in other.start_with_code("pass").error
    assert manager.start_with_code("pass").success


def test_params_whose_own_code_fails_name_the_argument(manager):
    class Failing(dict):
        def items(self):
            return b"\xff".decode()

    with pytest.raises(ValueError, match="params must be JSON"):
        manager.start_with_code("pass", Failing(a=1))


@pytest.mark.parametrize("missing", ["fcntl", "termios"])
def test_where_there_is_no_posix_the_constructor_says_so(missing):
    code = """
import os, sys
sys.modules[sys.argv[1]] = None
os.name = "nt"
import sidexec
try:
    sidexec.ExecutionManager()
except NotImplementedError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, missing], capture_output=True, text=True, cwd=ROOT
    )
    assert "POSIX" in done.stdout, done.stderr
