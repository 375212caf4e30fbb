"""Whatever the fields of a batch's line hold, it ends as a request or as a clear error, and its result can be read."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llamajax
from llamajax import LLM
from llamajax.errors import LlamaJaxError
from llamajax.serve.batch_file import Defaults, Source, as_line, read_request, read_source
from llamajax.serve.json_object import read_object

MESSAGES = [{"role": "user", "content": "Hi"}]
_NAMES = (
    "max_tokens max_completion_tokens max_new_tokens min_tokens stop stop_token_ids ignore_eos logit_bias n best_of "
    "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed logprobs top_logprobs "
    "add_generation_prompt continue_final_message chat_template_kwargs tools tool_choice functions response_format "
    "echo user metadata stream_options max_tokenz prompt messages model"
)
OPTIONS = _NAMES.split()
ENVELOPE = ("id", "custom_id", "method", "url", "body", "prompt", "messages")

numbers = st.one_of(
    st.integers(-5, 200),
    st.sampled_from([2**31, 2**32, 2**63, -(2**63) - 1, 10**400, 1.0, 5.0, -0.0, 0.5, 1e300, 5e-324]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), st.sampled_from(["1", "inf", "none", ""]))
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
fields = st.dictionaries(st.sampled_from(OPTIONS), junk, max_size=4)
messages = st.fixed_dictionaries({}, optional={"role": junk | st.just("user"), "content": junk, "tool_calls": junk})
lines = st.one_of(
    st.builds(lambda said: {"prompt": "Hi", **said}, fields),
    st.builds(lambda said: {"messages": MESSAGES, **said}, fields),
    st.builds(lambda said: {"url": "/v1/chat/completions", "body": {"messages": MESSAGES, **said}}, fields),
    st.builds(lambda said: {"url": "/v1/completions", "body": {"prompt": "Hi", **said}}, fields),
    st.builds(lambda said: {"messages": said}, st.lists(messages, max_size=3)),
    st.dictionaries(st.sampled_from(ENVELOPE), junk),
)


@pytest.fixture(scope="module")
def llama(default_model: None) -> LLM:
    return llamajax.load("smollm2-135m-instruct", max_seq_len=256)


def request_or_error(llama: LLM, data: bytes) -> LlamaJaxError | None:
    """What is wrong with a line; nothing but a LlamaJaxError may be raised."""
    source = Source(1, "")
    try:
        said = read_object(data)
        source = read_source(1, "", said)
        asked = read_request(1, said, Defaults({"seed": 42}))
        for options in asked.choices:
            request, _ = llama.prepare(asked.prompt, **options)
            assert type(request.max_new_tokens) is int and request.max_new_tokens >= 1
            assert request.sampling.logprobs is None or type(request.sampling.logprobs) is int
    except LlamaJaxError as error:
        read_object(as_line(source.error(error)))
        assert str(error)
        return error
    return None


@given(line=lines)
@example(line={"prompt": "Hi", "logprobs": 1.0})
@example(line={"prompt": "Hi", "logprobs": True, "top_logprobs": 1.5})
@example(line={"prompt": "Hi", "top_k": True})
@example(line={"prompt": [10**30]})
@example(line={"prompt": "Hi", "stop_token_ids": [10**30]})
@example(line={"prompt": "Hi", "logit_bias": {"1": "x"}})
@settings(max_examples=500)
def test_a_line_of_junk_is_a_request_or_an_error(llama: LLM, line: dict[str, Any]) -> None:
    request_or_error(llama, json.dumps(line).encode())


@given(data=st.binary(max_size=50) | st.text(max_size=50).map(lambda text: text.encode("utf-8", "replace")))
@example(data=b'{"prompt": "Hi", "temperature": NaN}')
@example(data=b'{"prompt": "Hi", "temperature": 1e999}')
@example(data=b'{"id": ' + b"[" * 400 + b"]" * 400 + b', "prompt": "Hi"}')
@example(data=b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}")
def test_a_line_of_bytes_is_an_error(llama: LLM, data: bytes) -> None:
    assert request_or_error(llama, data)


def test_numbers_in_each_form_that_means_the_same_are_taken(llama: LLM) -> None:
    for said in (
        *(
            {"max_tokens": 5.0},
            {"top_k": 5.0},
            {"top_k": -1},
            {"seed": -1},
            {"n": 2.0},
            {"logprobs": 1.0},
            {"stop": "a"},
        ),
        *({"stop_token_ids": [5.0]}, {"ignore_eos": True}, {"logit_bias": {"5": -100}}, {"min_tokens": 2}),
    ):
        assert request_or_error(llama, json.dumps({"prompt": "Hi", **said}).encode()) is None, said
