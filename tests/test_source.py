"""How a snippet's source is compiled, and how its lines are shown where it fails."""

import os
import re
import tempfile

import pytest
from conftest import ENVIRONMENT, ahead, argument, completed, crossed, eventually, finish, one_in
from conftest import shared_manager as manager  # noqa: F401
from small_programs import NEW, run_plain

import sidexec


def run_file(code):
    """Run code from a file: what it wrote, as if the file had the name of a snippet."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "snippet.py")
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(code)
        done = run_plain(path)
    return done.stdout.replace(path, "<snippet>"), done.stderr.replace(path, "<snippet>")


@pytest.fixture(scope="module")
def as_file(request, shared):
    programs = {**WRONG, **TRACEBACKS, **PRINTED}

    def code_of(item):
        return programs.get(argument(item, "name")) if "as_file" in item.fixturenames else None

    yield from ahead(request, run_file, code_of)


# -- top-level return and await


RETURNS = {
    "if": "if params == {}:\n    return 7\nreturn 0",
    "else": "if params:\n    return 0\nelse:\n    return 7",
    "for": "for i in range(9):\n    if i == 7:\n        return i\nelse:\n    return 0",
    "while": "i = 0\nwhile True:\n    i += 1\n    if i == 7: x = i; return x",
    "try": "try:\n    return 7\nfinally:\n    x = 1",
    "except": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    return 7",
    "finally": "try:\n    1 / 0\nfinally:\n    return 7",
    "with": "import contextlib\nwith contextlib.nullcontext(7) as x:\n    return x",
    "match": "match [1, 7]:\n    case [1, x] if x:\n        return x\n    case _:\n        return 0",
    "after others": "def f():\n    return 0\nclass C:\n    def g(self): return 0\nreturn 7\n1 / 0",
}
if NEW >= (3, 11):
    RETURNS["except*"] = (
        "try:\n    try:\n        1 / 0\n    except* ZeroDivisionError:\n        pass\nfinally:\n    return 7"
    )


# What the compiler says of it from Python 3.14 on, once, with its line.
RETURN_IN_FINALLY = r"^<snippet>:[4-9]: SyntaxWarning: 'return' in a 'finally' block\n( .*\n)*"


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("name", RETURNS)
def test_return_works_at_the_top_level_with_await_or_without(with_asyncio, name):
    for prefix in "", "import asyncio\nawait asyncio.sleep(0)\n":
        data = completed(finish(with_asyncio, prefix + RETURNS[name]))
        assert data.result == 7
        assert re.sub(RETURN_IN_FINALLY, "", data.error_output, count=1) == ""


AWAITS = {
    "plain": "x = await seven()",
    "while": "x = 0\nwhile x < await seven():\n    x += 1",
    "finally": "try:\n    pass\nfinally:\n    x = await seven()",
    "async with": "async with Manager() as x:\n    pass",
    "async for": "async for x in sevens():\n    pass",
    "comprehension": "x = [y + await seven() async for y in sevens()][0] - 7",
}
ASYNC_TOOLS = """\
import asyncio
async def seven():
    await asyncio.sleep(0)
    return 7
async def sevens():
    yield await seven()
class Manager:
    async def __aenter__(self): return 7
    async def __aexit__(self, *exc_info): await seven()
"""


@pytest.mark.parametrize("suffix", ["", "\nreturn x"])
@pytest.mark.parametrize("name", AWAITS)
def test_await_works_at_the_top_level(with_asyncio, name, suffix):
    code = f"{ASYNC_TOOLS}{AWAITS[name]}\nprint(x, globals()['x']){suffix}"
    data = completed(finish(with_asyncio, code))
    assert (data.output, data.result) == ("7 7\n", 7 if suffix else None)


WRONG = {
    "token": "print('ran')\ndef f(:\n    pass\n",
    "indentation": "if 1:\npass\n",
    "string": "x = 'a\n",
    "assignment": "a = 1\nf() = 2\n",
    "yield": "print('ran')\nyield x\n",
    "yield from": "yield from ()\n",
    "return in a class": "class C:\n    return 1\n",
    "await in a function": "def f():\n    await g()\n",
    "nonlocal": "x = 1\nnonlocal x\n",
    "break": "x = 1\nbreak\n",
    "future import, late": "x = 1\nfrom __future__ import annotations\n",
    "future import, unknown": "from __future__ import nothing\n",
    "star import in a function": "def f():\n    from os import *\n",
    "global after use": "def f():\n    print(x)\n    global x\n",
    "keyword argument twice": "f(a=1, a=2)\n",
    "non-ASCII": "é = 1\nü ü\n",
    "unclosed": "x = [1,\n",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_syntax_error_reads_as_that_of_a_file(run, name, as_file):
    error = essence(as_file(WRONG[name])[1])
    for suffix in "", "return 1\n":
        data = run(WRONG[name] + suffix)
        assert (data.status, data.exit_code, data.output) == ("failed", 1, "")
        assert essence(data.error_output) == error
        assert data.error == f"{data.error_output.splitlines()[-1]}\n\n{data.error_output}"


WARNING = "<snippet>:{}: SyntaxWarning: "


@pytest.mark.parametrize(
    "code, lines",
    [
        ("x = 1 is 1", [1]),
        ("y = 2\nx = 1 is 1", [2]),
        ("return 1 is 1", [1]),
        ("x = 1 is 1\nif x: return 1 is 1\nx is 2\nassert (x, 'text')", [1, 2, 3, 4]),
        ("if 0: return 1 is 1; 2 is 2\ndef f():\n    return 1 is 1", [1, 1, 3]),
        ("x = '\\d'\nreturn 1 is 1\nx = '\\e'", [1, 2, 3] if NEW >= (3, 12) else [2]),
    ],
)
def test_what_the_compiler_warns_of_is_told_once(manager, code, lines):
    for _ in range(2):  # the second one in a snippet that was forked ahead
        data = finish(manager, code)
        told = [int(each) for each in re.findall(WARNING.format(r"(\d+)"), data.error_output)]
        assert (data.status, sorted(told)) == ("completed", lines)
        assert data.error_output.count("\n") == len(lines)  # no source lines, as by `python -c`


@pytest.mark.parametrize("code", ["x = 1 is 1", "return 1 is 1", "return 0\n1 is 1"])
def test_what_the_compiler_warns_of_is_an_error_where_warnings_are(make_manager, code):
    manager = make_manager(env={**ENVIRONMENT, "PYTHONWARNINGS": "error"})
    assert finish(manager, code).error.startswith('SyntaxError: "is" with ')


# -- failures


def essence(text):
    """A traceback less its markers, and the hints that the traceback module has since 3.12."""
    text = re.sub(r"\n[ |]+[~^]+(?=\n|$)", "", text)
    text = re.sub(r"repeated \d+ more", "repeated N more", text)
    if NEW < (3, 11):  # where the traceback module and the interpreter had words of their own
        text = re.sub(
            r"<unprintable .*>", "<exception str() failed>", text.replace("__main__.", "")
        )
    return text if NEW >= (3, 12) else re.sub(r"\. Did you mean: .*", "", text)


TRACEBACKS = {
    "function": "def f(a):\n    return 1 / a\n\n\ndef g():\n    f(\n        0,\n    )\n\ng()\n",
    "import": "import json\njson.loads('{')\n",
    "chained": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    {}['k']\n",
    "cause": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e\n",
    "suppressed": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise KeyError('k') from None\n",
    "recursion": "def f(): f()\nf()\n",
    "exec": "exec('def f(): 1 / 0')\nf()\n",
    "non-ASCII": "ü = 'ß✓'\nraise ValueError(f'größe {ü}')\n",
    "no message": "raise ValueError\n",
    "lines in the message": "import json\nraise json.JSONDecodeError('one\\ntwo\\n\\nthree', '', 0)\n",
    "nested class": "class A:\n    class MyError(Exception):\n        pass\nraise A.MyError('no')\n",
    "bad str": "class E(Exception):\n    def __str__(self): raise ValueError('bad')\nraise E\n",
    "suggestion": "number = 1\nprint(numbr)\n",
    "syntax error in exec": "exec('x = (')\n",
    "reraised": "try:\n    1 / 0\nexcept Exception as e:\n    error = e\nraise error\n",
    "not an exception": "raise 1\n",
    "base exception": "class E(BaseException): pass\nraise E(1)\n",
    "stop iteration": "raise StopIteration(5)\n",
    "generator exit": "raise GeneratorExit\n",
    "line separators": "x = '\x0c'\nx = '\u2028 \x85'\n1 / 0\n",
    "CRLF": "x = 1\r\ny = 2\r1 / 0\r\n",
}
if NEW >= (3, 11):
    TRACEBACKS["notes"] = (
        "class A:\n    class E(Exception): pass\ne = A.E('no')\n"
        "e.add_note('a note\\nof two lines')\nraise e\n"
    )
    TRACEBACKS["group"] = (
        "def f(): 1 / 0\ntry:\n    f()\nexcept Exception as e:\n    z = e\n"
        "raise ExceptionGroup('group', [z, ValueError(2), ExceptionGroup('in', [KeyError(3)])])\n"
    )
    TRACEBACKS["base group"] = "raise BaseExceptionGroup('group', [KeyboardInterrupt(1)])\n"


@pytest.mark.parametrize("name, suffix", crossed(2, TRACEBACKS, ["", "return\n"]))
def test_a_failure_reads_as_that_of_a_file(run, name, suffix, as_file):
    errors = as_file(TRACEBACKS[name])[1]
    data = run(TRACEBACKS[name] + suffix)
    assert (data.status, data.exit_code, data.result) == ("failed", 1, None)
    assert essence(data.error_output) == essence(errors)
    headline, _, rest = data.error.partition("\n\n")
    assert rest == data.error_output
    kinds = re.findall(r"^(?:  [+|] )?([A-Za-z_.]+)(?=:|\n| \()", errors, re.MULTILINE)
    kinds = [each.replace("__main__.", "") for each in kinds if not each.startswith("Traceback")]
    kind = kinds[0] if "group" in name or "lines" in name else kinds[-1]
    assert re.split(r"[: ]", headline)[0] == kind


PRINTED = {
    "traceback": "import sys, traceback\ndef f():\n    traceback.print_stack(sys._getframe(), limit=2)\n"
    "    return 1 / 0\ntry:\n    f()\nexcept ZeroDivisionError:\n    traceback.print_exc()\n",
    "logging": "import logging\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    logging.exception('no')\n",
    "logging lines": "import logging\nlogging.basicConfig(format='%(lineno)d %(funcName)s')\nlogging.warning('x')\n",
    "inspect": "import inspect\ndef f():\n    return 1  # one\nprint(inspect.getsource(f))\n",
    "thread": "import threading\ndef f():\n    1 / 0\nt = threading.Thread(target=f, name='T')\nt.start()\nt.join()\n",
    "warning": "import warnings\n\nfor _ in range(3):\n    warnings.warn('look out')\n",
    "syntax warning": "x = 1\nif x is 1000:\n    pass\n",
    "resource warning": "import warnings\nwarnings.simplefilter('always')\nopen('/dev/null')\nx = 1\n",
}
# The interpreter itself looks for the lines of these in files only.
LINES_LEFT_OUT = {"thread", "syntax warning"}


@pytest.mark.parametrize("name, suffix", crossed(2, PRINTED, ["", "return\n"]))
def test_what_shows_source_lines_shows_those_of_the_snippet(run, name, suffix, as_file):
    data = completed(run(PRINTED[name] + suffix))
    theirs, ours = (
        [re.sub(r"0x\w+", "0x", line) for line in "".join(written).splitlines()]
        for written in (as_file(PRINTED[name]), (data.output, data.error_output))
    )
    if name in LINES_LEFT_OUT:
        theirs, ours = (
            [line for line in lines if line[:2] != "  " or line[:6] == "  File"]
            for lines in (theirs, ours)
        )
    assert ours == theirs


def test_source_lines_are_there_in_a_manager_s_first_execution():
    for name in "function", "traceback":
        code = {**TRACEBACKS, **PRINTED}[name]
        with sidexec.ExecutionManager(env=ENVIRONMENT) as manager:
            assert essence(finish(manager, code).error_output) == essence(run_file(code)[1])


@pytest.mark.parametrize("suffix", ["", "\nreturn"], ids=["alone", "and return"])
def test_a_failure_in_async_code_shows_the_snippet_s_lines_first(run, suffix):
    code = "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    1 / 0\n\nawait f()"
    data = run(code + suffix)
    assert data.status == "failed"
    assert re.sub(r"\n +[~^]+(?=\n)", "", data.error) == (
        "ZeroDivisionError: division by zero\n\nTraceback (most recent call last):\n"
        '  File "<snippet>", line 6, in <module>\n    await f()\n'
        '  File "<snippet>", line 4, in f\n    1 / 0\nZeroDivisionError: division by zero\n'
    )
    assert data.error_output == data.error.partition("\n\n")[2]


BAD_REPORT = "try:\n    report_progress(101)\nexcept ValueError as e:\n    raise"
OWN_FRAMES = {
    "context": f"{BAD_REPORT} KeyError(1)",
    "cause": f"{BAD_REPORT} KeyError(1) from e",
    "async": f"{BAD_REPORT} KeyError(1) from e\nawait x",
    "result": "report_result(object())",
    "returned": "return object()",
    "print": "import os\nos.close(1)\nprint('x')",
    "star import": "try:\n    from no_such_module import *\nexcept ImportError:\n    1 / 0\nreturn",
    "syntax error": "return (",
}
if NEW >= (3, 11):
    OWN_FRAMES["group"] = f"{BAD_REPORT} ExceptionGroup('g', [e])"


@pytest.mark.parametrize("name", OWN_FRAMES)
def test_no_frame_of_the_library_is_shown(run, name):
    data = run(OWN_FRAMES[name])
    assert data.status == "failed"
    files = set(re.findall('File "(.*?)"', data.error + data.error_output))
    assert files == (set() if name == "returned" else {"<snippet>"})


HOOKS = {
    "own": "import sys, traceback\ndef hook(kind, error, trace):\n"
    "    print(kind.__name__, error, traceback.extract_tb(trace)[0][1:3])\nsys.excepthook = hook",
    "failing": "import sys\ndef hook(*error): nothing\nsys.excepthook = hook",
    **{
        f"exits with {code}": f"import sys\ndef hook(*error): sys.exit({code})\nsys.excepthook = hook"
        for code in ("7", "'text'")
    },
    "last": "import sys\nsys.excepthook = lambda *error: print(sys.last_value is error[1])",
    "no standard error": "import sys\nsys.stderr = None",
    "standard error closed": "import os\nos.close(2)",
}


@pytest.mark.parametrize("name", HOOKS)
def test_whatever_becomes_of_the_traceback_the_error_is_told(run, name):
    code = f"{HOOKS[name]}\n1 / 0"
    data, done = run(code), run_plain("-c", code)
    exit_code = done.returncode if "exits" in name else 1  # 120 without a standard error
    assert (data.status, data.exit_code) == ("failed", exit_code)
    assert data.error.startswith("ZeroDivisionError: division by zero\n\nTraceback")
    ours, theirs = (
        [line for line in text.replace("<string>", "<snippet>").splitlines() if line[:4] != "    "]
        for text in (data.error_output, done.stderr)
    )
    assert (data.output, ours) == (done.stdout, theirs)


@pytest.mark.parametrize("line", [1, 99, 0, -5, None])
def test_a_syntax_error_of_the_snippets_own_making(run, line):
    data = run(f"raise SyntaxError('bad', ('<snippet>', {line}, 1, None))")
    assert data.status == "failed"
    assert data.error.startswith("SyntaxError: bad")
    assert "sidexec" not in data.error_output and "IndexError" not in data.error_output


def test_a_syntax_error_of_an_action_blocks_own_making(make_manager, tmp_path):
    (tmp_path / "__main__.py").write_text("raise SyntaxError('bad', (__file__, 2, 1, None))")
    manager = make_manager()
    finish(manager, "pass")
    (launcher,) = manager._engine._launchers
    eventually(lambda: launcher.requests._spares)  # a snippet that rehearses
    data = manager.wait(manager.start_with_action_block(tmp_path).id).data
    assert data.error.endswith('__main__.py", line 2\nSyntaxError: bad\n')


def test_lone_surrogates_are_written_as_by_a_plain_interpreter(run):
    code = "import sys\nsys.stderr.write('\\udc80\\n')\nprint('\\udc80')\nraise ValueError('a\\udc80b')"
    data, done = run(code), run_plain("-c", code, errors="replace")
    assert (data.output, data.exit_code) == (done.stdout, done.returncode)
    assert data.error.startswith("ValueError: a")
    ends = [
        text.splitlines()[:: len(text.splitlines()) - 1]
        for text in (data.error_output, done.stderr)
    ]
    assert ends[0] == ends[1]


# -- the stack


WALK = "f = sys._getframe()\nwhile f:\n    print(f.f_code.co_filename)\n    f = f.f_back\n"
STACKS = {
    "frames": f"import sys\n{WALK}",
    "inspect": "import inspect\ndef f():\n    for each in inspect.stack(): print(each.filename)\nf()",
    "print_stack": "import sys, traceback\ntraceback.print_stack(file=sys.stdout)",
    "asyncio": "import asyncio, inspect\nasync def main():\n    for each in inspect.stack(): print(each.filename)\n",
}


def entries(text):
    """The lines that name a file, the snippet's own apart."""
    lines = [line for line in text.splitlines() if "/" in line or "<" in line]
    return [line for line in lines if "<snippet>" not in line]


@pytest.mark.parametrize(
    "suffix", one_in(2, ["", "\nif 0:\n    return", "\nif 0:\n    return await x"])
)
@pytest.mark.parametrize("name", STACKS)
def test_at_most_one_frame_of_ours_is_below_the_snippet(with_asyncio, name, suffix):
    code = STACKS[name] + ("await main()" if name == "asyncio" else "")
    shown = entries(completed(finish(with_asyncio, code + suffix)).output)
    assert len([line for line in shown if "/asyncio/" not in line]) == 1, shown
    assert not [line for line in shown if "sidexec" in line or "<side>" in line]
    if name == "asyncio":
        plain = run_plain("-c", STACKS[name] + "asyncio.run(main())").stdout
        assert len(shown) <= len([line for line in entries(plain) if "/asyncio/" in line]) + 1


@pytest.mark.parametrize("suffix", ["", "\nreturn"])
def test_the_recursion_limit_is_that_of_a_plain_interpreter_but_for_our_frame(run, suffix):
    code = (
        "def f(n):\n    global deepest\n    deepest = n\n    f(n + 1)\n"
        "try:\n    f(1)\nexcept RecursionError:\n    pass\nprint(deepest)"
    )
    # Until 3.11, the call of each built-in function counted as well.
    ours = 1 if NEW >= (3, 12) else 3
    assert int(completed(run(code + suffix)).output) >= int(run_plain("-c", code).stdout) - ours


# -- odd source


ODD = {
    "nothing": ("", ""),
    "blank lines": ("   \n\t\n", ""),
    "a comment": ("# only a comment", ""),
    "indented": ("    x = 1\n    if x:\n        print(x)\n", "1\n"),
    "indented by tabs": ("\tx = 1\n\tif x:\n\t\tprint(x)\n", "1\n"),
    "indented after blank lines": ("\n\n    x = 1\n\n    print(x)\n    return x\n    ", "1\n"),
    "indented later": ("x = '''\n    two\n  one'''\nprint(repr(x))", "'\\n    two\\n  one'\n"),
    "byte order mark": ("\ufeffx = 1\nprint(x)", "1\n"),
    "byte order mark, indented": ("\ufeff    x = 1\n    print(x)\n    return", "1\n"),
    "CRLF": ("x = 1\r\nif x:\r\n    print('''a\r\nb''')\r\n", "a\nb\n"),
    "CR, and return": ("x = 1\rif x:\r    print('''a\rb''')\rreturn", "a\nb\n"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_source_is_understood(run, name):
    code, output = ODD[name]
    data = completed(run(code))
    assert (data.output, data.error_output, data.exit_code) == (output, "", 0)


def test_line_numbers_count_from_the_code_as_given(run):
    data = run("\n\n    x = 1\n    1 / 0\n")
    assert '  File "<snippet>", line 4, in <module>\n    1 / 0\n' in data.error


def test_what_no_source_may_hold_fails_it(run):
    assert run("x = 1\n\ufeff").error.startswith("SyntaxError: invalid non-printable character")
    data = run("print(1)\nx = 'a\0b'")
    assert (data.status, data.output) == ("failed", "")
    assert "null bytes" in data.error.splitlines()[0]


DEEP = {
    "calls": "class C:\n    def f(self): return self\nC()" + ".f()" * 600,
    "elif": "x = 5\nif x == 0: pass\n" + "".join(f"elif x == -{n}: pass\n" for n in range(1100)),
    "sum": "x = " + "+".join(["1"] * 1200),
}


@pytest.mark.parametrize("name", DEEP)
def test_source_may_be_as_deep_with_a_return_as_without(run, name):
    limit = "import sys\nprint(sys.getrecursionlimit())\n"
    for suffix in "", "return 7":
        data = completed(run(f"{DEEP[name]}\n{limit}{suffix}"))
        assert (data.output, data.result) == ("1000\n", 7 if suffix else None)


@pytest.mark.parametrize("suffix", ["", "\nreturn"])
def test_source_that_is_too_deep_fails_and_does_not_crash(run, suffix):
    data = run("x = " + "-" * 100_000 + "1" + suffix)
    assert (data.status, data.exit_code, data.output) == ("failed", 1, "")


def test_large_code_and_params_take_no_longer_than_their_size_says(run):
    code = f"x = '{'y' * 5_000_000}'\nreturn [len(x), len(params['text'])]"
    assert run(code, {"text": "x" * 20_000_000}).result == [5_000_000, 20_000_000]
    code = "\n".join(f"x{n} = {n}" for n in range(5_000)) + "\nreturn x4999"
    assert completed(run(code)).result == 4_999
