"""`llamajax models`: the names there are; fetches models and removes them."""

import sys
from typing import Annotated, Any

import typer

from llamajax import hub
from llamajax.hub.stored import remove, size_bytes, stored

from .. import loading, options
from ..render import human_bytes, human_count, note, print_json, shown

app = typer.Typer()

Names = Annotated[
    list[str],
    typer.Argument(metavar="NAME", help="A short name, or a hub id: org/repo.", autocompletion=options.model_names),
]


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array instead of the table.")] = False,
) -> None:
    """List the models that have a short name, and which are on disk already."""
    if context.invoked_subcommand is None:
        print_json([_facts(alias) for alias in hub.ALIASES.values()]) if as_json else _print_table()


@app.command()
def pull(names: Names, debug: options.Debug = False) -> None:
    """Fetch models, and print where they are."""
    for name in names:
        print(shown(str(loading.resolve(name))), flush=True)


@app.command()
def rm(
    names: Names,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    debug: options.Debug = False,
) -> None:
    """Remove fetched models from the disk."""
    paths = {path: None for name in names for path in stored(name)}
    what = f"{', '.join(names)} ({human_bytes(sum(map(size_bytes, paths)))})"
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter(f"give -y to remove {what}: stdin is no terminal to ask on")
        if not typer.confirm(f"Remove {what}?", err=True):
            raise typer.Exit(1)
    for path in paths:
        remove(path)
    note(f"(removed {what})")


def _facts(alias: hub.Alias) -> dict[str, Any]:
    path = hub.on_disk(alias)
    return {
        "name": alias.name,
        "default": alias.name == hub.DEFAULT,
        "repo": alias.repo,
        "parameters": alias.parameters,
        "context": alias.context,
        "size_bytes": alias.size_bytes,
        "licence": alias.licence,
        "gated": alias.gated,
        "path": path and str(path),
    }


def _print_table() -> None:
    rows = [("NAME", "PARAMETERS", "CONTEXT", "SIZE", "LICENCE", "ON DISK")]
    for alias in hub.ALIASES.values():
        licence = alias.licence + (" (to be accepted on the hub)" if alias.gated else "")
        rows.append(
            (
                alias.name + (" *" if alias.name == hub.DEFAULT else ""),
                human_count(alias.parameters),
                str(alias.context),
                human_bytes(alias.size_bytes),
                licence,
                "yes" if hub.on_disk(alias) else "no",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\n* the default. -m also takes a directory, a .gguf file, or a repository on the hub:\n"
        "org/repo, org/repo:Q4_K_M, or its address"
    )
