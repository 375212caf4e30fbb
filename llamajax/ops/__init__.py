"""Arithmetic on weights and KV caches, for each way of keeping them. How one is kept decides what computes."""

from llamajax.ops.attention import attention
from llamajax.ops.kv import PAGE_LEN, KeysValues, Positions
from llamajax.ops.linear import Int8Weight, Norm, Weight, embed, gated_linear, linear, quantize_int8
from llamajax.ops.packed import PackedWeight
from llamajax.ops.stacked import Stacked, alone

__all__ = [
    "PAGE_LEN",
    "Int8Weight",
    "KeysValues",
    "Norm",
    "PackedWeight",
    "Positions",
    "Stacked",
    "Weight",
    "alone",
    "attention",
    "embed",
    "gated_linear",
    "linear",
    "quantize_int8",
]
