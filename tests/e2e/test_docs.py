"""README, CONTRIBUTING and docs/ say what is there: the command knows their commands, their links lead somewhere."""

import json
import re
import shlex
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import typer

import llamajax

from .command import environment
from .pages import FENCE, PAGES, PROJECT, Block, blocks, commands, without_variables


def arguments(block: Block) -> list[list[str]]:
    """Those of each `llamajax` in a shell block, up to what the shell itself reads."""
    found = []
    for command in commands(block.text):
        words = shlex.shlex(without_variables(command), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        parts = [list(part) for is_word, part in groupby(words, lambda it: it[0] not in "|&<>;()") if is_word]
        found += [part[1:] for part in parts if part[0] == "llamajax"]
    return found


def parse(asked: list[str]) -> None:
    """Raises click's error for what the command does not know."""
    from llamajax_cli.app import app

    command = typer.main.get_command(app)
    context = command.make_context("llamajax", list(asked))
    while hasattr(command, "commands") and (rest := [*context._protected_args, *context.args]):
        command = command.commands[rest[0]]
        context = command.make_context(rest[0], rest[1:], parent=context)


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_are_known(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for asked in arguments(block):
        try:
            parse(asked)
        except Exception as error:
            pytest.fail(f"llamajax {shlex.join(asked)}: {error}")


def test_most_commands_are_found_and_a_wrong_one_is_noticed() -> None:
    assert sum(len(arguments(block)) for block in blocks("sh")) > 30
    with pytest.raises(Exception, match="No such option"):
        parse(["chat", "--temprature", "1"])


def test_code_in_sentences_is_known() -> None:
    pages = "".join(FENCE.sub("", page.read_text()) for page in PAGES)
    spans = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", pages)}
    for span in (span for span in spans if not re.search(r"\b[A-Z]{4,}\b|--help", span)):
        paths = re.findall(
            r"(?<![\w/])(?:cli|docs|llamajax|scripts|tests)/[\w./-]*",
            re.sub(r"-m scripts\.(\w+)", r"scripts/\1.py", span),
        )
        assert all((PROJECT / path).exists() for path in paths), span
        if span.startswith("python "):
            [script] = paths[:1]
            assert all(option in (PROJECT / script).read_text() for option in re.findall(r"--[\w-]+", span)), span
        if span.startswith("llamajax ") and " -" in span:
            parse(shlex.split(span)[1:])


def test_commands_of_services_are_known() -> None:
    [unit], [image] = blocks("ini"), blocks("dockerfile")
    started = re.findall(r"^ExecStart=/opt/llamajax/bin/(.*)$", unit.text, re.MULTILINE)
    for program, *asked in (shlex.split(started[0]), json.loads(image.text.split("CMD ")[1])):
        assert program == "llamajax"
        parse(asked)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_the_reference_of_the_command_line_is_true(tmp_path: Path) -> None:
    docs = ["-m", "typer", "llamajax_cli.app", "utils", "docs", "--name", "llamajax", "--title", "The command line"]
    subprocess.run([sys.executable, *docs, "--output", tmp_path / "cli.md"], check=True, env=environment(), timeout=60)
    again = f"write it anew: python {shlex.join(docs)} --output docs/cli.md"
    assert (PROJECT / "docs" / "cli.md").read_text() == (tmp_path / "cli.md").read_text(), again


def test_the_reference_of_the_library_has_all_names() -> None:
    page = (PROJECT / "docs" / "api.md").read_text()
    assert set(re.findall(r"^::: llamajax\.(\w+)$", page, re.MULTILINE)) == set(llamajax.__all__)
