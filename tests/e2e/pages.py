"""The code that README, CONTRIBUTING and docs/ show: blocks of pages, and commands of blocks."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    page: str
    language: str
    text: str
    output: str  # what the page shows after it, at most a sentence later

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:60]}"


def _blocks(page: Path) -> Iterator[Block]:
    _, *parts = FENCE.split(page.read_text())
    fences = list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))
    for (language, text, between), (following, output, _) in zip(fences, [*fences[1:], ("none", "", "")], strict=False):
        shows_it = not following and "\n#" not in between and between.count("\n\n") <= 2
        yield Block(page.name, language, text, output if shows_it else "")


BLOCKS = [block for page in PAGES for block in _blocks(page)]


def blocks(language: str, page: str | None = None) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and page in (None, block.page)]


def commands(text: str) -> Iterator[str]:
    """Those of a shell block, each with all of its lines. Comments are left out, and && begins another one."""
    command = ""
    for line in re.sub(r"\\\n *", "", text).splitlines(keepends=True):
        command += line
        try:
            shlex.split(command, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        if "<<'END'" not in command or line == "END\n":
            yield from re.sub(r"\s+#.*\n$", "", command).strip().split(" && ")
            command = ""


def without_variables(command: str) -> str:
    """Without the assignments before a program's name."""
    return re.sub(r"^(?:\w+=\S* +)+", "", command)
