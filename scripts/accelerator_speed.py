"""How fast an accelerator reads and generates: `bench` alone, of each model in each precision, with random weights.

    python -m scripts.accelerator_speed scripts/results/NAME.json [--models …] [--dtypes …] [--graphs "" call]

Each bench is a process of its own, since jax takes the device's memory at its start.
"""

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from llamajax_cli.main import main; main()", "bench", "--json"]
HEADS = ("model", "graphs", "work", "rows", "tokens/s", "GB/s", "of fastest read", "peak GB", "warm-up s")


def measure(model: str, dtype: str, graphs: str, options: list[str], limit: float) -> dict[str, Any]:
    """What `bench` says of this model, its graphs made as LLAMAJAX_GRAPHS says; or the end of its errors."""
    done = subprocess.run(
        [*COMMAND, "--random-weights", model, "--dtype", dtype, *options],
        env=os.environ | {"LLAMAJAX_GRAPHS": graphs},
        capture_output=True,
        text=True,
        timeout=limit,
    )
    found = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-2000:], "results": []}
    return found | {"model": model, "dtype": dtype, "graphs": graphs}


def rows(measured: dict[str, Any]) -> list[list[str]]:
    """Of a table, a line for each result."""
    return [
        [
            f"{measured['model']}, {measured['dtype']}",
            measured["graphs"] or "a token",
            f"{result['name']} {result['sampling'] or ''}",
            f"{result['requests']}",
            f"{result['tokens_per_second']['median']:,.0f}",
            f"{result['decode_bandwidth'] / 1e9:,.0f}" if result["decode_bandwidth"] else "",
            f"{result['decode_bandwidth'] / measured['read_bandwidth']:.0%}" if result["decode_bandwidth"] else "",
            f"{result['peak_bytes'] / 1e9:.1f}",
            f"{result['warm_up']['seconds']:.0f}",
        ]
        for result in measured["results"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON file to write")
    parser.add_argument("--models", nargs="*", default=["llama3.2-1b", "llama3.1-8b"])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "int8"])
    parser.add_argument("--graphs", nargs="*", default=["", "call"], help="as LLAMAJAX_GRAPHS takes them")
    parser.add_argument("--options", default="--pp 512 --tg 128 --batch 1,32", help="of bench")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each")
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    found = []
    for graphs, dtype, model in product(arguments.graphs, arguments.dtypes, arguments.models):
        found.append(measure(model, dtype, graphs, arguments.options.split(), arguments.limit))
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")
        print(found[-1].get("error", ""), *(f"| {' | '.join(row)} |" for row in rows(found[-1])), sep="\n", flush=True)


if __name__ == "__main__":
    main()
