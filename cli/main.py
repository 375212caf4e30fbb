"""Where the command begins: with Ctrl-C, before the imports, which take time."""

import gc

from .interrupt import exit_at_once


def main() -> None:
    """Runs the command. Exit codes: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C, 141 for a closed pipe."""
    exit_at_once()
    gc.disable()  # collections would walk all imported objects, which stay, again and again: 10 % of the start
    from .app import run

    gc.freeze()
    gc.enable()
    run()
