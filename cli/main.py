"""Where the command begins: with Ctrl-C, before the imports, which take time."""

from .interrupt import exit_at_once


def main() -> None:
    """Runs the command. Exit codes: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C, 141 for a closed pipe."""
    exit_at_once()
    from .app import run

    run()
