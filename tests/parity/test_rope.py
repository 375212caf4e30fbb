"""RoPE against transformers' frequencies and tables, and the published divisors."""

import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.config import LlamaConfig
from llamajax.families import CONFIGS, from_hf
from llamajax.model.rope import rope_tables
from llamajax.ops.attention import rotate

from .. import tiny_model
from .tiny import CASES, PROMPT_LEN, goldens

strict_promotion = tiny_model.strict_promotion

GOLDENS = goldens()


@pytest.mark.parametrize(
    ("name", "ones", "between", "factor"),
    [
        ("llama3.2-1b", 15, [1.651329, 3.292262, 9.666729], 32.0),
        ("llama3.2-3b", 29, [1.234937, 1.651329, 2.276660, 3.292262, 5.171596, 9.666729], 32.0),
        ("llama3.1-8b", 29, [1.207484, 1.553415, 2.026313, 2.694530, 3.684253, 5.257327], 8.0),
    ],
)
def test_divisors(name: str, ones: int, between: list[float], factor: float) -> None:
    config = CONFIGS[name]
    rest = config.head_dim // 2 - ones - len(between)
    assert config.rope_divisors == pytest.approx([1.0] * ones + between + [factor] * rest, abs=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_tables(name: str) -> None:
    config, positions = CONFIGS[name], GOLDENS["rope/positions"]
    cos, sin = rope_tables(config, jnp.asarray(positions, jnp.int32))
    # An angle is rounded to 24 bits, and so is the frequency it is a multiple of.
    tolerance = 1e-6 + positions[:, None] * 2.0**-22
    assert (np.abs(cos - GOLDENS[f"rope/{name}/cos"]) < tolerance).all()
    assert (np.abs(sin - GOLDENS[f"rope/{name}/sin"]) < tolerance).all()


@pytest.mark.parametrize(
    "config, frequencies, factor",
    [
        *((config, GOLDENS[f"rope/{name}/inv_freq"], 1.0) for name, config in CONFIGS.items()),
        *(
            (from_hf(hf, max_len=PROMPT_LEN), GOLDENS[f"{case}/inv_freq"], GOLDENS[f"{case}/factor"])
            for case, hf in CASES.items()
        ),
    ],
    ids=[*CONFIGS, *(f"tiny-{case}" for case in CASES)],
)
def test_frequencies(config: LlamaConfig, frequencies: np.ndarray, factor: float) -> None:
    """The sines at position 1, of transformers' frequencies and times its factor, to f32's precision."""
    _, sin = rope_tables(config, jnp.ones(1, jnp.int32))
    np.testing.assert_allclose(sin[0], factor * np.sin(frequencies.astype(float)), rtol=1e-6)


def test_rotate_turns_pairs_of_halves() -> None:
    """As complex numbers x[i] + j x[i + H/2], times e^(j angle)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 8)).astype(np.float32)
    angles = rng.uniform(0, 6, (5, 4)).astype(np.float32)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    found = rotate(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-6)
