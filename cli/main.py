"""Where the command begins: with Ctrl-C, before the imports, which take time."""

import gc

from .interrupt import exit_at_once


def main() -> None:
    """Runs the command. Exit codes: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C, 141 for a closed pipe."""
    exit_at_once()
    gc.disable()  # it would go again and again through what is being imported, and stays: a tenth of the time
    from .app import run

    gc.freeze()
    gc.enable()
    run()
