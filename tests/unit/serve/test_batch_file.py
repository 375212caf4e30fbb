"""Lines of a batch: what they ask for, what is wrong with them, and what a torn file of results still holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from llamajax.errors import DiskFullError, RequestError
from llamajax.serve.batch_file import Defaults, ResultFile, as_line, is_json, read_fields, read_request, read_source

DEFAULTS = Defaults({"temperature": 0.6, "max_new_tokens": 50, "stop": []})
ASKED = [{"role": "user", "content": "Hi"}]


def chat_line(**body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": ASKED, **body}}


def options(fields: dict[str, Any]) -> dict[str, Any]:
    """What a line says of its options."""
    _, told = read_request(fields, Defaults({}))
    return told


def test_a_prompt_is_a_message_of_a_user_unless_it_is_raw() -> None:
    assert read_request({"prompt": "Hi"}, DEFAULTS) == (ASKED, DEFAULTS.options)
    assert read_request({"prompt": "Hi"}, Defaults({}, raw=True)) == ("Hi", {})
    assert read_request({"prompt": " "}, Defaults({}, raw=True)) == (" ", {})
    with pytest.raises(RequestError, match="the prompt is empty"):
        read_request({"prompt": " "}, DEFAULTS)


def test_a_system_message_of_the_line_comes_before_the_commands() -> None:
    brief, kind = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}
    said = Defaults({}, system="Be brief.")
    assert read_request({"prompt": "Hi"}, said)[0] == [brief, *ASKED]
    assert read_request({"messages": ASKED}, said)[0] == [brief, *ASKED]
    assert read_request({"messages": [kind, *ASKED]}, said)[0] == [kind, *ASKED]
    assert read_request(chat_line(messages=[{**kind, "role": "developer"}, *ASKED]), said)[0] == [kind, *ASKED]


def test_openais_urls_say_whether_the_template_is_used() -> None:
    said = Defaults({}, system="Be brief.", raw=True)
    completions = {"url": "/v1/completions", "body": {"prompt": "Once"}}
    assert read_request(completions, said)[0] == "Once"
    assert read_request(completions, Defaults({}))[0] == "Once"
    assert read_request(chat_line(), Defaults({}, raw=True))[0] == ASKED


def test_a_prompt_may_be_token_ids_or_stand_in_a_list() -> None:
    for prompt, meant in (([1, 2], [1, 2]), ([[1, 2]], [1, 2]), (["Once"], "Once")):
        assert read_request({"url": "/v1/completions", "body": {"prompt": prompt}}, DEFAULTS)[0] == meant


def test_text_parts_are_joined_and_other_fields_of_a_message_ignored() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    message = {"role": "user", "content": parts, "name": "Ann"}
    assert read_request(chat_line(messages=[message]), DEFAULTS)[0] == [{"role": "user", "content": "Hi\nthere"}]


def test_a_lines_options_come_before_the_commands_and_nulls_are_none() -> None:
    line = {"prompt": "Hi", "temperature": 0, "seed": None, "stop": "x", "unknown": 1}
    assert read_request(line, DEFAULTS)[1] == {"temperature": 0, "max_new_tokens": 50, "stop": "x"}


def test_each_name_of_the_longest_answer_is_known() -> None:
    assert options({"prompt": "Hi", "max_new_tokens": 3}) == {"max_new_tokens": 3}
    assert options(chat_line(max_tokens=3)) == {"max_new_tokens": 3}
    assert options(chat_line(max_tokens=3, max_completion_tokens=4)) == {"max_new_tokens": 4}
    assert options(chat_line(max_tokens=3, max_completion_tokens=None)) == {"max_new_tokens": 3}


def test_a_chat_and_a_completion_ask_for_logprobs_in_their_ways() -> None:
    assert options(chat_line(logprobs=True)) == {"logprobs": 0}
    assert options(chat_line(logprobs=True, top_logprobs=2)) == {"logprobs": 2}
    assert options(chat_line(logprobs=False, top_logprobs=0)) == {}
    assert options({"url": "/v1/completions", "body": {"prompt": "Hi", "logprobs": 0}}) == {"logprobs": 0}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "expected messages, or a prompt"),
        ({"prompt": None}, "expected messages, or a prompt"),
        ({"prompt": 7}, "expected messages, or a prompt"),
        ({"prompt": []}, "expected messages, or a prompt"),
        ({"prompt": [True]}, "expected messages, or a prompt"),
        ({"prompt": ["two", "texts"]}, "expected messages, or a prompt"),
        ({"messages": "Hi"}, "messages must be a list"),
        ({"messages": ["Hi"]}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "content must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "list of text parts"),
        ({"prompt": "Hi", "stop": 5}, "stop must be one string or several"),
        (chat_line(n=2), "n is not supported"),
        (chat_line(response_format={"type": "json_object"}), "response_format is not supported"),
        (chat_line() | {"url": "/v1/embeddings"}, "not POST /v1/embeddings"),
        (chat_line() | {"method": "GET"}, "not GET"),
        (chat_line() | {"body": None}, "body must be a JSON object"),
    ],
)
def test_what_cannot_be_asked_for_is_said(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_request(fields, DEFAULTS)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"prompt": "Hi"', "not JSON: Expecting ',' delimiter"),
        (b"[1]", "expected a JSON object"),
        (b"Hi", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": ' + b"1" * 10_000 + b"}", "not JSON"),
        (b'{"prompt": "\xff"}', "the line is not UTF-8 text: byte 0xff at offset 12"),
    ],
    ids=range(6),
)
def test_what_is_not_an_object_is_said(data: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_fields(data, as_json=True)
    assert not is_json(data)


def test_a_line_of_text_is_a_prompt_without_its_end() -> None:
    assert read_fields(b"\xef\xbb\xbf  Hi \r\n", as_json=False) == {"prompt": "  Hi "}
    assert read_fields("a\u2028b\n".encode(), as_json=False) == {"prompt": "a\u2028b"}


def test_an_error_keeps_what_names_its_line() -> None:
    source = read_source(3, {"id": 7, "custom_id": "a", "prompt": "Hi"})
    told = {"line": 3, "id": 7, "custom_id": "a", "error": "no good"}
    assert source.error(RequestError("no\ngood")) == told


def test_lines_are_utf_8_whatever_they_say() -> None:
    value = {"id": "é\ud800\\", "text": "a\nb\u2028"}
    data = as_line(value)
    assert data.decode().count("\n") == 1 and "é" in data.decode()
    assert json.loads(data) == value


LINES = [as_line({"line": 1, "text": "é"}), as_line({"id": "batch_req_12", "custom_id": None}), as_line({"line": 3})]


@pytest.mark.parametrize("kept", range(3))
def test_a_torn_last_line_is_removed_wherever_it_was_torn(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "out.jsonl"
    whole, last = b"".join(LINES[:kept]), LINES[kept]
    for end in range(len(last)):
        path.write_bytes(whole + last[:end])
        file = ResultFile(path, resume=True)
        assert file.done == set((1, 12)[:kept])
        assert path.read_bytes() == whole
        file.write({"line": 3})
        assert path.read_bytes() == whole + LINES[2]
    path.write_bytes(whole + last[:-2] + b"\n")  # torn in another way
    ResultFile(path, resume=True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("data", [b"a prompt", b"Hi\nthere\n", b'{"prompt": "Hi"}\n', LINES[0][:-2] + b"\n" + LINES[2]])
def test_a_file_that_is_not_ours_is_left_as_it_is(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(data)
    with pytest.raises(RequestError, match="is not an output of llamajax batch"):
        ResultFile(path, resume=True)
    with pytest.raises(RequestError, match="--resume continues it"):
        ResultFile(path, resume=False)
    assert path.read_bytes() == data


def test_what_is_not_a_regular_file_is_written_too() -> None:
    ResultFile(Path("/dev/null"), resume=True).write({"line": 1})
    with pytest.raises(DiskFullError, match="cannot write to /dev/full: No space left on device"):
        ResultFile(Path("/dev/full"), resume=True).write({"line": 1})
