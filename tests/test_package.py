"""The package as such: what it holds, what importing it does, where it can live."""

import ast
import compileall
import io
import json
import logging
import marshal
import modulefinder
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import eventually, one_in, tree

import sidexec

PACKAGE = pathlib.Path(sidexec.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [
    "ActionBlock",
    "Confinement",
    "DEFAULT",
    "ExecutionManager",
    "ExecutionSummary",
    "GetSideExecutionStatusResponse",
    "Limits",
    "ListActionBlocksData",
    "ListActionBlocksResponse",
    "ListExecutionsData",
    "ListSideExecutionsResponse",
    "OutputChunk",
    "SideExecutionError",
    "StartData",
    "StartSideExecutionResponse",
    "StatusData",
    "StopData",
    "StopSideExecutionResponse",
    "run",
]

# Takes a package's name, runs all there is, and says what came of it.
TOUR = """
import importlib, json, sys

def check(condition):  # an assertion that stands under -O
    if not condition:
        raise AssertionError

def tour(package):
    got = []
    with package.ExecutionManager(grace_period=20) as manager:
        def start(code, **options):
            started = manager.start_with_code(code, {"n": 5}, **options).raise_for_error()
            return started.data.side_execution_id
        completed = start(
            "import asyncio, sys\\nawait asyncio.sleep(0)\\nprint(params['n'], flush=True)\\n"
            "print('err', file=sys.stderr)\\nreturn params['n'] + 1",
            on_output=got.append,
        )
        data = manager.wait(completed).data
        check((data.status, data.result, data.output) == ("completed", 6, "5\\n"))
        check("".join(chunk.text for chunk in got if chunk.stream == "stdout") == "5\\n")
        failed = manager.wait(start("def f(): 1 / 0\\nf()")).data
        check(failed.error.startswith("ZeroDivisionError: "))
        check("def f(): 1 / 0" in failed.error)
        running = start(
            "import subprocess, time\\n"
            "try: child = subprocess.Popen(['sleep', '600']); print('ready'); time.sleep(600)\\n"
            "finally: print('bye')"
        )
        while manager.get_status(running).data.output != "ready\\n":
            pass
        stopped = manager.stop(running).raise_for_error().data
        check((stopped.status, stopped.output) == ("stopped", "ready\\nbye\\n"))
        deaf = start("import signal\\nsignal.signal(15, signal.SIG_IGN)\\nprint('ready')\\nwhile 1: pass")
        for chunk in manager.follow(deaf):
            break
        check(manager.stop(deaf, force=True).data.forced)
        timed_out = manager.wait(start("while True: pass", timeout=0.05)).data
        check(timed_out.stop_reason == "timeout")
        own = manager.wait(start("import os; return dict(os.environ)['A']", env={"A": "a"})).data
        check(own.result == "a")
        check(manager.list_executions().data.count == 6)
        json.loads(manager.list_action_blocks(sys.argv[1]).to_json())
        manager.start_with_code("import time; time.sleep(600)")
    check(manager.list_executions("stopped").data.executions[-1].stop_reason == "closed")
    return "well"
"""


def python(*arguments, code, env=None, cwd="/", **options):
    """Run code in a plain interpreter: its standard output. It must say nothing else."""
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code, str(PACKAGE.parent)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=plain_environment(**(env or {})),
        cwd=cwd,
        text=True,
        timeout=120,
        **options,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def plain_environment(**more):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return {**environment, "PYTHONDONTWRITEBYTECODE": "1", **more}


def from_place(place, name, code="print(tour(package))"):
    """A program that imports the package by `name` from `place`, and takes the tour."""
    return (
        f"import os, sys\nsys.path.insert(0, os.fsdecode({os.fsencode(place)!r}))\n{TOUR}\n"
        f"package = importlib.import_module({name!r})\n{code}"
    )


# -- what it holds


def test_an_import_loads_nothing_until_a_name_is_used():
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nimport sidexec\n"
        "print([each for each in sys.modules if 'sidexec.' in each])\n"
        "print(sidexec.run.__name__, hasattr(sidexec, 'walk'), 'run' in dir(sidexec))"
    )
    assert python(code=code) == "[]\nrun False True\n"


def test_all_is_complete_and_importable():
    assert sorted(sidexec.__all__) == sorted(NAMES)
    namespace = {}
    exec("from sidexec import *", namespace)
    assert set(NAMES) <= set(namespace)
    public = {
        name
        for name, value in vars(sidexec).items()
        if not name.startswith("_") and not isinstance(value, type(os))
    }
    assert public == set(NAMES)


def test_every_public_name_has_a_docstring():
    for name in set(NAMES) - {"DEFAULT"}:
        value = getattr(sidexec, name)
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name
        for attribute, member in vars(value).items():
            if not attribute.startswith("_") and callable(member):
                assert member.__doc__, f"{name}.{attribute}"


def test_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
    for name in ("start_with_code", "stop", "wait", "follow", "close"):
        annotations = getattr(sidexec.ExecutionManager, name).__annotations__
        assert "return" in annotations


def test_the_version_is_that_of_the_metadata():
    assert isinstance(sidexec.__version__, str)
    assert sidexec.__version__.split(".")[0].isdigit()


# -- what it imports


def imports(file):
    """(level, module, names) of all imports in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def test_only_the_standard_library_is_imported():
    wanted = sorted(
        {module for file in FILES for level, module, _ in imports(file) if not level}
        - {"tomllib", "__future__"}  # the one has a way around it where it is missing
    )
    assert "json" in wanted
    code = (
        "import importlib.util, json, sys\n"
        f"print([name for name in {wanted!r} if importlib.util.find_spec(name) is None])"
    )
    assert python("-I", "-S", code=code) == "[]\n"


def test_imports_within_the_package_are_relative():
    for file in FILES:
        depth = len(file.relative_to(PACKAGE).parts)
        for level, module, _ in imports(file):
            assert module.split(".")[0] != "sidexec", file
            assert level <= depth, file


def test_the_child_side_imports_what_both_sides_use_and_nothing_else_of_the_host():
    shared = {"protocol", "procfs"}
    for file in (PACKAGE / "child").glob("*.py"):
        for level, module, names in imports(file):
            if level == 2:
                assert {module} <= shared if module else set(names) <= shared, file
    # And the host nothing of it, but where those look that collect imports.
    found = [
        file.name
        for file in (*PACKAGE.glob("*.py"), *(PACKAGE / "engine").glob("*.py"))
        for level, module, names in imports(file)
        if level and "child" in [module.split(".")[0], *names]
    ]
    assert found == ["payload.py"]


def test_what_collects_imports_finds_every_module(tmp_path):
    (tmp_path / "program.py").write_text("import sidexec.__main__\n")
    finder = modulefinder.ModuleFinder([str(PACKAGE.parent)])  # not the library: it is large
    finder.run_script(str(tmp_path / "program.py"))
    modules = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in FILES}
    modules = {name.removesuffix(".__init__") for name in modules}
    assert {name for name in finder.modules if name.split(".")[0] == "sidexec"} == modules


# -- what importing does


def test_importing_starts_nothing_and_installs_nothing():
    code = """
import atexit, gc, json, os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
from sidexec import run  # once, for what the standard library does when it is imported
for name in [name for name in sys.modules if name.split(".")[0] == "sidexec"]:
    del sys.modules[name]
def state():
    import logging
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "children": open(f"/proc/self/task/{os.getpid()}/children").read(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "wakeup": signal.set_wakeup_fd(-1),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "atexit": atexit._ncallbacks(),
        "hooks": [sys.excepthook, sys.displayhook, threading.excepthook, sys.unraisablehook],
        "logging": [logging.root.handlers[:], logging.root.level],
        "loggers": [logging.getLogger("sidexec").handlers[:], logging.getLogger("sidexec").level],
        "environment": dict(os.environ),
        "cwd": os.getcwd(),
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), gc.callbacks[:]],
        "path": sys.path[:], "meta_path": sys.meta_path[:],
        "recursion": sys.getrecursionlimit(), "switch": sys.getswitchinterval(),
    }
before = state()
import sidexec
assert sidexec.ExecutionManager
after = state()
print({name for name in before if before[name] != after[name]})
print([name for name in sys.modules if name.startswith("sidexec.child")])
"""
    assert python(code=code) == "set()\n[]\n"


def test_importing_takes_no_heavy_modules():
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nbefore = set(sys.modules)\n"
        "from sidexec import ExecutionManager\n"
        "print(sorted({'asyncio', 'multiprocessing', 'concurrent.futures', 'ctypes', 'argparse'}"
        " & set(sys.modules) - before))"
    )
    assert python("-S", code=code) == "[]\n"


# -- where it can live


@pytest.fixture
def vendored(tmp_path):
    """The package as `app._vendor.sidexec`: the directory to put on the path."""
    vendor = tmp_path / "app" / "_vendor"
    vendor.mkdir(parents=True)
    (vendor.parent / "__init__.py").touch()
    (vendor / "__init__.py").touch()
    shutil.copytree(PACKAGE, vendor / "sidexec")
    return tmp_path


def zipped(path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(PACKAGE.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                archive.write(file, prefix + str(file.relative_to(PACKAGE.parent)))
        for parent in pathlib.PurePath(prefix).parents:
            if str(parent) != ".":
                archive.writestr(f"{parent}/__init__.py", "")
        if prefix:
            archive.writestr(f"{prefix}__init__.py", "")
    return path


def test_it_works_from_inside_a_zip(tmp_path):
    path = zipped(tmp_path / "bundle.zip")
    code = "print(tour(package))\nprint('bundle.zip' in package.__file__)"
    assert python(code=from_place(path, "sidexec", code)) == "well\nTrue\n"


@pytest.mark.slow
def test_a_vendored_copy_works_from_inside_a_zip(tmp_path):
    path = zipped(tmp_path / "bundle.zip", "app/_vendor/")
    assert python(code=from_place(path, "app._vendor.sidexec")) == "well\n"


@pytest.fixture
def without_sources(vendored):
    assert compileall.compile_dir(str(vendored), quiet=2, legacy=True)
    for file in vendored.rglob("*.py"):
        file.unlink()
    return vendored


def test_it_works_as_bytecode_without_sources(without_sources):
    assert python(code=from_place(without_sources, "app._vendor.sidexec")) == "well\n"


def test_without_sources_an_interpreter_of_another_version_is_an_error(without_sources, tmp_path):
    other = tmp_path / "python"
    other.write_text(
        f"#!{os.path.realpath(sys.executable)}\n"
        "import sys\nimport _frozen_importlib_external as e\ne.MAGIC_NUMBER = b'else'\n"
        "exec(sys.argv[sys.argv.index('-c') + 1])"
    )
    other.chmod(0o755)
    code = (
        f"with package.ExecutionManager(python={str(other)!r}) as manager:\n"
        "    print(manager.start_with_code('pass').error)"
    )
    error = python(code=from_place(without_sources, "app._vendor.sidexec", code))
    assert "the source of protocol is missing" in error
    assert f"Python {sys.version_info[0]}.{sys.version_info[1]}" in error


# Imports what it is given as bytecode, as a program does that a packager has made.
ARCHIVE = """
import importlib.util, marshal, sys
class Archive:
    def __init__(self, modules):
        self.modules = modules
    def find_spec(self, name, path=None, target=None):
        if name in self.modules:
            is_package = self.modules[name][0]
            return importlib.util.spec_from_loader(name, self, is_package=is_package)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        if module.__name__.endswith(".child"):
            raise AssertionError("the host never imports it")
        module.__file__ = f"/nowhere/{module.__name__}.py"
        if module.__spec__.submodule_search_locations is not None:
            module.__path__ = ["/nowhere/" + module.__name__]
        exec(self.get_code(module.__name__), vars(module))
    def get_code(self, name):
        return self.modules[name][1]
    def get_source(self, name):
        return None
with open(sys.argv[2], "rb") as file:
    sys.meta_path.append(Archive(marshal.load(file)))
"""


def test_it_works_where_a_packager_has_put_it_into_an_archive(tmp_path):
    modules = {}
    for file in FILES:
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        code = compile(file.read_text(), name, "exec", dont_inherit=True)
        modules[name.removesuffix(".__init__")] = (file.name == "__init__.py", code)
    (tmp_path / "archive").write_bytes(marshal.dumps(modules))
    code = f"{ARCHIVE.replace('sys.argv[2]', repr(str(tmp_path / 'archive')))}\n{TOUR}\n"
    code += "import sidexec\nprint(sidexec.__path__, tour(sidexec))"
    assert python("-I", code=code) == "['/nowhere/sidexec'] well\n"


def test_a_vendored_copy_works_alone_and_beside_another(vendored):
    code = """
print(tour(package), 'sidexec' in sys.modules)
import sidexec
assert package is not sidexec
with package.ExecutionManager() as one, sidexec.ExecutionManager() as two:
    first = one.start_with_code("import time; time.sleep(600)").data.side_execution_id
    second = two.start_with_code("import time; time.sleep(600)").data.side_execution_id
    assert two.get_status(first).data.status == "not_found"
    assert one.stop(first).data.status == two.stop(second).data.status == "stopped"
print(tour(sidexec))
"""
    path = f"sys.path.insert(1, {str(PACKAGE.parent)!r})\n"
    assert (
        python(code=from_place(vendored, "app._vendor.sidexec", path + code))
        == "well False\nwell\n"
    )


def test_the_copy_on_disk_may_be_gone_once_it_has_started(vendored):
    code = (
        "import shutil\n"
        "manager = package.ExecutionManager()\n"
        "def run(): return manager.wait(manager.start_with_code('1 / 0').data.side_execution_id)\n"
        "assert run().data.error.startswith('ZeroDivisionError')\n"
        f"shutil.rmtree({str(vendored / 'app')!r})\n"
        "assert run().data.error.startswith('ZeroDivisionError')\n"
        "manager.close()\nprint('well')"
    )
    assert python(code=from_place(vendored, "app._vendor.sidexec", code)) == "well\n"


def test_files_beside_the_host_are_not_taken_for_modules_of_the_library(tmp_path):
    # Python 3.13 and 3.14 import `linecache` themselves, before any code of `-c`.
    names = ("marshal", "json", "selectors", "signal", "ast", "traceback", "os", "asyncio")
    for name in (*names, "linecache"):
        (tmp_path / f"{name}.py").write_text("raise Exception('the wrong one')")
    code = (
        f"{TOUR}\nimport os\nos.chdir({str(tmp_path)!r})\n"
        "sys.path.insert(0, sys.argv[1])\nimport sidexec\n"
        "with sidexec.ExecutionManager() as manager:\n"
        "    started = manager.start_with_code('report_result(1)\\n1 / 0').raise_for_error()\n"
        "    id = started.data.side_execution_id\n"
        "    data = manager.wait(id).data\n"
        "    assert data.error.startswith('ZeroDivisionError'), data\n"
        "    assert data.result == 1, data\n"
        "print('well')"
    )
    assert python("-I", code=code) == "well\n"


@pytest.mark.parametrize(
    "options",
    one_in(
        5,
        [["-bb", "-X", "dev", "-W", "error"], ["-I"], ["-O"], ["-X", "dev"], ["-OO"]],
    ),
    ids=" ".join,
)
def test_it_runs_clean_under_the_options_of_the_interpreter(options):
    assert python(*options, code=from_place(PACKAGE.parent, "sidexec")) == "well\n"


VARIABLES = [
    {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1", "PYTHONUNBUFFERED": "1"},
    {"PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"},
]


@pytest.mark.parametrize("environment", one_in(3, VARIABLES), ids=lambda each: next(iter(each)))
def test_it_runs_clean_under_the_variables_of_the_interpreter(environment):
    assert python(code=from_place(PACKAGE.parent, "sidexec"), env=environment) == "well\n"


# -- what it gives away


def test_nothing_of_a_snippet_is_in_an_argument_list(manager):
    code = (
        "# secret-code\nimport subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print('secret-output')\nreport_result('secret-result')\nprint('ready')\ntime.sleep(600)"
    )
    id = manager.start_with_code(code, {"p": "secret-param"}).data.side_execution_id
    eventually(lambda: "ready" in manager.get_status(id).data.output)
    pids = eventually(lambda: len(tree("self")) >= 4 and tree("self"))
    arguments = []
    for pid in pids:
        arguments.append(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
        arguments.append(pathlib.Path(f"/proc/{pid}/comm").read_bytes())
        assert b"secret" not in pathlib.Path(f"/proc/{pid}/environ").read_bytes()
    assert any(b"import sys" in each for each in arguments)
    assert not any(b"secret" in each for each in arguments)


def test_logs_never_hold_code_params_or_output(make_manager, caplog):
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logger = logging.getLogger("sidexec")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.DEBUG, "sidexec"):
            manager = make_manager(grace_period=0.2)

            def raise_error(chunk):
                raise ValueError("from the callback")

            params = {"p": "secret-param"}
            out = "import sys\nprint('secret-output')\nprint('secret-error', file=sys.stderr)\n"
            ends = [
                "return 'secret-result'",
                "raise ValueError('secret-failure')",
                "x = = 'secret-code'",
                "import os; os._exit(5)",
                "import os; os.kill(os.getpid(), 9)",
                "import signal\nsignal.signal(15, signal.SIG_IGN)\nprint('ready')\nwhile True: pass",
                "import time\ntime.sleep(600)",
            ]
            codes = [f"# secret-code\n{out}{end}" for end in ends]
            options = {"timeout": 0.3, "on_output": raise_error}
            for id in [manager.start_with_code(code, params, **options).id for code in codes]:
                manager.wait(id)
            manager.start_with_action_block("/secret-path/nowhere", params)
            manager.close()
    finally:
        logger.removeHandler(handler)
    assert "from the callback" in log.getvalue()
    assert "asked to stop" in log.getvalue() or "stopped" in log.getvalue()
    for text in (log.getvalue(), caplog.text):
        assert "secret" not in text, text


def test_the_package_logs_under_its_own_name_only(manager, run, caplog):
    with caplog.at_level(logging.DEBUG):
        run("1 / 0")
        manager.close()
    assert {record.name.split(".")[0] for record in caplog.records} <= {"sidexec"}


def test_a_program_that_never_closes_its_manager_ends():
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nimport sidexec\n"
        "manager = sidexec.ExecutionManager()\n"
        "manager.start_with_code('import time; time.sleep(600)')\n"
        "print('end')"
    )
    assert python(code=code) == "end\n"


def test_the_wire_form_of_the_package_is_plain_json(run, manager):
    id = run("return {'a': [1, 2.5, None, True, 'é']}").side_execution_id
    assert json.loads(manager.get_status(id).to_json())["data"]["result"]["a"][4] == "é"


def test_a_vendored_copy_is_no_action_block(vendored):
    (vendored / "block").mkdir()
    (vendored / "block" / "__main__.py").write_text("'A block.'\n")
    code = """
response = {}.ExecutionManager().list_action_blocks(sys.argv[1])
print([block.name for block in response.data.action_blocks])
"""
    code = (
        f"import sys\nsys.path.insert(0, {str(vendored)!r})\nimport app._vendor.sidexec\n"
        + code.format("app._vendor.sidexec").replace("sys.argv[1]", repr(str(vendored)))
    )
    assert python(code=code) == "['block']\n"
