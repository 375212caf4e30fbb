"""Breaks files and requests at random, and reads them: nothing but an answer or a LlamaJaxError may come of it.

    pip install '.[dev]'
    python -m scripts.fuzz --inputs 100000 [--first 0] [--failures failures/]

Each input follows from its number alone (tests/property/hostile/cases.py has the kinds: GGUF of each block format,
directories with safetensors, tokenizers, chat templates, lines of a batch, saved logits), so that

    python -m scripts.fuzz --first 1234 --inputs 1 --failures failures/

makes input 1234 again and keeps its files. A worker process reads the inputs. A signal or an input that takes more than
a minute ends it, and the next one begins after that input. Exit code 1 if anything but answers and refusals was seen,
or a worker took more than 2 GB.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INPUTS_A_WORKER = 5000  # programs that jax has compiled stay in its memory
MAX_SECONDS = 60
MAX_BYTES = 2 * 10**9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--inputs", type=int, default=100_000, help="how many")
    parser.add_argument("--failures", type=Path, help="folder to keep the files of failures in")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.first, arguments.inputs, arguments.failures)
        return 0
    began, outcomes, failures, peak = time.monotonic(), Counter[str](), 0, 0
    following, end = arguments.first, arguments.first + arguments.inputs
    while following < end:
        for report in reports(following, min(INPUTS_A_WORKER, end - following), arguments.failures):
            following = report["input"] + 1
            outcomes[report["outcome"]] += 1
            peak = max(peak, report["peak"])
            if "problem" in report:
                failures += 1
                print(f"input {report['input']}: {report['problem']}", flush=True)
            if (done := following - arguments.first) % 1000 == 0:
                print(f"{done} inputs, {failures} failures, {time.monotonic() - began:.0f} s", file=sys.stderr)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8} {outcome}")
    print(
        f"{sum(outcomes.values())} inputs, {failures} failures, {peak / 1e6:.0f} MB, {time.monotonic() - began:.0f} s"
    )
    return int(failures > 0 or peak > MAX_BYTES)


def reports(first: int, count: int, failures: Path | None) -> Iterator[dict[str, Any]]:
    """What a worker says of each of its inputs, and, should it die, what it died of."""
    command = [sys.executable, "-m", "scripts.fuzz", "--work", "--first", str(first), "--inputs", str(count)]
    command += ["--failures", str(failures)] if failures else []
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    following, peak = first, 0
    while following < first + count:
        assert worker.stdout
        watch = threading.Timer(MAX_SECONDS, worker.kill)
        watch.start()
        line = worker.stdout.readline()
        watch.cancel()
        if not line:
            problem = f"the worker ended ({worker.wait()}), after {MAX_SECONDS} s or by a signal"
            yield {"input": following, "outcome": "died", "peak": peak, "problem": problem}
            return
        report = json.loads(line)
        following, peak = report["input"] + 1, report["peak"]
        yield report
    worker.wait()


def work(first: int, count: int, failures: Path | None) -> None:
    """Reads inputs, and writes a line of JSON on each."""
    from llamajax.tokenizers import sandbox
    from tests.property.hostile import cases, readers

    sandbox.MAX_SECONDS = 1.0
    readers.tiny_llm()  # keeps compiled programs on disk, for the next workers
    for number in range(first, first + count):
        kind = cases.draw(number)
        report: dict[str, Any] = {"input": number}
        with tempfile.TemporaryDirectory() as folder:
            try:
                report["outcome"] = f"{kind}: {cases.run(kind, number, Path(folder))}"
            except BaseException as error:  # a panic in Rust is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                report |= {"outcome": f"{kind}: failed", "problem": traceback.format_exc(limit=-4)}
                if failures:
                    shutil.copytree(folder, failures / str(number))
        report["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    sys.exit(main())
