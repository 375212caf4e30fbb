"""A tiny Llama of random weights: its runner, its forward pass in numpy, and a count of what gets compiled."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llamajax import ops
from llamajax.config import LlamaConfig
from llamajax.engine import programs
from llamajax.engine.runner import Runner
from llamajax.engine.sequential import OneSlot, Sequential
from llamajax.model.llama import Llama
from llamajax.ops import native
from llamajax.placement import Placement
from llamajax.types import DType, Request, Token

# On a CPU, a cache's length shows in the last bits while heads * length < 4096 (1 to 8 heads compared): 8 heads.
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=2048,
    rope_divisors=(1.0, 1.0, 2.0, 4.0),
    rope_attention_factor=1.1,
)


@pytest.fixture(scope="module", autouse=True)
def strict_promotion() -> Iterator[None]:
    """Implicit conversions and broadcasts are errors, in each module that has this name."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def random_weights(config: LlamaConfig = CONFIG) -> dict[str, np.ndarray]:
    """Each parameter's path in the model -> float32, of a size that makes scores and attention vary."""
    rng = np.random.default_rng(0)
    weights = {}
    for keys, parameter in nnx.to_flat_state(nnx.state(Llama(config))):
        path, shape = ".".join(map(str, keys)), parameter.get_value().shape
        noise = rng.standard_normal(shape)
        gain = 1.0 if "embed" in path else 3 / np.sqrt(shape[-1])
        weights[path] = (1 + noise / 10 if len(shape) == 1 else gain * noise).astype(np.float32)
    return weights


def rows_of(weight: ops.Parameter) -> np.ndarray:
    """All rows of a matrix, however it is kept, in float32."""
    number = weight.shape[0]
    return np.asarray((ops.Dense(weight) if isinstance(weight, jax.Array) else weight).rows(jnp.arange(number)))


def placed(
    config: LlamaConfig = CONFIG, dtype: DType = "auto", device: jax.Device | None = None, **kept: Any
) -> Placement:
    """As `llamajax.load` places a model, but for a KV cache in f32, and for what else is given."""
    device = device or jax.devices()[0]
    found = Placement.of(config, device.platform, has_kernels=native.available(), dtype=dtype, device=device)
    return replace(found, **{"cache_dtype": np.dtype(np.float32), **kept})


def tiny_runner(
    max_seq_len: int | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    config: LlamaConfig = CONFIG,
    **kept: Any,
) -> Runner:
    """A runner of its own, placed as `placed` says; compiled programs are shared by all of one configuration."""
    weights = random_weights(config) if weights is None else weights
    return Runner(config, weights, placed(config, **kept), max_seq_len)


def answer_alone(runner: Runner, request: Request) -> list[Token]:
    """By the sequential strategy, with nothing in the cache."""
    return list(Sequential(OneSlot(runner), request))


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()


def reference_logits(ids: Sequence[int]) -> np.ndarray:
    """Scores [T, V] of the model with `random_weights`, in float64: the whole sequence at once, without a cache."""
    w = {path: weight.astype(np.float64) for path, weight in random_weights().items()}
    T, H, N, K = len(ids), CONFIG.head_dim, CONFIG.num_attention_heads, CONFIG.num_key_value_heads

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * weight

    def rotate(x: np.ndarray) -> np.ndarray:
        frequency = CONFIG.rope_theta ** -(np.arange(H // 2) / (H // 2)) / CONFIG.rope_divisors
        factor = CONFIG.rope_attention_factor * np.exp(1j * np.arange(T)[:, None, None] * frequency)
        turned = factor * (x[..., : H // 2] + 1j * x[..., H // 2 :])
        return np.concatenate([turned.real, turned.imag], -1)

    def attend(x: np.ndarray, layer: str) -> np.ndarray:
        heads = (x @ w[f"{layer}.self_attn.qkv_proj.weight"].T).reshape(T, -1, H)
        query, key, value = np.split(heads, [N, N + K], 1)
        query, key = rotate(query), rotate(key)
        mixed = []
        for n in range(N):
            k = n * K // N
            scores = query[:, n] @ key[:, k].T / np.sqrt(H)
            scores = np.exp(np.where(np.tri(T, dtype=bool), scores - scores.max(-1, keepdims=True), -np.inf))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ value[:, k])
        return np.concatenate(mixed, -1) @ w[f"{layer}.self_attn.o_proj.weight"].T

    def mlp(x: np.ndarray, layer: str) -> np.ndarray:
        gate, up = np.split(x @ w[f"{layer}.mlp.gate_up_proj.weight"].T, 2, -1)
        return (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}.mlp.down_proj.weight"].T

    x = w["embed_tokens.weight"][np.asarray(ids)]
    for i in range(CONFIG.num_hidden_layers):
        layer = f"layers.{i}"
        x = x + attend(norm(x, w[f"{layer}.input_layernorm.weight"]), layer)
        x = x + mlp(norm(x, w[f"{layer}.post_attention_layernorm.weight"]), layer)
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


def forget_programs() -> None:
    """Forgets what this process has compiled so far."""
    programs._programs.clear()
    jax.clear_caches()


@contextmanager
def no_programs() -> Iterator[None]:
    """As `forget_programs`; runners that are made inside read nothing from disk and keep nothing there."""
    forget_programs()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """The names of the functions that XLA compiled since, such as "jit(decode)"; a cached program counts too."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
