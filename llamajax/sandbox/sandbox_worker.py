"""The process in a sandbox: a request on each line of stdin, its reply on a line of stdout. Imports nothing of
llamajax, and little else: the process starts the sooner.
"""

import faulthandler
import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def main(answer: Callable[..., Any], max_bytes: int) -> None:
    """Answers until stdin ends. Each line has the seconds that it may take, and an object in JSON."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    lines, replies = (
        io.TextIOWrapper(stream.buffer, "utf-8", "surrogatepass", newline="\n") for stream in (sys.stdin, sys.stdout)
    )
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - pathlib would have to be imported
        print('"ready"', file=replies, flush=True)
        for line in lines:
            max_seconds, _, request = line.partition(" ")
            # This watch ends the process from a thread outside of Python, which one long operation cannot hold up.
            faulthandler.dump_traceback_later(float(max_seconds), exit=True, file=nowhere)
            print(json.dumps(answer(**json.loads(request)), ensure_ascii=False), file=replies, flush=True)
            faulthandler.cancel_dump_traceback_later()
