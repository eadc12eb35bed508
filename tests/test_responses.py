"""The responses and their wire form."""

import copy
import dataclasses
import json
import logging
import pickle
import subprocess
import sys
import typing
from datetime import datetime, timedelta

import pytest
from conftest import ENVIRONMENT, begin, eventually

import sidexec
from sidexec import SideExecutionError
from sidexec.engine.waiting import Bell

FOREVER = "import time\nprint('ready')\ntime.sleep(600)"
ENVELOPE = ["type", "data", "success", "message", "error", "messageId", "threadId"]
START = ["sideExecutionId", "status", "startTime", "params", "timeout"]
STATUS = [
    "sideExecutionId", "status", "startTime", "endTime", "duration", "result", "output", "error",
    "progress", "memoryUsage", "cpuUsage", "peakMemory", "cpuTime", "errorOutput", "exitCode", "stopReason", "outputDropped",
]  # fmt: skip
STOP = [
    "sideExecutionId", "status", "stoppedAt", "result", "output",
    "errorOutput", "exitCode", "forced", "stopReason", "outputDropped",
]  # fmt: skip
SUMMARY = ["sideExecutionId", "status", "startTime", "endTime", "stopReason", "actionBlock"]
BLOCK = [
    "name", "path", "description", "version", "author", "dependencies", "createdAt", "updatedAt"
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("responses")


@pytest.fixture(scope="module")
def responses(directory):
    """One response of each kind and outcome, by name."""
    with sidexec.ExecutionManager(env=ENVIRONMENT, default_timeout=60.0) as manager:
        return made_by(manager, directory)


def made_by(manager, tmp_path):
    (tmp_path / "blocks" / "one").mkdir(parents=True)
    (tmp_path / "blocks" / "one" / "__main__.py").write_text("'''Does it.'''\n__version__ = '2'")
    block = str(tmp_path / "blocks" / "one")
    made = {
        "start": manager.start_with_code("pass", {"a": [1]}, 2.5, thread_id="t"),
        "start block": manager.start_with_action_block(block),
        "not started": manager.start_with_action_block(str(tmp_path / "nowhere")),
    }
    code = "report_progress(50)\nreport_result({'n': 1})\n" + FOREVER
    id = begin(manager, code, thread_id="t")
    made["running"] = manager.get_status(id)
    made["stopped"] = manager.stop(id)
    made["already stopped"] = manager.stop(id)
    made["status of a stopped one"] = manager.wait(id)
    made["completed"] = manager.run("print('x')\nreturn [None, 1.5]")
    made["failed"] = manager.run("1 / 0")
    made["stop of a completed one"] = manager.stop(made["completed"].data.side_execution_id)
    made["no status"] = manager.get_status("nobody")
    made["no stop"] = manager.stop("nobody")
    made["executions"] = manager.list_executions()
    made["no executions"] = manager.list_executions("running")
    made["blocks"] = manager.list_action_blocks(tmp_path / "blocks")
    made["no blocks"] = manager.list_action_blocks(tmp_path / "nowhere")
    return made


def is_time(text):
    """Whether it is an ISO 8601 time, in UTC."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).utcoffset() == timedelta(0)


def test_types_and_envelopes(responses):
    types = {
        "start": "startSideExecutionResponse",
        "start block": "startSideExecutionResponse",
        "not started": "startSideExecutionResponse",
        "running": "getSideExecutionStatusResponse",
        "stopped": "stopSideExecutionResponse",
        "already stopped": "stopSideExecutionResponse",
        "status of a stopped one": "getSideExecutionStatusResponse",
        "completed": "getSideExecutionStatusResponse",
        "failed": "getSideExecutionStatusResponse",
        "stop of a completed one": "stopSideExecutionResponse",
        "no status": "getSideExecutionStatusResponse",
        "no stop": "stopSideExecutionResponse",
        "executions": "listSideExecutionsResponse",
        "no executions": "listSideExecutionsResponse",
        "blocks": "listActionBlocksResponse",
        "no blocks": "listActionBlocksResponse",
    }
    assert {name: response.type for name, response in responses.items()} == types
    assert {name: each.to_dict()["type"] for name, each in responses.items()} == types
    for name, response in responses.items():
        wire = response.to_dict()
        assert list(wire) == ENVELOPE, name
        assert isinstance(wire["success"], bool)
        assert wire["success"] is response.success
        assert wire["messageId"] == response.message_id
        assert wire["threadId"] == response.thread_id
        assert wire["message"] == response.message
        assert wire["error"] == response.error
        assert response.success == (response.error is None)


def test_classes_are_the_public_ones(responses):
    classes = {
        sidexec.StartSideExecutionResponse,
        sidexec.GetSideExecutionStatusResponse,
        sidexec.StopSideExecutionResponse,
        sidexec.ListSideExecutionsResponse,
        sidexec.ListActionBlocksResponse,
    }
    assert {type(each) for each in responses.values()} == classes
    assert isinstance(responses["executions"].data.executions[0], sidexec.ExecutionSummary)
    assert isinstance(responses["blocks"].data.action_blocks[0], sidexec.ActionBlock)


def test_keys_of_start(responses):
    data = responses["start"].to_dict()["data"]
    assert sorted(data) == sorted([*START, "code"])
    assert data["code"] == "pass"
    assert data["params"] == {"a": [1]}
    assert (data["timeout"], type(data["timeout"])) == (2500, int)
    assert data["status"] == "running"
    assert is_time(data["startTime"])

    data = responses["start block"].to_dict()["data"]
    assert sorted(data) == sorted([*START, "actionBlock"])
    assert data["actionBlock"].endswith("one")
    assert data["timeout"] == 60000

    data = responses["not started"].to_dict()["data"]
    assert sorted(data) == sorted([*START, "actionBlock"])
    assert data["sideExecutionId"] is None
    assert data["startTime"] is None
    assert data["status"] == "failed"


def test_a_start_is_running_however_soon_it_ended(manager, monkeypatch):
    wait_for = Bell.wait_for

    def wait_longer(bell, condition, timeout=None):
        assert wait_for(bell, condition, timeout)
        return eventually(lambda: manager.list_executions("completed").data.count == 1)

    monkeypatch.setattr(Bell, "wait_for", wait_longer)
    assert manager.start_with_code("pass").raise_for_error().data.status == "running"


def test_a_start_without_a_timeout_has_null(manager):
    for timeout in (None, float("inf")):
        response = manager.start_with_code("pass", timeout=timeout)
        assert json.loads(response.to_json())["data"]["timeout"] is None


def test_keys_of_status(responses):
    for name in ("running", "completed", "failed", "status of a stopped one", "no status"):
        assert sorted(responses[name].to_dict()["data"]) == sorted(STATUS), name

    data = responses["running"].to_dict()["data"]
    assert (data["status"], data["progress"], data["result"]) == ("running", 50, {"n": 1})
    assert type(data["duration"]) is int and 0 <= data["duration"] < 60_000
    assert type(data["memoryUsage"]) is int
    assert isinstance(data["cpuUsage"], float)
    for name in ("endTime", "error", "exitCode", "stopReason", "peakMemory", "cpuTime"):
        assert data[name] is None
    assert data["outputDropped"] == 0

    response = responses["completed"]
    data = response.to_dict()["data"]
    assert (data["result"], data["output"], data["errorOutput"]) == ([None, 1.5], "x\n", "")
    assert (data["exitCode"], data["error"], data["stopReason"]) == (0, None, None)
    assert data["duration"] == round(response.data.duration * 1000)
    assert is_time(data["startTime"]) and is_time(data["endTime"])
    assert (data["memoryUsage"], data["cpuUsage"], data["progress"]) == (None, None, None)
    assert type(data["peakMemory"]) is int
    assert data["cpuTime"] == round(response.data.cpu_time * 1000)

    data = responses["failed"].to_dict()["data"]
    assert data["error"].startswith("ZeroDivisionError: ")
    assert data["exitCode"] == 1
    assert data["result"] is None
    assert responses["failed"].success

    data = responses["status of a stopped one"].to_dict()["data"]
    assert (data["status"], data["stopReason"], data["error"]) == ("stopped", "requested", None)

    data = responses["no status"].to_dict()["data"]
    assert (data["sideExecutionId"], data["status"]) == ("nobody", "not_found")


def test_keys_of_stop(responses):
    for name in ("stopped", "already stopped", "stop of a completed one", "no stop"):
        assert sorted(responses[name].to_dict()["data"]) == sorted(STOP), name
    data = responses["stopped"].to_dict()["data"]
    assert (data["status"], data["stopReason"], data["forced"]) == ("stopped", "requested", False)
    assert (data["result"], data["output"], data["errorOutput"]) == ({"n": 1}, "ready\n", "")
    assert type(data["exitCode"]) is int
    assert is_time(data["stoppedAt"])
    assert {**responses["already stopped"].to_dict()["data"], "status": "stopped"} == data
    assert responses["stop of a completed one"].to_dict()["data"]["stoppedAt"] is None
    assert responses["no stop"].to_dict()["data"]["stoppedAt"] is None


def test_keys_of_a_list_of_executions(responses):
    data = responses["executions"].to_dict()["data"]
    assert sorted(data) == ["count", "executions"]
    assert data["count"] == len(data["executions"]) == 5
    for each in data["executions"]:
        assert sorted(each) == sorted(SUMMARY)
        assert is_time(each["startTime"])
    assert data["executions"][1]["actionBlock"].endswith("one")
    assert data["executions"][2]["stopReason"] == "requested"
    empty = responses["no executions"].to_dict()["data"]
    assert empty == {"executions": [], "count": 0}


def test_keys_of_a_list_of_action_blocks(responses, directory):
    data = responses["blocks"].to_dict()["data"]
    assert sorted(data) == ["actionBlocks", "count", "searchPath"]
    assert data["searchPath"] == str(directory / "blocks")
    (block,) = data["actionBlocks"]
    assert sorted(block) == sorted(BLOCK)
    assert (block["description"], block["version"], block["author"]) == ("Does it.", "2", None)
    assert block["dependencies"] == []
    assert is_time(block["createdAt"]) and is_time(block["updatedAt"])
    data = responses["no blocks"].to_dict()["data"]
    assert (data["actionBlocks"], data["count"]) == ([], 0)


def test_to_json_is_to_dict_as_json(responses):
    for response in responses.values():
        assert isinstance(response.to_json(), str)
        assert json.loads(response.to_json()) == response.to_dict()


def test_odd_text_goes_through_json(run, manager):
    data = run("import os\nos.write(1, b'\\xff\\0\\xf0\\x9f\\x98\\x80')\nreturn '\\ud800'")
    assert data.output == "\ufffd\0\U0001f600"
    assert data.result == "\ud800"
    response = manager.get_status(data.side_execution_id)
    assert json.loads(response.to_json())["data"]["result"] == "\ud800"
    response.to_json().encode()


def test_responses_can_be_pickled(responses):
    for response in responses.values():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            again = pickle.loads(pickle.dumps(response, protocol))
            assert type(again) is type(response)
            assert again == response
            assert again.to_dict() == response.to_dict()


def test_a_pickled_response_starts_nothing_where_it_is_read(responses):
    code = """
import pickle, sys, threading
for response in pickle.load(sys.stdin.buffer):
    print(response.data.status)
assert threading.active_count() == 1
"""
    data = pickle.dumps([responses["stopped"], responses["running"]])
    environment = {"PYTHONPATH": sidexec.__file__.rpartition("/sidexec/")[0]}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=data,
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
    )
    assert done.stdout.split() == [b"stopped", b"running"]


def test_responses_can_be_copied(responses):
    for response in responses.values():
        assert copy.copy(response) == response
        assert copy.deepcopy(response) == response
        assert dataclasses.replace(response, message="other").message == "other"


def test_responses_are_frozen(responses):
    for response in responses.values():
        assert dataclasses.is_dataclass(response) and dataclasses.is_dataclass(response.data)
        for each in (response, response.data):
            for field in dataclasses.fields(each):
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(each, field.name, None)
                with pytest.raises(dataclasses.FrozenInstanceError):
                    delattr(each, field.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        responses["executions"].data.executions[0].status = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        responses["blocks"].data.action_blocks[0].name = "other"


def test_times_are_aware_and_in_utc(responses):
    times = [
        responses["start"].data.start_time,
        responses["completed"].data.start_time,
        responses["completed"].data.end_time,
        responses["stopped"].data.stopped_at,
        responses["executions"].data.executions[0].start_time,
        responses["blocks"].data.action_blocks[0].created_at,
        responses["blocks"].data.action_blocks[0].updated_at,
    ]
    assert {each.utcoffset() for each in times} == {timedelta(0)}
    assert isinstance(responses["completed"].data.duration, float)


def test_raise_for_error(responses):
    failures = {name for name, response in responses.items() if not response.success}
    assert failures == {
        "not started", "stop of a completed one", "no status", "no stop", "no blocks"
    }  # fmt: skip
    for name, response in responses.items():
        if name in failures:
            with pytest.raises(SideExecutionError) as caught:
                response.raise_for_error()
            assert caught.value.response is response
            assert str(caught.value) == response.error
        else:
            assert response.raise_for_error() is response


def test_the_error_can_be_pickled(responses):
    with pytest.raises(SideExecutionError) as caught:
        responses["no stop"].raise_for_error()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(caught.value, protocol))
        assert type(again) is SideExecutionError
        assert again.response == responses["no stop"]
        assert str(again) == str(caught.value)


@pytest.mark.parametrize("name", ["no status", "no stop", "not started", "no blocks"])
def test_the_error_can_be_rebuilt_from_text(responses, name):
    """As task queues do, whose results are JSON."""
    with pytest.raises(SideExecutionError) as caught:
        responses[name].raise_for_error()
    again = type(caught.value)(*map(str, caught.value.args))
    assert str(again) == str(caught.value) == responses[name].error
    assert again.response.error == responses[name].error
    assert not again.response.success
    for copied in (copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))):
        assert copied(caught.value).response == responses[name]
        assert str(copied(again)) == str(again)
        assert copied(again).response == again.response


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


class WaitForTheEnd(logging.Handler):
    """Holds up whoever logs that an execution is started, until it has ended."""

    def __init__(self, manager):
        super().__init__()
        self.manager = manager

    def emit(self, record):
        if "is started" in record.getMessage():
            eventually(lambda: not self.manager.list_executions("running").data.count)


def test_a_start_says_running_however_soon_it_ended(manager, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("sidexec"), "handlers", [WaitForTheEnd(manager)])
    caplog.set_level(logging.DEBUG, "sidexec")
    started = manager.start_with_code("pass")
    assert manager.get_status(started.id).data.status == "completed"
    assert started.data.status == "running"


def test_statuses_are_literals():
    ends = {"completed", "failed"}
    for of, name, values in [
        (sidexec.StartData, "status", {"running", "failed"}),
        (sidexec.StatusData, "status", {"running", "stopped", "not_found", *ends}),
        (
            sidexec.StopData,
            "status",
            {"running", "stopped", "already_stopped", "not_found", *ends},
        ),
        (sidexec.ExecutionSummary, "status", {"running", "stopped", *ends}),
        (sidexec.StatusData, "stop_reason", {"requested", "timeout", "closed"}),
        (sidexec.StopData, "stop_reason", {"requested", "timeout", "closed"}),
        (sidexec.ExecutionSummary, "stop_reason", {"requested", "timeout", "closed"}),
        (sidexec.OutputChunk, "stream", {"stdout", "stderr"}),
    ]:
        hint = of.__annotations__[name].replace(" | None", "")
        found = typing.get_args(eval(hint, vars(sys.modules[of.__module__])))
        assert set(found) == values, (of, name)


def test_a_repr_is_short_and_tells_what_it_is(manager, run, responses):
    for response in responses.values():
        assert repr(response).startswith(type(response).__name__ + "(")
        assert len(repr(response)) < 2000
    assert "not_found" in repr(responses["no status"])
    assert responses["completed"].data.side_execution_id in repr(responses["completed"])

    code = (
        "import sys\nprint('o' * 10**6)\nprint('e' * 10**6, file=sys.stderr)\n"
        "return ['r' * 10**6, {str(n): n for n in range(10000)}]" + "\n#" + "c" * 10**6
    )
    started = manager.start_with_code(code, {"p": "p" * 10**6})
    assert len(repr(started)) < 2000
    id = started.data.side_execution_id
    assert len(manager.wait(id).data.output) == 10**6 + 1
    assert len(repr(manager.get_status(id))) < 2000
    assert len(repr(manager.stop(id))) < 2000
    failed = run("raise ValueError('v' * 10**6)")
    assert len(failed.error) > 10**6
    assert len(repr(manager.get_status(failed.side_execution_id))) < 2000


def test_a_repr_of_many_entries_is_short(manager, tmp_path):
    for n in range(150):
        (tmp_path / f"block{n}").mkdir()
        (tmp_path / f"block{n}" / "__main__.py").touch()
    assert manager.list_action_blocks(tmp_path).data.count == 150
    assert len(repr(manager.list_action_blocks(tmp_path))) < 2000


def test_a_chunk_of_output_is_a_value():
    chunk = sidexec.OutputChunk("stdout", "text")
    assert chunk == sidexec.OutputChunk("stdout", "text") != sidexec.OutputChunk("stderr", "text")
    assert pickle.loads(pickle.dumps(chunk)) == chunk
    with pytest.raises(dataclasses.FrozenInstanceError):
        chunk.text = "other"
