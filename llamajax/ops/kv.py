"""What attention is given beside the tokens: a KV cache, and where in it they are."""

from typing import NamedTuple

from jaxtyping import Array, Float32, Int, Int32, Real

# Positions of a page: the block of the native kernels.
PAGE_LEN = 64


class KeysValues(NamedTuple):
    """A KV cache: for XLA one layer's, for the native kernels a pool of P pages of all layers.

    A layer's is [K, S, R]: with S first a GPU would transpose it at each step. R is `placement.row_len`.

    Attributes:
      table: the numbers of this sequence's pages, in their order, if there are pages.
      layer: which of the pages' layers attention is to read and write.
    """

    key: Real[Array, "*PL K S R"]
    value: Real[Array, "*PL K S R"]
    table: Int32[Array, "M"] | None = None
    layer: Int[Array, ""] | None = None


class Positions(NamedTuple):
    """Those of T tokens: from start to start + T - 1, with the cosines and sines of their RoPE angles."""

    start: Int[Array, ""]
    cos: Float32[Array, "T H/2"]
    sin: Float32[Array, "T H/2"]
