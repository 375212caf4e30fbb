"""How far a quantized file's predictions are from those of its own weights in float32, beside llama.cpp's.

    pip install llama-cpp-python
    python scripts/compare_quality.py text.txt [--model FILE.gguf]

Both read the same windows of tokens; `llamajax perplexity --help` tells how they are scored.
"""

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace

from compare_llamacpp import PREFILL_TOKENS, LlamaCpp, load_model

import llamajax
from llamajax import hub
from llamajax.bench.perplexity import measure
from llamajax.bench.saved_logits import SavedLogits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path, help="a GGUF file; the default model if left out")
    arguments = parser.parse_args()
    path, text = arguments.model or hub.resolve(hub.DEFAULT), arguments.text.read_text()

    ours = llamajax.load(path, device="cpu")
    theirs = SimpleNamespace(  # what `measure` asks of a model
        config=ours.config,
        tokenizer=ours.tokenizer,
        max_seq_len=ours.max_seq_len,
        logits=LlamaCpp(load_model(path)).logits,
    )
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "float32")
        exact = measure(llamajax.load(path, device="cpu", dtype="float32"), text, context=PREFILL_TOKENS, save=saved)
        print(f"float32: perplexity {exact.perplexity.value:.4f}, {exact.tokens} tokens")
        divergences = []
        for name, model in {"llamajax": ours, "llama.cpp": theirs}.items():
            found = measure(model, text, context=PREFILL_TOKENS, saved=SavedLogits(saved)).comparison
            ratio, divergence = found.perplexity_ratio, found.kl_divergence
            divergences.append(divergence.value)
            print(
                f"{name}: perplexity {ratio.value:.4f} ± {ratio.error:.4f} times that, KL divergence "
                f"{divergence.value:.6f} ± {divergence.error:.6f}, same top token {100 * found.same_top.value:.1f} %"
            )
    print(f"KL divergence: llamajax {divergences[0] / divergences[1]:.3f} times llama.cpp's")


if __name__ == "__main__":
    main()
