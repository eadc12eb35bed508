"""The document that the project was created from: its examples, use cases and notes.

Notes that stand elsewhere:
- an unknown id, what has ended, a second stop, the final status: test_manager
- clean-up and its handlers, a busy one, force, `stoppedAt`: test_stopping
- partial results: test_results; output until the stop: test_output
- several stops at once: test_concurrency; child processes: test_no_survivors
- the structure of the response: test_responses
"""

import concurrent.futures
import fcntl
import threading
import time
from datetime import datetime, timezone

import pytest
from conftest import descriptors, eventually, tree
from conftest import shared_manager as manager  # noqa: F401

import sidexec

SHARED = {"preload": ["asyncio"]}
FOREVER = "import time\nprint('ready')\ntime.sleep(600)"


@pytest.fixture
def block(tmp_path):
    """Write an action block: its path."""

    def block(code):
        directory = tmp_path / "block"
        directory.mkdir()
        (directory / "__main__.py").write_text(code)
        return directory

    return block


def has_printed(manager, id, text):
    eventually(lambda: text in manager.get_status(id).data.output)


# -- the examples


def test_example_1_stop_a_running_execution(manager):
    started = manager.start_with_code(
        """
        import asyncio
        for i in range(100):
            print(f"Processing item {i}...")
            await asyncio.sleep(0.05)
        return {"completed": True}
        """
    )
    execution_id = started.data.side_execution_id
    has_printed(manager, execution_id, "Processing item 2...\n")

    result = manager.stop(execution_id)

    assert result.type == "stopSideExecutionResponse"
    assert result.success
    assert result.data.side_execution_id == execution_id
    assert result.data.status == "stopped"
    assert not result.data.forced
    assert result.data.output.startswith("Processing item 0...\nProcessing item 1...\n")
    assert "Processing item 99" not in result.data.output


def test_example_2_stop_multiple_executions(manager):
    execution_ids = []
    for _ in range(5):
        result = manager.start_with_code(
            """
            import asyncio
            await asyncio.sleep(30)
            return {"done": True}
            """
        )
        execution_ids.append(result.data.side_execution_id)

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        stop_results = list(pool.map(manager.stop, execution_ids))

    assert [result.data.status for result in stop_results] == ["stopped"] * 5
    assert [result.data.side_execution_id for result in stop_results] == execution_ids
    assert manager.list_executions("running").data.count == 0


@pytest.mark.parametrize(
    "duration, limit, expected", [(60, 0.3, "stopped"), (0.05, 60, "completed")]
)
def test_example_3_conditional_stopping(manager, duration, limit, expected):
    def execute_with_timeout(execution_id, timeout):
        start_time = time.monotonic()
        while True:
            if time.monotonic() - start_time > timeout:
                return manager.stop(execution_id).data.status
            status = manager.get_status(execution_id)
            if status.data.status in ("completed", "failed"):
                return status.data.status
            time.sleep(0.02)

    execution = manager.start_with_code(
        f"""
        import asyncio
        await asyncio.sleep({duration})
        return {{"done": True}}
        """
    )
    assert execute_with_timeout(execution.data.side_execution_id, limit) == expected


def test_example_4_stop_with_cleanup(manager):
    execution = manager.start_with_code(
        """
        import asyncio
        resources = ["resource1", "resource2", "resource3"]
        try:
            print("ready")
            await asyncio.sleep(30)
            return {"success": True}
        finally:
            print("Cleaning up resources...")
        """
    )
    execution_id = execution.data.side_execution_id
    has_printed(manager, execution_id, "ready\n")

    result = manager.stop(execution_id)

    assert result.success
    assert result.data.output == "ready\nCleaning up resources...\n"
    assert abs((datetime.now(timezone.utc) - result.data.stopped_at).total_seconds()) < 20


@pytest.mark.parametrize(
    "module, nap", [("asyncio", "await asyncio.sleep(0.05)"), ("time", "time.sleep(0.05)")]
)
def test_example_5_stop_and_get_partial_results(manager, module, nap):
    execution = manager.start_with_code(
        f"""
        import {module}
        results = []

        for i in range(100):
            results.append({{"index": i, "value": i * i}})
            print(f"Processed {{i + 1}}/100")
            {nap}

        return {{"results": results}}
        """
    )
    execution_id = execution.data.side_execution_id
    has_printed(manager, execution_id, "Processed 3/100")

    stop_result = manager.stop(execution_id)

    assert stop_result.data.status == "stopped"
    results = stop_result.data.result["results"]
    assert 3 <= len(results) < 100
    assert results == [{"index": i, "value": i * i} for i in range(len(results))]
    lines = stop_result.data.output.splitlines()
    assert lines == [f"Processed {i + 1}/100" for i in range(len(lines))]
    assert len(results) - len(lines) in (0, 1)
    assert manager.get_status(execution_id).data.result == stop_result.data.result


def test_example_6_batch_stop_with_error_handling(manager, start, run):
    def batch_stop(execution_ids):
        results = {"stopped": [], "failed": [], "alreadyStopped": []}
        for id in execution_ids:
            try:
                result = manager.stop(id)
                if result.data.status == "stopped":
                    results["stopped"].append(id)
                elif result.data.status == "already_stopped":
                    results["alreadyStopped"].append(id)
                else:
                    results["failed"].append((id, result.data.status))
            except sidexec.SideExecutionError as error:
                results["failed"].append((id, str(error)))
        return results

    running, stopped = start(FOREVER), start(FOREVER)
    manager.stop(stopped)
    completed = run("pass").side_execution_id
    failed = run("1 / 0").side_execution_id

    assert batch_stop([running, stopped, completed, failed, "id5"]) == {
        "stopped": [running],
        "alreadyStopped": [stopped],
        "failed": [(completed, "completed"), (failed, "failed"), ("id5", "not_found")],
    }


# -- the use cases


def wait_for_completion(manager, execution_id):
    status = manager.get_status(execution_id)
    while status.data.status == "running":
        time.sleep(0.02)
        status = manager.get_status(execution_id)
    return status.data


@pytest.mark.parametrize(
    "code, timeout, expected",
    [("import time; time.sleep(60)", 0.2, "stopped"), ("print(params['n'])", 60, "completed")],
)
def test_use_case_1_timeout_enforcement(manager, block, code, timeout, expected):
    def execute_with_timeout(action_block_path, params, timeout):
        result = manager.start_with_action_block(action_block_path, params, timeout)
        execution_id = result.data.side_execution_id
        timer = threading.Timer(timeout, manager.stop, (execution_id,))
        timer.start()
        data = wait_for_completion(manager, execution_id)
        timer.cancel()
        timer.join()
        return data

    data = execute_with_timeout(block(code), {"n": 5}, timeout)

    assert data.status == expected
    if expected == "stopped":
        assert data.stop_reason in ("timeout", "requested")
    else:
        assert data.output == "5\n"


def test_use_case_2_user_cancellation(manager, block):
    registered = []

    def cancellable_execution(action_block_path, on_cancel):
        result = manager.start_with_action_block(action_block_path)
        execution_id = result.data.side_execution_id
        on_cancel(lambda: manager.stop(execution_id))
        return wait_for_completion(manager, execution_id)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(cancellable_execution, block(FOREVER), registered.append)
        cancel = eventually(lambda: registered and registered[0])
        assert cancel().data.status == "stopped"
        assert future.result().stop_reason == "requested"


def test_use_case_3_resource_cleanup(manager, block):
    class Unplugged(Exception):
        pass

    ids = []

    def execute_with_auto_cleanup(action_block_path):
        execution = manager.start_with_action_block(action_block_path)
        execution_id = execution.data.side_execution_id
        ids.append(execution_id)
        try:
            has_printed(manager, execution_id, "ready\n")
            raise Unplugged
        finally:
            if manager.get_status(execution_id).data.status == "running":
                manager.stop(execution_id)

    with pytest.raises(Unplugged):
        execute_with_auto_cleanup(block(FOREVER))
    assert manager.get_status(ids[0]).data.status == "stopped"


def test_use_case_4_conditional_stopping(make_manager, block):
    manager = make_manager()  # without what is preloaded, which counts as well
    code = """
import time
held = []
while True:
    held.append(b"x" * 10_000_000)
    print(len(held))
    while len(held) >= 12:
        time.sleep(1)
"""

    def execute_with_condition(action_block_path, condition):
        execution = manager.start_with_action_block(action_block_path)
        execution_id = execution.data.side_execution_id
        eventually(lambda: condition(manager.get_status(execution_id).data))
        manager.stop(execution_id)
        return execution_id

    id = execute_with_condition(block(code), lambda status: status.memory_usage > 100_000_000)
    data = manager.get_status(id).data
    assert data.status == "stopped"
    assert int(data.output.split()[-1]) > 8


def test_use_case_5_emergency_stop(manager, start, run):
    run("pass")
    ids = {start(FOREVER) for _ in range(4)}

    running = manager.list_executions("running").data.executions
    assert {each.side_execution_id for each in running} == ids
    results = manager.stop_all()

    assert {result.data.side_execution_id for result in results} == ids
    assert [result.data.status for result in results] == ["stopped"] * 4
    assert manager.list_executions("running").data.executions == ()


# -- the notes


def test_note_stopped_executions_can_not_be_resumed(manager, start, run):
    id = start(FOREVER)
    manager.stop(id)
    before = manager.get_status(id).data
    assert run("return 1").result == 1
    manager.stop(id)
    assert manager.get_status(id).data == before
    assert not [name for name in dir(manager) if "resume" in name or "restart" in name]


def test_note_resources_are_released(manager, start, run):
    run("pass")
    before = len(descriptors())
    ids = [start(FOREVER) for _ in range(5)]
    assert len(tree("self")) > 8 and len(descriptors()) > before + 10
    for id in ids:
        manager.stop(id)
    # What is left is what waits for the next one.
    eventually(lambda: len(tree("self")) <= 3)
    assert len(descriptors()) <= before + 5


@pytest.mark.parametrize("force", [False, True])
def test_note_file_locks_are_released(manager, start, tmp_path, force):
    id = start(
        "import fcntl, time\n"
        "file = open(params['path'], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('ready')\n"
        "time.sleep(600)",
        {"path": str(tmp_path / "lock")},
    )
    with open(tmp_path / "lock", "w") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        manager.stop(id, force=force)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
