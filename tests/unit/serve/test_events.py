"""Answers as events, put together again."""

import json

import pytest

from llamajax.serve.answers import Choice
from llamajax.serve.events import AnswerInfo, ResponseEvents, response_output
from llamajax.types import Completion, Timings


def test_what_is_said_beside_calls_is_a_message_of_its_own() -> None:
    info = AnswerInfo("resp_1", "model")
    calls = [
        {"id": f"call_1_0_{i}", "type": "function", "function": {"name": "greet", "arguments": "{}"}} for i in (0, 1)
    ]
    parts = [
        Choice(["Well", ", "], [1], None, None),
        Choice([calls[0], "now"], [2], None, None),
        Choice([".", calls[1]], [3], None, "tool_calls"),
    ]
    events = ResponseEvents(info, {})
    sent = [*events.begin(), *(event for part in parts for event in events.piece(0, part))]
    sent += events.end([Completion("raw", (1, 2, 3), "stop", 1, 0, Timings(0, 0, ()))])
    read = [json.loads(event.partition(b"data: ")[2]) for event in sent]
    output = read[-1]["response"]["output"]
    whole = Choice([*parts[0].parts, *parts[1].parts, *parts[2].parts], [1, 2, 3], None, "tool_calls")
    assert output == response_output(info, whole)
    texts = [item["content"][0]["text"] if item["type"] == "message" else item["call_id"] for item in output]
    assert texts == ["Well, ", "call_1_0_0", "now.", "call_1_0_1"]
    assert len({item["id"] for item in output}) == 4
    begun = [event["output_index"] for event in read if event["type"] == "response.output_item.added"]
    items = [event for event in read if event["type"] == "response.output_item.done"]
    assert begun == [event["output_index"] for event in items] == [0, 1, 2, 3]
    assert [event["item"] for event in items] == output
    kinds = [event["type"].removeprefix("response.") for event in read if "output_item" in event["type"]]
    assert kinds == ["output_item.added", "output_item.done"] * 4


@pytest.mark.parametrize("said", [[], ["", "cut"]])
def test_a_message_that_was_cut_is_incomplete(said: list[str]) -> None:
    info = AnswerInfo("resp_1", "model")
    events, choice = ResponseEvents(info, {}), Choice(said, [1], None, "length")
    sent = [*events.piece(0, choice), *events.end([Completion("", (1,), "length", 1, 0, Timings(0, 0, ()))])]
    [message] = response_output(info, choice)
    assert message == json.loads(sent[-1].partition(b"data: ")[2])["response"]["output"][0]
    assert (message["status"], message["content"][0]["text"]) == ("incomplete", "".join(said))
