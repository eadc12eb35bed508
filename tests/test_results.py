"""What `result` and `progress` hold: returned, reported, or taken from the names at the end."""

import textwrap
import time

import pytest
from conftest import completed, crossed, eventually, finish, one_in, time_out
from conftest import shared_manager as manager  # noqa: F401

import sidexec
from sidexec.engine.pair import Pair

SHARED = {"grace_period": 10.0, "preload": ["asyncio"]}


@pytest.fixture
def stopped(manager, start):
    """Start code, stop it once it has written `ready`: the data of the stop."""

    def stopped(code, **options):
        data = manager.stop(start(code), **options).raise_for_error().data
        assert (data.status, data.forced) == ("stopped", bool(options))
        return data

    return stopped


WAIT = "print('ready')\nimport time\ntime.sleep(60)\n"
ASYNC_WAIT = "import asyncio\nprint('ready')\nawait asyncio.sleep(60)\n"
WAITS = pytest.mark.parametrize("wait", [WAIT, ASYNC_WAIT], ids=["plain", "async"])


def in_try(wait, rest):
    return "try:\n" + textwrap.indent(wait, "    ") + rest


# -- a return


VALUES = [1, 0, -1, 1.5, 2**70, True, False, "", "ü\0\n\U0001f40d", "\udc80", [], {}, [None], 1e300]
VALUES += [{"a": [1, {"b": None}]}, eval("[" * 100 + "1" + "]" * 100)]


@pytest.mark.parametrize(
    "prefix, values",
    [("", VALUES), ("import asyncio\nawait asyncio.sleep(0)\n", [VALUES[:-1], False])],
    ids=["plain", "async"],
)
def test_the_result_is_what_was_returned(run, prefix, values):
    for value in values:
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
    assert (data.status, data.result, data.error, data.progress) == ("completed", None, None, None)


NUMPY = "import sys, types\nclass {0}:\n    __module__ = 'numpy'\n    {1}\n"
DEEP = "x = []\nfor _ in range({}): x = [x]\nreturn x"
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
    "depth": (DEEP.format(100), "result is nested more than 100 deep: flatten it"),
    "great depth": (DEEP.format(100_000), "result is nested more than 100 deep: flatten it"),
    "frozen": (
        "frozen = getattr(__import__('builtins'), 'frozendict', dict)\nreturn frozen(a={1})",
        "result['a'] is a set: convert it with list()",
    ),
    "complex": (
        "class C: __complex__ = 0\nreturn C()",
        "result is a C: convert it with float() or str()",
    ),
    "class": ("return int", "result is a type: use dict, list, str, int, float, bool or None"),
    "async": (
        "import asyncio\nawait asyncio.sleep(0)\nreturn {1}",
        "result is a set: convert it with list()",
    ),
    "long key": (
        "return {'k' * 100_000: {1}}",
        "result['" + "k" * 56 + "...] is a set: convert it with list()",
    ),
    "long integer as a key": (
        "return [{10 ** 4300: 1}]",
        "result[0] has a key of more than 4300 digits: use str keys",
    ),
    "the first": (
        "return {'a': 1, 'b': {2}, 'c': b'3'}",
        "result['b'] is a set: convert it with list()",
    ),
}


@pytest.mark.parametrize("code, problem", PLACES.values(), ids=PLACES)
def test_what_is_no_json_is_told_once_with_its_place_and_what_to_do(run, code, problem):
    told = f"TypeError: the returned value must be JSON: {problem}\n"
    data = run(code)
    assert (data.status, data.exit_code, data.result) == ("failed", 1, None)
    assert (data.error, data.error_output) == (told, told)
    body = code.replace("return ", "report_result(") + ")"
    assert f"TypeError: the reported value must be JSON: {problem}" in run(body).error


def test_an_integer_has_as_many_digits_as_any_interpreter_reads(run):
    """Whatever limit the code sets for itself, which is left as it is."""
    code = (
        "import sys\nsys.set_int_max_str_digits({})\n{}(10 ** 4300 - 1)\n"
        "print(sys.get_int_max_str_digits())"
    )
    for limit in (0, 5000, 640):
        for call in "report_result", "return":
            data = completed(run(code.format(limit, call)))
            assert data.result == 10**4300 - 1
            assert data.output == (f"{limit}\n" if call == "report_result" else "")


def test_reports_of_two_threads_leave_the_limit_of_digits_as_it_is(run):
    code = """
import sys, threading
class Calls(dict):
    def items(self):
        self["call"]()
        return [("a", 1)]
def wait():
    is_inside.set()
    go_on.wait()
def start():
    thread.start()
    is_inside.wait()
is_inside, go_on = threading.Event(), threading.Event()
thread = threading.Thread(target=report_result, args=[Calls(call=wait)])
sys.set_int_max_str_digits(5000)
report_result(Calls(call=start))
go_on.set()
thread.join()
return sys.get_int_max_str_digits()
"""
    assert completed(run(code)).result == 5000


@pytest.mark.parametrize("limit", [0, 5000, 4300])
@pytest.mark.parametrize("value", ["10 ** 4300", "-(10 ** 4300)"])
def test_an_integer_with_more_digits_is_no_result(run, limit, value):
    data = run(f"import sys\nsys.set_int_max_str_digits({limit})\nreturn {{'n': [1, {value}]}}")
    problem = "result['n'][1] has more than 4300 digits: use a str"
    assert data.error == f"TypeError: the returned value must be JSON: {problem}\n"
    assert (data.status, data.error_output) == ("failed", data.error)


def test_a_json_hook_of_the_value_that_raises_fails_the_execution(run):
    data = run("class D(dict):\n    def items(self): raise RuntimeError('no')\nreturn D(a=1)")
    assert data.status == "failed" and "RuntimeError: no" in data.error


@pytest.mark.parametrize("call", one_in(2, ["return x", "report_result(x)"]))
def test_a_result_that_is_too_large_says_so(run, call):
    size = 65 * 1024 * 1024
    data = run(f"x = 'x' * {size}\n{call}")
    headline = data.error.splitlines()[0]
    assert (data.status, data.result, len(data.error) < 10_000) == ("failed", None, True)
    assert headline.startswith("ValueError: the re") and "file" in headline
    assert str(size + 2) in headline


@pytest.mark.parametrize("delay", [0.0, 0.0002])
@pytest.mark.parametrize(
    "others", ["", "threading.Thread(target=time.sleep, args=(60,), daemon=True)"]
)
def test_the_result_comes_though_a_signal_handler_raises_once_the_code_is_through(
    run, delay, others
):
    code = f"""
    import signal, threading, time
    {others and others + ".start()"}
    def alarm(signum, frame):
        if frame.f_code.co_filename != "<snippet>":
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise ValueError("too late")
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, {delay} or 1e-6, 0.00005)
    return list(range(20_000))
    """
    for _ in range(10):
        data = run(code)
        assert data.result == list(range(20_000)), data.error
        assert data.status == "completed", data.error


def test_the_result_comes_with_an_exit_that_follows(run):
    data = run("import sys, atexit, os\natexit.register(os._exit, 3)\nreturn [1]")
    assert (data.status, data.exit_code, data.error) == ("failed", 3, "exit code 3")


@pytest.mark.parametrize("end", ["1 / 0", "sys.exit(3)", "os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_what_was_reported_stays_when_the_execution_fails(run, end):
    data = run(f"import os, sys\nreport_result({{'n': 1}})\nreport_progress(40)\n{end}")
    assert (data.status, data.result, data.progress) == ("failed", {"n": 1}, 40)


def test_a_return_takes_the_place_of_what_was_reported(run):
    assert run("report_result(1)\nreturn 2").result == 2
    assert run("report_result(1)\nreturn").result == 1
    assert run("report_result(1)").result == 1
    data = run("report_result(1)\nimport sys; sys.exit(0)")
    assert (data.status, data.result, data.exit_code) == ("completed", 1, 0)
    assert run("x = [1]\nreport_result(x)\nx.append(2)").result == [1]


# -- a stop


@WAITS
def test_stopped_the_value_returned_after_the_ask_counts_first(stopped, wait):
    unwound = in_try(wait, "finally:\n    return {'x': x, 'unwound': True}")
    data = stopped(f"x = 1\nreport_result('reported')\n{unwound}")
    assert data.result == {"x": 1, "unwound": True}
    raised = "SystemExit"
    if "await" in wait:
        # Waiting on its loop, a coroutine is cancelled, as every task is: not before it waits.
        raised = "asyncio.CancelledError"
        wait = wait.replace("print(", "asyncio.get_running_loop().call_soon(print, ")
    caught = in_try(wait, f"except {raised}:\n    x = 5")
    assert stopped(f"x = 1\n{caught}\nreturn x + 1").result == 6


@WAITS
def test_stopped_what_was_last_reported_counts_as_it_is_then(stopped, wait):
    waits = in_try(wait, "finally:\n    x.append('cleanup')")
    code = f"x = [1]\nreport_result(['old'])\nreport_result(x)\nx.append(2)\n{waits}\nreturn 'end'"
    assert stopped(code).result == [1, 2, "cleanup"]


def test_stopped_a_reported_object_that_is_no_json_any_more_leaves_the_last_report(stopped):
    data = stopped(f"x = [1]\nreport_result(x)\nx.append(object())\n{WAIT}\nreturn 'end'")
    assert data.result == [1]


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
    assert stopped(f"results = [1]\nresults.append(2)\n{wait}\n{code}").result == expected


def test_stopped_the_names_count_as_they_stand_after_the_cleanup(stopped):
    waits = in_try(WAIT, "finally:\n    x = 'cleaned'")
    assert stopped(f"x = 0\n{waits}\nreturn {{'x': x}}").result == {"x": "cleaned"}


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


@pytest.mark.parametrize("code", NO_DISPLAYS.values(), ids=NO_DISPLAYS)
def test_stopped_no_other_return_expression_is_evaluated(stopped, code):
    data = stopped(f"results = [1]\n{WAIT}\n{code}")
    assert (data.result, data.output, data.error_output) == (None, "ready\n", "")


def test_the_return_expression_does_not_count_without_a_stop(run):
    assert run("x = 1\nimport sys\nsys.exit(0)\nreturn {'x': x}").result is None
    assert run("x = 1\n1 / 0\nreturn {'x': x}").result is None


def test_a_timeout_keeps_partial_results_too(manager):
    id = time_out(manager, f"results = [1]\n{WAIT}\nreturn {{'results': results}}")
    data = manager.wait(id).data
    assert (data.status, data.stop_reason, data.result) == ("stopped", "timeout", {"results": [1]})


@pytest.mark.parametrize(
    "options, first",
    [
        ({"force": True}, ""),
        ({"grace": 0}, ""),
        ({"grace": 0.1}, "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"),
    ],
    ids=["force", "no grace", "deaf"],
)
def test_a_kill_keeps_what_was_last_reported_as_it_was(stopped, options, first):
    code = f"{first}x = [1]\nreport_result(0)\nreport_result(x)\nx.append(2)\n{WAIT}\nreturn x"
    assert stopped(code, **options).result == [1]


def test_stopped_while_the_loop_is_closed_what_was_returned_counts(manager, start):
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
    id = start(code)
    manager.future(id).cancel()  # asks, and does not wait: a thread holds it up
    eventually(lambda: manager.get_status(id).data.result)
    data = manager.stop(id, force=True).data
    assert (data.stop_reason, data.result) == ("requested", {"n": 1})


def test_stopped_while_it_returns_a_large_result(manager, start):
    code = "x = ['y' * 1000] * 2000\nprint('ready')\nreturn x"
    for _ in range(4):
        stopped = manager.stop(start(code)).data
        assert stopped.status in ("stopped", "completed") and not stopped.forced
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
        assert data.result["n"] in (last, last - 1) and data.result["n"] >= seen


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


@pytest.mark.parametrize(
    "argument, text", [("object()", "must be JSON"), ("", "missing"), ("1, 2", "argument")]
)
def test_a_bad_report_raises_and_leaves_the_last_one(run, argument, text):
    code = f"try: report_result({argument})\nexcept TypeError as e: print(e)"
    data = run(f"report_result(['good'])\n{code}")
    assert (data.status, data.result, text in data.output) == ("completed", ["good"], True)


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
    assert (data.status, data.progress) == ("completed", 49), data.error
    assert data.result["x"] == "x" * 20_000


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


def first_run(code, **options):
    """Run code as a first execution, where what it reports with is still to be loaded."""
    with sidexec.ExecutionManager(**options) as manager:
        return finish(manager, code, timeout=20)


def test_a_signal_handler_may_report_while_the_code_reports():
    code = """
    import signal
    calls = reports = 0
    def handler(signum, frame):
        global calls
        calls += 1
        report_progress(calls % 100)
        report_result(["handler", calls, "x" * 1000])
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    while reports < 1000 or calls < 50:
        report_progress(reports % 100)
        report_result(["code", reports, "x" * 1000])
        reports += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    report_result("last")
    """
    for _ in range(2):
        data = first_run(code)
        assert (data.status, data.result) == ("completed", "last"), data.error


def test_reports_go_on_after_a_handler_that_raises(run):
    code = """
    import random, signal
    class Late(Exception): pass
    def handler(signum, frame): raise Late
    signal.signal(signal.SIGALRM, handler)
    for number in range(2000):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0002))
            while True: report_result(number)
        except Late:
            pass
    report_result("last")
    """
    assert run(code).result == "last"


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


def test_threads_may_report_at_once_in_a_first_execution_while_another_imports(tmp_path):
    (tmp_path / "own.py").write_text("")
    code = """
    import sys, threading
    errors = []
    def work(call):
        try:
            call()
        except BaseException as error:
            errors.append(repr(error))
    def import_until_all_have_reported():
        while any(thread.is_alive() for thread in reporting):
            sys.modules.pop("own", None)
            import own
    reporting = [threading.Thread(target=work, args=(lambda: report_result(1),)) for _ in range(8)]
    importing = threading.Thread(target=work, args=(import_until_all_have_reported,))
    for thread in (reporting[0], importing, *reporting[1:]): thread.start()
    for thread in (importing, *reporting): thread.join()
    return errors
    """
    for _ in range(4):
        assert first_run(code, cwd=str(tmp_path)).result == []


def test_report_result_in_a_forked_child_is_refused(run):
    code = """
    import os
    report_result("parent")
    if not os.fork():
        try:
            report_result("child")
        except RuntimeError:
            os._exit(3)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
    """
    data = run(code)
    assert (data.result, data.output) == ("parent", "3\n")


# -- report_progress


ODD_NUMBERS = [
    ("import fractions; x = fractions.Fraction(1, 2)", 0.5),
    ("class F(float):\n    def __repr__(self): return 'odd'\nx = F(50)", 50),
    ("import enum\nclass E(enum.IntEnum): A = 7\nx = E.A", 7),
]


@pytest.mark.parametrize(
    "code, percent",
    [(f"x = {each!r}", each) for each in (0, 100, 50, 0.0, 33.3, 100.0, 1e-9)] + ODD_NUMBERS,
)
def test_progress_is_what_was_reported(run, code, percent):
    data = run(f"{code}\nreport_progress(x)")
    assert (data.status, data.progress) == ("completed", percent), data.error


def test_the_progress_of_one_that_runs_is_there_and_may_go_back(manager, start):
    id = start(f"report_progress(80)\nreport_progress(25)\n{WAIT}")
    eventually(lambda: manager.get_status(id).data.progress == 25)
    manager.stop(id)
    assert manager.get_status(id).data.progress == 25


def test_progress_may_go_back_after_another_process_has_reported_its_own(run):
    code = """
    import os
    report_progress(50)
    if (pid := os.fork()) == 0:
        report_progress(60)
        os._exit(0)
    os.waitpid(pid, 0)
    report_progress(50)
    """
    data = run(code)
    assert (data.status, data.progress) == ("completed", 50), data.error


@pytest.mark.parametrize(
    "kind, calls",
    [
        ("ValueError", ["-1", "-0.001", "100.001", "1e400", "float('nan')", "10 ** 400"]),
        ("TypeError", ["'50'", "None", "True", "[50]", "5j", "", "1, 2"]),
    ],
)
def test_an_impossible_progress_raises_and_leaves_the_last_one(run, kind, calls):
    tries = (f"try: report_progress({call})\nexcept {kind}: print('raised')" for call in calls)
    data = run("\n".join(["report_progress(5)", *tries]))
    assert (data.status, data.output) == ("completed", "raised\n" * len(calls)), data.error
    assert data.progress == 5


def test_many_reports_of_progress_do_no_harm(run):
    data = run("for i in range(10_000): report_progress(i % 101)\nreport_progress(99.5)")
    assert (data.status, data.progress) == ("completed", 99.5)


# -- responses


def test_changing_a_response_s_result_changes_no_other(manager, run):
    id = run("return {'a': [1]}").side_execution_id
    first, second = manager.get_status(id), manager.get_status(id)
    first.data.result["a"].append(2)
    first.to_dict()["data"]["result"]["a"].append(3)
    for each in (second, manager.wait(id), manager.stop(id)):
        assert each.data.result == {"a": [1]}
