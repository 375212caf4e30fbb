"""How many rows fit a device's memory beside a model's weights: computed from sizes, without a device."""

from dataclasses import dataclass

from llamajax.engine.batch import row_counts
from llamajax.engine.memory import Footprint
from llamajax.engine.pool import pages
from llamajax.engine.runner import CHUNKS, cache_len, power_of_two
from llamajax.ops import PAGE_LEN

# The most rows that `most_rows` tries.
_MOST_ROWS = 4096


@dataclass(frozen=True)
class Capacity:
    """The memory of a number of sequences of equal length, in bytes, as the engine makes their rows.

    Attributes:
      num_rows: rows of the batch: the engine makes few counts of them. With pages, rows without a sequence have none,
        and do not count here.
      length: positions that each row has room for.
      rows: bytes of all rows.
      prompt: bytes of one more row, whose prompt is being prefilled.
      temporary: about how many bytes a step takes while it runs.
      most_rows: how many rows fit the device beside the weights; 0 if none, None if its memory is unknown.
    """

    num_rows: int
    length: int
    rows: int
    prompt: int
    temporary: int
    most_rows: int | None

    @classmethod
    def of(cls, footprint: Footprint, sequences: int, num_tokens: int, free_bytes: int | None) -> "Capacity":
        """The memory of so many sequences. `free_bytes` is what the weights leave free, None if unknown."""
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
            footprint.rows(1, 0 if is_paged else length),  # with pages, the row keeps those of its prefill
            footprint.temporary(num_rows, length, *prompt),
            None
            if free_bytes is None
            else max((n for n in fitting if footprint.needed(n, length, *prompt) <= free_bytes), default=0),
        )
