"""What a model is made of: sizes and constants, by name. `families` reads them from files."""

import math
from dataclasses import dataclass

from llamajax.errors import ConfigError


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama or of a model like it, under the names a Hugging Face config.json gives them.

    `family` is its architecture, as config.json names it: the key of `families.FAMILIES`. What it may have beside a
    Llama's parts: `qkv_bias` on queries, keys and values; `qk_norm`, an RMS norm of each head's query and key before
    RoPE; `layers_without_rope`, by their numbers; a `sliding_window`, to which attention is limited.

    `rope_divisors`, head_dim / 2 of them, divide RoPE's inverse frequencies: every kind of RoPE scaling that
    a Llama uses comes down to them, and a GGUF file carries them as they are. None means no scaling. YaRN also
    multiplies the cosines and sines by `rope_attention_factor`, and so attention's scores by its square.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    rope_attention_factor: float = 1.0
    tie_word_embeddings: bool = False
    family: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    layers_without_rope: tuple[int, ...] = ()
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            size = getattr(self, name)
            # The limits are far above any model; beyond them a broken file would only exhaust the memory.
            if not isinstance(size, int) or not 1 <= size <= _LIMITS.get(name, 2**31 - 1):
                raise ConfigError(f"{name} must be a positive integer of a possible size, not {size!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, not {self.head_dim}")
        if not (self.rope_theta > 0 and self.rms_norm_eps > 0):
            raise ConfigError("rope_theta and rms_norm_eps must be positive")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ConfigError(f"expected {self.head_dim // 2} RoPE divisors, found {len(self.rope_divisors)}")
        if not all(0 < divisor < math.inf for divisor in self.rope_divisors or ()):
            raise ConfigError("RoPE divisors must be positive and finite: the scaling's factor is not")
        if not 0 < self.rope_attention_factor < math.inf:
            raise ConfigError(f"RoPE's attention_factor must be positive, not {self.rope_attention_factor}")

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied embedding counts once."""
        queries, keys = self.head_dim * self.num_attention_heads, self.head_dim * self.num_key_value_heads
        layer = self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size + 2)
        layer += (queries + 2 * keys) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

_LIMITS = {"head_dim": 65536, "num_hidden_layers": 65536}
