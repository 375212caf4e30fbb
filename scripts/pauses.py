"""How long running answers pause during the prefill of other prompts.

    python -m scripts.pauses [ROUNDS]

Four answers of the default model run. Then four prompts of 480 tokens come. Each round prints the longest time that
one of the four waited between two pieces of its text, and the seconds until all the prompts have their first token.
"""

import itertools
import sys
import threading
import time

import llamajax
from llamajax.bench.workload import synthetic
from llamajax.types import SamplingParams

NUM_RUNNING, NUM_PROMPTS, PROMPT_LEN = 4, 4, 480
GREEDY = SamplingParams(temperature=0)


def main(rounds: int) -> None:
    llm = llamajax.load()
    with llm.serve_requests(slots=NUM_RUNNING + NUM_PROMPTS, prefix_cache=0) as server:
        server.compile()
        for seed in range(rounds):
            arrivals: list[list[float]] = [[] for _ in range(NUM_RUNNING)]

            def read(index: int, seed: int = seed, arrivals: list[list[float]] = arrivals) -> None:
                for _ in server.submit([seed + 1, index + 1], max_new_tokens=200, sampling=GREEDY, ignore_eos=True):
                    arrivals[index].append(time.perf_counter())

            readers = [threading.Thread(target=read, args=(index,)) for index in range(NUM_RUNNING)]
            for reader in readers:
                reader.start()
            time.sleep(0.5)
            prompts = synthetic(
                NUM_PROMPTS, [PROMPT_LEN], 1, vocab_size=llm.config.vocab_size, sampling=GREEDY, seed=seed
            ).prompts
            began = time.perf_counter()
            streams = [server.submit(prompt, max_new_tokens=1, sampling=GREEDY) for prompt in prompts]
            for stream in streams:
                stream.finish()
            seconds = time.perf_counter() - began
            for reader in readers:
                reader.join()
            pause = max(later - earlier for times in arrivals for earlier, later in itertools.pairwise(times))
            print(f"round {seed + 1}: longest pause {pause:.2f} s, prompts read after {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
