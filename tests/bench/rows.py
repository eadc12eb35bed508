"""The rows: each a function that measures sidexec and a bare child in turn.

A row yields results; its docstring says what it measures. It runs in a fresh host
process (see `run.py`), whose interpreter is also the one of both kinds of children.
"""

import contextlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings

MAIN = "main"
CHOICE = "choice"
TABLES = {
    MAIN: ["measured", "sidexec", "bare", "ratio", "at most", "aim"],
    CHOICE: ["a fresh worker that says 1", "takes", "graceful stop", "live output", "tree"],
}
ROWS = {}
KIB, MB = 1024, 1000 * 1000
# How long a user pauses between two starts, at the least.
PAUSE = 0.15
MANY = 200

HELLO = "print('x', flush=True); import time; time.sleep(600)"
IDLE = "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(600)"
TIDY = """\
import time
try:
    print('ready', flush=True)
    time.sleep(600)
finally:
    print('tidy')
"""
BARE_TIDY = f"""\
import signal, sys
signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(143))
{TIDY}"""
DEAF = """\
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('ready', flush=True)
time.sleep(600)
"""
LINES = "line = 'x' * 99\nfor i in range({}): print(line)"
RAW = "import os\ndata = b'x' * 65536\nfor i in range({}): os.write(1, data)"


def row(function):
    ROWS[function.__name__] = function
    return function


def result(measured, ours, bare=None, unit="s", at_most=None, aim=None, bounded="ratio"):
    """One line of the table; `ours` and `bare` are figures or samples of them."""
    ours, bare = ([each] if isinstance(each, (int, float)) else each for each in (ours, bare))
    middle = statistics.median(ours)
    bare_middle = None if bare is None else statistics.median(bare)
    return {
        "table": MAIN,
        "measured": measured,
        "sidexec": middle,
        "bare": bare_middle,
        "ratio": None if bare_middle is None else middle / bare_middle,
        "unit": unit,
        "at_most": at_most,
        "aim": aim,
        "bounded": bounded,
        "samples": {"sidexec": ours, "bare": bare},
    }


def main(name, how):
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # blocked while this was started
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    json.dump(list(ROWS[name](how == "quick")), sys.stdout)


# -- our side


@contextlib.contextmanager
def managed(**options):
    """A manager that has run something already, so that all is warm."""
    from sidexec import ExecutionManager

    with ExecutionManager(default_timeout=None, **options) as manager:
        finish(manager, "pass")
        time.sleep(PAUSE)
        yield manager


def begin(manager, code):
    return manager.start_with_code(code).raise_for_error().data.side_execution_id


def begin_and_hear(manager, code):
    id = begin(manager, code)
    return id, next(manager.follow(id)).text


def hear_line(manager, id):
    """The first line of output, which may come in pieces."""
    line = ""
    for chunk in manager.follow(id):
        line += chunk.text
        if "\n" in line:
            return line
    raise AssertionError(manager.get_status(id))


def finish(manager, code):
    data = manager.wait(begin(manager, code)).data
    assert data.status == "completed", data
    return data


def end(manager, id, **options):
    data = manager.stop(id, **options).data
    assert data.status == "stopped", data
    return data


def first_run():
    """How long a new manager takes until it has run something."""
    from sidexec import ExecutionManager

    began = time.perf_counter()
    with ExecutionManager() as manager:
        finish(manager, "print(1)")
        return time.perf_counter() - began


# -- the bare side


@contextlib.contextmanager
def bare(code, *options):
    """A bare child; it is gone, and its pipe closed, when the block ends."""
    command = [sys.executable, *options, "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()


def hear(process):
    return os.read(process.stdout.fileno(), 65536)


def drain(process):
    total = 0
    while True:
        data = hear(process)
        if not data:
            return total
        total += len(data)


def bare_run():
    done = subprocess.run([sys.executable, "-c", "print(1)"], stdout=subprocess.PIPE)
    assert done.stdout == b"1\n", done


# -- what the system tells


def children(pid="self"):
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return found


def memory(pid, field):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * KIB


def cpu_of(pids):
    """The seconds of processor time that processes have had."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/schedstat") as file:
            total += int(file.read().split()[0])
    return total / 1e9


class Clock:
    """`with Clock(samples):` adds the seconds that the block took to the samples."""

    def __init__(self, samples):
        self.samples = samples

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *exc_info):
        self.samples.append(time.perf_counter() - self.began)


# -- the rows


@row
def start(quick):
    """From a start to the first byte of output, and the call that starts alone."""
    ours, calls, theirs, popens = [], [], [], []
    with managed() as manager:
        for _ in range(8 if quick else 40):
            time.sleep(PAUSE)
            with Clock(ours):
                with Clock(calls):
                    id = begin(manager, HELLO)
                next(manager.follow(id))
            end(manager, id, force=True)
            time.sleep(PAUSE)
            began = time.perf_counter()
            with bare(HELLO) as process:
                popens.append(time.perf_counter() - began)
                hear(process)
                theirs.append(time.perf_counter() - began)
    yield result("start to the first byte of output", ours, theirs, "s", 0.06, 0.04)
    yield result("the start call, against the `Popen` call", calls, popens, "s", 0.5, 0.2)

    ours, theirs = [], []
    for _ in range(2 if quick else 5):
        with managed() as manager:
            end(manager, begin(manager, HELLO), force=True)
            time.sleep(PAUSE)
            with Clock(ours):
                for id in [begin(manager, HELLO) for _ in range(10)]:
                    next(manager.follow(id))
            manager.stop_all(force=True)
        with contextlib.ExitStack() as stack:
            with Clock(theirs):
                for process in [stack.enter_context(bare(HELLO)) for _ in range(10)]:
                    hear(process)
    yield result("ten starts back to back, all up", ours, theirs, "s", 0.25, 0.15)


@row
def fresh(quick):
    """What a fresh process pays: the import, and a run from the command line."""
    imports = "import dataclasses, logging, subprocess"
    ours, theirs = [], []
    for _ in range(5 if quick else 20):
        for code, times in (("import sidexec", ours), (imports, theirs)):
            with Clock(times):
                subprocess.run([sys.executable, "-c", code], check=True, env=with_package())
    yield result(f"`import sidexec`, against `{imports}`", ours, theirs, "s", 1.2, 1.05)
    ours, theirs = [], []
    for _ in range(5 if quick else 20):
        for arguments, times in (
            (["-m", "sidexec", "run", "-c", "pass"], ours),
            (["-c", "pass"], theirs),
        ):
            with Clock(times):
                subprocess.run([sys.executable, *arguments], check=True, env=with_package())
    yield result(
        "`python -m sidexec run -c pass`, against `python -c pass`", ours, theirs, "s", 4, 3
    )


def with_package():
    return {**os.environ, "PYTHONPATH": sys.path[0]}


@row
def first(quick):
    """The very first execution of a manager, from `ExecutionManager()` to completed."""
    ours, theirs = [], []
    for _ in range(5 if quick else 20):
        ours.append(first_run())
        with Clock(theirs):
            bare_run()
    yield result("the first execution of a manager", ours, theirs, "s", 1.8, 1.4)


@row
def stop(quick):
    """From a stop to all reaped, read and closed; a `finally` prints meanwhile."""
    ours, theirs = [], []
    with managed() as manager:
        for _ in range(8 if quick else 40):
            id, _ = begin_and_hear(manager, TIDY)
            time.sleep(PAUSE)
            with Clock(ours):
                data = end(manager, id)
            assert data.output == "ready\ntidy\n" and not data.forced, data
            with bare(BARE_TIDY) as process:
                hear(process)
                time.sleep(PAUSE)
                with Clock(theirs):
                    process.send_signal(signal.SIGTERM)
                    drain(process)
                    process.wait()
                    process.stdout.close()
    yield result("stop, with a `finally` that prints", ours, theirs, "s", 0.40, 0.30)


@row
def runs(quick):
    """100 runs of print(1), one after the other."""
    ours, theirs = [], []
    with managed() as manager:
        for _ in range(1 if quick else 5):
            with Clock(ours):
                for _ in range(100):
                    finish(manager, "print(1)")
            time.sleep(PAUSE)
            with Clock(theirs):
                for _ in range(100):
                    bare_run()
    yield result("100 runs of `print(1)` in sequence", ours, theirs, "s", 0.22, 0.15)


@row
def lines(quick):
    """40 MB of printed lines of 100 bytes."""
    code = LINES.format(400_000)
    ours, theirs = compare_output(code, 40 * MB, 2 if quick else 7)
    yield result("40 MB of printed 100-byte lines", ours, theirs, "s", 1.1, 0.7)


@row
def raw(quick):
    """256 MB of raw writes of 64 KiB."""
    code = RAW.format(4096)
    ours, theirs = compare_output(code, 4096 * 65536, 2 if quick else 7)
    yield result("256 MB of raw 64 KiB writes", ours, theirs, "s", 2.0, 1.1)


def compare_output(code, size, rounds):
    ours, theirs = [], []
    with managed() as manager:
        for _ in range(rounds):
            time.sleep(PAUSE)
            with Clock(ours):
                data = finish(manager, code)
            assert len(data.output) + data.output_dropped == size, data.output_dropped
            time.sleep(PAUSE)
            with Clock(theirs):
                with bare(code, "-u") as process:
                    got = drain(process)
                    process.wait()
            assert got == size, got
    return ours, theirs


@row
def idle(quick):
    """200 idle executions at once: memory, processor time, and stopping them all."""
    with managed() as manager:
        for id in [begin(manager, "pass") for _ in range(50)]:  # buffers that stay
            manager.wait(id)
        before = memory("self", "Rss")
        pids = start_idle(manager)
        time.sleep(1)
        own = (memory("self", "Rss") - before) / MANY
        launcher = memory(children()[0], "Pss")
        pss = [sum(memory(pid, "Pss") for pid in each) for each in pids]
        helpers = [children()[0], *(keeper for _, keeper in pids)]
        seconds = 2 if quick else 8
        helpers_before, own_before = cpu_of(helpers), time.process_time()
        time.sleep(seconds)
        cpu = 100 * (time.process_time() - own_before) / seconds
        helpers_cpu = 100 * (cpu_of(helpers) - helpers_before) / seconds
        stops = [stop_all(manager)]
        for _ in range(0 if quick else 4):
            start_idle(manager)
            time.sleep(PAUSE)
            stops.append(stop_all(manager))
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(bare(IDLE)) for _ in range(MANY)]
        for process in processes:
            hear(process)
        time.sleep(1)
        bare_pss = [memory(process.pid, "Pss") for process in processes]
        for process in processes:
            process.kill()
    absolute = {"bounded": "sidexec"}
    yield result(
        f"memory of an idle execution, keeper included, of {MANY}", pss, bare_pss, "B", 0.8, 0.65
    )
    yield result(f"the launcher's share of it, of {MANY}", launcher / MANY, None, "B")
    yield result(
        "host memory for each idle execution", own, None, "B", 24 * KIB, 16 * KIB, **absolute
    )
    yield result(f"host processor time with {MANY} idle", cpu, None, "%", 0.5, 0.05, **absolute)
    yield result(f"that of launcher and keepers with {MANY} idle", helpers_cpu, None, "%")
    yield result(f"{MANY} stopped at once by `stop_all`", stops, None, "s", 2.0, 0.3, **absolute)


def start_idle(manager):
    """Start many that are idle: the pids of each snippet and its keeper."""
    ids = [begin(manager, IDLE) for _ in range(MANY)]
    return [[int(pid) for pid in hear_line(manager, id).split()] for id in ids]


def stop_all(manager):
    samples = []
    with Clock(samples):
        responses = manager.stop_all()
    assert [each.data.status for each in responses] == ["stopped"] * MANY
    assert not any(each.data.forced for each in responses)
    return samples[0]


@row
def deaf(quick):
    """50 executions that ignore SIGTERM, stopped at once with a grace of 1 s."""
    times = []
    with managed() as manager:
        for _ in range(1 if quick else 3):
            ids = [begin(manager, DEAF) for _ in range(50)]
            for id in ids:
                next(manager.follow(id))
            with Clock(times):
                responses = manager.stop_all(grace=1.0)
            assert all(each.data.forced for each in responses) and len(responses) == 50
    measured = "50 deaf ones stopped at once, grace 1 s"
    yield result(measured, times, None, "s", 1.6, 1.05, bounded="sidexec")


@row
def status(quick):
    """`get_status` of a running execution with 20 MB of output, nothing new."""
    code = LINES.format(200_000) + "\nimport sys, time\nsys.stdout.flush()\ntime.sleep(600)"
    often, seldom = [], []
    with managed(max_output=32 * MB) as manager:
        id = begin(manager, code)
        while len(manager.get_status(id).data.output) < 20 * MB:
            time.sleep(0.02)
        for _ in range(200 if quick else 1000):
            with Clock(often):
                manager.get_status(id)
        for _ in range(5 if quick else 20):
            time.sleep(PAUSE)
            with Clock(seldom):
                manager.get_status(id)
        assert manager.get_status(id).data.status == "running"
    measured = "`get_status` with 20 MB of output, nothing new"
    yield result(measured, often, None, "s", 200e-6, 20e-6, bounded="sidexec")
    yield result(f"the same, asked every {PAUSE} s", seldom, None, "s")


@row
def preload(quick):
    """`import asyncio` in a snippet, with and without `preload`."""
    code = (
        "import time; began = time.perf_counter(); import asyncio;"
        " print(time.perf_counter() - began)"
    )
    with_it, without, theirs = [], [], []
    with managed(preload=["json", "asyncio"]) as loaded, managed() as plain:
        for _ in range(4 if quick else 15):
            with_it.append(float(finish(loaded, code).output))
            without.append(float(finish(plain, code).output))
            with bare(code) as process:
                theirs.append(float(hear(process)))
    yield result("`import asyncio` in a snippet", without, theirs)
    yield result("the same with `preload=['json', 'asyncio']`", with_it, theirs)


@row
def growth(quick):
    """Start and stop with 0, 100 and 300 executions running already."""
    rounds = 5 if quick else 15
    running = 0
    with managed() as manager:
        for level in (0, 100, 300):
            for id in [begin(manager, IDLE) for _ in range(level - running)]:
                next(manager.follow(id))
            running = level
            starts, stops, theirs, their_stops = [], [], [], []
            for _ in range(rounds):
                time.sleep(PAUSE)
                with Clock(starts):
                    id, _ = begin_and_hear(manager, TIDY)
                time.sleep(PAUSE)
                with Clock(stops):
                    end(manager, id)
                began = time.perf_counter()
                with bare(BARE_TIDY) as process:
                    hear(process)
                    theirs.append(time.perf_counter() - began)
                    time.sleep(PAUSE)
                    with Clock(their_stops):
                        process.terminate()
                        drain(process)
                        process.wait()
            yield result(f"start with {level} running", starts, theirs)
            yield result(f"stop with {level} running", stops, their_stops)
        manager.stop_all()


@row
def heavy(quick):
    """A start in a host that holds 2 GB."""
    held = []
    for size in (0, 2 * 2**30):
        held.append(b"\1" * size)  # touches every page
        label = f"a host that holds {size >> 30} GB" if size else "a small host"
        rounds = 4 if quick else 15
        ours, theirs, firsts, runs = [], [], [], []
        with managed() as manager:
            for _ in range(rounds):
                time.sleep(PAUSE)
                with Clock(ours):
                    id, _ = begin_and_hear(manager, HELLO)
                end(manager, id, force=True)
                time.sleep(PAUSE)
                began = time.perf_counter()
                with bare(HELLO) as process:
                    hear(process)
                    theirs.append(time.perf_counter() - began)
        for _ in range(rounds // 2):
            firsts.append(first_run())
            with Clock(runs):
                bare_run()
        yield result(f"start in {label}", ours, theirs)
        yield result(f"first execution in {label}", firsts, runs)


@row
def choice(quick):
    """Other ways to have a worker say 1: what each takes, and what it can."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, on purpose
    samples = {}

    def by_process(method):
        context = multiprocessing.get_context(method)
        reader, writer = context.Pipe(duplex=False)
        with reader, writer:
            # A method of the standard library: no module of ours is imported for it.
            process = context.Process(target=writer.send, args=(1,))
            process.start()
            assert reader.recv() == 1
            process.join()
            process.close()

    def by_sidexec():
        assert finish(manager, "return 1").result == 1

    def by_pool():
        assert pool.submit(int, "1").result() == 1

    spawn = multiprocessing.get_context("spawn")
    with managed() as manager, ProcessPoolExecutor(1, mp_context=spawn) as pool:
        # Each with: is asked to stop and cleans up; its output is read as it comes;
        # what it has spawned ends with it.
        ways = {
            "sidexec": (by_sidexec, "yes", "yes", "yes"),
            "subprocess.run": (bare_run, "no", "no", "no"),
            "multiprocessing, spawn": (lambda: by_process("spawn"), "no", "no", "no"),
            "multiprocessing, forkserver": (lambda: by_process("forkserver"), "no", "no", "no"),
            "multiprocessing, fork": (lambda: by_process("fork"), "no", "no", "no"),
            "ProcessPoolExecutor, warm": (by_pool, "no", "no", "no"),
        }
        for way, _, _, _ in ways.values():
            way()
        for _ in range(5 if quick else 20):
            for name, (way, *_) in ways.items():
                time.sleep(PAUSE / 3)
                with Clock(samples.setdefault(name, [])):
                    way()
    for name, (_, *says) in ways.items():
        yield {**result(name, samples[name]), "table": CHOICE, "says": says}
