"""Answers and errors as JSON, in OpenAI's form."""

import re
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

from llamajax.errors import LlamaJaxError, PromptTooLongError, RequestError
from llamajax.text import one_line
from llamajax.tokenizers.base import Tokenizer
from llamajax.types import Completion

from .protocol import CHAT


def usage(completions: Sequence[Completion]) -> dict[str, int]:
    """What the answers to one prompt took."""
    prompt_tokens = completions[0].prompt_tokens
    generated = sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


def chat_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Of an answer's tokens, as a chat gives them; None if they were not asked for."""
    if completion.logprobs is None:
        return None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            entry(i, at.logprob) | {"top_logprobs": [entry(*top) for top in at.top]}
            for i, at in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    }


def answer_body(
    url: str, completions: Sequence[Completion], tokenizer: Tokenizer, *, number: int, created: int, model: str
) -> dict[str, Any]:
    """The object that an endpoint answers with; each completion is a choice."""
    is_chat = url == CHAT
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{number}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                **({"message": {"role": "assistant", "content": it.text}} if is_chat else {"text": it.text}),
                "logprobs": (chat_logprobs if is_chat else _text_logprobs)(it, tokenizer),
                "finish_reason": it.finish_reason,
            }
            for index, it in enumerate(completions)
        ],
        "usage": usage(completions),
    }


def error_status(error: LlamaJaxError) -> int:
    """The HTTP status: 400 if the request must change, 500 if it is not the request's fault."""
    return 400 if isinstance(error, RequestError | PromptTooLongError) else 500


def error_body(error: LlamaJaxError, names: Collection[str]) -> dict[str, Any]:
    """The object that an endpoint answers a bad request with.

    Args:
      error: what is wrong.
      names: the fields of the request, one of which may be to blame.
    """
    message = one_line(error)
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error" if error_status(error) == 400 else "server_error",
            "param": next((word for word in re.findall(r"\w+", message) if word in names), None),
            "code": "context_length_exceeded" if isinstance(error, PromptTooLongError) else None,
        }
    }


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
