"""`llamajax info`: what a model is, without loading its weights."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamajax.hub.aliases import DEFAULT
from llamajax.types import Device

from .. import loading, options
from ..render import human_bytes, human_count, print_json, print_rows

if TYPE_CHECKING:
    from llamajax.config import LlamaConfig


def info(
    model: options.Model = DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    dtype: options.DTypeOption = "auto",
    cache_dtype: options.CacheDTypeOption = "auto",
    device: options.DeviceOption = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Print a model's configuration, size, memory and cache. Its weights are not loaded."""
    path = loading.resolve(model)
    from llamajax.placement import bytes_per_token, find_cache_dtype
    from llamajax.weights.checkpoint import open_checkpoint
    from llamajax.weights.kept import bytes_in_memory

    checkpoint = open_checkpoint(path)
    config, found = checkpoint.config, _device(device)
    platform, has_kernels = found["platform"], found["computed_by"].startswith("native")
    kept = find_cache_dtype(cache_dtype, config, dtype, platform, has_kernels)
    formats = Counter(tensor.format for tensor in checkpoint.tensors.values())
    facts: dict[str, Any] = {
        "model": model,
        "path": str(path),
        "parameters": config.num_parameters,
        "config": asdict(config),
        "tensors": dict(formats.most_common()),
        "bytes_on_disk": sum(tensor.data.nbytes for tensor in checkpoint.tensors.values()),
        "bytes_in_memory": bytes_in_memory(config, checkpoint.tensors, dtype, platform, has_kernels),
        "cache_dtype": kept.name,
        "cache_bytes_per_token": bytes_per_token(config, kept),
        **found,
    }
    if as_json:
        print_json(facts)
    else:
        _print_facts(facts, config)


def _device(wanted: Device | None) -> dict[str, str]:
    """What computes. Jax is asked only if it may find more than a CPU: importing it takes most of a second."""
    from llamajax import kernels, placement

    if placement.is_cpu(wanted):
        placement.limit_threads()
        kind = platform = "cpu"
    else:
        loading.prepare_jax(wanted)
        from llamajax.loading import find_device

        device = find_device(wanted)
        kind, platform = device.device_kind, device.platform
    by_cpu = kernels.described(kernels.library())
    return {
        "device": kind,
        "platform": platform,
        "jax": metadata.version("jax"),
        "computed_by": by_cpu if platform == "cpu" else "XLA",
    }


def _print_facts(facts: Mapping[str, Any], config: "LlamaConfig") -> None:
    kv_bytes = facts["cache_bytes_per_token"]
    rows = {
        "model": facts["model"],
        "path": facts["path"],
        "parameters": f"{config.num_parameters:,} ({human_count(config.num_parameters)})",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "feed-forward size": config.intermediate_size,
        "attention heads": f"{config.num_attention_heads}, {config.num_key_value_heads} for keys and values",
        "head size": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": f"{config.max_position_embeddings} tokens",
        "RoPE": f"theta {config.rope_theta:g}" + (", scaled" if config.rope_divisors else ""),
        "embeddings": "tied" if config.tie_word_embeddings else "untied",
        "tensors": ", ".join(f"{count} {name}" for name, count in facts["tensors"].items()),
        "on disk": human_bytes(facts["bytes_on_disk"]),
        "in memory": human_bytes(facts["bytes_in_memory"]),
        "KV cache": f"{human_bytes(kv_bytes)} a token ({facts['cache_dtype']}), "
        f"{human_bytes(kv_bytes * config.max_position_embeddings)} for the whole context",
        "device": f"{facts['device']} ({facts['platform']}), jax {facts['jax']}",
    }
    if facts["platform"] == "cpu":
        rows["computed by"] = facts["computed_by"]
    print_rows(rows)
