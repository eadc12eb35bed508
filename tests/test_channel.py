"""The channel: what a snippet reports goes to the manager, and into no other file."""

import time

import pytest
from conftest import children, eventually, tree
from conftest import swept_manager as manager  # noqa: F401
from test_without_kernel_help import taken_away

import sidexec

CLOSED = """
import os
os.closerange(3, params["top"])
paths = [os.path.join(params["directory"], str(n)) for n in range(params["files"])]
files = [open(path, "wb") for path in paths]
report_progress(50)
report_result({"secret": 42})
for file in files: file.close()
"""


def contents(directory):
    return {path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("end", ["", "return {'secret': 42}"])
def test_closing_descriptors_as_daemons_do_loses_no_result(tmp_path, run, end):
    for _ in range(2):
        data = run(CLOSED + end, {"directory": str(tmp_path), "top": 256, "files": 20})
        assert (data.status, data.result, data.progress) == ("completed", {"secret": 42}, 50), data
        assert contents(tmp_path) == {b""}


def test_nothing_is_written_to_a_file_that_has_the_channel_s_number(tmp_path, run):
    for _ in range(2):
        data = run(CLOSED, {"directory": str(tmp_path), "top": 4096, "files": 1000})
        assert data.status == "failed"
        assert "OSError: [Errno 9] nothing can be reported any more" in data.error_output
        assert contents(tmp_path) == {b""}


def test_a_result_that_is_lost_is_told(run):
    code = "import os\nos.closerange(3, 4096)\n"
    code += "files = [open(os.devnull, 'wb') for _ in range(1000)]\nreturn 5"
    data = run(code)
    assert (data.status, data.exit_code, data.result) == ("failed", 1, None)
    assert data.error_output.startswith("OSError: [Errno 9] nothing can be reported any more")
    assert "leave it open" in data.error_output


def test_code_that_reports_nothing_may_close_everything(run):
    data = run("import os\nos.closerange(3, 4096)\nprint('done')")
    assert (data.status, data.output, data.error_output) == ("completed", "done\n", "")


def test_where_few_files_may_be_open_the_channel_stays_where_it_is(run):
    assert run("return 1", limits=sidexec.Limits(open_files=32)).result == 1


def test_a_snippet_waits_whatever_timeout_a_preloaded_module_has_set_for_sockets(preloading):
    others = set(children())
    manager = preloading({"sets_a_timeout": "import socket; socket.setdefaulttimeout(1e-3)"})
    assert manager.run("return input()", input="x").check().data.result == "x"
    (launcher,) = set(children()) - others

    def has_spare():
        before = tree(launcher)[1:]  # below a keeper
        time.sleep(0.05)  # it would time out at once
        return before and tree(launcher)[1:] == before

    eventually(has_spare)


def test_a_forked_child_waits_for_no_report_of_its_parent_and_sends_none(run):
    # A thread is in the midst of a report when the snippet forks.
    code = """
    import os, signal, threading
    channel = report_progress.__self__._channel
    write, inside, forked = channel._write, threading.Event(), threading.Event()
    def late(frame):
        inside.set()
        forked.wait()
        write(frame)
    channel._write = late
    thread = threading.Thread(target=report_result, args=("old",))
    thread.start()
    inside.wait()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        channel._write = write
        os.read(reader, 1)
        report_progress(2)
        os._exit(0)
    forked.set()
    thread.join()
    report_result("new")
    os.write(writer, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    """
    data = run(code)
    assert (data.status, data.progress, data.result) == ("completed", 2, "new")


@pytest.mark.parametrize("place", ["_write", "_send_all"])
def test_a_report_by_a_handler_that_comes_during_another_is_sent_after_it(run, place):
    code = """
    channel = report_progress.__self__._channel
    call = getattr(channel, params["place"])
    def interrupted(*frames):
        setattr(channel, params["place"], call)
        if frames: report_progress(2)
        call(*frames)
        if not frames: report_progress(2)
    setattr(channel, params["place"], interrupted)
    report_progress(1)
    """
    data = run(code, {"place": place})
    assert (data.status, data.progress) == ("completed", 2)


def test_a_report_that_a_handler_ends_is_sent_by_the_next(run):
    code = """
    channel = report_progress.__self__._channel
    write = channel._write
    def interrupted(frame):
        channel._write = write
        raise ZeroDivisionError
    channel._write = interrupted
    try: report_progress(1)
    except ZeroDivisionError: pass
    report_result(2)
    """
    data = run(code)
    assert (data.progress, data.result) == (1, 2)


def test_a_report_that_an_ask_interrupts_is_sent(make_manager):
    interrupt = """
def interrupted(self, send_all=Channel._send_all):
    Channel._send_all = send_all
    os.kill(os.getpid(), 15)
    send_all(self)
Channel._send_all = interrupted
"""
    with taken_away({"channel": interrupt}):
        data = make_manager().run("report_progress(40)\nimport time; time.sleep(60)").data
    assert (data.status, data.exit_code, data.progress) == ("failed", 143, 40)


def test_a_child_s_progress_does_not_land_within_a_result(run):
    code = """
import os, time
if os.fork() == 0:
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        report_progress(time.monotonic() % 100)
    os._exit(0)
for n in range(12):
    report_result([n, "x" * 4_000_000])
os.wait()
return 7
"""
    data = run(code)
    assert (data.status, data.result, data.error) == ("completed", 7, None)
