"""The README's examples and commands do what it says they do."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, HOST_ENVIRONMENT, IS_FREE_THREADED, ahead, argument, run_as_host

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


FIRST = re.search(r"^    import sidexec\n(?:    .*\n|\n(?=    ))+", README, re.MULTILINE)
EXAMPLES = [textwrap.dedent(FIRST[0]), *blocks("python")]
# These need a package that no test needs: they are compiled, and that is all.
ENGINES = ("dask.distributed", "celery", "ray")


def engine_of(code):
    found = re.search(r"^(?:from|import)(?: \w+,)* (%s)\b" % "|".join(ENGINES), code, re.MULTILINE)
    return found and found[1]


RUNNABLE = [code for code in EXAMPLES if not engine_of(code)]


def test_there_are_examples():
    assert len(RUNNABLE) >= 5
    assert [engine_of(code) for code in EXAMPLES if engine_of(code)] == list(ENGINES)


@pytest.fixture(scope="module")
def examples(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("examples")

    def run(number):
        script = base / str(number) / "example.py"
        script.parent.mkdir()
        code = RUNNABLE[number]
        if IS_FREE_THREADED:
            code = re.sub(r"memory=\w+, ", "", code)  # as the README says
        script.write_text(code, encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-W", "error", "-X", "dev", str(script)],
            env=HOST_ENVIRONMENT,
            cwd=script.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )

    yield from ahead(request, run, lambda item: argument(item, "number"))


@pytest.mark.parametrize("number", range(len(RUNNABLE)))
def test_example_runs(examples, number):
    done = examples(number)
    # Of a busy machine asyncio's debug mode says that a step of its loop took long.
    said = re.sub(r"^Executing <.* took .* seconds\n", "", done.stderr, flags=re.MULTILINE)
    assert (done.returncode, said) == (0, "")


def test_examples_pass_mypy_strict(tmp_path):
    pytest.importorskip("mypy")
    files = [tmp_path / f"example_{number}.py" for number in range(len(RUNNABLE))]
    for file, code in zip(files, RUNNABLE):
        file.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", *map(str, files)],
        env={**HOST_ENVIRONMENT, "MYPYPATH": str(ROOT)},
        cwd=ROOT,  # where its cache is
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_example_for_an_engine_compiles(engine):
    [code] = [code for code in EXAMPLES if engine_of(code) == engine]
    assert len(code.splitlines()) <= 15
    compile(code, engine, "exec")


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 300
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).is_file()] == []


def test_first_command_runs_the_main_job():
    command = blocks("sh")[0]
    assert len(command.splitlines()) <= 2
    options = {"capture_output": True, "text": True, "timeout": 120, "check": True}
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, **options)
    data = json.loads(done.stdout)["data"]
    assert (data["status"], data["output"]) == ("stopped", "working\ncleaned up\n")
    assert "working\ncleaned up\n" in done.stderr


def test_second_command_makes_an_environment_that_git_ignores_and_tests_in_it():
    lines = blocks("sh")[1].splitlines()
    assert len(lines) <= 2
    words = [word for line in lines for word in shlex.split(line)]
    assert words[:4] == ["python3", "-m", "venv", ".venv"]
    assert "pytest" in words
    assert ".venv*/" in (ROOT / ".gitignore").read_text().splitlines()


def test_vendoring_command_is_all_it_takes(tmp_path):
    command = blocks("sh")[2]
    shutil.copytree(ROOT / "sidexec", tmp_path / "sidexec")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, timeout=60)
    shutil.rmtree(tmp_path / "sidexec")
    code = """
import sys
from app._vendor.sidexec import run
modules = run("import sys; return sorted(sys.modules)").check().data.result
print([name for name in modules if "sidexec" in name or name.startswith("app")])
print("sidexec" in sys.modules)
"""
    assert run_as_host(code, cwd=tmp_path, env=ENVIRONMENT) == "[]\nFalse\n"
