"""What makes an architecture: the differences from a Llama, and the names that files have for it.

A family is computed by the one model in `llamajax.model`; its file says which of the model's parts it has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llamajax.config import LlamaConfig

# Options of config.json, with the value that every family has.
_FIXED = {"hidden_act": "silu", "is_causal": True, "partial_rotary_factor": 1.0, "mrope_section": None}


def _as_a_llama(config: LlamaConfig, hf: Mapping[str, Any]) -> LlamaConfig:
    return config


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
      name: its `model_type` in config.json.
      architectures: its names there, the usual one first. One saved without its head is named a model; if it is tied,
        it is whole.
      gguf: its `general.architecture` in GGUF, with which its keys begin.
      is_interleaved: whether GGUF has RoPE's pairs of rows side by side, in q and k.
      defaults: what transformers takes for keys that config.json lacks, where it is not what it takes for a Llama.
      fixed: options of config.json that must have this value if they are there, beside those of all families.
      differs: makes its configuration of a Llama's, with the keys of config.json, or what a GGUF file says under these
        names.
      presets: configurations by name: an instruct model has its base model's. Source: each checkpoint's config.json.
    """

    name: str
    architectures: tuple[str, ...]
    gguf: str
    is_interleaved: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    differs: Callable[[LlamaConfig, Mapping[str, Any]], LlamaConfig] = _as_a_llama
    presets: Mapping[str, LlamaConfig] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """All options that must have one value if they are there."""
        return {**_FIXED, **self.fixed}
