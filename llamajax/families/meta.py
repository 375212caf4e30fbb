"""From the params.json of Meta's own layout."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamajax.config import LlamaConfig
from llamajax.errors import ConfigError
from llamajax.fields import flag, integer, number
from llamajax.rope_scaling import llama3_divisors


def from_meta(params: Mapping[str, Any]) -> LlamaConfig:
    """A Llama's configuration.

    The file names neither the context nor the scaling's factor: those follow the released models (8 for Llama
    3.1, 32 for the 1B and 3B of Llama 3.2).

    Raises ConfigError for a missing or malformed key.
    """
    dim, num_heads = integer(params, "dim"), integer(params, "n_heads")
    if "ffn_dim_multiplier" not in params and "hidden_dim" not in params:
        raise ConfigError("params.json needs 'ffn_dim_multiplier' or 'hidden_dim'")
    multiple = integer(params, "multiple_of", default=256)
    ffn = int(number(params, "ffn_dim_multiplier", default=1.0) * int(8 * dim / 3))
    scaled = flag(params, "use_scaled_rope", default=False)
    config = LlamaConfig(
        vocab_size=integer(params, "vocab_size"),
        hidden_size=dim,
        intermediate_size=integer(params, "hidden_dim", default=-(-ffn // max(multiple, 1)) * multiple),
        num_hidden_layers=integer(params, "n_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=integer(params, "n_kv_heads", default=num_heads),
        head_dim=dim // max(num_heads, 1),
        max_position_embeddings=131072 if scaled else 8192,
        rms_norm_eps=number(params, "norm_eps"),
        rope_theta=number(params, "rope_theta", default=10000.0),
    )
    if not scaled:
        return config
    divisors = llama3_divisors(32.0 if dim < 4096 else 8.0, head_dim=config.head_dim, theta=config.rope_theta)
    return replace(config, rope_divisors=divisors)
