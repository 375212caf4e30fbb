"""Interrupts commands at random moments of their lives, and says how they end.

    python scripts/interrupt.py 200 model.gguf

Each run of `chat`, `batch` and `bench` gets one SIGINT, at a moment drawn evenly between Python's first line of ours
and the command's usual end. It must end with code 130, or with 0 if it was quicker, without a traceback.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("llamajax"))


def run(arguments: list[str], moment: float) -> tuple[str, float]:
    """How it ended, and how long it took from the command's beginning."""
    # Python's account of its imports on stderr says when the command begins: its own start is not ours.
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([COMMAND, *arguments], env=env, **pipes) as process:
        for line in process.stderr:
            if b"llamajax_cli.main" in line:
                break
        process.stderr.readline()
        began = time.monotonic()
        try:
            _, said = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate()
        seconds = time.monotonic() - began
    bad = [word for word in (b"Traceback", b"KeyboardInterrupt", b"internal error", b"Fatal") if word in said]
    return f"code {process.returncode}" + (f", {bad}: {said[-300:]!r}" if bad else ""), seconds


def main() -> None:
    moments, model = int(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell's background job, commands would ignore it
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("Name three colours.\n" * 4)
        commands = {
            "chat": ["chat", "Tell me a story.", "-m", model, "-n", "40"],
            "batch": ["batch", str(prompts), "-m", model, "-n", "20"],
            "bench": ["bench", "-m", model, "--requests", "2", "-n", "8", "--repeat", "1"],
        }
        # The first run compiles.
        usual = {name: min(run(arguments, 600)[1] for _ in range(2)) for name, arguments in commands.items()}
        ends: Counter[str] = Counter()
        for number in range(1, moments + 1):
            name = rng.choice(list(commands))
            end, _ = run(commands[name], rng.uniform(0, usual[name]))
            ends[f"{name}: {end}"] += 1
            if number % 10 == 0 or number == moments:
                print(number, dict(sorted(ends.items())), flush=True)


if __name__ == "__main__":
    main()
