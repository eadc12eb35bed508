"""What a snippet finds around it, what it may start and take away, and that nothing it writes is lost."""

import functools
import os
import textwrap

import pytest
from conftest import ENVIRONMENT, completed, crossed, eventually, finish, one_in
from conftest import shared_manager as manager  # noqa: F401
from small_programs import ENDS, NEW, run_plain

import sidexec

# -- surroundings


@pytest.mark.parametrize("preload", [(), ("asyncio", "random", "logging", "tempfile")])
def test_no_module_of_the_library_is_there(preloading, preload):
    code = """
    import sys
    files = [str(getattr(module, "__file__", "")) for module in sys.modules.values()]
    return [[*sys.modules], files, [*__import__("linecache").cache]]
    """
    manager = preloading({}, *preload)
    for _ in range(3):  # the first one, and such as are forked ahead
        names, files, cached = completed(finish(manager, code)).result
        assert not [name for name in names if "side" in name.lower() or name == "pytest"]
        assert not [file for file in files if "sidexec" in file]
        assert set(cached) <= {"<snippet>"}


def test_what_launcher_and_keeper_write_to_standard_error_can_be_had(tmp_path, preloading):
    code = "import os\nos.register_at_fork(before=lambda: os.write(2, b'%d\\n' % os.getpid()))"
    log = tmp_path / "log"
    env = {"EXECUTION_MANAGER_STDERR": str(log)}
    with preloading({"says_who_forks": code}, env=env) as manager:
        data = finish(manager, "import os\nprint(os.getppid())\nos.write(2, b'mine')")
    assert (data.status, data.error_output) == ("completed", "mine")
    assert "mine" not in log.read_text()
    forkers = set(log.read_text().split())
    assert data.output.strip() in forkers and len(forkers) >= 2


PRELOADED = """
import atexit, weakref, os
class Thing: pass
thing = Thing()
def say(text):
    print(text, flush=True)
    with open(os.environ["LOG"], "a") as file: file.write(f"{text}\\n")
atexit.register(say, "atexit")
weakref.finalize(thing, say, "finalize")
"""
ENDINGS = [
    "pass",
    "1 / 0",
    "import sys; sys.exit(3)",
    "import os\nif os.fork() == 0: pass\nelse: os.wait()",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
]


def test_exit_handlers_of_preloaded_modules_run_in_the_launcher_and_in_no_snippet(
    tmp_path, preloading
):
    log = tmp_path / "log"
    with preloading({"mine": PRELOADED}, env={"LOG": str(log)}) as manager:
        for code in ENDINGS:
            assert finish(manager, "import mine\n" + code).output.strip() == "", code
            assert not log.exists(), code
        code = "import mine, weakref\nweakref.finalize(mine.Thing, print, 'own')"
        assert finish(manager, code).output == "own\n"
    assert sorted(log.read_text().split()) == ["atexit", "finalize"]


LOGGED = """
import logging.handlers, sys
handler = logging.handlers.MemoryHandler(100, target=logging.StreamHandler(sys.stdout))
logging.getLogger().addHandler(handler)
logging.warning("logged")
"""


def test_a_snippet_s_own_exit_handlers_run_with_the_preloaded_modules(preloading):
    names = "weakref", "concurrent.futures.thread", "atexit", "logging", "asyncio"
    manager = preloading({}, *names)
    for code in (LOGGED, *map(ENDS.get, ("finalize", "executor", "atexit"))):
        assert completed(finish(manager, code)).output == run_plain("-c", code).stdout


def test_an_execution_starts_clean(run):
    dirty = """
    import builtins, gc, json, os, signal, sys
    leaked = builtins.leaked = json.leaked = os.environ["LEAKED"] = sys.modules["leaked"] = "yes"
    sys.path.insert(0, "/leaked")
    sys.argv.append("leaked")
    os.chdir("/")
    os.umask(0o777)
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    del builtins.len, builtins.print
    """
    clean = """
    import builtins, gc, json, os, signal, sys
    print([hasattr(each, "leaked") for each in (builtins, json)], os.getcwd(), os.umask(0), sys.path,
          "leaked" in {**globals(), **sys.modules}, sys.argv, "LEAKED" in os.environ, gc.isenabled(),
          signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """
    for _ in range(2):
        assert completed(run(clean)).output == run_plain("-c", textwrap.dedent(clean)).stdout
        completed(run(dirty))


SHADOWS = """
json socket traceback linecache ast unicodedata _colorize os signal threading io asyncio warnings
_signal marshal select ctypes protocol resource selectors __future__
"""


def test_files_named_like_modules_do_not_break_the_library(tmp_path, monkeypatch):
    for name in SHADOWS.split():
        (tmp_path / f"{name}.py").write_text(f"print('shadow {name}')\nraise Exception('shadow')")
    # Python 3.13 and 3.14 import `linecache` themselves, before any code of `-c`.
    monkeypatch.chdir(tmp_path)
    limits = sidexec.Limits(open_files=64)
    with sidexec.ExecutionManager(cwd=tmp_path, env=ENVIRONMENT) as manager:
        run = functools.partial(finish, manager)
        # In each snippet whose traceback needs it, before and after the launcher has loaded it.
        for _ in range(2):
            data = run("x: int = ('é', 1 / 0)\nreturn")
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


# -- processes and threads in a snippet


ENDINGS_OF_A_CHILD = {
    "1 / 0": 1,
    "sys.exit(3)": 3,
    "os._exit(4)": 4,
    "print('child'); return 'child'": 0,
    "raise KeyboardInterrupt": -2,
}


@pytest.mark.parametrize("end", ENDINGS_OF_A_CHILD)
def test_a_forked_child_ends_by_its_own_exit_code(run, end):
    code = f"""
    import os, sys
    pid = os.fork()
    if not pid:
        report_progress(50)
        {end}
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    report_progress(10)
    """
    data = completed(run(code))
    exit_code = ENDINGS_OF_A_CHILD[end]
    assert data.output == "child\n" * (exit_code == 0) + f"{exit_code}\n"
    assert (data.result, data.progress) == (None, 10)
    assert ("ZeroDivisionError" in data.error_output) == (end == "1 / 0")


def test_an_error_of_a_forked_child_is_not_the_snippet_s(run):
    code = "import os, sys\nif os.fork() == 0: 1 / 0\nos.wait()\nsys.exit(3)"
    data = run(code)
    assert (data.exit_code, data.error) == (3, run("import sys; sys.exit(3)").error)
    assert "ZeroDivisionError" in data.error_output


def test_a_forked_child_ends_as_in_a_plain_interpreter(run):
    code = """
import atexit, os
parent = os.getpid()
class Loud:
    def __del__(self): print("del", os.getpid() == parent, flush=True)
loud = Loud()
atexit.register(lambda: print("atexit", os.getpid() == parent, flush=True))
file = os.fdopen(os.dup(1), "w")
if pid := os.fork(): os.waitpid(pid, 0)
file.write("file %s\\n" % (os.getpid() == parent))
"""
    data = completed(run(code))
    assert sorted(data.output.split("\n")) == sorted(run_plain("-c", code).stdout.split("\n"))
    assert data.error_output == ""


def test_children_are_ended_by_sigterm_as_usual(run):
    code = """
    import os, signal, subprocess, time
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
    child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), -child.wait())
    """
    data = completed(run(code))
    assert (data.output, data.error_output) == ("15 15\n", "")


@pytest.mark.parametrize("method", one_in(2, ["spawn", "forkserver", "fork"]))
def test_multiprocessing_works(tmp_path, manager, method):
    code = f"""
import multiprocessing, time
def square(x):
    return x * x
def sleep(up):
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
    block = tmp_path / "block.py"
    block.write_text(code)
    started = manager.start_with_action_block(block, timeout=20.0).raise_for_error()
    data = completed(manager.wait(started.data.side_execution_id).data)
    assert (data.output, data.error_output) == ("[0, 1, 4, 9]\n-15\n", "")


YOUNG = {
    "forked": """
    for _ in range(200):
        pid = os.fork()
        while not pid:
            signal.pause()
        os.kill(pid, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM
    """,
    "spawned": """
    for _ in range(10):
        process = multiprocessing.get_context("spawn").Process(target=signal.pause)
        process.start()
        process.terminate()
        process.join()
        assert process.exitcode == -signal.SIGTERM
    """,
}


@pytest.mark.parametrize("name", YOUNG)
def test_a_child_is_ended_by_sigterm_however_young_it_is(run, name):
    code = f"    import multiprocessing, os, signal\n{YOUNG[name]}\n    return 'all'"
    assert completed(run(code, timeout=20.0)).result == "all"


@pytest.mark.parametrize("ending, status", [("return 'early'", "completed"), ("1 / 0", "failed")])
def test_what_became_of_it_is_told_before_a_thread_ends(manager, tmp_path, ending, status):
    code = f"""
    import threading, time, os
    def work():
        while not os.path.exists(params["file"]):
            time.sleep(0.01)
        print("thread done")
    threading.Thread(target=work).start()
    {ending}
    """
    id = manager.start_with_code(code, {"file": str(tmp_path / "go")}).id

    def told():
        data = manager.get_status(id).data
        return data.result or data.error_output.strip().rpartition("\n")[2]

    wanted = "early" if status == "completed" else "ZeroDivisionError: division by zero"
    eventually(lambda: told() == wanted)
    assert manager.get_status(id).data.status == "running"
    (tmp_path / "go").touch()
    data = manager.wait(id).data
    assert (data.status, data.output) == (status, "thread done\n")
    assert told() == wanted == (data.error or "early").partition("\n")[0]


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


def test_temporary_directories_are_removed_at_the_end(run):
    code = "import tempfile\nd = tempfile.TemporaryDirectory()\nprint(d.name, end='')"
    data = completed(run(code))
    assert not os.path.exists(data.output)


WRITES = {
    "print": "print(data, end='')",
    "write": "sys.stdout.write(data)",
    "binary": "sys.stdout.buffer.write(data.encode())",
    "fresh file": "with open(1, 'w', closefd=False) as f: f.write(data)",
    "error output": "sys.stderr.write(data)",
    "lines": "for i in range(0, len(data), 64): print(data[i:i + 64], end='')",
}


@pytest.mark.parametrize("name, pipe", crossed(2, WRITES, [1048576, 4096]))
def test_no_byte_is_lost_when_signals_interrupt_a_write(name, pipe):
    code = f"""
    import fcntl, signal, sys
    for fd in (1, 2):
        fcntl.fcntl(fd, 1031, {pipe})
    ticks = 0
    def tick(signum, frame):
        global ticks
        ticks += 1
    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    data = "0123456789abcdef" * params["times"]
    {WRITES[name]}
    signal.setitimer(signal.ITIMER_REAL, 0)
    return ticks
    """
    times = 250_000 if pipe > 4096 else 65_536
    with sidexec.ExecutionManager(env=ENVIRONMENT) as manager:
        data = completed(finish(manager, code, {"times": times}))
    assert data.result > 0
    assert data.output + data.error_output == "0123456789abcdef" * times


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


def test_a_preloaded_module_may_write_much_to_its_standard_error(preloading):
    chatty = "import sys\nfor n in range(10_000): print('deprecated, line', n, file=sys.stderr)\n"
    assert finish(preloading({"chatty": chatty}), "return 1").result == 1
    manager = preloading({"broken": "import chatty\nraise ImportError('broken on purpose')"})
    assert "broken on purpose" in manager.start_with_code("return 1").error


@pytest.mark.parametrize("argument", ["work", "future"])
def test_a_function_that_is_named_like_one_of_asyncio_fails_like_any_other(manager, argument):
    code = f"""
import asyncio
def run_until_complete({argument}):
    raise ValueError("its own")
await asyncio.sleep(0)
run_until_complete(1)
"""
    data = manager.wait(manager.start_with_code(code).id).data
    assert data.error.startswith("ValueError: its own\n")
    assert data.error_output.startswith("Traceback")


def test_exit_handlers_run_although_the_wait_for_threads_is_interrupted(manager):
    code = """
import _thread, atexit, sys, threading, time
atexit.register(print, "exit handler")
sys.excepthook = lambda *error: 1 / 0  # a plain interpreter does not call it for that
def interrupt():
    while main.is_alive(): time.sleep(0.01)  # until it waits for threads
    time.sleep(0.1)
    _thread.interrupt_main()
main = threading.main_thread()
threading.Thread(target=interrupt).start()
"""
    data = manager.wait(manager.start_with_code(code).id).data
    assert (data.status, data.output) == ("completed", "exit handler\n")
    assert "KeyboardInterrupt" in data.error_output
    assert "leaving.py" not in data.error_output
    assert "ZeroDivisionError" not in data.error_output
