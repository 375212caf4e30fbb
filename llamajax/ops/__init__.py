"""Arithmetic on weights and KV caches, for each way of keeping them. How one is kept decides what computes."""

from llamajax.ops.attention import attention
from llamajax.ops.kv import PAGE_LEN, KeysValues, Positions
from llamajax.ops.linear import Dense, Int8Weight, quantize_int8
from llamajax.ops.packed import PackedWeight
from llamajax.ops.stacked import Stacked, alone
from llamajax.ops.weight import Norm, Parameter, Weight

__all__ = [
    "PAGE_LEN",
    "Dense",
    "Int8Weight",
    "KeysValues",
    "Norm",
    "PackedWeight",
    "Parameter",
    "Positions",
    "Stacked",
    "Weight",
    "alone",
    "attention",
    "quantize_int8",
]
