"""`llamajax info`: what a model is, without loading its weights."""

from collections import Counter

from llamajax.hub.aliases import DEFAULT

from .. import loading, options
from ..render import human_bytes, human_count, print_rows


def info(
    model: options.Model = DEFAULT,
    dtype: options.DTypeOption = "auto",
    device: options.DeviceOption = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Print a model's configuration, size, memory and cache. Its weights are not loaded."""
    path = loading.resolve(model)
    loading.prepare_jax(device)
    import jax

    from llamajax.llm import cache_dtype, find_device
    from llamajax.ops import native
    from llamajax.weights.checkpoint import open_checkpoint
    from llamajax.weights.load import bytes_in_memory

    checkpoint = open_checkpoint(path)
    config, chosen = checkpoint.config, find_device(device)
    kept = cache_dtype(chosen, dtype)
    formats = Counter(tensor.format for tensor in checkpoint.tensors.values())
    kv_bytes = config.kv_bytes_per_token(kept.itemsize)
    rows = {
        "model": model,
        "path": path,
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
        "tensors": ", ".join(f"{count} {name}" for name, count in formats.most_common()),
        "on disk": human_bytes(sum(tensor.data.nbytes for tensor in checkpoint.tensors.values())),
        "in memory": human_bytes(bytes_in_memory(config, checkpoint.tensors, dtype, chosen.platform)),
        "KV cache": f"{human_bytes(kv_bytes)} a token ({kept.name}), "
        f"{human_bytes(kv_bytes * config.max_position_embeddings)} for the whole context",
        "device": f"{chosen.device_kind} ({chosen.platform}), jax {jax.__version__}",
    }
    if chosen.platform == "cpu":
        rows["computed by"] = native.implementation()
    print_rows(rows)
