"""Many threads do everything at once, and the rules for states hold all the same."""

import _thread
import collections
import contextlib
import dataclasses
import itertools
import random
import sys
import threading
import time

import pytest
from conftest import IS_FREE_THREADED, eventually, within
from test_misbehaving_hosts import busy_cores

THREADS = 64

# What runs, and what may come of it where nobody stops it: status and exit code.
KINDS = {
    "quick": ("print('quick'); return {'number': 1}", ("completed", 0)),
    "fails": ("print('fails'); raise ValueError('no')", ("failed", 1)),
    "exits": ("import os\nprint('exits', flush=True)\nos._exit(5)", ("failed", 5)),
    "dies": ("import os\nos.kill(os.getpid(), 9)", ("failed", -9)),
    "spawns": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(600)\n"
        "print('spawns', flush=True)\nos._exit(0)",
        ("completed", 0),
    ),
    "sleeps": (
        "import time\ntry:\n    print('sleeps', flush=True)\n    time.sleep(600)\n"
        "finally:\n    print('clean')\n    report_result('partial')",
        None,
    ),
    "prints": (
        "import time\nfor line in range(10**9):\n"
        "    print(line, flush=True); report_progress(line % 101); time.sleep(0.002)",
        None,
    ),
    "deaf": (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\ntime.sleep(600)",
        None,
    ),
    "times_out": ("import time\ntime.sleep(600)", None),
}
FOREVER = KINDS["times_out"][0]
FINAL = ("completed", "failed", "stopped")


class Ledger:
    """What all threads have seen of all executions, and when."""

    def __init__(self):
        self.kinds = {}
        self.spared = set()  # so that some come to their own end
        self.seen = collections.defaultdict(list)  # id: (began, ended, final data or None)
        self.stops = collections.defaultdict(list)  # id: stop responses
        self.followed = collections.defaultdict(list)  # id: what was followed to the end
        self.has_stopped = False
        self.failures = []

    def saw(self, began, response):
        data = response.data
        assert response.success and data.status in ("running", *FINAL), response
        final = None if data.status == "running" else data
        if final is None:
            assert (data.end_time, data.exit_code, data.error) == (None, None, None), data
        else:
            assert (data.memory_usage, data.cpu_usage) == (None, None), data
        self.seen[data.side_execution_id].append((began, time.monotonic(), final))

    def stopped(self, response):
        data = response.data
        assert data.status in ("stopped", "already_stopped", "completed", "failed"), response
        assert response.success is data.status.endswith("stopped"), response
        assert response.success is (response.error is None), response
        self.stops[data.side_execution_id].append(response)
        if data.status == "stopped":
            self.has_stopped = True


def act(manager, rng, ledger):
    ids = list(ledger.kinds)
    id = rng.choice(ids[-12:] if rng.random() < 0.9 else ids) if ids else None
    op = rng.choice(
        ["start", "status", "status", "wait", "stop", "stop", "follow", "list", "stop_all"]
    )
    began = time.monotonic()
    if id is None or (op == "start" and manager.list_executions("running").data.count < 12):
        kind = rng.choice(list(KINDS))
        timeout = rng.uniform(0, 0.2) if kind == "times_out" else None
        started = manager.start_with_code(KINDS[kind][0], timeout=timeout, thread_id=kind)
        new = started.id
        if KINDS[kind][1] and rng.random() < 0.7:
            ledger.spared.add(new)
        assert ledger.kinds.setdefault(new, kind) is kind, "an id that was there before"
    elif op == "status":
        ledger.saw(began, manager.get_status(id))
    elif op == "wait":
        ledger.saw(began, manager.wait(id, timeout=rng.choice([0, 0.01, 0.1])))
    elif op == "stop" and (id not in ledger.spared or rng.random() < 0.002):
        grace = rng.choice([None, 0, 0.05, 1.0])
        ledger.stopped(manager.stop(id, grace=grace, force=rng.random() < 0.2))
    elif op == "follow" and rng.random() < 0.3:
        text = {"stdout": "", "stderr": ""}
        for chunk in manager.follow(id):
            text[chunk.stream] += chunk.text
            if rng.random() < 0.02:
                return
        ledger.followed[id].append(text)
    elif op == "list":
        check_list(manager.list_executions(rng.choice([None, *FINAL, "running"])))
    elif op == "stop_all" and rng.random() < 0.02:
        for response in manager.stop_all(grace=0.1):
            ledger.stopped(response)


def check_list(response):
    listed = response.data.executions
    assert response.data.count == len(listed)
    assert len({each.side_execution_id for each in listed}) == len(listed)
    for each in listed:
        assert (each.end_time is None) == (each.status == "running"), each
        if each.status == "stopped":
            assert each.stop_reason in ("requested", "timeout"), each


def check_end(manager, ledger):
    """Every rule of the contract's third section, for every execution."""
    final_list = manager.list_executions()
    check_list(final_list)
    listed = {each.side_execution_id: each for each in final_list.data.executions}
    assert set(ledger.kinds) == set(listed)
    for id, kind in ledger.kinds.items():
        response = manager.get_status(id)
        final = response.data
        assert response.thread_id == kind
        assert final.status in FINAL and final.status == listed[id].status
        assert (listed[id].start_time, listed[id].end_time) == (final.start_time, final.end_time)

        # What was final once is final for ever, to whomever and however it was told.
        first_end = min((ended for _, ended, data in ledger.seen[id] if data), default=None)
        for began, _, data in ledger.seen[id]:
            if data is None:
                assert first_end is None or began <= first_end, "a state went back"
            else:
                assert data == final

        answers = collections.Counter(each.data.status for each in ledger.stops[id])
        if final.status != "stopped":
            assert set(answers) <= {final.status}, answers
        else:
            assert set(answers) <= {"stopped", "already_stopped"}, answers
            assert answers["stopped"] == (final.stop_reason == "requested"), (answers, final)
        for each in ledger.stops[id]:
            data = each.data
            assert data.stopped_at == (final.end_time if final.status == "stopped" else None)
            for name in ("result", "output", "error_output", "exit_code", "stop_reason"):
                assert getattr(data, name) == getattr(final, name)
        assert len({each.data.forced for each in ledger.stops[id]}) <= 1
        for text in ledger.followed[id]:
            assert text == {"stdout": final.output, "stderr": final.error_output}

        expected = KINDS[kind][1]
        if final.stop_reason is None:
            assert expected is not None, (kind, final)
            assert (final.status, final.exit_code) == expected, (kind, final)
            if kind != "dies":
                assert final.output == kind + "\n"
            if kind == "quick":
                assert final.result == {"number": 1}
        else:
            assert final.status == "stopped"
            own = [expected[1]] if expected else []
            assert final.exit_code in [143, -9, -15, None, *own], (kind, final)
            if kind == "sleeps" and final.exit_code == 143 and final.output:
                assert final.output.endswith("clean\n"), final
        if kind == "prints":
            lines = final.output.split()
            assert lines == [str(number) for number in range(len(lines))]


def run_threads(manager, seconds, seed):
    ledger = Ledger()
    barrier = threading.Barrier(THREADS)  # on a busy machine they take long to start

    def work(number):
        rng = random.Random(f"{seed} {number}")
        barrier.wait()
        deadline = time.monotonic() + seconds
        try:
            while not ledger.failures and (time.monotonic() < deadline or not ledger.has_stopped):
                act(manager, rng, ledger)
        except BaseException as error:
            ledger.failures.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(THREADS)]
    for each in threads:
        each.start()
    # Whoever follows or waits for what nobody stops any more is let go by this.
    time.sleep(seconds)
    until = time.monotonic() + 100
    while any(each.is_alive() for each in threads):
        for response in manager.stop_all(grace=1.0):
            ledger.stopped(response)
        time.sleep(0.01)
        assert time.monotonic() < until, "a thread hangs"
    for response in manager.stop_all(grace=1.0):
        ledger.stopped(response)
    if ledger.failures:
        raise ledger.failures[0]
    return ledger


def has_gil():
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def test_a_snippet_runs_with_the_gil_off_where_its_host_does(run):
    code = "import sys\nreturn getattr(sys, '_is_gil_enabled', lambda: True)()"
    assert run(code).result is has_gil() is not IS_FREE_THREADED


def race(make_manager, seconds):
    seed = random.randrange(2**32)
    print("seed", seed)
    manager = make_manager(grace_period=3.0, default_timeout=None, max_history=10**6)
    assert has_gil() is not IS_FREE_THREADED
    ledger = run_threads(manager, seconds, seed)
    check_end(manager, ledger)
    counts = collections.Counter(manager.get_status(id).data.status for id in ledger.kinds)
    print(len(ledger.kinds), "executions", dict(counts))
    assert "stopped" in counts
    with within(20):
        manager.close()
    for id in ledger.kinds:
        assert manager.get_status(id).data.status in FINAL
    return set(counts)


def test_threads_that_do_everything_at_once_see_one_truth(make_manager):
    race(make_manager, 0.5)


@pytest.mark.slow
def test_threads_that_do_everything_at_once_on_busy_cores_see_one_truth(make_manager):
    with busy_cores():
        race(make_manager, 1)


@pytest.mark.slow
def test_threads_that_do_everything_at_once_for_a_minute_see_one_truth(make_manager):
    assert race(make_manager, 60) == set(FINAL)


@contextlib.contextmanager
def together(count, call):
    """Threads that call while the block runs: what their calls have returned."""
    barrier = threading.Barrier(count + 1)
    results = []

    def work():
        barrier.wait()
        results.append(call())

    threads = [threading.Thread(target=work) for _ in range(count)]
    for each in threads:
        each.start()
    barrier.wait()
    yield results
    for each in threads:
        each.join(30)
    assert len(results) == count


def check_refused_or_stopped(manager, responses):
    for each in responses:
        if each.success:
            data = manager.wait(each.id, timeout=20).data
            assert (data.status, data.stop_reason) == ("stopped", "closed")
        else:
            assert "closed" in each.error
    assert manager.list_executions("running").data.count == 0


@pytest.mark.parametrize("code", ["sleeps", "deaf", "quick", "spawns"])
def test_of_many_stops_at_the_same_moment_exactly_one_has_stopped_it(manager, code):
    for _ in range(2):
        id = manager.start_with_code(KINDS[code][0]).id
        with together(THREADS, lambda id=id: manager.stop(id, grace=0.1)) as responses:
            pass
        counts = collections.Counter(each.data.status for each in responses)
        if "stopped" in counts:
            assert counts == {"stopped": 1, "already_stopped": THREADS - 1}
        else:
            assert len(counts) == 1 and set(counts) <= {"completed", "failed"}
        first, *others = (dataclasses.replace(each.data, status="same") for each in responses)
        assert all(each == first for each in others)
        assert len({each.message_id for each in responses}) == THREADS


def test_starts_that_race_with_close_are_refused_or_stopped(make_manager):
    for _ in range(5):
        manager = make_manager(grace_period=5)

        def start(manager=manager):
            return [manager.start_with_code(FOREVER) for _ in range(4)]

        with together(16, start) as responses:
            manager.close()
        check_refused_or_stopped(manager, itertools.chain(*responses))


def test_a_first_start_that_races_with_close_is_refused_or_stopped(make_manager):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(20):
            manager = make_manager(grace_period=5)
            with together(1, lambda manager=manager: manager.start_with_code(FOREVER)) as responses:
                # From before its first step to after its last one.
                until = time.monotonic() + random.uniform(0, 0.002)
                while time.monotonic() < until:
                    pass
                manager.close()
            check_refused_or_stopped(manager, responses)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("close_first", [True, False])
def test_a_close_before_the_managers_thread_has_begun_leaves_nothing(
    make_manager, monkeypatch, close_first
):
    manager = make_manager(grace_period=5)
    start_thread = _thread.start_new_thread
    held, responses, closed = [], [], []

    def start_late(call, args):
        held.append(lambda: start_thread(call, args))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", start_late)
        start_thread(lambda: responses.append(manager.start_with_code(FOREVER)), ())
        eventually(lambda: held)
        # The start has handed its request over, or is about to.
        start_thread(lambda: closed.append(manager.close()), ())
        if close_first:
            eventually(lambda: closed or responses)
        for call in held:
            call()
    eventually(lambda: closed and responses)
    check_refused_or_stopped(manager, responses)
