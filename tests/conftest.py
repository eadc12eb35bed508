"""What all tests share: managers that are closed, and a check that nothing is left."""

import concurrent.futures
import contextlib
import functools
import operator
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import sidexec

# What the tests start, and compare with, has none of what changes an interpreter, nor
# compiles the package each time.
for name in list(os.environ):
    is_interpreter_s = name.startswith("PYTHON") and name != "PYTHONHOME"
    if is_interpreter_s or name in ("COLUMNS", "FORCE_COLOR"):
        del os.environ[name]

# Ignored by `nohup` or a shell's `&`, they would be in the plain interpreters as well
# that tests compare with.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(sidexec.__file__)))
# For managers that several tests share: pytest changes the environment of this process for
# each test, and a changed environment costs a launcher.
ENVIRONMENT = {name: os.environ[name] for name in os.environ if name != "PYTEST_CURRENT_TEST"}
HOST_ENVIRONMENT = {**ENVIRONMENT, "PYTHONPATH": ROOT}

IS_FREE_THREADED = "t" in sys.abiflags
# There the allocator reserves address space ahead; see test_lifetime.py.
limits_memory = pytest.mark.skipif(IS_FREE_THREADED, reason="can't be limited without the GIL")

FOREVER = "import time\nprint('ready', flush=True)\nwhile True: time.sleep(60)"


def eventually(condition, timeout=100.0):
    """Wait until `condition()` is true, and return what it returned.

    The timeout is one that only a hang reaches.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def one_in(every, values):
    """For `parametrize`: one value in so many is always tried, the others are slow ones."""
    return [
        value if number % every == 0 else pytest.param(value, marks=pytest.mark.slow)
        for number, value in enumerate(values)
    ]


def crossed(every, rows, columns):
    """For `parametrize`: each of the one with each of the other, one pair in so many not slow."""
    return [
        pytest.param(row, column, marks=() if (i + j) % every == 0 else pytest.mark.slow)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def ahead(request, function, argument_of):
    """For a module's fixture: `function`, called ahead of the tests, which run meanwhile.

    `argument_of` says for each test of the module that is selected what it will ask for.
    """
    wanted = [argument_of(item) for item in request.session.items if item.module is request.module]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = {each: pool.submit(function, each) for each in wanted if each is not None}
        yield lambda each: found[each].result() if each in found else function(each)
        pool.shutdown(cancel_futures=True)


def argument(item, name):
    """What a test is parametrized with; None where it is not."""
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


def children(pid="self"):
    """The pids of a process's children."""
    while True:
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            return []
        found = []
        # A thread that ends meanwhile hands its children over to another one.
        with contextlib.suppress(OSError):
            for thread in threads:
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    found += map(int, file.read().split())
        with contextlib.suppress(OSError):
            if os.listdir(f"/proc/{pid}/task") == threads:
                return found


def tree(pid):
    """The pids of all descendants of a process."""
    found = []
    for child in children(pid):
        found += [child, *tree(child)]
    return found


def stat_of(pid):
    """The fields after a process's name; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def state_of(pid):
    """One letter; None where there is no such process."""
    fields = stat_of(pid)
    return fields and fields[0]


def is_alive(pid):
    """Whether a process exists and is no zombie."""
    return state_of(pid) not in (None, "Z", "X")


def descriptors(pid="self"):
    """The descriptors of a process, less those that it closes, or the listing itself opens."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return {fd: name for fd, name in found.items() if not name.startswith("/proc/")}


SHARED_MANAGERS = []


@contextlib.contextmanager
def nothing_left():
    """Check that a block leaves no child, thread or descriptor of this process behind."""
    for manager in SHARED_MANAGERS:  # whose spare pairs are to be there before and after
        launchers = manager._engine._launchers
        eventually(
            lambda launchers=launchers: all(
                each.requests._spares for each in launchers if each.requests.keeps_spare
            )
        )

    def look():
        return set(children()), set(descriptors()), len(os.listdir("/proc/self/task"))

    before = look()
    yield
    # The thread that closed everything ends a moment after it has said so. What `ahead` runs
    # beside the test comes and goes.
    deadline = time.monotonic() + 100
    now = look()
    while not all(map(operator.le, now, before)) and time.monotonic() < deadline:
        time.sleep(0.005)
        now = look()
    assert now[0] <= before[0]
    assert now[1] <= before[1], descriptors()
    assert now[2] <= before[2], threading.enumerate()


@contextlib.contextmanager
def within(seconds):
    """A bound that only a hang breaks, or a grace period that should not count."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@contextlib.contextmanager
def alarm(handler, seconds, interval=0.0):
    """Have `handler` interrupt the main thread, once or again and again."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_as_host(code, *arguments, **options):
    """Run code as a host of its own, which must neither hang nor complain: what it printed."""
    options = {"stdin": subprocess.DEVNULL, "env": HOST_ENVIRONMENT, "timeout": 60, **options}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def begin(manager, code, params=None, *, ready="ready\n", **options):
    """Start code, and wait until it has written a line `ready`: its id."""
    id = manager.start_with_code(code, params, **options).id

    def is_ready():
        data = manager.get_status(id).data
        return ready in data.output or data.status != "running"

    if ready is not None:
        eventually(is_ready)
        assert ready in manager.get_status(id).data.output, manager.get_status(id)
    return id


def finish(manager, code, params=None, **options):
    """Run code to its end: its status."""
    id = manager.start_with_code(code, params, **options).id
    return manager.wait(id).raise_for_error().data


def completed(data):
    assert data.status == "completed", data
    return data


def has_printed(manager, id, text):
    eventually(lambda: text in manager.get_status(id).data.output)


def time_out(manager, code, params=None):
    """Start code with a timeout that it meets once it has written a line `ready`: its id."""
    for timeout in (0.2, 2.0, 20.0):  # a busy machine may need longer to get there
        id = manager.start_with_code(code, params, timeout).id
        eventually(lambda id=id: manager.get_status(id).data.stop_reason, timeout + 20)
        if "ready\n" in manager.get_status(id).data.output:
            return id
        manager.wait(id)
    raise AssertionError("the snippet did not get ready")


@pytest.fixture
def make_manager():
    """Make managers that are closed, and looked after, when the test is over."""
    with nothing_left():
        with contextlib.ExitStack() as stack:
            yield lambda **options: stack.enter_context(sidexec.ExecutionManager(**options))


@pytest.fixture
def manager(make_manager):
    return make_manager(grace_period=5.0, default_timeout=60.0)


@pytest.fixture
def preloading(make_manager, tmp_path):
    """Make a manager that preloads modules, which are written for it, and others.

    `env` is what is more in its environment.
    """

    def preloading(modules, *others, env=None, **options):
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        env = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path), **(env or {})}
        names = iter([*others, *modules])  # any iterable will do
        return make_manager(env=env, preload=names, **options)

    return preloading


@pytest.fixture(scope="module")
def shared(request):
    """A manager for all tests of a module that need none of their own.

    A module's `SHARED` are options of its own.
    """
    options = {"grace_period": 5.0, "default_timeout": 60.0, "env": ENVIRONMENT}
    options |= getattr(request.module, "SHARED", {})
    with nothing_left(), sidexec.ExecutionManager(**options) as manager:
        SHARED_MANAGERS.append(manager)
        yield manager
        SHARED_MANAGERS.remove(manager)


@pytest.fixture(scope="module")
def with_asyncio(shared):
    """Has asyncio loaded already: its import takes longer than all else."""
    with sidexec.ExecutionManager(preload=["asyncio"], env=ENVIRONMENT) as manager:
        yield manager


@pytest.fixture
def shared_manager(shared):
    """For a module whose `manager` it is: no test leaves executions running."""
    yield shared
    assert not shared.stop_all(force=True), "the test has left executions running"


@pytest.fixture
def swept_manager(shared):
    """The same, where a test may leave executions running."""
    yield shared
    shared.stop_all(force=True)


@pytest.fixture
def run(manager):
    """Run code to its end: its status."""
    return functools.partial(finish, manager)


@pytest.fixture
def start(manager):
    """Start code, and wait until it has written a line `ready`: its id."""
    return functools.partial(begin, manager)


@pytest.fixture
def trace(tmp_path):
    """What the processes of `programs` note down, and an end to those that are left."""
    import programs  # which imports this module

    trace = programs.Trace(tmp_path / "trace")
    yield trace
    trace.kill()
