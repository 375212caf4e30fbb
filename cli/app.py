"""Assembles the commands, and is the one place where errors become a line on stderr and an exit code."""

import io
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn, cast

import typer

import llamajax
from llamajax.errors import LlamaJaxError
from llamajax.text import one_line, printable

from .commands import models
from .commands.batch import batch
from .commands.bench import HELP as BENCH_HELP
from .commands.bench import bench
from .commands.chat import chat
from .commands.info import info
from .commands.perplexity import perplexity
from .commands.serve import serve
from .interrupt import INTERRUPTED

# Typer has click's exceptions, but does not export the base classes.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])

BROKEN_PIPE = 141

app = typer.Typer(
    name="llamajax",
    help="Llama models on JAX: chat with one, answer a file of prompts, serve, measure.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut names that are too long for their column
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(short_help="Answer a prompt, or hold a conversation.")(chat)
app.command(short_help="Answer each line of a file.")(batch)
app.command(short_help="Serve a model to programs and browsers.")(serve)
app.add_typer(models.app, name="models", short_help="List, fetch and remove models.")
app.command(short_help="Describe a model, without loading it.")(info)
app.command(short_help="Measure how fast a model is here.", help=BENCH_HELP)(bench)
app.command(short_help="Measure how well a model predicts a text.")(perplexity)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llamajax {llamajax.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _no_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def run() -> NoReturn:
    """Runs the command, and ends the process with its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - it stays open
    # A character that the terminal's encoding lacks must not end an answer.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        code = _run()
    except BrokenPipeError:
        code = BROKEN_PIPE
    sys.stderr.flush()
    # A normal exit would tear down a thread that still compiles, and would flush again to a pipe whose reader is gone.
    os._exit(code)


def _run() -> int:
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except SystemExit as e:  # how Typer ends a command whose reader is gone, and shell completion
        if isinstance(e.__context__, OSError):
            raise BrokenPipeError from e
        sys.stdout.flush()
        return int(e.code or 0)
    except _UsageError as e:
        command = e.ctx.command_path if e.ctx else "llamajax"
        return _fail(f"{e.format_message()} (see '{command} --help')", e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except LlamaJaxError as e:
        return _fail(str(e))
    except OSError as e:
        return _fail(": ".join(filter(None, (e.filename and str(e.filename), e.strerror or str(e)))))
    except MemoryError:
        return _fail("out of memory: choose a smaller model, or a shorter --max-seq-len")
    except Exception as e:
        first_line = str(e).partition("\n")[0]
        if first_line.startswith("RESOURCE_EXHAUSTED"):
            return _fail("out of device memory: choose a smaller model, or a shorter --max-seq-len")
        return _fail(f"internal error, {type(e).__name__}: {first_line} (--debug shows where)")


def _fail(message: str, code: int = 1) -> int:
    if "--debug" in sys.argv and code == 1:
        print(printable(traceback.format_exc()), file=sys.stderr, end="")
    else:
        print(f"llamajax: {one_line(message, longest=2000)}", file=sys.stderr)
    return code
