"""Speed of one stream beside llama.cpp: the same file, the same prompt, two threads, in one run.

    pip install llama-cpp-python
    python scripts/compare_llamacpp.py [--model FILE.gguf] [--rounds 5]

The two take turns, so that a drift of the machine's speed hits both. Each round decodes greedily after a short
prompt, and reads a long one. Prints every round, the medians and their ratios.
"""

import argparse
import statistics
import time
from pathlib import Path

import llama_cpp

import llamajax
from llamajax import hub

DECODE_PROMPT = "Once upon a time, in a village by the sea, there lived"
DECODE_TOKENS = 128
PREFILL_TOKENS = 512
THREADS = 2

Speeds = dict[str, float]


def llamajax_round(llm: llamajax.LLM, long_prompt: str) -> Speeds:
    decoded = llm.generate(DECODE_PROMPT, max_new_tokens=DECODE_TOKENS, temperature=0)
    read = llm.generate(long_prompt, max_new_tokens=1, temperature=0)
    assert decoded.cached_tokens < 2 and read.cached_tokens < 2, "the prompts must not be in the cache"
    return {
        "decode": decoded.tokens_per_second,
        "prefill": read.prompt_tokens / read.timings.time_to_first_token,
    }


def llamacpp_round(llama: llama_cpp.Llama, long_prompt: str) -> Speeds:
    llama.reset()
    times = []
    for _ in llama.create_completion(DECODE_PROMPT, max_tokens=DECODE_TOKENS, temperature=0, stream=True):
        times.append(time.perf_counter())
    # The last chunk only says why it ended.
    decode = (len(times) - 2) / (times[-2] - times[0])
    llama.reset()
    began = time.perf_counter()
    answer = llama.create_completion(long_prompt, max_tokens=1, temperature=0)
    prefill = answer["usage"]["prompt_tokens"] / (time.perf_counter() - began)
    return {"decode": decode, "prefill": prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; the default model if left out")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = arguments.model or hub.resolve(hub.DEFAULT)

    ours = llamajax.load(path, device="cpu")
    theirs = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
    ids = ours.tokenizer.encode(" ".join(f"The number {i} comes before {i + 1}." for i in range(200)))
    long_prompt = ours.tokenizer.decode(ids[:PREFILL_TOKENS])

    llamajax_round(ours, long_prompt)  # compiles
    llamacpp_round(theirs, long_prompt)
    rounds = []
    for number in range(arguments.rounds):
        rounds.append((llamajax_round(ours, long_prompt), llamacpp_round(theirs, long_prompt)))
        print(
            f"round {number + 1}: "
            + "; ".join(f"{k} {rounds[-1][0][k]:.1f} : {rounds[-1][1][k]:.1f}" for k in rounds[-1][0])
        )
    for name in rounds[0][0]:
        a, b = (statistics.median(r[side][name] for r in rounds) for side in (0, 1))
        print(f"{name}: llamajax {a:.1f}, llama.cpp {b:.1f} tokens/s, ratio {a / b:.2f}")


if __name__ == "__main__":
    main()
