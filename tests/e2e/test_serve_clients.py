"""openai-python, unchanged, against the installed `llamajax serve`.

The client validates what it gets: an answer that lacks a field of OpenAI's types, or has one of another type, is an
error. `scripts/clients/` has clients that are too heavy for this.
"""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from .serving import serving

KEY = "a-key"
PARAMETERS: Any = (
    {"type": "integer", "minimum": 0, "maximum": 9},
    {"enum": ["red", "green"]},
    {"type": "string", "maxLength": 5},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    {"type": "object", "properties": {"inner": {"type": "null"}}, "additionalProperties": False},
)
MESSAGES: Any = [{"role": "user", "content": "Tell me a story about a llama."}]
OPTIONS: Any = {"max_tokens": 20, "seed": 7}


@pytest.fixture(scope="module")
def url(shallow_model: str) -> Iterator[str]:
    """A server that runs four requests at once, and lets eight wait."""
    with serving(shallow_model, "--api-key", KEY, "--slots", "4", "--max-waiting", "8") as (_, client):
        yield f"{client.base_url}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, _strict_response_validation=True) as made:
        yield made


@pytest.fixture(scope="module")
def lenient(url: str) -> Iterator[openai.OpenAI]:
    """For nulls that OpenAI sends and its types lack: in a completion's chunks, and for an echo's first token."""
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    [found] = client.models.list().data
    assert client.models.retrieve(found.id) == found
    return found.id


def test_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, **OPTIONS)
    [choice] = answer.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content and answer.usage
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
    assert answer.model == model


class Llama(BaseModel):
    """What an answer must be. Its texts are short: the model here has one layer, and says nothing sensible."""

    name: Annotated[str, Field(max_length=10)]
    age: Annotated[int, Field(ge=0, le=99)]
    likes: Literal["grass", "hay"] | None


def test_a_pydantic_model_is_parsed(client: openai.OpenAI, model: str) -> None:
    for seed in range(5):
        answer = client.chat.completions.parse(
            model=model, messages=MESSAGES, response_format=Llama, max_tokens=300, seed=seed, temperature=1
        )
        assert isinstance(answer.choices[0].message.parsed, Llama)


def test_a_tool_is_called_and_answered(client: openai.OpenAI, model: str) -> None:
    tools: Any = [openai.pydantic_function_tool(Llama, name="feed")]
    asked: Any = {"model": model, "tools": tools, "max_tokens": 300, "seed": 1, "temperature": 1}
    # One call: the model would go on calling.
    required: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    answer = client.chat.completions.create(messages=MESSAGES, **required, **asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    message = answer.choices[0].message
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.type == "function" and call.function.name == "feed"
        Llama.model_validate_json(call.function.arguments)
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "fed"} for call in message.tool_calls]
    answer = client.chat.completions.create(messages=[*MESSAGES, message, *results], **{**asked, "max_tokens": 5})
    assert answer.choices[0].message.role == "assistant"


def test_fifty_tools(client: openai.OpenAI, model: str) -> None:
    """Ask, call, result, answer, with functions whose parameters differ."""
    tools: Any = [
        {
            "type": "function",
            "function": {
                "name": f"tool_{number}",
                "parameters": {
                    "type": "object",
                    "properties": {f"key_{number}": PARAMETERS[number % len(PARAMETERS)]},
                    "required": [f"key_{number}"],
                    "additionalProperties": False,
                },
            },
        }
        for number in range(50)
    ]
    asked: Any = {"model": model, "max_tokens": 150, "temperature": 1, "parallel_tool_calls": False}

    def loop(number: int) -> None:
        kind = ("required", "named", "auto")[number % 3]
        # All of them would be a prompt longer than the context.
        offered = [tools[number], tools[(number + 1) % 50]]
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in offered}
        wanted, *_ = schemas
        choice: Any = {"type": "function", "function": {"name": wanted}} if kind == "named" else kind
        answer = client.chat.completions.create(
            messages=MESSAGES, tools=offered, tool_choice=choice, seed=number, **asked
        )
        message, calls = answer.choices[0].message, answer.choices[0].message.tool_calls or []
        if kind != "auto":
            [call] = calls
            assert call.type == "function" and answer.choices[0].finish_reason == "tool_calls"
            assert call.function.name == wanted or kind == "required"
            jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
        results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in calls]
        said: Any = [*MESSAGES, message, *results]
        final = client.chat.completions.create(messages=said, tools=offered, **asked | {"max_tokens": 3})
        assert final.choices[0].message.role == "assistant"

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(loop, range(50)))


def test_a_chat_streams_the_same_answer_and_usage(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, **OPTIONS)
    first, *chunks, last = client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **OPTIONS
    )
    assert first.choices[0].delta.role == "assistant"
    assert not any(chunk.choices[0].delta.role for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert (last.choices, last.usage) == ([], answer.usage)
    assert {(chunk.id, chunk.created) for chunk in chunks} == {(first.id, first.created)}


def test_a_stream_has_no_usage_unless_it_asks(client: openai.OpenAI, model: str) -> None:
    for chunk in client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **OPTIONS):
        assert len(chunk.choices) == 1 and chunk.usage is None


def test_the_clients_stream_helper_puts_an_answer_together(client: openai.OpenAI, model: str) -> None:
    text = client.chat.completions.create(model=model, messages=MESSAGES, **OPTIONS).choices[0].message.content
    assert text
    # It takes an answer that was cut off for an error.
    asked: Any = {"model": model, "messages": MESSAGES, "stop": text[20:24], **OPTIONS}
    with client.chat.completions.stream(**asked) as stream:
        [choice] = stream.get_final_completion().choices
    assert (choice.message.content, choice.finish_reason) == (text.partition(text[20:24])[0], "stop")


def test_completions_of_a_text_of_several_and_of_token_ids(
    client: openai.OpenAI, lenient: openai.OpenAI, model: str
) -> None:
    one = client.completions.create(model=model, prompt="Once upon a time", **OPTIONS)
    two = client.completions.create(model=model, prompt=["Once upon a time", "The sea"], **OPTIONS)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == one.choices[0].text
    ids = client.completions.create(model=model, prompt=[[100, 200, 300], [100, 200]], **OPTIONS)
    assert ids.usage and ids.usage.prompt_tokens == 5
    chunks = lenient.completions.create(model=model, prompt="Once upon a time", stream=True, **OPTIONS)
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text


def test_responses(client: openai.OpenAI, model: str) -> None:
    asked: Any = {
        "model": model,
        "input": "Hi!",
        "instructions": "Be brief.",
        "max_output_tokens": 20,
        "temperature": 0,
    }
    answer = client.responses.create(**asked)
    assert answer.output_text and answer.usage
    assert answer.usage.output_tokens == 20
    assert answer.incomplete_details and answer.incomplete_details.reason == "max_output_tokens"

    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
    assert events[-1].type == "response.incomplete" and events[-1].response.usage == answer.usage

    stop = answer.output_text[20:24]  # the helper waits for an answer that is complete
    with client.responses.stream(**asked, extra_body={"stop": stop}) as stream:
        final = stream.get_final_response()
    assert (final.status, final.output_text) == ("completed", answer.output_text.partition(stop)[0])

    said = [{"role": "user", "content": "Hi!"}, *answer.output, {"role": "user", "content": "And you?"}]
    later = client.responses.create(**asked | {"input": said})
    assert later.usage and later.usage.input_tokens > answer.usage.input_tokens + 20


def test_responses_with_tools(client: openai.OpenAI, model: str) -> None:
    parameters: Any = {"type": "object", "properties": {"city": {"enum": ["Lima", "Cusco"]}}, "required": ["city"]}
    parameters["additionalProperties"] = False
    tools: Any = [{"type": "function", "name": "weather", "parameters": parameters, "strict": True}]
    said: list[Any] = [{"role": "user", "content": "What is the weather in Lima?"}]
    asked: Any = {"model": model, "tools": tools, "max_output_tokens": 300, "extra_body": {"seed": 1}}
    must_call: Any = asked | {"input": said, "tool_choice": "required", "parallel_tool_calls": False}
    [call] = client.responses.create(**must_call).output
    assert call.type == "function_call" and call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Lima", "Cusco")
    with client.responses.stream(**must_call) as stream:
        [streamed] = stream.get_final_response().output
    assert streamed.type == "function_call" and streamed.arguments == call.arguments
    said += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 20 degrees."}]
    assert client.responses.create(**asked | {"max_output_tokens": 3}, input=said).output_text


def test_logprobs_of_a_chat(client: openai.OpenAI, model: str) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **OPTIONS}
    [choice] = client.chat.completions.create(**asked).choices
    assert choice.logprobs and choice.logprobs.content and choice.message.content
    tokens = choice.logprobs.content
    assert len(tokens) == 20
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode(errors="replace") == choice.message.content
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    chunks = client.chat.completions.create(stream=True, **asked)
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert [token for logprobs in streamed if logprobs for token in logprobs.content or []] == tokens


def test_logprobs_of_a_completion_and_its_prompt(lenient: openai.OpenAI, model: str) -> None:
    asked: Any = {"model": model, "prompt": "Once upon a time", "logprobs": 2, "echo": True, **OPTIONS}
    [choice] = lenient.completions.create(**asked).choices
    assert choice.text.startswith("Once upon a time")
    found = choice.logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert "".join(found.tokens) == choice.text
    assert found.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in found.token_logprobs[1:])
    streamed = [chunk.choices[0].logprobs for chunk in lenient.completions.create(stream=True, **asked)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in streamed if part for item in getattr(part, name)] == getattr(found, name)


def test_three_choices_are_distinct_and_stream_the_same(client: openai.OpenAI, model: str) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "n": 3, "temperature": 1, **OPTIONS}
    answers = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    assert len(set(answers)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == answers


def test_a_seed_repeats_an_answer(client: openai.OpenAI, model: str) -> None:
    def ask(**seed: int) -> str | None:
        asked: Any = {"model": model, "messages": MESSAGES, "max_tokens": 20, "temperature": 1, **seed}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert ask(seed=7) == ask(seed=7) != ask(seed=8)
    assert ask() != ask()


def test_a_stop_text_ends_an_answer_before_it(client: openai.OpenAI, model: str) -> None:
    asked: Any = {"model": model, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 20}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[10:14]
    [choice] = client.completions.create(stop=stop, **asked).choices
    assert (choice.text, choice.finish_reason) == (whole.partition(stop)[0], "stop")


def test_a_bad_request_names_its_field(client: openai.OpenAI, model: str) -> None:
    for field, value in (("temperature", -1), ("top_p", 2), ("modalities", ["audio"])):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model=model, messages=MESSAGES, stream=stream, **{field: value})
            assert (caught.value.status_code, caught.value.param) == (400, field)


def test_a_long_prompt_is_distinguished_from_other_bad_requests(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="llama " * 20_000)
    assert caught.value.code == "context_length_exceeded"


def test_a_wrong_key(url: str, model: str) -> None:
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model=model, messages=MESSAGES)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_what_is_not_found(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="Hi")


def test_a_body_that_is_too_large(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model=model, prompt="llama " * 20_000_000)
    assert caught.value.status_code == 413


def test_more_requests_than_may_wait(client: openai.OpenAI, model: str) -> None:
    def ask(_: int) -> openai.RateLimitError | None:
        try:
            client.completions.create(model=model, prompt="Once", max_tokens=100, extra_body={"ignore_eos": True})
        except openai.RateLimitError as error:
            return error
        return None

    with ThreadPoolExecutor(40) as threads:
        errors = [error for error in threads.map(ask, range(40)) if error]
    assert 0 < len(errors) <= 40 - 8
    assert all(int(error.response.headers["retry-after"]) > 0 for error in errors)


def test_a_client_that_retries_gets_its_answer(url: str, model: str) -> None:
    async def ask() -> set[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=100) as client:
            asked: Any = {"model": model, "prompt": "Once", "max_tokens": 30, "seed": 1}
            answers = await asyncio.gather(*(client.completions.create(**asked) for _ in range(24)))
            return {answer.choices[0].text for answer in answers}

    assert len(asyncio.run(ask())) == 1
