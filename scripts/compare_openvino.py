"""Speed of the batch command beside OpenVINO GenAI: whole processes, in turns.

    pip install torch transformers gguf accelerate "optimum-intel[openvino]" nncf openvino-genai
    python scripts/compare_openvino.py [--model DIRECTORY] [--rounds 5] [--temperature 0.6]

Without a directory of an OpenVINO model, it makes one of the default model: its GGUF's weights in f32, then in int4 in
groups of 64, which is OpenVINO's fastest format. Both answer 200 questions of different lengths with 64 tokens each, at
most 32 at a time, with a thread for each processor. OpenVINO takes the same token ids, and 512 of them in a step (256,
1024 and 2048 were slower). Prints every round, and the medians.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from llamajax import hub

REQUESTS, NEW_TOKENS, SLOTS, STEP_TOKENS = 200, 64, 32, 512
WORDS = (
    "sea",
    "village",
    "old",
    "river",
    "story",
    "people",
    "build",
    "ships",
    "birds",
    "spring",
    "rain",
    "music",
    "fire",
)

# Arguments: a file of requests. Prints their token ids.
IDS = """
import json, sys, llamajax
llm = llamajax.load(device="cpu")
print(json.dumps([list(llm.prepare(json.loads(line)["messages"])[0].token_ids) for line in open(sys.argv[1])]))
"""

# Arguments: the model, a file of token ids, the temperature.
THEIRS = f"""
import json, os, sys
import numpy as np, openvino, openvino_genai
scheduler = openvino_genai.SchedulerConfig()
scheduler.max_num_seqs, scheduler.cache_size = {SLOTS}, 1
scheduler.max_num_batched_tokens, scheduler.dynamic_split_fuse = {STEP_TOKENS}, True
threads = {{"INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}}
pipeline = openvino_genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", threads)
config = openvino_genai.GenerationConfig()
config.max_new_tokens = config.min_new_tokens = {NEW_TOKENS}
config.ignore_eos = True
if temperature := float(sys.argv[3]):
    config.do_sample, config.temperature, config.top_p = True, temperature, 0.9
prompts = [openvino.Tensor(np.array([ids], np.int64)) for ids in json.load(open(sys.argv[2]))]
answers = pipeline.generate(prompts, [config] * len(prompts))
assert all(len(answer.m_generation_ids[0]) == {NEW_TOKENS} for answer in answers)
"""


def questions() -> list[str]:
    """The same each time."""
    random.seed(1)
    return [
        f"Question {number}: tell me about {' '.join(random.choices(WORDS, k=random.randint(5, 40)))}"
        for number in range(REQUESTS)
    ]


def in_int4(gguf: Path, to: Path) -> Path:
    """An OpenVINO model of a GGUF's weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(to / "f32")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(to / "f32")
    options = ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "64", "--ratio", "1.0"]
    export = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(to / "f32")]
    subprocess.run([*export, *options, str(to / "int4")], check=True)
    return to / "int4"


def seconds(command: Sequence[str]) -> float:
    """How long a process takes in all."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory of an OpenVINO model of the default model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    gguf = hub.resolve(hub.DEFAULT).resolve()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = arguments.model or in_int4(gguf, path)
        lines, ids, out = path / "questions.jsonl", path / "ids.json", path / "answers.jsonl"
        asked = [
            {"messages": [{"role": "user", "content": question}], "max_tokens": NEW_TOKENS, "ignore_eos": True}
            for question in questions()
        ]
        lines.write_text("".join(f"{json.dumps(line)}\n" for line in asked))
        found = subprocess.run([sys.executable, "-c", IDS, lines], check=True, capture_output=True, text=True)
        ids.write_text(found.stdout)
        temperature = str(arguments.temperature)
        command = str(Path(sys.executable).with_name("llamajax"))
        options = ["-n", str(NEW_TOKENS), "--slots", str(SLOTS), "--temperature", temperature, "--device", "cpu"]
        ours = [command, "batch", str(lines), "-o", str(out), *options]
        theirs = [sys.executable, "-c", THEIRS, str(model), str(ids), temperature]
        seconds(ours)  # compiles, if it is the first time on this machine
        rounds = []
        for number in range(arguments.rounds):
            out.unlink()
            pair = [0.0, 0.0]
            for which in (0, 1) if number % 2 else (1, 0):
                pair[which] = seconds((ours, theirs)[which])
            assert len(out.read_text().splitlines()) == REQUESTS
            rounds.append(pair)
            print(f"round {number + 1}: llamajax {pair[0]:.1f} s, OpenVINO {pair[1]:.1f} s", flush=True)
    tokens = REQUESTS * NEW_TOKENS
    medians = [tokens / statistics.median(column) for column in zip(*rounds, strict=True)]
    ratio = statistics.median(theirs / ours for ours, theirs in rounds)
    print(f"tokens/s of the whole process: llamajax {medians[0]:.0f}, OpenVINO {medians[1]:.0f}; ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
