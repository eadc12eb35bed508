"""Small programs that mean the same in a plain interpreter and as a snippet.

By name, for the version that runs the tests. `ENDS` are those of `PROGRAMS` that say how they
end. `ALONE` need an interpreter of their own to compare with: what they do goes by how it was
started, or how it ends. `NOT_ASYNC` differ below an event loop, as they should.
"""

import subprocess
import sys

from conftest import ENVIRONMENT

NEW = sys.version_info
OURS = ("params", "report_progress", "report_result")

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
"""
SHOW += f"print([each for each in globals() if each not in {(*OURS, '__annotations__')}])\n"

ANNOTATIONS = {
    "forward": "x: 'Later'\nclass Later: pass",
    "lazily forward": "try:\n    x: Later\nexcept NameError: print('at once')\nclass Later: pass",
    "undefined": "try:\n    x: nothing = 1\nexcept NameError: print('at once')",
    "order": "b: int\na: str\nb: float",
    "item": "d = {}\nd['k']: print('note') = 1",
    "target alone": "def f():\n    print('target')\nf().x: print('note')",
    "parentheses": "(x): print('note') = 1",
    "lambda": "n = 1\nx: (lambda: n)()",
    "comprehension": "n = 2\nx: [n * i for i in range(3)]\ny: {i: n for i in 'ab'}",
    "private name": "__x: int = 1\n_X__y: str",
    "non-ASCII": "größe: int = 1\nﬁ: str",
    "read at once": "x: int\nprint(_m.__annotations__)\ny: str",
    "assigned": "x: int\n__annotations__ = {'own': 1}",
    "deleted": "x: int = 1\ndel x",
    "changed": "n = int\nx: n\nn = str",
    "class": "class C:\n    x: int\n    if 0:\n        y: str\nprint(C.__annotations__)",
    "class, forward": "class C:\n    x: 'D'\nclass D: pass\nprint(C.__annotations__)",
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
    "annotated global, and functions": "def f(a: int) -> str: pass\nx: set\nclass C:\n    y: float\n"
    "def g(b: dict): pass\nimport __main__\nprint(__main__.__annotations__, f.__annotations__)",
    "annotated tuple": "(x, y): int",
    "undefined annotation": "x: nothing\nprint('later')",
    "annotations as text": "from __future__ import annotations\ny: dict[str, 'A'] | (int, *z)\n"
    "w: lambda a, *b, c=1: {**a}\nv: f'{x!r:>{y}}'\nu: x[1:2, ...]\nprint(__annotations__)",
    "match": "match {'a': [1, 2]}:\n    case {'a': [x, *y], **z} if (w := x): print(x, y, z, w)",
    "walrus": "print([y := i for i in range(3)], y)\nwhile (n := y) > 1: y -= 1\nprint(n)",
    "walrus in a comprehension": "def show():\n    global last\n    last += 1\n    return last\n"
    "any((last := i) > 1 for i in range(3))\n[[n := i for i in 'ab'] for _ in 'c']\ndef g(): return last, n\n"
    "print(show(), g(), globals().get('last'), show.__code__.co_freevars, g.__code__.co_freevars)\n"
    "if 0: {(k := i) for i in 'a'}\ndef h(): return k\nprint(h.__code__.co_freevars)",
    "comprehension": "x = 1\nprint([[x, i] for i in range(2) for x in 'ab'], x)\n"
    "fs = [[lambda: (i, j) for i in range(2)] for j in range(2)]\nprint([[f() for f in g] for g in fs])\n"
    "[nothing for _ in 'a']",
    "comprehension, locals": "print([sorted(each for each in locals() if each == 'i') for i in 'a'])",
    "comprehension in a class": "class C:\n    a = 1\n    b = [i for i in [a]]\n    try:\n"
    "        c = [a for _ in 'a']\n    except NameError as e: print(e)\n",
    "decorators": "def d(*a):\n    print(a)\n    return lambda f: f\n@d(1)\n@d(2)\ndef f(): pass\n"
    "@(lambda c: c.x)\nclass C:\n    x = 3\nprint(C)",
    "async generator at the end": "import asyncio\nasync def g():\n    try:\n        yield 1\n"
    "        yield 2\n    finally:\n        print('closed')\nasync def main():\n"
    "    async for x in g():\n        print(x)\n        break\nasyncio.run(main())",
    "coroutine left": "async def f(): pass\nf()",
    "no policy": "import asyncio, warnings\nwarnings.simplefilter('error')\ntry:\n"
    "    print(type(asyncio.get_event_loop_policy()).__name__)\nexcept Warning as e: print(e)\n"
    "try:\n    asyncio.get_event_loop().close()\nexcept Exception as e: print(type(e), e)",
    "star import": "from string import *\nprint(digits)\nfrom nothing_at_all import *",
    "star import in a block": "for _ in 'ab':\n    from os.path import *\nprint(join('a', 'b'), 'genericpath' in globals())",
    "star import binds": "digits = 1\ndef f(): return digits\nfrom string import *\nprint(f())",
    "star import of what is not there": "import sys, traceback, types\n"
    "m = sys.modules['m'] = types.ModuleType('m')\nm._a = m.b = 1\n"
    "from m import *\nprint('_a' in globals(), b)\nfor m.__all__ in ['x'], [1]:\n"
    "    try: from m import *\n    except (AttributeError, TypeError) as e:\n"
    "        print(e, m.__all__ == [1] or traceback.format_exc().count('File'))",
    "relative imports": "try: from . import x\nexcept ImportError as e: print(e)\nfrom .m import *",
    "docstring": "'''A doc.\n\n  More.'''\nprint(repr(__doc__))",
    "docstring, bytes": "b'no doc'\nprint(repr(__doc__))",
    "docstring, and future": "'''Doc'''\nfrom __future__ import division, generator_stop\nprint(__doc__)",
    "global": "global x\nx = 1\ndef f():\n    global x, y\n    x = y = 2\nf()\nprint(x, y)\nglobal c",
    "locals": "x = 1\nprint(globals() is locals() is vars())\nlocals()['y'] = 2\nglobals()['z'] = 3\n"
    "exec('w = 4\\ndef f(): return w')\nprint(y, z, f(), eval('[x + w for _ in range(2)]'))",
    "bindings": "import xml.dom as d, os.path as p\nfrom json import (dumps as s,)\ne = 1\ntry: 1 / 0\n"
    "except Exception as e: pass\nfor i, (j, *k) in [(1, (2, 3, 4))]: pass\nwith open(p.devnull) as f: i += 1\n"
    "größe = 'ß✓🐍\\x7f'\nﬁ = match = case = 1\n"
    "print('e' in globals(), i, j, k, fi, größe, match, case, d, s([]))",
    "class body": "x = __p = 1\nclass C:\n    x = x + 1\n    y = [x for _ in range(1)]\n    z = locals()['x']\n"
    "    def f(self): return x\n    __p = 3\n    del x\n    print(x, __qualname__, __module__)\n"
    "print(C.y, C.z, C().f(), C._C__p, __p)",
    "class, global": "x = 1\nclass C:\n    global x\n    x = 2\nprint(x, hasattr(C, 'x'))",
    "no closures": "x = 1\ndef f(a=x): return x, a\nx = 2\nprint(f(), f.__code__.co_freevars, f.__globals__ is globals())",
    "not there": "def len(x): return 42\nprint(len([]))\ndel len\nprint(len([]))\nx = 1\ndel x\ntry: x\n"
    "except NameError as e: print(e)\nif 0: nothing = 1\ntry: nothing\nexcept NameError as e: print(e)\ndel x",
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
    "flags of code": "def f(): pass\nasync def g(): pass\ndef h(): yield\nprint(f.__code__.co_flags & 0xfef,"
    " g.__code__.co_flags & 0xfef, h.__code__.co_flags & 0xfef)\n"
    "import sys\nprint(sys._getframe().f_code.co_flags & 3)",
    "line numbers": "import sys\n\n\nprint(sys._getframe().f_lineno)\ndef f():\n\n    return sys._getframe().f_lineno\n"
    "print(f(), f.__code__.co_firstlineno,\n      sys._getframe().f_lineno)",
    "trace": "import sys\nseen = []\ndef tracer(frame, event, arg):\n    seen.append(event)\n"
    "sys.settrace(tracer)\ndef f(): pass\nf()\nsys.settrace(None)\nprint(seen)",
    "coding comment": "# -*- coding: latin-1 -*-\nprint('ü')",
    "warning": "import warnings\nwarnings.warn('look out')\nwarnings.warn('old', DeprecationWarning)",
    "syntax warning": "x = 1\nx is 1000\nassert (x, 'text')",
    "pickle": "import pickle, enum, dataclasses, collections\ndef f(): pass\nclass C:\n    class D: pass\n"
    "    def g(self): pass\nfor each in f, C, C.D, C.g: print(pickle.loads(pickle.dumps(each)) is each)\n"
    "@dataclasses.dataclass\nclass P: x: int\nclass E(enum.Enum): A = 1\nT = collections.namedtuple('T', 'a')\n"
    "print(*(pickle.loads(pickle.dumps(each)) for each in (P(1), E.A, T(1))), b'__main__' in pickle.dumps(f))",
    "processes": "import multiprocessing\nprint(multiprocessing.get_start_method())\n"
    "print(multiprocessing.get_context('fork').Pool(1).map(abs, [-1, -2]))",
    "processes, as by default": "import concurrent.futures as c\nwith c.ProcessPoolExecutor(1) as p:\n"
    "    print(list(p.map(abs, [-1, -2])))",
    "flags": "import sys\nprint(sys.flags, sys.warnoptions, sys._xoptions)",
    "frozen": "import sys, os\nprint(os.__spec__.origin, sys.modules['os'].__loader__, __spec__)",
    "stdlib": "import sys\nprint(sys.path, sys.meta_path, sys.path_hooks[0])",
    "monitoring": "import sys\nif hasattr(sys, 'monitoring'):\n    print(sys.monitoring.get_tool(3))\n"
    "    sys.monitoring.use_tool_id(3, 'x')\n    sys.monitoring.free_tool_id(3)\n"
    "    print([sys.monitoring.get_tool(n) for n in range(6)])",
    "GIL": "import sys\nprint(getattr(sys, '_is_gil_enabled', bool)())",
    "main": "import __main__, sys\nx = 1\nprint(__main__.x, sys.modules['__main__'] is __main__, vars(__main__) is globals())\n"
    f"print(__name__, __package__, __loader__, __builtins__.__name__, *sorted(set(globals()) - {{*{OURS}}}))",
    "stdin": "import sys\nprint(repr(sys.stdin.read()), sys.stdin.fileno())\ninput()",
    "environment": "import os, sys\nprint(sys.argv, sorted(os.environ.items()))",
    "process": "import os, threading\nprint(os.getcwd(), os.umask(0), [t.name for t in threading.enumerate()],"
    " threading.current_thread() is threading.main_thread(), os.nice(0))",
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
    "hooks": "import sys, gc\nprint(sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__,"
    " sys.unraisablehook is sys.__unraisablehook__, sys.gettrace(), sys.getprofile(), sys.getrecursionlimit(),"
    " gc.isenabled(), gc.get_threshold(), gc.callbacks)",
    "raw files": "import io, sys\nfor s in (sys.stdout, sys.stderr):\n    raw = s.buffer.raw\n"
    "    print(isinstance(raw, io.RawIOBase), raw.name, raw.fileno(), raw.closefd, raw.write(b'raw\\n'), flush=True)",
    "library": "import locale, logging, sys, warnings\nprint(locale.getpreferredencoding(False),"
    " sys.getfilesystemencoding(), [f[0] for f in warnings.filters], logging.getLogger().handlers,"
    " len(logging.Logger.manager.loggerDict))",
}
ENDS = {
    "exit": "import sys; sys.exit()",
    "exit 0": "import sys; sys.exit(0)",
    "exit 3": "import sys; sys.exit(3)",
    "exit with text": "import sys; sys.exit('text ü')",
    "exit True": "import sys; sys.exit(True)",
    "exit -2": "import sys; sys.exit(-2)",
    "exit 256": "import sys; sys.exit(256)",
    "exit 2**70": "import sys; sys.exit(2**70)",
    "exit with a tuple": "raise SystemExit(1, 2)",
    "exit with an object": "class C:\n    def __str__(self): return 'an object'\nraise SystemExit(C())",
    "exit by a subclass": "class E(SystemExit): pass\nraise E(5)",
    "exit of site": "exit(6)",
    "exit in a function": "def f():\n    import sys\n    sys.exit(7)\ntry:\n    f()\nfinally:\n    print('out')",
    "exit in finally": "import sys\ntry: 1 / 0\nfinally: sys.exit(4)",
    "exit in atexit": "import atexit\n@atexit.register\ndef f(): raise SystemExit(9)",
    "exit in a thread": "import threading, sys\nt = threading.Thread(target=sys.exit, args=(3,))\nt.start()\nt.join()",
    "exit 0 in excepthook": "import sys\ndef hook(*error):\n    print('hook')\n    sys.exit(0)\n"
    "sys.excepthook = hook\n1 / 0",
    "exit while printing": "import sys\nprint('a', end='')\nsys.exit()",
    "_exit": "import os; os._exit(3)",
    "exception": "class E(Exception): pass\nraise E('no')",
    "exception that is a frozen dataclass": "from dataclasses import dataclass\n"
    "@dataclass(frozen=True)\nclass E(Exception):\n    code: int\nraise E(3)",
    "exception in atexit": "import atexit\n@atexit.register\ndef f(): 1 / 0\natexit.register(print, 'other')",
    "exception, and who asks for the last": "import atexit, sys\nclass C:\n    def __del__(self): print('del')\n"
    "c = C()\n@atexit.register\ndef show():\n    trace = sys.last_traceback\n"
    "    print(sys.last_type, sys.last_value, trace.tb_lineno, trace.tb_next)\n"
    "    print(getattr(sys, 'last_exc', sys.last_value) is sys.last_value)\n1 / 0",
    "exception in a thread": "import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()",
    "exception in __del__": "class C:\n    def __del__(self): 1 / 0\nc = C()\ndel c\nprint('end')",
    "SIGSEGV": "import ctypes\nctypes.string_at(0)",
    "SIGKILL": "import os; os.kill(os.getpid(), 9)",
    "SIGUSR1": "import os; os.kill(os.getpid(), 10)",
    "SIGABRT": "import os; os.abort()",
    "suggested name": "total = 1\ntry: tota\nexcept NameError: totl",
    "suggested attribute": "class C: size = 1\nC().sise",
    "suggested in its message": "raise NameError(\"x. Did you mean: 'y'?\")",
    "suggested in a cause": "total = 1\ntry: tota\nexcept NameError as e: raise AttributeError('x') from e",
    "tracebacks of two calls": "import sys\nsys.tracebacklimit = 2\ndef f():\n    try: 1 / 0\n"
    "    except ZeroDivisionError: raise ValueError\ndef g(): f()\ng()",
    "interrupt": "raise KeyboardInterrupt('now')",
    "interrupt by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "interrupt of a subclass": "class Interrupt(KeyboardInterrupt): pass\nraise Interrupt",
    "interrupt with a daemon thread": "import threading\n"
    "threading.Thread(target=threading.Event().wait, daemon=True).start()\nraise KeyboardInterrupt",
    "interrupt while blocked": "import signal\nsignal.pthread_sigmask(0, [signal.SIGINT])\nraise KeyboardInterrupt",
    "traced to the end": "import atexit, sys, threading\ndef trace(*a):\n    print(a[1], a[0].f_code.co_name)\n"
    "    return trace\natexit.register(lambda: 0)\nsys.settrace(trace)",
    "signals at the end": "import atexit, signal, sys\ndef show(*a): print(signal.pthread_sigmask(0, ()))\n"
    "signal.pthread_sigmask(0, [signal.SIGUSR1])\natexit.register(show)\n"
    "def hook(*error):\n    show()\n    sys.__excepthook__(*error)\nsys.excepthook = hook\n1 / 0",
    "signals while an exit code is told": "import signal\nclass C:\n    def __str__(self):\n"
    "        return str(signal.pthread_sigmask(0, ()))\nraise SystemExit(C())",
    "never awaited": "async def f(): pass\nc = f()",
    "never awaited, in a cycle": "async def f(): pass\nclass C: pass\nc = C()\nc.c = c\nc.f = f()",
    "never awaited, returned by a function": "async def f(): pass\ndef g(x=f()): pass",
    "exit with a text without a stream": "import sys\nsys.stderr = None\nsys.exit('x')",
    "profiled to the end": "import atexit, sys\ndef profile(*a):\n"
    "    print(a[1], a[0].f_code.co_name, getattr(a[2], '__name__', ''))\n"
    "atexit.register(lambda: 0)\nsys.setprofile(profile)",
    "profiled threads": "import sys, threading\ndef profile(*a):\n    print(a[1], a[0].f_code.co_name)\n"
    "def f(): pass\nt = threading.Thread(target=f)\nt.start()\nt.join()\nsys.setprofile(profile)",
    "__del__ of globals": "import os\nclass C:\n    def __init__(self, x): self.x = x\n"
    "    def __del__(self): print(self.x, os.sep)\na = C('a')\nb = C('b')\n_c = C('c')",
    "__del__ in a cycle": "class C:\n    def __del__(self): print('del')\nc = C()\nc.c = c",
    "__del__ in a cycle without a name": "class C:\n    def __del__(self): print('del')\nc = C()\nc.c = c\ndel c",
    "__del__ after atexit": "import atexit\natexit.register(print, 'atexit')\nclass C:\n    def __del__(self): print('del')\nc = C()",
    "class without a hash": "class Meta(type):\n    def __eq__(cls, other): return cls is other\n"
    "class C(metaclass=Meta): pass\nc = C()\nprint('end')",
    "class that raises where it is compared": "class Meta(type):\n    def __eq__(cls, other): raise KeyError\n"
    "    def __hash__(cls): raise KeyError\nclass C(metaclass=Meta):\n    def __del__(self): print('del')\nc = C()",
    "generator": "def g():\n    try:\n        yield\n    finally:\n        print('finally')\ni = g()\nnext(i)",
    "atexit": "import atexit\natexit.register(print, 1)\natexit.register(print, 2)\n@atexit.register\ndef f():\n"
    "    print(x)\n    atexit.register(print, 'inner')\nx = 3",
    "atexit after threads": "import atexit, threading\natexit.register(print, 'atexit')\n"
    "e = threading.Event()\ndef f():\n    e.wait()\n    print('thread')\nthreading.Thread(target=f).start()\nprint('end')\ne.set()",
    "finalize": "import weakref\nclass C: pass\nc = C()\nweakref.finalize(c, print, 'finalize')",
    "executor": "import concurrent.futures\np = concurrent.futures.ThreadPoolExecutor(1)\np.submit(print, 'task')",
    "binary layer": "import sys\nsys.stdout.buffer.write(b'binary')",
    "replaced stream": "import sys\nsys.stdout = open(1, 'w', closefd=False)\nprint('replaced')",
    "wrapped stream": "import sys, io\nsys.stdout = io.TextIOWrapper(open(1, 'wb', closefd=False), 'latin-1')\nprint('wrapped')",
    "closed stream": "import sys\nprint('a')\nsys.stdout.close()",
    "stream of its own": "import os, sys\nclass Late:\n    text = ''\n    closed = False\n"
    "    def write(self, text): self.text += text\n    def flush(self, write=os.write):\n"
    "        write(1, self.text.encode())\n        self.text = ''\nsys.stdout = Late()\nprint('late')",
    "no stream": "import sys\nsys.stdout = None\nprint('nothing')",
    "deleted stream": "import sys\nprint('before')\ndel sys.stdout",
    "printf": "import ctypes\nctypes.CDLL(None).printf(b'from C')",
    "print after end of file": "import os\nprint('x', flush=True)\nos.dup2(os.open('/dev/null', os.O_WRONLY), 1)\nprint('y')",
}
PROGRAMS |= ENDS
HELD = {
    "never awaited, where it fails": "async def f(): pass\ndef g():\n    c = f()\n    1/0\ng()",
    "never awaited, where it exits": "async def f(): pass\ndef g():\n    c = f()\n    exit(0)\ng()",
    "left open, where it fails": "import warnings\nwarnings.simplefilter('always')\n"
    "def g():\n    f = open('/dev/null')\n    1/0\ng()",
    "left open, where it exits": "import warnings\nwarnings.simplefilter('always')\n"
    "def g():\n    f = open('/dev/null')\n    exit(3)\ng()",
    "left open beside a __del__": "import warnings\nwarnings.simplefilter('always')\n"
    "class C:\n    def __del__(self): print('del')\nc = C()\nf = open('/dev/null')",
    "left open beside a generator": "import warnings\nwarnings.simplefilter('always')\n"
    "def g():\n    try: yield\n    finally: print('end')\ni = g()\nnext(i)\nf = open('/dev/null')",
}
PROGRAMS |= HELD
if NEW >= (3, 11):
    PROGRAMS |= {
        "except*": "try: raise ExceptionGroup('g', [ValueError(1), KeyError(2), OSError(3)])\n"
        "except* ValueError as e: print(e.exceptions)\nexcept* KeyError as e: print(e.exceptions)",
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
        "monitored to the end": f"{MONITORING}import atexit\natexit.register(lambda: print(seen))\n"
        "m.register_callback(m.COVERAGE_ID, m.events.PY_START, lambda code, at: seen.append(code.co_name))\n"
        "m.set_events(m.COVERAGE_ID, m.events.PY_START)",
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
ALONE = {name for name in PROGRAMS if name.startswith(("processes", "interrupt"))}
ALONE |= {"streams", "coding comment", "traced to the end", "profiled to the end"}
ALONE |= {"profiled threads", "monitored to the end"}
ALONE |= {name for name in HELD if name.endswith("exits")}
NOT_ASYNC = {"signals", "library", "async generator at the end", "no policy"}
NOT_ASYNC |= {"monitored to the end", *HELD}

# What a host hands over is of its own version, what a snippet finds of the other's.
OTHERS = [
    "import sys, json\nx: 'Later' = [1, 'ß', b'\\xff']\nclass Later: pass\nprint(sys.version, x)\n"
    "print(sys.modules['__main__'].__annotations__, sys.path, sorted(sys.modules['json'].__all__))",
    "import warnings\nwarnings.warn('no')\nexec('def f(): 1 / 0')\nf()",
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


def run_plain(*arguments, python=sys.executable, env=(), errors="strict"):
    """Run an interpreter of its own, with these variables more."""
    return subprocess.run(
        [python, *arguments],
        env={**ENVIRONMENT, **dict(env)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors=errors,
        timeout=60,
    )
