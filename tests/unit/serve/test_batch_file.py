"""Lines of a batch: what they ask for, what is wrong with them, and the lines that answer them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamajax.errors import CheckpointError, PromptTooLongError, RequestError
from llamajax.serve.batch_file import (
    Asked,
    Defaults,
    Source,
    as_line,
    line_seed,
    read_request,
    read_source,
    read_text,
)
from llamajax.serve.json_object import read_object
from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tools import ToolFormat
from llamajax.types import Completion, Timings
from llamajax.weights.gguf import read_gguf

DEFAULTS = Defaults({"temperature": 0.6, "stop": [], "seed": 42})
ASKED = [{"role": "user", "content": "Hi"}]


def chat_line(**body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": ASKED, **body}}


def completion_line(**body: Any) -> dict[str, Any]:
    return {"url": "/v1/completions", "body": {"prompt": "Hi", **body}}


def asked(fields: dict[str, Any], defaults: Defaults = DEFAULTS, number: int = 1) -> Asked:
    return read_request(number, fields, defaults)


def prompt(fields: dict[str, Any], defaults: Defaults = DEFAULTS) -> Any:
    return asked(fields, defaults).prompt


def options(fields: dict[str, Any]) -> dict[str, Any]:
    """What a line says of its options, beside what holds for all of its endpoint."""
    [found] = asked(fields, Defaults({})).choices
    plain = {"max_new_tokens": {"/v1/chat/completions": None, "/v1/completions": 16}.get(fields.get("url", ""), 50)}
    return {k: v for k, v in found.items() if k != "seed" and plain.get(k, ...) != v}


def test_a_prompt_is_a_message_of_a_user_unless_it_is_raw() -> None:
    assert prompt({"prompt": "Hi"}) == ASKED
    assert prompt({"prompt": "Hi"}, Defaults({}, raw=True)) == "Hi"
    assert prompt({"prompt": " "}, Defaults({}, raw=True)) == " "
    with pytest.raises(RequestError, match="the prompt is empty"):
        asked({"prompt": " "})


def test_a_system_message_of_the_line_comes_before_the_commands() -> None:
    brief, kind = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}
    said = Defaults({}, system="Be brief.")
    assert prompt({"prompt": "Hi"}, said) == [brief, *ASKED]
    assert prompt({"messages": ASKED}, said) == [brief, *ASKED]
    assert prompt({"messages": [kind, *ASKED]}, said) == [kind, *ASKED]
    assert prompt(chat_line(messages=[{**kind, "role": "developer"}, *ASKED]), said) == [kind, *ASKED]


def test_openais_urls_say_whether_the_template_is_used() -> None:
    assert prompt(completion_line(), Defaults({}, system="Be brief.", raw=True)) == "Hi"
    assert prompt(completion_line()) == "Hi"
    assert prompt(chat_line(), Defaults({}, raw=True)) == ASKED


def test_a_prompt_may_be_token_ids_or_be_in_a_list() -> None:
    for given, meant in (([1, 2], [1, 2]), ([[1, 2]], [1, 2]), (["Once"], "Once")):
        assert prompt(completion_line(prompt=given)) == meant


def test_text_parts_are_joined_and_what_says_nothing_is_ignored() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    message = {"role": "user", "content": parts, "name": "Ann", "tool_calls": None, "refusal": None, "annotations": []}
    assert prompt(chat_line(messages=[message])) == [{"role": "user", "content": "Hi\nthere"}]


def test_a_lines_options_come_before_the_commands_and_nulls_are_none() -> None:
    [found] = asked({"prompt": "Hi", "temperature": 0, "seed": 7, "top_k": None, "stop": "x", "typo": None}).choices
    assert found == {"temperature": 0, "max_new_tokens": 50, "stop": "x", "seed": 7}


def test_the_commands_template_variables_are_for_chats_that_give_none() -> None:
    defaults = Defaults({"chat_template_kwargs": {"mode": 1}})

    def given(fields: dict[str, Any], defaults: Defaults = defaults) -> Any:
        return asked(fields, defaults).choices[0].get("chat_template_kwargs")

    assert given({"prompt": "Hi"}) == given(chat_line()) == {"mode": 1}
    assert given(chat_line(chat_template_kwargs={})) == {}
    assert given(completion_line()) is given({"prompt": [1, 2]}) is None
    assert given(completion_line(chat_template_kwargs={"mode": 2})) == {"mode": 2}  # which the model refuses


def test_each_name_of_the_longest_answer_is_known() -> None:
    assert options({"prompt": "Hi", "max_new_tokens": 3}) == {"max_new_tokens": 3}
    assert options(chat_line(max_tokens=3)) == {"max_new_tokens": 3}
    assert options(chat_line(max_tokens=3, max_completion_tokens=4.0)) == {"max_new_tokens": 4}
    assert options(chat_line(max_tokens=3, max_completion_tokens=None)) == {"max_new_tokens": 3}


def test_the_longest_answer_of_a_line_that_does_not_say_is_that_of_its_endpoint_or_the_commands() -> None:
    lines = ({"prompt": "Hi"}, completion_line(), chat_line())
    assert [asked(line).choices[0]["max_new_tokens"] for line in lines] == [50, 16, None]
    given = Defaults({"max_new_tokens": 7})
    assert [asked(line, given).choices[0]["max_new_tokens"] for line in lines] == [7, 7, 7]


def test_a_chat_and_a_completion_ask_for_logprobs_in_their_ways() -> None:
    assert options(chat_line(logprobs=True)) == {"logprobs": 0}
    assert options(chat_line(logprobs=True, top_logprobs=2)) == {"logprobs": 2}
    assert options(chat_line(logprobs=False, top_logprobs=0)) == {}
    assert options(completion_line(logprobs=0)) == {"logprobs": 0}


def test_options_of_other_servers_are_those_of_the_library() -> None:
    given = {"min_tokens": 2, "stop_token_ids": [5], "ignore_eos": True, "min_p": 0.1, "repetition_penalty": 1.1}
    assert options(chat_line(**given)) == given
    assert options(chat_line(logit_bias={"50256": -100, "7": 0.5})) == {"logit_bias": {50256: -100, 7: 0.5}}
    assert options(chat_line(add_generation_prompt=False)) == {"add_generation_prompt": False}
    thinks = {"chat_template_kwargs": {"enable_thinking": False}}
    assert options(chat_line(**thinks)) == thinks
    assert options(chat_line(continue_final_message=True)) == {"continue_final_message": True}


def test_what_changes_no_answer_is_accepted() -> None:
    assert options(
        chat_line(
            model="gpt",
            user="Ann",
            metadata={"a": 1},
            store=True,
            service_tier="flex",
            stream=True,
            seed=None,
            stream_options={"include_usage": True},
            n=1,
            best_of=1,
            tools=[],
            tool_choice="auto",
            functions=[],
            response_format={"type": "text"},
            modalities=["text"],
            length_penalty=1.0,
            use_beam_search=False,
            guided_json=None,
            logit_bias={},
            skip_special_tokens=True,
            mirostat=0,
            bad_words=[],
        )
    ) == {"logit_bias": {}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "expected .*a prompt"),
        ({"prompt": None}, "expected .*a prompt"),
        ({"prompt": 7}, "expected .*a prompt"),
        ({"prompt": []}, "expected .*a prompt"),
        ({"prompt": [True]}, "expected .*a prompt"),
        ({"prompt": ["two", "texts"]}, "expected .*a prompt"),
        ({"prompt": "Hi", "messages": ASKED}, "expected a prompt or messages, not both"),
        ({"messages": "Hi"}, "messages must be a list"),
        ({"messages": ["Hi"]}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "content must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "list of text parts"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "tool_calls must"),
        ({"prompt": "Hi", "logit_bias": {"the": 5}}, "logit_bias must be an object with token ids as its keys"),
        ({"prompt": "Hi", "logit_bias": [5]}, "logit_bias must be an object with token ids as its keys"),
        ({"prompt": "Hi", "max_tokens": 2.5}, "max_tokens must be an integer of at least 1, not 2.5"),
        ({"prompt": "Hi", "max_tokens": True}, "max_tokens must be an integer of at least 1, not True"),
        ({"prompt": "Hi", "n": 0}, "n must be an integer from 1 to 128, not 0"),
        ({"prompt": "Hi", "n": 129}, "n must be an integer from 1 to 128, not 129"),
        ({"prompt": "Hi", "n": 2, "best_of": 3}, "best_of must be n, which is 2"),
        ({"prompt": "Hi", "top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"prompt": "Hi", "max_tokenz": 5}, "unknown field 'max_tokenz': did you mean max_tokens?"),
        ({"prompt": "Hi", "Temperature": 0}, "unknown field 'Temperature': did you mean temperature?"),
        ({"prompt": "Hi", "category": "x"}, "unknown field 'category': leave it out"),
        (chat_line(max_tokenz=5), "unknown field 'max_tokenz': did you mean max_tokens?"),
        (chat_line(prompt="Hi"), "unknown field 'prompt'"),
        (completion_line(messages=ASKED), "unknown field 'messages'"),
        (chat_line() | {"url": "/v1/embeddings"}, "not POST /v1/embeddings"),
        (chat_line() | {"method": "GET"}, "not GET"),
        (chat_line() | {"body": None}, "body must be a JSON object"),
        (chat_line() | {"max_tokens": 5}, "'max_tokens' must be inside of body"),
    ],
)
def test_what_cannot_be_asked_for_is_said(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        asked(fields)


SCHEMA = {"type": "object", "required": ["a"]}


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("response_format", {"type": "json_object"}, {"json_schema": {"type": "object"}}),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}},
            {"json_schema": SCHEMA},
        ),
        ("response_format", {"type": "json_object", "schema": SCHEMA}, {"json_schema": SCHEMA}),
        ("text", {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}, {"json_schema": SCHEMA}),
        ("text", {"format": {}, "verbosity": "medium"}, {}),
        ("json_schema", SCHEMA, {"json_schema": SCHEMA}),
        ("guided_json", SCHEMA, {"json_schema": SCHEMA}),
        ("guided_regex", "a+", {"regex": "a+"}),
        ("guided_choice", ["a.b", "c"], {"regex": r"a\.b|c"}),
        ("structured_outputs", {"grammar": 'start: "a"', "json": None}, {"grammar": 'start: "a"'}),
    ],
)
def test_what_an_answer_must_fit(field: str, value: Any, option: dict[str, Any]) -> None:
    assert options(chat_line(**{field: value})) == option


def test_what_a_line_must_fit_takes_the_place_of_the_commands() -> None:
    constrained = Defaults({"json_schema": SCHEMA, "temperature": 0.5})
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for fields, expected in (
        ({"prompt": "Hi"}, {"json_schema": SCHEMA}),
        ({"prompt": "Hi", "regex": "a+"}, {"regex": "a+"}),
        ({"messages": ASKED, "tools": [tool]}, {}),
    ):
        [found] = asked(fields, constrained).choices
        assert found["temperature"] == 0.5
        assert {name: found[name] for name in ("json_schema", "regex", "grammar") if name in found} == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"response_format": {"type": "xml"}}, "must be of type text, json_object or json_schema, not 'xml'"),
        ({"response_format": "json"}, "response_format must be an object"),
        ({"response_format": {"typ": "json_object"}}, "response_format.typ is not supported: leave it out"),
        ({"response_format": {"json_schema": {"schema": SCHEMA}}}, "json_object or json_schema, not None"),
        ({"response_format": {"type": "json_object", "schema": "{}"}}, "response_format.schema must be an object"),
        ({"text": {"formt": {"type": "json_object"}}}, "text.formt is not supported"),
        ({"text": {"verbosity": "low"}}, "text.verbosity is not supported"),
        ({"text": {"format": {"type": "json_object", "strikt": True}}}, "text.format.strikt is not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "needs a schema"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "give only one of regex, response_format"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag is not supported"),
        ({"guided_choice": []}, "guided_choice must be a list of strings"),
    ],
)
def test_what_no_answer_can_be_asked_to_fit(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        asked(chat_line(**fields))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("bad_words", ["no"]),
        ("use_beam_search", True),
        ("prompt_logprobs", 1),
        ("truncate_prompt_tokens", 5),
        ("chat_template", "{{ messages }}"),
        ("echo", True),
        ("suffix", "end"),
        ("reasoning_effort", "high"),
        ("mirostat", 2),
        ("typical_p", 0.5),
        ("length_penalty", 2),
        ("skip_special_tokens", False),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(name: str, value: Any) -> None:
    for fields in (chat_line(**{name: value or {"a": 1}} if value == {} else {name: value}), {"prompt": "Hi", name: 7}):
        with pytest.raises(RequestError, match=f"^{name} is not supported: leave it out$"):
            asked(fields)


TOOL = {"type": "function", "function": {"name": "greet"}}
CALL = '<tool_call>\n{"name": "greet", "arguments": {}}\n</tool_call>'


def test_a_chat_may_call_tools(tokenizer: Tokenizer) -> None:
    chat = chat_line(tools=[TOOL], tool_choice="required")
    assert options(chat) == {"tools": [TOOL], "tool_choice": "required"}
    tools = asked(chat).tools
    assert tools and asked({"prompt": "Hi", "tools": [TOOL]}).tools and not asked(chat_line()).tools
    calls = ToolFormat(is_chatml=True, is_rendered=False), tools
    called = [replace(completion(CALL), finish_reason="stop")]
    [choice] = read_source(1, "", chat).answer(called, tokenizer, "m", calls)["response"]["body"]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    ours = Source(1, "").answer(called, tokenizer, "m", calls)
    assert (ours["text"], ours["finish_reason"]) == ("", "tool_calls")
    for [call] in (choice["message"]["tool_calls"], ours["tool_calls"]):
        assert call == {"id": "call_1_0_0", "type": "function", "function": {"name": "greet", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (chat_line(tools=[{"type": "function"}]), "each of tools must be of type function"),
        (chat_line(tool_choice="required"), "tool_choice needs tools"),
        (completion_line(tools=[TOOL]), "^tools is not supported: leave it out$"),
    ],
)
def test_tools_that_no_line_can_have(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        asked(fields)


def test_choices_draw_with_seeds_that_follow_each_other() -> None:
    found = asked({"prompt": "Hi", "n": 3, "best_of": 3, "seed": 2**63 - 2}).choices
    assert [choice["seed"] for choice in found] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert all(choice | {"seed": 0} == found[0] | {"seed": 0} for choice in found)


def test_no_two_lines_and_choices_have_the_same_seed() -> None:
    seeds = [
        choice["seed"]
        for number in (1, 2, 3, 1000)
        for choice in asked({"prompt": "Hi", "n": 128}, number=number).choices
    ]
    assert len(set(seeds)) == 4 * 128
    assert line_seed(42, 3) == 42 + 3 * 2**32
    assert all(-(2**63) <= line_seed(seed, n) < 2**63 for seed in (-(2**63), 2**63 - 1) for n in (1, 2**31, 2**40))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"prompt": "Hi"', "not JSON: Expecting ',' delimiter"),
        (b"[1]", "expected a JSON object"),
        (b"Hi", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": ' + b"1" * 10_000 + b"}", "not JSON"),
        (b'{"seed": NaN}', "not JSON: NaN is no JSON number"),
        (b'{"seed": -Infinity}', "not JSON: -Infinity is no JSON number"),
        (b'{"id": 1e999}', "not JSON: the number 1e999 is too large"),
        (b'{"prompt": "\xff"}', "not UTF-8 text: byte 0xff at offset 12"),
    ],
    ids=range(9),
)
def test_what_is_not_an_object_is_said(data: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_object(data)


def test_a_line_of_text_is_a_prompt_without_its_end() -> None:
    assert read_text(b"\xef\xbb\xbf  Hi \r\n") == {"prompt": "  Hi "}
    assert read_text("a\u2028b\n".encode()) == {"prompt": "a\u2028b"}


def test_an_error_keeps_what_names_its_line() -> None:
    source = read_source(3, "ab12", {"id": 7, "custom_id": "a", "prompt": "Hi"})
    told = {"line": 3, "digest": "ab12", "id": 7, "custom_id": "a", "error": "no good"}
    assert source.error(RequestError("no\ngood")) == told


def test_openais_lines_get_openais_errors() -> None:
    source = read_source(3, "ab12", chat_line(temperature="hot"))
    found = source.error(RequestError("temperature must be a number, not 'hot'"))
    assert found == {
        "id": "batch_req_3",
        "digest": "ab12",
        "custom_id": "a",
        "response": {
            "status_code": 400,
            "request_id": "req_3",
            "body": {
                "error": {
                    "message": "temperature must be a number, not 'hot'",
                    "type": "invalid_request_error",
                    "param": "temperature",
                    "code": None,
                }
            },
        },
        "error": None,
    }
    too_long = source.error(PromptTooLongError("999 tokens"))["response"]
    assert (too_long["status_code"], too_long["body"]["error"]["code"]) == (400, "context_length_exceeded")
    ours = source.error(CheckpointError("NaN"))["response"]
    assert (ours["status_code"], ours["body"]["error"]["type"]) == (500, "server_error")


@pytest.mark.parametrize("fields", [{"url": 5, "body": 7}, {"method": "POST"}, {"body": {}}])
def test_a_line_that_is_half_of_openais_format_gets_openais_error(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        asked(fields)
    error = read_source(1, "", fields).error(caught.value)
    assert error["response"]["body"]["error"]["message"] == str(caught.value)


def test_an_id_that_nests_too_deep_is_refused_and_others_are_kept() -> None:
    deep: Any = 1
    for _ in range(50):
        deep = [deep]
    assert read_source(1, "", {"id": deep}).labels == {"id": deep}
    with pytest.raises(RequestError, match="custom_id nests more than 50 deep"):
        read_source(1, "", {"custom_id": {"a": deep}})


def completion(text: str) -> Completion:
    return Completion(text, (1, 2), "length", prompt_tokens=5, cached_tokens=0, timings=Timings(0, 0))


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return from_gguf(read_gguf(smollm2_gguf).metadata)


def test_all_choices_of_a_line_are_in_one_result(tokenizer: Tokenizer) -> None:
    texts = [completion("a"), completion("b")]
    counts = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    ours = Source(1, "ab12", {"id": 7}).answer(texts, tokenizer, "m")
    assert ours == {
        "line": 1,
        "digest": "ab12",
        "id": 7,
        "choices": [{"index": i, "text": t, "finish_reason": "length"} for i, t in enumerate("ab")],
        "usage": counts,
    }
    body = read_source(1, "ab12", chat_line()).answer(texts, tokenizer, "m")["response"]["body"]
    assert [(choice["index"], choice["message"]["content"]) for choice in body["choices"]] == [(0, "a"), (1, "b")]
    assert body["usage"] == counts


def test_lines_are_utf_8_whatever_they_say() -> None:
    value = {"id": "é\ud800\\", "text": "a\nb\u2028"}
    data = as_line(value)
    assert data.decode().count("\n") == 1 and "é" in data.decode()
    assert json.loads(data) == value
