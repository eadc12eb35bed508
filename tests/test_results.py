"""What `result` and `progress` hold: returned, reported, or taken from the names at the end."""

import json
import time

import pytest
from conftest import crossed, eventually, finish, one_in
from conftest import shared_manager as manager  # noqa: F401

import sidexec
from sidexec.engine.pair import Pair

MEBIBYTE = 1024 * 1024


SHARED = {"grace_period": 10.0, "preload": ["asyncio"]}


@pytest.fixture
def stopped(manager, start):
    """Start code, stop it once it has written `ready`: the data of the stop."""

    def stopped(code, params=None, **options):
        data = manager.stop(start(code, params), **options).raise_for_error().data
        assert data.status == "stopped"
        return data

    return stopped


WAIT = "print('ready')\nimport time\ntime.sleep(60)"
ASYNC_WAIT = "import asyncio\nprint('ready')\nawait asyncio.sleep(60)"
WAITS = pytest.mark.parametrize("wait", [WAIT, ASYNC_WAIT], ids=["plain", "async"])


# -- a return


VALUES = [1, 0, -1, 1.5, 2**70, True, False, "", "ü\0\n\U0001f40d", [], {}, [None], 1e300]
VALUES.append({"a": [1, {"b": None}]})


@pytest.mark.parametrize("prefix", ["", "import asyncio\nawait asyncio.sleep(0)\n"])
@pytest.mark.parametrize("value", [VALUES, *one_in(4, VALUES)], ids=repr)
def test_the_result_is_what_was_returned(run, value, prefix):
    data = run(f"{prefix}return {value!r}")
    assert (data.status, repr(data.result)) == ("completed", repr(value))


def test_a_result_is_what_json_makes_of_it(run):
    data = run(
        "import enum\nclass E(enum.IntEnum): A = 1\nreturn {'t': (1, 2), 3: E.A, None: 'n', True: 0}"
    )
    assert data.result == {"t": [1, 2], "3": 1, "null": "n", "true": 0}


@pytest.mark.parametrize(
    "code", ["", "x = 1", "return", "return None", "await f()", "await f()\nreturn"]
)
def test_there_is_no_result_where_nothing_is_returned(run, code):
    data = run("async def f(): pass\n" + code)
    assert (data.status, data.result, data.error) == ("completed", None, None)
    assert data.progress is None


NOT_JSON = {
    "object": "return object()",
    "set": "return {'a': {1}}",
    "bytes": "return b'x'",
    "function": "def f(): pass\nreturn f",
    "class": "return int",
    "coroutine": "async def f(): pass\nx = f()\nx.close()\nreturn x",
    "NaN": "return float('nan')",
    "infinity": "return [float('-inf')]",
    "complex": "return 1j",
    "key": "return {(1, 2): 3}",
    "circular": "x = []\nx.append(x)\nreturn x",
    "deep": "x = []\nfor _ in range(100_000): x = [x]\nreturn x",
    "date": "import datetime\nreturn datetime.date.today()",
    "async": "import asyncio\nawait asyncio.sleep(0)\nreturn object()",
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_a_returned_value_that_is_not_json_fails_with_a_type_error(run, name):
    data = run(NOT_JSON[name])
    assert data.status == "failed"
    assert data.exit_code == 1
    assert data.result is None
    headline = data.error.splitlines()[0]
    assert headline.startswith("TypeError: the returned value must be JSON: ")
    assert len(headline) > len("TypeError: the returned value must be JSON: ")
    assert "File" not in data.error
    assert headline in data.error_output


NUMPY = "import sys, types\nclass {0}:\n    __module__ = 'numpy'\n    {1}\n"
PLACES = {
    "of a module": (
        NUMPY.format("int64", "__index__ = 0") + "return {'sum': int64()}",
        "result['sum'] is a numpy.int64: convert it with int()",
    ),
    "float": (
        NUMPY.format("float32", "__float__ = 0") + "return [1, float32()]",
        "result[1] is a numpy.float32: convert it with float()",
    ),
    "bool": (
        NUMPY.format("bool_", "__index__ = 0") + "return bool_()",
        "result is a numpy.bool_: convert it with bool()",
    ),
    "array": (
        NUMPY.format("ndarray", "__index__ = __len__ = tolist = 0") + "return {1: ndarray()}",
        "result[1] is a numpy.ndarray: convert it with .tolist()",
    ),
    "set": ("return {'a': [0, {1}]}", "result['a'][1] is a set: convert it with list()"),
    "tuple": ("return (0, (1, b'x'))", "result[1][1] is a bytes: convert it with .decode()"),
    "date": (
        "import datetime\nreturn {'at': datetime.datetime.now()}",
        "result['at'] is a datetime.datetime: convert it with .isoformat()",
    ),
    "decimal": (
        "import decimal\nreturn decimal.Decimal(1)",
        "result is a decimal.Decimal: convert it with float()",
    ),
    "path": ("class P: __fspath__ = 0\nreturn [P()]", "result[0] is a P: convert it with str()"),
    "enum": (
        "import enum\nclass E(enum.Enum): A = 1\nreturn E.A",
        "result is an E: use its .value",
    ),
    "dataclass": (
        "import dataclasses\n@dataclasses.dataclass\nclass D: x: int\nreturn D(1)",
        "result is a D: convert it with dataclasses.asdict()",
    ),
    "coroutine": (
        "async def f(): pass\nx = f()\nx.close()\nreturn {'x': x}",
        "result['x'] is a coroutine: await it",
    ),
    "generator": ("return (x for x in 'a')", "result is a generator: convert it with list()"),
    "object": (
        "class C: pass\nreturn C()",
        "result is a C: use dict, list, str, int, float, bool or None",
    ),
    "NaN": ("return {'loss': [0.5, float('nan')]}", "result['loss'][1] is nan: use None or a str"),
    "infinity": ("return -float('inf')", "result is -inf: use None or a str"),
    "key": ("return {'a': {(1, 2): 3}}", "result['a'] has a tuple as a key, (1, 2): use str keys"),
    "circle": (
        "x = {}\nx['self'] = [x]\nreturn x",
        "result['self'][0] contains itself: leave it out there",
    ),
    "depth": (
        "x = []\nfor _ in range(101): x = [x]\nreturn x",
        "result is nested more than 100 deep: flatten it",
    ),
    "long key": (
        "return {'k' * 100_000: {1}}",
        "result['" + "k" * 56 + "...] is a set: convert it with list()",
    ),
    "the first": (
        "return {'a': 1, 'b': {2}, 'c': b'3'}",
        "result['b'] is a set: convert it with list()",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_json_is_told_once_with_its_place_and_what_to_do(run, name):
    code, problem = PLACES[name]
    told = f"TypeError: the returned value must be JSON: {problem}\n"
    data = run(code)
    assert (data.status, data.exit_code, data.result) == ("failed", 1, None)
    assert (data.error, data.error_output) == (told, told)
    body = code.replace("return ", "report_result(") + ")"
    assert f"TypeError: the reported value must be JSON: {problem}" in run(body).error


def test_a_json_hook_of_the_value_that_raises_fails_the_execution(run):
    code = """
    class D(dict):
        def items(self): raise RuntimeError("no items")
    return D(a=1)
    """
    data = run(code)
    assert data.status == "failed"
    assert "RuntimeError: no items" in data.error


@pytest.mark.parametrize("call", one_in(2, ["return x", "report_result(x)"]))
def test_a_result_that_is_too_large_says_so(run, call):
    data = run(f"x = 'x' * (65 * 1024 * 1024)\n{call}")
    assert data.status == "failed"
    headline = data.error.splitlines()[0]
    assert headline.startswith("ValueError: the re")
    assert str(65 * MEBIBYTE + 2) in headline
    assert "file" in headline
    assert data.result is None
    assert len(data.error) < 10_000


def test_a_result_of_5_megabytes_arrives(run):
    data = run("return ['x' * 1000] * 5000")
    assert data.result == ["x" * 1000] * 5000


def test_a_result_of_lone_surrogates_arrives(run):
    assert run("return '\\udc80'").result == "\udc80"


def test_a_deeply_nested_result_arrives(run):
    data = run("x = 1\nfor _ in range(100): x = [x]\nreturn x")
    depth, value = 0, data.result
    while isinstance(value, list):
        depth, value = depth + 1, value[0]
    assert (depth, value) == (100, 1)


def test_the_result_comes_with_an_exit_that_follows(run):
    data = run("import sys, atexit, os\natexit.register(os._exit, 3)\nreturn [1]")
    assert (data.status, data.exit_code, data.error) == ("failed", 3, "exit code 3")


@pytest.mark.parametrize(
    "end",
    [
        "1 / 0",
        "import sys; sys.exit(3)",
        "import os; os._exit(3)",
        "import os; os.kill(os.getpid(), 9)",
    ],
)
def test_what_was_reported_stays_when_the_execution_fails(run, end):
    data = run(f"report_result({{'n': 1}})\nreport_progress(40)\n{end}")
    assert data.status == "failed"
    assert data.result == {"n": 1}
    assert data.progress == 40


def test_a_return_takes_the_place_of_what_was_reported(run):
    assert run("report_result(1)\nreturn 2").result == 2
    assert run("report_result(1)\nreturn").result == 1
    assert run("report_result(1)").result == 1
    assert run("x = [1]\nreport_result(x)\nx.append(2)").result == [1]


# -- a stop


@WAITS
def test_stopped_it_has_no_result_where_there_is_nothing(stopped, wait):
    data = stopped(wait)
    assert data.result is None
    assert not data.forced


@WAITS
def test_stopped_the_value_returned_while_unwinding_counts_first(stopped, wait):
    body = wait.replace("\n", "\n    ")
    code = f"x = 1\nreport_result('reported')\ntry:\n    {body}\nfinally:\n    return {{'x': x, 'unwound': True}}"
    data = stopped(code)
    assert data.result == {"x": 1, "unwound": True}
    # Waiting on its loop, a coroutine is cancelled, as every task is.
    raised = "asyncio.CancelledError" if "await" in wait else "SystemExit"
    code = f"x = 1\ntry:\n    {body}\nexcept {raised}:\n    return ['caught', x]\nreturn x"
    assert stopped(code).result == ["caught", 1]


def test_stopped_the_value_returned_after_the_ask_counts(stopped):
    code = f"try:\n    {WAIT.replace(chr(10), chr(10) + '    ')}\nexcept SystemExit:\n    pass\nx = 5\nreturn x + 1"
    data = stopped(code)
    assert data.result == 6
    assert data.stop_reason == "requested"


@WAITS
def test_stopped_what_was_last_reported_counts_as_it_is_then(stopped, wait):
    data = stopped(
        f"x = [1]\nreport_result(['old'])\nreport_result(x)\nx.append(2)\n{wait}\nreturn 'end'"
    )
    assert data.result == [1, 2]
    body = wait.replace("\n", "\n    ")
    data = stopped(
        f"x = [1]\nreport_result(x)\ntry:\n    {body}\nfinally:\n    x.append('cleanup')"
    )
    assert data.result == [1, "cleanup"]


def test_stopped_a_reported_object_that_is_no_json_any_more_leaves_the_last_report(stopped):
    data = stopped(f"x = [1]\nreport_result(x)\nx.append(object())\n{WAIT}")
    assert data.result == [1]


def test_stopped_what_was_reported_comes_before_the_return_expression(stopped):
    assert stopped(f"report_result('reported')\nx = 1\n{WAIT}\nreturn x").result == "reported"


DISPLAYS = {
    "name": ("return results", [1, 2]),
    "dict": ("return {'results': results}", {"results": [1, 2]}),
    "nested": (
        "return [results, {'a': (results, -1, 'c', None)}, []]",
        [[1, 2], {"a": [[1, 2], -1, "c", None]}, []],
    ),
    "constant": ("return 'c'", "c"),
    "last of two": (
        "if not results:\n    return 'first'\nreturn ['last', results]",
        ["last", [1, 2]],
    ),
    "in a block": ("for _ in 'ab':\n    if _:\n        return [results]", [[1, 2]]),
}


@pytest.mark.parametrize("name, wait", crossed(2, DISPLAYS, [WAIT, ASYNC_WAIT]))
def test_stopped_the_last_return_of_a_display_counts_last(stopped, name, wait):
    code, expected = DISPLAYS[name]
    data = stopped(f"results = [1]\nresults.append(2)\n{wait}\n{code}")
    assert data.result == expected


def test_stopped_the_names_count_as_they_stand_after_the_cleanup(stopped):
    body = WAIT.replace("\n", "\n    ")
    data = stopped(f"x = 0\ntry:\n    {body}\nfinally:\n    x = 'cleaned'\nreturn {{'x': x}}")
    assert data.result == {"x": "cleaned"}


NO_DISPLAYS = {
    "call": "return [print('called')]",
    "attribute": "return params.items",
    "subscript": "return results[0]",
    "operator": "return results + results",
    "comprehension": "return [x for x in results]",
    "f-string": "return f'{results}'",
    "unbound name": "return {'x': unbound}",
    "not JSON": "return [len]",
    "nothing": "return",
    "last is a call": "if results:\n    return results\nreturn str(results)",
    "await": "return [await None]",
    "in a function": "def f():\n    return results",
    "lambda": "return (lambda: results)",
    "walrus": "return [results := 3]",
}


@pytest.mark.parametrize("name", NO_DISPLAYS)
def test_stopped_no_other_return_expression_is_evaluated(stopped, name):
    data = stopped(f"results = [1]\n{WAIT}\n{NO_DISPLAYS[name]}")
    assert data.result is None
    assert data.output == "ready\n"
    assert data.error_output == ""


def test_the_return_expression_does_not_count_without_a_stop(run):
    assert run("x = 1\nimport sys\nsys.exit(0)\nreturn {'x': x}").result is None
    assert run("x = 1\n1 / 0\nreturn {'x': x}").result is None


def test_a_timeout_keeps_partial_results_too(manager):
    code = f"results = [1]\n{WAIT}\nreturn {{'results': results}}"
    data = finish(manager, code, timeout=0.3)
    assert (data.status, data.stop_reason) == ("stopped", "timeout")
    assert data.result == {"results": [1]}


@pytest.mark.parametrize("options", [{"force": True}, {"grace": 0}], ids=["force", "no grace"])
def test_a_kill_keeps_what_was_last_reported_as_it_was(stopped, options):
    code = f"x = [1]\nreport_result(0)\nreport_result(x)\nx.append(2)\n{WAIT}\nreturn x"
    data = stopped(code, **options)
    assert data.forced
    assert data.result == [1]


def test_a_kill_after_the_grace_keeps_what_was_last_reported(stopped):
    code = (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nreport_result({'n': 1})\n"
        + WAIT
    )
    data = stopped(code, grace=0.2)
    assert data.forced
    assert data.result == {"n": 1}


def test_stopped_in_async_code_a_name_of_the_module_counts(stopped):
    code = """
    import asyncio
    done = []
    async def work():
        for i in range(3):
            done.append(i)
        print("ready")
        await asyncio.sleep(60)
    await asyncio.gather(work())
    return {"done": done}
    """
    assert stopped(code).result == {"done": [0, 1, 2]}


def test_stopped_while_the_loop_is_closed_what_was_returned_counts(stopped):
    code = """
    import asyncio, time
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
    async def late():
        try:
            yield
        finally:
            print("ready")
            await asyncio.sleep(60)
    generator = late()
    await generator.__anext__()
    return dict(n=1)
    """
    data = stopped(code, grace=0.3)
    assert data.result == {"n": 1}


def test_stopped_while_it_returns_a_large_result(manager, start):
    code = "x = ['y' * 1000] * 2000\nprint('ready')\nreturn x"
    for _ in range(4):
        id = start(code)
        stopped = manager.stop(id).data
        assert stopped.status in ("stopped", "completed")
        assert not stopped.forced
        # The return expression is a name: it counts even when the ask came before the return.
        assert stopped.result == ["y" * 1000] * 2000


@pytest.mark.parametrize(("size", "rounds"), [(10, 12), (1_000_000, 2)])
def test_stopped_while_it_reports_the_result_is_never_an_older_one(manager, start, size, rounds):
    code = f"""
    n = 0
    pad = "x" * {size}
    try:
        while True:
            n += 1
            report_result({{"n": n, "pad": pad}})
            if n == 2: print("ready")
    except SystemExit:
        print("asked", n)
        raise
    """
    for _ in range(rounds):
        id = start(code)
        seen = manager.get_status(id).data.result["n"]
        data = manager.stop(id).raise_for_error().data
        assert not data.forced
        last = int(data.output.split()[-1])
        # The last report has been sent, or was interrupted before it was.
        assert data.result["n"] in (last, last - 1)
        assert data.result["n"] >= seen


def test_what_was_reported_before_a_line_is_known_once_the_line_is(manager, monkeypatch):
    def late(read):
        return lambda *arguments: (time.sleep(0.02), read(*arguments))[1]

    monkeypatch.setattr(Pair, "read_stream", late(Pair.read_stream))
    monkeypatch.setattr(Pair, "read_channel", late(Pair.read_channel))
    code = "import time\nfor i in range(30): report_progress(i), print(i), time.sleep(0.005)"
    id = manager.start_with_code(code).id
    for line in manager.follow(id, lines=True):
        assert manager.get_status(id).data.progress >= float(line.text)


def test_a_report_that_was_sent_is_not_followed_by_an_older_one(manager, start):
    # The first report is in a list that grows, so a stale one would be seen to be it.
    code = """
    import os, signal, threading
    write = os.write
    first = ["first"]
    report_result(first)
    first.append("grown")
    def asking_write(fd, data):
        size = write(fd, data)
        os.write = write
        os.kill(os.getpid(), signal.SIGTERM)
        return size
    print("ready")
    os.write = asking_write
    report_result(["second"])
    """
    assert finish(manager, code).result == ["second"]


# -- report_result


def test_a_reported_result_is_there_at_once_and_the_last_one_counts(manager, start):
    id = start(
        f"report_result(1)\nreport_result([2])\nx = {{}}\nreport_result(x)\nx['late'] = 1\n{WAIT}"
    )
    assert manager.get_status(id).data.result == {}
    assert manager.stop(id).data.result == {"late": 1}


BAD_REPORTS = {
    "object": ("report_result(object())", "TypeError", "must be JSON"),
    "NaN": ("report_result(float('nan'))", "TypeError", "must be JSON"),
    "circular": ("x = []; x.append(x); report_result(x)", "TypeError", "must be JSON"),
    "nothing": ("report_result()", "TypeError", "missing"),
    "two": ("report_result(1, 2)", "TypeError", "argument"),
}


@pytest.mark.parametrize("name", BAD_REPORTS)
def test_a_bad_report_raises_and_leaves_the_last_one(run, name):
    code, kind, text = BAD_REPORTS[name]
    data = run(
        f"report_result(['good'])\ntry:\n    {code}\nexcept {kind} as e:\n    print(type(e).__name__, e)"
    )
    assert data.status == "completed"
    assert data.output.startswith(f"{kind} ")
    assert text in data.output
    assert data.result == ["good"]


def test_reports_from_threads_arrive_whole(run):
    code = """
    import threading
    def work(n):
        for i in range(50):
            report_result({"n": n, "x": "x" * 20_000})
            report_progress(i)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    """
    data = run(code)
    assert data.status == "completed", data.error
    assert data.result["x"] == "x" * 20_000
    assert data.progress == 49


def test_the_progress_reported_last_is_the_progress(run):
    # Another thread reports the same number while the first one's report is on its way.
    code = """
    import sys, threading
    is_sending, others_are_through = threading.Event(), threading.Event()
    def trace(frame, event, arg):
        if frame.f_code.co_name == "send":
            sys.settrace(None)
            is_sending.set()
            others_are_through.wait()
    def work():
        sys.settrace(trace)
        report_progress(48)
        report_progress(49)
    thread = threading.Thread(target=work)
    thread.start()
    assert is_sending.wait(10)
    report_progress(49)
    others_are_through.set()
    thread.join()
    """
    data = run(code)
    assert (data.status, data.progress) == ("completed", 49), data.error


HANDLER_REPORTS = """
import signal
calls = 0
def handler(signum, frame):
    global calls
    calls += 1
    report_progress(calls % 100)
    report_result(["handler", calls, "x" * 1000])
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
reports = 0
while reports < 1000 or calls < 50:
    report_progress(reports % 100)
    report_result(["code", reports, "x" * 1000])
    reports += 1
signal.setitimer(signal.ITIMER_REAL, 0)
report_progress(50)
report_result("last")
"""


def first_run(code, **options):
    """Run code as a first execution, where what it reports with is still to be loaded."""
    with sidexec.ExecutionManager(**options) as manager:
        return finish(manager, code, timeout=20)


def test_a_signal_handler_may_report_while_the_code_reports():
    for _ in range(2):
        data = first_run(HANDLER_REPORTS)
        assert (data.status, data.result) == ("completed", "last"), data.error


def test_a_handler_that_raises_cuts_no_report_in_two(run):
    code = """
    import random, signal
    class Late(Exception): pass
    def handler(signum, frame): raise Late
    signal.signal(signal.SIGALRM, handler)
    data = "x" * 2_000_000
    for _ in range(20):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.01))
            report_result(data)
            while True: pass
        except Late:
            pass
    report_result("last")
    """
    data = run(code)
    assert (data.status, data.result) == ("completed", "last"), data.error


def test_threads_may_report_at_once_in_a_first_execution():
    code = """
    import threading
    errors = []
    def work():
        try:
            report_result(1)
        except BaseException as error:
            errors.append(repr(error))
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return errors
    """
    for _ in range(4):
        assert first_run(code).result == []


def test_a_report_disturbs_no_import_of_another_thread(tmp_path):
    (tmp_path / "own.py").write_text("")
    code = """
    import sys, threading
    errors = []
    is_reported = False
    def work():
        while not is_reported:
            sys.modules.pop("own", None)
            try:
                import own
            except BaseException as error:
                errors.append(repr(error))
    thread = threading.Thread(target=work)
    thread.start()
    report_result(1)
    is_reported = True
    thread.join()
    return errors
    """
    for _ in range(2):
        assert first_run(code, cwd=str(tmp_path)).result == []


def test_report_result_in_a_forked_child_is_refused(run):
    code = """
    import os
    report_result("parent")
    pid = os.fork()
    if not pid:
        try:
            report_result("child")
        except RuntimeError as e:
            print(e)
            os._exit(0)
    os.waitpid(pid, 0)
    """
    data = run(code)
    assert data.result == "parent"
    assert data.output.count("\n") == 1


# -- report_progress


@pytest.mark.parametrize("percent", [0, 100, 50, 0.0, 33.3, 100.0, 1e-9], ids=repr)
def test_progress_is_what_was_reported(run, percent):
    data = run(f"report_progress({percent!r})")
    assert (data.status, data.progress) == ("completed", percent)


def test_the_progress_of_one_that_runs_is_there_and_may_go_back(manager, start):
    id = start(f"report_progress(80)\nreport_progress(25)\n{WAIT}")
    eventually(lambda: manager.get_status(id).data.progress == 25)
    manager.stop(id)
    assert manager.get_status(id).data.progress == 25


@pytest.mark.parametrize(
    ("percent", "kind"),
    [
        ("-1", "ValueError"),
        ("-0.001", "ValueError"),
        ("100.001", "ValueError"),
        ("1e400", "ValueError"),
        ("float('nan')", "ValueError"),
        ("10 ** 400", "ValueError"),
        ("'50'", "TypeError"),
        ("None", "TypeError"),
        ("True", "TypeError"),
        ("[50]", "TypeError"),
        ("5j", "TypeError"),
        ("", "TypeError"),
        ("1, 2", "TypeError"),
    ],
)
def test_an_impossible_progress_raises_and_leaves_the_last_one(run, percent, kind):
    data = run(
        f"report_progress(5)\ntry:\n    report_progress({percent})\nexcept {kind} as e:\n    print('raised', e)"
    )
    assert data.status == "completed", data.error
    assert data.output.startswith("raised ")
    assert data.progress == 5


def test_an_odd_kind_of_number_is_sent_as_a_number_or_refused(run):
    for value in (
        "import fractions; x = fractions.Fraction(1, 2)",
        "class F(float):\n    def __repr__(self): return 'odd'\nx = F(50)",
        "import enum\nclass E(enum.IntEnum): A = 7\nx = E.A",
    ):
        data = run(
            f"{value}\ntry:\n    report_progress(x)\nexcept TypeError:\n    print('refused')\nprint('on')"
        )
        assert data.status == "completed", data.error
        assert data.output.endswith("on\n")
        assert data.output.startswith("refused") == (data.progress is None)


def test_many_reports_of_progress_do_no_harm(run):
    data = run("for i in range(10_000): report_progress(i % 101)\nreport_progress(99.5)")
    assert (data.status, data.progress) == ("completed", 99.5)


# -- responses


def test_changing_a_response_s_result_changes_no_other(manager, run):
    id = run("return {'a': [1]}").side_execution_id
    first, second = manager.get_status(id), manager.get_status(id)
    first.data.result["a"].append(2)
    first.to_dict()["data"]["result"]["a"].append(3)
    assert second.data.result == {"a": [1]}
    assert manager.wait(id).data.result == {"a": [1]}
    assert manager.stop(id).data.result == {"a": [1]}


def test_results_can_be_written_as_json(manager, start):
    id = start(f"x = {{'ü': [1, None]}}\n{WAIT}\nreturn x")
    stopped = manager.stop(id)
    assert json.loads(stopped.to_json())["data"]["result"] == {"ü": [1, None]}
    assert manager.get_status(id).data.result == stopped.data.result
    again = manager.stop(id)
    assert again.data.status == "already_stopped"
    assert again.data.result == stopped.data.result
