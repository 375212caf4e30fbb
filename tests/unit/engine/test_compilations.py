"""Programs are noticed when XLA compiles them, and not when they run."""

import jax
import jax.numpy as jnp

from llamajax.engine.compilations import on_compilation


def test_each_compilation_is_reported_once() -> None:
    seconds: list[float] = []
    double = jax.jit(lambda x: x * 2 + 0.12345)
    x = jnp.ones(3)
    with on_compilation(seconds.append):
        double(x).block_until_ready()
        assert len(seconds) == 1 and seconds[0] > 0
        double(x).block_until_ready()
    jax.jit(lambda x: x * 3 + 0.12345)(x).block_until_ready()
    assert len(seconds) == 1
