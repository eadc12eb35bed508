"""Small programs that mean the same in a plain interpreter and as a snippet.

By name, for the version that runs the tests. `ALONE` are those that need an interpreter of
their own to compare with: what they do goes by how it was started, or how it ends.
"""

import sys

NEW = sys.version_info

# What a module says of its annotations; on 3.14 by all that can be asked for them.
SHOW = """
import sys
_m = sys.modules["__main__"]
def _show(get):
    try:
        print(get())
    except Exception as e:
        print(type(e).__name__, e)
if sys.version_info >= (3, 14):
    import annotationlib
    for _format in annotationlib.Format.FORWARDREF, annotationlib.Format.STRING:
        _show(lambda: annotationlib.get_annotations(_m, format=_format))
    _show(lambda: (__annotate__.__name__, __annotate__.__qualname__, __annotate__.__module__))
    _show(lambda: __annotate__(annotationlib.Format.VALUE))
    _show(lambda: sorted(__conditional_annotations__))
_show(lambda: _m.__annotations__)
_ours = "params", "report_progress", "report_result"
print([each for each in globals() if each not in _ours and each != "__annotations__"])
"""

ANNOTATIONS = {
    "value": "x: int = 1",
    "no value": "x: int",
    "forward": "x: 'Later'\nclass Later: pass",
    "lazily forward": "try:\n    x: Later\nexcept NameError: print('at once')\nclass Later: pass",
    "undefined": "try:\n    x: nothing = 1\nexcept NameError: print('at once')",
    "twice": "x: int\nx: str",
    "order": "b: int\na: str\nb: float",
    "not come to": "if 0:\n    x: int\ny: str",
    "else": "if params_ := 0:\n    x: int\nelse:\n    y: str",
    "for": "for i in range(2):\n    x: i\nelse:\n    y: str",
    "empty for": "for i in ():\n    x: int",
    "while": "i = 0\nwhile i < 2:\n    i += 1\n    x: int = i",
    "try": "try:\n    x: int = 1 / 0\nexcept ZeroDivisionError:\n    y: str\nfinally:\n    z: float",
    "with": "import io\nwith io.StringIO() as f:\n    x: int",
    "match": "match 1:\n    case 2:\n        x: int\n    case _:\n        y: int",
    "attribute": "class A: pass\nA.x: print('note') = 1\nprint(A.x)",
    "item": "d = {}\nd['k']: print('note') = 1",
    "parentheses": "(x): print('note') = 1",
    "lambda": "n = 1\nx: (lambda: n)()",
    "comprehension": "n = 2\nx: [n * i for i in range(3)]\ny: {i: n for i in 'ab'}",
    "string": "x: 'int' = 1\ny: f'{1}{2!r}'",
    "subscript": "x: dict[str, list[int]]\ny: int | None",
    "private name": "__x: int = 1\n_X__y: str",
    "non-ASCII": "größe: int = 1\nﬁ: str",
    "read at once": "x: int\nprint(_m.__annotations__)\ny: str",
    "assigned": "x: int\n__annotations__ = {'own': 1}",
    "deleted": "x: int = 1\ndel x",
    "changed": "n = int\nx: n\nn = str",
    "class": "class C:\n    x: int\n    if 0:\n        y: str\nprint(C.__annotations__)",
    "class, forward": "class C:\n    x: 'D'\nclass D: pass\nprint(C.__annotations__)",
    "function": "def f(a: int, *b: str, c: float = 1) -> None:\n    d: nothing\nprint(f.__annotations__)",
    "method": "class C:\n    def f(self, a: 'C') -> 'C': pass\nprint(C.f.__annotations__)",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass C:\n    x: int\n    y: str = ''\n"
    "print(C(1), [(f.name, f.type) for f in dataclasses.fields(C)])",
    "typed": "import typing\nclass C(typing.NamedTuple):\n    x: int\nclass D(typing.TypedDict):\n"
    "    y: str\nprint(C(1), typing.get_type_hints(C), typing.get_type_hints(D))",
    "global in a function": "def f():\n    global x\n    x = 1\nf()\nx: int",
    "many": "\n".join(f"x{n}: {n}" for n in range(300)),
    "none": "x = 1",
}

# Each of these where it is come to, where it is not, and where that goes by more than one thing.
BLOCKS = {
    "if": "if 1:\n{}\nelse:\n    z: bytes",
    "if not": "if 0:\n{}\nelse:\n    z: bytes",
    "for": "for i in range(2):\n{}\n    if i: continue\n    z: bytes",
    "while": "i = 2\nwhile i:\n    i -= 1\n{}\nelse:\n    z: bytes",
    "try": "try:\n{}\n    1 / 0\n    z: bytes\nexcept ZeroDivisionError:\n    w: set",
    "handler": "try:\n    1 / 0\nexcept ZeroDivisionError:\n{}\nelse:\n    z: bytes",
    "finally": "try:\n    z: bytes\nfinally:\n{}",
    "with": "import contextlib\nwith contextlib.suppress(ZeroDivisionError):\n    1 / 0\n{}",
    "case": "match [1, 2]:\n    case [1]:\n        z: bytes\n    case [1, n]:\n    {}",
    "nested": "for i in 'ab':\n    if i == 'b':\n        try:\n        {}\n        finally: pass",
    "class": "class C:\n{}\nprint(C.__annotations__)",
    "function": "def f():\n    global x\n{}\nf()",
}
NOTES = {
    "plain": "x: int",
    "value": "x: int = 1",
    "both": "x: int = 1; y: str",
    "attribute": "sys.x: print('note') = 1",
    "undefined": "x: nothing",
    "two": "x: int; x: str",
    "lambda": "x: (lambda: i)",
    "text": "x: 'text' = 'a'",
    "generator": "x: list(j for j in 'ab')",
    "type": "x: list[dict[str, int | None]]",
    "conditional": "x: int if y else str",
    "call": "x: print('note') = print('value')",
}
for block, template in BLOCKS.items():
    for note, line in NOTES.items():
        ANNOTATIONS[f"{note} in {block}"] = template.format(f"    {line}")

PROGRAMS = {
    **{
        f"annotations: {name}": f"import sys\n_m = sys.modules['__main__']\n{code}\n{SHOW}"
        for name, code in ANNOTATIONS.items()
    },
    **{
        f"future annotations: {name}": "from __future__ import annotations\nimport sys\n"
        f"_m = sys.modules['__main__']\n{code}\n{SHOW}"
        for name, code in ANNOTATIONS.items()
    },
    "annotation is a walrus": "x: (y := 1)",
    "annotation yields": "x: (yield)",
    "annotated global": "global x\nx: int",
    "annotated tuple": "(x, y): int",
    "undefined annotation": "x: nothing\nprint('later')",
    "match": "match {'a': [1, 2]}:\n    case {'a': [x, *y], **z} if (w := x): print(x, y, z, w)",
    "match, captured twice": "match 1:\n    case (x, x): pass",
    "match, unreachable": "match 1:\n    case x: pass\n    case 2: pass",
    "walrus": "print([y := i for i in range(3)], y)\nwhile (n := y) > 1: y -= 1\nprint(n)",
    "walrus in a class": "class C:\n    x = [y := i for i in range(2)]",
    "comprehension": "x = 1\nprint([[x, i] for i in range(2) for x in 'ab'], x)\n[nothing for _ in 'a']",
    "comprehension, locals": "print([sorted(each for each in locals() if each == 'i') for i in 'a'])",
    "comprehension in a class": "class C:\n    a = 1\n    b = [i for i in [a]]\n    try:\n"
    "        c = [a for _ in 'a']\n    except NameError as e: print(e)\n",
    "decorators": "def d(*a):\n    print(a)\n    return lambda f: f\n@d(1)\n@d(2)\ndef f(): pass\n"
    "@(lambda c: c.x)\nclass C:\n    x = 3\nprint(C)",
    "async generator at the end": "import asyncio\nasync def g():\n    try:\n        yield 1\n"
    "        yield 2\n    finally:\n        print('closed')\nasync def main():\n"
    "    async for x in g():\n        print(x)\n        break\nasyncio.run(main())",
    "async generator left": "async def g(): yield 1\ng()\nkept = g()\nprint('end')",
    "generator at the end": "def g():\n    try: yield 1\n    finally: print('closed')\n"
    "i = g()\nprint(next(i))",
    "coroutine left": "async def f(): pass\nf()",
    "loop by hand": "import asyncio\nasync def f(): return 7\nloop = asyncio.new_event_loop()\n"
    "print(loop.run_until_complete(f()))\nloop.close()",
    "no loop": "import asyncio\ntry:\n    asyncio.get_running_loop()\nexcept RuntimeError as e: print(e)",
    "no policy": "import asyncio, warnings\nwarnings.simplefilter('error')\ntry:\n"
    "    print(type(asyncio.get_event_loop_policy()).__name__)\nexcept Warning as e: print(e)\n"
    "try:\n    asyncio.get_event_loop().close()\nexcept Exception as e: print(type(e), e)",
    "star import": "from string import *\nprint(digits)\nfrom nothing_at_all import *",
    "star import in a block": "for _ in 'ab':\n    from os.path import *\nprint(join('a', 'b'))",
    "star import binds": "digits = 1\ndef f(): return digits\nfrom string import *\nprint(f())",
    "docstring": "'''A doc.\n\n  More.'''\nprint(repr(__doc__))",
    "docstring, bytes": "b'no doc'\nprint(repr(__doc__))",
    "global": "def f():\n    global a, b\n    a = b = 1\nf()\nprint(a + b)\nglobal c",
    "global too late": "x = 1\nglobal x",
    "class, global": "x = 1\nclass C:\n    global x\n    x = 2\nprint(x, hasattr(C, 'x'))",
    "class, nonlocal": "x = 1\nclass C:\n    nonlocal x",
    "names": "def f():\n    class A:\n        def g(self): return lambda: 0\n    return A\n"
    "print(f().g.__qualname__, f()().g().__qualname__)\nf()().h()",
    "exit": "import sys\nsys.exit(3)",
    "exit by text": "raise SystemExit('no')",
    "exit by tuple": "raise SystemExit((1, 2))",
    "exit in finally": "import sys\ntry: 1 / 0\nfinally: sys.exit(4)",
    "error": "def f(a):\n    return a / 0\nf(\n    1)",
    "error in a block": "for i in range(3):\n    with open('/dev/null') as f:\n        {}[i]",
    "error, chained": "try: 1 / 0\nexcept Exception as e: raise KeyError('k') from e",
    "error, context": "try: 1 / 0\nexcept Exception: nothing",
    "error in a class": "class C:\n    def __init__(self): self.nothing\nC()",
    "unbound": "del x",
    "unbound local": "def f():\n    x += 1\nf()",
    "warning": "import warnings\nwarnings.warn('look out')\nwarnings.warn('old', DeprecationWarning)",
    "syntax warning": "x = 1\nx is 1000\nassert (x, 'text')",
    "syntax error": "x = (1\ny = 2",
    "indentation": "if 1:\n    x\n  y",
    "finally leaves": "for i in range(2):\n    try: 1 / 0\n    finally: break\nprint(i)",
    "interrupt": "raise KeyboardInterrupt('now')",
    "at exit": "import atexit\natexit.register(print, 'last')\nprint('first')",
    "at exit, error": "import atexit\n@atexit.register\ndef f(): 1 / 0",
    "thread": "import threading\nt = threading.Thread(target=print, args=('in',))\nt.start()\nt.join()",
    "thread at the end": "import threading, time\ndef f():\n    time.sleep(0.05)\n    print('late')\n"
    "threading.Thread(target=f).start()\nprint('end')",
    "traced to the end": "import atexit, sys, threading\ndef trace(*a):\n    print(a[1], a[0].f_code.co_name)\n"
    "    return trace\natexit.register(lambda: 0)\nsys.settrace(trace)",
    "weak finalizer": "import weakref\nclass C: pass\nc = C()\nweakref.finalize(c, print, 'gone')",
    "pickle": "import pickle\nclass C:\n    x = 1\nprint(pickle.loads(pickle.dumps(C)).x)",
    "processes": "import multiprocessing\nprint(multiprocessing.get_start_method())\n"
    "print(multiprocessing.get_context('fork').Pool(1).map(abs, [-1, -2]))",
    "processes, as by default": "import concurrent.futures as c\nwith c.ProcessPoolExecutor(1) as p:\n"
    "    print(list(p.map(abs, [-1, -2])))",
    "processes, spawned": "import multiprocessing as m\np = m.get_context('spawn').Process(target=print,"
    " args=('in',))\np.start()\np.join()\nprint(p.exitcode)",
    "flags": "import sys\nprint(sys.flags, sys.warnoptions, sys._xoptions)",
    "frozen": "import sys, os\nprint(os.__spec__.origin, sys.modules['os'].__loader__, __spec__)",
    "stdlib": "import sys\nprint(sys.path, sys.meta_path, sys.path_hooks[0])",
    "monitoring": "import sys\nif hasattr(sys, 'monitoring'):\n    print(sys.monitoring.get_tool(3))\n"
    "    sys.monitoring.use_tool_id(3, 'x')\n    sys.monitoring.free_tool_id(3)\n"
    "    print([sys.monitoring.get_tool(n) for n in range(6)])",
    "GIL": "import sys\nprint(getattr(sys, '_is_gil_enabled', bool)())",
}
if NEW >= (3, 11):
    PROGRAMS |= {
        "except*": "try: raise ExceptionGroup('g', [ValueError(1), KeyError(2), OSError(3)])\n"
        "except* ValueError as e: print(e.exceptions)\nexcept* KeyError as e: print(e.exceptions)",
        "except*, nothing raised": "try: pass\nexcept* OSError: pass\nelse: print('else')",
        "except*, break": "for i in 'a':\n    try: pass\n    except* OSError: break",
        "except*, raises": "try: raise ExceptionGroup('g', [ValueError(1)])\nexcept* ValueError: 1 / 0",
        "note": "e = ValueError(1)\ne.add_note('a note')\nraise e",
        "star in a subscript": "def f(*a: *tuple[int]): pass\nprint(f.__annotations__, tuple[*(int,)])",
    }
if NEW >= (3, 12):
    MONITORING = "import sys\nm = sys.monitoring\nm.use_tool_id(m.COVERAGE_ID, 'x')\nseen = []\n"
    PROGRAMS |= {
        "monitoring, lines": f"{MONITORING}def line(code, n):\n    seen.append((code.co_name, n))\n"
        "    return m.DISABLE\nm.register_callback(m.COVERAGE_ID, m.events.LINE, line)\n"
        "m.set_events(m.COVERAGE_ID, m.events.LINE)\ndef f():\n    x = 1\nfor i in range(3):\n"
        "    if i > 1: f()\n    else: f(\n)\nm.free_tool_id(m.COVERAGE_ID)\nf()\nprint(seen)",
        "monitoring, calls": f"{MONITORING}m.register_callback(m.COVERAGE_ID, m.events.CALL,"
        " lambda code, at, f, x: seen.append((code.co_name, f.__name__)))\n"
        "def f(): len('')\nm.set_local_events(m.COVERAGE_ID, f.__code__, m.events.CALL)\n"
        "f()\nabs(1)\nf()\nprint(seen)",
        "type statement": "type X = list[Y]\ntype Y[T] = dict[T, X]\nprint(X, X.__value__, Y.__value__,"
        " Y.__type_params__, Y.__module__)\ntype Z = nothing\nZ.__value__",
        "type parameters": "def f[T: int, *Ts, **P](a: T) -> T: return a\nclass C[T](list[T]):\n"
        "    def g[U](self, a: U) -> T: pass\n    type V = T\nprint(f.__type_params__, C.__type_params__,"
        " C.g.__qualname__, C.V.__value__, C.__mro__, f.__annotations__, C.__orig_bases__)",
        "type parameter's bound": "def f[T: (print('lazy'), int)[1]](): pass\nprint('first')\n"
        "f.__type_params__[0].__bound__",
        "type parameter twice": "def f[T, T](): pass",
        "type at a block": "if 1:\n    type X = int\nfor type in 'a': print(type, X)",
        "f-string": "x = {'a': 1}\nprint(f'{x['a']} {f'{x!r:>{10}}'} {x=}')",
    }
if NEW >= (3, 13):
    PROGRAMS["type parameter's default"] = (
        "class C[T = int]: pass\nprint(C.__type_params__[0].__default__)"
    )
    PROGRAMS["locals in a scope"] = "def f():\n    x = 1\n    locals()['x'] = 2\n    print(x)\nf()"
if NEW >= (3, 14):
    PROGRAMS |= {
        "template": "n = 1\nx = t'a{n!r:>{n}}b{n + 1=}'\nprint(x, x.strings, x.values)\nt'{nothing}'",
        "except without parentheses": "try: 1 / 0\nexcept OSError, ZeroDivisionError: print('caught')",
        "return in finally": "def f():\n    try: return 1\n    finally: return 2\nprint(f())",
        "type's annotations": "class C[T]:\n    x: T\n    y: Later\nimport annotationlib as a\n"
        "print(a.get_annotations(C, format=a.Format.STRING), a.get_annotations(C, format=a.Format.FORWARDREF))",
    }
if NEW >= (3, 15):
    MODULES = (
        "import sys\nprint([type(globals()[n]).__name__ for n in ('a', 'b') if n in globals()],\n"
    )
    MODULES += "    [n in sys.modules for n in ('colorsys', 'chunk', 'wsgiref')])\n"
    PROGRAMS |= {
        "lazy import": f"lazy import colorsys as a\n{MODULES}print(a.__name__)\n{MODULES}",
        "lazy import from": f"lazy from colorsys import rgb_to_hls as a, ONE_THIRD as b\n{MODULES}"
        f"print(b)\n{MODULES}",
        "lazy import of a submodule": f"lazy import wsgiref.util\n{MODULES}print(wsgiref.util.__name__)",
        "lazy import in a block": f"if 1:\n    lazy import colorsys as a\n{MODULES}",
        "lazy import that fails": "lazy import nothing_at_all\nprint('first')\nnothing_at_all.x",
        "lazy import in try": "try:\n    lazy import colorsys\nfinally: pass",
        "lazy import in a function": "def f():\n    lazy import colorsys",
        "lazy import of stars": "lazy from colorsys import *",
        "lazy modules": f"__lazy_modules__ = ['colorsys']\nimport colorsys as a\n{MODULES}a.ONE_THIRD\n{MODULES}",
        "lazy modules in try": f"__lazy_modules__ = ['colorsys']\ntry: import colorsys as a\nfinally: {MODULES}",
        "lazy imports, filtered": "import sys\nsys.set_lazy_imports('all')\nimport colorsys as a\n"
        f"def f(): import wsgiref\nf()\n{MODULES}",
        "lazy imports, twice in a line": f"lazy import colorsys as a; import wsgiref as b\n{MODULES}",
    }


# What these do goes by how the interpreter was started, or ends.
ALONE = {name for name in PROGRAMS if name.startswith("processes")} | {
    "interrupt",
    "traced to the end",
}

# What a host hands over is of its own version, what a snippet finds of the other's.
OTHERS = [
    "import sys, json\nx: 'Later' = [1, 'ß', b'\\xff']\nclass Later: pass\nprint(sys.version, x)\n"
    "print(sys.modules['__main__'].__annotations__, sys.path, sorted(sys.modules['json'].__all__))",
    "import warnings\nwarnings.warn('no')\ndef f(): 1 / 0\nf()",
    "import asyncio, sys\nasync def f(): return 7\nprint(asyncio.run(f()))\nsys.exit(3)",
    "import multiprocessing as m\np = m.get_context('spawn').Process(target=print, args=(1,))\n"
    "p.start()\np.join()\nprint(p.exitcode)",
]

# What variables of the environment change.
FLAGS = (
    "import sys, os, warnings\nassert __debug__, 'debug'\nprint(sys.flags, sys.warnoptions, sys._xoptions)\n"
    "print([getattr(sys, n)() for n in ('get_int_max_str_digits', '_is_gil_enabled', 'is_stack_trampoline_active',"
    " 'is_remote_debug_enabled', 'get_lazy_imports') if hasattr(sys, n)])\n"
    "print(sys.path[:2], sys.stdout.encoding, os.cpu_count(), os.__spec__.origin, warnings.filters)\n"
    "print([getattr(sys.flags, n, None) for n in ('gil', 'thread_inherit_context', 'context_aware_warnings')])\n"
    "import faulthandler, tracemalloc\nprint(faulthandler.is_enabled(), tracemalloc.is_tracing(),"
    " tracemalloc.get_traceback_limit(), sys.pycache_prefix)\n"
    "def f(): 1 / 0\nprint([*getattr(f.__code__, 'co_positions', tuple)()])\nopen(os.devnull)\n"
    "warnings.warn('no', DeprecationWarning)\nimport colorsys\nprint(type(globals()['colorsys']))\nx is 1"
)
VARIABLES = {
    "PYTHON_LAZY_IMPORTS": "all",
    "PYTHONUTF8": "1",
    "PYTHONDEVMODE": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONOPTIMIZE": "1",
    "PYTHONWARNINGS": "error",
    "PYTHONNODEBUGRANGES": "1",
    "PYTHONINTMAXSTRDIGITS": "1000",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHON_CPU_COUNT": "77",
    "PYTHON_GIL": "1",
    "PYTHON_DISABLE_REMOTE_DEBUG": "1",
    "PYTHON_THREAD_INHERIT_CONTEXT": "1",
    "PYTHON_CONTEXT_AWARE_WARNINGS": "1",
    "PYTHON_FROZEN_MODULES": "off",
    "PYTHON_PERF_JIT_SUPPORT": "1",
    "PYTHONPERFSUPPORT": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONTRACEMALLOC": "5",
    "PYTHONWARNDEFAULTENCODING": "1",
    "PYTHONPYCACHEPREFIX": "/nowhere",
    "PYTHONMALLOC": "debug",
}
