"""Kills a batch of mixed lines at random moments and resumes it, until it is done: nothing may be lost or doubled.

    python scripts/kill_batch.py --kills 60

Lines of each kind (plain, OpenAI's, several choices, bad ones) are answered once without a kill. Then runs are ended
by SIGKILL, SIGTERM and SIGINT in turn, and resumed. Results and bad lines must be those of the run without a kill;
results in the same order with --keep-order. (A model with float32 weights and few heads is no subject: who shares its
batch shows in the last digits of its log-probabilities.)
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("llamajax"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def write_lines(path: Path, num_lines: int) -> None:
    """Lines of several lengths and of each kind, some of them bad."""
    lines = []
    for i in range(num_lines):
        asked = {"messages": [{"role": "user", "content": f"Hi {i}"}], "max_tokens": 5 + i * 7 % 60}
        kinds = [
            {"id": i, **asked},
            {"prompt": f"Tell me about {i}.", "n": 1 + i % 3},
            {"custom_id": f"c{i}", "url": "/v1/chat/completions", "body": {**asked, "n": 1 + i % 2, "seed": i}},
            {"custom_id": f"t{i}", "url": "/v1/completions", "body": {"prompt": "Once", "logprobs": i % 3}},
            {"prompt": "Hi", "max_tokenz": i},
            {"custom_id": f"b{i}", "url": "/v1/chat/completions", "body": {**asked, "temperature": -1}},
        ]
        lines.append('{"broken' if i % 17 == 16 else json.dumps(kinds[i % 6]))
        lines += [""] * (i % 11 == 10)
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="smollm2-135m-instruct")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--lines", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    # A job in the background ignores Ctrl-C, and so would its child processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    with tempfile.TemporaryDirectory() as folder:
        lines, whole = Path(folder, "in.jsonl"), Path(folder, "whole.jsonl")
        write_lines(lines, arguments.lines)
        command = [COMMAND, "batch", str(lines), "-m", arguments.model, "--slots", "8"]
        began = time.monotonic()
        process = subprocess.Popen([*command, "-o", whole, "--keep-order"])
        while process.poll() is None and not _size(whole):
            time.sleep(0.01)
        start = time.monotonic() - began
        process.wait()
        expected = [path.read_bytes() for path in (whole, Path(f"{whole}.errors.jsonl"))]

        for order in (["--keep-order"], []):
            out = Path(folder, "in-order.jsonl" if order else "as-finished.jsonl")
            faults = Path(f"{out}.errors.jsonl")
            resumed = [*command, "-o", str(out), "--resume", *order]
            ended = {"by signal": 0, "by itself": 0}
            for i in range(arguments.kills // 2):
                process = subprocess.Popen(resumed, stderr=subprocess.DEVNULL)
                # A third die while they start, the others when they have written something more.
                latest = time.monotonic() + (rng.random() * start if rng.random() < 1 / 3 else 600)
                enough = _size(out) + rng.random() * 4 * len(expected[0]) / arguments.kills
                while process.poll() is None and time.monotonic() < latest and _size(out) <= enough:
                    time.sleep(0.001)
                process.send_signal(SIGNALS[i % 3])
                code = process.wait()
                ended["by itself" if code in (0, 1) else "by signal"] += 1
                if code not in (0, 1, 130, -signal.SIGKILL, -signal.SIGTERM):
                    sys.exit(f"ended with {code}")
            subprocess.run(resumed, check=False)
            found = [path.read_bytes() for path in (out, faults)]
            same = [sorted(data.splitlines()) for data in found] == [sorted(data.splitlines()) for data in expected]
            same = same and (not order or found[0] == expected[0])
            counts = [data.count(b"\n") for data in found]
            print(f"{' '.join(order) or 'as they finish'}: {ended}, {counts[0]} results, {counts[1]} bad lines")
            if not same:
                sys.exit("the files differ from those of the run without a kill")
    print("nothing lost, nothing doubled")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    main()
