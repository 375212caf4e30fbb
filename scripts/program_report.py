"""What a model's programs would do on an accelerator, without one: a table of bytes, kernels, memory and seconds.

    python -m scripts.program_report llama3.2-1b --rows 1 32 --length 2048 --dtype auto --target h100

Needs the wheels that `scripts/compiled.py` names. docs/accelerators.md tells how to read it.
"""

import argparse
from typing import get_args

import jax

from llamajax.engine.programs import Program
from llamajax.families import CONFIGS
from llamajax.types import DType
from scripts.compiled import Target, missing, report, shapes

HEADS = (
    "program",
    "bytes over ideal",
    "kernels",
    "host reads",
    "launches",
    "temporary MB",
    "cache MB",
    "large moves",
    "compiled in s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32], help="programs that decode so many rows")
    parser.add_argument("--chunks", type=int, nargs="*", default=[512], help="programs that read so many tokens")
    parser.add_argument("--length", type=int, default=2048, help="positions of each row's cache")
    parser.add_argument("--dtype", choices=get_args(DType), default="auto")
    parser.add_argument("--target", choices=get_args(Target), default="h100")
    arguments = parser.parse_args()
    if wheels := missing(arguments.target):
        parser.exit(1, f"programs for a {arguments.target} are not compiled without {wheels}\n")
    jax.config.update("jax_platforms", "cpu")  # a real accelerator has no part in this
    model = shapes(arguments.target, CONFIGS[arguments.model], arguments.dtype)
    programs = [Program("decode", arguments.length, num_rows=rows) for rows in arguments.rows]
    programs += [Program("prefill", arguments.length, chunk) for chunk in arguments.chunks]
    what = f"{arguments.model}, {arguments.dtype}, cache {arguments.length:,}, {arguments.target}"
    print(f"{what}: greedy / chat / costliest\n")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for program in programs:
        found = report(model, program)
        name = f"decode {program.num_rows}" if program.step == "decode" else f"prefill {program.chunk_len}"
        costs = found.greedy, found.chat, found.sampled
        cells = (
            name,
            " / ".join(f"{cost.num_bytes / found.ideal_bytes:.3f}" for cost in costs),
            " / ".join(f"{cost.kernels}" for cost in costs),
            " / ".join(f"{cost.reads}" for cost in costs),
            " / ".join(f"{cost.launches}" for cost in costs),
            f"{found.temp_bytes / 1e6:,.1f}",
            f"{found.cache_bytes / 1e6:,.1f}",
            f"{len(found.moves)}",
            f"{found.seconds:.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
