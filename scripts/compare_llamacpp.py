"""Speed beside llama.cpp: the same file, the same tokens, two threads, in one run.

    pip install llama-cpp-python
    python scripts/compare_llamacpp.py [--model FILE.gguf] [--rounds 5]

The two take turns, so that a drift of the machine's speed hits both. Each round decodes one stream, greedily, decodes
32 at once, their prompts' reading included, and reads a prompt of 512 tokens. llama.cpp is driven through its C
interface, which adds no more than the choice of the most probable token. Prints every round, then the medians of the
speeds and of the rounds' ratios.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

import llamajax
from llamajax import hub

PROMPT = "Once upon a time, in a village by the sea, there lived"
DECODE_TOKENS, STREAMS, STREAM_TOKENS, PREFILL_TOKENS = 128, 32, 64, 512
THREADS = 2

Speeds = dict[str, float]


class LlamaCpp:
    """One model, with room for STREAMS sequences."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_backend_init()
        log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(log, None)
        self._log = log  # not to be collected
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = STREAMS * 128
        params.n_batch = params.n_ubatch = PREFILL_TOKENS
        params.n_seq_max = STREAMS
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = THREADS
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(PREFILL_TOKENS, 0, STREAMS)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def decode(self, prompt: Sequence[int], num_tokens: int, streams: int) -> float:
        """Tokens a second, of all streams; of one, the time to its first token does not count."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        began = time.perf_counter()
        scores = self._step([(id, at, stream) for stream in range(streams) for at, id in enumerate(prompt)])
        tokens = np.repeat(scores.argmax(axis=1), streams)
        if streams == 1:
            began = time.perf_counter()
        for at in range(len(prompt), len(prompt) + num_tokens - 1):
            tokens = self._step([(id, at, stream) for stream, id in enumerate(tokens)], streams).argmax(axis=1)
        return streams * (num_tokens - (streams == 1)) / (time.perf_counter() - began)

    def prefill(self, prompt: Sequence[int]) -> float:
        """Tokens a second."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        began = time.perf_counter()
        self._step([(id, at, 0) for at, id in enumerate(prompt)]).argmax(axis=1)
        return len(prompt) / (time.perf_counter() - began)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Scores of what follows each of at most PREFILL_TOKENS tokens, [tokens, vocabulary]."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return self._step([(id, at, 0) for at, id in enumerate(ids)], len(ids)).copy()

    def _step(self, tokens: Sequence[tuple[int, int, int]], num_outputs: int = 1) -> np.ndarray:
        """Takes (token id, position, stream)s. Returns the scores of what follows each of the last ones."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (id, at, stream) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = id, at, 1, stream
            batch.logits[i] = i >= len(tokens) - num_outputs
        assert llama_cpp.llama_decode(self._context, batch) == 0
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (num_outputs, self._vocab_size))


def llamajax_round(llm: llamajax.LLM, prompt: list[int], long_prompt: list[int]) -> Speeds:
    options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    decoded = llm.stream(prompt, max_new_tokens=DECODE_TOKENS, **options).finish()
    began = time.perf_counter()
    batch = llm.generate_batch(
        [prompt] * STREAMS, slots=STREAMS, max_new_tokens=STREAM_TOKENS, raise_errors=True, **options
    )
    batched = sum(len(answer.token_ids) for answer in batch) / (time.perf_counter() - began)
    read = llm.stream(long_prompt, max_new_tokens=1, **options).finish()
    assert decoded.cached_tokens == read.cached_tokens == 0, "the prompts must not be in the cache"
    return {
        "decode": decoded.tokens_per_second,
        f"decode of {STREAMS}": batched,
        f"prefill of {PREFILL_TOKENS}": PREFILL_TOKENS / read.timings.time_to_first_token,
    }


def llamacpp_round(llama: LlamaCpp, prompt: list[int], long_prompt: list[int]) -> Speeds:
    return {
        "decode": llama.decode(prompt, DECODE_TOKENS, 1),
        f"decode of {STREAMS}": llama.decode(prompt, STREAM_TOKENS, STREAMS),
        f"prefill of {PREFILL_TOKENS}": llama.prefill(long_prompt),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; the default model if left out")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    path = arguments.model or hub.resolve(hub.DEFAULT)

    ours, theirs = llamajax.load(path, device="cpu"), LlamaCpp(path)
    text = " ".join(f"The number {i} comes before {i + 1}." for i in range(200))
    prompts = ours.tokenizer.encode(PROMPT), ours.tokenizer.encode(text)[:PREFILL_TOKENS]

    for _ in range(2):  # the second round finds the cache as long as the first left it, and compiles for that
        llamajax_round(ours, *prompts)
    llamacpp_round(theirs, *prompts)
    rounds = []
    for number in range(arguments.rounds):
        rounds.append((llamajax_round(ours, *prompts), llamacpp_round(theirs, *prompts)))
        print(
            f"round {number + 1}: "
            + "; ".join(f"{k} {rounds[-1][0][k]:.1f} : {v:.1f}" for k, v in rounds[-1][1].items())
        )
    for name in rounds[0][0]:
        a, b = (statistics.median(r[side][name] for r in rounds) for side in (0, 1))
        ratio = statistics.median(r[0][name] / r[1][name] for r in rounds)
        print(f"{name}: llamajax {a:.1f}, llama.cpp {b:.1f} tokens/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
