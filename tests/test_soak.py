"""Many executions, one after the other and side by side, leave nothing behind."""

import collections
import os
import random

import pytest
from conftest import children, descriptors, eventually, tree

# How an execution ends: its code, how it is stopped, and its status and exit codes.
ENDS = {
    "completes": ("print('x' * 1000); return list(range(100))", None, "completed", [0]),
    "reports": ("for n in range(50): report_progress(n); report_result(n)", None, "completed", [0]),
    "raises": ("def f(n): return 1 / n\nf(0)", None, "failed", [1]),
    "imports": (
        "import json, asyncio\nasync def f(): return 3\nreturn await f()",
        None,
        "completed",
        [0],
    ),
    "exits": ("raise SystemExit(4)", None, "failed", [4]),
    "dies": ("import os; os.kill(os.getpid(), 11)", None, "failed", [-11]),
    "violates": (
        "import os\nfor fd in range(3, 2000):\n    try: os.write(fd, b'?' * 99)\n    except OSError: pass\n__import__('time').sleep(600)",
        None,
        "failed",
        [-9, 143],
    ),
    "spawns": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    __import__('time').sleep(600)\nos._exit(0)",
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
    "times_out": ("import time\ntime.sleep(600)", "timeout", "stopped", [143]),
    "stops": (
        "import time\ntry: time.sleep(600)\nfinally: print('clean')",
        "stop",
        "stopped",
        [143],
    ),
    "is_killed": ("while True: pass", "force", "stopped", [143, -9]),
    "calls_back": ("print('hello')", "on_output", "completed", [0]),
    "gets_its_own_environment": ("return 1", "env", "completed", [0]),
}


def begin(manager, kind):
    code, how, _, _ = ENDS[kind]
    options = {}
    if how == "timeout":
        options["timeout"] = 0.02
    if how == "on_output":
        options["on_output"] = lambda chunk: None
    if how == "env":
        options["env"] = {"OWN": "1"}
    return manager.start_with_code(code, **options).raise_for_error().data.side_execution_id


def end(manager, kind, id):
    _, how, status, codes = ENDS[kind]
    if how in ("stop", "force"):
        manager.stop(id, force=how == "force")
    data = manager.wait(id, timeout=30).data
    assert (data.status, data.exit_code in codes) == (status, True), (kind, data)


def soak(manager, count, rng):
    done = collections.Counter()
    while sum(done.values()) < count:
        kinds = [rng.choice(list(ENDS)) for _ in range(rng.choice([1, 1, 2, 5]))]
        # An own environment costs an interpreter start, so fewer of these.
        kinds = [
            kind if kind != "gets_its_own_environment" or rng.random() < 0.2 else "completes"
            for kind in kinds
        ]
        for kind, id in [(kind, begin(manager, kind)) for kind in kinds]:
            end(manager, kind, id)
            done[kind] += 1
    return done


def pss(pid):
    """The process's share of memory, in bytes: what is shared counts in part."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("no Pss")


def private(pid):
    """The process's own memory, in bytes, whoever shares the rest."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        values = dict(line.split(":", 1) for line in file if ":" in line)
    return sum(int(values[key].split()[0]) for key in ("Private_Clean", "Private_Dirty")) * 1024


def threads():
    return len(os.listdir("/proc/self/task"))


class Watch:
    """What a manager at rest holds."""

    def __init__(self, manager, before):
        self._before = before
        self._at_rest()
        # The thread that let go of a launcher has done all of it when it starts another
        # execution, and not yet when that launcher's process is gone.
        end(manager, "completes", begin(manager, "completes"))
        self.launcher = self._at_rest()
        self.descriptors = len(descriptors())
        self.threads = threads()
        self.launcher_descriptors = len(os.listdir(f"/proc/{self.launcher}/fd"))
        self.host_memory = private("self")
        self.launcher_memory = pss(self.launcher)
        self.processes = len(tree(os.getpid()))

    def _at_rest(self):
        """Wait until one launcher is there, with one keeper and its snippet, which the
        host knows; its pid."""

        def is_at_rest():
            launchers = set(children()) - self._before
            if len(launchers) != 1:
                return None
            (launcher,) = launchers
            keepers = children(launcher)
            snippets = [pid for keeper in keepers for pid in tree(keeper)]
            is_one = len(keepers) == len(snippets) == 1
            is_known = list(descriptors().values()).count("anon_inode:[eventfd]") == 1
            return is_one and is_known and launcher

        return eventually(is_at_rest)

    def check(self, earlier):
        assert self.launcher == earlier.launcher
        assert self.descriptors == earlier.descriptors
        # A thread tells that its execution has ended before it ends itself.
        assert eventually(lambda: threads() <= earlier.threads)
        assert self.launcher_descriptors == earlier.launcher_descriptors
        assert self.processes == earlier.processes
        grown = self.host_memory - earlier.host_memory
        assert grown < 10 * 2**20, f"the host has grown by {grown}"
        grown = self.launcher_memory - earlier.launcher_memory
        assert grown < 10 * 2**20, f"the launcher has grown by {grown}"
        print("host", self.host_memory - earlier.host_memory, "launcher", grown)


def soaked(make_manager, warm_up, count):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    before = set(children())
    manager = make_manager(grace_period=5, max_history=20, max_output=100_000)
    soak(manager, warm_up, rng)
    first = Watch(manager, before)
    done = soak(manager, count, rng)
    Watch(manager, before).check(first)
    assert manager.list_executions().data.count == 20
    return done


def test_many_executions_leave_nothing(make_manager):
    soaked(make_manager, 25, 75)


@pytest.mark.slow
def test_two_thousand_executions_leave_nothing(make_manager):
    done = soaked(make_manager, 100, 2000)
    assert set(done) == set(ENDS)
