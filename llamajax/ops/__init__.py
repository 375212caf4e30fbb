"""Arithmetic that has more than one implementation. The choice between them is made here and nowhere else."""

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
