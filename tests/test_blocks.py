"""Finding action blocks, what they say of themselves, and running them."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from conftest import has_printed
from conftest import swept_manager as manager  # noqa: F401
from programs import when_asked

import sidexec


@pytest.fixture
def make_block(tmp_path):
    """Make an action block from the text, or the bytes, of its `__main__.py`: its path."""

    def make_block(name, main=""):
        directory = tmp_path / name
        directory.mkdir(parents=True, exist_ok=True)
        data = main if isinstance(main, bytes) else main.encode()
        (directory / "__main__.py").write_bytes(data)
        return directory

    return make_block


@pytest.fixture
def describe(manager, make_block, tmp_path):
    """What is said of the block that a text makes."""

    def describe(main):
        make_block("block", main)
        (block,) = manager.list_action_blocks(tmp_path).raise_for_error().data.action_blocks
        return block

    return describe


def names(manager, path):
    data = manager.list_action_blocks(path).raise_for_error().data
    assert data.count == len(data.action_blocks)
    return [os.path.relpath(block.path, data.search_path) for block in data.action_blocks]


# -- finding


def test_blocks_are_found_at_any_depth_and_by_path(manager, make_block, tmp_path):
    for name in ("b", "a/deep/down/here", "a", "a/deep", "c d", "é"):
        make_block(name)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "main.py").touch()
    (tmp_path / "single.py").touch()
    assert names(manager, tmp_path) == ["a", "a/deep", "a/deep/down/here", "b", "c d", "é"]
    assert names(manager, tmp_path / "a") == ["deep", "deep/down/here"]


def test_the_search_path_may_be_relative_or_a_path(manager, make_block, tmp_path, monkeypatch):
    block = make_block("here/block")
    monkeypatch.chdir(tmp_path / "here")
    for data in (
        manager.list_action_blocks().data,
        manager.list_action_blocks(pathlib.Path("../here")).data,
        manager.list_action_blocks(str(tmp_path / "here")).data,
    ):
        found = [(each.name, each.path) for each in data.action_blocks]
        assert (data.search_path, found) == (str(tmp_path / "here"), [("block", str(block))])


def test_hidden_directories_are_left_out(manager, make_block, tmp_path):
    for name in (".hidden", ".hidden/below", "seen/.hidden/below", "seen"):
        make_block(name)
    assert names(manager, tmp_path) == ["seen"]
    # What is asked for by name is no secret.
    assert names(manager, tmp_path / ".hidden") == ["below"]


def test_links_are_followed_but_never_in_a_loop(manager, make_block, tmp_path):
    make_block("elsewhere/linked/block")
    make_block("here/block")
    here = tmp_path / "here"
    (here / "link").symlink_to(tmp_path / "elsewhere" / "linked")
    (here / "up").symlink_to("..", target_is_directory=True)
    (here / "itself").symlink_to("itself")
    (here / "block" / "back").symlink_to(here)
    (here / "nowhere").symlink_to("/no/such/directory")
    found = manager.list_action_blocks(here).raise_for_error().data.action_blocks
    real = sorted(os.path.realpath(block.path) for block in found)
    assert real == [str(tmp_path / name / "block") for name in ("elsewhere/linked", "here")]


def test_a_block_is_found_by_its_own_name_though_a_link_beside_or_above_leads_to_it(
    manager, make_block, tmp_path
):
    make_block("versions/v1")
    make_block("versions/v2")
    (tmp_path / "current").symlink_to("versions")
    (tmp_path / "versions" / "latest").symlink_to("v2")
    found = manager.list_action_blocks(tmp_path).data.action_blocks
    assert [block.path for block in found] == [str(tmp_path / "versions" / v) for v in ("v1", "v2")]


def test_a_link_to_a_block_is_one_but_not_to_the_package_itself(manager, make_block, tmp_path):
    make_block("elsewhere/block")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere" / "block")
    (tmp_path / "here" / "package").symlink_to(os.path.dirname(sidexec.__file__))
    assert names(manager, tmp_path / "here") == ["link"]


def test_a_directory_called_main_is_no_block(manager, tmp_path):
    (tmp_path / "block" / "__main__.py").mkdir(parents=True)
    assert names(manager, tmp_path) == []


def test_a_directory_that_is_not_utf8(manager, make_block, tmp_path):
    make_block(os.fsdecode(b"odd \xff"), "print('ran')")
    response = manager.list_action_blocks(tmp_path)
    (block,) = response.data.action_blocks
    assert os.fsencode(block.name) == b"odd \xff"
    assert json.loads(response.to_json())["data"]["actionBlocks"][0]["name"] == block.name
    assert run_block(manager, block.path).output == "ran\n"


# -- what a block says of itself


def test_a_block_that_says_everything(describe):
    block = describe(
        '''
"""Resize images.

    All of them.
"""
# /// script
# requires-python = ">=3.9"
# dependencies = ["pillow>=9", 'requests']
# ///
from __future__ import annotations
__version__ = "1.2.3"
__author__: str = "Somebody"
import no_such_module
open("/no/such/file")
'''
    )
    said = (block.name, block.description, block.version, block.author, block.dependencies)
    described = "Resize images.\n\nAll of them."
    assert said == ("block", described, "1.2.3", "Somebody", ("pillow>=9", "requests"))


def test_nothing_of_a_block_is_run(manager, make_block, tmp_path):
    make_block("block", f"open({str(tmp_path / 'ran')!r}, 'w')\n__version__ = str(print('x'))")
    (block,) = manager.list_action_blocks(tmp_path).data.action_blocks
    assert not (tmp_path / "ran").exists()
    assert block.version is None


@pytest.mark.parametrize(
    "main, version",
    [
        ("x = 1", None),
        ("__version__ = 1.2\n__author__ = ['A']", None),
        ("if True:\n    __version__ = '1'\n    __author__ = 'A'", None),
        ("def f():\n    __version__ = '1'\n    __author__ = 'A'", None),
        ("x.__version__ = '1'\n(y)['__author__'] = 'A'", None),
        ("'a' + 'b'\n__version__: str\n__author__: str", None),
        ("__version__ = '1'\na = __version__ = '2'\n__author__, b = 'A', 'B'", "2"),
    ],
)
def test_the_last_plain_string_of_the_module_counts_and_nothing_else(describe, main, version):
    block = describe(main)
    assert (block.description, block.version, block.author) == (None, version, None)
    assert block.dependencies == ()


@pytest.mark.parametrize(
    "script, expected",
    [
        ("# dependencies = []", ()),
        ("# requires-python = '>=3.9'", ()),
        ("# dependencies = ['a', \"b\"]", ("a", "b")),
        (
            "# dependencies = [\n#   'a[x]>=1',\n#   \"b; python_version < '3.10'\",\n# ]",
            ("a[x]>=1", "b; python_version < '3.10'"),
        ),
        ("# dependencies = [\n#   'a',  # why\n#   'b',  # see [1]\n# ]", ("a", "b")),
        ("#\n# dependencies=['a']\n#", ("a",)),
        ("# dependencies = ['a']  # all\n# [tool.x]\n# y = 1", ("a",)),
        ("# [tool.x]\n# dependencies = ['a']", ()),
        ("# dependencies = 'a'", ()),
        ("# dependencies = [", ()),
        ("# dependencies = ['a', 5]", ("a",)),
        ("# this is = no = toml", ()),
        ("dependencies = ['a']", ()),
        ("# dependencies = ['a']\n# ///\n#\n\n# /// script\n# dependencies = ['b']", ()),
    ],
)
def test_dependencies(describe, script, expected):
    assert describe(f"'''Doc.'''\n# /// script\n{script}\n# ///\n").dependencies == expected


@pytest.mark.parametrize(
    "main, expected",
    [
        ("# /// script\n# dependencies = ['a']\n", ()),
        ("# /// other\n# dependencies = ['a']\n# ///\n", ()),
        ("#/// script\n# dependencies = ['a']\n# ///\n", ()),
        # Broken syntax does not hide them.
        ("# /// script\n# dependencies = ['a']\n# ///\nx = = 1", ("a",)),
    ],
)
def test_the_script_block_of_dependencies(describe, main, expected):
    assert describe(main).dependencies == expected


def test_line_ends_of_windows(describe):
    block = describe(
        b"'''Doc.'''\r\n# /// script\r\n# dependencies = [\r\n#  'a',\r\n# ]\r\n# ///\r\n__version__ = '1'"
    )
    assert (block.description, block.version, block.dependencies) == ("Doc.", "1", ("a",))


@pytest.mark.parametrize(
    "main",
    [
        b"x = = 1",
        b"\0\0\0",
        b"'''Doc.\xff'''",
        b"# -*- coding: no-such-coding -*-\n'''Doc.'''",
        b"# -*- coding: rot13 -*-\n'''Doc.'''",
        b"# -*- coding: undefined -*-\n'''Doc.'''",
        b"# /// script\n# dependencies = " + b"[" * 9_000 + b"]" * 9_000 + b"\n# ///",
        b"# /// script\n# dependencies = [{[]: 1}]\n# ///",
        b"\xef\xbb\xbf# -*- coding: latin-1 -*-\n'''Doc.'''",
        "'''Doc.'''".encode("utf-16"),
        b"(" * 100_000,
        b"x = " + b"-" * 100_000 + b"1",
        b"",
    ],
)
def test_a_block_that_can_not_be_read_is_listed_all_the_same(describe, main):
    block = describe(main)
    assert (block.name, block.description, block.dependencies) == ("block", None, ())


@pytest.mark.parametrize(
    "main",
    [
        "# -*- coding: latin-1 -*-\n'''D\xe9j\xe0 vu.'''".encode("latin-1"),
        "'''D\xe9j\xe0 vu.'''".encode("utf-8-sig"),
        "# vim: set fileencoding=cp1252 :\n'''D\xe9j\xe0 vu.'''".encode("cp1252"),
    ],
)
def test_a_block_is_read_by_its_own_encoding(describe, manager, tmp_path, main):
    assert describe(main + b"\nprint(__doc__)").description == "D\xe9j\xe0 vu."
    data = run_block(manager, tmp_path / "block")
    assert (data.status, data.output) == ("completed", "D\xe9j\xe0 vu.\n")


def test_a_main_that_can_not_be_opened(manager, tmp_path):
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "__main__.py").symlink_to("nowhere")
    (block,) = manager.list_action_blocks(tmp_path).raise_for_error().data.action_blocks
    assert (block.description, block.created_at, block.updated_at) == (None, None, None)


def test_a_main_that_is_no_file_is_not_read(manager, tmp_path):
    (tmp_path / "block").mkdir()
    os.mkfifo(tmp_path / "block" / "__main__.py")
    (block,) = manager.list_action_blocks(tmp_path).data.action_blocks
    assert block.description is None


def test_a_year_that_datetime_does_not_have_is_none(describe, monkeypatch):
    stat = os.stat

    def stat_later(path, *args, **options):
        status = stat(path, *args, **options)
        if str(path).endswith("__main__.py"):
            return os.stat_result((*status[:8], 10**12, status[9]))
        return status

    monkeypatch.setattr(os, "stat", stat_later)
    block = describe("x = 1")
    assert block.created_at is not None and block.updated_at is None


def test_times_of_a_block(describe, manager, tmp_path):
    begin = time.time() - 10
    block = describe("x = 1")
    assert begin < block.created_at.timestamp() <= block.updated_at.timestamp() < begin + 600
    os.utime(os.path.join(block.path, "__main__.py"), (10**9, 10**9))
    (block,) = manager.list_action_blocks(tmp_path).data.action_blocks
    assert block.updated_at.timestamp() == 10**9


# -- running

SURROUNDINGS = """
import json, os, sys
print(json.dumps([sys.path[0], __file__, sys.argv, __name__, os.getcwd()]))
"""


def run_block(manager, path, **options):
    started = manager.start_with_action_block(path, **options).raise_for_error()
    return manager.wait(started.data.side_execution_id).data


def as_plain_python(path, *args):
    return subprocess.check_output([sys.executable, path, *args], text=True)


def test_a_directory_and_a_file_find_what_they_find_under_plain_python(manager, make_block):
    block = make_block("block", SURROUNDINGS)
    args = ("-c", "--", "", "a b", "\u00e9", os.fsdecode(b"\xff"))
    for path in (str(block), str(block / "__main__.py")):
        data = run_block(manager, path, args=args)
        assert data.output == as_plain_python(path, *args)
        first, file, argv, name, _ = json.loads(data.output)
        assert (first, file, name) == (str(block), f"{block}/__main__.py", "__main__")
        assert argv == [path, *args]


def test_a_link_to_a_file_finds_the_modules_beside_the_file(manager, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "beside.py").write_text("value = 5")
    (tmp_path / "real" / "block.py").write_text("import beside\nprint(beside.value)")
    (tmp_path / "link.py").symlink_to("real/block.py")
    assert as_plain_python(tmp_path / "link.py") == "5\n"
    data = run_block(manager, tmp_path / "link.py")
    assert (data.error, data.output) == (None, "5\n")


def test_a_relative_path_is_relative_to_the_host(manager, make_block, tmp_path, monkeypatch):
    block = make_block("here/block", SURROUNDINGS)
    monkeypatch.chdir(tmp_path / "here")
    for options in ({}, {"cwd": "/"}):
        response = manager.start_with_action_block("block", **options)
        assert response.data.action_block == "block"
        data = manager.wait(response.data.side_execution_id).data
        first, file, _, _, cwd = json.loads(data.output)
        assert (first, file) == (str(block), str(block / "__main__.py"))
        assert cwd == options.get("cwd", str(tmp_path / "here"))
    monkeypatch.chdir(block)
    assert json.loads(run_block(manager, "__main__.py").output)[0] == str(block)


def test_its_own_modules_come_first_and_return_and_await_work(manager, make_block):
    block = make_block(
        "block",
        "import asyncio, colorsys, helpers.deep\nawait asyncio.sleep(0)\n"
        "return [colorsys.value, helpers.deep.value, params['x']]",
    )
    (block / "colorsys.py").write_text("value = 'own'")
    (block / "helpers").mkdir()
    (block / "helpers" / "deep.py").write_text("value = 'deep'")
    for path in (block, block / "__main__.py"):
        assert run_block(manager, path, params={"x": 1}).result == ["own", "deep", 1]


def test_a_block_may_be_changed_between_two_runs(manager, make_block):
    block = make_block("block", "import helper\nreturn [1, helper.value]")
    (block / "helper.py").write_text("value = 'one'")
    assert run_block(manager, block).result == [1, "one"]
    make_block("block", "import helper\nreturn [22, helper.value]")
    (block / "helper.py").write_text("value = 'another'")
    assert run_block(manager, block).result == [22, "another"]


def test_the_traceback_of_a_block_shows_its_own_lines(manager, make_block):
    block = make_block("block", "def fail():\n    return 1 / 0  # here\n\nfail()\n")
    data = run_block(manager, block)
    assert data.status == "failed"
    assert data.error.startswith("ZeroDivisionError: division by zero\n")
    assert f'File "{block}/__main__.py", line 2, in fail' in data.error
    assert "return 1 / 0  # here" in data.error
    assert "sidexec" not in data.error.replace(str(block), "")


def test_a_block_is_stopped_like_code(manager, make_block):
    id = manager.start_with_action_block(make_block("block", when_asked("print('bye')"))).id
    has_printed(manager, id, "ready\n")
    data = manager.stop(id).data
    assert (data.status, data.output) == ("stopped", "ready\nbye\n")
