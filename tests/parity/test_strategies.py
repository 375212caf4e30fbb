"""The three strategies give the same tokens for the same requests: the default model, bit for bit."""

import random
from pathlib import Path
from typing import Any

import pytest

from llamajax import LLM, load
from llamajax.ops import native
from llamajax.types import CacheDType, DType

TEXTS = ("The history of", "In the beginning", "Q: What is 7 times 6?\nA:", "import numpy as", "Llamas are")


def mixed_requests() -> list[tuple[Any, dict[str, Any]]]:
    rng = random.Random(0)
    requests: list[tuple[Any, dict[str, Any]]] = []
    for number in range(30):
        prompt: Any = " ".join(rng.choice(TEXTS) for _ in range(rng.choice((1, 2, 8, 30))))
        if number % 3 == 0:
            prompt = [{"role": "user", "content": prompt}]
        options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 40), "temperature": rng.choice((0, 0.7, 1.2))}
        options |= rng.choice(({}, {"top_k": 40}, {"min_p": 0.05}, {"repetition_penalty": 1.2}))
        options |= rng.choice(
            ({}, {"logit_bias": {token: rng.uniform(-9, 9) for token in rng.sample(range(49152), 300)}})
        )
        options |= rng.choice(
            (
                {},
                {
                    "stop_token_ids": rng.sample(range(3000), 90),
                    "min_tokens": options["max_new_tokens"] // 2,
                    "stop": "e",
                },
            )
        )
        requests.append((prompt, {**options, "seed": number - 2**40 * (number % 3), "ignore_eos": number % 2 == 0}))
    return requests


SCHEMA = {"properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}
CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"json_schema": {**SCHEMA, "type": "object", "additionalProperties": False}},
    {"regex": "[a-z ]{5,60}"},
    {"regex": "(very )*good", "ignore_eos": True, "logprobs": 3},
    {"grammar": 'start: "(" start ")" | /[0-9]+/', "min_tokens": 3, "stop": "7"},
    {"regex": "([a-z ]|[0-9]{2})*", "temperature": 1, "frequency_penalty": 0.1, "logprobs": 1, "max_new_tokens": 120},
    {},
    {},
)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [("auto", "auto"), ("auto", "int8"), ("bfloat16", "auto")])
def test_the_strategies_agree(smollm2_gguf: Path, dtype: DType, cache_dtype: CacheDType) -> None:
    if cache_dtype == "int8" and not native.available():
        pytest.skip("a cache of int8 is for the native kernels")
    agree(load(smollm2_gguf, max_seq_len=256, dtype=dtype, cache_dtype=cache_dtype), mixed_requests())


def test_the_strategies_agree_under_constraints(smollm2_gguf: Path) -> None:
    requests = [
        (prompt, options | {"max_new_tokens": 40} | CONSTRAINTS[number % len(CONSTRAINTS)])
        for number, (prompt, options) in enumerate(mixed_requests()[:14])
    ]
    agree(load(smollm2_gguf, max_seq_len=256), [*requests, ([1], {"regex": "a*", "max_new_tokens": 9})])


def test_masks_from_the_host_and_masks_that_steps_ask_for_agree(smollm2_gguf: Path) -> None:
    if not native.available():
        pytest.skip("only steps of the native kernels ask")
    llama = load(smollm2_gguf, max_seq_len=256)
    for limit in (3, 17, 60):
        for options in CONSTRAINTS:
            options = {"seed": limit, "max_new_tokens": limit, **options}
            asking = llama.generate("Llamas are", **options)
            llama._runner.can_ask = False
            masked = llama.generate("Llamas are", **options)
            llama._runner.can_ask = True
            assert (asking.token_ids, asking.finish_reason, asking.logprobs) == (
                masked.token_ids,
                masked.finish_reason,
                masked.logprobs,
            )


def agree(llama: LLM, requests: list[tuple[Any, dict[str, Any]]]) -> None:
    sequential = [llama.stream(prompt, **options).finish() for prompt, options in requests]
    with llama.serve_requests(slots=8) as server:
        concurrent = [stream.finish() for stream in [server.submit(prompt, **options) for prompt, options in requests]]
    batched = dict(llama.stream_batch(requests, slots=8))
    for number, alone in enumerate(sequential):
        for other in (concurrent[number], batched[number]):
            assert not isinstance(other, Exception)
            assert (other.token_ids, other.text, other.finish_reason, other.logprobs) == (
                alone.token_ids,
                alone.text,
                alone.finish_reason,
                alone.logprobs,
            )
