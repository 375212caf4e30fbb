"""Architectures, a file each, and how files' configurations become a `LlamaConfig`.

Knows nothing of weights. Everything it refuses is computed differently from what its family computes.
"""

from llamajax.families.gguf import from_gguf
from llamajax.families.hf import from_hf
from llamajax.families.meta import from_meta
from llamajax.families.registry import CONFIGS, FAMILIES

__all__ = ["CONFIGS", "FAMILIES", "from_gguf", "from_hf", "from_meta"]
