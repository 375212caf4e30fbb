"""Calls of functions: what is offered, and how answers are read, at once and in pieces of any length."""

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamajax import RequestError
from llamajax.tools import ToolCall, ToolFormat, Tools, read_tools

from .test_constraints import BYTES, END, allowed, drawn

CHATML = ToolFormat(is_chatml=True, is_rendered=True)
LLAMA3 = ToolFormat(is_chatml=False, is_rendered=True)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
TOOLS = Tools([WEATHER, TIME])
PARIS = ToolCall("weather", '{"city": "Paris"}')
NOW = ToolCall("time", "{}")

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
READ = [
    (CHATML, "Hello < there", "Hello < there", []),
    (CHATML, CALL, "", [PARIS]),
    (CHATML, f"Let me see. \n{CALL}\n", "Let me see.", [PARIS]),
    (CHATML, f'{CALL}\n<tool_call>{{"name": "time", "arguments": {{}}}}</tool_call>', "", [PARIS, NOW]),
    (CHATML, '<tool_call>[{"name": "time"}, {"name": "time", "arguments": "{}"}]</tool_call>', "", [NOW, NOW]),
    (CHATML, CALL.removesuffix("\n</tool_call>"), "", [PARIS]),
    (CHATML, CALL[:40], CALL[:40], []),
    (CHATML, '<tool_call>{"name": "rm"}</tool_call> no', '<tool_call>{"name": "rm"}</tool_call> no', []),
    (CHATML, '<tool_call>{"name": "time", "arguments": 3}</tool_call>', None, []),
    (CHATML, "<tool_call>" + "[" * 9999, None, []),
    (CHATML, "text  ", "text  ", []),
    (LLAMA3, '{"name": "weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (LLAMA3, ' <|python_tag|>{"name": "time", "parameters": {}}; {"name": "time"}\n', "", [NOW, NOW]),
    (LLAMA3, '{"name": "rm", "parameters": {}}', None, []),
    (LLAMA3, '{"name": "time"} and more', None, []),
    (LLAMA3, '{"a": 1', None, []),
    (LLAMA3, 'Call {"name": "time"}', None, []),
    (LLAMA3, "  ", None, []),
]


def told_apart(parts: list[str | ToolCall]) -> tuple[str, list[ToolCall]]:
    """The text, and the calls."""
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [part for part in parts if isinstance(part, ToolCall)]


@pytest.mark.parametrize(("form", "text", "said", "calls"), READ)
def test_calls_are_read(form: ToolFormat, text: str, said: str | None, calls: list[ToolCall]) -> None:
    assert told_apart(form.read(text, TOOLS)) == (text if said is None else said, calls)


@given(st.sampled_from(READ), st.data())
def test_a_stream_reads_what_the_whole_answer_has(case: Any, data: Any) -> None:
    form, text, said, calls = case
    reader = form.reader(TOOLS)
    found = []
    while text_left := text[: data.draw(st.integers(1, 20))]:
        found += reader.push(text_left)
        text = text[len(text_left) :]
    assert told_apart(found + reader.flush()) == (case[1] if said is None else said, calls)


def test_text_and_calls_keep_their_order() -> None:
    parts = CHATML.read(f"One. {CALL} Two. {CALL}", TOOLS)
    assert list(filter(None, parts)) == ["One.", PARIS, " Two.", PARIS]


def test_one_call_at_a_time() -> None:
    alone = Tools([WEATHER, TIME], parallel=False)
    assert told_apart(CHATML.read(CALL + CALL, alone)) == ("", [PARIS])
    assert LLAMA3.read('{"name": "time"};{"name": "time"}', alone) == [NOW]


def test_what_may_be_called() -> None:
    assert read_tools(None) is read_tools([]) is read_tools([TIME], "none") is None
    assert read_tools([WEATHER, TIME]) == TOOLS
    assert CHATML.grammar(TOOLS) is None
    required = read_tools([WEATHER, TIME], "required", True)
    assert required and [it["name"] for it in required.must_call] == ["weather", "time"]
    named = read_tools([WEATHER, TIME], {"type": "function", "function": {"name": "time"}})
    assert named and [it["name"] for it in named.must_call] == ["time"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (([{"type": "function"}],), "each of tools must be of type function"),
        (("weather",), "tools must be a list"),
        (([{**TIME, "more": "a" * 10**6}],), "tools may have 1,000,000 characters, not 1,000,"),
        (([{**TIME, "more": TIME.keys()}],), "tools must be what JSON can express: .*dict_keys"),
        (([{"type": "function", "function": {"name": "a b"}}],), "a function's name has 1 to 64 letters"),
        (([{"type": "function", "function": {"name": "a", "parameters": []}}],), "parameters of a must be"),
        (([TIME, TIME],), "two of tools have the same name"),
        (([TIME], "maybe"), "tool_choice must be none, auto, required"),
        (([TIME], {"type": "function", "function": {"name": "rm"}}), "names 'rm', which is none of tools"),
        ((None, "required"), "tool_choice needs tools"),
        (([TIME], "auto", "yes"), "parallel_tool_calls must be true or false"),
    ],
)
def test_what_is_refused(given: tuple[Any, ...], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_tools(*given)


def test_the_form_is_the_templates() -> None:
    assert ToolFormat.of("{{ messages }}") == ToolFormat(is_chatml=True, is_rendered=False)
    assert ToolFormat.of("{% if tools %}<tool_call>{% endif %}") == CHATML
    assert ToolFormat.of('{% if tools is not none %}{"name": , "parameters": }') == LLAMA3


def test_a_format_that_json_schema_does_not_define_says_nothing() -> None:
    schema = {"properties": {"file": {"type": "string", "format": "path"}}, "required": ["file"]}
    function = {
        "type": "function",
        "function": {"name": "open", "parameters": schema | {"additionalProperties": False}},
    }
    grammar = LLAMA3.grammar(Tools([function], "required"))
    assert grammar
    compiled = BYTES.compile(grammar, frozenset({END}), min_tokens=0, ignores_end=False)
    matcher = compiled.matcher()
    for byte in b'{"name": "open", "parameters": {"file": "a/b"}}':
        assert byte in allowed(matcher)
        matcher.advance(byte)
    assert matcher.ended


@pytest.mark.parametrize("form", [CHATML, LLAMA3])
def test_what_must_be_a_call_is_read_as_one(form: ToolFormat) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
    functions = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": {**schema, "additionalProperties": False}}}
        for i in range(50)
    ]
    tools = read_tools(functions, "required", False)
    assert tools
    grammar = form.grammar(tools)
    assert grammar
    compiled = BYTES.compile(grammar, frozenset({END}), min_tokens=0, ignores_end=False)
    for seed in range(20):
        text = drawn(compiled.matcher(), np.random.default_rng(seed))
        assert text
        said, [call] = told_apart(form.read(text.decode(), tools))
        assert not said and re.fullmatch(r"f\d+", call.name) and json.loads(call.arguments)["n"] <= 99
