"""Compares the log-likelihoods that lm-eval gets from a server with the library's own.

    pip install 'lm-eval[api]'
    python scripts/clients/lm_eval_sums.py http://127.0.0.1:8123 [-m MODEL]

lm-eval's `local-completions` sends token ids, `echo`, `max_tokens: 1` and `logprobs: 1`, and adds up the answer's
log-probabilities. It takes the tokenizer from the server, so it needs neither a hub nor torch. The reference is
log-softmax of `LLM.logits`, as in `llamajax perplexity`. MODEL is what the server runs. The sums must agree within
1e-4, and so must what lm-eval finds the most probable. `--lm-eval` names the command if it is in another environment.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import checks
import numpy as np
from scipy.special import log_softmax

import llamajax
from llamajax import hub
from llamajax.llm import LLM

TASK = Path(__file__).with_name("lm_eval")
TOLERANCE = 1e-4
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("url")
parser.add_argument("-m", "--model", default=hub.DEFAULT)
parser.add_argument("--key", default="secret")
parser.add_argument("--lm-eval", default="lm_eval")
args = parser.parse_args()


@cache
def library() -> LLM:
    return llamajax.load(args.model)


def evaluated(**options: Any) -> Iterator[tuple[str, str, float, bool]]:
    """Context, continuation, log-likelihood and whether the continuation is the most probable: from lm-eval."""
    named = {"base_url": f"{args.url}/v1/completions", "max_length": 4096, "auth_token": args.key} | options
    with tempfile.TemporaryDirectory() as folder:
        command = [args.lm_eval, "run", "--model", "local-completions", "--tasks", "facts", "--include_path", "."]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in named.items())]
        command += ["--batch_size", "4", "--log_samples", "--output_path", folder]
        env = {**os.environ, **OFFLINE, "HF_DATASETS_CACHE": folder, "OPENAI_API_KEY": args.key}
        subprocess.run(command, cwd=TASK, env=env, check=True)
        [samples] = Path(folder).rglob("samples_*.jsonl")
        for line in samples.read_text().splitlines():
            sample = json.loads(line)
            for asked, [[total, greedy]] in zip(sample["arguments"].values(), sample["resps"], strict=True):
                yield asked["arg_0"], asked["arg_1"], float(total), greedy == "True"


def expected(context: str, continuation: str) -> tuple[float, bool]:
    """The same from the library."""
    encode = library().tokenizer.encode
    ids, start = encode(context + continuation), len(encode(context))
    logprobs = log_softmax(library().logits(ids)[start - 1 : -1].astype(np.float64), axis=-1)
    wanted = np.array(ids[start:])
    return logprobs[np.arange(len(wanted)), wanted].sum(), bool((logprobs.argmax(axis=-1) == wanted).all())


def compare(**options: Any) -> None:
    compared, largest = 0, 0.0
    for context, continuation, total, greedy in evaluated(**options):
        reference, is_greedy = expected(context, continuation)
        largest = max(largest, abs(total - reference))
        assert abs(total - reference) < TOLERANCE, (context[-40:], continuation, total, reference)
        assert greedy == is_greedy, (context[-40:], continuation)
        compared += 1
    assert compared == 24
    print(f"       {compared} sums, the largest difference {largest:.1e}")


def lists_of_token_ids() -> None:
    compare(tokenized_requests=True)


def texts() -> None:
    compare(tokenized_requests=False)


def two_requests_at_once() -> None:
    compare(tokenized_requests=True, num_concurrent=2)


checks.run(lists_of_token_ids, texts, two_requests_at_once)
