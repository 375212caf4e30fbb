"""Runs a client's checks against a server: a line for each, and an exit code."""

import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def run(*checks: Callable[[], None]) -> NoReturn:
    """Calls each check, prints its name, and ends the process: with exit code 0 if none raised an error."""
    num_failed = 0
    for check in checks:
        try:
            check()
        except Exception:
            num_failed += 1
            print(f"FAILED {check.__name__}", flush=True)
            traceback.print_exc()
        else:
            print(f"ok     {check.__name__}", flush=True)
    sys.exit(num_failed > 0)
