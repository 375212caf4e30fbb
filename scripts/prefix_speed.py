"""What it saves that prompts which begin alike are read once: with and without, in turns.

    python -m scripts.prefix_speed [ROUNDS]

A system prompt of 1,000 tokens and questions of 30, each answered with 16 tokens, by the default model: the time to the
first token of the first question and of the next one, and tokens a second of 32 questions that come together. Then 32
prompts that share nothing, as long as a question.
"""

import sys
import time
from statistics import median

import llamajax
from llamajax.bench.workload import synthetic
from llamajax.types import SamplingParams

NUM_SYSTEM, NUM_QUESTION, NEW_TOKENS, SLOTS = 1000, 30, 16, 32
GREEDY = SamplingParams(temperature=0)


def random_prompts(llm: llamajax.LLM, count: int, length: int, seed: int) -> list[list[int]]:
    lengths = [length]
    return synthetic(count, lengths, 1, vocab_size=llm.config.vocab_size, sampling=GREEDY, seed=seed).prompts


def first_tokens(llm: llamajax.LLM, prompts: list[list[int]], prefix_cache: int | None) -> list[float]:
    """Seconds to the first token of each prompt, one after the other."""
    with llm.serve_requests(slots=1, prefix_cache=prefix_cache) as server:
        options = {"max_new_tokens": 1, "sampling": GREEDY, "ignore_eos": True}
        return [server.submit(prompt, **options).finish().timings.time_to_first_token for prompt in prompts]


def tokens_per_second(llm: llamajax.LLM, prompts: list[list[int]], prefix_cache: int | None) -> float:
    options = {"max_new_tokens": NEW_TOKENS, "sampling": GREEDY, "ignore_eos": True}
    began = time.perf_counter()
    answers = list(llm.stream_batch([(p, options) for p in prompts], slots=SLOTS, prefix_cache=prefix_cache))
    assert all(isinstance(answer, llamajax.Completion) for _, answer in answers)
    return len(prompts) * NEW_TOKENS / (time.perf_counter() - began)


def main(rounds: int) -> None:
    llm = llamajax.load(max_seq_len=2048)
    firsts, nexts, shared, unshared = [], [], [], []
    for number in range(-1, rounds):  # the first one compiles
        system, *_ = random_prompts(llm, 1, NUM_SYSTEM, 2 * number + 2)
        questions = random_prompts(llm, SLOTS, NUM_QUESTION, 2 * number + 3)
        together = [[*system, *question] for question in questions]
        first, later = first_tokens(llm, together[:2], None)
        sizes = (None, 0) if number % 2 else (0, None)
        alike = {size: tokens_per_second(llm, together, size) for size in sizes}
        unlike = {size: tokens_per_second(llm, questions, size) for size in sizes}
        if number < 0:
            continue
        firsts.append(first)
        nexts.append(later)
        shared.append(alike[None] / alike[0])
        unshared.append(unlike[None] / unlike[0])
        print(
            f"round {number + 1}: first token {1000 * first:.0f} ms, next {1000 * later:.0f} ms; {SLOTS} together "
            f"{alike[None]:.0f} : {alike[0]:.0f} tokens/s; nothing shared {unlike[None]:.0f} : {unlike[0]:.0f}",
            flush=True,
        )
    print(f"next over first {median(b / a for a, b in zip(firsts, nexts, strict=True)):.3f}")
    print(f"{SLOTS} together {median(shared):.2f} times")
    print(f"nothing shared {median(unshared):.3f} times")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
