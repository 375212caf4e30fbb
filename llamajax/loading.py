"""A model's name to a model that runs: finds its files, the device and what computes there, and reads the weights.

Imports jax late: what needs none of it goes on meanwhile.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from llamajax import checks, hub, kernels
from llamajax.config import LlamaConfig
from llamajax.errors import PlatformError, RequestError
from llamajax.interrupts import keep_interrupts
from llamajax.placement import Placement, is_cpu, limit_threads, take_most_memory
from llamajax.tokenizers import sandbox
from llamajax.tokenizers.chat import ChatTemplate, builtin_template, find_template
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.load import load_directory
from llamajax.types import CacheDType, Device, DType
from llamajax.weights.checkpoint import Checkpoint, open_checkpoint
from llamajax.weights.packing import Packing

if TYPE_CHECKING:
    import jax

    from llamajax.llm import LLM


def load(
    name: str | Path = hub.DEFAULT,
    *,
    max_seq_len: int | None = None,
    dtype: DType = "auto",
    cache_dtype: CacheDType = "auto",
    device: Device | None = None,
    max_memory: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "LLM":
    """Loads a model, fetching it first if it is not on disk.

    Args:
      name: a directory, a .gguf file, an alias, or a repository on the hub, as `hub.resolve` reads them.
      max_seq_len: tokens that a prompt and its answer may take; the model's context if None.
      dtype: "auto" keeps dense weights as the file has them, and quantized ones in their blocks on a CPU with native
        kernels, elsewhere in bf16; "int8" takes half of bf16's memory, for a perplexity that is 0.8 % higher (the
        default model's, as docs/quality.md measures it).
      cache_dtype: "auto" keeps keys and values in 16 bits, or in 32 where these are faster or `dtype` has them;
        "int8" takes half of 16 bits' memory, on a CPU with native kernels.
      device: the first accelerator, or else the CPU, if None.
      max_memory: bytes that keys and values may take, beside the weights: requests wait until there is room. None: half
        of the computer's memory, or what an accelerator has left. `max_seq_len` tokens must have room.
      progress: called with bytes of weights read so far, and in all.

    Raises LlamaJaxError of the kind that fits: an unknown name, a checkpoint that is not supported or is broken. Warns
    where XLA computes on a CPU because there are no native kernels.
    """
    opened = open_model(
        name, max_seq_len=max_seq_len, dtype=dtype, cache_dtype=cache_dtype, device=device, max_memory=max_memory
    )
    llm = load_opened(opened, progress)
    placement, wanted = llm._runner.placement, os.environ.get("LLAMAJAX_CPU")
    if placement.platform == "cpu" and not placement.has_kernels and wanted != "xla":
        warnings.warn(f"slower than it could be: computed by {kernels.described(kernels.library())}", stacklevel=2)
    return llm


@dataclass(frozen=True)
class Opened:
    """A model that is found and understood, and is being read. The options are as `load` takes them."""

    name: str
    checkpoint: Checkpoint
    template: ChatTemplate | None
    packing: Packing | None
    max_seq_len: int | None
    dtype: DType
    cache_dtype: CacheDType
    device: Device | None
    max_memory: int | None


def open_model(
    name: str | Path,
    *,
    max_seq_len: int | None = None,
    dtype: DType = "auto",
    cache_dtype: CacheDType = "auto",
    device: Device | None = None,
    max_memory: int | None = None,
) -> Opened:
    """The first half of `load`, which needs no jax: it begins to read weights, and jax is imported meanwhile.

    `load_opened` must follow. Raises as `load` does.
    """
    for option, value, kinds in (
        ("dtype", dtype, DType),
        ("cache_dtype", cache_dtype, CacheDType),
        ("device", device or "cpu", Device),
    ):
        if value not in get_args(kinds):
            raise RequestError(f"{option} must be one of {', '.join(get_args(kinds))}, not {value!r}")
    keep_interrupts()
    path = hub.resolve(str(name))
    # The runner refuses a wrong length, with the model's context in its message.
    longest = int(max_seq_len) if max_seq_len is not None and checks.is_whole(max_seq_len) else None
    checkpoint = open_checkpoint(path, longest)
    source = checkpoint.path if checkpoint.metadata is None else checkpoint.metadata
    template = find_template(source)
    if template is not None:
        sandbox.start()
    by_kernels = is_cpu(device) and not isinstance(kernels.library(), str)
    packing = None
    if by_kernels:
        here = Placement.of(checkpoint.config, "cpu", has_kernels=True, dtype=dtype)
        packing = Packing(checkpoint.config, checkpoint.tensors, here)
    return Opened(str(name), checkpoint, template, packing, max_seq_len, dtype, cache_dtype, device, max_memory)


def load_opened(opened: Opened, progress: Callable[[int, int], None] = lambda done, total: None) -> "LLM":
    """The second half of `load`, which documents the arguments and what is raised."""
    with opened.packing or nullcontext() as packing:
        from llamajax.engine.runner import Runner
        from llamajax.llm import LLM
        from llamajax.weights.load import load_weights

        _use_compilation_cache()
        checkpoint, metadata = opened.checkpoint, opened.checkpoint.metadata
        tokenizer = load_directory(checkpoint.path) if metadata is None else from_gguf(metadata)
        template = opened.template or builtin_template(tokenizer, checkpoint.stop_ids, opened.name)
        if template is not None:
            sandbox.start()
        config = checkpoint.config
        placement = place(config, opened.dtype, opened.cache_dtype, opened.device)
        weights = load_weights(config, checkpoint.tensors, placement, progress, packing)
    runner = Runner(config, weights, placement, opened.max_seq_len, opened.max_memory)
    return LLM(runner, tokenizer, template, checkpoint.stop_ids | tokenizer.stop_ids)


def place(config: LlamaConfig, dtype: DType, cache_dtype: CacheDType, kind: Device | None) -> Placement:
    """Where a model is to compute. Arguments as `load` takes them.

    Raises PlatformError if there is no such device, or the KV cache cannot be kept so.
    """
    from llamajax.ops import native

    device, has_kernels = find_device(kind), native.available()
    return Placement.of(
        config, device.platform, has_kernels=has_kernels, dtype=dtype, cache_dtype=cache_dtype, device=device
    )


def find_device(kind: Device | None) -> "jax.Device":
    """The first device of a kind, or of the best kind there is.

    Raises PlatformError if there is none.
    """
    import jax

    limit_threads()
    take_most_memory()
    try:
        return jax.devices(kind)[0]
    except (RuntimeError, AssertionError) as e:  # jax asserts that it has found any of JAX_PLATFORMS
        extra = {"gpu": "llamajax[cuda12]", "tpu": "llamajax[tpu]"}.get(kind or "", "jax")
        platforms = os.environ.get("JAX_PLATFORMS")
        limited = f", and JAX_PLATFORMS={platforms!r} right" if platforms else ""
        reason = f" ({e})" if str(e) else ""
        raise PlatformError(f"no {kind or 'device'} that jax can use: is {extra} installed{limited}?{reason}") from None


def _use_compilation_cache() -> None:
    """Keeps compiled programs between processes, unless the user's own settings already do."""
    import jax

    setting, folder = "jax_compilation_cache_dir", hub.home() / "xla"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # What cannot be written, or was not written whole, is compiled anew each time; jax need not warn of each program.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if getattr(jax.config, setting) is None and os.access(folder, os.W_OK):
        jax.config.update(setting, str(folder))
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
