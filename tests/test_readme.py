"""The README's examples and commands do what it says they do."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from conftest import ahead, argument

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


FIRST = re.search(r"^    import sidexec\n(?:    .*\n|\n(?=    ))+", README, re.MULTILINE)
EXAMPLES = [textwrap.dedent(FIRST[0]), *blocks("python")]

# What a user adds to an example that does not run by itself.
ADDED = {
    "ThreadingHTTPServer": """
import json, threading, urllib.request
threading.Thread(target=server.serve_forever, daemon=True).start()
url = "http://%s:%s/" % server.server_address
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(url, data=b"return 6 * 7") as answer:
    assert json.load(answer)["data"]["result"] == 42
server.shutdown()
server.server_close()
manager.close()
""",
}


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_there_are_examples():
    assert len(EXAMPLES) >= 10


@pytest.fixture(scope="module")
def examples(request, tmp_path_factory):
    """How each ends; they run ahead of the tests."""
    base = tmp_path_factory.mktemp("examples")

    def run(number):
        code = EXAMPLES[number]
        code += "".join(added for word, added in ADDED.items() if word in code)
        script = Path(tempfile.mkdtemp(dir=base), "example.py")
        script.write_text(code, encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-W", "error", "-X", "dev", str(script)],
            env=environment(),
            cwd=script.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )

    yield from ahead(request, run, lambda item: argument(item, "number"))


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, examples):
    done = examples(number)
    assert done.returncode == 0, done.stderr
    # Of a busy machine asyncio's debug mode says that a step of its loop took long.
    said = re.sub(r"^Executing <.* took .* seconds\n", "", done.stderr, flags=re.MULTILINE)
    assert said == "" or "HTTP/1.1" in said


def test_first_command_runs_the_main_job():
    command = blocks("sh")[0]
    assert len(command.splitlines()) <= 2
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
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
from app._vendor.sidexec import ExecutionManager
with ExecutionManager() as manager:
    id = manager.start_with_code("import sys; return sorted(sys.modules)").data.side_execution_id
    modules = manager.wait(id).raise_for_error().data.result
assert not [name for name in modules if "sidexec" in name or name.startswith("app")], modules
assert "sidexec" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
