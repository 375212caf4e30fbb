"""A model on disk, whatever its layout: its configuration and its stored tensors. Loads no weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.config import LlamaConfig
from llamajax.errors import CheckpointError, ConfigError
from llamajax.families import from_gguf, from_hf, from_meta
from llamajax.formats import DENSE_DTYPES
from llamajax.weights.fit import check_fit
from llamajax.weights.gguf import read_gguf
from llamajax.weights.names import embedding_and_head, sources
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

    Raises ConfigError or CheckpointError for what is missing, malformed, not supported, or not what its
    configuration says.
    """
    return _open_directory(path, max_len) if path.is_dir() else _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
    file = read_gguf(path)
    embedding, frequencies = (file.tensors.get(f"{name}.weight") for name in ("token_embd", "rope_freqs"))
    try:
        config = from_gguf(
            file.metadata,
            vocab_size=None if embedding is None else embedding.shape[0],
            tie_word_embeddings="output.weight" not in file.tensors,
            rope_divisors=None if frequencies is None else _divisors(frequencies),
        )
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    tensors = {name: _without_ones(tensor) for name, tensor in file.tensors.items()}
    return _checked(path, config, tensors, metadata=file.metadata)


def _divisors(frequencies: StoredTensor) -> tuple[float, ...]:
    if frequencies.format not in DENSE_DTYPES:
        raise ConfigError(f"expected numbers as {frequencies.name}, found {frequencies.format} blocks")
    return tuple(frequencies.data.astype(float).ravel().tolist())


def _without_ones(tensor: StoredTensor) -> StoredTensor:
    """A norm that is stored as a matrix of one row or column is a vector."""
    if "norm" not in tensor.name or tensor.format not in DENSE_DTYPES or tensor.data.size != max(tensor.shape):
        return tensor
    return replace(tensor, shape=(tensor.data.size,), data=tensor.data.reshape(-1))


def _open_directory(path: Path, max_len: int | None) -> Checkpoint:
    # Meta's files are in original/ when both layouts are downloaded.
    params = next((p for p in (path / "params.json", path / "original" / "params.json") if p.is_file()), None)
    make: Callable[[Mapping[str, Any]], LlamaConfig]
    if (path / "config.json").is_file():
        source, make = path / "config.json", partial(from_hf, max_len=max_len)
    elif params is not None:
        source, make = params, from_meta
    else:
        raise CheckpointError(f"{path}: expected config.json (Hugging Face) or params.json (Meta), found neither")
    content = _read_json(source)
    try:
        config = make(content)
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from e
    stop_ids = _eos_ids(source, content)
    if (generation := path / "generation_config.json").is_file():
        stop_ids |= _eos_ids(generation, _read_json(generation))
    tensors = read_safetensors(path if any(path.glob("*.safetensors")) else source.parent)
    config = _untied_if_different(config, tensors)
    return _checked(path, config, tensors, frozenset(id for id in stop_ids if 0 <= id < config.vocab_size))


def _checked(
    path: Path,
    config: LlamaConfig,
    tensors: dict[str, StoredTensor],
    stop_ids: frozenset[int] = frozenset(),
    metadata: dict[str, Any] | None = None,
) -> Checkpoint:
    # Before a model of that many layers is built: a broken file may ask for any number of them.
    check_fit(sources(config, tensors), tensors)
    return Checkpoint(path, config, tensors, stop_ids, metadata)


def _untied_if_different(config: LlamaConfig, tensors: dict[str, StoredTensor]) -> LlamaConfig:
    """As in transformers: what the file holds counts, if it has two matrices where the configuration says one."""
    embedding, head = (tensors.get(name) for name in embedding_and_head(tensors))
    if embedding is None or head is None or not config.tie_word_embeddings:
        return config
    tied = np.array_equal(embedding.data, head.data)
    embedding.release()
    head.release()
    return replace(config, tie_word_embeddings=tied)


def _eos_ids(source: Path, content: Mapping[str, Any]) -> set[int]:
    value = content.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in values):
        raise ConfigError(f"{source}: expected integers for 'eos_token_id', found {value!r:.80}")
    return set(values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: expected JSON, found an unreadable file ({e})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content
