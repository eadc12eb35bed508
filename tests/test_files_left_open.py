"""What a snippet leaves open is written at its end, as by a plain interpreter.

Each program runs twice, here and in an interpreter of its own, and its file is compared.
"""

import bz2
import gzip
import lzma
import pathlib
import tarfile
import tempfile
import zipfile

import pytest
from conftest import ENVIRONMENT, ahead, argument, finish, one_in
from conftest import shared_manager as manager  # noqa: F401
from small_programs import run_plain

import sidexec

PATH = (
    "import os, sys\npath = os.environ.get('LEFT_OPEN') or params['path']\nDATA = 'kept ' * 600\n"
)
CLOSING = (
    "import gzip, io\nclass {}(io.{}):\n    def close(self):\n"
    "        if not self.closed:\n            self.write({})\n        super().close()\n"
)
CLOSING_WRITER = CLOSING.format("Writer", "BufferedWriter", "b'the end'")
CLOSING_TEXT = CLOSING.format("Text", "TextIOWrapper", "'the end'")
RAW = (
    "import io\nclass Raw(io.RawIOBase):\n    os, path = os, path\n    def writable(self): return True\n"
    "    def __init__(self): self.parts = []\n    def write(self, data):\n"
    "        self.parts.append(bytes(data))\n        return len(data)\n    def close(self):\n"
    "        if not self.closed:\n            self.os.write(self.os.open(self.path, 65), b'|'.join(self.parts))\n"
    "        super().close()\n"
)
HOLDERS = {
    "a global": "f = {}\nf.write(DATA)",
    "a list": "files = [{}]\nfiles[0].write(DATA)",
    "a class": "class C: f = {}\nC.f.write(DATA)",
    "a closure": "def outer(f):\n    def write(): f.write(DATA)\n    return write\nwrite = outer({})\nwrite()",
    "a cycle": "class C: pass\nc = C()\nc.c = c\nc.f = {}\nc.f.write(DATA)",
    "a cycle without a name": "class C: pass\nc = C()\nc.c = c\nc.f = {}\nc.f.write(DATA)\ndel c",
    "a thread local": "import threading\nlocal = threading.local()\nlocal.f = {}\nlocal.f.write(DATA)",
    "a context variable": "import contextvars\nvar = contextvars.ContextVar('var')\nvar.set({})\nvar.get().write(DATA)",
    "a module": "import json\njson.f = {}\njson.f.write(DATA)",
    "a module of the user's": "import types\nm = sys.modules['m'] = types.ModuleType('m')\n"
    "m.f = {}\nm.f.write(DATA)\ndel m",
    "sys": "sys.f = {}\nsys.f.write(DATA)",
    "a generator": "def g(f):\n    f.write(DATA)\n    yield\n    f.close()\ni = g({})\nnext(i)",
    "a signal handler": "import signal\ndef handler(*args, f={}): f.write(DATA)\n"
    "signal.signal(signal.SIGUSR1, handler)\nhandler()",
    "a frame of a failure": "def fail(f):\n    f.write(DATA)\n    1 / 0\nfail({})",
    "a typing cache": "import typing\nclass C: f = {}\ntyping.Optional[C]\nC.f.write(DATA)",
    "a module, and a daemon thread": "import json, threading\njson.f = {}\njson.f.write(DATA)\n"
    "threading.Thread(target=threading.Event().wait, daemon=True).start()",
}
OPENERS = {
    "text": ("", "open(path, 'w')"),
    "gzip text": ("import gzip\n", "gzip.open(path, 'wt')"),
    "lzma text": ("import lzma\n", "lzma.open(path, 'wt')"),
}
OTHERS = {
    "gzip binary": "import gzip\nf = gzip.open(path, 'wb')\nf.write(DATA.encode())",
    "bz2 text": "import bz2\nf = bz2.open(path, 'wt')\nf.write(DATA)",
    "gzip of an own file": "import gzip\nraw = open(path, 'wb')\nf = gzip.GzipFile(fileobj=raw, mode='wb')\nf.write(DATA.encode())",
    "gzip of an own file in a module": "import gzip, json\n"
    "json.f = gzip.GzipFile(fileobj=open(path, 'wb'), mode='wb')\njson.f.write(DATA.encode())",
    "text with its own close, of a gzip": f"{CLOSING_TEXT}f = Text(gzip.open(path, 'wb'))\nf.write(DATA)",
    "text of an own gzip": "import gzip, io\ng = gzip.open(path, 'wb')\nf = io.TextIOWrapper(g)\nf.write(DATA)",
    "after an exit": "import gzip\nf = gzip.open(path, 'wt')\nf.write(DATA)\nsys.exit(0)",
    "after a failure": "import gzip\nf = gzip.open(path, 'wt')\nf.write(DATA)\n1 / 0",
    "zipfile": "import zipfile\nz = zipfile.ZipFile(path, 'w')\nz.writestr('a', DATA)",
    "zipfile in a module": "import zipfile, json\njson.z = zipfile.ZipFile(path, 'w')\njson.z.writestr('a', DATA)",
    "tarfile gz": "import tarfile, io\nt = tarfile.open(path, 'w:gz')\ni = tarfile.TarInfo('a')\ni.size = len(DATA)\n"
    "t.addfile(i, io.BytesIO(DATA.encode()))",
    "codecs in a module": "import codecs, json\njson.f = codecs.open(path, 'w', 'utf-16')\njson.f.write(DATA)",
    "temporary": "import tempfile\nf = tempfile.NamedTemporaryFile('w', delete=False)\nf.write(DATA)\nos.rename(f.name, path)",
    "temporary, removed": "import tempfile\nf = tempfile.NamedTemporaryFile('w', delete=True)\nf.write(DATA)\n"
    "open(path, 'w').write('gone')",
    "a writer with its own close": f"{CLOSING_WRITER}f = Writer(io.FileIO(path, 'w'))\nf.write(b'kept ')",
    "such a writer in a module": f"{CLOSING_WRITER}import json\njson.f = Writer(io.FileIO(path, 'w'))\njson.f.write(b'kept ')",
    "such a writer, and text": f"{CLOSING_WRITER}f = io.TextIOWrapper(Writer(io.FileIO(path, 'w')))\nf.write('kept ')",
    "a raw file of one's own": f"{RAW}f = io.TextIOWrapper(io.BufferedWriter(Raw()))\nf.write(DATA)",
    "such a raw file in a module": f"{RAW}import json\njson.f = io.TextIOWrapper(io.BufferedWriter(Raw()))\njson.f.write(DATA)",
    "pairs": "import io\nr, w = os.pipe()\nf = io.BufferedRWPair(open(r, 'rb', 0), open(path, 'wb', 0))\nf.write(b'kept')",
    "read and write": "f = open(path, 'w+b')\nf.write(b'kept')\nf.seek(1)\nf.write(b'KEPT')",
    "shelve": "import shelve, dbm.dumb\ns = shelve.Shelf(dbm.dumb.open(path), writeback=True)\ns['a'] = [1]\n"
    "s['a'].append(2)\nimport atexit\natexit.register(lambda: None)\n",
    "dumb dbm in a list": "import dbm.dumb\nd = [dbm.dumb.open(path)]\nd[0]['key'] = b'value'",
    "__del__ that writes": "class C:\n    def __del__(self): os.write(os.open(path, 65), b'del')\nc = C()",
    "__del__ in a module": "import json\nclass C:\n    def __del__(self, path=path, os=os): os.write(os.open(path, 65), b'del')\n"
    "json.c = C()",
    "__del__ that writes to a global": "f = open(path, 'w')\nclass C:\n    def __del__(self): f.write('late')\nc = C()",
    "gzip, and a __del__": "import gzip\nclass C:\n    def __del__(self): pass\nc = C()\nf = gzip.open(path, 'wt')\nf.write(DATA)",
    "written by the __del__ of what holds it": f"{CLOSING_WRITER}class C:\n    def __init__(self): self.f = Writer(io.FileIO(path, 'w'))\n"
    "    def __del__(self): self.f.write(b'del')\nsys.c = C()",
    "lzma in a class, and a __del__": "import lzma\nclass C:\n    f = lzma.open(path, 'wt')\n    def __del__(self): pass\n"
    "c = C()\nC.f.write(DATA)",
    "gzip in a module, and a __del__": "import gzip, json\nclass C:\n    def __del__(self): pass\njson.c = C()\n"
    "json.f = gzip.open(path, 'wt')\njson.f.write(DATA)",
    "a suspended generator": "def g():\n    with open(path, 'w') as f:\n        f.write('begun ')\n        try:\n"
    "            yield\n        finally:\n            f.write('ended')\nimport json\njson.g = g()\nnext(json.g)",
    "logging in memory": "import logging.handlers\nh = logging.FileHandler(path)\n"
    "m = logging.handlers.MemoryHandler(100, target=h)\nlogging.getLogger().addHandler(m)\nlogging.error('kept')",
    "a forked child": "import gzip\nif os.fork():\n    os.wait()\nelse:\n    f = gzip.open(path, 'wt')\n    f.write(DATA)",
    "closed already": "import gzip\nf = gzip.open(path, 'wt')\nf.write(DATA)\nf.close()",
    "a file for reading": "open(path, 'w').write('kept')\nimport json\njson.f = open(path)\njson.f.read(1)",
    "a thread's stack": "import threading, time\ne = threading.Event()\ndef g():\n    f = open(path, 'w')\n"
    "    f.write('kept')\n    f.flush()\n    e.set()\n    time.sleep(60)\n"
    "threading.Thread(target=g, daemon=True).start()\ne.wait()",
    "written at exit": "import atexit\nf = open(path, 'w')\natexit.register(f.write, 'kept')",
    "written by __del__": "class C:\n    def __del__(self): self.f.write('kept')\nc = C()\nc.f = open(path, 'w')",
    "C stdio": "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.fopen.restype = ctypes.c_void_p\n"
    "file = ctypes.c_void_p(libc.fopen(path.encode(), b'w'))\nlibc.fputs(b'kept', file)",
}
HELD = {
    f"{opener} in {holder}": before + code.format(call)
    for holder, code in HOLDERS.items()
    for opener, (before, call) in OPENERS.items()
}
WRITTEN = {name: PATH + code for name, code in {**HELD, **OTHERS}.items()}


def content(path):
    """What can be read back from a file of whichever kind: a clock stands in some of them."""
    with open(path, "rb") as file:
        data = file.read()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    elif data[:3] == b"BZh":
        data = bz2.decompress(data)
    elif data[:4] == b"\xfd7zX":
        data = lzma.decompress(data)
    if data[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            return archive.read("a")
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            return archive.extractfile("a").read(), len(data)
    return data


def contents(directory):
    found = {}
    for path in sorted(directory.iterdir()):
        try:
            found[path.name] = content(path)
        except (OSError, EOFError, KeyError, ValueError, lzma.LZMAError) as error:
            found[path.name] = error
    return found


@pytest.fixture(scope="module")
def plain(request, shared, tmp_path_factory):
    """What an interpreter of its own makes of each: they run ahead of the tests."""
    base = tmp_path_factory.mktemp("there")

    def run(name):
        directory = pathlib.Path(tempfile.mkdtemp(dir=base))
        path = str(directory / "file")
        return run_plain("-c", WRITTEN[name], env={"LEFT_OPEN": path}), contents(directory)

    def name_of(item):
        return argument(item, "name") if "plain" in item.fixturenames else None

    yield from ahead(request, run, name_of)


@pytest.mark.parametrize("name", [*one_in(2, HELD), *OTHERS])
def test_what_a_plain_interpreter_writes_is_written(tmp_path, run, plain, name):
    data = run(WRITTEN[name], {"path": str(tmp_path / "file")})
    done, expected = plain(name)
    assert data.exit_code == done.returncode, (data.error_output, done.stderr)
    assert expected
    written = contents(tmp_path)
    for file, there in expected.items():
        # What is lost there, by the order of a collector, may well be written here.
        assert written[file] == there or not there or isinstance(there, Exception)
        if there:
            assert written[file] and not isinstance(written[file], Exception)
    if not done.stderr:
        assert data.error_output == ""


@pytest.mark.parametrize("name", ["gzip text in a global", "gzip text in a module"])
def test_a_graceful_stop_and_a_first_execution_write_it_too(tmp_path, manager, start, name):
    params = {"path": str(tmp_path / "file")}
    code = WRITTEN[name] + "\nimport time\nprint('ready')\ntime.sleep(60)"
    stopped = manager.stop(start(code, params)).data
    assert (stopped.status, stopped.forced, stopped.exit_code) == ("stopped", False, 143)
    assert content(tmp_path / "file") == b"kept " * 600
    with sidexec.ExecutionManager(env=ENVIRONMENT) as first:
        finish(first, WRITTEN[name], {"path": str(tmp_path / "another")})
    assert content(tmp_path / "another") == b"kept " * 600


@pytest.mark.parametrize("holder", ["sys.modules['__main__']", "json"])
def test_thousands_beside_a_finalizer_are_closed_before_what_they_write_to(run, holder):
    # However they lie in memory, which is the order of a free-threaded collector.
    code = (
        "import io, json, os, sys\n"
        "class Writer(io.BufferedWriter):\n"
        "    def close(self):\n"
        "        if not self.closed:\n"
        "            self.write(b'the end')\n"
        "            self.flush()\n"
        "            os.write(1, b'x')\n"
        "        super().close()\n"
        "class C:\n"
        "    def __del__(self): pass\n"
        f"{holder}.c = C()\n"
        f"{holder}.files = [Writer(io.BytesIO(), 64) for _ in range(5000)]\n"
    )
    assert len(run(code).output) == 5000


PRELOADED = {
    "text": "file = open({!r}, 'w')",
    "gzip": "import gzip\nfile = gzip.open({!r}, 'wt')",
    "text of a gzip of a file": "import gzip, io\nraw = open({!r}, 'wb')\n"
    "file = io.TextIOWrapper(gzip.GzipFile(fileobj=raw, mode='wb'))",
    "text in a list": "files = [open({!r}, 'w')]\ndef __getattr__(name): return files[0]",
    "line of the module's own": "file = open({!r}, 'w')\nfile.write('the module\\n')",
}


@pytest.mark.parametrize("name", PRELOADED)
def test_a_file_that_a_preloaded_module_opened_is_written(preloading, tmp_path, name):
    path = tmp_path / "file"
    code = "import holder\nfor n in range(params['lines']): holder.file.write(f'line {n}\\n')"
    manager = preloading({"holder": PRELOADED[name].format(str(path))})
    for lines in (5, 0, 0) if "own" in name else (5,):
        assert finish(manager, code, {"lines": lines}).status == "completed"
    first = ["the module"] if "own" in name else []
    assert content(path).decode().splitlines() == first + [f"line {n}" for n in range(5)]


def test_a_temporary_file_of_a_preloaded_module_outlives_a_snippet(preloading, tmp_path):
    code = (
        "import holder, json, os\nclass C:\n    def __del__(self): pass\njson.c = C()\n"
        "return os.path.exists(holder.file.name)"
    )
    holder = "import tempfile\nfile = tempfile.NamedTemporaryFile('w')\n"
    manager = preloading({"holder": holder}, env={"TMPDIR": str(tmp_path)})
    for _ in range(2):
        assert finish(manager, code).result is True


# Says so where the process ends at once, without the interpreter's own end.
TELL_QUICK = (
    "import os\nos._exit = eval('lambda code: (write(1, b\"quick\"), leave(code))',"
    " {'write': os.write, 'leave': os._exit})\n"
)


@pytest.mark.parametrize(
    "code, output",
    (
        ("import socket\na, b = socket.socketpair()\ndef f(): pass", "quick"),
        ("class C:\n    def __del__(self): print('del')\nc = C()", "del\nquick"),
        ("import json\nclass C:\n    def __del__(self): pass\njson.c = C()", ""),
    ),
    ids=("sockets and a function", "a finalizer of a global", "a finalizer of a module's"),
)
def test_only_what_finalizers_need_an_interpreter_s_own_end_for_waits_for_it(run, code, output):
    assert run(TELL_QUICK + code).output == output


def test_what_is_let_go_of_in_the_end_may_still_print(run):
    data = run(
        "import json\nclass C:\n    def __del__(self, print=print): print('del')\njson.c = C()"
    )
    assert (data.output, data.error_output) == ("del\n", "")
