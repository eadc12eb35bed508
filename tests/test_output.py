"""What an execution writes: kept, followed and handed over, without a byte lost."""

import concurrent.futures
import hashlib
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time

import pytest
from conftest import FOREVER, alarm, begin, eventually, finish, within
from conftest import swept_manager as manager  # noqa: F401
from programs import when_asked

from sidexec.engine import engine
from sidexec.engine import pair as pairs
from sidexec.engine.delivery import Delivery
from sidexec.engine.output import Lines, OutputChunk
from sidexec.engine.pair import Pair

POLITE = "import time\ntry: print('ready'); time.sleep(600)\nfinally: print('bye')"
# Writes each of the pieces once the file for the one before is there.
IN_STEPS = """
import os, time
for n, (stream, text) in enumerate(params["pieces"]):
    os.write(stream, bytes(text))
    while not os.path.exists(os.path.join(params["dir"], str(n))): time.sleep(0.001)
"""


def in_steps(manager, directory, pieces, **options):
    params = {"dir": str(directory), "pieces": [[fd, list(data)] for fd, data in pieces]}
    return manager.start_with_code(IN_STEPS, params, **options).id


def go_on(directory, *numbers):
    for number in numbers:
        (directory / str(number)).touch()


def texts(chunks):
    """The text of each stream."""
    found = {"stdout": "", "stderr": ""}
    for chunk in chunks:
        found[chunk.stream] += chunk.text
    return found["stdout"], found["stderr"]


# -- nothing is lost


@pytest.mark.parametrize("end", ["", "os._exit(0)", "1 / 0", "os.abort()", "raise SystemExit(3)"])
def test_what_has_no_newline_is_not_lost(run, end):
    data = run(f"import os, sys\nsys.stdout.write('out')\nsys.stderr.write('err')\n{end}")
    assert data.output == "out" and data.error_output.startswith("err")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nothing_printed_is_lost_where_a_stream_is_non_blocking(make_manager, stream):
    """As it is once asyncio writes to it, or a child that shares it has made it so."""
    manager = make_manager(max_output=16 << 20)
    code = """
    import os, sys
    file = getattr(sys, params["stream"])
    os.set_blocking(file.fileno(), False)
    for _ in range(4): print("x" * 1_000_000, file=file)
    print(file.buffer.write(b"y" * 1_000_000), file=file)
    """
    data = finish(manager, code, {"stream": stream})
    text = data.output if stream == "stdout" else data.error_output
    assert data.status == "completed", data.error
    assert text == ("x" * 1_000_000 + "\n") * 4 + "y" * 1_000_000 + "1000000\n"


def test_what_was_never_flushed_is_there_at_once_and_not_lost_by_a_forced_kill(manager, start):
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "for n in range(1000): sys.stdout.write(f'{n},')\nsys.stdout.write('ready')\n"
    id = start(code + "while True: time.sleep(600)", ready="ready")
    data = manager.stop(id, force=True).data
    assert data.forced and data.output == "".join(f"{n}," for n in range(1000)) + "ready"


@pytest.mark.parametrize(
    "code, output, error_output",
    [
        ("subprocess.run('echo child; echo grief >&2', shell=True)", "child\n", "grief\n"),
        ("if not os.fork(): print('fork'); os._exit(0)\nos.wait()", "fork\n", ""),
        ("import ctypes\nctypes.CDLL(None).printf(b'from C')", "from C", ""),
        ("file = open(1, 'w', closefd=False)\nfile.write('buffered')", "buffered", ""),
        ("print('before')\nos.close(1)\nos.close(2)", "before\n", ""),
    ],
    ids=["child", "fork", "C", "file", "closed"],
)
def test_what_is_written_by_other_ways_is_captured(run, code, output, error_output):
    data = run(f"import os, subprocess\n{code}")
    assert (data.status, data.output, data.error_output) == ("completed", output, error_output)


# -- decoding


def test_a_character_may_be_split_across_writes(manager, tmp_path):
    data = "a\u20ac\U0001f600\u00e9z".encode()
    id = in_steps(manager, tmp_path, [(1, data[i : i + 1]) for i in range(len(data))])
    for n in range(len(data)):
        # Each one is on its own: the next is not written before it has arrived.
        eventually(lambda n=n: len(manager.get_status(id).data.output.encode("utf-8")) > n)
        go_on(tmp_path, n)
    assert texts(manager.follow(id))[0] == manager.wait(id).data.output == data.decode()


def test_a_follower_gets_whole_characters_only(manager, tmp_path):
    id = in_steps(manager, tmp_path, [(1, b"a\xe2"), (2, b"\xf0\x9f"), (1, b"\x82\xac"), (2, b"x")])
    follower = manager.follow(id)
    got = [next(follower)]
    go_on(tmp_path, 0, 1)
    got.append(next(follower))
    go_on(tmp_path, 2, 3)
    assert [(each.stream, each.text) for each in got] == [("stdout", "a"), ("stdout", "\u20ac")]
    assert texts(follower) == ("", "\ufffdx")


@pytest.mark.parametrize("data", [b"a\xffb\xc3", b"\xe2\x82", bytes(range(256)), b"a\r\nb\rc\n"])
def test_newlines_are_left_as_they_are_and_invalid_bytes_replaced(manager, run, data):
    text = data.decode("utf-8", "replace")
    found = run(f"import os\nos.write(1, {data!r})\nos.write(2, {data!r})")
    assert (found.output, found.error_output) == (text, text)
    assert texts(manager.follow(found.side_execution_id)) == (text, text)


# -- max_output


def test_the_newest_bytes_are_kept_and_the_others_counted(make_manager):
    manager = make_manager(max_output=1000)
    code = """
    import os
    n = 0
    for size in params["sizes"]:
        os.write(params["fd"], "".join(chr(97 + i % 26) for i in range(n, n + size)).encode())
        n += size
    """
    every_size = ([2500], [1] * 2500, [999, 1, 1], [1000], [3, 5000, 7], [999])
    for sizes, fd in itertools.product(every_size, (1, 2)):
        total = sum(sizes)
        written = "".join(chr(97 + i % 26) for i in range(total))
        data = finish(manager, code, {"sizes": sizes, "fd": fd})
        id = data.side_execution_id
        kept = data.output if fd == 1 else data.error_output
        assert kept == written[-1000:]
        assert data.output_dropped == max(0, total - 1000)
        assert texts(manager.follow(id))[fd - 1] == kept
        assert manager.stop(id).data.output_dropped == data.output_dropped


@pytest.mark.parametrize(
    "limit, code, output, error_output, dropped",
    [
        (100, "os.write(1, b'o' * 150)\nos.write(2, b'e' * 107)", "o" * 100, "e" * 100, 57),
        (1, "os.write(1, b'abc')", "c", "", 2),
        (1, "os.write(1, '\u20ac'.encode())", "", "", 3),
        (1000, "os.write(1, b'\\x80' * 5000)", "\ufffd" * 1000, "", 4000),
    ],
    ids=["both streams", "one byte", "nothing left", "no text"],
)
def test_what_is_kept_and_dropped(make_manager, limit, code, output, error_output, dropped):
    manager = make_manager(max_output=limit)
    data = finish(manager, f"import os\n{code}")
    assert (data.output, data.error_output, data.output_dropped) == (output, error_output, dropped)
    assert sum(chunk.dropped for chunk in manager.follow(data.side_execution_id)) == dropped


@pytest.mark.parametrize("limit", [999, 10_001, 70_001])
def test_no_character_is_cut(make_manager, limit):
    manager = make_manager(max_output=limit)
    total = 140_000
    code = "import os\nfor _ in range(params['n']): os.write(1, 'é'.encode() * params['each'])"
    for each in (2, 4000, 70_000):
        data = finish(manager, code, {"n": total // each, "each": each // 2})
        assert set(data.output) == {"é"}
        kept = len(data.output.encode())
        assert limit - 1 <= kept <= limit
        assert kept + data.output_dropped == total


def test_output_is_bounded_while_it_runs(make_manager):
    manager = make_manager(max_output=10_000)
    id = manager.start_with_code("while True: print('x' * 99)").id
    eventually(lambda: manager.get_status(id).data.output_dropped > 1_000_000)
    data = manager.stop(id).data
    assert len(data.output) + data.output_dropped > 1_010_000
    assert len(data.output) == 10_000


TWENTY_MEGABYTES = """
import os, random
data = random.Random(5).randbytes(500_002).hex().encode()[1:]
for _ in range(20):
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]
import hashlib
return hashlib.sha256(data * 20).hexdigest()
"""


@pytest.mark.parametrize(
    "options, kept", [({"max_output": 32 * 1024 * 1024}, 20_000_060), ({}, 16 * 1024 * 1024)]
)
def test_twenty_megabytes(make_manager, options, kept):
    followed = hashlib.sha256()
    data = finish(
        make_manager(**options),
        TWENTY_MEGABYTES,
        on_output=lambda chunk: followed.update(chunk.text.encode()),
    )
    assert (len(data.output), data.output_dropped) == (kept, 20_000_060 - kept)
    if not data.output_dropped:
        assert hashlib.sha256(data.output.encode()).hexdigest() == data.result
    assert followed.hexdigest() == data.result


# -- following


def test_follow_is_live(manager, tmp_path):
    pieces = [(1, b"one"), (2, b"two"), (1, b"three"), (1, b"four"), (2, b"five")]
    id = in_steps(manager, tmp_path, pieces)
    got = []
    for n, chunk in enumerate(manager.follow(id)):
        assert manager.get_status(id).data.status == "running"
        got.append((chunk.stream, chunk.text.encode()))
        go_on(tmp_path, n)
    assert got == [(("stdout", "stderr")[fd - 1], data) for fd, data in pieces]
    assert manager.wait(id).data.status == "completed"


def test_follow_late_starts_with_the_first_byte_kept(manager, start):
    id = start("print('early')\n" + FOREVER)
    follower = manager.follow(id)
    first = next(follower)
    assert first.text.startswith("early")
    manager.stop(id)
    assert texts([first, *follower]) == ("early\nready\n", "")


def test_follow_of_one_that_writes_nothing(manager, run):
    assert list(manager.follow(run("pass").side_execution_id)) == []


def test_follow_after_close(make_manager):
    manager = make_manager()
    id = begin(manager, POLITE)
    follower = manager.follow(id)
    manager.close()
    for each in (follower, manager.follow(id)):
        assert texts(each) == ("ready\nbye\n", "")


def test_two_followers_get_everything_each_until_the_end(manager, tmp_path):
    id = in_steps(manager, tmp_path, [(1 + n % 2, b"%d\n" % n) for n in range(20)])
    found = [], []

    def follow(got):
        for chunk in manager.follow(id):
            got.append(chunk)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        followers = [pool.submit(follow, got) for got in found]
        for n in range(20):
            eventually(lambda n=n: all(len(got) > n for got in found))
            go_on(tmp_path, n)
        for each in followers:
            each.result(20)
    data = manager.wait(id).data
    assert data.output == "".join(f"{n}\n" for n in range(0, 20, 2))
    for got in found:
        assert texts(got) == (data.output, data.error_output)


def test_a_follower_that_is_too_slow_misses_the_oldest_and_goes_on(make_manager, tmp_path):
    manager = make_manager(max_output=1000)
    id = in_steps(manager, tmp_path, [(1, b"first"), (1, b"a" * 3000), (1, b"last")])
    follower = manager.follow(id)
    assert next(follower).text == "first"
    go_on(tmp_path, 0)
    eventually(lambda: manager.get_status(id).data.output_dropped == 2005)
    go_on(tmp_path, 1, 2)
    manager.wait(id)
    rest = list(follower)
    assert texts(rest)[0] == "a" * 996 + "last"
    assert [chunk.dropped for chunk in rest] == [2004]
    assert sum(chunk.dropped for chunk in manager.follow(id)) == 2009


def test_a_slow_follower_is_told_what_it_missed_of_each_stream(make_manager):
    """With the text, it makes up every byte, and no character is torn."""
    manager = make_manager(max_output=10_001)
    flood = r"""
import os
one, two = "123456789\u20ac\n".encode() * 100, "\U0001f600".encode() * 5
for n in range(200):
    os.write(1, one)
    os.write(2, two)
"""
    id = manager.start_with_code(flood).id
    read = {"stdout": 0, "stderr": 0}
    dropped = {"stdout": [], "stderr": []}
    for chunk in manager.follow(id):
        assert not {*chunk.text} - {*"123456789\u20ac\n\U0001f600"}
        read[chunk.stream] += len(chunk.text.encode()) + chunk.dropped
        dropped[chunk.stream].append(chunk.dropped)
        manager.wait(id)
    assert read == {"stdout": 200 * 1300, "stderr": 200 * 20}
    assert sum(dropped["stdout"]) > 200_000
    assert set(dropped["stderr"]) == {0}


@pytest.mark.parametrize("character", ["\u00e9", "\u20ac", "\U0001f600"])
def test_what_begins_in_the_middle_of_a_character_begins_after_it(
    make_manager, tmp_path, character
):
    manager = make_manager(max_output=5000)
    begun, *rest = character.encode()
    second = bytes(rest) + b"y" * (5000 - len(rest))
    id = in_steps(manager, tmp_path, [(1, b"x" * 4999 + bytes([begun])), (1, second)])
    follower = manager.follow(id)
    assert next(follower).text == "x" * 4999
    late = manager.follow(id)
    go_on(tmp_path, 0)
    eventually(lambda: "y" in manager.get_status(id).data.output)
    go_on(tmp_path, 1)
    data = manager.wait(id).data
    assert (data.output, data.output_dropped) == ("y" * (5000 - len(rest)), 5000 + len(rest))
    assert texts(late)[0] == data.output
    # Whoever has read its beginning gets the character.
    got = list(follower)
    assert texts(got)[0] == character + data.output
    assert {chunk.dropped for chunk in got} == {0}


@pytest.mark.parametrize("has_read", [False, True], ids=["from the start", "from the middle"])
@pytest.mark.parametrize("sizes", [[60] * 5, [60, 90, 7], [250, 60], [1, 300]], ids=str)
def test_a_line_is_whole_or_counts_as_dropped(make_manager, tmp_path, sizes, has_read):
    manager = make_manager(max_output=100)
    # Of what is no UTF-8 each byte becomes a character of three.
    rest = b"".join(b"\xff" * (size - 1) + b"\n" for size in sizes)
    id = in_steps(manager, tmp_path, [(1, b"whole\nbegun"), (1, rest)])
    lines = manager.follow(id, lines=True)
    if has_read:
        assert next(lines) == OutputChunk("stdout", "whole\n")
    eventually(lambda: "begun" in manager.get_status(id).data.output)
    go_on(tmp_path, 0, 1)
    manager.wait(id)
    _, *whole = rest[-100:-1].split(b"\n")
    dropped = len(b"begun" + rest) - sum(len(line) + 1 for line in whole)
    dropped += 0 if has_read else len(b"whole\n")
    first, *others = lines
    expected = [line.decode("utf-8", "replace") + "\n" for line in whole] or [""]
    assert first == OutputChunk("stdout", expected[0], dropped)
    assert others == [OutputChunk("stdout", text) for text in expected[1:]]


def test_of_what_is_forgotten_no_output_is_held(make_manager):
    manager = make_manager(max_history=0)
    output = manager.run("import sys\nprint(1)\nprint(2, file=sys.stderr)").data
    assert (output.output, output.error_output) == ("1\n", "2\n")
    eventually(lambda: not manager._texts)


def test_a_line_that_comes_in_many_chunks_takes_no_time_of_its_own():
    part, count = b"x" * 16_384, 4000
    lines = Lines("stdout")
    with within(10):  # minutes, where what has come of it is copied with each chunk
        for number in range(count):
            assert not [*lines.feed(number * len(part), part)]
        (line,) = lines.feed(count * len(part), b"\n")
    assert line == OutputChunk("stdout", part.decode() * count + "\n")
    texts = [each.text for each in lines.feed(lines.position, b"a\nb", final=True)]
    assert texts == ["a\n", "b"]


# -- on_output


def test_on_output_has_everything_in_order_when_wait_returns(manager):
    code = """
    import os
    for n in range(3000):
        os.write(1 + n % 3 // 2, b"%d\\n" % n)
    """
    for _ in range(3):
        got = []
        data = finish(manager, code, on_output=got.append)
        assert texts(got) == (data.output, data.error_output)
        assert data.output.split() == [str(n) for n in range(3000) if n % 3 < 2]


@pytest.mark.parametrize("end", ["stop_all", "close"])
def test_on_output_has_everything_when_a_stop_returns(make_manager, end):
    manager = make_manager()
    got = []
    manager.start_with_code(POLITE, on_output=got.append)
    eventually(lambda: texts(got)[0] == "ready\n")
    getattr(manager, end)()
    assert texts(got) == ("ready\nbye\n", "")


@pytest.mark.parametrize("options", [{"force": True}, {"grace": 0}], ids=repr)
def test_on_output_has_everything_when_a_stop_without_grace_returns(manager, monkeypatch, options):
    monkeypatch.setattr(engine, "LEAST_FOR_CALLBACKS", 60)
    got = []
    code = "import time\nprint('a', end='')\ntime.sleep(60)"
    on_output = lambda chunk: (time.sleep(0.1), got.append(chunk))
    id = manager.start_with_code(code, on_output=on_output).id
    eventually(lambda: manager.get_status(id).data.output == "a")
    assert manager.stop(id, **options).data.status == "stopped"
    assert texts(got) == ("a", "")


def test_on_output_is_live_and_off_the_callers_thread_and_what_it_raises_is_logged(
    manager, tmp_path, caplog
):
    got = []
    threads = set()

    def on_output(chunk):
        got.append((chunk.stream, chunk.text))
        threads.add(threading.get_ident())
        go_on(tmp_path, len(got) - 1)
        raise ValueError("from the callback")

    pieces = [(1, b"one"), (2, b"two"), (1, b"three")]
    data = manager.wait(in_steps(manager, tmp_path, pieces, on_output=on_output)).data
    assert (data.status, data.error) == ("completed", None)
    assert got == [("stdout", "one"), ("stderr", "two"), ("stdout", "three")]
    assert len(threads) == 1 and threading.get_ident() not in threads
    records = [each for each in caplog.records if each.exc_info]
    assert [each.levelno for each in records] == [logging.ERROR] * 3
    assert {each.name.partition(".")[0] for each in records} == {"sidexec"}
    assert "from the callback" in str(records[0].exc_info[1])


def test_on_output_may_call_the_manager(manager):
    said, ids = [], []
    known = threading.Event()

    def on_output(chunk):
        if said:
            return  # a line may come in two pieces
        known.wait(20)
        said.append(manager.get_status(ids[0]).data.status)
        said.append(manager.wait(ids[0], 0.01).data.status)
        said.append(manager.list_executions("running").data.count)
        # Nor does it wait for this very callback, which it would for its whole grace period.
        stopped = manager.stop(ids[0], grace=60).data
        said.append((stopped.status, stopped.forced))
        said.append(manager.wait(ids[0]).data.status)

    # More than a pipe holds, which this very callback does not drain either.
    code = when_asked("print('x' * 3_000_000)\nprint('cleaned up')")
    ids.append(manager.start_with_code(code, on_output=on_output).id)
    known.set()
    data = manager.wait(ids[0], 20).data
    assert data.output == "ready\n" + "x" * 3_000_000 + "\ncleaned up\n"
    eventually(lambda: len(said) == 5)
    assert said == ["running", "running", 1, ("stopped", False), "stopped"]


def test_on_output_may_wait_for_the_end_of_more_than_it_lets_wait(manager, tmp_path):
    """The snippet would wait for it to go on, and it for the end of the snippet."""
    got, said, ids = [], [], []
    known = threading.Event()

    def on_output(chunk):
        got.append(chunk)
        known.wait(20)
        if not said:
            said.append(manager.wait(ids[0], 0.01).data.status)
            go_on(tmp_path, 0)
            said.append(manager.wait(ids[0]).data.status)

    code = IN_STEPS.replace("bytes(text)", "b'x' * 5_000_000")
    params = {"dir": str(tmp_path), "pieces": [[1, ""]]}
    ids.append(manager.start_with_code(code, params, timeout=20, on_output=on_output).id)
    known.set()
    data = manager.wait(ids[0]).data
    assert (data.status, said) == ("completed", ["running", "completed"])
    assert texts(got)[0] == data.output == "x" * 5_000_000


def test_on_output_may_start_and_close(make_manager):
    manager = make_manager()
    said = []

    def on_output(chunk):
        if said:
            return
        said.append(manager.run("return 5").data.result)
        manager.close()
        said.append("closed")

    id = manager.start_with_code(FOREVER, on_output=on_output).id
    assert manager.wait(id, 20).data.stop_reason == "closed"
    eventually(lambda: said == [5, "closed"])


def blocked():
    """An `on_output` that waits for an event, the event, and what it then gets."""
    release = threading.Event()
    got = []

    def on_output(chunk):
        release.wait(60)
        got.append(chunk)

    return on_output, release, got


def test_an_on_output_that_blocks_does_not_block_the_snippet(manager):
    on_output, release, got = blocked()
    # Less than reading pauses at. The pipe holds more, but how much goes by its size, and it
    # is only made larger for a snippet that writes fast.
    code = "for n in range(33000): print('%030d' % n)"
    id = manager.start_with_code(code, on_output=on_output).id
    eventually(lambda: manager.get_status(id).data.status == "completed")
    release.set()
    data = manager.wait(id).data
    assert (data.status, len(data.output)) == ("completed", 33000 * 31)
    assert texts(got)[0] == data.output


def test_a_snippet_waits_while_on_output_is_far_behind_and_no_other_does(manager):
    on_output, release, got = blocked()
    id = manager.start_with_code("print('x' * 6_000_000)", on_output=on_output).id
    try:
        eventually(lambda: len(manager.get_status(id).data.output) > 1024 * 1024)
        for _ in range(3):
            assert manager.run("print('other')").data.output == "other\n"
        assert manager.get_status(id).data.status == "running"
    finally:
        release.set()
    assert manager.wait(id).data.status == "completed"
    assert texts(got)[0] == "x" * 6_000_000 + "\n"


def test_what_waits_for_an_on_output_that_blocks_is_bounded(monkeypatch, caplog):
    monkeypatch.setattr("sidexec.engine.delivery.MOST", 10_000)
    release = threading.Event()
    got = []
    delivery = Delivery("x", lambda chunk: release.wait(60) and got.append(chunk.text))
    delivery.start()
    for _ in range(100):
        delivery.put("stdout", b"x" * 1000)
    release.set()
    delivery.end(bool)
    assert delivery.wait(20)
    size = len("".join(got))
    assert 10_000 <= size <= 11_000  # one more may be in the callback's hands
    (record,) = eventually(lambda: caplog.records)
    assert record.message == f"on_output of x never got {100_000 - size} bytes"


def test_on_output_is_told_what_it_has_lost_of_each_stream(monkeypatch):
    monkeypatch.setattr("sidexec.engine.delivery.MOST", 10_000)
    on_output, release, got = blocked()
    delivery = Delivery("x", on_output)
    delivery.start()
    text = "é€" * 20_000
    written = {"stdout": "x".encode() + text.encode(), "stderr": b"y" * 3000}
    delivery.put("stdout", written["stdout"][:2])  # half a character is left
    eventually(lambda: delivery._taken)
    delivery.put("stderr", written["stderr"])  # all of it is lost, and nothing follows
    for start in range(2, len(written["stdout"]), 999):
        delivery.put("stdout", written["stdout"][start : start + 999])
    release.set()
    delivery.end(bool)
    assert delivery.wait(20)
    stdout, stderr = texts(got)
    assert stdout[0] == "x" and text.endswith(stdout[1:]) and stderr == ""
    for stream, dropped in (
        ("stdout", [0, len(written["stdout"]) - len(stdout.encode())]),
        ("stderr", [3000]),
    ):
        told = [chunk.dropped for chunk in got if chunk.stream == stream]
        assert told == dropped + [0] * (len(told) - len(dropped))


def test_room_that_on_output_makes_just_before_it_is_waited_for_is_seen():
    class Late(Delivery):
        """Whoever has found no room says what to call only once all has been passed on."""

        wake = None
        has_room = threading.Event()

        @property
        def _wake(self):
            if not self._backlog:
                self.has_room.set()
            return self.wake

        @_wake.setter
        def _wake(self, wake):
            if wake is not None:
                release.set()
                assert self.has_room.wait(20)
            self.wake = wake

    release = threading.Event()
    delivery = Late("x", lambda chunk: release.wait(60))
    delivery.start()
    for _ in range(9):
        delivery.put("stdout", bytes(256 * 1024))
    assert not delivery.is_full(bool)
    delivery.end(bool)
    assert delivery.wait(20)


# -- a descriptor in other hands


def is_broken(pipe):
    try:
        os.write(pipe, b"too late")
    except BrokenPipeError:
        return True
    return False


def test_a_descriptor_that_a_stranger_holds_does_not_keep_the_execution(manager, tmp_path):
    code = """
    import socket
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(params["path"])
    socket.send_fds(connection, [b"x"], [1, 2])
    connection.recv(1)
    print("the end")
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        server.settimeout(30)
        id = manager.start_with_code(code, {"path": str(tmp_path / "socket")}).id
        connection, _ = server.accept()
    with connection:
        connection.settimeout(30)
        _, fds, _, _ = socket.recv_fds(connection, 1, 2)
        try:
            os.write(fds[0], b"from a stranger\n")
            connection.sendall(b"x")
            with within(20):
                data = manager.wait(id, 30).data
            assert (data.status, data.output) == ("completed", "from a stranger\nthe end\n")
            assert texts(manager.follow(id)) == (data.output, "")
            # The keeper holds the other end for a moment longer, until it has left.
            eventually(lambda: is_broken(fds[0]))
        finally:
            for fd in fds:
                os.close(fd)


@pytest.mark.slow
def test_callbacks_that_hang_are_waited_for_together(make_manager):
    over = threading.Event()
    manager = make_manager(grace_period=1)
    try:
        ids = [
            manager.start_with_code("print(1)", on_output=lambda chunk: over.wait(60)).id
            for _ in range(12)
        ]
        eventually(lambda: manager.list_executions("running").data.count == 0)
        with within(20):
            assert manager.wait(ids[0], 0.05).data.status == "completed"
        with within(8):  # one after the other, they would take twelve
            manager.close()
    finally:
        over.set()


def test_on_output_is_called_also_where_a_handler_has_interrupted_the_start(make_manager, tmp_path):
    class Interrupt(Exception):
        pass

    def interrupt(signum, frame):
        if (tmp_path / "up").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Interrupt

    python = tmp_path / "python"
    waits = f"echo > {tmp_path}/up\nuntil [ -e {tmp_path}/go ]; do sleep 0.01; done"
    python.write_text(f'#!/bin/sh\n{waits}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    got = []
    manager = make_manager(grace_period=1, python=python)
    with alarm(interrupt, 0.01, 0.01), pytest.raises(Interrupt):
        manager.start_with_code("print('x' * 3_000_000)", on_output=got.append)
    (tmp_path / "go").touch()
    (summary,) = manager.list_executions().data.executions
    assert manager.wait(summary.side_execution_id).data.status == "completed"
    assert texts(got)[0] == "x" * 3_000_000 + "\n"


def test_the_thread_of_on_output_takes_signals_from_nobody_but_its_callback(make_manager):
    masks, threads = [], []

    def call(chunk):
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        threads.append(threading.get_native_id())

    manager = make_manager()
    id = manager.start_with_code(FOREVER, on_output=call).id
    eventually(lambda: threads)

    def is_blocked():
        with open(f"/proc/self/task/{threads[0]}/status") as file:
            (line,) = [line for line in file if line.startswith("SigBlk:")]
        return int(line.split()[1], 16) >> (signal.SIGINT - 1) & 1

    eventually(is_blocked)
    manager.stop(id)
    assert set(map(frozenset, masks)) == {frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ()))}


def test_a_number_that_is_anothers_at_once_is_not_waited_for(manager, monkeypatch):
    """Of a file that can always be read, it would wake the thread without a pause."""
    heard = []
    wait, close = Pair.wait, pairs.close_all
    with open("/dev/zero", "rb") as other:

        def open_another(fds):
            for fd in fds:
                os.dup2(other.fileno(), fd)  # which closes it
                numbers.append(fd)

        numbers = []
        monkeypatch.setattr(pairs, "close_all", open_another)
        monkeypatch.setattr(
            Pair, "wait", lambda *args, **options: heard.append(wait(*args, **options)) or heard[-1]
        )
        code = "import os, time\nprint('ready')\nos.close(1)\ntry: time.sleep(60)\nfinally: "
        id = begin(manager, code + "time.sleep(0.1)")
        eventually(lambda: numbers)
        monkeypatch.setattr(pairs, "close_all", close)
        heard.clear()
        manager.stop(id)
        assert len(heard) < 50
        close(numbers)


def test_what_is_read_at_the_end_is_what_is_there_by_then():
    """A process outside of the tree may go on writing for ever."""
    ends = [os.pipe() for _ in range(4)]
    pair = Pair(0, [reader for reader, _ in ends], False)
    writer = ends[2][1]
    os.write(writer, b"there")
    read = []
    for fd, size in pair.there_now(*pair.streams):
        read.append(pair.read_stream(fd, size))
        assert len(read) < 10
        os.write(writer, b"later")
    pair.close()
    for _, writer in ends:
        os.close(writer)
    assert read == [("stdout", b"there")]
