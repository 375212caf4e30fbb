"""Kinds of RoPE scaling, which make a model's context longer: each comes down to divisors of the frequencies.

Knows the names that a Hugging Face config.json gives them; source of the formulas, where no other is named:
transformers' modeling_rope_utils.py.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from llamajax.errors import ConfigError
from llamajax.fields import flag, integer, number


class RopeScaling(NamedTuple):
    """What a kind of scaling comes down to.

    Attributes:
      context: tokens that a text may have.
      divisors: head_dim / 2 numbers that divide RoPE's inverse frequencies; None for no scaling.
      attention_factor: multiplies the cosines and sines, and so attention's scores by its square.
    """

    context: int
    divisors: tuple[float, ...] | None = None
    attention_factor: float = 1.0


def rope_scaling(
    hf: Mapping[str, Any], *, head_dim: int, theta: float, context: int, max_len: int | None = None
) -> RopeScaling:
    """The scaling that a config.json names.

    Dynamic scaling depends on the text's length in transformers, where each longer text has frequencies of its own,
    though its cached keys keep those they were made with. Here a model has one set: none of it is scaled up to the
    context, as there; a longer `max_len`, up to `factor` times the context, gets the frequencies that a text of
    that length has there.

    Args:
      hf: the keys of the file and of its `rope_scaling` or `rope_parameters`, in one mapping.
      context: its max_position_embeddings.
      max_len: the longest text that will be computed, in tokens; None for the context.

    Raises ConfigError for a kind that is not known, and for missing or impossible numbers.
    """
    kind = hf.get("rope_type") or hf.get("type") or "default"
    try:
        match kind:
            case "default":
                return RopeScaling(context)
            case "linear":
                return RopeScaling(context, (number(hf, "factor"),) * (head_dim // 2))
            case "dynamic":
                factor = number(hf, "factor")
                longest = max(context, min(max_len or context, int(context * factor)))
                return RopeScaling(longest, ntk_divisors(factor, head_dim=head_dim, stretch=longest / context))
            case "yarn":
                return _yarn(hf, head_dim, theta, context)
            case "llama3":
                divisors = llama3_divisors(
                    number(hf, "factor"),
                    head_dim=head_dim,
                    theta=theta,
                    low_freq_factor=number(hf, "low_freq_factor"),
                    high_freq_factor=number(hf, "high_freq_factor"),
                    original_max_position_embeddings=integer(hf, "original_max_position_embeddings"),
                )
                return RopeScaling(context, divisors)
    except (ArithmeticError, ValueError) as e:
        raise ConfigError(
            f"RoPE scaling {kind!r} with an impossible factor, low_freq_factor, high_freq_factor, beta or length ({e})"
        ) from None
    raise ConfigError(f"RoPE scaling {kind!r:.80} is not supported: expected default, linear, dynamic, yarn or llama3")


def llama3_divisors(
    factor: float,
    *,
    head_dim: int,
    theta: float,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position_embeddings: int = 8192,
) -> tuple[float, ...]:
    """RoPE divisors of Llama 3.1's scaling: long wavelengths are slowed by `factor`, short ones kept.

    Source: Meta's `apply_scaling` (llama-models, models/llama3/model.py).

    Returns head_dim / 2 divisors, each between 1 and `factor`.
    """
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        turns = original_max_position_embeddings / wavelength
        smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        divisors.append(_mixed(factor, kept=smooth))
    return tuple(divisors)


def yarn_divisors(
    factor: float,
    *,
    head_dim: int,
    theta: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> tuple[float, ...]:
    """RoPE divisors of YaRN (Peng et al. 2023): what turns often within the original context is kept.

    Args:
      beta_fast, beta_slow: dimensions that turn at least `beta_fast` times are kept, those that turn at most
        `beta_slow` times are slowed by `factor`, and between them the dimensions' indices interpolate.
      truncate: round these two indices outward.

    Returns head_dim / 2 divisors, each between 1 and `factor`.
    """

    def index(turns: float) -> float:
        """Of the dimension that turns so often."""
        return head_dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return tuple(_mixed(factor, kept=1 - (i - low) / width) for i in range(head_dim // 2))


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN sharpens attention over a context that is `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def ntk_divisors(factor: float, *, head_dim: int, stretch: float) -> tuple[float, ...] | None:
    """RoPE divisors of dynamic NTK scaling for a text that is `stretch` times as long as the model's context.

    Returns head_dim / 2 divisors, from 1 for the fastest dimension on, or None at a stretch of 1.
    """
    if stretch == 1:
        return None
    # Theta grows to theta * grown ** (head_dim / (head_dim - 2)).
    grown = factor * stretch - (factor - 1)
    return tuple(grown ** (2 * i / (head_dim - 2)) for i in range(head_dim // 2))


def _yarn(hf: Mapping[str, Any], head_dim: int, theta: float, context: int) -> RopeScaling:
    original = integer(hf, "original_max_position_embeddings", default=context)
    factor = number(hf, "factor", default=context / original)
    # As in transformers, 0 is as good as none.
    mscale, mscale_all_dim = number(hf, "mscale", default=0), number(hf, "mscale_all_dim", default=0)
    if mscale and mscale_all_dim:
        usual = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all_dim)
    else:
        usual = yarn_attention_factor(factor)
    divisors = yarn_divisors(
        factor,
        head_dim=head_dim,
        theta=theta,
        original_max_position_embeddings=original,
        beta_fast=number(hf, "beta_fast", default=0) or 32.0,
        beta_slow=number(hf, "beta_slow", default=0) or 1.0,
        truncate=flag(hf, "truncate", default=True),
    )
    return RopeScaling(context, divisors, number(hf, "attention_factor", default=usual))


def _mixed(factor: float, kept: float) -> float:
    """Divides by 1 where all is kept (1 or more), by `factor` where nothing is (0 or less)."""
    kept = min(max(kept, 0.0), 1.0)
    return 1 / ((1 - kept) / factor + kept)
