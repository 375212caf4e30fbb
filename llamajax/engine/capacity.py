"""What a device has room for beside a model's weights. Asks no device."""

from dataclasses import dataclass

from llamajax.engine.batch import row_counts
from llamajax.engine.memory import Footprint
from llamajax.engine.pool import pages
from llamajax.engine.runner import CHUNKS, cache_len, power_of_two
from llamajax.ops import PAGE_LEN

# More rows than this are nobody's wish.
_MOST_ROWS = 4096


@dataclass(frozen=True)
class Capacity:
    """Of sequences of so many tokens, in bytes, as the engine makes their rows.

    Attributes:
      num_rows: rows that a batch for so many sequences has; with pages, those that have any.
      length: positions that each has room for.
      rows: all that they take, and `prompt` what one more takes that is being read.
      temporary: about what a step takes while it runs.
      most_rows: that fit the device beside the weights; 0 if none, None if its memory is unknown.
    """

    num_rows: int
    length: int
    rows: int
    prompt: int
    temporary: int
    most_rows: int | None

    @classmethod
    def of(cls, footprint: Footprint, sequences: int, num_tokens: int, free_bytes: int | None) -> "Capacity":
        """Of so many sequences of so many tokens, where the weights leave so many bytes free."""
        is_paged, num_rows = footprint.placement.has_pages, row_counts(sequences)[-1]
        length = cache_len(num_tokens, footprint.config.max_position_embeddings)
        if is_paged:
            num_rows, length = sequences, pages(num_tokens) * PAGE_LEN
        # With pages, rows are a power of two, of which those without a sequence have none.
        idle = power_of_two(num_rows) - num_rows if is_paged else 0
        prompt = 1, length, min(length, CHUNKS[-1])
        fitting = [1, *row_counts(_MOST_ROWS)]
        return cls(
            num_rows,
            length,
            footprint.rows(num_rows, length) + footprint.rows(idle, 0),
            footprint.rows(1, 0 if is_paged else length),  # its pages are its row's
            footprint.temporary(num_rows, length, *prompt),
            None
            if free_bytes is None
            else max((n for n in fitting if footprint.needed(n, length, *prompt) <= free_bytes), default=0),
        )
