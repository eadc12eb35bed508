"""The responses and their wire form."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import typing
from datetime import datetime, timedelta

import pytest
from conftest import ENVIRONMENT, FOREVER, begin, eventually

import sidexec
from sidexec import SideExecutionError
from sidexec.engine.waiting import Bell

ENVELOPE = ["type", "data", "success", "message", "error", "messageId", "threadId"]
SUMMARY = "sideExecutionId status startTime endTime stopReason actionBlock"
BLOCK = "name path description version author dependencies createdAt updatedAt"
# The keys of the data, and which of the responses below have them.
KINDS = [
    (
        sidexec.StartSideExecutionResponse,
        "sideExecutionId code status startTime params timeout",
        ["start"],
    ),
    (
        sidexec.StartSideExecutionResponse,
        "sideExecutionId actionBlock status startTime params timeout",
        ["start block", "not started"],
    ),
    (
        sidexec.GetSideExecutionStatusResponse,
        "sideExecutionId status startTime endTime duration result output error progress memoryUsage"
        " cpuUsage peakMemory cpuTime errorOutput exitCode stopReason outputDropped",
        ["running", "status of a stopped one", "completed", "failed", "no status"],
    ),
    (
        sidexec.StopSideExecutionResponse,
        "sideExecutionId status stoppedAt result output errorOutput exitCode forced stopReason"
        " outputDropped",
        ["stopped", "already stopped", "already killed", "stop of a completed one", "no stop"],
    ),
    (sidexec.ListSideExecutionsResponse, "executions count", ["executions", "no executions"]),
    (
        sidexec.ListActionBlocksResponse,
        "actionBlocks count searchPath",
        ["blocks", "no blocks"],
    ),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("responses")
    (directory / "blocks" / "one").mkdir(parents=True)
    (directory / "blocks" / "one" / "__main__.py").write_text("'Does it.'\n__version__ = '2'")
    return directory


@pytest.fixture(scope="module")
def responses(directory):
    """One response of each kind and outcome, by name."""
    with sidexec.ExecutionManager(env=ENVIRONMENT, default_timeout=60.0) as manager:
        return made_by(manager, directory / "blocks", directory / "nowhere")


def made_by(manager, blocks, nowhere):
    made = {
        "start": manager.start_with_code("pass", {"a": [1]}, 2.5, thread_id="t"),
        "start block": manager.start_with_action_block(blocks / "one"),
        "not started": manager.start_with_action_block(nowhere),
    }
    code = "report_progress(50)\nreport_result({'n': 1})\n" + FOREVER
    id = begin(manager, code, thread_id="t")
    made["running"] = manager.get_status(id)
    made["stopped"] = manager.stop(id)
    made["already stopped"] = manager.stop(id)
    made["already killed"] = manager.stop(id, force=True)
    made["status of a stopped one"] = manager.wait(id)
    made["completed"] = manager.run("print('x')\nreturn [None, 1.5]")
    made["failed"] = manager.run("1 / 0")
    made["stop of a completed one"] = manager.stop(made["completed"].data.side_execution_id)
    made["no status"] = manager.get_status("nobody")
    made["no stop"] = manager.stop("nobody")
    made["executions"] = manager.list_executions()
    made["no executions"] = manager.list_executions("running")
    made["blocks"] = manager.list_action_blocks(blocks)
    made["no blocks"] = manager.list_action_blocks(nowhere)
    return made


def is_time(text):
    """Whether it is an ISO 8601 time, in UTC."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).utcoffset() == timedelta(0)


def has(data, **expected):
    """Check some of the items of a wire form."""
    assert {name: data[name] for name in expected} == expected


@pytest.mark.parametrize("kind, keys, names", KINDS)
def test_types_and_keys(responses, kind, keys, names):
    for name in names:
        response, wire = responses[name], responses[name].to_dict()
        assert type(response) is kind and list(wire) == ENVELOPE
        assert sorted(wire.pop("data")) == sorted(keys.split())
        assert wire == {
            "type": kind.__name__[0].lower() + kind.__name__[1:],
            "success": response.error is None,
            "message": response.message,
            "error": response.error,
            "messageId": response.message_id,
            "threadId": response.thread_id,
        }


def test_the_wire_form_of_a_start(responses):
    data = responses["start"].to_dict()["data"]
    has(data, code="pass", params={"a": [1]}, timeout=2500, status="running")
    assert type(data["timeout"]) is int and is_time(data["startTime"])
    data = responses["start block"].to_dict()["data"]
    assert data["actionBlock"].endswith("one") and data["timeout"] == 60000
    data = responses["not started"].to_dict()["data"]
    has(data, sideExecutionId=None, startTime=None, status="failed")


def test_a_start_is_running_however_soon_it_ended(manager, monkeypatch):
    wait_for = Bell.wait_for

    def wait_longer(bell, condition, timeout=None):
        assert wait_for(bell, condition, timeout)
        return eventually(lambda: manager.list_executions("completed").data.count == 1)

    monkeypatch.setattr(Bell, "wait_for", wait_longer)
    assert manager.start_with_code("pass").raise_for_error().data.status == "running"


def test_a_start_without_a_timeout_has_null(manager):
    assert manager.start_with_code("pass", timeout=1e306).to_dict()["data"]["timeout"] > 1e308
    for timeout in (None, float("inf")):
        response = manager.start_with_code("pass", timeout=timeout)
        assert json.loads(response.to_json())["data"]["timeout"] is None


def test_the_wire_form_of_a_status(responses):
    data = responses["running"].to_dict()["data"]
    has(data, status="running", progress=50, result={"n": 1}, endTime=None)
    has(data, output="ready\n", outputDropped=0)
    has(data, error=None, exitCode=None, stopReason=None, peakMemory=None, cpuTime=None)
    assert (type(data["memoryUsage"]), type(data["cpuUsage"])) == (int, float)
    assert type(data["duration"]) is int and 0 <= data["duration"] < 60_000

    response = responses["completed"]
    data = response.to_dict()["data"]
    has(data, result=[None, 1.5], output="x\n", errorOutput="", exitCode=0, error=None)
    has(data, stopReason=None, memoryUsage=None, cpuUsage=None, progress=None)
    assert type(response.data.duration) is float
    took = (response.data.end_time - response.data.start_time).total_seconds()
    assert abs(took - response.data.duration) < 1 and response.data.duration > 0
    has(data, duration=round(response.data.duration * 1000))
    has(data, cpuTime=round(response.data.cpu_time * 1000))
    assert is_time(data["startTime"]) and is_time(data["endTime"])
    assert type(data["peakMemory"]) is int

    data = responses["failed"].to_dict()["data"]
    has(data, status="failed", exitCode=1, result=None)
    assert data["error"].startswith("ZeroDivisionError: ") and responses["failed"].success
    data = responses["status of a stopped one"].to_dict()["data"]
    has(data, status="stopped", stopReason="requested", error=None)
    data = responses["no status"].to_dict()["data"]
    has(data, sideExecutionId="nobody", status="not_found")


def test_the_wire_form_of_a_stop(responses):
    data = responses["stopped"].to_dict()["data"]
    has(data, status="stopped", stopReason="requested", forced=False)
    has(data, result={"n": 1}, output="ready\n", errorOutput="")
    assert type(data["exitCode"]) is int and is_time(data["stoppedAt"])
    for name in ("already stopped", "already killed"):
        again = responses[name].to_dict()["data"]
        assert again["status"] == "already_stopped" and {**again, "status": "stopped"} == data
    for name in ("stop of a completed one", "no stop"):
        assert responses[name].to_dict()["data"]["stoppedAt"] is None


def test_the_wire_form_of_a_list_of_executions(responses):
    assert type(responses["executions"].data.executions[0]) is sidexec.ExecutionSummary
    data = responses["executions"].to_dict()["data"]
    assert data["count"] == len(data["executions"]) == 5
    for each in data["executions"]:
        assert sorted(each) == sorted(SUMMARY.split()) and is_time(each["startTime"])
    assert data["executions"][1]["actionBlock"].endswith("one")
    assert data["executions"][2]["stopReason"] == "requested"
    assert responses["no executions"].to_dict()["data"] == {"executions": [], "count": 0}


def test_the_wire_form_of_a_list_of_action_blocks(responses, directory):
    assert type(responses["blocks"].data.action_blocks[0]) is sidexec.ActionBlock
    data = responses["blocks"].to_dict()["data"]
    (block,) = data["actionBlocks"]
    has(data, searchPath=str(directory / "blocks"), count=1)
    assert sorted(block) == sorted(BLOCK.split())
    has(block, description="Does it.", version="2", author=None, dependencies=[])
    assert is_time(block["createdAt"]) and is_time(block["updatedAt"])
    has(responses["no blocks"].to_dict()["data"], actionBlocks=[], count=0)


def test_to_json_is_to_dict_as_json(responses):
    for response in responses.values():
        assert isinstance(response.to_json(), str)
        assert json.loads(response.to_json()) == response.to_dict()


def test_odd_text_goes_through_json(run, manager):
    data = run("import os\nos.write(1, b'\\xff\\0\\xf0\\x9f\\x98\\x80')\nreturn 'ü\\ud800'")
    assert (data.output, data.result) == ("\ufffd\0\U0001f600", "ü\ud800")
    text = manager.get_status(data.side_execution_id).to_json()
    has(json.loads(text.encode())["data"], result="ü\ud800", output=data.output)


def test_responses_can_be_pickled_and_copied(responses):
    for response in responses.values():
        copies = [copy.copy(response), copy.deepcopy(response)]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            copies.append(pickle.loads(pickle.dumps(response, protocol)))
        for again in copies:
            assert (type(again), again) == (type(response), response)
            assert again.to_dict() == response.to_dict()
        assert dataclasses.replace(response, message="other").message == "other"


def test_a_pickled_response_starts_nothing_where_it_is_read(responses):
    code = """
import os, pickle, sys
for response in pickle.load(sys.stdin.buffer):
    print(response.data.status)
assert len(os.listdir("/proc/self/task")) == 1
"""
    data = pickle.dumps([responses["stopped"], responses["running"]])
    environment = {"PYTHONPATH": sidexec.__file__.rpartition("/sidexec/")[0]}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, input=data, env=environment) == b"stopped\nrunning\n"


def test_responses_are_frozen(responses):
    values = [*responses.values(), *(each.data for each in responses.values())]
    values += responses["executions"].data.executions + responses["blocks"].data.action_blocks
    for each in (*values, sidexec.OutputChunk("stdout", "text")):
        for field in dataclasses.fields(each):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(each, field.name, None)
            with pytest.raises(dataclasses.FrozenInstanceError):
                delattr(each, field.name)


FAILURES = ["not started", "stop of a completed one", "no status", "no stop", "no blocks"]


def test_raise_for_error_returns_what_succeeded(responses):
    for name, response in responses.items():
        assert response.success is (name not in FAILURES)
        assert not response.success or response.raise_for_error() is response


@pytest.mark.parametrize("name", FAILURES)
def test_the_error_can_be_pickled_and_rebuilt_from_text(responses, name):
    """The latter as task queues do, whose results are JSON."""
    response = responses[name]
    with pytest.raises(SideExecutionError) as caught:
        response.raise_for_error()
    error = caught.value
    assert error.response is response and str(error) == response.error
    again = SideExecutionError(*map(str, error.args))
    assert str(again) == again.response.error == response.error and not again.response.success
    copiers = [copy.copy, copy.deepcopy]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        copiers.append(lambda error, p=protocol: pickle.loads(pickle.dumps(error, p)))
    for copier in copiers:
        for each in map(copier, (error, again)):
            assert (type(each), str(each)) == (SideExecutionError, response.error)
        assert copier(error).response == response and copier(again).response == again.response


def test_check(manager, responses):
    assert responses["completed"].check() is responses["completed"]
    deadline = manager.wait(manager.start_with_code(FOREVER, timeout=0.1).id)
    for response, text in [
        (responses["failed"], responses["failed"].data.error),
        (responses["running"], "the execution is running"),
        (responses["status of a stopped one"], "the execution is stopped (requested)"),
        (deadline, "the execution is stopped (timeout)"),
        (responses["no status"], responses["no status"].error),
    ]:
        with pytest.raises(SideExecutionError) as caught:
            response.check()
        assert caught.value.response is response
        assert str(caught.value) == text
        assert str(SideExecutionError(*map(str, caught.value.args))) == text


def test_the_id_of_a_start(responses):
    assert responses["start"].id == responses["start"].data.side_execution_id
    with pytest.raises(SideExecutionError) as caught:
        str(responses["not started"].id)
    assert caught.value.response is responses["not started"]


STATUSES = {"running", "completed", "failed", "stopped"}
REASONS = {"requested", "timeout", "closed"}


@pytest.mark.parametrize(
    "of, name, values",
    [
        (sidexec.StartData, "status", {"running", "failed"}),
        (sidexec.StatusData, "status", {*STATUSES, "not_found"}),
        (sidexec.StopData, "status", {*STATUSES, "not_found", "already_stopped"}),
        (sidexec.ExecutionSummary, "status", STATUSES),
        (sidexec.StatusData, "stop_reason", REASONS),
        (sidexec.StopData, "stop_reason", REASONS),
        (sidexec.ExecutionSummary, "stop_reason", REASONS),
        (sidexec.OutputChunk, "stream", {"stdout", "stderr"}),
    ],
)
def test_statuses_are_literals(of, name, values):
    hint = of.__annotations__[name].replace(" | None", "")
    assert set(typing.get_args(eval(hint, vars(sys.modules[of.__module__])))) == values


def test_a_repr_is_short_and_tells_what_it_is(manager, run, responses, tmp_path):
    for response in responses.values():
        assert repr(response).startswith(type(response).__name__ + "(")
    assert "not_found" in repr(responses["no status"])
    assert responses["completed"].data.side_execution_id in repr(responses["completed"])

    code = (
        "import sys\nprint('o' * 10**6)\nprint('e' * 10**6, file=sys.stderr)\n"
        "return ['r' * 10**6, {str(n): n for n in range(10000)}]" + "\n#" + "c" * 10**6
    )
    started = manager.start_with_code(code, {"p": "p" * 10**6})
    assert len(manager.wait(started.id).data.output) == 10**6 + 1
    failed = run("raise ValueError('v' * 10**6)")
    assert len(failed.error) > 10**6
    for n in range(150):
        (tmp_path / f"block{n}").mkdir()
        (tmp_path / f"block{n}" / "__main__.py").touch()
    blocks = manager.list_action_blocks(tmp_path)
    assert blocks.data.count == 150
    large = [manager.get_status(failed.side_execution_id), manager.get_status(started.id)]
    for response in (*responses.values(), started, *large, manager.stop(started.id), blocks):
        assert len(repr(response)) < 2000


def test_a_chunk_of_output_is_a_value():
    chunk = sidexec.OutputChunk("stdout", "text")
    assert chunk == sidexec.OutputChunk("stdout", "text") != sidexec.OutputChunk("stderr", "text")
    assert pickle.loads(pickle.dumps(chunk)) == chunk
