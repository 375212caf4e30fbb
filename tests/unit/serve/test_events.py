"""Answers as events, put together again."""

import json

from llamajax.serve.answers import Choice
from llamajax.serve.events import AnswerInfo, ResponseEvents, response_output
from llamajax.types import Completion, Timings


def test_what_is_said_beside_calls_is_a_message_of_its_own() -> None:
    info = AnswerInfo("resp_1", "model")
    calls = [
        {"id": f"call_1_0_{i}", "type": "function", "function": {"name": "greet", "arguments": "{}"}} for i in (0, 1)
    ]
    parts = [
        Choice("Well, ", [1], None, None),
        Choice("", [2], None, None, tool_calls=calls[:1]),
        Choice("now.", [3], None, "tool_calls", tool_calls=calls[1:]),
    ]
    events = ResponseEvents(info, {})
    sent = [*events.begin(), *(event for part in parts for event in events.piece(0, part))]
    sent += events.end([Completion("raw", (1, 2, 3), "stop", 1, 0, Timings(0, 0, ()))])
    read = [json.loads(event.partition(b"data: ")[2]) for event in sent]
    output = read[-1]["response"]["output"]
    assert output == response_output(info, Choice("Well, now.", [1, 2, 3], None, "tool_calls", tool_calls=calls))
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    ended = {event["output_index"]: event["item"] for event in read if event["type"] == "response.output_item.done"}
    assert [ended[index] for index in range(3)] == output
