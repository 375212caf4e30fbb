"""The HTTP app, in a real server on loopback, of the default model: bodies, streams, errors, clients that go away."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

import llamajax.serve
from llamajax import (
    LLM,
    DeviceMemoryError,
    PromptTooLongError,
    RequestError,
    ServedStream,
    UnavailableError,
    load,
)
from llamajax.ops import native
from llamajax.serve import generation, middleware, openapi, protocol
from llamajax.serve.answers import error_status
from llamajax.serve.connection import Connection
from llamajax.serve.requests import READERS
from llamajax.serve.service import Service

QUESTION = [{"role": "user", "content": "Say hello."}]
NAMES = ("tokens", "token_logprobs", "top_logprobs")
LONG = {"messages": QUESTION, "max_tokens": 400, "ignore_eos": True}


def called(arguments: str) -> dict[str, Any]:
    """A message that is a call."""
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


class Running:
    """An app that runs in a thread."""

    def __init__(self, app: Any) -> None:
        self.service = app.state.service
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", http=Connection))
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, args=([listening],))
        self._thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join()

    def wait_until_idle(self, seconds: float = 5) -> None:
        end = time.monotonic() + seconds
        while self.service.server.num_running or self.service.server.num_waiting:
            assert time.monotonic() < end, "rows are still busy"
            time.sleep(0.01)

    def post(self, url: str, **body: Any) -> dict[str, Any]:
        response = self.client.post(url, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, url: str, **body: Any) -> list[Any]:
        """The data of each event of a stream, in JSON but for [DONE]."""
        with self.client.stream("POST", url, json={**body, "stream": True}) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        return [it if it == "[DONE]" else json.loads(it) for it in data]


@pytest.fixture(scope="module")
def llama(default_model: None) -> LLM:
    return load(max_seq_len=512)


@pytest.fixture(scope="module")
def server(llama: LLM) -> Iterator[Running]:
    running = Running(llamajax.serve.app(llama, name="small", slots=4, max_waiting=8))
    yield running
    running.close()


def test_a_chat_is_answered_as_by_the_library(llama: LLM, server: Running) -> None:
    alone = llama.chat("Say hello.", max_new_tokens=12, temperature=0.8, seed=7, logprobs=2)
    body = server.post(
        protocol.CHAT, model="small", messages=QUESTION, max_tokens=12, temperature=0.8, seed=7, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone.text}
    assert choice["finish_reason"] == alone.finish_reason
    assert alone.logprobs
    assert [it["logprob"] for it in choice["logprobs"]["content"]] == [it.logprob for it in alone.logprobs]
    assert body["usage"]["prompt_tokens"] == alone.prompt_tokens
    assert body["usage"]["completion_tokens"] == len(alone.token_ids)
    assert (body["object"], body["model"], body["seed"]) == ("chat.completion", "small", 7)


def test_prompts_that_begin_alike_are_read_once_and_answered_as_alone(llama: LLM, server: Running) -> None:
    begin = "A cat, a dog and a bird live in a house near the river. " * 12
    for number, question in enumerate(("Who lives there?", "Where is the house?", "Who lives there?")):
        asked = {"temperature": 0.9, "seed": number, "logprobs": 1, "ignore_eos": True}
        body = server.post(protocol.COMPLETIONS, prompt=begin + question, max_tokens=10, **asked)
        alone = llama.generate(begin + question, max_new_tokens=10, **asked)
        [choice] = body["choices"]
        assert alone.logprobs and choice["text"] == alone.text
        assert choice["logprobs"]["token_logprobs"] == [it.logprob for it in alone.logprobs]
        cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        most = (alone.prompt_tokens - 1) // 64 * 64
        assert cached == (most if number and native.available() else 0) and most >= 128


def test_a_stream_says_what_the_whole_answer_says(server: Running) -> None:
    asked = {"messages": QUESTION, "max_tokens": 20, "temperature": 0.8, "seed": 3, "logprobs": True, "n": 2}
    whole = server.post(protocol.CHAT, **asked)
    *chunks, last, done = server.events(protocol.CHAT, **asked, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    for choice in whole["choices"]:
        parts = [it for chunk in chunks for it in chunk["choices"] if it["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in part["delta"] for part in parts[1:])
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        logprobs = [it for part in parts if part["logprobs"] for it in part["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
    first, second = (choice["message"]["content"] for choice in whole["choices"])
    assert first != second


def test_tokens_that_come_at_once_are_one_event(server: Running) -> None:
    events = server.events(protocol.CHAT, **{**LONG, "max_tokens": 100, "stream_options": {"include_usage": True}})
    assert events[-2]["usage"]["completion_tokens"] == 100
    assert len(events) < 90  # of about 104, however slow the machine


SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 30}}, "required": ["name"]}
SCHEMA["additionalProperties"] = False
TOOL = {"type": "function", "function": {"name": "greet", "parameters": SCHEMA}}


def test_an_answer_that_fits_is_the_librarys(llama: LLM, server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "greeting", "strict": True, "schema": SCHEMA}}
    asked: Any = {"messages": QUESTION, "response_format": form, "max_tokens": 60, "temperature": 1, "n": 2, "seed": 4}
    whole = server.post(protocol.CHAT, **asked)["choices"]
    for seed, choice in enumerate(whole, 4):
        alone = llama.chat("Say hello.", json_schema=SCHEMA, max_new_tokens=60, temperature=1, seed=seed)
        assert (choice["message"]["content"], choice["finish_reason"]) == (alone.text, alone.finish_reason)
        assert choice["finish_reason"] != "stop" or list(json.loads(alone.text)) == ["name"]
    asked = {"input": "Say hello.", "text": {"format": {"type": "json_schema", "schema": SCHEMA}}, "seed": 4}
    body = server.post(protocol.RESPONSES, **asked, max_output_tokens=60, temperature=1)
    assert body["output"][0]["content"][0]["text"] == whole[0]["message"]["content"]
    assert body["text"] == asked["text"]


def test_an_answer_that_fits_is_the_same_alone_and_among_31_others(llama: LLM) -> None:
    asked: Any = {"temperature": 1, "seed": 5}
    alone = llama.chat("Say hello.", json_schema=SCHEMA, max_new_tokens=40, logprobs=0, **asked)
    assert alone.logprobs and len(alone.token_ids) > 5
    prompts = [f"Number {i} of my llamas" for i in range(31)]
    free: list[Any] = [(prompt, {"max_new_tokens": 50, "ignore_eos": True}) for prompt in prompts]
    fitting = (QUESTION, {"json_schema": SCHEMA, "max_new_tokens": 40, "logprobs": 0, **asked})
    batched = dict(llama.stream_batch([*free[:9], fitting, *free[9:]], slots=32))[9]
    assert not isinstance(batched, Exception)
    assert (batched.token_ids, batched.logprobs) == (alone.token_ids, alone.logprobs)
    assert (batched.text, batched.finish_reason) == (alone.text, alone.finish_reason)

    running = Running(llamajax.serve.app(llama, slots=32))
    while running.service.state == "loading":
        time.sleep(0.01)
    others = {"prompt": prompts, "max_tokens": 450, "ignore_eos": True, "stream": True}
    try:
        with running.client.stream("POST", protocol.COMPLETIONS, json=others):
            while running.service.server.num_running < 31:
                time.sleep(0.01)
            body = running.post(
                protocol.CHAT, messages=QUESTION, guided_json=SCHEMA, max_tokens=40, logprobs=True, **asked
            )
            assert running.service.server.num_running == 31
    finally:
        running.close()
    [choice] = body["choices"]
    assert [it["logprob"] for it in choice["logprobs"]["content"]] == [it.logprob for it in alone.logprobs]
    assert (choice["message"]["content"], choice["finish_reason"]) == (alone.text, alone.finish_reason)


def test_an_error_on_the_way_is_sent_at_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if text comes with it."""
    monkeypatch.setattr(generation, "COMMENT_SECONDS", 3600)
    doubling = 'start: r30\nr0: "a"\n' + "\n".join(f"r{i}: r{i - 1} r{i - 1}" for i in range(1, 31))
    response = server.client.post(protocol.COMPLETIONS, json={"prompt": "a", "max_tokens": 8, "grammar": doubling})
    assert response.status_code == 400 and "grammar cannot be used" in response.json()["error"]["message"]


def test_text_is_sent_before_the_error_that_ends_it(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = {"messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = server.post(protocol.CHAT, **asked)["choices"][0]["message"]["content"]

    def late(self: generation.Generation, stream: Any) -> Any:
        raise generation.IncompleteError(504, "late", "deadline_exceeded")

    monkeypatch.setattr(generation.Generation, "_completion", late)
    *events, error = server.events(protocol.CHAT, **asked)
    assert error["error"]["code"] == "deadline_exceeded"
    assert whole and "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == whole


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "greet"}}])
def test_a_call_that_is_required_is_one(server: Running, choice: Any) -> None:
    asked: Any = {"messages": QUESTION, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    asked |= {"max_tokens": 100, "temperature": 1, "seed": 1}
    [whole] = server.post(protocol.CHAT, **asked)["choices"]
    message = whole["message"]
    [call] = message["tool_calls"]
    assert (message["content"], whole["finish_reason"], call["function"]["name"]) == (None, "tool_calls", "greet")
    assert list(json.loads(call["function"]["arguments"])) == ["name"]
    parts = [chunk["choices"][0] for chunk in server.events(protocol.CHAT, **asked)[:-1]]
    [[streamed]] = [part["delta"]["tool_calls"] for part in parts if "tool_calls" in part["delta"]]
    assert (streamed["index"], streamed["function"]) == (0, call["function"])
    assert not any(part["delta"].get("content") for part in parts)
    assert parts[-1]["finish_reason"] == "tool_calls"
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Done."}
    asked |= {"messages": [*QUESTION, message, result], "tool_choice": "auto"}
    assert server.post(protocol.CHAT, **asked)["choices"][0]["message"]["role"] == "assistant"


def test_completions_of_several_prompts(llama: LLM, server: Running) -> None:
    prompts = ["The capital of France is", "1, 2, 3,"]
    body = server.post(protocol.COMPLETIONS, prompt=prompts, n=2, seed=5, logprobs=1)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    for choice in body["choices"]:
        i = choice["index"]
        alone = llama.generate(prompts[i // 2], max_new_tokens=16, seed=5 + i % 2, logprobs=1)
        assert choice["text"] == alone.text
        assert "".join(choice["logprobs"]["tokens"]) == alone.text
    chunks = server.events(protocol.COMPLETIONS, prompt=prompts, n=2, seed=5)[:-1]
    texts = [""] * 4
    for chunk in chunks:
        for part in chunk["choices"]:
            texts[part["index"]] += part["text"]
    assert texts == [choice["text"] for choice in body["choices"]]


def test_echo_scores_the_prompt(llama: LLM, server: Running) -> None:
    ids = llama.tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    body = server.post(protocol.COMPLETIONS, prompt=[ids, ids[:5]], echo=True, max_tokens=1, logprobs=1)
    for choice, asked in zip(body["choices"], (ids, ids[:5]), strict=True):
        logprobs = choice["logprobs"]
        assert choice["text"].startswith(llama.tokenizer.decode(asked))
        assert len(logprobs["token_logprobs"]) == len(asked) + 1
        assert logprobs["token_logprobs"][0] is None
        scores = llama.logits(asked)[:-1].astype("float64")
        scores -= scores.max(axis=1, keepdims=True)
        expected = scores[range(len(asked) - 1), asked[1:]] - np.log(np.exp(scores).sum(axis=1))
        assert logprobs["token_logprobs"][1:-1] == pytest.approx(expected.tolist(), abs=1e-4)
        assert logprobs["text_offset"][:2] == [0, len("The")]
    assert body["usage"]["prompt_tokens"] == len(ids) + 5


def test_echo_alone(llama: LLM, server: Running) -> None:
    asked = {"prompt": "One, two, three", "echo": True, "max_tokens": 0, "logprobs": 0}
    body = server.post(protocol.COMPLETIONS, **asked)
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("One, two, three", "length")
    assert body["usage"]["completion_tokens"] == 0
    ids = llama.tokenizer.encode("One, two, three")
    assert choice["logprobs"]["tokens"] == [llama.tokenizer.token_bytes(i).decode() for i in ids]
    # The token that is there is among the most probable ones, as OpenAI's has it.
    for text, logprob, top in list(zip(*(choice["logprobs"][name] for name in NAMES), strict=True))[1:]:
        assert top == {text: logprob}
    chunks = server.events(protocol.COMPLETIONS, **asked)[:-1]
    assert "".join(part["text"] for chunk in chunks for part in chunk["choices"]) == "One, two, three"


def test_null_is_as_if_it_was_left_out(server: Running) -> None:
    item = {"type": None, "role": "user", "content": "Hi", "id": None, "phase": None}
    nulls = {"reasoning": {"effort": None, "summary": None}, "logprobs": None, "temperature": None, "stop": None}
    assert server.post(protocol.RESPONSES, input=[item], max_output_tokens=2, **nulls)["output"]


def test_text_that_utf_8_cannot_have(server: Running) -> None:
    response = server.client.post(
        protocol.COMPLETIONS,
        content=b'{"prompt": "a\\ud800b", "echo": true, "max_tokens": 1, "stream": false}',
    )
    assert response.json()["choices"][0]["text"].startswith("a?b")
    response = server.client.post(protocol.RESPONSES, content=b'{"input": "a", "user": "\\ud800"}')
    assert response.json()["user"] == "?"


def test_the_app_can_be_mounted_elsewhere(llama: LLM) -> None:
    inner = llamajax.serve.app(llama, name="small", slots=1, api_key="secret")
    outer = Starlette(routes=[Mount("/models/small", inner)])
    outer.state.service = inner.state.service
    running = Running(outer)
    try:
        path, headers = "/models/small", {"Authorization": "Bearer secret"}
        assert running.client.get(f"{path}/v1/models").status_code == 401
        assert running.client.get(f"{path}/").status_code == 200
        assert running.client.get(f"{path}/page/app.js").status_code == 200
        asked = {"messages": QUESTION, "max_tokens": 3}
        assert running.client.post(f"{path}{protocol.CHAT}", json=asked, headers=headers).json()["choices"]
    finally:
        running.close()
        inner.state.service.close()


def test_a_program_ends_while_its_app_compiles(default_model: None) -> None:
    program = """
import time, llamajax, llamajax.serve
service = llamajax.serve.app(llamajax.load(max_seq_len=512)).state.service
while service.state == "loading":
    time.sleep(0.01)
print(service.state)
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "compiling\n", "")


def test_an_app_that_is_closed_compiles_no_more(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    is_compiling, is_closed = threading.Event(), threading.Event()
    note_progress = Service._note_progress

    def wait(self: Service, done: int, total: int) -> None:
        is_compiling.set()
        assert is_closed.wait(30)
        note_progress(self, done, total)

    monkeypatch.setattr(Service, "_note_progress", wait)
    service = llamajax.serve.app(llama, slots=3).state.service
    assert is_compiling.wait(30)
    service.close()
    is_closed.set()
    service._starting.join(30)
    done, total = service._progress
    assert not service._starting.is_alive() and done < total


def test_responses(server: Running) -> None:
    asked = {
        "input": QUESTION,
        "instructions": "Be brief.",
        "max_output_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
    }
    body = server.post(protocol.RESPONSES, **asked)
    [message] = body["output"]
    text = message["content"][0]["text"]
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    events = server.events(protocol.RESPONSES, **asked)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == text
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["usage"] == body["usage"]


def test_calls_in_a_row_are_one_message() -> None:
    calls = [{"type": "function_call", "call_id": i, "name": "greet", "arguments": "{}"} for i in "ab"]
    said = {"role": "assistant", "content": "Well.", "tool_calls": None}
    done = {"type": "function_call_output", "call_id": "b", "output": "Done."}
    [messages] = READERS[protocol.RESPONSES]({"input": [*QUESTION, said, *calls, done, calls[0]]}).prompts
    assert [(it["role"], [call["id"] for call in it.get("tool_calls", [])]) for it in messages] == [
        ("user", []),
        ("assistant", ["a", "b"]),
        ("tool", []),
        ("assistant", ["a"]),
    ]
    with pytest.raises(RequestError, match="tool_calls of a message must be a list"):
        READERS[protocol.RESPONSES]({"input": [said | {"tool_calls": 5}, *calls]})


def test_responses_call_tools(server: Running) -> None:
    """The same answers as a chat's, in another form."""
    asked: Any = {"temperature": 1, "seed": 1, "parallel_tool_calls": False}
    in_chat: Any = asked | {"messages": QUESTION, "tools": [TOOL], "tool_choice": "required", "max_tokens": 100}
    message = server.post(protocol.CHAT, **in_chat)["choices"][0]["message"]
    tool = {"type": "function", "description": None, "strict": None} | TOOL["function"]
    asked |= {"input": QUESTION, "tools": [tool], "tool_choice": "required", "max_output_tokens": 100}
    body = server.post(protocol.RESPONSES, **asked)
    [call] = body["output"]
    assert (body["status"], body["tools"], body["tool_choice"]) == ("completed", [tool], "required")
    assert {name: call[name] for name in ("type", "name", "arguments")} == {
        "type": "function_call",
        **message["tool_calls"][0]["function"],
    }
    events = server.events(protocol.RESPONSES, **asked)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    [streamed] = events[-1]["response"]["output"]
    assert streamed == events[-2]["item"] == call | {name: streamed[name] for name in ("id", "call_id")}
    assert {event["item_id"] for event in events if "item_id" in event} == {streamed["id"]}

    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "Done."}
    in_chat |= {"messages": [*QUESTION, message, result], "tool_choice": "auto"}
    done = {"type": "function_call_output", "call_id": call["call_id"], "output": "Done."}
    asked |= {"input": [*QUESTION, call, done], "tool_choice": "auto"}
    [said] = server.post(protocol.RESPONSES, **asked)["output"]
    assert said["content"][0]["text"] == server.post(protocol.CHAT, **in_chat)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("url", "body", "status", "says"),
    [
        (protocol.CHAT, {"messages": QUESTION, "model": "gpt-4"}, 404, "there is no model 'gpt-4' here"),
        (protocol.CHAT, {"messages": []}, 400, "at least one message"),
        (protocol.CHAT, {"messages": QUESTION, "tools": [{"type": "function"}]}, 400, "each of tools must be of type"),
        (protocol.CHAT, {"messages": QUESTION, "regex": "(?=a)"}, 400, "look-around"),
        (protocol.CHAT, {"messages": QUESTION, "temperature": -1}, 400, "temperature must be"),
        (protocol.CHAT, {"messages": QUESTION, "max_tokenz": 3}, 400, "did you mean max_tokens"),
        (protocol.CHAT, {"messages": QUESTION, "stream": "yes"}, 400, "stream must be true or false"),
        (protocol.CHAT, {"messages": [{"role": "user", "content": "x " * 600}]}, 400, "context length is 512"),
        (protocol.CHAT, {"messages": QUESTION, "response_format": {"type": "xml"}}, 400, "response_format must be"),
        (protocol.RESPONSES, {"input": "Hi", "n": 2}, 400, "n is not supported in responses"),
        (protocol.RESPONSES, {"input": "Hi", "logprobs": True}, 400, "logprobs is not supported in responses"),
        (protocol.RESPONSES, {"input": "Hi", "top_logprobs": 2}, 400, "top_logprobs is not supported in responses"),
        (protocol.CHAT, {"messages": QUESTION, "echo": True}, 400, "echo is not supported"),
        (protocol.COMPLETIONS, {}, 400, "expected a prompt"),
        (protocol.COMPLETIONS, {"prompt": ["x"] * 13}, 400, "may ask for 12 answers, not 13"),
        (protocol.COMPLETIONS, {"prompt": [999999]}, 400, "token ids must be from 0"),
        (protocol.RESPONSES, {"input": [{"type": "reasoning"}]}, 400, "'reasoning' is not supported: only messages"),
        (protocol.RESPONSES, {"input": [{"type": "function_call"}]}, 400, "a function_call of input needs a call_id"),
        (protocol.RESPONSES, {"input": [{"type": "function_call_output"}]}, 400, "content must be a string"),
        (protocol.RESPONSES, {"input": "x", "tools": [{"type": "web_search"}]}, 400, "each of tools must be of type"),
        (protocol.RESPONSES, {"input": "x", "previous_response_id": "resp_1"}, 400, "previous_response_id is not"),
        (protocol.RESPONSES, {"input": "x", "top_logprobs": 3}, 400, "top_logprobs is not supported in responses"),
        (protocol.CHAT, {"messages": QUESTION, "stream_options": {"continuous_usage_stats": True}}, 400, "continuous"),
        (protocol.CHAT, {"messages": QUESTION, "x" * 100_000: 1}, 400, "unknown field"),
        (protocol.COMPLETIONS, {"prompt": [""] * 100_000, "n": 128}, 400, "may ask for 12 answers, not 12800000"),
        (protocol.COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be"),
        (protocol.CHAT, {"guided_json": {"enum": [[]] * 250_000}}, 400, "the body may have 250,000 objects, lists, na"),
        (protocol.CHAT, {"guided_json": {"enum": [1.5, 1e-9] * 125_000}}, 400, "the body may have 250,000 objects"),
        (
            protocol.COMPLETIONS,
            {"prompt": "x", "guided_choice": ["x"] * 500_001},
            400,
            "guided_choice may have 1,000,000",
        ),
        ("/tokenize", {"prompt": [[]] * 250_000}, 400, "the body may have 250,000 objects"),
        (protocol.CHAT, {"messages": [called("[0.5]," * 130_000)]}, 400, "arguments of calls may have 250,000 objects"),
        (protocol.COMPLETIONS, {"prompt": '{"a":[0.5],' * 250_000}, 400, "context length is 512"),
        ("/tokenize", {}, 400, "expected a prompt"),
        ("/tokenize", {"prompt": "x " * 500_001}, 400, "/tokenize takes 1,000,000 characters, not 1,000,002"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x " * 500_001}]}, 400, "takes 1,000,000 characters"),
        ("/detokenize", {"tokens": [-1]}, 400, "each of tokens"),
        ("/detokenize", {"tokens": [1] * 250_001}, 400, "/detokenize takes 250,000 tokens, not 250,001"),
        ("/v1/embeddings", {}, 404, "there is no /v1/embeddings here"),
    ],
)
def test_what_cannot_be_answered_is_said(
    server: Running, url: str, body: dict[str, Any], status: int, says: str
) -> None:
    response = server.client.post(url, json=body)
    error = response.json()["error"]
    assert (response.status_code, says in error["message"]) == (status, True), error
    assert set(error) == {"message", "type", "param", "code"}


def test_errors_have_codes_and_names(server: Running) -> None:
    long = server.client.post(protocol.COMPLETIONS, json={"prompt": "x " * 600, "model": "small"}).json()["error"]
    assert (long["code"], long["param"]) == ("context_length_exceeded", "prompt")
    wrong = server.client.post(protocol.CHAT, json={"messages": QUESTION, "top_p": 7}).json()["error"]
    assert (wrong["param"], wrong["type"]) == ("top_p", "invalid_request_error")
    for body in (b"", b"{", b"[1]", b"\xff", b'{"a":1,"a":2}', b"[" * 100_000):
        response = server.client.post(protocol.CHAT, content=body)
        assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["[", "a b", "x:y", ""])
def test_a_path_that_there_is_not_whatever_the_host(server: Running, host: str) -> None:
    for path in ("/nothing", "/health/", "/v1/%0a%ff", "/" + "a" * 5000):
        response = server.client.get(path, headers={"Host": host})
        assert (response.status_code, response.headers["content-type"]) == (404, "application/json")
        assert len(response.json()["error"]["message"]) < 200


def test_a_body_that_does_not_come_ends_the_connection(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.1)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"POST {protocol.CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode())
        data = b""
        while part := connection.recv(1000):
            data += part
    assert data.startswith(b"HTTP/1.1 408 ") and json.loads(data.partition(b"\r\n\r\n")[2])["error"]


def test_a_full_queue_is_a_429(server: Running) -> None:
    asked = {"prompt": ["x"] * 8, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with (
        server.client.stream("POST", protocol.COMPLETIONS, json=asked),
        server.client.stream("POST", protocol.COMPLETIONS, json=asked) as second,
        server.client.stream("POST", protocol.COMPLETIONS, json=asked) as third,
    ):
        statuses = [second.status_code, third.status_code]
        assert 429 in statuses
        assert third.headers["retry-after"]
    server.wait_until_idle()


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_row(server: Running, streams: bool) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": streams}).encode()
    head = f"POST {protocol.CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
        connection.settimeout(0.005)
        said = b""
        while not server.service.server.num_running:
            with suppress(TimeoutError):
                said += connection.recv(10_000)
            assert b'finish_reason":"' not in said and b"error" not in said, said
    server.wait_until_idle(2)  # 400 tokens would take longer
    assert server.post(protocol.CHAT, messages=QUESTION, max_tokens=2)["usage"]["completion_tokens"] <= 2


def test_what_the_server_is(llama: LLM, server: Running) -> None:
    client = server.client
    while client.get("/health").status_code == 503:
        time.sleep(0.1)
    assert client.get("/health").json() == {"status": "ready"}
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("small", 512)
    assert client.get("/v1/models/small").json() == model
    assert client.get("/v1/models/large").status_code == 404
    ids = server.post("/tokenize", prompt="Hello, world")["tokens"]
    assert ids == llama.tokenizer.encode("Hello, world")
    assert server.post("/detokenize", tokens=ids) == {"prompt": "Hello, world"}
    assert server.post("/tokenize", messages=QUESTION)["tokens"] == llama.encode_chat(QUESTION)
    thinks = {"chat_template_kwargs": {"enable_thinking": False}}  # which this model's template does not read
    assert server.post("/tokenize", messages=QUESTION, **thinks)["tokens"] == llama.encode_chat(QUESTION)
    assert server.post(protocol.CHAT, messages=QUESTION, max_tokens=1, **thinks)["usage"]["completion_tokens"] == 1
    wrong = client.post(protocol.CHAT, json={"messages": QUESTION, "chat_template_kwargs": "no"})
    assert (wrong.status_code, "must be an object" in wrong.json()["error"]["message"]) == (400, True)
    info = client.get("/tokenizer_info").json()
    assert info["vocab_size"] == llama.config.vocab_size
    assert (info["bos_token"], info["eos_token"]) == (None, "<|im_end|>")
    metrics = client.get("/metrics").text
    assert 'vllm:num_requests_running{model_name="small"} 0.0' in metrics
    assert 'vllm:request_success_total{finished_reason="length",model_name="small"}' in metrics


def test_the_description_names_each_field(server: Running) -> None:
    described = server.client.get("/openapi.json").json()
    assert described == openapi.schema()
    fields = described["paths"][protocol.CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(fields["properties"]) >= protocol.SUPPORTED_FIELDS - {"max_output_tokens", "text"}
    page = server.client.get("/docs").text
    assert all(path in page for path in described["paths"])


def test_a_key_is_needed(llama: LLM) -> None:
    """One from a file may end in a newline."""
    running = Running(llamajax.serve.app(llama, name="small", slots=1, api_key="secret\n", cors=["https://a.example"]))
    try:
        client = running.client
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer"},
        ):
            response = client.post(protocol.CHAT, json={"messages": QUESTION}, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code in (200, 503)
        assert client.get("/").status_code == 200
        origin = {"Origin": "https://a.example"}
        assert client.post(protocol.CHAT, headers=origin).headers["access-control-allow-origin"] == "https://a.example"
        assert (
            "access-control-allow-origin" not in client.get("/health", headers={"Origin": "https://b.example"}).headers
        )
    finally:
        running.close()


def test_an_empty_key_is_refused(llama: LLM) -> None:
    with pytest.raises(RequestError, match="the API key is empty"):
        llamajax.serve.app(llama, api_key="")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_said(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    service = llamajax.serve.app(llama, name="small", slots=1).state.service
    while service.state == "loading":
        time.sleep(0.01)

    def fails() -> bool:
        raise SystemExit

    monkeypatch.setattr(service.server._engine, "step", fails)
    service.server.submit("x")
    service.server._concurrent._thread.join()
    assert (service.state, service.is_alive) == ("failed", False)
    with pytest.raises(UnavailableError, match="the engine has stopped"):
        _ = service.server
    service.stop(1)
    service.close()
    assert service.state == "failed" and service.error


def test_too_little_memory_is_no_fault_of_the_request() -> None:
    assert [error_status(error("x")) for error in (DeviceMemoryError, PromptTooLongError)] == [503, 400]


def test_stopping_lets_what_runs_end(llama: LLM) -> None:
    service = llamajax.serve.app(llama, name="small", slots=1, max_waiting=3).state.service
    while service.state == "loading":
        time.sleep(0.01)
    streams: list[ServedStream] = []
    service.submit(READERS[protocol.COMPLETIONS]({"prompt": ["x", "y"], "max_tokens": 30, "ignore_eos": True}), streams)
    service.stop(60)
    with pytest.raises(UnavailableError, match="stopping"):
        service.submit(READERS[protocol.COMPLETIONS]({"prompt": "z"}), streams)
    assert [stream.finish().finish_reason for stream in streams] == ["length"] * 2
    service.close()
    assert service.state == "stopping"


def test_a_long_body_that_is_allowed_is_read_whole(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_MAX_DROPPED_BYTES", 1000)
    running = Running(llamajax.serve.app(llama, name="small", slots=1, max_body_bytes=5_000_000))
    try:
        response = running.client.post("/tokenize", json={"prompt": "x " * 400_000})
        assert response.status_code == 200 and response.json()["count"] > 100_000
    finally:
        running.close()


def test_a_body_that_is_too_long(llama: LLM) -> None:
    running = Running(llamajax.serve.app(llama, name="small", slots=1, max_body_bytes=1000, deadline=0.02))
    try:
        response = running.client.post(protocol.COMPLETIONS, json={"prompt": "x" * 5_000_000})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        late = running.client.post(protocol.CHAT, json=LONG)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert running.events(protocol.CHAT, **LONG)[-1]["error"]["code"] == "deadline_exceeded"
    finally:
        running.close()
