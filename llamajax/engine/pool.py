"""The pages of a KV cache: which sequence owns which, and their arrays on the device.

A page has the keys and values of PAGE_LEN positions, of all layers. A sequence takes pages as it grows and gives them
back when it ends, so that no cache is ever copied to a larger one. Sequences whose prompts begin alike share whole
pages, which are never written again. Knows nothing of requests.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from llamajax.engine.prefixes import Prefixes
from llamajax.model.cache import Cache
from llamajax.ops import PAGE_LEN, KeysValues


class Tables:
    """The pages of B sequences.

    Attributes:
      ids: of sequence b the first `counts[b]` of row b, in the order of their positions; -1, which the kernels refuse,
        where it has none.
      counts: how many pages each sequence has.
    """

    def __init__(self, num_rows: int, table_len: int) -> None:
        self.ids: Int32[np.ndarray, "B M"] = np.full((num_rows, table_len), -1, np.int32)
        self.counts = [0] * num_rows

    def move(self, row: int, to: "Tables", at: int) -> None:
        """Gives a sequence's pages to another row, which has none."""
        assert to.counts[at] == 0
        to.ids[at], to.counts[at] = self.ids[row], self.counts[row]
        self.ids[row], self.counts[row] = -1, 0


class Pool:
    """All pages on a device, and which are free.

    Attributes:
      num_pages: how many there are.
      most_kept: how many pages of ended prompts may stay while others, which take memory, are written for the first
        time. More of them stay only until a sequence needs a page. None: nothing is shared.
    """

    def __init__(self, num_pages: int, make: Callable[[], Cache], most_kept: int | None = None) -> None:
        """`make` makes the arrays on the device when a page is first needed."""
        self.num_pages = num_pages
        self.most_kept = most_kept
        self._make = make
        self.clear()

    def clear(self) -> None:
        """Takes all pages back, and their memory from the device."""
        self._cache: Cache = ()
        self._free = list(range(self.num_pages))[::-1]
        self._num_written = 0  # the first so many pages were written, and take memory
        self._owners = [0] * self.num_pages  # how many sequences have each page
        self._prefixes = Prefixes()
        # Pages that only the tree of prefixes has, by when they were last asked for. Whoever asks for a page asks for
        # those before it, and they come after it here: nothing goes on from the first one.
        self._unused = dict[int, None]()

    @property
    def num_free(self) -> int:
        """How many pages no sequence has. (A sequence with a page of the tree has those before it, too.)"""
        return len(self._free) + len(self._unused)

    def take(self, tables: Tables, row: int, num_positions: int) -> None:
        """Gives a sequence the pages that it lacks for so many positions.

        Raises MemoryError if there are too few.
        """
        needed = pages(num_positions)
        if self.num_free < needed - tables.counts[row]:
            raise MemoryError("no page of the KV cache is free")
        while tables.counts[row] < needed:
            self._add(tables, row, self._free_page())

    def leave(self, tables: Tables, row: int) -> None:
        """Takes a sequence's pages back.

        A call that runs on the device may still write them: whoever has them next writes after it.
        """
        for page in tables.ids[row, : tables.counts[row]].tolist()[::-1]:
            self._drop(page)
        tables.ids[row], tables.counts[row] = -1, 0

    def known(self, token_ids: Sequence[int]) -> list[int]:
        """The pages that are there of a prompt's beginning, but for its last token."""
        if self.most_kept is None:
            return []
        found = self._prefixes.match(token_ids)
        for page in found[::-1]:
            if page in self._unused:
                del self._unused[page]
                self._unused[page] = None
        return found

    def num_owned(self, ids: Sequence[int]) -> int:
        """How many of these pages a sequence has."""
        return sum(self._owners[page] > 0 for page in ids)

    def share(self, tables: Tables, row: int, known: Sequence[int]) -> None:
        """Begins a sequence with the pages of a known prefix."""
        for page in known:
            self._add(tables, row, page)

    def keep(self, tables: Tables, row: int, token_ids: Sequence[int]) -> None:
        """Keeps the whole pages of a prompt, as far as it was prefilled, for others that begin alike.

        The last token is left out: if a constraint draws the first of the answer, a step computes it again, and writes
        its page.
        """
        if self.most_kept is None:
            return
        own = tables.ids[row, : tables.counts[row]].tolist()
        for place, page in enumerate(self._prefixes.insert(token_ids[:-1], own)):
            if page != own[place]:  # another prompt that begins alike was prefilled at the same time
                self._own(page)
                self._drop(own[place])
                tables.ids[row, place] = page

    def lend(self, ids: Int32[np.ndarray, "B M"]) -> Cache:
        """The cache for a step of the sequences that have these pages, which returns it for `put`.

        A step that fails leaves it as it was, or destroys it: `is_lost` tells which.
        """
        self._cache = self._cache or self._make()
        [arrays] = self._cache
        table: Any = ids.copy()  # which a step may read as it is
        return (arrays._replace(table=table),)

    def put(self, cache: Cache) -> None:
        """Takes back the cache that a step returned."""
        [arrays] = cache
        self._cache = (arrays._replace(table=None),)

    def save(self, tables: Tables, row: int, num_positions: int) -> list[Cache]:
        """Copies a sequence's pages to the host, as far as there are so many positions."""
        [arrays] = self._cache
        ids = tables.ids[row, : pages(num_positions)]
        key, value = (np.asarray(x) for x in (arrays.key, arrays.value))
        return [(KeysValues(key[id].copy(), value[id].copy()),) for id in ids]

    def restore(self, saved: Sequence[Cache], tables: Tables, row: int, put_page: Callable[..., Cache]) -> None:
        """Gives a sequence pages, and writes into them what was saved."""
        self.take(tables, row, len(saved) * PAGE_LEN)
        for id, page in zip(tables.ids[row], saved, strict=False):
            self._cache = put_page(self._cache or self._make(), page, id)

    @property
    def is_lost(self) -> bool:
        """Whether a step that failed has destroyed what it would have written in place."""
        return any(x.is_deleted() for x in jax.tree.leaves(self._cache))

    def check(self, tables: Sequence[Tables]) -> None:
        """Asserts what always holds: a page is free, or exactly the counted owners have it."""
        rows = (row for table in tables for row in zip(table.ids, table.counts, strict=True))
        owned = [page for ids, count in rows for page in ids[:count].tolist()]
        for page, owners in enumerate(self._owners):
            assert owners == owned.count(page)
            assert (page in self._free) == (owners == 0 and page not in self._prefixes)
            assert (page in self._unused) == (owners == 0 and page in self._prefixes)
        assert len(set(self._free)) == len(self._free)

    def _add(self, tables: Tables, row: int, page: int) -> None:
        tables.ids[row, tables.counts[row]] = page
        tables.counts[row] += 1
        self._own(page)

    def _own(self, page: int) -> None:
        self._owners[page] += 1
        self._unused.pop(page, None)

    def _drop(self, page: int) -> None:
        assert self._owners[page] > 0
        self._owners[page] -= 1
        if self._owners[page] == 0 and page in self._prefixes:
            self._unused[page] = None
        elif self._owners[page] == 0:
            self._free.append(page)

    def _free_page(self) -> int:
        """A free page; if there is none, the least recently used page of the tree."""
        is_new = not self._free or self._free[-1] >= self._num_written
        if is_new and self._unused and (not self._free or len(self._unused) > (self.most_kept or 0)):
            page = next(iter(self._unused))
            self._prefixes.remove(page)
            del self._unused[page]
            return page
        page = self._free.pop()
        self._num_written = max(self._num_written, page + 1)
        return page


def pages(num_positions: int) -> int:
    """How many pages so many positions take."""
    return -(-num_positions // PAGE_LEN)


def missing(tables: Tables, rows: Mapping[int, int]) -> int:
    """How many pages sequences lack for so many positions, by their rows."""
    return sum(max(0, pages(n) - tables.counts[row]) for row, n in rows.items())
