"""README and docs/ say what is there: their commands are known to the command, their links lead somewhere."""

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

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `llamajax` in a page's shell lines, up to what the shell itself reads."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.shlex(line.replace("$((42 + (7 << 32)))", "7"), posix=True, punctuation_chars=True)
            words.whitespace_split = True
            if "llamajax " in line:
                parts = [list(part) for is_word, part in groupby(words, lambda it: it[0] not in "|&<>;()") if is_word]
                found += [part[1:] for part in parts if part[0] == "llamajax"]
    return found


def parse(arguments: list[str]) -> None:
    """Raises click's error for what the command does not know."""
    from llamajax_cli.app import app

    command = typer.main.get_command(app)
    context = command.make_context("llamajax", list(arguments))
    while hasattr(command, "commands") and (rest := [*context._protected_args, *context.args]):
        command = command.commands[rest[0]]
        context = command.make_context(rest[0], rest[1:], parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in commands(page):
        try:
            parse(arguments)
        except Exception as error:
            pytest.fail(f"llamajax {shlex.join(arguments)}: {error}")


def test_most_commands_are_found_and_a_wrong_one_is_noticed() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30
    with pytest.raises(Exception, match="No such option"):
        parse(["chat", "--temprature", "1"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
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


def test_the_readmes_program_runs(shallow_model: str) -> None:
    [program] = blocks(PROJECT / "README.md", "python")
    done = subprocess.run(
        [sys.executable, "-P", "-c", program.replace("smollm2-135m-instruct", shallow_model)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4
