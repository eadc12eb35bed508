"""What can't be, raises at the call; what goes wrong later, is answered."""

import concurrent.futures
import enum
import errno
import functools
import glob
import importlib.util
import os
import pathlib
import sys
import tempfile
import textwrap

import pytest
from commands import marked
from conftest import (
    FOREVER,
    begin,
    children,
    crossed,
    descriptors,
    eventually,
    finish,
    one_in,
    run_as_host,
    tree,
)

import sidexec.engine.launcher
from sidexec import Confinement, ExecutionManager, Limits
from sidexec.engine import payload

NAN = float("nan")
HUGE = 10**400

circular = {}
circular["self"] = circular
deep = []
for _ in range(100_000):
    deep = [deep]


class BytesPath:
    def __fspath__(self):
        return b"/tmp"


async def asynchronous(chunk):
    pass


class Asynchronous:
    async def __call__(self, chunk):
        pass


# -- wrong types and impossible values

TIMES = ("5", b"5", True, [5], -1, -0.001, NAN, float("-inf"), HUGE)
COUNTS = (0, -1, 1.5, "5", True, 2**80)
PATHS = (5, b"/tmp", True, "", "a\0b", "\ud800", BytesPath(), ["/tmp"])
VARIABLES = (
    *(5, "A=1", ["A=1"], {"A": 1}, {1: "A"}, {b"A": b"1"}, {"A": None}, {"A=B": "1"}, {"A=": "1"}),
    *({"": "1"}, {"A\0": "1"}, {"A": "1\0"}, {"A": "\ud800"}, {"\ud800": "1"}),
)
START = {
    "params": (
        *("{}", [1], 5, b"", (1,), object(), {"a": {1}}, {"a": object()}, {"a": b"x"}, {"a": 1j}),
        *({"a": print}, {"a": NAN}, {"a": [float("inf")]}, circular, {"a": deep}, {1: 2}),
        *({None: 2}, {(1, 2): 3}, {"a": {1: 2}}, {"a": [{None: 2}]}),
    ),
    "timeout": TIMES,
    "thread_id": (5, b"x", ["x"]),
    "cwd": PATHS,
    "env": VARIABLES,
    "limits": ({"memory": 5}, 5, Limits),
    "on_output": (5, "print", [print], asynchronous, Asynchronous()),
    "confinement": ({}, []),
}
# For each call its arguments, and values that they can't have.
CALLS = {
    "start_with_code": {
        "code": (None, 5, b"pass", ["pass"], compile("1", "", "exec"), "\ud800"),
        **START,
    },
    "start_with_action_block": {
        "path": (None, *PATHS),
        "args": ("-x", b"-x", 5, None, {"-x"}, [5], [b"-x"], ["\0"], ["\ud800"]),
        **START,
    },
    **{
        method: {"side_execution_id": (None, 5, b"id", ["id"], 1.5)}
        for method in ("get_status", "wait", "follow", "stop")
    },
    "list_executions": {"status": ("done", "Running", "", "not_found", 5, b"running", ["running"])},
    "list_action_blocks": {"path": (None, *PATHS)},
    "manager": {
        "python": PATHS,
        "cwd": PATHS,
        "env": VARIABLES,
        "default_timeout": TIMES,
        "grace_period": (*TIMES, None),
        "max_output": (*COUNTS, None),
        "max_history": (*COUNTS[1:], None),
        "preload": ("json", 5, None, [5], [b"json"]),
        "limits": ({"memory": 5}, 5),
        "confinement": ({}, []),
    },
    "limits": {
        "memory": COUNTS,
        "cpu": (-1, "5", NAN, True, HUGE, 1e30),
        "processes": COUNTS,
        "open_files": COUNTS,
    },
    "confinement": {
        "write": ("x", 3, [3], ["/no/such"]),
        "read": (b"x", [b"/tmp"], ["/no/such"], [""]),
        "network": (1, None),
    },
}
CLASSES = {"manager": ExecutionManager, "limits": Limits, "confinement": Confinement}
NEEDED = {"start_with_code": {"code": "pass"}, "start_with_action_block": {"path": __file__}}


@pytest.mark.parametrize(
    "call, argument, value",
    [
        pytest.param(call, argument, value, id=f"{call}-{argument}-{number}")
        for call, arguments in CALLS.items()
        for argument, values in arguments.items()
        for number, value in enumerate(values)
    ],
)
def test_what_can_not_be_raises_at_the_call(make_manager, call, argument, value):
    manager = make_manager()
    function = CLASSES.get(call) or getattr(manager, call)
    with pytest.raises((TypeError, ValueError), match=f"^(each (key )?(of|in) )?{argument}\\b"):
        function(**{**NEEDED.get(call, {}), argument: value})
    assert manager.list_executions().data.count == 0
    assert tree("self") == []


def test_the_options_of_a_wait_a_stop_and_a_follow(manager, start):
    id = start(FOREVER)
    follows = [functools.partial(manager.follow, each) for each in (id, "unknown")]
    for calls, argument, values in (
        ([lambda **given: manager.wait(id, **given)], "timeout", TIMES),
        ([lambda **given: manager.stop(id, **given), manager.stop_all], "force", ("yes", 1, None)),
        ([lambda **given: manager.stop(id, **given), manager.stop_all], "grace", TIMES),
        ([manager.close], "grace", TIMES),
        (follows, "timeout", TIMES),
        (follows, "lines", ("yes", 1, None)),
    ):
        for call in calls:
            for value in values:
                with pytest.raises((TypeError, ValueError), match=f"^{argument} "):
                    call(**{argument: value})
    assert manager.get_status(id).data.status == "running"
    assert manager.start_with_code("pass").success


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


def test_subclasses_of_str(make_manager, tmp_path):
    class Name(str, enum.Enum):
        JSON = "json"

    manager = make_manager(preload=[Name.JSON])
    (tmp_path / "block.py").write_text("import sys\nreturn ['json' in sys.modules, *sys.argv[1:]]")
    started = manager.start_with_action_block(tmp_path / "block.py", args=[Name.JSON])
    assert manager.wait(started.id).data.result == [True, "json"]


def test_params_that_are_nested_too_deeply(make_manager):
    params = {}
    for _ in range(2500):
        params = {"a": params}
    with pytest.raises(ValueError, match="params must be JSON"):
        make_manager().start_with_code("pass", params)


def test_infinite_and_huge_times(make_manager):
    manager = make_manager(default_timeout=float("inf"), grace_period=float("inf"))
    for timeout, grace in (({"timeout": 1e300}, {}), ({}, {"grace": 1e300})):
        id = begin(manager, FOREVER, **timeout)
        assert manager.stop(id, **grace).data.status == "stopped"
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
    """What a start is refused with, again and again; and that it leaves nothing behind."""
    first = start()
    data = first.data
    assert (first.success, data.side_execution_id, data.status) == (False, None, "failed")
    eventually(lambda: children() == [])
    before = set(descriptors())
    second = start()
    assert (second.success, second.error) == (False, first.error)
    eventually(lambda: children() == [] and set(descriptors()) <= before)
    return first.error


BROKEN = {
    "missing": None,
    "no interpreter": "just text",
    "not executable": PREFIX,
    "empty": "",
    "exits at once": PREFIX + "exit 0",
    "exits with an error": PREFIX + "echo broken >&2; exit 5",
    "answers with garbage": PREFIX + "echo garbage garbage garbage >&0",
    "answers too little": PREFIX + "printf ab >&0",
    "kills itself": PREFIX + "kill -9 $$",
    "shebang to nowhere": "#!/no/such/thing\n",
}
SAID = {
    "missing": "pass the path of a Python 3.10 or newer",
    "exits with an error": "(exit code 5); it must be a Python 3.10 or newer: broken",
}


@pytest.mark.parametrize("kind", [*one_in(2, BROKEN), "/bin/cat", "/"])
def test_an_interpreter_that_is_none(make_manager, tmp_path, kind):
    path = tmp_path / "interpreter"
    if BROKEN.get(kind) is not None:
        script(tmp_path, BROKEN[kind], 0o644 if kind == "not executable" else 0o755)
    python = str(path) if kind in BROKEN else kind
    manager = make_manager(python=python)
    error = leaves_nothing(lambda: manager.start_with_code("pass"))
    assert repr(python) in error and SAID.get(kind, "") in error
    if kind in BROKEN:  # it is looked at anew each time, so that it can be mended
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.realpath(sys.executable))
        assert finish(manager, "return 1").result == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sleep 600\nexit", "exec sleep 600", "sleep 600 &\nexec cat"])
def test_an_interpreter_that_never_answers(make_manager, tmp_path, monkeypatch, command):
    monkeypatch.setattr(sidexec.engine.launcher, "BOOT_LIMIT", 1.0)
    python = script(tmp_path, f"{PREFIX}echo > {tmp_path}/started\n{command}\n")
    mark = f"SIDEXEC_TEST_MARK={tmp_path}"  # of all that the script starts
    manager = make_manager(python=python, env=dict([mark.split("=")], **os.environ))
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        response = pool.submit(manager.start_with_code, "pass").result(15)
        assert not response.success
        assert python in response.error and "1 s" in response.error
        assert os.path.exists(tmp_path / "started")
        eventually(lambda: marked(mark) == [], timeout=10)
    finally:
        for pid in marked(mark):
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


@pytest.mark.parametrize(
    "kind, of", crossed(2, ["missing", "file", "odd", "gone"], ["manager", "start"])
)
def test_a_cwd_that_is_none(make_manager, tmp_path, kind, of):
    cwd = tmp_path / (os.fsdecode(b"odd \xff") if kind == "odd" else "cwd")
    manager = make_manager(cwd=cwd if of == "manager" else None)
    options = {"cwd": cwd} if of == "start" else {}
    if kind == "file":
        cwd.touch()
    elif kind == "gone":
        cwd.mkdir()
        assert finish(manager, "return 1", **options).result == 1
        cwd.rmdir()
    start = lambda: manager.start_with_code("pass", **options)
    error = start().error if kind == "gone" else leaves_nothing(start)
    assert repr(str(cwd)) in error and "cwd" in error
    assert finish(manager, "return 1", cwd=tmp_path).result == 1
    if kind != "file":
        cwd.mkdir()
        assert finish(manager, "return 2", **options).result == 2


# What there is instead of the block, by what makes it.
NO_BLOCKS = {
    "missing": lambda path: None,
    "text": lambda path: path.with_suffix(".txt").touch(),
    "directory": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("nowhere"),
    "fifo": os.mkfifo,
}


@pytest.mark.parametrize("kind", one_in(2, NO_BLOCKS))
def test_an_action_block_that_is_none(manager, tmp_path, kind):
    path = tmp_path / "block.py"
    NO_BLOCKS[kind](path)
    path = path.with_suffix(".txt") if kind == "text" else path
    error = leaves_nothing(lambda: manager.start_with_action_block(path))
    assert str(path) in error
    assert kind != "directory" or "__main__.py" in error
    (tmp_path / "good.py").write_text("return 1")
    id = manager.start_with_action_block(tmp_path / "good.py").id
    assert manager.wait(id).data.result == 1


def test_an_action_block_that_can_not_be_read(manager, tmp_path):
    (tmp_path / "block.py").write_bytes(b"x = '\xff'\n")
    data = manager.wait(manager.start_with_action_block(tmp_path / "block.py").id).data
    assert data.status == "failed"
    assert data.error.startswith("SyntaxError: ")


def test_directories_to_search_that_are_none(manager, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file", os.fsdecode(b"odd \xff")):
        response = manager.list_action_blocks(path)
        assert (response.success, response.data.action_blocks) == (False, ())
        assert "no such directory" in response.error


def test_an_environment_that_is_too_big(manager):
    env = {"A": "x" * 10_000_000}
    error = leaves_nothing(lambda: manager.start_with_code("pass", env=env))
    assert os.strerror(errno.E2BIG) in error


# -- what nobody expects


@pytest.mark.parametrize("of", ["this version", "another"])
def test_code_of_ours_that_can_not_be_read_is_an_answer(make_manager, monkeypatch, of):
    def fail(as_source, load=payload.load):
        if as_source == (of == "another"):
            raise ImportError("the archive has been replaced")
        return load(as_source)

    manager = make_manager()
    with monkeypatch.context() as patch:
        patch.setattr(payload, "load", fail)
        if of == "another":
            patch.setattr(importlib.util, "MAGIC_NUMBER", b"\0\0\0\0")
        error = leaves_nothing(lambda: manager.start_with_code("pass"))
    assert "could not read this package's own code: the archive has been replaced" in error
    assert manager.start_with_code("pass").success


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


@pytest.mark.parametrize("options", [{}, {"input": "x"}, {"confinement": Confinement()}], ids=list)
def test_a_current_directory_that_is_gone_is_the_snippet_s_as_well(
    make_manager, monkeypatch, tmp_path, options
):
    manager = make_manager()
    for name in ("old", "gone"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        here = os.stat(".").st_ino
        if name == "gone":
            (tmp_path / name).rmdir()
        for _ in range(2):  # the second one in a pair that was forked ahead
            code = "import os, sys\nreturn os.stat('.').st_ino, sys.stdin.read()"
            assert finish(manager, code, **options).result == [here, options.get("input", "")]
    assert finish(manager, "open('lost', 'w')", **options).error.startswith("FileNotFoundError")


@pytest.fixture
def forbidden():
    """Make of a name what this process may not read, also where it runs as root."""
    with tempfile.TemporaryDirectory() as place:  # not below that of pytest, which is root's alone
        os.chmod(place, 0o755)

        def make(name):
            path = pathlib.Path(place, name)
            path.touch(0) if name.endswith(".py") else path.mkdir(0)
            return path

        user = os.geteuid()
        try:
            yield make
        finally:
            os.seteuid(user)


def become_another_user():
    if os.geteuid() == 0:
        os.seteuid(1234)


def test_what_may_not_be_read_is_no_start(manager, forbidden):
    block, directory = forbidden("block.py"), forbidden("directory")
    manager.list_action_blocks(block.parent / "missing")  # all is imported that the answers take
    become_another_user()
    start = lambda: manager.start_with_action_block(block)
    assert leaves_nothing(start) == f"can't read {str(block)!r}: check its permissions"
    start = lambda: manager.start_with_code("pass", cwd=directory)
    told = f"can't enter the directory {str(directory)!r}: check its permissions"
    assert leaves_nothing(start) == told
    listed = manager.list_action_blocks(directory)
    assert (listed.success, listed.data.count) == (False, 0)
    assert listed.error == f"can't read {str(directory)!r}: check its permissions"


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
    try: sidexec.ExecutionManager()
    except NotImplementedError as error: print(error)
    """
    assert "POSIX" in run_as_host(textwrap.dedent(code), missing)
