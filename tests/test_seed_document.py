"""The examples of the document that the project was created from.

Its use cases and notes stand elsewhere:
- a timeout, clean-up and its handlers, a busy one, force, `stoppedAt`: test_stopping
- an unknown id, what has ended, a second stop, stopping all, memory: test_manager
- partial results: test_results; output until the stop: test_output
- several stops at once: test_concurrency; child processes, locks: test_no_survivors
- the structure of the response: test_responses; released resources: test_soak
"""

import concurrent.futures
import time

import pytest
from conftest import FOREVER, has_printed
from conftest import shared_manager as manager  # noqa: F401

import sidexec

SHARED = {"preload": ["asyncio"]}


def test_example_1_stop_a_running_execution(manager):
    id = manager.start_with_code(
        """
        import asyncio
        for i in range(100):
            print(f"Processing item {i}...")
            await asyncio.sleep(0.05)
        return {"completed": True}
        """
    ).id
    has_printed(manager, id, "Processing item 2...\n")

    result = manager.stop(id)

    assert (result.type, result.success) == ("stopSideExecutionResponse", True)
    assert (result.data.side_execution_id, result.data.status) == (id, "stopped")
    assert not result.data.forced
    assert result.data.output.startswith("Processing item 0...\nProcessing item 1...\n")
    assert "Processing item 99" not in result.data.output


def test_example_2_stop_multiple_executions(manager):
    code = 'import asyncio\nawait asyncio.sleep(30)\nreturn {"done": True}'
    ids = [manager.start_with_code(code).id for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        results = [result.data for result in pool.map(manager.stop, ids)]

    assert [(each.side_execution_id, each.status) for each in results] == [
        (id, "stopped") for id in ids
    ]
    assert manager.list_executions("running").data.count == 0


@pytest.mark.parametrize(
    "duration, limit, expected", [(60, 0.1, "stopped"), (0.05, 60, "completed")]
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

    code = f'import asyncio\nawait asyncio.sleep({duration})\nreturn {{"done": True}}'
    assert execute_with_timeout(manager.start_with_code(code).id, limit) == expected


def test_example_4_stop_with_cleanup(manager, start):
    id = start(
        """
        import asyncio
        try:
            print("ready")
            await asyncio.sleep(30)
            return {"success": True}
        finally:
            print("Cleaning up resources...")
        """
    )
    assert manager.stop(id).data.output == "ready\nCleaning up resources...\n"


@pytest.mark.parametrize(
    "module, nap", [("asyncio", "await asyncio.sleep(0.05)"), ("time", "time.sleep(0.05)")]
)
def test_example_5_stop_and_get_partial_results(manager, module, nap):
    id = manager.start_with_code(
        f"""
        import {module}
        results = []

        for i in range(100):
            results.append({{"index": i, "value": i * i}})
            print(f"Processed {{i + 1}}/100")
            {nap}

        return {{"results": results}}
        """
    ).id
    has_printed(manager, id, "Processed 3/100")

    data = manager.stop(id).data

    results = data.result["results"]
    assert data.status == "stopped" and 3 <= len(results) < 100
    assert results == [{"index": i, "value": i * i} for i in range(len(results))]
    lines = data.output.splitlines()
    assert lines == [f"Processed {i + 1}/100" for i in range(len(lines))]
    assert len(results) - len(lines) in (0, 1)
    assert manager.get_status(id).data.result == data.result


def test_example_6_batch_stop_with_error_handling(manager, start, run):
    def batch_stop(execution_ids):
        results = {"stopped": [], "failed": [], "alreadyStopped": []}
        for id in execution_ids:
            try:
                result = manager.stop(id).raise_for_error()
                stopped = result.data.status == "stopped"
                results["stopped" if stopped else "alreadyStopped"].append(id)
            except sidexec.SideExecutionError as error:
                results["failed"].append((id, error.response.data.status))
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
