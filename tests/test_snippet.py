"""What a snippet is: a program that runs as it would in a plain interpreter.

Most tests run the same code twice, here and in an interpreter of its own.
"""

import functools
import glob
import os
import re
import subprocess
import sys
import tempfile
import textwrap

import pytest
from conftest import (
    ENVIRONMENT,
    IS_FREE_THREADED,
    ahead,
    argument,
    crossed,
    eventually,
    finish,
    one_in,
)
from conftest import shared_manager as manager  # noqa: F401

import sidexec

NEW = sys.version_info
OURS = ("params", "report_progress", "report_result")


def run_plain(code, *arguments, **options):
    """Run code by an interpreter of its own."""
    return subprocess.run(
        [sys.executable, *(arguments or ["-c", code])],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        **options,
    )


def run_file(code, name="<snippet>"):
    """Run code from a file: exit code, and standard error as if the file had that name."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "snippet.py")
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(code)
        done = run_plain(None, path)
    return done.returncode, done.stdout.replace(path, name), done.stderr.replace(path, name)


@pytest.fixture(scope="module")
def plain(request, shared):
    programs = {
        "test_code_means_what_it_means_in_a_plain_interpreter": SAME,
        "test_the_exit_is_that_of_a_plain_interpreter": EXITS,
        "test_the_end_is_that_of_a_plain_interpreter": ENDS,
    }
    yield from ahead(request, run_plain, lambda item: named(item, programs))


@pytest.fixture(scope="module")
def plain_file(request, shared):
    programs = {
        "test_a_failure_reads_as_that_of_a_file": TRACEBACKS,
        "test_what_shows_source_lines_shows_those_of_the_snippet": PRINTED,
        "test_a_syntax_error_reads_as_that_of_a_file": SYNTAX_ERRORS,
    }
    yield from ahead(request, run_file, lambda item: named(item, programs))


def named(item, programs):
    return programs.get(item.originalname, {}).get(argument(item, "name"))


@pytest.fixture(scope="module")
def with_asyncio(shared):
    """Runs code where asyncio is there already: its import takes longer than all else."""
    with sidexec.ExecutionManager(preload=["asyncio"], env=ENVIRONMENT) as manager:
        yield functools.partial(finish, manager)


INTERPRETERS = [
    path
    for path in sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python")))
    if int(path.split("versions/3.")[1].split(".")[0]) >= 9
]


def completed(data):
    assert data.status == "completed", data
    return data


# -- top-level return and await


RETURNS = {
    "plain": "return 7",
    "if": "if params == {}:\n    return 7\nreturn 0",
    "else": "if params:\n    return 0\nelse:\n    return 7",
    "for": "for i in range(9):\n    if i == 7:\n        return i\nelse:\n    return 0",
    "for else": "for i in ():\n    pass\nelse:\n    return 7",
    "while": "i = 0\nwhile True:\n    i += 1\n    if i == 7:\n        return i",
    "while else": "while False:\n    pass\nelse:\n    return 7",
    "try": "try:\n    return 7\nfinally:\n    x = 1",
    "except": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    return 7",
    "try else": "try:\n    pass\nexcept ValueError:\n    pass\nelse:\n    return 7",
    "finally": "try:\n    1 / 0\nfinally:\n    return 7",
    "finally overrides": "try:\n    return 0\nfinally:\n    return 7",
    "with": "import contextlib\nwith contextlib.nullcontext(7) as x:\n    return x",
    "nested": "for i in [7]:\n    with open('/dev/null'):\n        try:\n            if i:\n"
    "                return i\n        finally:\n            pass",
    "after a function": "def f():\n    return 0\nclass C:\n    def g(self): return 0\nreturn 7",
    "nothing follows": "return 7\n1 / 0",
    "semicolons": "x = 7; return x",
    "one line": "if True: return 7",
    "match": "match [1, 7]:\n    case [1, x] if x:\n        return x\n    case _:\n        return 0",
}
if NEW >= (3, 11):
    RETURNS["try in except*"] = (
        "try:\n    try:\n        1 / 0\n    except* ZeroDivisionError:\n        pass\nfinally:\n    return 7"
    )


# What the compiler says of it from Python 3.14 on, once, with its line.
RETURN_IN_FINALLY = r"^<snippet>:[47]: SyntaxWarning: 'return' in a 'finally' block\n( .*\n)*"


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("code", RETURNS.values(), ids=RETURNS)
def test_return_works_at_the_top_level(run, code):
    data = completed(run(code))
    assert data.result == 7
    assert re.sub(RETURN_IN_FINALLY, "", data.error_output, count=1) == ""


@pytest.mark.parametrize("code", one_in(3, RETURNS.values()), ids=RETURNS)
def test_return_and_await_work_together(with_asyncio, code):
    data = completed(with_asyncio(f"import asyncio\nawait asyncio.sleep(0)\n{code}"))
    assert data.result == 7


AWAITS = {
    "plain": "x = await seven()",
    "if": "if await seven() == 7:\n    x = 7",
    "for": "for _ in range(await seven()):\n    x = await seven()",
    "while": "x = 0\nwhile x < await seven():\n    x += 1",
    "try": "try:\n    x = await seven()\nfinally:\n    await seven()",
    "except": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    x = await seven()",
    "finally": "try:\n    pass\nfinally:\n    x = await seven()",
    "async with": "async with Manager() as x:\n    pass",
    "async for": "async for x in sevens():\n    pass",
    "comprehension": "x = [await seven() for _ in range(2)][1]",
    "async comprehension": "x = [y async for y in sevens()][0]",
    "call": "x = int(await seven())",
    "match": "match await seven():\n    case x:\n        await seven()",
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


@pytest.mark.parametrize("name, suffix", crossed(2, AWAITS, ["", "\nreturn x"]))
def test_await_works_at_the_top_level(with_asyncio, name, suffix):
    data = completed(with_asyncio(f"{ASYNC_TOOLS}{AWAITS[name]}\nprint(x, globals()['x']){suffix}"))
    assert data.output == "7 7\n"
    assert data.result == (7 if suffix else None)


def test_a_coroutine_that_is_not_awaited_is_warned_of(run):
    data = completed(run("async def f(): pass\nf()"))
    assert "coroutine 'f' was never awaited" in data.error_output


def test_asyncio_run_works_in_plain_code_with_a_top_level_return(run):
    data = completed(run("import asyncio\nasync def f(): return 7\nreturn asyncio.run(f())"))
    assert data.result == 7


NO_RETURNS = {
    "yield": "x = 1\nyield x",
    "yield and return": "return 1\nyield 1",
    "yield from": "yield from ()",
    "return in a class body": "x = 1\nclass C:\n    return 1",
    "return in a class body and at the top": "class C:\n    return 1\nreturn 1",
    "await in a function": "def f():\n    await g()",
    "await in a function, with return": "def f():\n    await g()\nreturn 1",
    "nonlocal": "x = 1\nnonlocal x",
    "nonlocal and return": "x = 1\nnonlocal x\nreturn 1",
    "break": "break",
    "break and return": "break\nreturn 1",
    "late future import": "x = 1\nfrom __future__ import annotations",
    "late future import and return": "x = 1\nfrom __future__ import annotations\nreturn 1",
    "unknown future": "from __future__ import nothing\nreturn 1",
    "star import in a function": "def f():\n    from os import *\nreturn 1",
    "global after use": "def f():\n    print(x)\n    global x\nreturn 1",
    "two stars": "*a, *b = [1]\nreturn 1",
    "assignment to a call": "f() = 1\nreturn 1",
    "bad indentation": "x = 1\n  y = 2\nreturn 1",
    "open bracket": "x = (1\nreturn 1",
    "open string": "x = '''1\nreturn 1",
}


@pytest.mark.parametrize("code", NO_RETURNS.values(), ids=NO_RETURNS)
def test_what_no_module_may_hold_is_a_syntax_error(run, code):
    data = run("import sys\nprint('ran')\n" + code if "future" not in code else code)
    assert data.status == "failed"
    assert data.exit_code == 1
    assert data.output == ""
    assert re.match(r"(SyntaxError|IndentationError): \S", data.error), data.error


SYNTAX_ERRORS = {
    "token": "x = 1\ndef f(:\n    pass\n",
    "indentation": "if 1:\npass\n",
    "string": "x = 'a\n",
    "assignment": "a = 1\nf() = 2\n",
    "yield": "x = 1\nyield x\n",
    "return in a class": "class C:\n    return 1\n",
    "break": "x = 1\nbreak\n",
    "keyword argument twice": "f(a=1, a=2)\n",
    "non-ASCII": "é = 1\nü ü\n",
    "unclosed": "x = [1,\n",
}


@pytest.mark.parametrize("name", SYNTAX_ERRORS)
def test_a_syntax_error_reads_as_that_of_a_file(run, name, plain_file):
    code = SYNTAX_ERRORS[name]
    _, _, error = plain_file(code)
    data = run(code)
    assert essence(data.error_output) == essence(error)
    headline, _, rest = data.error.partition("\n\n")
    assert headline == error.splitlines()[-1]
    assert rest == data.error_output


# -- module semantics, the same in every mode


SAME = {
    "globals": "x = 1\nprint(globals() is locals() is vars(), 'x' in globals())",
    "names": f"print(sorted(set(globals()) - {set(OURS)!r}))",
    "dir": f"x = 1\nprint(sorted(set(dir()) - {set(OURS)!r}))",
    "locals write": "locals()['x'] = 1\nprint(x)\nvars()['y'] = 2\nprint(y)",
    "globals write": "globals()['x'] = 1\nprint(x)",
    "exec": "exec('x = 1')\nprint(x)\nexec('def f(): return x')\nprint(f())",
    "eval": "x = 1\nprint(eval('x + 1'), eval('[x for _ in range(2)]'))",
    "global": "x = 1\ndef f():\n    global x, y\n    x = 2\n    y = 3\nf()\nprint(x, y)",
    "global at the top": "global x\nx = 1\nprint(x)",
    "annotations": "x: int = 1\ny: 'str'\nprint(__import__('__main__').__annotations__, 'y' in globals())",
    "annotations in blocks": "if 1:\n    x: int = 1\nfor i in range(1):\n    y: str\nprint(__import__('__main__').__annotations__)",
    "annotation order": "def say(x):\n    print(x)\n    return x\nx: say('note') = say('value')",
    "annotated attribute": "class A: pass\na = A()\na.b: print('note') = 1\nprint(a.b, __import__('__main__').__annotations__)",
    "annotated item": "d = {}\nd['k']: print('note') = 1\nprint(d)",
    "annotated in parentheses": "(x): print('note') = 1\nprint(x, __import__('__main__').__annotations__)",
    "annotated target alone": "def f():\n    print('target')\nf().x: print('note')",
    "future annotations": "from __future__ import annotations\nx: nothing = 1\n"
    "y: dict[str, 'A'] | (int, *z)\nw: lambda a, *b, c=1: {**a}\nv: f'{x!r:>{y}}'\nu: x[1:2, ...]\n"
    "def f(a: b) -> c: pass\nclass C:\n    d: e\n"
    "print(__annotations__, f.__annotations__, C.__annotations__, annotations)",
    "future in functions": "from __future__ import annotations\ndef f():\n"
    "    def g(a: nothing): pass\n    return g\nprint(f().__annotations__)",
    "docstring": "'''The doc.'''\nprint(repr(__doc__))",
    "indented docstring": "'''The doc.\n\n    Indented.\n    '''\nprint(repr(__doc__))",
    "no docstring": "x = 1\n'''no doc'''\nprint(repr(__doc__))",
    "docstring and future": "'''Doc'''\nfrom __future__ import annotations\nprint(__doc__)",
    "f-string is no docstring": "f'''no doc'''\nprint(__doc__)",
    "name": "print(__name__, __package__, __spec__, __builtins__.__name__)",
    "loader": "print(__loader__)",
    "main": "import __main__, sys\nx = 1\nprint(__main__.x, sys.modules['__main__'] is __main__,"
    " vars(__main__) is globals())",
    "star import": "from os.path import *\nprint(join('a', 'b'), 'genericpath' in globals())\n"
    f"print(sorted(set(globals()) - {set(OURS)!r}))",
    "star import in a block": "try:\n    from string import *\nfinally:\n    print(digits, capwords('a b'))",
    "star import of a package": "from json import *\nprint(dumps([]), 'decoder' in globals())\n"
    "from concurrent.futures import *\nprint(ThreadPoolExecutor.__name__)",
    "star import fails": "import traceback\ntry:\n    from no_such_module import *\n"
    "except ImportError:\n    print(traceback.format_exc().count('File'))",
    "star import of what is missing": "import sys, types, traceback\nm = types.ModuleType('m')\n"
    "m.__all__ = ['x']\nsys.modules['m'] = m\ntry:\n    from m import *\n"
    "except AttributeError as e:\n    print(e, traceback.format_exc().count('File'))",
    "star import with bad __all__": "import sys, types\nm = types.ModuleType('m')\nm.__all__ = [1]\n"
    "sys.modules['m'] = m\ntry:\n    from m import *\nexcept TypeError as e:\n    print(e)",
    "relative import": "try:\n    from . import x\nexcept ImportError as e:\n    print(e)",
    "relative star import": "try:\n    from .m import *\nexcept ImportError as e:\n    print(e)",
    "imports": "import os.path, xml.dom as d\nfrom json import (dumps as s,)\nprint(os.path.sep, d.__name__, s([]))",
    "pickle": "import pickle\ndef f(): pass\nclass C:\n    class D: pass\n    def g(self): pass\n"
    "for each in (f, C, C.D, C.g):\n    print(pickle.loads(pickle.dumps(each)) is each)\n"
    "c = C()\nc.x = 1\nprint(vars(pickle.loads(pickle.dumps(c))), b'__main__' in pickle.dumps(f))",
    "pickle of decorated": "import pickle, functools, enum, dataclasses, collections\n"
    "@dataclasses.dataclass\nclass P:\n    x: int\nclass E(enum.Enum):\n    A = 1\n"
    "T = collections.namedtuple('T', 'a')\n"
    "print(*(pickle.loads(pickle.dumps(each)) for each in (P(1), E.A, T(1))))",
    "qualified names": "def f():\n    def g(): pass\n    class H:\n        def i(self): pass\n"
    "    return g, H, H.i, lambda: 0\nclass C:\n    def m(self): return lambda: 0\n    n = lambda: 0\n"
    "    class D:\n        def o(self): pass\nasync def a(): pass\ng = (x for x in ())\n"
    "for each in (f, *f(), C, C.m, C.n, C.D, C.D.o, C().m(), (lambda: 0), a, g):\n"
    "    print(each.__qualname__, each.__name__, getattr(each, '__module__', ''))",
    "names of code": "import sys\nprint(sys._getframe().f_code.co_name)\n"
    "print(getattr(sys._getframe().f_code, 'co_qualname', '<module>'))\n"
    "def f(): return sys._getframe()\nprint(f().f_back.f_code.co_name, f().f_code.co_name)\n"
    "print([c.co_name for c in f().f_back.f_code.co_consts if hasattr(c, 'co_name')])",
    "frame": "import sys\nf = sys._getframe()\nprint(f.f_locals is f.f_globals is globals(), f.f_lineno)",
    "repr": "class C: pass\nprint(C, C.__module__, repr(C()).startswith('<__main__.C object'))",
    "comprehensions": "x = 1\nprint([x for _ in range(2)], {k: x for k in 'a'}, sum(x for _ in [1]))\n"
    "print([y for y in range(2)], 'y' in globals())",
    "comprehension shadows": "x = 1\nz = [x for x in range(3)]\nprint(x, z)\n"
    "z = [[x for x in range(y)] for y in range(3)]\nprint(x, z, 'y' in globals())",
    "comprehension closures": "fs = [lambda: i for i in range(3)]\nprint([f() for f in fs])\n"
    "fs = [[lambda: (i, j) for i in range(2)] for j in range(2)]\nprint([[f() for f in g] for g in fs])",
    "walrus": "print([y := i for i in range(3)], y)\nif (n := 3) > 2:\n    print(n)\n"
    "print(any((hit := i) > 1 for i in range(5)), hit)\ndef f():\n    return y, n, hit\nprint(f())",
    "walrus in a lambda": "f = lambda: (q := 1)\nprint(f(), 'q' in globals())",
    "class body": "x = 1\nclass C:\n    x = x + 1\n    y = [x for _ in range(1)]\n    z = locals()['x']\n"
    "    def f(self): return x\nprint(C.x, C.y, C.z, C().f(), x)",
    "class body deletes": "x = 1\nclass C:\n    x = 2\n    del x\n    print(x)",
    "class body names": "class C:\n    print(__qualname__, __module__)\n    __p = 1\nprint(C._C__p)",
    "private names": "__x = 1\ndef f(): return __x\nprint(f(), __x)",
    "super": "class A:\n    def f(self): return 1\nclass B(A):\n    def f(self): return super().f() + 1\n"
    "    def g(self): return __class__\nprint(B().f(), B().g())",
    "metaclass": "class M(type):\n    def __prepare__(name, bases): return {'x': 1}\n"
    "class C(metaclass=M):\n    y = x\nprint(C.y)",
    "nested functions": "def f():\n    n = 0\n    def g():\n        nonlocal n\n        n += 1\n        return n\n"
    "    return g\ng = f()\ng()\nprint(g())",
    "late binding": "def f(): return late\nlate = 1\nprint(f())\nlate = 2\nprint(f())",
    "recursion": "def f(n): return n and f(n - 1) + 1\nprint(f(100))",
    "decorators": "def d(f):\n    print(f.__qualname__)\n    return f\n@d\ndef g(): pass\n@d\nclass C: pass",
    "defaults": "x = 1\ndef f(a=x, *, b=x + 1): return a, b\nx = 5\nprint(f(), f.__closure__)",
    "no closures": "x = 1\ndef f(): return x\nprint(f.__code__.co_freevars, f.__globals__ is globals())",
    "del": "x = 1\ndel x\nprint('x' in globals())\ntry:\n    x\nexcept NameError as e:\n    print(e)",
    "del twice": "x = 1\ndel x\ntry:\n    del x\nexcept NameError as e:\n    print(e)",
    "unbound": "try:\n    print(nothing)\nexcept NameError as e:\n    print(e, type(e).__name__)\nif 0:\n    nothing = 1",
    "builtins shadowed": "def len(x): return 42\nprint(len([]))\ndel len\nprint(len([]))",
    "except unbinds": "e = 1\ntry:\n    1 / 0\nexcept ZeroDivisionError as e:\n    pass\nprint('e' in globals())",
    "for leaks": "for i, (j, *k) in [(1, (2, 3, 4))]: pass\nprint(i, j, k)",
    "with binds": "import io\nwith io.StringIO('a') as f, io.StringIO('b') as g: pass\nprint(f.closed, g.closed)",
    "augmented": "x = [1]\ny = x\nx += [2]\nprint(y)\nn = 1\nn <<= 4\nprint(n)",
    "unpacking": "a, *b = c = [1, 2, 3]\n[d, (e, f)] = 1, (2, 3)\nprint(a, b, c, d, e, f)",
    "generators": "def g():\n    x = yield 1\n    print(x)\n    yield from [2, 3]\n    return 4\n"
    "i = g()\nprint(next(i), i.send('s'), list(i))\nprint(list(x for x in range(3)))",
    "assert": "try:\n    assert 1 > 2, 'no'\nexcept AssertionError as e:\n    print(e, __debug__)",
    "non-ASCII": "größe = 'ß✓🐍\\x7f'\nprint(größe, 'größe' in globals())\nﬁ = 1\nprint(fi)",
    "odd names": "_ = 1\n__ = 2\nmatch = case = type = 3\nprint(_, __, match, case, type)",
    "names like ours": "self = code = value = json = source = ast = os = text = main = 1\nprint(self, os, main)",
    "attributes named like globals": "class C: pass\nc = C()\nc.print = 1\nc.c = 2\nprint(c.print, c.c)",
    "many constants": "x = [" + ", ".join(str(n) for n in range(2000)) + "]\nprint(sum(x))",
    "deep nesting": "\n".join("    " * n + "if 1:" for n in range(15))
    + "\n"
    + "    " * 15
    + "print('deep')",
    "line numbers": "import sys\n\n\nprint(sys._getframe().f_lineno)\ndef f():\n\n    return sys._getframe().f_lineno\n"
    "print(f(), f.__code__.co_firstlineno,\n      sys._getframe().f_lineno)",
    "type hints": "import typing\nclass C:\n    x: 'C'\ndef f(a: 'C') -> 'int': pass\n"
    "print(typing.get_type_hints(C), typing.get_type_hints(f))",
    "dataclass with future": "from __future__ import annotations\nimport dataclasses, typing\n"
    "@dataclasses.dataclass\nclass C:\n    x: typing.ClassVar[int] = 1\n    y: C | None = None\n"
    "print(C(), [f.type for f in dataclasses.fields(C)])",
    "future division": "from __future__ import division, generator_stop\nprint(1 / 2)",
    "timeit": "import timeit\nx = 3\nprint(timeit.timeit('g[\"n\"] = x', globals={**globals(), 'g': globals()}, number=1) >= 0, n)",
    "interned singletons": "x = ()\ny = ()\nprint(x is y, ... is Ellipsis)",
    "implicit concatenation": "x = ('a'\n     'b' f'{1}')\nprint(x)\nprint(f'{x!r:>8}|{1 + 1=}')",
    "line continuation": "x = 1 + \\\n    2\nprint(x)",
    "form feed": "x = 1\n\x0c\nprint(x)",
    "trailing comment": "print(1)  # no newline at the end",
    "tabs": "if 1:\n\tprint(1)\n\tif 2:\n\t\tprint(2)",
    "trace": "import sys\nseen = []\ndef tracer(frame, event, arg):\n    seen.append(event)\n"
    "sys.settrace(tracer)\ndef f(): pass\nf()\nsys.settrace(None)\nprint(seen)",
    "stdin": "import sys\nprint(repr(sys.stdin.read()), sys.stdin.fileno())\n"
    "try:\n    input()\nexcept EOFError as e:\n    print('EOF')",
    "argv": "import sys\nprint(sys.argv, sys.path)",
    "environment": "import os\nprint(sorted(os.environ.items()))",
    "process": "import os, threading\nprint(os.getcwd(), os.umask(0), threading.enumerate(),"
    " threading.current_thread() is threading.main_thread(), os.nice(0))".replace(
        "threading.enumerate()", "[t.name for t in threading.enumerate()]"
    ),
    "signals": "import signal\nfor n in sorted(signal.valid_signals() - {signal.SIGTERM, signal.SIGURG}):\n"
    "    print(n, signal.getsignal(n))\nprint(signal.pthread_sigmask(signal.SIG_BLOCK, ()),"
    " signal.set_wakeup_fd(-1), signal.getitimer(signal.ITIMER_REAL))",
    "limits": "import resource\nprint([resource.getrlimit(getattr(resource, n)) for n in sorted(dir(resource))"
    " if n.startswith('RLIMIT')])",
    "streams": "import sys\nfor s in (sys.stdin, sys.stdout, sys.stderr):\n"
    "    print(s.name, s.mode, s.errors, s.fileno(), s.isatty(), type(s).__name__)\n"
    "print(sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__)\n"
    "print(sys.stdout.seekable(), sys.stdout.buffer.seekable(), sys.stderr.seekable())",
    "writes": "import sys\nclass S(str):\n    def encode(self): return b'no'\n    def __str__(self): return 'text'\n"
    "print(sys.stdout.write('ß\\n'), sys.stdout.write(S('s\\n')), sys.stdout.write(''))\nprint(S('s'))\n"
    "sys.stdout.writelines(['a', 'b\\n'])\nfor wrong in (b'b', None, 1):\n    try: sys.stdout.write(wrong)\n"
    "    except TypeError as e: print(e, e.__context__)\ntry: sys.stdout.write('a', 'b')\nexcept TypeError: print('two')",
    "another encoding": "import sys\nwrite = sys.stdout.write\nprint('é')\n"
    "sys.stdout.reconfigure(encoding='ascii', errors='backslashreplace')\nprint('é', sys.stdout.encoding)\nwrite('ß\\n')",
    "detached": "import sys\nprint('before')\nold = sys.stdout\nraw = old.detach()\ntry: old.write('x')\n"
    "except ValueError as e: print(e, e.__context__, file=sys.stderr)\nraw.write(b'raw\\n')\nsys.stdout = open(1, 'w', closefd=False)",
    "closed": "import sys\nsys.stderr.close()\ntry: sys.stderr.write('x')\nexcept ValueError as e: print(e)",
    "hooks": "import sys\nprint(sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__,"
    " sys.unraisablehook is sys.__unraisablehook__, sys.gettrace(), sys.getprofile(), sys.meta_path and len(sys.meta_path))",
    "recursion limit": "import sys, gc\nprint(sys.getrecursionlimit(), gc.isenabled(), gc.get_threshold(), gc.callbacks)",
    "locale": "import locale, sys\nprint(locale.getpreferredencoding(False), sys.getfilesystemencoding())",
    "warnings": "import warnings\nprint(len(warnings.filters), [f[0] for f in warnings.filters])",
    "logging": "import logging\nprint(logging.getLogger().handlers, len(logging.Logger.manager.loggerDict))",
    "bytecode flags": "def f(): pass\nasync def g(): pass\ndef h(): yield\nprint(f.__code__.co_flags & 0xfef,"
    " g.__code__.co_flags & 0xfef, h.__code__.co_flags & 0xfef)",
    "comments only": "# nothing\n",
    "pass": "pass",
    "coding comment": "# -*- coding: latin-1 -*-\nprint('ü')",
    "match binds": (
        "match {'a': [1, 2], 'b': 3}:\n    case {'a': [x, *y], **z}:\n        print(x, y, z)\n"
        "match 1:\n    case int() as w if w:\n        print(w)\nprint('y' in globals())"
    ),
}
if NEW >= (3, 11):
    SAME["except*"] = (
        "try:\n    raise ExceptionGroup('g', [ValueError(1), KeyError(2)])\n"
        "except* ValueError as e:\n    print(e.exceptions)\nexcept* KeyError as e:\n    print(e.exceptions)\n"
        "print('e' in globals())"
    )
if NEW >= (3, 12):
    SAME["type parameters"] = (
        "type X = list[int]\ntype Y[T] = dict[T, X]\ndef f[T](a: T) -> T: return a\nclass C[T]:\n"
        "    def g[U](self, a: U) -> T: pass\n"
        "print(X, X.__value__, Y.__value__, f.__type_params__, C.__type_params__, f(1))\n"
        "print(f.__qualname__, C.__qualname__, C.g.__qualname__, 'T' in globals())"
    )
    SAME["comprehension scopes"] = (
        "x = 1\nprint([sorted(set(locals()) & {'x', 'i'}) for i in range(1)])\n"
        "class C:\n    y = 2\n    z = [v for v in [y]]\n    w = [(lambda: i)() for i in range(2)]\n"
        "print(C.z, C.w)"
    )

MODES = {
    "plain": "{}",
    "return": "{}\nif 0:\n    return",
    "both": "{}\nif 0:\n    return await nothing",
}
# An event loop has signals, modules and a context of its own.
NOT_ASYNC = {"signals", "trace", "frame", "logging"}


# What the documentation names.
PROMISED = ("names", "global", "annotations", "pickle", "line numbers")
PROMISED += ("stdin", "environment", "signals", "streams")


@pytest.mark.parametrize(
    "name", [*PROMISED, *one_in(2, [name for name in SAME if name not in PROMISED])]
)
def test_code_means_what_it_means_in_a_plain_interpreter(run, with_asyncio, name, plain):
    done = plain(SAME[name])
    assert done.returncode == 0, done.stderr
    for mode, template in MODES.items():
        code = template.replace("{}", SAME[name], 1)
        if mode == "both" and name in NOT_ASYNC:
            continue
        data = completed(with_asyncio(code) if mode == "both" else run(code))
        assert (mode, data.output, data.error_output) == (mode, done.stdout, done.stderr)


# -- tracebacks


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
    "plain": "x = 1\n\nraise ValueError('no')\n",
    "function": "def f(a):\n    return 1 / a\n\n\ndef g():\n    f(\n        0,\n    )\n\ng()\n",
    "import": "import json\njson.loads('{')\n",
    "chained": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    {}['k']\n",
    "cause": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e\n",
    "suppressed": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise KeyError('k') from None\n",
    "class body": "class C:\n    x = nothing\n",
    "comprehension": "x = [1 / y for y in [1, 0]]\n",
    "lambda": "f = lambda: 1 / 0\nf()\n",
    "recursion": "def f(): f()\nf()\n",
    "exec": "exec('1 / 0')\n",
    "long expression": "x = {'a': {'b': None}}\ny = (x['a']\n     ['b']['c'])\n",
    "non-ASCII": "ü = 'ß✓'\nraise ValueError(f'größe {ü}')\n",
    "no message": "raise ValueError\n",
    "empty message": "raise ValueError('')\n",
    "lines in the message": "raise ValueError('one\\ntwo\\n\\nthree')\n",
    "own class": "class MyError(Exception):\n    pass\nraise MyError('no')\n",
    "nested class": "class A:\n    class MyError(Exception):\n        pass\nraise A.MyError('no')\n",
    "module's class": "import json\nraise json.JSONDecodeError('no', 'doc', 0)\n",
    "bad str": "class E(Exception):\n    def __str__(self): raise ValueError('bad')\nraise E\n",
    "name suggestion": "number = 1\nprint(numbr)\n",
    "attribute suggestion": "import os\nos.getcwdd()\n",
    "syntax error in exec": "exec('x = (')\n",
    "syntax error in eval": "x = 1\neval('1 +')\n",
    "os error": "open('/no/such/file')\n",
    "unicode error": "b'\\xff'.decode()\n",
    "deep": "def f(n):\n    if n:\n        f(n - 1)\n    1 / 0\nf(5)\n",
    "decorator": "def d(f):\n    raise ValueError(1)\n@d\ndef g(): pass\n",
    "with": "class M:\n    def __enter__(self): pass\n    def __exit__(self, *a): 1 / 0\nwith M():\n    pass\n",
    "finally": "try:\n    1 / 0\nfinally:\n    x = 1\n",
    "generator": "def g():\n    yield 1\n    1 / 0\nlist(g())\n",
    "reraised": "try:\n    1 / 0\nexcept Exception as e:\n    error = e\nraise error\n",
    "assertion": "assert 1 == 2, 'no'\n",
    "not an exception": "raise 1\n",
    "stop iteration": "next(iter(()))\n",
    "base exception": "class E(BaseException): pass\nraise E(1)\n",
    "generator exit": "raise GeneratorExit\n",
    "form feed": "x = '\x0c'\n1 / 0\n",
    "line separators": "x = '\u2028 \x85'\n1 / 0\n",
    "CRLF": "x = 1\r\ny = 2\r\n1 / 0\r\n",
}
if NEW >= (3, 11):
    TRACEBACKS["notes"] = "e = ValueError('no')\ne.add_note('a note\\nof two lines')\nraise e\n"
    TRACEBACKS["group"] = (
        "def f(): 1 / 0\ntry:\n    f()\nexcept Exception as e:\n    z = e\n"
        "raise ExceptionGroup('group', [z, ValueError(2), ExceptionGroup('in', [KeyError(3)])])\n"
    )
    TRACEBACKS["base group"] = "raise BaseExceptionGroup('group', [KeyboardInterrupt(1)])\n"


@pytest.mark.parametrize("name, mode", crossed(4, TRACEBACKS, ["plain", "return"]))
def test_a_failure_reads_as_that_of_a_file(run, name, mode, plain_file):
    code = TRACEBACKS[name]
    exit_code, _, errors = plain_file(code)
    data = run(code + "return\n" * (mode == "return"))
    assert data.status == "failed"
    assert data.exit_code == exit_code == 1
    assert essence(data.error_output) == essence(errors)
    headline, _, rest = data.error.partition("\n\n")
    assert rest == data.error_output
    kind = re.findall(r"^(?:  [+|] )?([A-Za-z_.]+)(?=:|\n| \()", errors, re.MULTILINE)
    kind = [each for each in kind if not each.startswith("Traceback")]
    kind = [each.replace("__main__.", "") for each in kind]
    assert re.split(r"[: ]", headline)[0] == (
        kind[0] if "roup" in name or "lines" in name else kind[-1]
    )


PRINTED = {
    "format_exc": "import traceback\ndef f():\n    return 1 / 0\ntry:\n    f()\n"
    "except ZeroDivisionError:\n    print(traceback.format_exc())\n",
    "print_exc": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    __import__('traceback').print_exc()\n",
    "print_stack": "import sys, traceback\ndef f():\n    traceback.print_stack(sys._getframe(), limit=2)\nf()\n",
    "logging": "import logging\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    logging.exception('no')\n",
    "logging lines": "import logging\nlogging.basicConfig(format='%(lineno)d %(funcName)s %(filename)s')\n"
    "logging.warning('x')\n",
    "thread": "import threading\ndef f():\n    1 / 0\nt = threading.Thread(target=f, name='T')\nt.start()\nt.join()\n",
    "thread pool": "import concurrent.futures, traceback\ndef f():\n    1 / 0\n"
    "with concurrent.futures.ThreadPoolExecutor(1) as pool:\n    future = pool.submit(f)\n"
    "    concurrent.futures.wait([future])\n    try:\n        future.result()\n"
    "    except ZeroDivisionError:\n        traceback.print_exc()\n",
    "warning": "import warnings\n\nwarnings.warn('look out')\n",
    "syntax warning": "x = 1\nif x is 1000:\n    pass\n",
    "invalid escape": "x = 1\nprint('\\d', x)\n",
    "resource warning": "import warnings\nwarnings.simplefilter('always')\nopen('/dev/null')\nx = 1\n",
    "warning once": "import warnings\nfor _ in range(3):\n    warnings.warn('look out')\n",
    "deprecation": "import warnings\nwarnings.warn('old', DeprecationWarning)\n",
}
# The interpreter itself looks for the lines of these in files only.
LINES_LEFT_OUT = {"thread", "syntax warning", "invalid escape"}


@pytest.mark.parametrize("name, mode", crossed(2, PRINTED, ["plain", "return"]))
def test_what_shows_source_lines_shows_those_of_the_snippet(run, name, mode, plain_file):
    code = PRINTED[name]
    _, output, errors = plain_file(code)
    if name == "logging lines":
        errors = errors.replace("snippet.py", "<snippet>")
    data = completed(run(code + "return\n" * (mode == "return")))
    theirs, ours = (
        [re.sub(r"0x\w+", "0x", line) for line in text.splitlines()]
        for text in (output + errors, data.output + data.error_output)
    )
    if name in LINES_LEFT_OUT:
        theirs, ours = (
            [line for line in lines if line[:2] != "  " or line[:6] == "  File"]
            for lines in (theirs, ours)
        )
    assert ours == theirs


@pytest.mark.parametrize("name", one_in(3, ["format_exc", "print_exc", "logging"]))
def test_source_lines_are_there_in_a_manager_s_first_execution(name):
    with sidexec.ExecutionManager(env=ENVIRONMENT) as manager:
        data = completed(finish(manager, PRINTED[name]))
    written = data.output + data.error_output
    assert 'File "<snippet>", line ' in written
    assert "\n    1 / 0\n" in written or "\n    return 1 / 0\n" in written
    assert "sidexec" not in written


def test_a_first_execution_that_fails_shows_its_line():
    with sidexec.ExecutionManager(env=ENVIRONMENT) as manager:
        data = finish(manager, "\n1 / 0")
    assert data.error.startswith("ZeroDivisionError: division by zero\n\nTraceback")
    assert 'File "<snippet>", line 2, in <module>\n    1 / 0\n' in data.error
    assert "sidexec" not in data.error + data.error_output


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


OWN_FRAMES = {
    "plain": "report_progress(101)",
    "context": "try:\n    report_progress(101)\nexcept ValueError:\n    raise KeyError(1)",
    "cause": "try:\n    report_progress(101)\nexcept ValueError as e:\n    raise KeyError(1) from e",
    "result": "report_result(object())",
    "returned": "return object()",
    "async": "try:\n    report_progress(101)\nexcept ValueError as e:\n    raise KeyError(1) from e\nawait x",
    "star import": "from no_such_module import *\nreturn",
    "star import, chained": "try:\n    from no_such_module import *\nexcept ImportError:\n    1 / 0\nreturn",
    "syntax error": "return (",
}
if NEW >= (3, 11):
    OWN_FRAMES["group"] = (
        "try:\n    report_progress(101)\nexcept ValueError as e:\n    raise ExceptionGroup('g', [e])"
    )


@pytest.mark.parametrize("code", OWN_FRAMES.values(), ids=OWN_FRAMES)
def test_no_frame_of_the_library_is_shown(run, code):
    data = run(code)
    assert data.status == "failed"
    files = set(re.findall(r'File "(.*?)"', data.error + data.error_output))
    assert files <= {"<snippet>"}


def test_inspect_finds_a_function_s_source(run):
    code = "import inspect\ndef f():\n    return 1  # one\nprint(inspect.getsource(f))"
    assert completed(run(code)).output == "def f():\n    return 1  # one\n\n"
    assert completed(run(code + "\nreturn")).output == "def f():\n    return 1  # one\n\n"


def test_an_own_excepthook_gets_the_exception(run):
    code = (
        "import sys, traceback\ndef hook(kind, error, trace):\n"
        "    print('hook', kind.__name__, error, traceback.extract_tb(trace)[0][:3])\n"
        "sys.excepthook = hook\n1 / 0"
    )
    data = run(code)
    assert data.status == "failed"
    assert data.exit_code == 1
    assert data.output == "hook ZeroDivisionError division by zero ('<snippet>', 5, '<module>')\n"
    assert data.error_output == ""
    assert data.error.startswith("ZeroDivisionError: division by zero\n\nTraceback")


def test_an_excepthook_that_raises_does_not_hide_the_exception(run):
    data = run("import sys\nsys.excepthook = lambda *exc_info: nothing\n1 / 0")
    assert data.status == "failed"
    assert data.exit_code == 1
    assert data.error.startswith("ZeroDivisionError: division by zero\n")
    assert "NameError: name 'nothing' is not defined" in data.error_output


def test_a_failure_without_a_standard_error_has_its_error(run):
    for code in ("import sys\nsys.stderr = None\n1 / 0", "import os\nos.close(2)\n1 / 0"):
        data = run(code)
        assert (data.status, data.exit_code) == ("failed", 1)
        assert data.error.startswith("ZeroDivisionError: division by zero\n")


# -- the stack


STACKS = {
    "frames": "import sys\nf = sys._getframe()\nwhile f:\n    print(f.f_code.co_filename)\n    f = f.f_back",
    "in a function": "import sys\ndef g():\n    f = sys._getframe()\n    while f:\n"
    "        print(f.f_code.co_filename)\n        f = f.f_back\ng()",
    "print_stack": "import sys, traceback\ntraceback.print_stack(file=sys.stdout)",
    "inspect": "import inspect\nfor each in inspect.stack(): print(each.filename)",
    "logging": "import logging, sys\nlogging.basicConfig(stream=sys.stdout)\nlogging.warning('look', stack_info=True)",
    "asyncio": "import asyncio, inspect\nasync def main():\n    for each in inspect.stack(): print(each.filename)\n",
}


def entries(text):
    """The lines that name a file, the snippet's own apart."""
    lines = [line for line in text.splitlines() if "/" in line or "<" in line]
    return [line for line in lines if "<snippet>" not in line]


@pytest.mark.parametrize("mode", one_in(2, MODES))
@pytest.mark.parametrize("name", STACKS)
def test_at_most_one_frame_of_ours_is_below_the_snippet(run, with_asyncio, plain, name, mode):
    is_async = name == "asyncio" or mode == "both"
    code = STACKS[name] + ("await main()" if name == "asyncio" else "")
    theirs = STACKS[name] + ("asyncio.run(main())" if name == "asyncio" else "")
    code = MODES[mode].replace("{}", code)
    shown = entries(completed(with_asyncio(code) if is_async else run(code)).output)
    assert len([line for line in shown if "/asyncio/" not in line]) == 1, shown
    assert not [line for line in shown if "sidexec" in line or "<side>" in line]
    if name == "asyncio" or not is_async:
        plain_ones = [line for line in entries(plain(theirs).stdout) if "/asyncio/" in line]
        assert len(shown) <= len(plain_ones) + 1


def test_the_recursion_limit_is_that_of_a_plain_interpreter_but_for_our_frame(run, plain):
    code = (
        "def f(n):\n    global deepest\n    deepest = n\n    f(n + 1)\n"
        "try:\n    f(1)\nexcept RecursionError:\n    pass\nprint(deepest)"
    )
    # Until 3.11, the call of each built-in function counted as well.
    ours = 1 if NEW >= (3, 12) else 3
    for suffix in ("", "\nreturn"):
        assert int(completed(run(code + suffix)).output) >= int(plain(code).stdout) - ours


def test_what_is_raised_while_the_code_ends_is_no_result(run):
    data = run("raise StopIteration(5)\nreturn 1")
    assert (data.status, data.result) == ("failed", None)
    assert data.error.startswith("StopIteration: 5\n")


# -- odd source


@pytest.mark.parametrize("code", ["", "\n", "   \n\t\n", "# only a comment"])
def test_code_without_statements_completes(run, code):
    data = completed(run(code))
    assert (data.output, data.error_output, data.result, data.exit_code) == ("", "", None, 0)


INDENTED = {
    "spaces": "    x = 1\n    if x:\n        print(x)\n",
    "tabs": "\tx = 1\n\tif x:\n\t\tprint(x)\n",
    "blank lines": "\n\n    x = 1\n\n    print(x)\n",
    "less indented comment": "    x = 1\n    # c\n    print(x)\n    ",
    "return": "\n    x = 1\n    print(x)\n    return x\n    ",
}


@pytest.mark.parametrize("code", INDENTED.values(), ids=INDENTED)
def test_common_indentation_is_taken_off(run, code):
    assert completed(run(code)).output == "1\n"


def test_line_numbers_count_from_the_code_as_given(run):
    data = run("\n\n    x = 1\n    1 / 0\n")
    assert '  File "<snippet>", line 4, in <module>\n    1 / 0\n' in data.error


def test_an_unindented_first_line_leaves_indentation_alone(run):
    data = completed(run("x = '''\n    two\n  one'''\nprint(repr(x))"))
    assert data.output == "'\\n    two\\n  one'\n"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("suffix", ["", "return"])
def test_other_line_ends_are_understood(run, end, suffix):
    code = end.join(["x = 1", "if x:", "    print('''a", "b''')", suffix])
    assert completed(run(code)).output == "a\nb\n"


BOM = "\ufeff"


@pytest.mark.parametrize(
    "code", ["x = 1\nprint(x)", "    x = 1\n    print(x)", "x = 1\nprint(x)\nreturn"]
)
def test_a_byte_order_mark_is_passed_over(run, code):
    assert completed(run(BOM + code)).output == "1\n"


def test_a_byte_order_mark_within_the_code_is_an_error(run):
    assert run("x = 1\n" + BOM).error.startswith("SyntaxError: invalid non-printable character")


def test_a_null_byte_in_the_code_fails_it(run):
    data = run("print(1)\nx = 'a\0b'")
    assert data.status == "failed"
    assert data.output == ""
    assert "null bytes" in data.error.splitlines()[0]


def test_a_lone_surrogate_printed_is_treated_as_by_a_plain_interpreter(run, plain):
    code = "import sys\nsys.stderr.write('\\udc80')\nprint('\\udc80')"
    assert run(code).exit_code == run_plain(code, errors="replace").returncode


def test_a_lone_surrogate_in_a_message_is_shown_escaped(run):
    data = run("raise ValueError('a\\udc80b')")
    assert data.error.startswith("ValueError: a")
    assert "ValueError: a\\udc80b" in data.error_output


@pytest.mark.parametrize("suffix", ["", "\nreturn len(x)"], ids=["alone", "and return"])
def test_code_of_5_megabytes_runs(run, suffix):
    size = 5 * 1024 * 1024
    data = completed(run(f"x = '{'y' * size}'\nprint(len(x)){suffix}"))
    assert data.output == f"{size}\n"
    assert data.result == (size if suffix else None)


def test_code_of_many_lines_runs(run):
    code = "\n".join(f"x{n} = {n}" for n in range(5_000)) + "\nreturn x4999"
    assert completed(run(code)).result == 4_999


def test_syntax_warnings_are_shown_once_with_a_return(run):
    data = completed(run("x = 1\nif x is 1000:\n    return 1\nreturn 2"))
    assert data.error_output.count("SyntaxWarning") == 1


# -- surroundings


@pytest.mark.parametrize("preload", [(), ("asyncio", "random", "logging", "tempfile")])
def test_no_module_of_the_library_is_there(tmp_path, preload):
    code = """
    import sys
    return {
        "modules": sorted(sys.modules),
        "files": sorted(str(getattr(m, "__file__", "")) for m in sys.modules.values() if m),
        "cached": sorted(__import__("linecache").cache),
    }
    """
    with sidexec.ExecutionManager(preload=preload, cwd=tmp_path, env=ENVIRONMENT) as manager:
        for _ in range(3):  # the first one, and such as are forked ahead
            id = manager.start_with_code(code).id
            result = completed(manager.wait(id).data).result
            assert not [name for name in result["modules"] if "side" in name.lower()]
            assert not [file for file in result["files"] if "sidexec" in file]
            assert set(result["cached"]) <= {"<snippet>"}
            assert "pytest" not in result["modules"]


def test_what_launcher_and_keeper_write_to_standard_error_can_be_had(tmp_path):
    code = "import os\nos.register_at_fork(before=lambda: os.write(2, b'%d\\n' % os.getpid()))"
    (tmp_path / "says_who_forks.py").write_text(code)
    log = tmp_path / "log"
    debug = {"PYTHONPATH": str(tmp_path), "EXECUTION_MANAGER_STDERR": str(log)}
    environment = {**ENVIRONMENT, **debug}
    with sidexec.ExecutionManager(preload=["says_who_forks"], env=environment) as manager:
        code = "import os\nprint(os.getppid())\nos.write(2, b'mine')"
        data = completed(manager.wait(manager.start_with_code(code).id).data)
    assert data.error_output == "mine"
    assert "mine" not in log.read_text()
    forkers = set(log.read_text().split())
    assert data.output.strip() in forkers and len(forkers) >= 2


def test_the_preloaded_modules_are_there(tmp_path):
    (tmp_path / "mine.py").write_text("import os\npid = os.getpid()\nprint('loaded')")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    with sidexec.ExecutionManager(preload=["mine", "json.tool"], env=environment) as manager:
        pids = set()
        for _ in range(3):
            code = "import sys, os\nprint('mine' in sys.modules, 'json.tool' in sys.modules)\n"
            code += "import mine\nreturn [mine.pid, os.getpid()]"
            data = completed(manager.wait(manager.start_with_code(code).id).data)
            assert data.output == "True True\n"
            assert data.result[0] != data.result[1]
            pids.add(data.result[0])
    assert len(pids) == 1


PRELOADED = """
import atexit, weakref, os, signal, threading, sys, logging, logging.handlers
class Thing: pass
thing = Thing()
def say(text):
    print(text, flush=True)
    with open(os.environ["LOG"], "a") as file:
        file.write(f"{text} {os.getpid()}\\n")
atexit.register(say, "atexit")
weakref.finalize(thing, say, "finalize")
token = os.getpid()
"""


ENDINGS = [
    "pass",
    "return 1",
    "1 / 0",
    "import sys; sys.exit(3)",
    "import threading\nthreading.Thread(target=print, daemon=True).start()",
    "import os\nif os.fork() == 0: pass\nelse: os.wait()",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
]


def test_exit_handlers_of_preloaded_modules_do_not_run_in_snippets(tmp_path):
    (tmp_path / "mine.py").write_text(PRELOADED)
    log = tmp_path / "log"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path), "LOG": str(log)}
    with sidexec.ExecutionManager(preload=["mine"], env=environment) as manager:
        for code in ENDINGS:
            data = finish(manager, "import mine\n" + code)
            assert data.output.strip() == "", code
            assert not log.exists(), code


def test_a_snippet_s_own_exit_handlers_run_with_the_preloaded_modules(tmp_path, plain):
    code = """
    import atexit, weakref, logging.handlers, sys
    atexit.register(print, "atexit")
    class Thing: pass
    thing = Thing()
    weakref.finalize(thing, print, "finalize")
    handler = logging.handlers.MemoryHandler(100, target=logging.StreamHandler(sys.stdout))
    logging.getLogger().addHandler(handler)
    logging.warning("logged")
    """
    with sidexec.ExecutionManager(preload=["logging", "weakref", "atexit"]) as manager:
        data = completed(finish(manager, code))
    assert sorted(data.output.split()) == ["atexit", "finalize", "logged"]
    done = plain(textwrap.dedent(code))
    assert data.output == done.stdout


@pytest.mark.parametrize("preload", [(), ("random", "tempfile", "uuid", "secrets")])
def test_random_state_differs_between_executions(preload):
    code = """
    import random, tempfile, uuid, os
    print(random.random(), random.getrandbits(64), uuid.uuid4(), os.urandom(4).hex(),
          next(tempfile._get_candidate_names()), random.Random().random(), sep="\\n")
    """
    with sidexec.ExecutionManager(preload=preload, env=ENVIRONMENT) as manager:
        ids = [manager.start_with_code(code).id for _ in range(3)]
        lines = [completed(manager.wait(id).data).output.split() for id in ids]
    assert len(lines[0]) == 6
    for values in zip(*lines):
        assert len(set(values)) == 3


def test_an_execution_starts_clean(run, plain):
    dirty = """
    import builtins, os, sys, signal, json, threading, warnings, gc, atexit, locale, tempfile
    builtins.leaked = json.leaked = sys.leaked = os.environ["LEAKED"] = "yes"
    leaked = 1
    os.chdir("/")
    os.umask(0o777)
    sys.path.insert(0, "/leaked")
    sys.modules["leaked"] = json
    sys.argv.append("leaked")
    sys.setrecursionlimit(500)
    signal.signal(signal.SIGUSR1, lambda *a: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    threading.leaked = 1
    gc.disable()
    warnings.simplefilter("error")
    print = None
    builtins.print = None
    del builtins.len
    """
    clean = """
    import builtins, os, sys, signal, json, threading, warnings, gc
    print([hasattr(m, "leaked") for m in (builtins, sys, json, threading)], "LEAKED" in os.environ,
          "leaked" in globals(), os.getcwd(), os.umask(0), sys.path, "leaked" in sys.modules, sys.argv,
          sys.getrecursionlimit(), signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT),
          signal.pthread_sigmask(signal.SIG_BLOCK, ()), gc.isenabled(), len(warnings.filters), sep="\\n")
    """
    before = completed(run(clean)).output
    for _ in range(2):
        completed(run(dirty))
        assert completed(run(clean)).output == before
    assert before == plain(textwrap.dedent(clean)).stdout


SHADOWS = [
    "json",
    "socket",
    "traceback",
    "linecache",
    "ast",
    "unicodedata",
    "_colorize",
    "os",
    "signal",
    "threading",
    "io",
    "asyncio",
    "warnings",
    "_signal",
    "marshal",
    "select",
    "ctypes",
    "protocol",
    "resource",
]


def test_files_named_like_modules_do_not_break_the_library(tmp_path):
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"print('shadow {name}')\nraise ImportError('shadow')")
    limits = sidexec.Limits(open_files=64)
    with sidexec.ExecutionManager(cwd=tmp_path, env=ENVIRONMENT) as manager:

        def run(code, **options):
            id = manager.start_with_code(code, **options).id
            return manager.wait(id).data

        # In each snippet whose traceback needs it, before and after the launcher has loaded it.
        for _ in range(2):
            data = run("x = ('é', 1 / 0)")
            assert data.output == "" and data.error.endswith(": division by zero\n"), data
        for _ in range(2):
            data = completed(run("report_progress(5)\nreport_result([1])\nreturn {'a': 1}"))
            assert (data.result, data.output, data.error_output) == ({"a": 1}, "", "")
            data = run("x = 1\n1 / 0")
            assert data.error.startswith("ZeroDivisionError: division by zero\n\nTraceback")
            assert "\n    1 / 0\n" in data.error
            assert data.output == ""
            assert completed(run("return 1", limits=limits)).output == ""
            assert completed(run("x: int = 1\nreturn x")).result == 1


def test_a_module_in_the_current_directory_can_be_imported(tmp_path, run):
    (tmp_path / "mine.py").write_text("x = 1")
    data = completed(run("import mine, sys\nprint(mine.x, sys.path[0] == '')", cwd=tmp_path))
    assert data.output == "1 True\n"


def test_standard_input_is_empty(run):
    data = completed(run("import os, sys\nprint(repr(os.read(0, 9)), repr(sys.stdin.readline()))"))
    assert data.output == "b'' ''\n"


def test_only_the_streams_and_one_channel_are_open(run):
    code = """
    import os, subprocess
    fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
    fds = [fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}")]
    print(len(fds) - 3, [fd for fd in fds if os.get_inheritable(fd)])
    print(subprocess.run(["ls", "/proc/self/fd"], capture_output=True, text=True).stdout.split(),
          flush=True)
    """
    for _ in range(2):
        assert completed(run(code)).output == "1 [0, 1, 2]\n['0', '1', '2', '3']\n"


def test_params_are_there_as_given(run):
    params = {"a": [1, 2.5, None, True, "ü\0"], "b": {"c": {}}, "": 0, "big": 2**70}
    data = completed(run("print(type(params).__name__)\nreturn params", params))
    assert data.output == "dict\n"
    assert data.result == params


# -- exit codes


EXITS = {
    "end": "pass",
    "exit": "import sys; sys.exit()",
    "exit 0": "import sys; sys.exit(0)",
    "exit 3": "import sys; sys.exit(3)",
    "exit None": "import sys; sys.exit(None)",
    "exit text": "import sys; sys.exit('text ü')",
    "exit True": "import sys; sys.exit(True)",
    "exit False": "import sys; sys.exit(False)",
    "exit -1": "import sys; sys.exit(-1)",
    "exit 256": "import sys; sys.exit(256)",
    "exit 2**70": "import sys; sys.exit(2**70)",
    "exit tuple": "import sys; sys.exit((1, 2))",
    "exit 1.5": "import sys; sys.exit(1.5)",
    "exit object": "import sys\nclass C:\n    def __str__(self): return 'an object'\nsys.exit(C())",
    "SystemExit": "raise SystemExit(4)",
    "SystemExit of two": "raise SystemExit(4, 5)",
    "SystemExit class": "raise SystemExit",
    "subclass": "class E(SystemExit): pass\nraise E(5)",
    "site's exit": "exit(6)",
    "site's quit": "quit()",
    "in a function": "def f():\n    import sys\n    sys.exit(7)\ntry:\n    f()\nfinally:\n    print('out')",
    "os._exit 0": "import os; os._exit(0)",
    "os._exit 3": "import os; os._exit(3)",
    "exception": "1 / 0",
    "exit in finally": "import sys\ntry:\n    1 / 0\nfinally:\n    sys.exit(8)",
    "exit in atexit": "import atexit, sys\natexit.register(sys.exit, 9)",
    "raise in atexit": "import atexit\n@atexit.register\ndef f():\n    1 / 0\natexit.register(print, 'other')",
    "exit in a thread": "import threading, sys\nt = threading.Thread(target=sys.exit, args=(3,))\nt.start()\nt.join()",
    "raise in a thread": "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()",
    "SIGSEGV": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "SIGKILL": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "SIGUSR1": "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)",
    "abort": "import os; os.abort()",
    "interrupt": "raise KeyboardInterrupt",
    "interrupt by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "interrupt of a subclass": "class Interrupt(KeyboardInterrupt): pass\nraise Interrupt",
    "interrupt with a daemon thread": "import threading\n"
    "threading.Thread(target=threading.Event().wait, daemon=True).start()\nraise KeyboardInterrupt",
    "interrupt while blocked": "import signal\nsignal.pthread_sigmask(0, [signal.SIGINT])\nraise KeyboardInterrupt",
    "exit while printing": "import sys\nprint('a', end='')\nsys.exit()",
}


@pytest.mark.parametrize("name", EXITS)
def test_the_exit_is_that_of_a_plain_interpreter(run, name, plain):
    code = EXITS[name]
    done = plain(code)
    data = run(code)
    code = done.returncode
    assert data.exit_code == code
    assert data.status == ("completed" if code == 0 else "failed")
    assert data.output == done.stdout
    if name.startswith("exit") and "in" not in name and "**" not in name:
        assert data.error_output == done.stderr
    if code < 0 and "interrupt" not in name:
        import signal

        assert data.error == f"killed by {signal.Signals(-code).name}"
    elif "ception" in name or "interrupt" in name:
        assert data.error.startswith(done.stderr.splitlines()[-1].removeprefix("__main__."))
    else:
        told = f"exit code {code}" if code else None
        assert data.error in (told, f"{told}: {done.stderr.rstrip()}")


def test_a_real_segmentation_fault_is_told(run):
    data = run("import ctypes\nctypes.string_at(0)")
    assert data.error == "killed by SIGSEGV"
    assert data.exit_code == -11


# -- processes and threads in a snippet


def test_a_forked_child_that_runs_to_the_end_reports_nothing(run):
    code = """
    import os, sys
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        print("parent")
        return "parent"
    print("child")
    return "child"
    """
    data = completed(run(code))
    assert data.output == "child\nparent\n"
    assert data.result == "parent"
    assert data.error_output == ""


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("1 / 0", 1),
        ("sys.exit(3)", 3),
        ("os._exit(4)", 4),
        ("pass", 0),
        ("raise KeyboardInterrupt", -2),
    ],
)
def test_a_forked_child_ends_by_its_own_exit_code(run, end, expected):
    code = f"""
    import os, sys
    pid = os.fork()
    if not pid:
        report_progress(50)
        {end}
        sys.exit(0)
    status = os.waitpid(pid, 0)[1]
    print(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status))
    report_progress(10)
    return "parent"
    """
    data = completed(run(code))
    assert data.output == f"{expected}\n"
    assert data.result == "parent"
    assert ("ZeroDivisionError" in data.error_output) == (end == "1 / 0")


def test_a_forked_child_ends_as_in_a_plain_interpreter(run, plain):
    code = textwrap.dedent(
        """
        import atexit, os, sys
        class Loud:
            def __del__(self):
                print("del", os.getpid() == parent, flush=True)
        parent = os.getpid()
        loud = Loud()
        atexit.register(lambda: print("atexit", os.getpid() == parent, flush=True))
        file = os.fdopen(os.dup(1), "w")
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        file.write("file %s\\n" % (os.getpid() == parent))
        """
    )
    data = completed(run(code))
    assert sorted(data.output.split("\n")) == sorted(plain(code).stdout.split("\n"))
    assert data.error_output == ""


def test_children_are_ended_by_sigterm_as_usual(run):
    code = """
    import os, signal, time
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(w, b"x")
            time.sleep(60)
        finally:
            os.write(2, b"finally in the child")
    os.read(r, 1)
    os.kill(pid, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]))
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    print(-child.wait())
    """
    data = completed(run(code))
    assert data.output == "15\n15\n"
    assert data.error_output == ""


@pytest.mark.parametrize("method", one_in(2, ["spawn", "forkserver", "fork"]))
def test_multiprocessing_works(tmp_path, manager, method):
    block = tmp_path / "block.py"
    block.write_text(
        textwrap.dedent(
            f"""
            import multiprocessing
            def square(x):
                return x * x
            def sleep(up):
                import time
                up.set()
                time.sleep(60)
            if __name__ == "__main__":
                context = multiprocessing.get_context({method!r})
                with context.Pool(2) as pool:
                    print(pool.map(square, range(4)))
                up = context.Event()
                process = context.Process(target=sleep, args=(up,))
                process.start()
                up.wait()
                process.terminate()
                process.join()
                print(process.exitcode)
            """
        )
    )
    started = manager.start_with_action_block(block, timeout=20.0).raise_for_error()
    data = completed(manager.wait(started.data.side_execution_id).data)
    assert data.output == "[0, 1, 4, 9]\n-15\n"
    assert data.error_output == ""


def test_a_spawned_child_is_ended_by_sigterm_however_young_it_is(run):
    code = """
    import multiprocessing, time
    context = multiprocessing.get_context("spawn")
    for _ in range(10):
        process = context.Process(target=time.sleep, args=(60,))
        process.start()
        process.terminate()
        process.join()
        assert process.exitcode == -15
    return "all"
    """
    assert completed(run(code, timeout=20.0)).result == "all"


def test_a_child_is_ended_by_sigterm_however_young_it_is(run):
    code = """
    import os, signal
    for _ in range(200):
        pid = os.fork()
        if not pid:
            while True:
                signal.pause()
        os.kill(pid, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
    return "all"
    """
    assert completed(run(code, timeout=20.0)).result == "all"


def test_multiprocessing_by_fork_works_in_code(run):
    code = """
    import multiprocessing
    context = multiprocessing.get_context("fork")
    def square(x):
        return x * x
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put(square(5)))
    process.start()
    first = queue.get()
    process.join()
    with context.Pool(2) as pool:
        return [first, pool.map(square, range(4)), process.exitcode]
    """
    data = completed(run(code))
    assert data.result == [25, [0, 1, 4, 9], 0]
    assert data.error_output == ""


def test_subprocess_works(run):
    code = """
    import subprocess, sys
    done = subprocess.run([sys.executable, "-c", "print(input())"], input="in", capture_output=True, text=True)
    print(repr(done.stdout), done.returncode, flush=True)
    subprocess.check_call(["echo", "straight through"])
    print(subprocess.call(["sh", "-c", "kill -9 $$"]))
    """
    assert completed(run(code)).output == "'in\\n' 0\nstraight through\n-9\n"


def test_the_result_is_there_before_a_thread_ends(manager, run):
    code = """
    import threading, time, os
    def work():
        while not os.path.exists(params["file"]):
            time.sleep(0.01)
        print("thread done")
    threading.Thread(target=work).start()
    return "early"
    """
    with tempfile.TemporaryDirectory() as directory:
        file = os.path.join(directory, "go")
        id = manager.start_with_code(code, {"file": file}).id
        eventually(lambda: manager.get_status(id).data.result == "early")
        assert manager.get_status(id).data.status == "running"
        open(file, "w").close()
        data = completed(manager.wait(id).data)
    assert data.output == "thread done\n"
    assert data.result == "early"


def test_a_failure_is_told_before_a_thread_ends(manager):
    code = """
    import threading, time, os
    def work():
        while not os.path.exists(params["file"]):
            time.sleep(0.01)
    threading.Thread(target=work).start()
    1 / 0
    """
    with tempfile.TemporaryDirectory() as directory:
        file = os.path.join(directory, "go")
        id = manager.start_with_code(code, {"file": file}).id
        eventually(lambda: "ZeroDivisionError" in manager.get_status(id).data.error_output)
        open(file, "w").close()
        data = manager.wait(id).data
    assert data.status == "failed"
    assert data.error.startswith("ZeroDivisionError")


def test_daemon_threads_at_the_end_make_no_noise(run):
    code = """
    import threading, time
    started = threading.Barrier(5)
    def spin(sleep):
        started.wait()
        while True:
            sum(range(100))
            time.sleep(sleep)
            threading.current_thread().name
    for sleep in (0, 0, 0.0001, 1):
        threading.Thread(target=spin, args=(sleep,), daemon=True).start()
    started.wait()
    print("end")
    """
    for _ in range(5):
        data = completed(run(code))
        assert (data.output, data.error_output) == ("end\n", "")


def test_a_daemon_thread_may_write_to_a_file_until_the_end(run):
    data = run("""
    import io, threading, time
    class File(io.RawIOBase):
        def writable(self): return True
        def write(self, data):
            if self.closed: raise ValueError("closed too early")
            return len(data)
        def close(self, sleep=time.sleep):
            super().close()
            sleep(0.05)
    file = File()
    def spin():
        while True:
            file.write(b"x")
            time.sleep(0.001)
    threading.Thread(target=spin, daemon=True).start()
    """)
    assert (data.status, data.error_output) == ("completed", "")


# -- nothing written is lost


ENDS = {
    "__del__ of globals": "class C:\n    def __init__(self, x): self.x = x\n    def __del__(self): print(self.x)\n"
    "a = C('a')\nb = C('b')\n_c = C('c')",
    "__del__ uses globals": "import os\nclass C:\n    def __del__(self): print('del', os.sep)\nc = C()",
    "__del__ in a cycle": "class C:\n    def __del__(self): print('del')\nc = C()\nc.c = c",
    "__del__ of a cycle without a name": "class C:\n    def __del__(self): print('del')\nc = C()\nc.c = c\ndel c",
    "generator's finally": "def g():\n    try:\n        yield\n    finally:\n        print('finally')\ni = g()\nnext(i)",
    "context in a generator": "import contextlib\n@contextlib.contextmanager\ndef m():\n    print('in')\n    try:\n"
    "        yield\n    finally:\n        print('out')\nx = m()\nx.__enter__()",
    "atexit": "import atexit\natexit.register(print, 1)\natexit.register(print, 2)\n@atexit.register\ndef f():\n    print(x)\nx = 3",
    "atexit in atexit": "import atexit\natexit.register(lambda: atexit.register(print, 'inner'))",
    "atexit before __del__": "import atexit\natexit.register(print, 'atexit')\nclass C:\n    def __del__(self): print('del')\nc = C()",
    "atexit after threads": "import atexit, threading, time\natexit.register(print, 'atexit')\n"
    "e = threading.Event()\ndef f():\n    e.wait()\n    print('thread')\nthreading.Thread(target=f).start()\nprint('end')\ne.set()",
    "finalize": "import weakref\nclass C: pass\nc = C()\nweakref.finalize(c, print, 'finalize')",
    "temporary directory": "import tempfile, os\nd = tempfile.TemporaryDirectory()\nprint(os.path.isdir(d.name))",
    "executor": "import concurrent.futures, time\np = concurrent.futures.ThreadPoolExecutor(1)\n"
    "p.submit(lambda: print('task'))\nprint('end') if 0 else None",
    "no newline": "import sys\nsys.stdout.write('no newline')",
    "binary layer": "import sys\nsys.stdout.buffer.write(b'binary')\nsys.stdout.buffer.flush()",
    "replaced stream": "import sys, io\nsys.stdout = open(1, 'w', closefd=False)\nprint('replaced')",
    "wrapped stream": "import sys, io\nsys.stdout = io.TextIOWrapper(open(1, 'wb', closefd=False), 'latin-1')\nprint('wrapped')",
    "closed stream": "import sys\nprint('a')\nsys.stdout.close()",
    "no stream": "import sys\nsys.stdout = None\nprint('nothing')",
    "fd 1": "import os\nos.write(1, b'raw')",
    "printf": "import ctypes\nctypes.CDLL(None).printf(b'from C')",
    "print after end of file": "import os, sys\nprint('x', flush=True)\nos.dup2(os.open('/dev/null', os.O_WRONLY), 1)\nprint('y')",
    "main's attribute": "import __main__, atexit\natexit.register(lambda: print(__main__.x))\nx = 1",
    "unraisable": "class C:\n    def __del__(self): 1 / 0\nc = C()\ndel c\nprint('end')",
}


def in_order(name, output):
    """A collector without the GIL goes by addresses: the order of its finalizers is any."""
    return sorted(output.splitlines()) if IS_FREE_THREADED and "__del__" in name else output


@pytest.mark.parametrize("name", ENDS)
def test_the_end_is_that_of_a_plain_interpreter(run, name, plain):
    code = ENDS[name]
    done = plain(code)
    data = run(code)
    assert in_order(name, data.output) == in_order(name, done.stdout)
    assert data.exit_code == done.returncode
    shown = [line for line in data.error_output.splitlines() if line[:1] != " "]
    assert [re.sub("0x.*", "", x) for x in shown] == [
        re.sub("0x.*", "", line) for line in done.stderr.splitlines() if line[:1] != " "
    ]


def test_temporary_directories_are_removed_at_the_end(run):
    code = "import tempfile\nd = tempfile.TemporaryDirectory()\nprint(d.name, end='')"
    data = completed(run(code))
    assert not os.path.exists(data.output)


PRELOADED_ENDS = ["finalize", "temporary directory", "executor", "atexit", "__del__ of globals"]


@pytest.mark.parametrize("name", one_in(2, PRELOADED_ENDS))
def test_the_end_is_the_same_with_preloaded_modules(name, plain):
    preload = ["weakref", "tempfile", "concurrent.futures.thread", "atexit", "logging", "asyncio"]
    with sidexec.ExecutionManager(preload=preload, env=ENVIRONMENT) as manager:
        data = completed(finish(manager, ENDS[name]))
    assert in_order(name, data.output) == in_order(name, plain(ENDS[name]).stdout)


WRITES = {
    "print": "print(data, end='')",
    "write": "sys.stdout.write(data)",
    "binary": "sys.stdout.buffer.write(data.encode())",
    "fresh file": "with open(1, 'w', closefd=False) as f: f.write(data)",
    "error output": "sys.stderr.write(data)",
    "lines": "for i in range(0, len(data), 64): print(data[i:i + 64], end='')",
}


@pytest.mark.parametrize("name", one_in(4, WRITES))
def test_no_byte_is_lost_when_signals_interrupt_a_write(name):
    code = f"""
    import signal, sys, time
    ticks = 0
    def tick(signum, frame):
        global ticks
        ticks += 1
    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    data = "0123456789abcdef" * 250_000
    {WRITES[name]}
    signal.setitimer(signal.ITIMER_REAL, 0)
    return ticks
    """
    with sidexec.ExecutionManager(env=ENVIRONMENT) as manager:
        data = completed(finish(manager, code))
    written = data.error_output if name == "error output" else data.output
    assert data.result > 0
    assert len(written) == 4_000_000
    assert written == "0123456789abcdef" * 250_000


@pytest.mark.parametrize("name", one_in(3, ["print", "write", "binary", "error output"]))
def test_no_byte_is_lost_when_a_small_pipe_is_interrupted(name):
    code = f"""
    import fcntl, signal, sys
    for fd in (1, 2):
        fcntl.fcntl(fd, 1031, 4096)
    signal.signal(signal.SIGALRM, lambda *a: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    data = "0123456789abcdef" * 65536
    {WRITES[name]}
    signal.setitimer(signal.ITIMER_REAL, 0)
    """
    with sidexec.ExecutionManager(env=ENVIRONMENT) as manager:
        data = completed(finish(manager, code))
    written = data.error_output if name == "error output" else data.output
    assert len(written) == 16 * 65536
    assert written == "0123456789abcdef" * 65536


def test_nothing_is_lost_by_os_exit_or_a_kill(run):
    for end in ("os._exit(0)", "os.kill(os.getpid(), 9)"):
        data = run(f"import os, sys\nprint('out', end='')\nsys.stderr.write('err')\n{end}")
        assert (data.output, data.error_output) == ("out", "err")


def test_carriage_returns_and_bytes_come_through(run):
    data = completed(run("import os\nos.write(1, b'a\\r\\nb\\rc\\x00d\\xff\\n')"))
    assert data.output == "a\r\nb\rc\0d\ufffd\n"


def test_the_raw_files_of_the_streams_are_there(run):
    code = (
        "import io, sys\nfor s in (sys.stdout, sys.stderr):\n    raw = s.buffer.raw\n"
        "    print(isinstance(raw, io.RawIOBase), raw.name, raw.fileno(), raw.closefd, raw.write(b'raw\\n'))"
    )
    data = completed(run(code))
    assert data.output == "raw\nTrue <stdout> 1 False 4\nTrue <stderr> 2 False 4\n"
    assert data.error_output == "raw\n"


# -- code that takes away what the library needs


def test_modules_that_are_thrown_away_are_not_missed(run):
    assert completed(run("import sys\nprint('end')\nsys.modules.clear()")).output == "end\n"
    limits = sidexec.Limits(open_files=64)
    code = "import sys\nsys.modules.pop('resource', None)\nsys.modules['resource'] = 5"
    assert completed(run(code, limits=limits)).error_output == ""


# Since 3.13, a plain interpreter, too, has `linecache` loaded when it begins.
@pytest.mark.parametrize(
    "name", one_in(3, ["json", "opcode", "traceback", *(["linecache"] if NEW < (3, 13) else [])])
)
def test_a_block_may_have_modules_named_like_those_of_the_library(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("MINE = 1\n")
    (tmp_path / "__main__.py").write_text(
        f"import {name}\nprint({name}.MINE, flush=True)\n"
        "if params['fail']: 1 / 0\n"
        f"import {name}\nreturn {{'mine': {name}.MINE}}\n"
    )
    for fail in (False, True):
        # The first execution: later ones find the library's, which are loaded already.
        with sidexec.ExecutionManager(env=ENVIRONMENT) as manager:
            started = manager.start_with_action_block(tmp_path, {"fail": fail})
            data = manager.wait(started.data.side_execution_id).data
            assert data.output == "1\n"
            assert (data.result == {"mine": 1}) is not fail, data
            if fail:
                assert data.error.startswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("first", [True, False])
def test_a_busy_loop_is_asked_whatever_is_named_opcode(tmp_path, first):
    (tmp_path / "opcode.py").write_text("ADD = 1\n")
    (tmp_path / "__main__.py").write_text(
        "try:\n    print('ready', flush=True)\n    while True: pass\n"
        "except Exception as error: print('wrong', error)\n"
        "finally: print('clean')\n"
    )
    with sidexec.ExecutionManager(env=ENVIRONMENT) as manager:
        if not first:
            manager.wait(manager.start_with_code("pass").id)
        id = manager.start_with_action_block(tmp_path).data.side_execution_id
        eventually(lambda: manager.get_status(id).data.output == "ready\n")
        data = manager.stop(id).data
        assert (data.output, data.error_output, data.forced) == ("ready\nclean\n", "", False)


@pytest.mark.parametrize("line", [1, 99, 0, -5, None])
def test_a_syntax_error_of_the_snippets_own_making(run, line):
    data = run(f"raise SyntaxError('bad', ('<snippet>', {line}, 1, None))")
    assert data.status == "failed"
    assert data.error.startswith("SyntaxError: bad")
    assert "sidexec" not in data.error_output and "IndexError" not in data.error_output


def test_a_hook_for_errors_that_fails_hides_no_error(run, plain):
    code = "import sys\ndef hook(*args): raise ValueError('hook')\nsys.excepthook = hook\n1 / 0"
    data = run(code)
    done = plain(code)
    assert data.error.startswith("ZeroDivisionError: division by zero\n")
    assert data.error_output.replace('"<snippet>"', '"<string>"').count("<string>") == 2
    told = [line for line in data.error_output.splitlines() if line and line[0] != " "]
    assert told == [line for line in done.stderr.splitlines() if line and line[0] != " "]


@pytest.mark.parametrize("code", ["import os\nos.close(1)\nprint('x')", "report_progress('x')"])
def test_an_error_shows_no_code_but_the_users(run, code):
    data = run(code)
    assert data.status == "failed"
    files = set(re.findall('File "(.*?)"', data.error + data.error_output))
    assert files == {"<snippet>"}


def test_code_of_the_users_that_is_named_string_is_shown_by_any_version():
    others = [python for python in INTERPRETERS if python != os.path.realpath(sys.executable)]
    for python in others[:2] or [sys.executable]:
        with sidexec.ExecutionManager(python=python) as manager:
            started = manager.start_with_code("exec('def f(): 1 / 0')\nf()")
            data = manager.wait(started.data.side_execution_id).data
            assert 'File "<string>", line 1, in f' in data.error


def test_large_params_take_no_longer_than_their_size_says(run):
    data = run("return len(params['text'])", {"text": "x" * 20_000_000})
    assert data.result == 20_000_000


def test_an_ask_that_comes_while_a_report_fails_is_not_lost(manager):
    """The channel is closed: what was held back is raised all the same."""
    code = """
import os, signal
write = os.write
def slow(fd, data):
    if fd > 2:
        os.kill(os.getpid(), signal.SIGTERM)
        raise BrokenPipeError
    return write(fd, data)
os.write = slow
try:
    try: report_progress(5)
    except OSError: print("not asked")
    while True: pass
finally:
    print("clean")
"""
    id = manager.start_with_code(code).id
    eventually(lambda: manager.get_status(id).data.output)
    data = manager.stop(id).data
    assert data.output == "clean\n"


def test_a_preloaded_module_may_write_much_to_its_standard_error(tmp_path):
    (tmp_path / "chatty.py").write_text(
        "import sys\nfor n in range(10_000): print('deprecated, line', n, file=sys.stderr)\n"
    )
    (tmp_path / "broken.py").write_text("import chatty\nraise ImportError('broken on purpose')")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    with sidexec.ExecutionManager(env=environment, preload=["chatty"]) as manager:
        assert finish(manager, "return 1").result == 1
    with sidexec.ExecutionManager(env=environment, preload=["broken"]) as manager:
        assert "broken on purpose" in manager.start_with_code("return 1").error


@pytest.mark.parametrize("preload", [[], ["registers"]])
def test_exit_handlers_of_preloaded_modules_run_in_the_launcher(tmp_path, preload):
    (tmp_path / "registers.py").write_text(
        "import atexit, pathlib\natexit.register(pathlib.Path(__file__).with_name('over').touch)\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    with sidexec.ExecutionManager(env=environment, preload=preload) as manager:
        assert finish(manager, "return 1").result == 1
        assert not (tmp_path / "over").exists()
    assert (tmp_path / "over").exists() == bool(preload)


def test_an_exit_with_a_message_is_told(run):
    data = run("import sys\nsys.exit('bad config')")
    assert (data.error, data.error_output) == ("exit code 1: bad config", "bad config\n")
