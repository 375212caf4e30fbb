"""Which pages hold the beginnings of prompts: a tree of whole pages, each the child of the page before it.

Plain Python: knows page numbers and token ids, not the pages' content. Only prefilled pages are kept: decode rounds
keys and values in another way, so that sharing its pages would change answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llamajax.ops import PAGE_LEN

_Tokens = tuple[int, ...]


@dataclass(eq=False)
class _Node:
    """A page, and the pages that may follow it, by their tokens."""

    page: int
    parent: "_Node | None"
    tokens: _Tokens
    children: "dict[_Tokens, _Node]" = field(default_factory=dict)


class Prefixes:
    """A tree of pages."""

    def __init__(self) -> None:
        self._root = _Node(-1, None, ())
        self._nodes: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, page: int) -> bool:
        return page in self._nodes

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """The pages of the longest known prefix. It ends before the last token, whose scores must be computed."""
        node, found = self._root, list[int]()
        for tokens in _pages(token_ids[:-1]):
            if (child := node.children.get(tokens)) is None:
                break
            node = child
            found.append(child.page)
        return found

    def insert(self, token_ids: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Keeps the whole pages of a prompt. Where the tree has the same page already, it keeps its own.

        Returns the pages that the tree has of this prompt: they hold the same, to the last bit.
        """
        node, kept = self._root, list[int]()
        for tokens, page in zip(_pages(token_ids), pages, strict=False):
            child = node.children.get(tokens)
            if child is None:
                child = node.children[tokens] = self._nodes[page] = _Node(page, node, tokens)
            node = child
            kept.append(child.page)
        return kept

    def remove(self, page: int) -> None:
        """Removes a leaf."""
        node = self._nodes.pop(page)
        assert node.parent and not node.children
        del node.parent.children[node.tokens]


def _pages(token_ids: Sequence[int]) -> Iterator[_Tokens]:
    for end in range(PAGE_LEN, len(token_ids) + 1, PAGE_LEN):
        yield tuple(token_ids[end - PAGE_LEN : end])
