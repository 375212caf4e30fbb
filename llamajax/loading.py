"""A model's name to a model that runs: finds its files, the device and what computes there, and reads the weights."""

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from llamajax import checks, hub
from llamajax.config import LlamaConfig
from llamajax.engine.runner import Runner
from llamajax.errors import PlatformError, RequestError
from llamajax.interrupts import keep_interrupts
from llamajax.llm import LLM
from llamajax.ops import native, takes_int8
from llamajax.tokenizers import sandbox
from llamajax.tokenizers.chat import builtin_template, find_template
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.load import load_directory
from llamajax.types import MAX_THREADS, CacheDType, Device, DType
from llamajax.weights.checkpoint import open_checkpoint
from llamajax.weights.load import load_weights


def load(
    name: str | Path = hub.DEFAULT,
    *,
    max_seq_len: int | None = None,
    dtype: DType = "auto",
    cache_dtype: CacheDType = "auto",
    device: Device | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LLM:
    """Loads a model, fetching it first if it is not on disk.

    Args:
      name: a directory, a .gguf file, an alias, or a repository on the hub, as `hub.resolve` reads them.
      max_seq_len: tokens that a prompt and its answer may take; the model's context if None.
      dtype: "auto" keeps dense weights as they were shipped, and quantized ones in their blocks on a CPU with native
        kernels, elsewhere in bf16; "int8" takes half of bf16's memory, for a perplexity that is 0.6 % higher (the
        default model's).
      cache_dtype: "auto" keeps keys and values in 16 bits, or in 32 where these are faster or `dtype` has them;
        "int8" takes half of 16 bits' memory and time, on a CPU with native kernels.
      device: the first accelerator, or else the CPU, if None.
      progress: called with bytes of weights read so far, and in all.

    Raises LlamaJaxError of the kind that fits: an unknown name, a checkpoint that is not a Llama or is broken.
    """
    for option, value, kinds in (
        ("dtype", dtype, DType),
        ("cache_dtype", cache_dtype, CacheDType),
        ("device", device or "cpu", Device),
    ):
        if value not in get_args(kinds):
            raise RequestError(f"{option} must be one of {', '.join(get_args(kinds))}, not {value!r}")
    keep_interrupts()
    _use_compilation_cache()
    path = hub.resolve(str(name))
    chosen = find_device(device)
    # What is no length, the runner refuses once it can tell the model's context.
    longest = int(max_seq_len) if max_seq_len is not None and checks.is_whole(max_seq_len) else None
    checkpoint = open_checkpoint(path, longest)
    tokenizer = load_directory(path) if checkpoint.metadata is None else from_gguf(checkpoint.metadata)
    template = find_template(path if checkpoint.metadata is None else checkpoint.metadata)
    if template is None:
        template = builtin_template(tokenizer, checkpoint.stop_ids, str(name))
    if template is not None:
        sandbox.start()
    config = checkpoint.config
    kept = find_cache_dtype(cache_dtype, config, chosen, dtype)
    weights = load_weights(config, checkpoint.tensors, chosen, dtype, progress)
    runner = Runner(config, weights, device=chosen, max_seq_len=max_seq_len, cache_dtype=kept)
    return LLM(runner, tokenizer, template, checkpoint.stop_ids | tokenizer.stop_ids)


def find_cache_dtype(wanted: CacheDType, config: LlamaConfig, device: jax.Device, dtype: DType) -> np.dtype:
    """What the KV cache is kept in.

    Raises PlatformError for int8 where it is not supported.
    """
    if wanted == "int8":
        if takes_int8(device, config.head_dim):
            return jnp.dtype(jnp.int8)
        found = f"heads of {config.head_dim} numbers on {device.platform}, computed by {native.implementation()}"
        raise PlatformError(
            "a KV cache in int8 needs a CPU with native kernels, and heads of a multiple of 8 numbers, not "
            f"{found}: leave out cache_dtype"
        )
    if dtype == "float32":
        return jnp.dtype(jnp.float32)
    if device.platform != "cpu":
        return jnp.dtype(jnp.bfloat16)
    # XLA's CPU products with few rows are slow in 16 bits, and it writes into bf16 arrays by way of f32.
    return jnp.dtype(jnp.float16 if native.available() else jnp.float32)


def find_device(kind: Device | None) -> jax.Device:
    """The first device of a kind, or of the best kind there is.

    Raises PlatformError if there is none.
    """
    _limit_threads()
    try:
        return jax.devices(kind)[0]
    except (RuntimeError, AssertionError) as e:  # jax asserts that it has found any of JAX_PLATFORMS
        extra = {"gpu": "llamajax[cuda12]", "tpu": "llamajax[tpu]"}.get(kind or "", "jax")
        platforms = os.environ.get("JAX_PLATFORMS")
        limited = f", and JAX_PLATFORMS={platforms!r} right" if platforms else ""
        reason = f" ({e})" if str(e) else ""
        raise PlatformError(f"no {kind or 'device'} that jax can use: is {extra} installed{limited}?{reason}") from None


def _limit_threads() -> None:
    """Has XLA compute on as many threads as LLAMAJAX_THREADS says. The native kernels take XLA's.

    It counts when jax looks for its devices for the first time.
    """
    if number := os.environ.get("LLAMAJAX_THREADS"):
        if not number.isdecimal() or not 1 <= int(number) <= MAX_THREADS:
            raise PlatformError(f"LLAMAJAX_THREADS must be a number from 1 to {MAX_THREADS}, not {number!r:.40}")
        os.environ["PJRT_NPROC"] = str(int(number))


def _use_compilation_cache() -> None:
    """Keeps compiled programs between processes, unless the user's own settings already do."""
    setting, folder = "jax_compilation_cache_dir", hub.home() / "xla"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # What cannot be written, or was not written whole, is compiled anew each time; jax need not warn of each program.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if getattr(jax.config, setting) is None and os.access(folder, os.W_OK):
        jax.config.update(setting, str(folder))
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
