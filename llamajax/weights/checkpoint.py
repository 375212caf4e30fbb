"""A model on disk, whatever its layout: its configuration and its stored tensors. Loads no weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llamajax.config import LlamaConfig
from llamajax.errors import CheckpointError, ConfigError
from llamajax.weights.gguf import read_gguf
from llamajax.weights.safetensors import read_safetensors
from llamajax.weights.tensor import StoredTensor


@dataclass(frozen=True)
class Checkpoint:
    """What a directory or a GGUF file holds.

    Attributes:
      path: the directory or file.
      config: the model's.
      tensors: by their stored names, memory-mapped.
      stop_ids: token ids that end a text, as far as the configuration names them.
      metadata: a GGUF file's; None for a directory.
    """

    path: Path
    config: LlamaConfig
    tensors: dict[str, StoredTensor]
    stop_ids: frozenset[int]
    metadata: dict[str, Any] | None


def open_checkpoint(path: Path, max_len: int | None = None) -> Checkpoint:
    """Opens a .gguf file, a Hugging Face directory, or one with Meta's params.json beside safetensors.

    Args:
      max_len: the longest text that will be computed, as for `rope_scaling`.

    Raises ConfigError or CheckpointError for what is missing, malformed or not a Llama.
    """
    return _open_directory(path, max_len) if path.is_dir() else _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
    file = read_gguf(path)
    frequencies = file.tensors.get("rope_freqs.weight")
    try:
        config = LlamaConfig.from_gguf(
            file.metadata,
            tie_word_embeddings="output.weight" not in file.tensors,
            rope_divisors=None if frequencies is None else tuple(frequencies.data.astype(float).ravel().tolist()),
        )
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    return Checkpoint(path, config, file.tensors, frozenset(), file.metadata)


def _open_directory(path: Path, max_len: int | None) -> Checkpoint:
    # Meta's files stand in original/ when both layouts are downloaded.
    params = next((p for p in (path / "params.json", path / "original" / "params.json") if p.is_file()), None)
    make: Callable[[Mapping[str, Any]], LlamaConfig]
    if (path / "config.json").is_file():
        source, make = path / "config.json", partial(LlamaConfig.from_hf, max_len=max_len)
    elif params is not None:
        source, make = params, LlamaConfig.from_meta
    else:
        raise CheckpointError(f"{path}: expected config.json (Hugging Face) or params.json (Meta), found neither")
    try:
        config = make(_read_json(source))
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from e
    stop_ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            stop_ids |= _ids(_read_json(path / name).get("eos_token_id"))
    holds_tensors = any(path.glob("*.safetensors"))
    tensors = read_safetensors(path if holds_tensors else source.parent)
    return Checkpoint(path, config, tensors, frozenset(stop_ids), None)


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {id for id in values if isinstance(id, int)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: expected JSON, found an unreadable file ({e})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content
