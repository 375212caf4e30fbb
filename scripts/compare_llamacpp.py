"""Speed beside llama.cpp: on the same file, and on a file of the same model in llama.cpp's fastest format.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python
    python scripts/compare_llamacpp.py [--model FILE.gguf] [--formats q4_0] [--rounds 9]

llama.cpp is fastest with Q4_0, whose blocks it repacks for AVX2 and AVX-512. Its own quantizer makes that file of the
given one. (The weights are rounded twice: right for speed, not for quality.) Both engines run both files, with a thread
for each processor. They take turns, so that a drift of the machine's speed hits both. Each round decodes one stream,
greedily, decodes 32 at once, with their prefill, and prefills a prompt of 512 tokens. llama.cpp is driven
through its C interface, which adds no more than the choice of the most probable token. It runs with flash attention on
and off, and 32 streams with a unified cache and with split ones; for each kind of work its best setting counts.

Prints every round, the best settings, and a table for the README: medians of the speeds and of the rounds' ratios.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

import llamajax
from llamajax import hub

PROMPT = "Once upon a time, in a village by the sea, there lived"
DECODE_TOKENS, STREAMS, STREAM_TOKENS, PREFILL_TOKENS = 128, 32, 64, 512
WORK = "decode, one stream", f"decode of {STREAMS} streams", f"prefill of {PREFILL_TOKENS} tokens"
THREADS = len(os.sched_getaffinity(0))
GIVEN = "same file"
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}

Speeds = dict[str, float]  # tokens a second, of each kind of work or in each setting
Settings = dict[str, Speeds]  # of each kind of work

_no_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(_no_log, None)


def load_model(path: Path) -> Any:
    """For `LlamaCpp`."""
    llama_cpp.llama_backend_init()
    return llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())


def quantize(path: Path, to: Path, name: str) -> None:
    """Makes a file in a format, such as "q4_0", whatever the weights are in."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
    params.allow_requantize = True
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(to).encode(), params) == 0


class LlamaCpp:
    """A context of a model: settings, and a cache with room for so many streams."""

    def __init__(self, model: Any, *, streams: int = 1, flash: bool = True, unified: bool = True) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(streams * 128, 2 * PREFILL_TOKENS)
        params.n_batch = params.n_ubatch = PREFILL_TOKENS
        params.n_seq_max = streams
        params.kv_unified = unified
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.n_threads = params.n_threads_batch = THREADS
        self.settings = f"flash attention {'on' if flash else 'off'}"
        if streams > 1:
            self.settings += f", {'unified cache' if unified else 'split caches'}"
        self._streams = streams
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._batch = llama_cpp.llama_batch_init(PREFILL_TOKENS, 0, streams)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def decode(self, prompt: Sequence[int], num_tokens: int) -> float:
        """Tokens a second, of all streams; of one, the time to its first token does not count."""
        streams = self._streams
        self._clear()
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
        self._clear()
        began = time.perf_counter()
        self._step([(id, at, 0) for at, id in enumerate(prompt)]).argmax(axis=1)
        return len(prompt) / (time.perf_counter() - began)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Scores of what follows each of at most PREFILL_TOKENS tokens, [tokens, vocabulary]."""
        self._clear()
        return self._step([(id, at, 0) for at, id in enumerate(ids)], len(ids)).copy()

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

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


class Ours:
    """llamajax, on one file."""

    def __init__(self, path: Path) -> None:
        self.llm = llamajax.load(path, device="cpu")

    def round(self, prompt: list[int], long_prompt: list[int]) -> Speeds:
        llm = self.llm
        decoded = llm.stream(prompt, max_new_tokens=DECODE_TOKENS, **GREEDY).finish()
        began = time.perf_counter()
        batch = llm.generate_batch(
            [prompt] * STREAMS, slots=STREAMS, max_new_tokens=STREAM_TOKENS, raise_errors=True, **GREEDY
        )
        batched = sum(len(answer.token_ids) for answer in batch) / (time.perf_counter() - began)
        read = llm.stream(long_prompt, max_new_tokens=1, **GREEDY).finish()
        assert decoded.cached_tokens == read.cached_tokens == 0, "the prompts must not be in the cache"
        speeds = decoded.tokens_per_second, batched, PREFILL_TOKENS / read.timings.time_to_first_token
        return dict(zip(WORK, speeds, strict=True))


class Theirs:
    """llama.cpp, on one file, in all settings."""

    def __init__(self, path: Path) -> None:
        model = load_model(path)
        self._alone = [LlamaCpp(model, flash=flash) for flash in (False, True)]
        self._many = [
            LlamaCpp(model, streams=STREAMS, flash=flash, unified=unified)
            for flash, unified in product((False, True), repeat=2)
        ]

    def round(self, prompt: list[int], long_prompt: list[int]) -> Settings:
        speeds = (
            {context.settings: context.decode(prompt, DECODE_TOKENS) for context in self._alone},
            {context.settings: context.decode(prompt, STREAM_TOKENS) for context in self._many},
            {context.settings: context.prefill(long_prompt) for context in self._alone},
        )
        return dict(zip(WORK, speeds, strict=True))


def measure(files: dict[str, Path], num_rounds: int) -> tuple[dict[str, list[Speeds]], dict[str, list[Settings]]]:
    """Each file's rounds: of llamajax, and of llama.cpp in each setting."""
    ours, theirs = ({name: engine(path) for name, path in files.items()} for engine in (Ours, Theirs))
    tokenizer = ours[GIVEN].llm.tokenizer
    text = " ".join(f"The number {i} comes before {i + 1}." for i in range(200))
    prompts = tokenizer.encode(PROMPT), tokenizer.encode(text)[:PREFILL_TOKENS]
    for name in files:
        for _ in range(2):  # the second round finds the cache as long as the first left it, and compiles for that
            ours[name].round(*prompts)
        theirs[name].round(*prompts)
    our_rounds, their_rounds = defaultdict(list), defaultdict(list)
    for number in range(1, num_rounds + 1):
        for name in files:
            our, their = ours[name].round(*prompts), theirs[name].round(*prompts)
            our_rounds[name].append(our)
            their_rounds[name].append(their)
            speeds = (f"{work} {our[work]:.1f} : {max(their[work].values()):.1f}" for work in WORK)
            print(f"round {number}, {name}: " + "; ".join(speeds), flush=True)
    return our_rounds, their_rounds


def best(rounds: list[Speeds]) -> tuple[str, list[float]]:
    """The setting with the best median, and its speeds."""
    speeds = {setting: [speeds[setting] for speeds in rounds] for setting in rounds[0]}
    return max(speeds.items(), key=lambda item: statistics.median(item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; the default model if left out")
    parser.add_argument("--formats", default="q4_0", help="that llama.cpp makes of it, as in q4_0,iq4_nl,q4_k_s")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {GIVEN: arguments.model or hub.resolve(hub.DEFAULT)}
        for name in arguments.formats.split(","):
            files[name] = Path(folder, f"{name}.gguf")
            quantize(files[GIVEN], files[name], name)
        our_rounds, their_rounds = measure(files, arguments.rounds)

    table, settings = defaultdict(list), []
    for work in WORK:
        our = {name: [speeds[work] for speeds in our_rounds[name]] for name in files}
        their = {}
        for name in files:
            setting, their[name] = best([speeds[work] for speeds in their_rounds[name]])
            settings.append(f"llama.cpp, {name}, {work}: {setting}")
            table[f"llamajax, {name}"].append(f"{statistics.median(our[name]):.0f}")
            table[f"llama.cpp, {name}"].append(f"{statistics.median(their[name]):.0f}")
            table[f"ratio, {name}"].append(ratio(our[name], their[name]))
        fastest = max(their.values(), key=statistics.median)
        table[f"llamajax, {GIVEN}, to the fastest of llama.cpp"].append(ratio(our[GIVEN], fastest))
    print("\n".join(["", *settings, ""]))
    for cells in (["tokens/s", *WORK], ["---"] * (1 + len(WORK)), *([label, *row] for label, row in table.items())):
        print("|", " | ".join(cells), "|")


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the rounds' ratios."""
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}"


if __name__ == "__main__":
    main()
