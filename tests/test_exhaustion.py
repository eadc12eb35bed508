"""The system has nothing left: of descriptors, processes, memory or threads.

A start then says so; nothing of it is left; and when it is over the next one works.
"""

import _thread
import os
import random

import pytest
from conftest import (
    FOREVER,
    crossed,
    descriptors,
    eventually,
    finish,
    limits_memory,
    one_in,
    within,
)
from test_misbehaving_hosts import PRELUDE, host  # noqa: F401

from sidexec import Limits

SLOW = pytest.mark.slow

HELPERS = """
import resource

def check(manager, started, words):
    # Either it was started and is as ever, or it says why not: whether it was started.
    if started.success:
        data = manager.wait(started.id, timeout=20).data
        assert (data.status, data.result) == ("completed", 1), data
        return True
    assert started.data.side_execution_id is None
    assert started.data.status == "failed"
    assert any(word in started.error for word in words), started.error
    return False

def check_works(manager):
    assert check(manager, manager.start_with_code("return 1"), [])

def at_once(count, call):
    threads = [threading.Thread(target=call) for _ in range(count)]
    for each in threads: each.start()
    for each in threads: each.join()
"""

DESCRIPTORS = """
WORDS = ["Too many open files", "descriptors"]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

@contextlib.contextmanager
def few_left(count):
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    for _ in range(count):
        os.close(taken.pop())
    try:
        yield
    finally:
        for fd in taken:
            os.close(fd)
"""

# The limit is per user and root is exempt, so the host becomes a user of its own. It keeps
# the one capability to read its interpreter, wherever that is.
PROCESSES = """
import ctypes
def become(user):
    libc = ctypes.CDLL(None, use_errno=True)
    def check(result):
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    check(libc.prctl(8, 1, 0, 0, 0))  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    read = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    check(libc.capset(header, (ctypes.c_uint32 * 6)(read, read, read, 0, 0, 0)))
    for capability in (1, 2):
        check(libc.prctl(47, 2, capability, 0, 0))  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE
    check(libc.prctl(4, 1, 0, 0, 0))  # PR_SET_DUMPABLE, or /proc/self would be root's

WORDS = ["Resource temporarily unavailable", "can't start new thread"]
user = int(sys.argv[2])
if user:
    become(user)

def tasks():
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count

@contextlib.contextmanager
def few_left(count):
    taken = []
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                pid = os.fork()
                if pid == 0:
                    os.execv("/bin/sleep", ["sleep", "300"])
                taken.append(pid)
        for _ in range(count):
            end(taken.pop())
        yield
    finally:
        for pid in taken:
            end(pid)

def end(pid):
    os.kill(pid, 9)
    os.waitpid(pid, 0)

limit = tasks() + 30
resource.setrlimit(resource.RLIMIT_NPROC, (limit, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
"""


@pytest.fixture
def host_with_few(host):
    """Run a script as a host that has a `few_left` of descriptors or of processes."""

    def run(resource, script, *args):
        user = 61000 + random.randrange(4000) if os.getuid() == 0 else 0
        prelude = {"descriptors": DESCRIPTORS, "processes": PROCESSES}[resource]
        return host(script, user, *args, prelude=PRELUDE + HELPERS + prelude)

    return run


@pytest.mark.parametrize(
    "resource, counts",
    [
        ("descriptors", range(0, 22, 3)),
        pytest.param("descriptors", range(22), marks=SLOW),
        ("processes", (0, 1, 7)),
        pytest.param("processes", range(8), marks=SLOW),
    ],
)
def test_a_first_start_with_few_left_works_or_says_why_not(host_with_few, resource, counts):
    script = """
    found = []
    for count in json.loads(sys.argv[3]):
        manager = sidexec.ExecutionManager(grace_period=5)
        with few_left(count):
            found.append(check(manager, manager.start_with_code("return 1"), WORDS))
            assert manager.list_executions().data.count == found[-1]
        check_works(manager)
        check_works(manager)
        manager.close()
        assert_nothing_left()
    report(found)
    """
    found = host_with_few(resource, script, [*counts])
    assert found[0] is False and found[-1] is True


@pytest.mark.parametrize(
    "resource, counts",
    [
        ("descriptors", 2 * (0, 3, 6, 9)),
        pytest.param("descriptors", [*range(10), *range(10)], marks=SLOW),
        ("processes", (0, 2, 4)),
    ],
)
def test_later_starts_with_few_left_work_or_say_why_not(host_with_few, resource, counts):
    script = """
    found = []
    with sidexec.ExecutionManager(grace_period=5) as manager:
        check_works(manager)
        for count in json.loads(sys.argv[3]):
            with few_left(count):
                held = [manager.start_with_code("import time\\ntime.sleep(60)") for _ in range(4)]
                for started in held:
                    found.append(started.success)
                    if started.success:
                        manager.stop(started.id).raise_for_error()
                    else:
                        assert not check(manager, started, WORDS)
            check_works(manager)
    assert_nothing_left()
    report(found)
    """
    found = host_with_few(resource, script, [*counts])
    assert True in found and False in found


def test_several_at_once_with_few_descriptors_left_work_or_say_why_not(host_with_few):
    script = """
    found = []
    def start():
        # Long enough for all of them to want descriptors at the same time.
        started = manager.start_with_code("import time\\ntime.sleep(0.1)\\nreturn 1")
        found.append(check(manager, started, WORDS))
    with sidexec.ExecutionManager(grace_period=5) as manager:
        check_works(manager)
        for count in (3, 7, 9):
            with few_left(count):
                at_once(8, start)
            check_works(manager)
    assert len(found) == 24
    assert_nothing_left()
    report(found)
    """
    found = host_with_few("descriptors", script)
    assert True in found and False in found


def test_what_runs_can_be_watched_stopped_and_closed_without_a_descriptor_left(host_with_few):
    script = """
    manager = sidexec.ExecutionManager(grace_period=5)
    code = "import os, time\\ntry: os.write(1, b'ready\\\\n'); time.sleep(60)\\nfinally: print('clean')"
    ids = [manager.start_with_code(code).id for _ in range(3)]
    for id in ids:
        eventually(lambda: "ready" in manager.get_status(id).data.output)
    with few_left(0):
        assert manager.get_status(ids[0]).data.status == "running"
        manager.stop(ids[0])
    with few_left(0):
        manager.close()
    for id in ids:
        data = manager.get_status(id).data
        assert (data.status, data.output, data.exit_code) == ("stopped", "ready\\nclean\\n", 143), data
    assert_nothing_left()
    report("done")
    """
    assert host_with_few("descriptors", script) == "done"


# The other side's code is patched on its way: where it forks, it fails while a file is there.
FORKS = """
from sidexec.engine import payload
where, flag = sys.argv[2], sys.argv[3]
load = payload._load
def patched(name, as_source):
    if name != where:
        return load(name, as_source)
    source = load(name, True)
    assert source.count("os.fork()") == 1
    return source.replace("os.fork()", "_fork()") + f'''
def _fork():
    if os.path.exists({flag!r}):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return os.fork()
'''
payload._load = patched
process = "a keeper" if where == "child.launcher" else "the snippet"
WORDS = [f"could not fork {process}: Resource temporarily unavailable (see `ulimit -a`)"]
"""


@pytest.mark.parametrize(
    "where, first", crossed(2, ["child.launcher", "child.keeper"], [True, False])
)
def test_a_fork_that_fails_on_the_other_side_is_told(host, tmp_path, where, first):
    script = f"""
    found = []
    def start():
        found.append(check(manager, manager.start_with_code("return 1"), WORDS))
    with sidexec.ExecutionManager(grace_period=5) as manager:
        if not {first}:
            check_works(manager)
        for _ in range(2):
            open(flag, "w").close()
            for _ in range(4):
                start()
            at_once(4, start)
            os.remove(flag)
            check_works(manager)
            check_works(manager)
        assert manager.list_executions("running").data.count == 0
    assert_nothing_left()
    report(found)
    """
    found = host(script, where, tmp_path / "flag", prelude=PRELUDE + HELPERS + FORKS)
    assert len(found) == 16
    # One that was forked ahead is as good as ever; no more than one is.
    assert found.count(False) >= 2 * 7


# -- memory

MEMORIES = [1, 4096, 2**20, 16 * 2**20, 24 * 2**20, 32 * 2**20, 48 * 2**20]
GREEDY = {
    "at_once": "x = bytearray(2**30)",
    "in_pieces": "x = []\nwhile True: x.append(bytearray(100000))",
    "in_small_ones": "x = []\nwhile True: x.append([None] * 10)",
    "imports": "import json, asyncio, decimal\nx = bytearray(2**30)",
    "defines": "def f(): return f()\nx = bytearray(2**30)",
}


@limits_memory
@pytest.mark.parametrize("name, memory", crossed(5, GREEDY, MEMORIES))
def test_a_snippet_without_memory_fails_for_itself(run, name, memory):
    data = run(GREEDY[name], limits=Limits(memory=memory))
    assert data.status == "failed", data
    assert "MemoryError" in data.error or "killed by" in data.error or data.exit_code > 0, data
    assert run("return 1").result == 1


@limits_memory
@pytest.mark.parametrize("megabytes", [256, 400])
def test_a_moderate_limit_of_memory_is_a_memory_error_that_a_snippet_can_handle(run, megabytes):
    limits = Limits(memory=megabytes * 2**20)
    code = "try: bytearray(2**30)\nexcept MemoryError: return len(bytearray(10**7))"
    assert run(code, limits=limits).result == 10**7
    data = run("bytearray(2**30)", limits=limits)
    assert data.status == "failed"
    assert data.error.startswith("MemoryError")
    assert "bytearray(2**30)" in data.error


@limits_memory
@pytest.mark.parametrize("memory", one_in(6, MEMORIES))
def test_a_snippet_without_memory_can_be_stopped(manager, memory):
    code = """
    import time
    x = []
    while True:
        try: x.append(bytearray(100000))
        except MemoryError: time.sleep(0.001)
    """
    id = manager.start_with_code(code, limits=Limits(memory=memory)).id
    data = manager.wait(id, timeout=0.1).data
    with within(20):
        response = manager.stop(id)
    assert response.data.status in ("stopped", "failed"), (data, response)


# -- threads


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("threads, is_first", [(0, True), (1, True), (2, True), (0, False)])
def test_without_a_thread_left_a_start_says_so(
    monkeypatch, make_manager, threads, is_first, closes
):
    """It takes one for the launcher, one for the execution, and one for `on_output`."""
    left = threads * [_thread.start_new_thread]

    def start_new_thread(*args):
        if not left:
            raise RuntimeError("can't start new thread")
        return left.pop()(*args)

    manager = make_manager(grace_period=60)
    if not is_first:
        finish(manager, "pass")
    before = set(descriptors())
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", start_new_thread)
        for name in () if is_first else ("engine", "launcher", "pair"):
            patch.setattr(f"sidexec.engine.{name}.LOOK_INTERVAL", 60.0)
        for _ in range(3):
            with within(20):  # it waits for no thread that was never there
                started = manager.start_with_code(FOREVER, on_output=print)
            assert not started.success
            assert started.data.side_execution_id is None
            assert "thread" in started.error
        assert manager.list_executions().data.count == (0 if is_first else 1)
    if is_first and threads < 2:  # there is no launcher
        assert set(descriptors()) <= before
    if closes:
        closed = []
        _thread.start_new_thread(lambda: closed.append(manager.close()), ())
        eventually(lambda: closed)
        assert not manager.start_with_code("return 1").success
    else:
        chunks = []
        assert finish(manager, "print('hello')", on_output=chunks.append).status == "completed"
        assert "".join(chunk.text for chunk in chunks) == "hello\n"


def test_an_error_is_told_where_no_more_files_can_be_opened(make_manager):
    code = "files = []\nwhile True: files.append(open('/dev/null'))"
    for _ in range(2):  # in a first execution what describes an error is still to be loaded
        data = finish(make_manager(), code, limits=Limits(open_files=50))
        assert data.error.startswith("OSError: [Errno 24] Too many open files: '/dev/null'")
        assert "Traceback" in data.error_output


@limits_memory
def test_code_that_has_filled_its_memory_ends_as_any_other(run):
    code = """
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (300_000_000, 300_000_000))
    held = []
    try:
        while True: held.append(bytearray(4000))
    except MemoryError:
        print("full")
    return True
    """
    data = run(code)
    assert (data.status, data.result, data.output) == ("completed", True, "full\n"), data
    data = run(code.replace("except MemoryError", "finally"))
    assert data.error.startswith("MemoryError") and "leaving" not in data.error_output, data
