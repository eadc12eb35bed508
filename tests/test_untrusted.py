"""What a snippet sends is never trusted: it harms its own execution and no other."""

import contextlib
import copy
import json
import pickle

import pytest
from conftest import IS_FREE_THREADED, begin, crossed, eventually, finish, one_in, within
from conftest import shared_manager as manager  # noqa: F401
from test_misbehaving_hosts import run_host

from sidexec.protocol import MAX_RESULT

# The snippet's end of its channel, found as an attacker would: it is its only socket.
CHANNEL = """
import os, stat, sys, time
def is_socket(fd):
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False
(channel,) = [fd for fd in map(int, os.listdir("/proc/self/fd")) if is_socket(fd)]
def frame(kind, payload=b"", length=None):
    return kind + (len(payload) if length is None else length).to_bytes(4, "big") + payload
def send(data):
    data = memoryview(data)
    while data:
        data = data[os.write(channel, data):]
def hold():
    print("sent", flush=True)
    time.sleep(600)
"""


def reject(constant):
    raise AssertionError(f"{constant} is not JSON")


def check_response(response):
    """Whatever a snippet did, a response can do all that the contract promises."""
    wire = json.loads(response.to_json(), parse_constant=reject)
    assert wire["data"]["sideExecutionId"] == response.data.side_execution_id
    assert pickle.loads(pickle.dumps(response)) == response
    assert copy.deepcopy(response) == response
    assert repr(response)
    for text in (response.data.output, response.data.error_output):
        text.encode()


@contextlib.contextmanager
def unharmed_neighbour(manager):
    """Check that another execution goes on, and that its data are right."""
    code = """
    import time
    for line in range(10**9):
        report_progress(line % 101)
        if line % 100 == 0: report_result({"line": line})
        print(line, flush=True)
        time.sleep(0.001)
    """
    id = manager.start_with_code(code).id
    yield
    before = len(manager.get_status(id).data.output)
    eventually(lambda: len(manager.get_status(id).data.output) > before)
    assert manager.get_status(id).data.status == "running"
    data = manager.stop(id).raise_for_error().data
    assert (data.status, data.exit_code, data.forced) == ("stopped", 143, False)
    lines = data.output.split()
    assert lines == [str(number) for number in range(len(lines))]
    assert data.result["line"] % 100 == 0 and len(lines) - data.result["line"] < 102
    data = finish(manager, "print('hello'); return [1]")
    assert (data.status, data.result, data.output) == ("completed", [1], "hello\n")


# Frames that only others send, or nobody.
FRAMES = ["?x", "e0 0", "e0 0 1", "r1 1", "Rno", "P1", "X1 0", "L", "s0", "F", "gx"]
NO_PROGRESS = ["1e9", "101", "9" * 10**5, "-1", "nan", "inf", "", "half", r"\xff\xfe"]
# What breaks the protocol, and so fails the execution at once.
VIOLATIONS = {
    "garbage": "send(os.urandom(7) + b'\\0' * 100000)",
    "zeros": "send(b'\\0' * 5)",
    "text": "send(b'GET / HTTP/1.1\\r\\n\\r\\n')",
    **{each: f"send(frame(b'{each[0]}', b'{each[1:]}'))" for each in FRAMES},
    "gigabytes": "send(frame(b'v', length=2**32 - 1))",
    "gigabytes_of_progress": "send(frame(b'p', length=2**31))",
    "gigabytes_of_error": "send(frame(b'x', length=2**30))",
    **{f"progress {each[:9]}": f"send(frame(b'p', b'{each}'))" for each in NO_PROGRESS},
    "after_a_good_one": "send(frame(b'p', b'50') + frame(b'v', b'1') + b'\\xff' * 9)",
}


@pytest.mark.parametrize("ending", ["", "\nhold()"], ids=["ends", "holds"])
def test_what_is_no_frame_of_a_snippets_fails_the_execution_and_no_other(manager, ending):
    with unharmed_neighbour(manager):
        codes = [CHANNEL + code + ending for code in VIOLATIONS.values()]
        ids = [manager.start_with_code(code).id for code in codes]
        for name, id in zip(VIOLATIONS, ids):
            response = manager.wait(id, timeout=20)
            data = response.data
            assert (data.status, data.stop_reason) == ("failed", None), (name, response)
            assert "channel" in data.error, name
            assert data.progress in (None, 50), name
            check_response(response)
            check_response(manager.stop(id))


@pytest.mark.parametrize("name", one_in(3, VIOLATIONS))
def test_a_stop_during_a_violation_answers(manager, name):
    id = manager.start_with_code(f"{CHANNEL}{VIOLATIONS[name]}\nhold()").id
    response = manager.stop(id)
    # The violation may have come first, and then has ended the execution, or not.
    assert response.data.status in ("stopped", "failed")
    assert response.success == (response.data.status == "stopped")
    final = manager.get_status(id)
    assert final.data.status == response.data.status
    check_response(response)
    check_response(final)


# What is a frame, but no JSON.
NO_JSON = {
    "empty": b"",
    "text": b"hello",
    "brackets": b"[" * 10_000,  # a million: in `test_engine`
    "braces": b'{"a":' * 10_000,
    "closed_brackets": b"[" * 10_000 + b"]" * 10_000,
    "nan": b"NaN",
    "nan_inside": b'{"a": [1, NaN]}',
    "infinity": b"-Infinity",
    "too_great": b"1e999",
    "too_great_inside": b"[-1e999]",
    "no_utf8": b'"\xff\xfe\xfd"',
    "too_great_without_a_long_exponent": b"1" + b"0" * 210 + b"e99",
    "utf16": "[1]".encode("utf-16"),
    "utf16_without_a_mark": "[1]".encode("utf-16-le"),
    "utf32_nested": ('["\\"",' + "[" * 400 + "]" * 400 + ',"\\""]').encode("utf-32-be"),
    "cut": b'{"a": [1, 2',
    "two": b"1 2",
    "python": b"{'a': None}",
}


@pytest.mark.parametrize("payload", one_in(2, NO_JSON.values()), ids=list(NO_JSON))
def test_a_result_that_is_no_json_fails_the_execution(manager, payload):
    code = f"{CHANNEL}\nsend(frame(b'v', {payload!r}))\n"
    id = begin(manager, code + "hold()", ready="sent")
    running = manager.get_status(id)
    stopped = manager.stop(id)
    failed = manager.wait(manager.start_with_code(code).id, timeout=20)
    for response, status in ((running, "running"), (stopped, "stopped"), (failed, "failed")):
        assert (response.data.status, response.data.result) == (status, None)
        check_response(response)
    assert "JSON" in failed.data.error


@pytest.mark.parametrize(
    "depth, way",
    crossed(2, [10, 50, 200, 400, 900, 990, 5000], ["sent", "returned", "reported"]),
)
def test_a_deeply_nested_result_is_one_that_every_response_can_hold_or_a_failure(
    manager, depth, way
):
    nest = f"x = []\nfor _ in range({depth} - 1): x = [x]\n"
    code = {
        "sent": CHANNEL + f"send(frame(b'v', b'[' * {depth} + b']' * {depth}))",
        "returned": nest + "return x",
        "reported": nest + "report_result(x)",
    }[way]
    response = manager.run(code)
    assert response.data.status in (["completed"] if depth <= 50 else ["completed", "failed"])
    if response.data.status == "completed":
        assert json.dumps(response.data.result) == "[" * depth + "]" * depth
    else:
        assert response.data.error
    check_response(response)


@pytest.mark.parametrize("payload", [b'"\\ud800"', b'"\xed\xa0\x80"'], ids=["escaped", "encoded"])
def test_a_result_with_half_a_character_makes_no_response_useless(manager, payload):
    response = manager.run(f"{CHANNEL}send(frame(b'v', {payload!r}))")
    assert response.data.status in ("completed", "failed")
    response.to_json().encode()
    check_response(response)


# Ends without a word, or in the middle of one.
SILENT = {
    "half_a_header": "send(b'v\\0\\0')",
    "half_a_frame": "send(frame(b'v', b'1')[:-1])",
    "most_of_a_large_one": "send(frame(b'v', b'1' * 5000000, 7000000))",
    "half_an_error": "send(frame(b'x', b'Error', 100)); os._exit(4)",
    "channel_closed": "os.close(channel)",
    "channel_shut": "import socket; socket.socket(fileno=channel).shutdown(2)",
    "everything_closed": "os.closerange(0, 1000)",
    "everything_closed_then_exit": "os.closerange(0, 1000); os._exit(0)",
    "output_closed": "os.close(1); os.close(2)",
}


@pytest.mark.parametrize("name", SILENT)
def test_silence_holds_up_neither_the_end_nor_a_stop(manager, tmp_path, name):
    code = CHANNEL + SILENT[name]
    response = manager.wait(manager.start_with_code(code).id, timeout=20)
    completes, fails = name != "half_an_error", "send(" in SILENT[name]
    assert response.data.status in completes * ["completed"] + fails * ["failed"], response
    assert response.data.result is None
    check_response(response)

    ready, cleaned = tmp_path / "ready", tmp_path / "cleaned"
    body = f"""{code.partition("; os._exit")[0]}
try:
    open({str(ready)!r}, "w").close()
    time.sleep(600)
finally:
    open({str(cleaned)!r}, "w").close()
"""
    id = manager.start_with_code(body).id
    eventually(ready.exists)
    response = manager.stop(id)
    assert (response.data.status, response.data.forced) == ("stopped", False)
    assert cleaned.exists()
    check_response(response)


def test_a_snippet_whose_channel_is_closed_sees_an_error_when_it_reports(run):
    data = run(CHANNEL + "os.close(channel)\ntry: report_result(1)\nexcept OSError: print('seen')")
    assert (data.status, data.output) == ("completed", "seen\n")


# Floods: nothing but a stop ends them.
FLOODS = {
    "progress": "data = frame(b'p', b'7') * 5000\nwhile True: send(data)",
    "results": "data = frame(b'v', b'[1, 2]') * 5000\nwhile True: send(data)",
    "large_results": "data = frame(b'v', b'[' + b'1,' * 500000 + b'1]')\nwhile True: send(data)",
    "errors": "data = frame(b'x', b'x' * 1000000)\nwhile True: send(data)",
    "output": "while True: os.write(1, b'x' * 65536)",
    "error_output": "while True: os.write(2, b'x' * 65536)",
    "both": "while True: os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)",
    "both_in_drops": "while True: os.write(1, b'x'); os.write(2, b'y')",
    "no_utf8": "while True: os.write(1, bytes(range(128, 256)) * 500)",
    "everything": (
        "data = frame(b'p', b'7') * 5000\n"
        "while True: os.write(1, b'x' * 65536); os.write(2, b'y' * 65536); send(data)"
    ),
}


@pytest.mark.parametrize("force", one_in(2, [False, True]), ids=["asked", "forced"])
@pytest.mark.parametrize("name", one_in(2, FLOODS))
def test_a_flood_is_ended_by_a_stop(make_manager, name, force):
    manager = make_manager(max_output=100_000, grace_period=10)
    id = manager.start_with_code(CHANNEL + FLOODS[name]).id

    def is_under_way():
        data = manager.get_status(id).data
        return data.progress or data.result or len(data.output + data.error_output) > 500

    if name != "errors":
        eventually(is_under_way)
    with within(10):
        response = manager.stop(id, force=force)
    data = response.data
    assert data.status == "stopped"
    assert data.exit_code in ((-9, 143) if force else (143,))
    assert data.forced == (data.exit_code == -9)
    assert max(len(data.output), len(data.error_output)) <= 100_000
    check_response(response)


def test_floods_harm_no_other_execution(make_manager):
    manager = make_manager(max_output=1_000_000, grace_period=10)
    floods = [FLOODS[name] for name in ("progress", "large_results", "both", "both_in_drops")]
    with unharmed_neighbour(manager):
        ids = [manager.start_with_code(CHANNEL + flood).id for flood in floods]
        for _ in range(5):
            with within(10):  # bound by nothing but the processors that all of them share
                assert {manager.get_status(id).data.status for id in ids} == {"running"}
        for id in ids:
            assert manager.stop(id).data.status == "stopped"


# -- memory, measured in hosts of their own

# Runs code, and what is beside it: another thread in a long call, or other executions.
MEMORY = """
import itertools

def rss():
    with open("/proc/self/status") as file:
        values = dict(line.split(":", 1) for line in file)
    return [int(values[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")]

code, max_output, beside = sys.argv[2], int(sys.argv[3]), sys.argv[4]
with sidexec.ExecutionManager(max_output=max_output, grace_period=10) as manager:
    status_of(manager.start_with_code("print(1); return 2"), manager)
    before = rss()[0]
    over = set()
    slowest = 0
    if beside == "call":
        call = map(over.__contains__, itertools.repeat(1, 10**8))
        threading.Thread(target=any, args=(call,)).start()
    id = manager.start_with_code(code).id
    while beside == "neighbours" and manager.wait(id, timeout=0.01).data.status == "running":
        at = time.monotonic()
        assert status_of(manager.start_with_code("return 3"), manager).result == 3
        slowest = max(slowest, time.monotonic() - at)
    data = manager.wait(id).data
    over.add(1)
    report({"growth": rss()[1] - before, "status": data.status, "slowest": slowest,
            "output": len(data.output), "dropped": data.output_dropped})
"""

MIB = 1024 * 1024
SLOW = pytest.mark.slow


def memory(tmp_path, code, max_output=MIB, beside=""):
    return run_host(tmp_path, MEMORY, CHANNEL + code, max_output, beside)


WRITES = "data = b'x' * 65536\nfor _ in range({}): os.write(1, data)"
HELD = {  # the code, max_output, the output and what is dropped of it, the growth in MiB
    "100_mb_of_output": (WRITES.format(1600), MIB, MIB, 1600 * 65536 - MIB, 40),
    "both_streams_in_drops": (
        "for _ in range(200000): os.write(1, b'xy'); os.write(2, b'z')",
        *(100_000, 100_000, 400_000 - 100_000 + 200_000 - 100_000, 20),
    ),
    "a_flood_of_results": (
        "data = frame(b'v', b'\"' + b'x' * 1_000_000 + b'\"')\nfor _ in range(70): send(data)",
        *(MIB, 0, 0, 60),
    ),
    "a_gigabyte_of_output": (WRITES.format(16384), MIB, MIB, 2**30 - MIB, 40),
}


@pytest.mark.parametrize(
    "name", [*list(HELD)[:3], pytest.param("a_gigabyte_of_output", marks=SLOW)]
)
def test_the_host_holds_what_max_output_says_and_the_last_result(tmp_path, name):
    code, max_output, output, dropped, growth = HELD[name]
    found = memory(tmp_path, code, max_output)
    assert (found["status"], found["output"], found["dropped"]) == ("completed", output, dropped)
    assert found["growth"] < growth * MIB


@pytest.mark.skipif(not IS_FREE_THREADED, reason="with the GIL, nothing runs beside such a call")
def test_output_is_freed_while_another_thread_is_in_a_long_call_of_c_code(tmp_path):
    """Until such a call ends, the interpreter keeps large objects that others have freed."""
    found = memory(tmp_path, WRITES.format(1600), beside="call")
    assert found["growth"] < 20 * MIB


def test_the_host_holds_of_a_claimed_length_what_has_come(tmp_path):
    code = "send(frame(b'v', b'1' * 1000000, sys.maxsize & 0x3ffffff))\ntime.sleep(0.1)"
    assert memory(tmp_path, code)["growth"] < 20 * MIB


LARGE = {
    "empty_objects": ("[", "{},", "{}]", 3),
    "numbers": ("[", "1,", "1]", 2),
    "brackets": ("", "[", "", 1),
    "text": ('"', "x", '"', 1),
}


@SLOW
@pytest.mark.parametrize("head, unit, tail, size", LARGE.values(), ids=LARGE)
def test_a_result_as_large_as_may_be_costs_a_bounded_memory_and_holds_nobody_up(
    tmp_path, head, unit, tail, size
):
    count = (MAX_RESULT - 10) // size
    code = f"send(frame(b'v', b'{head}' + b'{unit}' * {count} + b'{tail}'))"
    found = memory(tmp_path, code, beside="neighbours")
    assert found["status"] in ("completed", "failed")
    print(found)
    # Three bytes of JSON make an object of 88, and two at a time may be parsed: by the
    # manager, which judges the result, and by the caller, who asks for it meanwhile.
    assert found["growth"] < 2 * 88 / 3 * MAX_RESULT + 100 * MIB
    assert found["slowest"] < 20
