"""Speed of a bf16 checkpoint beside transformers, in turns.

    pip install torch transformers gguf accelerate
    python scripts/compare_transformers.py [--model DIRECTORY] [--rounds 5]

Without a directory in Hugging Face's layout, transformers reads the default model's GGUF and writes one, in bf16. Both
decode greedily with a thread for each processor: one stream, whose prompt's reading does not count, then 8 and 32
streams with it, and then read a prompt of 512 tokens. Prints every round, and a table for the README: medians of the
speeds and of the rounds' ratios.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamajax
from llamajax import hub

PROMPT = "Once upon a time, in a village by the sea, there lived"
ALONE_TOKENS, STREAM_TOKENS, PREFILL_TOKENS = 64, 48, 512
WORK = "one stream", "8 streams", "32 streams", f"prefill of {PREFILL_TOKENS} tokens"


class Ours:
    """llamajax."""

    def __init__(self, path: Path) -> None:
        self.llm = llamajax.load(path, device="cpu", max_seq_len=2 * PREFILL_TOKENS)
        self.first_ids = itertools.count(1000)

    def alone(self, prompt: list[int]) -> float:
        answer = self.llm.stream(prompt, max_new_tokens=ALONE_TOKENS, temperature=0.0, ignore_eos=True).finish()
        return answer.tokens_per_second

    def streams(self, prompt: list[int], number: int) -> None:
        for answer in self.llm.generate_batch(
            [prompt] * number,
            slots=number,
            max_new_tokens=STREAM_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            raise_errors=True,
        ):
            assert len(answer.token_ids) == STREAM_TOKENS

    def read(self, prompt: list[int]) -> None:
        prompt = [next(self.first_ids), *prompt[1:]]  # else the cache would have it from the last time
        assert self.llm.stream(prompt, max_new_tokens=1, temperature=0.0).finish().cached_tokens == 0


class Theirs:
    """transformers."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def alone(self, prompt: list[int]) -> float:
        first, all_tokens = (timed(self._generate, prompt, 1, number) for number in (1, ALONE_TOKENS))
        return (ALONE_TOKENS - 1) / (all_tokens - first)

    def streams(self, prompt: list[int], number: int) -> None:
        self._generate(prompt, number, STREAM_TOKENS)

    def read(self, prompt: list[int]) -> None:
        self.model(torch.tensor([prompt]), logits_to_keep=1, use_cache=True)

    def _generate(self, prompt: list[int], streams: int, num_tokens: int) -> None:
        ids = torch.tensor([prompt] * streams)
        length = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)


def timed(work: object, *arguments: object) -> float:
    assert callable(work)
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def one_round(engine: Ours | Theirs, prompt: list[int], long_prompt: list[int]) -> list[float]:
    """Tokens a second, for each kind of work."""
    speeds = [engine.alone(prompt)]
    speeds += [number * STREAM_TOKENS / timed(engine.streams, prompt, number) for number in (8, 32)]
    return [*speeds, PREFILL_TOKENS / timed(engine.read, long_prompt)]


def in_bf16(gguf: Path, to: Path) -> Path:
    """A directory of a GGUF's weights, rounded to bf16."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(to)
    del model.config.quantization_config
    model.config.save_pretrained(to)
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def table(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> str:
    columns = list(zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True))
    rows = [
        ["tokens/s", *WORK],
        ["---"] * (1 + len(WORK)),
        ["llamajax", *(f"{statistics.median(a):.0f}" for a, _ in columns)],
        ["transformers", *(f"{statistics.median(b):.0f}" for _, b in columns)],
        ["ratio", *(f"{statistics.median(x / y for x, y in zip(a, b, strict=True)):.1f}" for a, b in columns)],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory with a bf16 checkpoint; the default model if left out")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = arguments.model or in_bf16(hub.resolve(hub.DEFAULT).resolve(), Path(folder))
        engines = Ours(path), Theirs(path)
        tokenizer = engines[0].llm.tokenizer
        text = " ".join(f"The number {i} comes before {i + 1}." for i in range(200))
        prompts = tokenizer.encode(PROMPT), tokenizer.encode(text)[:PREFILL_TOKENS]
        for engine in (*engines, engines[0]):  # the second time the cache is as long as the first left it
            one_round(engine, *prompts)
        rounds: list[list[list[float]]] = []
        for number in range(1, arguments.rounds + 1):
            rounds.append([one_round(engine, *prompts) for engine in engines])
            speeds = (f"{work} {a:.0f} : {b:.0f}" for work, a, b in zip(WORK, *rounds[-1], strict=True))
            print(f"round {number}: " + "; ".join(speeds), flush=True)
    print(table(*zip(*rounds, strict=True)))


if __name__ == "__main__":
    main()
