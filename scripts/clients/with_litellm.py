"""LiteLLM, unchanged, against a server; README.md says how to start both.

pip install litellm
LITELLM_LOCAL_MODEL_COST_MAP=True python scripts/clients/with_litellm.py http://127.0.0.1:8123
"""

import asyncio
import sys
from typing import Any

import checks
import httpx
import litellm

url, key = (*sys.argv[1:], "secret")[:2]
served = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"][0]["id"]
messages = [{"role": "user", "content": "Tell me a story about a llama."}]
asked: dict[str, Any] = {
    "model": f"openai/{served}",
    "api_base": f"{url}/v1",
    "api_key": key,
    "max_tokens": 20,
    "seed": 7,
    "num_retries": 0,
}


def chat() -> None:
    answer = litellm.completion(messages=messages, **asked)
    assert answer.choices[0].message.content
    assert 0 < answer.usage.completion_tokens <= 20


def chat_stream() -> None:
    answer = litellm.completion(messages=messages, **asked)
    chunks = list(litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **asked))
    whole = litellm.stream_chunk_builder(chunks, messages=messages)
    assert whole.choices[0].message.content == answer.choices[0].message.content
    assert whole.choices[0].finish_reason == answer.choices[0].finish_reason
    assert whole.usage.total_tokens == answer.usage.total_tokens


def chat_async() -> None:
    async def ask() -> Any:
        return await asyncio.gather(*(litellm.acompletion(messages=messages, **asked) for _ in range(4)))

    answers = {answer.choices[0].message.content for answer in asyncio.run(ask())}
    assert len(answers) == 1


def text_completion() -> None:
    options = asked | {"model": f"text-completion-openai/{served}"}
    answer = litellm.text_completion(prompt="Once upon a time", **options)
    chunks = litellm.text_completion(prompt="Once upon a time", stream=True, **options)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == answer.choices[0].text


def responses() -> None:
    options = asked | {"max_output_tokens": 20, "temperature": 0}
    for name in ("max_tokens", "seed"):
        del options[name]
    answer = litellm.responses(input="Tell me a story.", **options)
    assert answer.output[0].content[0].text
    deltas = [
        event.delta
        for event in litellm.responses(input="Tell me a story.", stream=True, **options)
        if event.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == answer.output[0].content[0].text


def errors() -> None:
    for changes, expected in (
        ({"top_p": 2}, litellm.BadRequestError),
        ({"messages": [{"role": "user", "content": "llama " * 20_000}]}, litellm.ContextWindowExceededError),
        ({"api_key": "wrong"}, litellm.AuthenticationError),
        ({"model": "openai/gpt-4"}, litellm.NotFoundError),
    ):
        try:
            litellm.completion(**{"messages": messages} | asked | changes)
        except expected:
            continue
        raise AssertionError(f"no {expected.__name__}")


checks.run(chat, chat_stream, chat_async, text_completion, responses, errors)
