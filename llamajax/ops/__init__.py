"""Arithmetic that has more than one implementation. The choice between them is made here and nowhere else."""

from llamajax.ops.attention import attention, write
from llamajax.ops.linear import Int8Weight, Weight, embed, linear, quantize_int8

__all__ = ["Int8Weight", "Weight", "attention", "embed", "linear", "quantize_int8", "write"]
