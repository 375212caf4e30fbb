"""README, docs/ and docstrings are plain English: short sentences, and no words that a stranger would have to guess."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
MODULES = sorted(path for room in ("llamajax", "cli") for path in (PROJECT / room).rglob("*.py"))
LONGEST = 35  # words
# Private words, and what to write instead.
BANNED = {
    r"told": "say, name or print",
    r"(?:is|are|was|were|be|been) served": "say who answers",
    r"(?<!as it )(?<!as they )(?:stand|stands|stood)\b(?! for|-)": "is, are",
    r"worth": "say what it saves",
    r"what is not": "name it",
    r"dear(?:er|est)": "slow, costly",
    r"mended": "fixed",
}


def sentences(text: str) -> Iterator[str]:
    """Without code, tables and headings. A list's items and what a colon separates are sentences, too."""
    text = re.sub(r"^```.*?^```", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?: {4}.*|\|.*|#.*)$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))
    for paragraph in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?:;])[*)\"]*\s", " ".join(paragraph.split()))


def docstrings(module: Path) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, kinds)]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def faults(text: str) -> list[str]:
    found = []
    for sentence in sentences(text):
        if (length := len(sentence.split())) > LONGEST:
            found.append(f"{length} words, at most {LONGEST}: {sentence}")
        for pattern, better in BANNED.items():
            if word := re.search(rf"\b{pattern}\b", sentence, re.IGNORECASE):
                found.append(f"{word[0]!r} ({better}): {sentence}")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_plain(path: Path) -> None:
    assert not faults(path.read_text())


def test_docstrings_are_plain() -> None:
    assert not {str(path): found for path in MODULES if (found := faults(docstrings(path)))}


def test_faults_are_found() -> None:
    assert len(faults("Weights are told apart.\n\n- Requests\nare served. It is worth `told`.")) == 3
    assert len(faults("word " * 36 + ". " + "word " * 35)) == 1
    assert not faults("As it stands, a name stands for a model.\n\n```\nwhat is told\n```")
