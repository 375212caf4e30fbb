"""Whether shared prefixes change anything: random requests alone, concurrent and batched, with and without them.

    python -m scripts.prefix_bits [REQUESTS]

Prompts of the default model that begin with up to three of a few pieces, so that many share pages, and a cache so small
that pages are forgotten again and again. Token ids and log-probabilities must be the same to the last bit.
"""

import random
import sys
from typing import Any

import llamajax

SMALL = 3_000_000  # bytes: two pages of 64 positions
PIECES, SLOTS = 6, 8

Answer = tuple[list[int], Any]


def random_requests(llm: llamajax.LLM, count: int) -> list[tuple[list[int], dict[str, Any]]]:
    rng = random.Random(0)

    def draw(length: int) -> list[int]:
        return rng.choices(range(1000, llm.config.vocab_size), k=length)

    pieces = [draw(rng.choice((40, 64, 70, 128, 200))) for _ in range(PIECES)]
    return [
        (
            [token for piece in rng.choices(pieces, k=rng.randint(0, 3)) for token in piece] + draw(rng.randint(1, 40)),
            {
                "max_new_tokens": rng.randint(1, 24),
                "temperature": rng.choice((0, 0.8)),
                "seed": number,
                "logprobs": rng.choice((None, 2)),
                "ignore_eos": True,
            },
        )
        for number in range(count)
    ]


def main(count: int) -> None:
    llm = llamajax.load(max_seq_len=1024)
    requests = random_requests(llm, count)
    expected = [kept(llm.stream(prompt, **options).finish()) for prompt, options in requests]
    for size in (0, SMALL, None):
        with llm.serve_requests(slots=SLOTS, prefix_cache=size) as server:
            streams = [server.submit(prompt, **options) for prompt, options in requests]
            concurrent = [kept(stream.finish()) for stream in streams]
        answers = sorted(llm.stream_batch(requests, slots=SLOTS, prefix_cache=size))
        batched = [kept(answer) for _, answer in answers]
        cached = sum(answer.cached_tokens for _, answer in answers)
        wrong = [sum(a != b for a, b in zip(found, expected, strict=True)) for found in (concurrent, batched)]
        print(f"prefix cache {size}: {wrong[0]} concurrent and {wrong[1]} batched of {count} differ; {cached} cached")


def kept(answer: Any) -> Answer:
    return answer.token_ids, answer.logprobs


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
