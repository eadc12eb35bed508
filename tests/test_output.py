"""What an execution writes: kept, followed and handed over, without a byte lost."""

import collections
import concurrent.futures
import hashlib
import itertools
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time

import pytest
from conftest import begin, eventually
from conftest import swept_manager as manager  # noqa: F401

from sidexec.engine import pair as pairs
from sidexec.engine.delivery import Delivery
from sidexec.engine.pair import Pair

FOREVER = "import time\nprint('ready')\ntime.sleep(600)"
DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
# Writes each of the pieces once the file for the one before is there.
IN_STEPS = """
import os, time
for n, (stream, text) in enumerate(params["pieces"]):
    os.write(stream, bytes(text))
    while not os.path.exists(os.path.join(params["dir"], str(n))): time.sleep(0.001)
"""


def id_of(response):
    return response.raise_for_error().data.side_execution_id


def texts(chunks):
    """The text of each stream."""
    found = {"stdout": "", "stderr": ""}
    for chunk in chunks:
        found[chunk.stream] += chunk.text
    return found["stdout"], found["stderr"]


# -- nothing is lost


def test_output_and_error_output_are_apart(run):
    data = run("import sys\nprint('one')\nprint('two', file=sys.stderr)\nprint('three')")
    assert (data.output, data.error_output) == ("one\nthree\n", "two\n")


@pytest.mark.parametrize(
    "end",
    ["", "import os; os._exit(0)", "1 / 0", "import os; os.abort()", "raise SystemExit(3)"],
)
def test_what_has_no_newline_is_not_lost(run, end):
    data = run(f"import sys\nsys.stdout.write('out')\nsys.stderr.write('err')\n{end}")
    assert data.output == "out"
    assert data.error_output.startswith("err")


def test_what_was_never_flushed_is_not_lost_by_a_forced_kill(manager):
    id = id_of(
        manager.start_with_code(
            DEAF + "import sys\nfor n in range(1000): sys.stdout.write(f'{n},')\n"
            "sys.stderr.write('ready')\nwhile True: time.sleep(600)"
        )
    )
    eventually(lambda: manager.get_status(id).data.error_output == "ready")
    data = manager.stop(id, force=True).data
    assert data.forced
    assert data.output == "".join(f"{n}," for n in range(1000))


def test_output_of_child_processes_is_captured(run):
    data = run(
        "import os, subprocess\nsubprocess.run('echo child; echo grief >&2', shell=True)\n"
        "if os.fork() == 0:\n    print('fork')\n    os._exit(0)\nos.wait()"
    )
    assert (data.output, data.error_output) == ("child\nfork\n", "grief\n")


def test_what_c_code_printed_is_captured(run):
    data = run("import ctypes\nctypes.CDLL(None).printf(b'from C')\nprint(' and Python')")
    assert sorted(data.output) == sorted("from C and Python\n")


def test_a_file_over_the_descriptor_is_captured(run):
    data = run("import sys\nfile = open(1, 'w', closefd=False)\nfile.write('buffered')")
    assert data.output == "buffered"


def test_what_cleanup_prints_is_captured(manager, start):
    id = start(
        "import atexit, sys, time\natexit.register(print, 'at exit', flush=True)\n"
        "try: print('ready'); time.sleep(600)\n"
        "finally: print('finally'); print('error', file=sys.stderr)",
    )
    data = manager.stop(id).data
    assert (data.output, data.error_output) == ("ready\nfinally\nat exit\n", "error\n")


def test_output_can_be_read_while_it_runs(manager, start):
    id = start(
        "import sys, time\nsys.stdout.write('no newline ready')\ntime.sleep(600)", ready="ready"
    )
    assert manager.get_status(id).data.output == "no newline ready"


def test_an_execution_that_closes_its_streams(run):
    data = run("import os\nprint('before')\nos.close(1)\nos.close(2)\nreport_result(1)")
    assert (data.status, data.output, data.result) == ("completed", "before\n", 1)


# -- decoding


def in_steps(manager, tmp_path, pieces, **options):
    params = {"dir": str(tmp_path), "pieces": [[fd, list(data)] for fd, data in pieces]}
    return id_of(manager.start_with_code(IN_STEPS, params, **options))


def test_a_character_may_be_split_across_writes(manager, tmp_path):
    data = "a\u20ac\U0001f600\u00e9z".encode()
    id = in_steps(manager, tmp_path, [(1, data[i : i + 1]) for i in range(len(data))])
    for n in range(len(data)):
        # Each one is on its own: the next is not written before it has arrived.
        eventually(lambda n=n: len(manager.get_status(id).data.output.encode("utf-8")) > n)
        (tmp_path / str(n)).touch()
    chunks = list(manager.follow(id))
    assert manager.wait(id).data.output == data.decode()
    assert texts(chunks)[0] == data.decode()


def test_a_follower_gets_whole_characters_only(manager, tmp_path):
    id = in_steps(manager, tmp_path, [(1, b"a\xe2"), (2, b"\xf0\x9f"), (1, b"\x82\xac"), (2, b"x")])
    follower = manager.follow(id)
    got = [next(follower)]
    for n in (0, 1):
        (tmp_path / str(n)).touch()
    got.append(next(follower))
    for n in (2, 3):
        (tmp_path / str(n)).touch()
    assert [(each.stream, each.text) for each in got] == [("stdout", "a"), ("stdout", "\u20ac")]
    assert texts(follower) == ("", "\ufffdx")


def test_invalid_bytes_are_replaced(manager, run):
    data = run("import os\nos.write(1, b'a\\xffb\\xc3')\nos.write(2, b'\\xe2\\x82')")
    assert (data.output, data.error_output) == ("a\ufffdb\ufffd", "\ufffd")
    chunks = list(manager.follow(data.side_execution_id))
    assert texts(chunks) == (data.output, data.error_output)


def test_every_byte_there_is(manager, run):
    data = run("import os\nos.write(1, bytes(range(256)))")
    assert data.output == bytes(range(256)).decode("utf-8", "replace")


def test_newlines_are_left_as_they_are(run):
    assert run("import os\nos.write(1, b'a\\r\\nb\\rc\\n')").output == "a\r\nb\rc\n"


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
        id = id_of(manager.start_with_code(code, {"sizes": sizes, "fd": fd}))
        data = manager.wait(id).data
        kept = data.output if fd == 1 else data.error_output
        assert kept == written[-1000:]
        assert data.output_dropped == max(0, total - 1000)
        assert len(kept) + data.output_dropped == total
        assert texts(manager.follow(id))[fd - 1] == kept
        assert manager.stop(id).data.output_dropped == data.output_dropped


def test_what_both_streams_drop_is_counted_together(make_manager):
    manager = make_manager(max_output=100)
    id = id_of(
        manager.start_with_code("import os\nos.write(1, b'o' * 150)\nos.write(2, b'e' * 107)")
    )
    data = manager.wait(id).data
    assert (data.output, data.error_output) == ("o" * 100, "e" * 100)
    assert data.output_dropped == 57


@pytest.mark.parametrize("limit", [999, 10_001, 70_001])
def test_no_character_is_cut(make_manager, limit):
    manager = make_manager(max_output=limit)
    total = 140_000
    code = "import os\nfor _ in range(params['n']): os.write(1, 'é'.encode() * params['each'])"
    for each in (2, 4000, 70_000):
        params = {"n": total // each, "each": each // 2}
        data = manager.wait(id_of(manager.start_with_code(code, params))).data
        assert set(data.output) == {"é"}
        kept = len(data.output.encode())
        assert limit - 1 <= kept <= limit
        assert kept + data.output_dropped == total


def test_a_limit_of_one_byte(make_manager):
    manager = make_manager(max_output=1)
    data = manager.wait(id_of(manager.start_with_code("print('abc', end='')"))).data
    assert (data.output, data.output_dropped) == ("c", 2)


def test_output_is_bounded_while_it_runs(make_manager):
    manager = make_manager(max_output=10_000)
    id = id_of(manager.start_with_code("while True: print('x' * 99)"))
    eventually(lambda: manager.get_status(id).data.output_dropped > 1_000_000)
    data = manager.stop(id).data
    assert len(data.output) + data.output_dropped > 1_010_000
    assert len(data.output) == 10_000


TWENTY_MEGABYTES = """
import os, random
data = random.Random(5).choices(b"abcdefghijklmnopqrstuvwxyz\\n", k=1_000_003)
data = bytes(data)
for _ in range(20):
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]
import hashlib
return hashlib.sha256(data * 20).hexdigest()
"""


def test_twenty_megabytes(make_manager):
    manager = make_manager(max_output=32 * 1024 * 1024)
    followed = hashlib.sha256()
    id = id_of(
        manager.start_with_code(
            TWENTY_MEGABYTES, on_output=lambda chunk: followed.update(chunk.text.encode())
        )
    )
    data = manager.wait(id).data
    assert data.output_dropped == 0
    assert len(data.output) == 20_000_060
    assert hashlib.sha256(data.output.encode()).hexdigest() == data.result
    assert followed.hexdigest() == data.result


def test_twenty_megabytes_beyond_the_default_limit(make_manager):
    data = make_manager()
    id = id_of(data.start_with_code(TWENTY_MEGABYTES))
    data = data.wait(id).data
    assert len(data.output) == 16 * 1024 * 1024
    assert len(data.output) + data.output_dropped == 20_000_060


# -- following


def test_follow_is_live(manager, tmp_path):
    pieces = [(1, b"one"), (2, b"two"), (1, b"three"), (1, b"four"), (2, b"five")]
    id = in_steps(manager, tmp_path, pieces)
    got = []
    for n, chunk in enumerate(manager.follow(id)):
        assert manager.get_status(id).data.status == "running"
        got.append((chunk.stream, chunk.text.encode()))
        (tmp_path / str(n)).touch()
    assert got == [(("stdout", "stderr")[fd - 1], data) for fd, data in pieces]
    assert manager.wait(id).data.status == "completed"


def test_follow_late_starts_with_the_first_byte_kept(manager, start):
    id = start("print('early')\n" + FOREVER)
    follower = manager.follow(id)
    first = next(follower)
    assert first.text.startswith("early")
    manager.stop(id)
    assert texts([first, *follower]) == ("early\nready\n", "")


def test_follow_of_one_that_has_ended(manager, run):
    id = run("print('a')\nprint('b')").side_execution_id
    assert texts(manager.follow(id)) == ("a\nb\n", "")
    assert texts(manager.follow(id)) == ("a\nb\n", "")


def test_follow_of_one_that_writes_nothing(manager, run):
    assert list(manager.follow(run("pass").side_execution_id)) == []


def test_follow_after_close(make_manager):
    manager = make_manager()
    id = begin(manager, "import time\ntry: print('ready'); time.sleep(600)\nfinally: print('bye')")
    follower = manager.follow(id)
    manager.close()
    assert texts(follower) == ("ready\nbye\n", "")
    assert texts(manager.follow(id)) == ("ready\nbye\n", "")


def test_two_followers_get_everything_each(manager, tmp_path):
    pieces = [(1 + n % 2, b"%d\n" % n) for n in range(20)]
    id = in_steps(manager, tmp_path, pieces)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lambda: list(manager.follow(id))) for _ in range(2)]
        for n in range(20):
            eventually(
                lambda n=n: (
                    b"%d\n" % n
                    in b"".join(
                        text.encode()
                        for text in (
                            manager.get_status(id).data.output,
                            manager.get_status(id).data.error_output,
                        )
                    )
                )
            )
            (tmp_path / str(n)).touch()
        got = [texts(future.result(20)) for future in futures]
    data = manager.wait(id).data
    assert got == [(data.output, data.error_output)] * 2
    assert data.output == "".join(f"{n}\n" for n in range(0, 20, 2))


def test_a_follower_that_is_let_go_of_leaves_nothing(manager, start):
    id = start(FOREVER)
    follower = manager.follow(id)
    assert next(follower).text.startswith("ready")
    follower.close()
    assert manager.stop(id).data.status == "stopped"


def test_a_follower_that_is_too_slow_misses_the_oldest_and_goes_on(make_manager, tmp_path):
    manager = make_manager(max_output=1000)
    id = in_steps(manager, tmp_path, [(1, b"first"), (1, b"a" * 3000), (1, b"last")])
    follower = manager.follow(id)
    assert next(follower).text == "first"
    (tmp_path / "0").touch()
    eventually(lambda: manager.get_status(id).data.output_dropped == 2005)
    for n in "12":
        (tmp_path / n).touch()
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
    id = id_of(manager.start_with_code(flood))
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
    (tmp_path / "0").touch()
    eventually(lambda: "y" in manager.get_status(id).data.output)
    (tmp_path / "1").touch()
    data = manager.wait(id).data
    assert (data.output, data.output_dropped) == ("y" * (5000 - len(rest)), 5000 + len(rest))
    assert texts(late)[0] == data.output
    # Whoever has read its beginning gets the character.
    got = list(follower)
    assert texts(got)[0] == character + data.output
    assert {chunk.dropped for chunk in got} == {0}


def test_a_follower_is_told_also_where_nothing_is_left(make_manager):
    manager = make_manager(max_output=1)
    id = id_of(manager.start_with_code("print('\u20ac', end='')"))
    assert manager.wait(id).data.output_dropped == 3
    assert [(chunk.text, chunk.dropped) for chunk in manager.follow(id)] == [("", 3)]


def test_follow_ends_with_the_end(manager, start):
    id = start(FOREVER)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: list(manager.follow(id)))
        manager.stop(id, force=True)
        assert texts(future.result(20)) == ("ready\n", "")
    assert manager.get_status(id).data.status == "stopped"


# -- on_output


def test_on_output_has_everything_in_order_when_wait_returns(manager):
    code = """
    import os
    for n in range(3000):
        os.write(1 + n % 3 // 2, b"%d\\n" % n)
    """
    for _ in range(3):
        got = []
        id = id_of(manager.start_with_code(code, on_output=got.append))
        data = manager.wait(id).data
        assert texts(got) == (data.output, data.error_output)
        assert data.output.split() == [str(n) for n in range(3000) if n % 3 < 2]


@pytest.mark.parametrize("end", ["stop_all", "close"])
def test_on_output_has_everything_when_a_stop_returns(make_manager, end):
    manager = make_manager()
    got = []
    code = "import time\ntry: print('ready'); time.sleep(600)\nfinally: print('bye')"
    manager.start_with_code(code, on_output=got.append)
    eventually(lambda: texts(got)[0] == "ready\n")
    getattr(manager, end)()
    assert texts(got) == ("ready\nbye\n", "")


def test_on_output_is_live_and_off_the_callers_thread(manager, tmp_path):
    got = []
    threads = set()

    def on_output(chunk):
        got.append((chunk.stream, chunk.text))
        threads.add(threading.get_ident())
        (tmp_path / str(len(got) - 1)).touch()

    pieces = [(1, b"one"), (2, b"two"), (1, b"three")]
    id = in_steps(manager, tmp_path, pieces, on_output=on_output)
    assert manager.wait(id).data.status == "completed"
    assert got == [("stdout", "one"), ("stderr", "two"), ("stdout", "three")]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_on_output_that_raises_is_logged_and_harms_nothing(manager, tmp_path, caplog):
    got = []

    def on_output(chunk):
        got.append(chunk)
        (tmp_path / str(len(got) - 1)).touch()
        raise ValueError("from the callback")

    id = in_steps(manager, tmp_path, [(1, b"one"), (1, b"two"), (2, b"three")], on_output=on_output)
    data = manager.wait(id).data
    assert (data.status, data.error) == ("completed", None)
    assert texts(got) == ("onetwo", "three")
    records = [each for each in caplog.records if each.exc_info]
    assert len(records) == 3
    assert all(each.name.split(".")[0] == "sidexec" for each in records)
    assert all(each.levelno == logging.ERROR for each in records)
    assert "from the callback" in str(records[0].exc_info[1])


def test_on_output_may_call_the_manager(manager):
    said = collections.deque()
    ids = []
    known = threading.Event()

    def on_output(chunk):
        if said:
            return  # a line may come in two pieces
        known.wait(20)
        said.append(manager.get_status(ids[0]).data.status)
        said.append(manager.wait(ids[0], 0.01).data.status)
        said.append(manager.list_executions("running").data.count)
        # Nor does it wait for this very callback, which it would for its whole grace period.
        said.append(manager.stop(ids[0], grace=60).data.status)
        said.append(manager.wait(ids[0]).data.status)

    ids.append(id_of(manager.start_with_code(FOREVER, on_output=on_output)))
    known.set()
    assert manager.wait(ids[0], 20).data.status == "stopped"
    eventually(lambda: len(said) == 5)
    assert list(said) == ["running", "running", 1, "stopped", "stopped"]


def test_on_output_may_start_and_close(make_manager):
    manager = make_manager()
    said = []

    def on_output(chunk):
        if said:
            return
        id = manager.start_with_code("return 5").data.side_execution_id
        said.append(manager.wait(id).data.result)
        manager.close()
        said.append("closed")

    id = id_of(manager.start_with_code(FOREVER, on_output=on_output))
    assert manager.wait(id, 20).data.stop_reason == "closed"
    eventually(lambda: said == [5, "closed"])


def test_an_on_output_that_blocks_does_not_block_the_snippet(manager):
    release = threading.Event()
    got = []

    def on_output(chunk):
        release.wait(60)
        got.append(chunk)

    # Less than reading pauses at. The pipe holds more, but how much goes by its size, and it
    # is only made larger for a snippet that writes fast.
    code = "for n in range(33000): print('%030d' % n)"
    id = id_of(manager.start_with_code(code, on_output=on_output))
    eventually(lambda: manager.get_status(id).data.status == "completed")
    release.set()
    data = manager.wait(id).data
    assert (data.status, len(data.output)) == ("completed", 33000 * 31)
    assert texts(got)[0] == data.output


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


def test_a_descriptor_that_a_stranger_holds_does_not_keep_the_execution(manager):
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.join(directory, "socket"))
        server.listen()
        server.settimeout(30)
        id = id_of(
            manager.start_with_code(
                "import socket\n"
                "connection = socket.socket(socket.AF_UNIX)\n"
                "connection.connect(params['path'])\n"
                "socket.send_fds(connection, [b'x'], [1, 2])\n"
                "connection.recv(1)\n"
                "print('the end')",
                {"path": os.path.join(directory, "socket")},
            )
        )
        connection, _ = server.accept()
        with connection:
            connection.settimeout(30)
            _, fds, _, _ = socket.recv_fds(connection, 1, 2)
            try:
                os.write(fds[0], b"from a stranger\n")
                connection.sendall(b"x")
                begin = time.monotonic()
                data = manager.wait(id, 30).data
                assert time.monotonic() - begin < 20
                assert data.status == "completed"
                assert data.output == "from a stranger\nthe end\n"
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
        ids = []
        for _ in range(12):
            started = manager.start_with_code("print(1)", on_output=lambda chunk: over.wait(60))
            ids.append(started.raise_for_error().data.side_execution_id)
        eventually(lambda: manager.list_executions("running").data.count == 0)
        at = time.monotonic()
        assert manager.wait(ids[0], 0.05).data.status == "completed"
        assert time.monotonic() - at < 0.9
        manager.close()
        assert time.monotonic() - at < 8  # one after the other, they would take twelve
    finally:
        over.set()


def test_on_output_is_called_also_where_a_handler_has_interrupted_the_start(make_manager, tmp_path):
    class Interrupt(Exception):
        pass

    def interrupt(signum, frame):
        raise Interrupt

    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho > {tmp_path}/up\nsleep 0.2\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    got = []
    manager = make_manager(grace_period=1, python=python)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        ask = threading.Thread(
            target=lambda: (
                eventually(lambda: (tmp_path / "up").exists()),
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1),
            )
        )
        ask.start()
        with pytest.raises(Interrupt):
            manager.start_with_code("print('x' * 3_000_000)", on_output=got.append)
    finally:
        ask.join()
        signal.signal(signal.SIGUSR1, before)
    (summary,) = manager.list_executions().data.executions
    assert manager.wait(summary.side_execution_id).data.status == "completed"
    assert "".join(chunk.text for chunk in got) == "x" * 3_000_000 + "\n"


def test_the_thread_of_on_output_takes_signals_from_nobody_but_its_callback(make_manager):
    masks = []
    threads = []

    def call(chunk):
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        threads.append(threading.get_native_id())

    manager = make_manager()
    id = manager.start_with_code(
        "import time\nprint('x')\ntime.sleep(60)", on_output=call
    ).data.side_execution_id
    eventually(lambda: threads)

    def is_blocked():
        with open(f"/proc/self/task/{threads[0]}/status") as file:
            (line,) = [line for line in file if line.startswith("SigBlk:")]
        return int(line.split()[1], 16) >> (signal.SIGINT - 1) & 1

    eventually(is_blocked)
    manager.stop(id)
    assert set(map(frozenset, masks)) == {frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ()))}


def test_bytes_that_are_no_text_are_kept_as_any_others(make_manager):
    manager = make_manager(max_output=1000)
    started = manager.start_with_code(r"import os; os.write(1, b'\x80' * 5000)")
    data = manager.wait(started.data.side_execution_id).data
    assert (data.output, data.output_dropped) == ("\ufffd" * 1000, 4000)


def test_an_output_that_is_not_read_for_a_while_holds_up_nobody_elses(make_manager, tmp_path):
    """The number of a descriptor that the one has closed may be one of the other's now."""
    manager = make_manager()
    over = threading.Event()
    flood = f"""
import os, time
os.close(2)
while not os.path.exists({str(tmp_path / "go")!r}): time.sleep(0.001)
os.write(1, b"x" * 4_000_000)
"""
    try:
        one = manager.start_with_code(flood, on_output=lambda chunk: over.wait(60))
        time_up = time.monotonic() + 0.3  # until its end of the file is there
        eventually(lambda: time.monotonic() > time_up)
        others = [manager.start_with_code(FOREVER).data.side_execution_id for _ in range(4)]
        (tmp_path / "go").touch()
        id = one.data.side_execution_id
        eventually(lambda: len(manager.get_status(id).data.output) > 1024 * 1024)
        late = [
            manager.start_with_code("print('late')\nreturn 1").data.side_execution_id
            for _ in range(4)
        ]
        for each in late:
            data = manager.wait(each, 10).data
            assert (data.status, data.output) == ("completed", "late\n")
        for each in others:
            data = manager.stop(each, grace=10).data
            assert (data.status, data.output, data.forced) == ("stopped", "ready\n", False)
    finally:
        over.set()


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
