"""Standard input, and standard error that goes where standard output goes."""

import collections
import os
import re
import select
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import begin, descriptors, eventually, within
from conftest import swept_manager as manager  # noqa: F401

import sidexec
from sidexec.engine.descriptors import pipe
from sidexec.engine.input import MOST, Input


@pytest.mark.parametrize("text", ["", "one\ntwo\n", b"one\n", "ß" * 10, "x" * 3_000_000])
def test_input_is_all_of_standard_input(manager, text):
    code = "import sys; data = sys.stdin.buffer.read(); return [len(data), data[:20].decode()]"
    data = text if isinstance(text, bytes) else text.encode()
    for _ in range(2):  # the second one in a pair that was forked ahead
        result = manager.run(code, input=text).check().data.result
        assert result == [len(data), data[:20].decode()]


def test_standard_input_is_empty_unless_given(manager):
    assert manager.run("import sys; return sys.stdin.read()").data.result == ""


def test_input_that_nobody_reads_holds_nothing_up(manager):
    assert manager.run("pass", input="x" * 3_000_000).data.status == "completed"
    id = manager.start_with_code("import time; time.sleep(60)", input="x" * 3_000_000).id
    assert manager.stop(id).data.status == "stopped"


def test_input_is_sent_as_it_comes(manager):
    code = "import sys\nfor line in sys.stdin: print('got', line, end='')\nprint('end')"
    id = manager.start_with_code(code, stdin=subprocess.PIPE).id
    assert manager.send_input(id, "one\n").success
    eventually(lambda: manager.get_status(id).data.output == "got one\n")
    assert manager.send_input(id, b"two\nthr").success
    assert manager.send_input(id, "ee\n", close=True).success
    assert manager.wait(id).data.output == "got one\ngot two\ngot three\nend\n"
    answer = manager.send_input(id, "more")
    assert not answer.success and "completed: it reads no more input" in answer.error


def test_a_prompt_is_seen_before_its_answer_is_sent(manager):
    id = manager.start_with_code("return input('name? ')", stdin=subprocess.PIPE).id
    eventually(lambda: manager.get_status(id).data.output == "name? ")
    manager.send_input(id, "Ada\n")
    assert manager.wait(id).data.result == "Ada"


@pytest.mark.parametrize("first", ["os.close(0)", ""])
def test_what_is_never_read_is_not_said_to_be_sent(manager, tmp_path, first):
    flag = tmp_path / "flag"
    code = f"import os, time\n{first}\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.01)"
    id = manager.start_with_code(code, stdin=subprocess.PIPE).id
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(manager.send_input, id, "x" * 3_000_000)
        try:
            if not first:
                input = manager._engine.executions[id].input
                eventually(lambda: not input.has_room())
                flag.touch()
            answer = sending.result(20)
        finally:
            flag.touch()
    # It may not be told yet that it has ended.
    assert not answer.success
    assert re.search("nobody reads its|completed: it reads no more", answer.error)
    assert manager.wait(id).data.status == "completed"


def test_to_write_a_large_input_in_small_parts_copies_it_no_further(monkeypatch):
    reader, writer = pipe()
    written = bytearray()

    def write(fd, data):
        written.extend(data[:100])
        return len(data[:100])

    input = Input(writer, b"x" * 16_000_000, is_open=False)
    monkeypatch.setattr(os, "write", write)
    with within(20):  # of 1,280 GB that would have to be copied
        input.write()
    assert len(written) == 16_000_000 and input.writer is None
    reader.close()


def test_who_sends_too_much_waits_until_it_is_read_or_all_is_over(manager):
    id = manager.start_with_code("import time; time.sleep(60)", stdin=subprocess.PIPE).id
    sent = []
    thread = threading.Thread(target=lambda: sent.append(manager.send_input(id, "x" * 5_000_000)))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    assert manager.stop(id).data.status == "stopped"
    thread.join(20)
    assert not thread.is_alive() and len(sent) == 1


def test_send_input_where_it_can_not_be_sent(manager):
    id = manager.start_with_code("import time; time.sleep(60)").id
    assert "start it with stdin=subprocess.PIPE" in manager.send_input(id, "x").error
    for options, reason in (
        ({"input": "x"}, "`input` was all of it"),
        ({"stdin": subprocess.PIPE}, "was closed by an earlier call"),
    ):
        closed = manager.start_with_code("import time; time.sleep(60)", **options).id
        if "stdin" in options:
            assert manager.send_input(closed, "x", close=True).success
        assert reason in manager.send_input(closed, "x").error
    assert manager.send_input("nobody", "x").data.status == "not_found"
    with pytest.raises(TypeError, match="text"):
        manager.send_input(id, 1)
    with pytest.raises(TypeError, match="close"):
        manager.send_input(id, "", close=1)


def test_standard_error_in_standard_output(manager):
    code = "import os, sys\nfor n in range(50): print(n); print(-n, file=sys.stderr)\n"
    code += "os.write(2, b'raw\\n')\n1 / 0"
    data = manager.run(code, stderr=subprocess.STDOUT).data
    head, raw, trace = data.output.partition("raw\n")
    assert head == "".join(f"{n}\n{-n}\n" for n in range(50))
    assert trace.endswith("ZeroDivisionError: division by zero\n") and data.error_output == ""


@pytest.mark.parametrize(
    "options, error",
    [
        ({"input": 1}, TypeError),
        ({"stdin": 3}, ValueError),
        ({"stdin": subprocess.PIPE, "input": "x"}, ValueError),
        ({"stderr": subprocess.PIPE}, ValueError),
    ],
)
def test_misuse_raises(manager, options, error):
    with pytest.raises(error, match="input|stdin|stderr"):
        manager.start_with_code("pass", **options)


def test_the_own_manager_of_a_run_takes_input():
    assert sidexec.run("return input()", input="hello\n").data.result == "hello"


def test_how_much_waits_is_known_whoever_adds_to_it_at_once():
    reader, writer = pipe()
    input = Input(writer, b"", is_open=True)

    def add():
        for _ in range(1000):
            input.add(b"x" * 10, close=False)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    size = 0
    while size < 80_000:
        input.write()
        size += len(os.read(reader.fd, 2**20)) if select.select([reader.fd], [], [], 0)[0] else 0
    for thread in threads:
        thread.join()
    for data, has_room in ((b"x" * MOST, True), (b"x", False)):
        input.add(data, close=False)
        assert input.has_room() is has_room
    input.end()
    reader.close()


def test_the_host_holds_no_end_but_its_own(manager):
    id = begin(manager, "print('ready')\ninput()", stdin=subprocess.PIPE)
    writer = manager._engine.executions[id].input.writer.fd
    assert list(descriptors().values()).count(os.readlink(f"/proc/self/fd/{writer}")) == 1
    manager.stop(id)


def test_what_comes_with_the_end_while_input_is_written_is_written_as_well():
    class Arrived(collections.deque):
        def __bool__(self):
            if not len(self) and input.closed_by is None:
                input.add(b"late", close=True)
                return False
            return len(self) > 0

    reader, writer = pipe()
    input = Input(writer, b"", is_open=True)
    input._arrived = Arrived()
    input.write()
    input.write()
    assert os.read(reader.fd, 100) == b"late"
    reader.close()
