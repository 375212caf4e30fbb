"""The tokenizer inside a GGUF file, from its metadata.

Knows the `tokenizer.ggml.*` keys of the kinds `gpt2` (byte-level BPE) and `llama` (SentencePiece), and which split
pattern a `tokenizer.ggml.pre` names. Does not know how the file is read. Sources: ggml's docs/gguf.md, and
llama.cpp's src/llama-vocab.cpp for the names of patterns and the defaults.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llamajax.errors import TokenizerError
from llamajax.text import one_line
from llamajax.tokenizers.base import Tokenizer, looks_special

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # SentencePiece numbers them so too

_LLAMA3 = {"llama-bpe", "llama3", "llama-v3", "falcon3"}
_PATTERN_OF_PRE = {
    **dict.fromkeys((*_LLAMA3, "smaug-bpe", "dbrx"), "llama3"),
    **dict.fromkeys(("smollm", "refact", "starcoder", "minerva-7b"), "smollm"),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "trillion", "mellum"), "gpt-2"),
}


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file's metadata describes.

    Args:
      metadata: keys as in the file; arrays are lists or numpy arrays.

    Raises:
      TokenizerError: keys are missing, contradict each other or name a kind that the Llama family does not use.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"GGUF metadata: expected a tokenizer of kind gpt2 or llama, found {kind!r}")
    try:
        tokens = _list(metadata, "tokens")
        types = _token_types(metadata, tokens)
        return (_byte_level if kind == "gpt2" else _sentencepiece)(metadata, tokens, types)
    except TokenizerError:
        raise
    except Exception as error:  # the `tokenizers` library raises nothing more specific
        raise TokenizerError(f"GGUF metadata: the {kind} tokenizer cannot be built: {one_line(error)}") from error


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    from llamajax.tokenizers.hf import HFTokenizer

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre == "default":  # what early conversions wrote, or nothing, of Llama 3 too
        pre = "llama-bpe" if "<|begin_of_text|>" in tokens else "gpt-2"
    vocab = {token: i for i, token in enumerate(tokens) if types[i] in (_NORMAL, _USER_DEFINED)}
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _LLAMA3))
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [AddedToken(token, normalized=False) for i, token in enumerate(tokens) if types[i] == _USER_DEFINED]
    )
    return HFTokenizer(
        backend,
        {i: AddedToken(token) for i, token in enumerate(tokens) if types[i] in (_CONTROL, _UNKNOWN)},
        vocab_size=len(tokens),
        bos_id=_bos_id(metadata, tokens, default=pre in _LLAMA3),
        eos_ids=_eos_ids(metadata, tokens),
    )


def _pre_tokenizer(pre: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    from llamajax.tokenizers.tiktoken import SPLIT_PATTERN

    match _PATTERN_OF_PRE.get(pre):
        case "llama3":
            split = Split(Regex(SPLIT_PATTERN), "isolated")
            return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
        case "smollm":
            return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        case "gpt-2":
            return ByteLevel(add_prefix_space=False)
    known = ", ".join(_PATTERN_OF_PRE)
    raise TokenizerError(f"GGUF metadata: unknown pre-tokenizer {pre!r} (tokenizer.ggml.pre): expected {known}")


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    from llamajax.tokenizers.sentencepiece import SentencePieceTokenizer

    model = ModelProto()
    for token, score, token_type in zip(tokens, _list(metadata, "scores"), types, strict=True):
        model.pieces.add(piece=token, score=score, type=token_type)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = _BYTE in types
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceTokenizer(
        model, bos_id=_bos_id(metadata, tokens, default=True), eos_ids=_eos_ids(metadata, tokens)
    )


def _list(metadata: Mapping[str, Any], name: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise TokenizerError(f"GGUF metadata: tokenizer.ggml.{name} is missing")
    return value.tolist() if isinstance(value, np.ndarray) else list(value)


def _token_types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    if "tokenizer.ggml.token_type" in metadata:
        types = _list(metadata, "token_type")
    else:
        types = [_USER_DEFINED if looks_special(token) else _NORMAL for token in tokens]
    if len(types) != len(tokens):
        raise TokenizerError(f"GGUF metadata: {len(tokens)} tokens, but {len(types)} token types")
    return [
        _CONTROL if token_type == _USER_DEFINED and looks_special(token) else token_type
        for token, token_type in zip(tokens, types, strict=True)
    ]


def _token_id(metadata: Mapping[str, Any], tokens: list[str], name: str) -> int | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is not None and not 0 <= token_id < len(tokens):
        raise TokenizerError(f"GGUF metadata: {name}_token_id {token_id} is not among {len(tokens)} tokens")
    return None if token_id is None else int(token_id)


def _bos_id(metadata: Mapping[str, Any], tokens: list[str], *, default: bool) -> int | None:
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", default)
    return _token_id(metadata, tokens, "bos") if add_bos else None


def _eos_ids(metadata: Mapping[str, Any], tokens: list[str]) -> list[int | None]:
    return [_token_id(metadata, tokens, name) for name in ("eos", "eot", "eom")]
