"""`run`, `future`, and following by lines or for a time."""

import asyncio
import concurrent.futures
import time

import pytest
from conftest import FOREVER, eventually, finish, has_printed, nothing_left
from conftest import swept_manager as manager  # noqa: F401

import sidexec
from sidexec import SideExecutionError

# -- run


def test_run_returns_the_status_at_the_end(manager):
    status = manager.run("print('hi'); return params['n'] + 1", {"n": 1}, thread_id="t")
    assert (status.data.status, status.data.result, status.data.output) == ("completed", 2, "hi\n")
    assert status.thread_id == "t"


def test_run_with_check_raises_what_did_not_complete(manager):
    assert manager.run("pass", check=True).data.status == "completed"
    with pytest.raises(SideExecutionError, match="ZeroDivisionError") as caught:
        manager.run("1 / 0", check=True)
    assert caught.value.response.data.status == "failed"
    with pytest.raises(SideExecutionError, match="timeout"):
        manager.run(FOREVER, timeout=0.1, check=True)
    assert manager.run("1 / 0").data.status == "failed"


def test_a_run_that_can_not_be_started(manager):
    status = manager.run("pass", cwd="/no/such")
    assert (status.success, status.data.status) == (False, "failed")
    assert "no such directory" in status.error and status.data.error == status.error
    with pytest.raises(SideExecutionError, match="no such directory"):
        manager.run("pass", cwd="/no/such", check=True)


def test_misuse_of_run_raises(manager):
    with pytest.raises(TypeError, match="check"):
        manager.run("pass", check=1)
    for run in manager.run, sidexec.run:
        for name in "nonsense", "args", "path", "block":
            with pytest.raises(TypeError, match=rf"^run\(\) got an unexpected .* '{name}'$"):
                run("pass", **{name: ["x"]})
    with pytest.raises(TypeError, match="code"):
        sidexec.run(1)


def test_a_run_of_its_own_has_the_timeouts_of_both():
    for options in {"default_timeout": 0.2}, {"timeout": 0.2, "default_timeout": 30}:
        assert sidexec.run("import time; time.sleep(60)", **options).data.stop_reason == "timeout"


def test_a_run_of_its_own_leaves_nothing():
    with nothing_left():
        options = {"cwd": "/", "grace_period": 1, "default_timeout": 30}
        status = sidexec.run("import os; return [os.getcwd(), params]", {"a": 1}, 30, **options)
        assert status.check().data.result == ["/", {"a": 1}]


# -- futures


def test_futures_come_as_they_complete(manager):
    pauses = (0.2, 0.0, 0.1)
    code = "import time; time.sleep(params['pause']); return params['pause']"
    ids = [manager.start_with_code(code, {"pause": pause}).id for pause in pauses]
    futures = [manager.future(id) for id in ids]
    done = [each.result().data.result for each in concurrent.futures.as_completed(futures, 60)]
    assert sorted(done) == sorted(pauses)
    assert manager.future(ids[1]).result(0).data.result == 0.0
    assert concurrent.futures.wait(futures, 0).not_done == set()


def test_a_future_that_is_cancelled_has_a_result_all_the_same(manager):
    id = manager.start_with_code(FOREVER).id
    future = manager.future(id)
    assert future.running()
    assert future.cancel() is False and not future.cancelled()
    data = future.result(30).data
    assert (data.status, data.stop_reason) == ("stopped", "requested")
    assert future.cancel() is False


def test_wait_returns_and_a_future_comes_when_on_output_has_had_everything(manager):
    got = []

    def slow(chunk):
        time.sleep(0.05)
        got.append(chunk.text)

    code = "import time\nfor n in range(5):\n    print(n)\n    time.sleep(0.01)"
    id = manager.start_with_code(code, on_output=slow).id
    seen = []
    manager.future(id).add_done_callback(lambda future: seen.append("".join(got)))
    output = manager.wait(id).data.output
    assert output == "".join(got) == "0\n1\n2\n3\n4\n"
    eventually(lambda: seen)
    assert seen == [output] and manager.future(id).result(0).data.output == output


def test_a_future_of_an_unknown_id_raises_at_the_call(manager):
    with pytest.raises(SideExecutionError, match="no execution 'x'"):
        manager.future("x")
    with pytest.raises(TypeError):
        manager.future(1)


def test_cancelling_the_task_that_awaits_a_future_stops_the_execution(manager):
    async def main():
        ids = [manager.start_with_code("return 7").id, manager.start_with_code(FOREVER).id]
        first = await asyncio.wrap_future(manager.future(ids[0]))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(manager.future(ids[1])), 0.1)
        return first.data.result, ids[1]

    result, id = asyncio.run(main())
    assert result == 7
    assert manager.wait(id).data.stop_reason == "requested"


def test_what_a_callback_raises_keeps_no_other_future_waiting(manager):
    id = manager.start_with_code(FOREVER).id
    futures = [manager.future(id) for _ in range(3)]

    def leave(future):
        raise SystemExit(1)

    futures[1].add_done_callback(leave)
    manager.stop(id)
    assert [each.result(20).data.status for each in futures] == ["stopped"] * 3


# -- following


def test_following_by_lines(manager):
    code = """
    import sys, time
    for piece in ("a", "b\\nc", "\\n\\nd", "e"):
        sys.stdout.write(piece)
        sys.stderr.write(piece.upper())
        time.sleep(0.01)
    """
    chunks = list(manager.follow(manager.start_with_code(code).id, lines=True))
    assert [each.text for each in chunks if each.stream == "stdout"] == ["ab\n", "c\n", "\n", "de"]
    assert [each.text for each in chunks if each.stream == "stderr"] == ["AB\n", "C\n", "\n", "DE"]


def test_following_for_a_time(manager):
    id = manager.start_with_code(FOREVER).id
    has_printed(manager, id, "ready\n")
    lines = manager.follow(id, lines=True, timeout=0.5)
    assert next(lines).text == "ready\n"
    with pytest.raises(TimeoutError):
        next(lines)
    manager.stop(id)
    assert [each.text for each in manager.follow(id, lines=True, timeout=0)] == ["ready\n"]
    with pytest.raises(ValueError, match="timeout"):
        manager.follow(id, timeout=-1)
    with pytest.raises(TypeError, match="lines"):
        manager.follow(id, lines=1)


def test_lines_that_were_dropped_are_counted(make_manager):
    manager = make_manager(max_output=100)
    id = finish(manager, "for n in range(1000): print('%09d' % n)").side_execution_id
    chunks = list(manager.follow(id, lines=True))
    assert sum(len(each.text) + each.dropped for each in chunks) == 10_000
    assert chunks[0].dropped and not any(each.dropped for each in chunks[1:])
