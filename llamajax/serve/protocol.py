"""Requests and answers as JSON, in OpenAI's form: what a request's fields mean, and what an answer looks like.

Unknown fields and nulls are ignored, as OpenAI's clients expect; what would change the answer but is not supported
is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any

from llamajax.errors import RequestError
from llamajax.tokenizers.base import Tokenizer
from llamajax.types import Completion, Message, SamplingParams

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

Prompt = str | Sequence[Message] | Sequence[int]

_SAMPLING = {field.name for field in fields(SamplingParams)} - {"logprobs"}
# What is not supported, and the value with which it does nothing.
_UNSUPPORTED: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
}


def read_messages(body: Mapping[str, Any]) -> list[Message]:
    """The conversation that a request asks to be continued.

    Raises RequestError for what is not one.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RequestError("messages must be a list of objects with a role and a content")
    return [
        {"role": "system" if message.get("role") == "developer" else message.get("role", ""), "content": _text(message)}
        for message in messages
    ]


def read_prompt(body: Mapping[str, Any]) -> str | list[int]:
    """The one text, or the token ids, that a request asks to be continued.

    Raises RequestError for what is neither.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        [prompt] = prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)):
        return prompt
    raise RequestError("expected messages, or a prompt: one text, or one list of token ids")


def read_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says of its answer, as options of `LLM.stream`, which checks the values.

    Raises RequestError for what is not supported.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in _UNSUPPORTED.items():
        if given.get(name, neutral) != neutral:
            raise RequestError(f"{name} is not supported: leave it out")
    options = {name: given[name] for name in _SAMPLING & given.keys()}
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):  # the last one counts
        if name in given:
            options["max_new_tokens"] = given[name]
    if "stop" in given:
        if not isinstance(given["stop"], str | list):
            raise RequestError(f"stop must be one string or several, not {given['stop']!r:.80}")
        options["stop"] = given["stop"]
    # A chat asks with a boolean, and counts in another field.
    logprobs = given.get("logprobs")
    if isinstance(logprobs, bool):
        logprobs = given.get("top_logprobs", 0) if logprobs else None
    if logprobs is not None:
        options["logprobs"] = logprobs
    return options


def usage(completion: Completion) -> dict[str, int]:
    """What an answer took."""
    generated = len(completion.token_ids)
    return {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": completion.prompt_tokens + generated,
    }


def chat_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Of an answer's tokens, as a chat tells them; None if they were not asked for."""
    if completion.logprobs is None:
        return None

    def told(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            told(i, at.logprob) | {"top_logprobs": [told(*top) for top in at.top]}
            for i, at in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    }


def answer_body(
    url: str, completion: Completion, tokenizer: Tokenizer, *, number: int, created: int, model: str
) -> dict[str, Any]:
    """The object that an endpoint answers with."""
    choice: dict[str, Any] = {"index": 0}
    if url == CHAT:
        choice["message"] = {"role": "assistant", "content": completion.text}
    else:
        choice["text"] = completion.text
    choice["logprobs"] = (chat_logprobs if url == CHAT else _text_logprobs)(completion, tokenizer)
    choice["finish_reason"] = completion.finish_reason
    return {
        "id": f"{'chatcmpl' if url == CHAT else 'cmpl'}-{number}",
        "object": "chat.completion" if url == CHAT else "text_completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": usage(completion),
    }


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    raise RequestError(f"a message's content must be a string or a list of text parts, not {content!r:.80}")


def _text_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None

    def text(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode(errors="replace")

    tokens = [text(i) for i in completion.token_ids]
    return {
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=0))[: len(tokens)],
        "token_logprobs": [at.logprob for at in completion.logprobs],
        "tokens": tokens,
        "top_logprobs": [{text(i): logprob for i, logprob in at.top} for at in completion.logprobs],
    }
