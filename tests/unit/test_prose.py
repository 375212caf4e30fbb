"""Documents, comments and messages are plain English: short sentences, and no words that a stranger has to guess."""

import ast
import re
import tokenize
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PAGES = [*sorted(PROJECT.glob("*.md")), *sorted((PROJECT / "docs").glob("*.md"))]
PRODUCT, OTHERS = (
    [path for room in rooms for path in sorted((PROJECT / room).rglob("*.py")) if path != Path(__file__)]
    for rooms in (("llamajax", "cli"), ("scripts", "tests"))
)
KERNELS = sorted((PROJECT / "llamajax" / "ops" / "cpu").glob("*.[hc]*"))
LONGEST = 35  # words
# Private words, and what to write instead.
BANNED = {
    r"told": "say, name or print",
    r"(?<!first )(?<!first, )served": "say who answers",
    r"(?<!as it )(?<!as they )(?:stand|stands|stood)\b(?! for|-)": "is, are",
    r"worth": "say what it saves",
    r"what is not": "name it",
    r"dear(?:er|est)": "slow, costly",
    r"mended": "fixed",
}


def sentences(text: str) -> Iterator[str]:
    """Without code. Headings, a list's items, a table's cells and what a colon separates are sentences, too."""
    text = re.sub(r"^```.*?^```", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<=\n\n)(?: {4}.*\n+)+", "\n", text)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))
    for paragraph in re.split(r"\n\s*\n|\||^\s*(?:[-*#]+|\d+\.) ", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?:;])[*)\"]*\s", " ".join(paragraph.split()))


def docstrings(module: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, kinds)]
    return filter(None, map(ast.get_docstring, nodes))


def comments(module: Path) -> Iterator[str]:
    """Those of lines that follow each other are one."""
    with tokenize.open(module) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
    for _, lines in groupby(enumerate(tokens), lambda it: it[1].start[0] - it[0]):
        yield "\n".join(token.string.lstrip("#: ") for _, token in lines)


def messages(module: Path) -> Iterator[str]:
    """Help, errors and notes, and whatever other strings are more than a name."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value


def long_sentences(text: str) -> list[str]:
    lengths = {sentence: len(sentence.split()) for sentence in sentences(text)}
    return [f"{length} words, at most {LONGEST}: {it}" for it, length in lengths.items() if length > LONGEST]


def private_words(text: str) -> list[str]:
    return [
        f"{word[0]!r} ({better}): {sentence}"
        for sentence in sentences(text)
        for pattern, better in BANNED.items()
        if (word := re.search(rf"\b{pattern}\b", sentence, re.IGNORECASE))
    ]


def faults(text: str) -> list[str]:
    return long_sentences(text) + private_words(text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_plain(path: Path) -> None:
    assert not faults(path.read_text())


@pytest.mark.parametrize("texts", [docstrings, comments])
def test_modules_are_plain(texts: Callable[[Path], Iterator[str]]) -> None:
    texts_of = {path: "\n\n".join(texts(path)) for path in PRODUCT + OTHERS}
    assert not {str(path): found for path, text in texts_of.items() if (found := faults(text))}


def test_messages_are_plain() -> None:
    texts = {path: "\n\n".join(messages(path)) for path in PRODUCT}
    assert not {str(path): found for path, text in texts.items() if (found := private_words(text))}


def test_kernels_are_plain() -> None:
    texts = {path: "\n".join(line.partition("//")[2] for line in path.read_text().split("\n")) for path in KERNELS}
    assert not {str(path): found for path, text in texts.items() if (found := faults(text))}


def test_faults_are_found() -> None:
    assert len(faults("Weights are told apart.\n\n- Requests\nare served. It is worth `told`.")) == 3
    assert len(faults("# What is not new\n\n| a cell | stood here |\n|---|---|\n")) == 2
    assert len(faults("word " * 36 + ". " + "word " * 35)) == 1
    assert len(faults("Args:\n  name: one\n    word that is told.")) == 1
    assert not faults("As it stands, a name stands for a model.\n\n    what is told\n\n```\nwhat is told\n```")
