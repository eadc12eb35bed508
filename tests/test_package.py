"""The package as such: what it holds, what importing it does, where it can live."""

import ast
import compileall
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
ROOT = str(PACKAGE.parent)
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}
NAMES = """
    ActionBlock Confinement DEFAULT ExecutionManager ExecutionSummary
    GetSideExecutionStatusResponse Limits ListActionBlocksData ListActionBlocksResponse
    ListExecutionsData ListSideExecutionsResponse OutputChunk SideExecutionError StartData
    StartSideExecutionResponse StatusData StopData StopSideExecutionResponse run
""".split()

IMPORTED = f"import sys\nsys.path.insert(0, {ROOT!r})\nimport sidexec\n"
# Takes a package, runs all there is, and says what came of it.
TOUR = """
import json, sys

def check(condition):  # an assertion that stands under -O
    if not condition:
        raise AssertionError

def tour(package):
    got = []
    with package.ExecutionManager(grace_period=20) as manager:
        data = manager.run(
            "import asyncio, sys\\nawait asyncio.sleep(0)\\nprint(params['n'], flush=True)\\n"
            "print('err', file=sys.stderr)\\nreturn params['n'] + 1",
            {"n": 5},
            on_output=got.append,
        ).data
        check((data.status, data.result, data.output) == ("completed", 6, "5\\n"))
        check("".join(chunk.text for chunk in got if chunk.stream == "stdout") == "5\\n")
        failed = manager.run("def f(): 1 / 0\\nf()").data
        check(failed.error.startswith("ZeroDivisionError: "))
        check("def f(): 1 / 0" in failed.error)
        running = manager.start_with_code(
            "import subprocess, time\\n"
            "try: child = subprocess.Popen(['sleep', '600']); print('ready'); time.sleep(600)\\n"
            "finally: print('bye')"
        ).id
        while manager.get_status(running).data.output != "ready\\n":
            pass
        stopped = manager.stop(running).raise_for_error().data
        check((stopped.status, stopped.output) == ("stopped", "ready\\nbye\\n"))
        deaf = "import signal\\nsignal.signal(15, signal.SIG_IGN)\\nprint('ready')\\nwhile 1: pass"
        deaf = manager.start_with_code(deaf).id
        next(manager.follow(deaf))
        check(manager.stop(deaf, force=True).data.forced)
        check(manager.run("while True: pass", timeout=0.05).data.stop_reason == "timeout")
        check(manager.run("import os; return os.environ['A']", env={"A": "a"}).data.result == "a")
        check(manager.list_executions().data.count == 6)
        json.loads(manager.list_action_blocks(sys.argv[1]).to_json())
        manager.start_with_code("import time; time.sleep(600)")
    check(manager.list_executions("stopped").data.executions[-1].stop_reason == "closed")
    return "well"
"""


def python(*options, code, **env):
    """Run code in a plain interpreter: its standard output. It must say nothing else."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code, ROOT],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env},
        cwd="/",
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def from_place(place, name, code="print(tour(package))"):
    """A program that imports the package by `name` from `place`, and takes the tour."""
    return (
        f"import importlib\n{TOUR}\nsys.path.insert(0, {str(place)!r})\n"
        f"package = importlib.import_module({name!r})\n{code}"
    )


# -- what it holds


def test_an_import_loads_nothing_until_a_name_is_used_and_then_nothing_heavy():
    code = """
print([each for each in sys.modules if "sidexec." in each])
print(sidexec.run.__name__, hasattr(sidexec, "walk"), "run" in dir(sidexec))
heavy = {"asyncio", "multiprocessing", "concurrent.futures", "ctypes", "argparse"}
print(heavy & set(sys.modules))
"""
    assert python("-S", code=IMPORTED + code) == "[]\nrun False True\nset()\n"


def test_all_is_complete_and_importable():
    assert sorted(sidexec.__all__) == sorted(NAMES)
    exec("from sidexec import *", namespace := {})
    assert set(NAMES) <= set(namespace)
    public = {
        name
        for name, value in vars(sidexec).items()
        if not name.startswith("_") and not isinstance(value, type(os))
    }
    assert public == set(NAMES)
    assert (PACKAGE / "py.typed").is_file()


def test_every_public_name_has_a_docstring():
    for name in set(NAMES) - {"DEFAULT"}:
        value = getattr(sidexec, name)
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name
        for attribute, member in vars(value).items():
            if not attribute.startswith("_") and callable(member):
                assert member.__doc__, f"{name}.{attribute}"


# -- what it imports


def test_only_the_standard_library_is_imported_and_itself_relatively():
    wanted = set()
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                wanted.add(node.module)
    # `tomllib` has a way around it where it is missing.
    wanted -= {"tomllib", "__future__"}
    code = "import collections.abc, importlib.util\n"  # the one is no file of its own
    code += f"print([name for name in {sorted(wanted)} if importlib.util.find_spec(name) is None])"
    assert python("-I", "-S", code=code) == "[]\n"


def test_what_collects_imports_finds_every_module(tmp_path):
    (tmp_path / "program.py").write_text("import sidexec.__main__\n")
    finder = modulefinder.ModuleFinder([ROOT])  # not the library: it is large
    finder.run_script(str(tmp_path / "program.py"))
    found = {name for name in finder.modules if name.split(".")[0] == "sidexec"}
    assert found == MODULES.keys()


# -- what importing does


def test_importing_starts_nothing_and_installs_nothing():
    code = """
sidexec.run  # once, for what the standard library does when it is imported
import atexit, gc, os, signal, threading
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
    assert python(code=IMPORTED + code) == "set()\n[]\n"


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


def test_a_vendored_copy_works_from_inside_a_zip(vendored, tmp_path):
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for file in sorted(vendored.rglob("*")):
            if file.suffix in (".py", ".typed"):
                archive.write(file, file.relative_to(vendored))
    code = "print(tour(package), 'bundle.zip' in package.__file__)"
    code = from_place(tmp_path / "bundle.zip", "app._vendor.sidexec", code)
    assert python(code=code) == "well True\n"


def test_as_bytecode_it_works_but_for_an_interpreter_of_another_version(vendored, tmp_path):
    assert compileall.compile_dir(str(vendored), quiet=2, legacy=True)
    for file in vendored.rglob("*.py"):
        file.unlink()
    other = tmp_path / "python"
    other.write_text(
        f"#!{os.path.realpath(sys.executable)}\n"
        "import sys\nimport _frozen_importlib_external as e\ne.MAGIC_NUMBER = b'else'\n"
        "exec(sys.argv[sys.argv.index('-c') + 1])"
    )
    other.chmod(0o755)
    code = f"""
print(tour(package))
with package.ExecutionManager(python={str(other)!r}) as manager:
    print(manager.start_with_code("pass").error)
"""
    said = python(code=from_place(vendored, "app._vendor.sidexec", code))
    assert said.startswith("well\n") and "the source of protocol is missing" in said
    assert f"Python {sys.version_info[0]}.{sys.version_info[1]}" in said


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
with open("ARCHIVE", "rb") as file:
    sys.meta_path.append(Archive(marshal.load(file)))
"""


def test_it_works_where_a_packager_has_put_it_into_an_archive(tmp_path):
    modules = {
        name: (
            file.name == "__init__.py",
            compile(file.read_bytes(), name, "exec", dont_inherit=True),
        )
        for name, file in MODULES.items()
    }
    (tmp_path / "archive").write_bytes(marshal.dumps(modules))
    code = f"{ARCHIVE.replace('ARCHIVE', str(tmp_path / 'archive'))}\n{TOUR}\n"
    code += "import sidexec\nprint(sidexec.__path__, tour(sidexec))"
    assert python("-I", code=code) == "['/nowhere/sidexec'] well\n"


def test_a_vendored_copy_works_alone_and_beside_another_and_may_be_gone_then(vendored):
    code = f"""
print(tour(package), "sidexec" in sys.modules)
{IMPORTED}import shutil
assert package is not sidexec
with package.ExecutionManager() as one, sidexec.ExecutionManager() as two:
    first, second = (each.start_with_code("import time; time.sleep(600)").id for each in (one, two))
    assert two.get_status(first).data.status == "not_found"
    shutil.rmtree({str(vendored / "app")!r})
    print(one.stop(first).data.status, two.stop(second).data.status)
    print(one.run("1 / 0").data.error.splitlines()[0])
"""
    said = python(code=from_place(vendored, "app._vendor.sidexec", code))
    assert said == "well False\nstopped stopped\nZeroDivisionError: division by zero\n"


RUNS = [
    ("-bb -X dev -W error", {}),
    ("-I", {}),
    ("-O", {}),
    ("-X dev", {}),
    ("-OO", {}),
    (
        "",
        {
            "PYTHONIOENCODING": "latin-1",
            "LC_ALL": "C",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONUTF8": "0",
        },
    ),
    ("", {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1", "PYTHONUNBUFFERED": "1"}),
    ("", {"PYTHONOPTIMIZE": "2", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}),
]


@pytest.mark.parametrize("options_and_variables", one_in(5, RUNS), ids=str)
def test_it_runs_clean_whatever_the_interpreter_is_told(options_and_variables):
    options, variables = options_and_variables
    assert python(*options.split(), code=from_place(ROOT, "sidexec"), **variables) == "well\n"


# -- what it gives away


def test_nothing_of_a_snippet_is_in_an_argument_list(start):
    code = (
        "# secret-code\nimport subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print('secret-output')\nreport_result('secret-result')\nprint('ready')\ntime.sleep(600)"
    )
    start(code, {"p": "secret-param"})
    pids = eventually(lambda: len(tree("self")) >= 4 and tree("self"))
    names = ("cmdline", "comm", "environ")
    shown = [pathlib.Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids for name in names]
    assert any(b"import sys" in each for each in shown)
    assert not any(b"secret" in each for each in shown)


def test_logs_are_under_the_packages_name_and_never_hold_code_params_or_output(
    make_manager, caplog
):
    def raise_error(chunk):
        raise ValueError("from the callback")

    out = "# secret-code\nimport sys\nprint('secret-output')\nprint('secret-error', file=sys.stderr)\n"
    ends = [
        "return 'secret-result'",
        "raise ValueError('secret-failure')",
        "x = = 'secret-code'",
        "import os; os._exit(5)",
        "import os; os.kill(os.getpid(), 9)",
        "import signal\nsignal.signal(15, signal.SIG_IGN)\nprint('ready')\nwhile True: pass",
        "import time\ntime.sleep(600)",
    ]
    params = {"p": "secret-param"}
    options = {"timeout": 0.3, "on_output": raise_error}
    with caplog.at_level(logging.DEBUG):
        manager = make_manager(grace_period=0.2)
        for id in [manager.start_with_code(out + end, params, **options).id for end in ends]:
            manager.wait(id)
        manager.start_with_action_block("/secret-path/nowhere", params)
        manager.close()
    assert {record.name.split(".")[0] for record in caplog.records} == {"sidexec"}
    assert "from the callback" in caplog.text and "stop" in caplog.text
    assert "secret" not in caplog.text
