"""Finding action blocks, and reading their metadata.

Reads files and parses them; never runs or imports any of their code.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import tokenize
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from . import checks
from .responses import ActionBlock, ListActionBlocksData, ListActionBlocksResponse

MAIN = "__main__.py"
_OWN = os.path.realpath(os.path.dirname(__file__))  # not one of the user's action blocks

# As PEP 723 has it.
_SCRIPT_BLOCK = re.compile(r"(?m)^# /// script\s*$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
_DEPENDENCIES = re.compile(r"(?m)^dependencies\s*=\s*\[")
_TABLE = re.compile(r"(?m)^\[")


def why_not_runnable(path: str) -> str | None:
    """Why `path` is not an action block, as an error message; None if it is one."""
    main = path
    if os.path.isdir(path):
        main = os.path.join(path, MAIN)
        if not os.path.isfile(main):
            return f"no such action block: {path!r} is a directory without a {MAIN}"
    elif not os.path.isfile(path):
        return f"no such action block: {path!r}; pass a .py file or a directory with a {MAIN}"
    elif not path.endswith(".py"):
        return f"no such action block: {path!r} is not a .py file"
    return None if checks.is_allowed(main, os.R_OK) else _unreadable(main)


def _unreadable(path: str) -> str:
    return f"can't read {path!r}: check its permissions"


def find(path: str) -> ListActionBlocksResponse:
    """The action blocks below `path`, by path."""
    root = checks.absolute(path)
    error = None
    if not checks.is_directory(root):
        error = f"no such directory: {root!r}; pass one that exists"
    elif not checks.is_allowed(root, os.R_OK | os.X_OK):
        error = _unreadable(root)
    if error is not None:
        return ListActionBlocksResponse(ListActionBlocksData((), 0, root), False, None, error)
    found = tuple(sorted(_walk(root), key=lambda block: block.path))
    return ListActionBlocksResponse(ListActionBlocksData(found, len(found), root))


def _walk(root: str) -> Iterator[ActionBlock]:
    """Each directory once, by its own path rather than by a link that leads to it."""
    seen: set[str] = set()
    starts = [root]
    for start in starts:  # to which links are added: they come last
        for directory, names, files in os.walk(start):
            real = os.path.realpath(directory)
            if real in seen:  # a link may lead back
                names.clear()
                continue
            seen.add(real)
            if directory != root and MAIN in files and real != _OWN:
                yield _describe(directory)
            names[:] = [name for name in sorted(names) if not name.startswith(".")]
            starts += filter(os.path.islink, (os.path.join(directory, name) for name in names))


def _describe(directory: str) -> ActionBlock:
    file = os.path.join(directory, MAIN)
    source = _read(file)
    said = _constants(source)
    created_at = updated_at = None
    # The last two are raised for a year that `datetime` does not have.
    with contextlib.suppress(OSError, ValueError, OverflowError):
        status = os.stat(file)
        # When it was created if the system tells, else when it last changed.
        birth = getattr(status, "st_birthtime", min(status.st_ctime, status.st_mtime))
        created_at = datetime.fromtimestamp(birth, timezone.utc)
        updated_at = datetime.fromtimestamp(status.st_mtime, timezone.utc)
    return ActionBlock(
        name=os.path.basename(directory),
        path=directory,
        description=said.get("__doc__"),
        version=said.get("__version__"),
        author=said.get("__author__"),
        dependencies=_dependencies(source),
        created_at=created_at,
        updated_at=updated_at,
    )


def _read(file: str) -> str:
    if not os.path.isfile(file):
        return ""  # it may be a FIFO, which nobody writes to
    try:
        with tokenize.open(file) as stream:  # by its own encoding, as Python reads it
            return stream.read()
    except (OSError, SyntaxError, ValueError, LookupError):  # the last: no encoding of text
        return ""


def _constants(source: str) -> dict[str, str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    said: dict[str, str] = {}
    docstring = ast.get_docstring(tree)
    if docstring:
        said["__doc__"] = docstring
    for node in tree.body:
        value: Any = getattr(node, "value", None)
        targets: list[Any] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            said.update({each.id: value.value for each in targets if isinstance(each, ast.Name)})
    return said


def _dependencies(source: str) -> tuple[str, ...]:
    matches = list(_SCRIPT_BLOCK.finditer(source))
    if len(matches) != 1:
        return ()
    lines = matches[0].group("content").splitlines()
    content = "\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines)
    try:
        listed = _load_dependencies(content)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return ()
    if not isinstance(listed, list):
        return ()
    return tuple(each for each in listed if isinstance(each, str))


def _load_dependencies(content: str) -> object:
    try:
        import tomllib
    except ImportError:  # before Python 3.11: an array of strings is a list in Python, too
        rest = "".join(_DEPENDENCIES.split(_TABLE.split(content, 1)[0], 1)[1:])
        for end in re.finditer(r"\]", rest):
            with contextlib.suppress(SyntaxError):
                return ast.literal_eval("[" + rest[: end.end()])
        return []
    return tomllib.loads(content).get("dependencies", [])
