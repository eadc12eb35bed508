"""Many executions, one after the other and side by side, leave nothing behind."""

import collections
import os
import random

import pytest
from conftest import children, descriptors, eventually, tree

# How an execution ends: its code, how it is stopped or its options, its status and exit codes.
ENDS = {
    "completes": ("print('x' * 1000); return list(range(100))", None, "completed", [0]),
    "reports": ("for n in range(50): report_progress(n); report_result(n)", None, "completed", [0]),
    "raises": ("def f(n): return 1 / n\nf(0)", None, "failed", [1]),
    "imports": ("import json, asyncio\nreturn await asyncio.sleep(0)", None, "completed", [0]),
    "exits": ("raise SystemExit(4)", None, "failed", [4]),
    "dies": ("import os; os.kill(os.getpid(), 11)", None, "failed", [-11]),
    "violates": (
        "import os, time\nfor fd in range(3, 2000):\n    try: os.write(fd, b'?' * 99)\n"
        "    except OSError: pass\ntime.sleep(600)",
        None,
        "failed",
        [-9, 143],
    ),
    "spawns": (
        "import os, time\nif os.fork() == 0: os.setsid(); time.sleep(600)\nos._exit(0)",
        None,
        "completed",
        [0],
    ),
    "prints": (
        "import sys\nfor n in range(20): print('x' * 50000); print('y' * 5000, file=sys.stderr)",
        None,
        "completed",
        [0],
    ),
    "times_out": ("import time\ntime.sleep(600)", {"timeout": 0.02}, "stopped", [143]),
    "stops": ("import time\ntry: time.sleep(600)\nfinally: print(1)", "stop", "stopped", [143]),
    "is_killed": ("while True: pass", "force", "stopped", [143, -9]),
    "calls_back": ("print('hello')", {"on_output": lambda chunk: None}, "completed", [0]),
    "gets_its_own_environment": ("return 1", {"env": {"OWN": "1"}}, "completed", [0]),
}


def begin(manager, kind):
    code, how, _, _ = ENDS[kind]
    return manager.start_with_code(code, **(how if isinstance(how, dict) else {})).id


def end(manager, kind, id):
    _, how, status, codes = ENDS[kind]
    if how in ("stop", "force"):
        manager.stop(id, force=how == "force")
    data = manager.wait(id, timeout=30).data
    assert (data.status, data.exit_code in codes) == (status, True), (kind, data)


def soak(manager, count, rng):
    done = collections.Counter()
    # An own environment costs an interpreter start, so fewer of these.
    weights = [0.2 if kind == "gets_its_own_environment" else 1 for kind in ENDS]
    while sum(done.values()) < count:
        kinds = rng.choices(list(ENDS), weights, k=rng.choice([1, 1, 2, 5]))
        for kind, id in [(kind, begin(manager, kind)) for kind in kinds]:
            end(manager, kind, id)
            done[kind] += 1
    return done


def memory(pid, *names):
    """Those of the process's figures of memory, together, in bytes."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        values = dict(line.split(":", 1) for line in file if ":" in line)
    return sum(int(values[name].split()[0]) for name in names) * 1024


def launcher_at_rest(before):
    """Wait until one launcher is there, with one keeper and its snippet, which the host knows."""

    def is_at_rest():
        launchers = set(children()) - before
        if len(launchers) != 1:
            return None
        (launcher,) = launchers
        keepers = children(launcher)
        snippets = [pid for keeper in keepers for pid in tree(keeper)]
        is_one = len(keepers) == len(snippets) == 1
        is_known = list(descriptors().values()).count("anon_inode:[eventfd]") == 1
        return is_one and is_known and launcher

    return eventually(is_at_rest)


def held(manager, before):
    """What a manager at rest holds: what is counted, and its memory and its launcher's."""
    launcher_at_rest(before)
    # The thread that let go of a launcher has done all of it when it starts another
    # execution, and not yet when that launcher's process is gone.
    end(manager, "completes", begin(manager, "completes"))
    launcher = launcher_at_rest(before)
    counts = {
        "launcher": launcher,
        "descriptors": len(descriptors()),
        "its descriptors": len(os.listdir(f"/proc/{launcher}/fd")),
        "processes": len(tree("self")),
    }
    # What is shared counts in part for the launcher, and not at all for the host.
    return counts, {
        "host": memory("self", "Private_Clean", "Private_Dirty"),
        "launcher": memory(launcher, "Pss"),
    }


def threads():
    return len(os.listdir("/proc/self/task"))


def soaked(make_manager, warm_up, count):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    before = set(children())
    manager = make_manager(grace_period=5, max_history=20, max_output=100_000)
    soak(manager, warm_up, rng)
    counts, first = held(manager, before)
    limit = threads()
    done = soak(manager, count, rng)
    now, last = held(manager, before)
    assert now == counts
    # A thread tells that its execution has ended before it ends itself.
    eventually(lambda: threads() <= limit)
    grown = {name: last[name] - first[name] for name in first}
    print("grown", grown)
    assert max(grown.values()) < 10 * 2**20, grown
    assert manager.list_executions().data.count == 20
    return done


def test_many_executions_leave_nothing(make_manager):
    soaked(make_manager, 25, 75)


@pytest.mark.slow
def test_two_thousand_executions_leave_nothing(make_manager):
    done = soaked(make_manager, 100, 2000)
    assert set(done) == set(ENDS)
