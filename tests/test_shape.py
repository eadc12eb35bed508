"""The shape of the package: who imports whom, and how long things are."""

import ast
import pathlib

import pytest

import sidexec

PACKAGE = pathlib.Path(sidexec.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in FILES}


def imported_by(name):
    """The modules of the package that one imports, also where only a type checker looks."""
    package = name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(NAMES[name].read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + (node.module or "").split(".")
            base = [part for part in base if part]
            for alias in node.names:
                for parts in ([*base, alias.name], base, [*base, "__init__"]):
                    if ".".join(parts) in NAMES:
                        found.add(".".join(parts))
                        break
    return found


def test_no_module_imports_itself_by_way_of_others():
    imports = {name: imported_by(name) for name in NAMES}
    assert "engine.execution" in imports["engine.thread"]
    # A module that imports none of those that are left can be taken away, until none is left.
    while imports:
        last = [name for name, others in imports.items() if not others & imports.keys() - {name}]
        assert last, f"import each other: {imports}"
        for name in last:
            del imports[name]


def test_the_child_side_imports_what_both_sides_use_and_nothing_else_of_the_host():
    imports = {name: imported_by(name) for name in NAMES}
    by_child = set().union(*(imports[name] for name in NAMES if name.startswith("child.")))
    assert {name for name in by_child if not name.startswith("child.")} == {"protocol", "procfs"}
    # And the host nothing of it, but where those look that collect imports.
    by_host = {name: others for name, others in imports.items() if not name.startswith("child.")}
    assert [
        name for name, others in by_host.items() if any("child" in each for each in others)
    ] == ["engine.payload"]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_files_lines_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 350
    assert [line for line in lines if len(line) > 100] == []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 50, f"{node.name} has {length} lines"
