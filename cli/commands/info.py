"""`llamajax info`: what a model is, without loading its weights."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from llamajax.errors import RequestError
from llamajax.hub.aliases import DEFAULT
from llamajax.types import Chip, Device

from .. import loading, options
from ..render import human_bytes, human_count, print_json, print_rows

if TYPE_CHECKING:
    from llamajax.config import LlamaConfig
    from llamajax.placement import Placement


def info(
    model: options.Model = DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    dtype: options.DTypeOption = "auto",
    cache_dtype: options.CacheDTypeOption = "auto",
    device: Annotated[
        Literal[Device, Chip] | None,
        typer.Option("--device", help="Where to compute: here, or on a chip that need not be there."),
    ] = None,
    num_rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Requests at once: print the memory that they take, and how many fit."),
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens of each of them, prompt and answer; the context.")
    ] = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Print a model's configuration, size, memory and cache, and what fits a device. Its weights are not loaded."""
    path = loading.resolve(model)
    from llamajax.placement import Placement, bytes_per_token
    from llamajax.weights.checkpoint import open_checkpoint
    from llamajax.weights.kept import bytes_in_memory

    checkpoint = open_checkpoint(path)
    config, found = checkpoint.config, _device(device)
    has_kernels = found["computed_by"].startswith("native")
    placement = Placement.of(config, found["platform"], has_kernels=has_kernels, dtype=dtype, cache_dtype=cache_dtype)
    formats = Counter(tensor.format for tensor in checkpoint.tensors.values())
    facts: dict[str, Any] = {
        "model": model,
        "path": str(path),
        "parameters": config.num_parameters,
        "config": asdict(config),
        "tensors": dict(formats.most_common()),
        "bytes_on_disk": sum(tensor.data.nbytes for tensor in checkpoint.tensors.values()),
        "bytes_in_memory": bytes_in_memory(config, checkpoint.tensors, placement),
        "cache_dtype": placement.cache_dtype.name,
        "cache_bytes_per_token": bytes_per_token(config, placement.cache_dtype),
        **found,
    }
    if num_rows or length:
        facts["capacity"] = _capacity(facts, config, placement, num_rows or 1, length or config.max_position_embeddings)
    if as_json:
        print_json(facts)
    else:
        _print_facts(facts, config)


def _device(wanted: Device | Chip | None) -> dict[str, Any]:
    """The device, its memory and its code. Asks jax only if there may be more than a CPU: importing it takes long."""
    from llamajax import kernels, placement

    memory: int | None
    kind: str = wanted or ""
    if wanted in get_args(Chip):
        platform, memory = placement.find_chip(cast(Chip, wanted))
    elif placement.is_cpu(here := cast(Device | None, wanted)):
        placement.limit_threads()
        kind = platform = "cpu"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        loading.prepare_jax(here)
        from llamajax.loading import find_device

        device = find_device(here)
        kind, platform = device.device_kind, device.platform
        memory = (device.memory_stats() or {}).get("bytes_limit")
    by_cpu = kernels.described(kernels.library())
    return {
        "device": kind,
        "platform": platform,
        "device_bytes": memory,
        "jax": metadata.version("jax"),
        "computed_by": by_cpu if platform == "cpu" else "XLA",
    }


def _capacity(
    facts: Mapping[str, Any], config: "LlamaConfig", placement: "Placement", num_rows: int, length: int
) -> dict[str, int | None]:
    """What so many rows of so many tokens take, and how many fit."""
    if length > config.max_position_embeddings:
        raise RequestError(f"--length must be at most the model's context, {config.max_position_embeddings}")
    if "jax" not in sys.modules:
        loading.prepare_jax("cpu")
    from llamajax.engine.capacity import Capacity
    from llamajax.engine.memory import Footprint

    footprint = Footprint(config, placement)
    memory, weights = facts["device_bytes"], facts["bytes_in_memory"]
    return asdict(Capacity.of(footprint, num_rows, length, None if memory is None else memory - weights))


def _print_facts(facts: Mapping[str, Any], config: "LlamaConfig") -> None:
    kv_bytes = facts["cache_bytes_per_token"]
    rows = {
        "model": facts["model"],
        "path": facts["path"],
        "architecture": config.family,
        "parameters": f"{config.num_parameters:,} ({human_count(config.num_parameters)})",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "feed-forward size": config.intermediate_size,
        "attention heads": f"{config.num_attention_heads}, {config.num_key_value_heads} for keys and values",
        "head size": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": f"{config.max_position_embeddings} tokens",
        "RoPE": f"theta {config.rope_theta:g}"
        + (", scaled" if config.rope_divisors else "")
        + (f", none in {len(without)} of the layers" if (without := config.layers_without_rope) else ""),
        "embeddings": "tied" if config.tie_word_embeddings else "untied",
        "tensors": ", ".join(f"{count} {name}" for name, count in facts["tensors"].items()),
        "on disk": human_bytes(facts["bytes_on_disk"]),
        "in memory": human_bytes(facts["bytes_in_memory"]),
        "KV cache": f"{human_bytes(kv_bytes)} a token ({facts['cache_dtype']}), "
        f"{human_bytes(kv_bytes * config.max_position_embeddings)} for the whole context",
        "device": f"{facts['device']} ({facts['platform']}), jax {facts['jax']}",
    }
    if config.sliding_window:
        rows["attention"] = f"to the last {config.sliding_window} tokens"
    if facts["platform"] == "cpu":
        rows["computed by"] = facts["computed_by"]
    if facts["device_bytes"] is not None:
        rows["its memory"] = human_bytes(facts["device_bytes"])
    if it := facts.get("capacity"):
        taken = [facts["bytes_in_memory"], it["rows"], it["prompt"], it["temporary"]]
        weights, row_bytes, prompt, temporary = map(human_bytes, taken)
        rows[f"{it['num_rows']} rows of {it['length']}"] = (
            f"{human_bytes(sum(taken))}: weights {weights}, rows {row_bytes}, a prompt in prefill {prompt}, "
            f"temporary about {temporary}"
        )
        if it["most_rows"] is not None:
            rows["rows that fit"] = it["most_rows"]
    print_rows(rows)
