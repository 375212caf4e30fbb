"""The tokenizer inside a GGUF file, from its metadata.

Knows the `tokenizer.ggml.*` keys of the kinds `gpt2` (byte-level BPE) and `llama` (SentencePiece). Does not know how
the file is read. Sources: ggml's docs/gguf.md, and llama.cpp's src/llama-vocab.cpp for what a missing key means.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from llamajax.errors import TokenizerError
from llamajax.text import well_formed
from llamajax.tokenizers.base import BYTE, Tokenizer, looks_special, refused
from llamajax.tokenizers.metadata import Metadata
from llamajax.tokenizers.splits import SPLITS, Split

_UNDEFINED, _NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(
    7
)  # SentencePiece's numbers, which begin at 1

# Ids that mean "none", as converters in C and Python write them.
_NO_ID = (-1, 2**32 - 1)
_DEFAULT_IDS: dict[str, dict[str, int]] = {"llama": {"unknown": 0, "bos": 1, "eos": 2}, "gpt2": {}}
_ENDS = ("eos", "eot", "eom")

# Hugging Face's names of the tokens that a chat template may write, and GGUF's.
_TEMPLATE_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # sic
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}


class _Vocabulary(NamedTuple):
    """Tokens and their types, by id; ids of named tokens by GGUF's names: "bos", "eos" and so on."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    def of_types(self, *types: int) -> dict[str, int]:
        """Tokens of some types; of equal ones, the first."""
        pairs = enumerate(zip(self.tokens, self.types, strict=True))
        found = [(token, i) for i, (token, token_type) in pairs if token_type in types and token]
        return dict(reversed(found))


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file's metadata describes.

    Args:
      metadata: keys as in the file; arrays are lists or numpy arrays.

    Raises:
      TokenizerError: keys are missing, of the wrong kind, contradict each other, or name a kind of tokenizer or a split
        that we do not know.
    """
    values = Metadata(metadata)
    kind = values.text("tokenizer.ggml.model")
    if kind not in _DEFAULT_IDS:
        raise TokenizerError(f"GGUF metadata: expected a tokenizer of kind gpt2 or llama, found {kind!r:.80}")
    with refused(f"GGUF metadata: the {kind} tokenizer cannot be built"):
        return (_byte_level if kind == "gpt2" else _sentencepiece)(values, _vocabulary(values, kind))


def template_of(metadata: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """The file's chat template, and the literals that it may write, by Hugging Face's names of them.

    Raises:
      TokenizerError: keys are of the wrong kind.
    """
    values = Metadata(metadata)
    template = values.text("tokenizer.chat_template") or values.text("tokenizer.chat_template.default")
    tokens = values.texts("tokenizer.ggml.tokens") or []
    ids = _ids(values, len(tokens), values.text("tokenizer.ggml.model") or "")
    return template, {name: tokens[ids[key]] for name, key in _TEMPLATE_TOKENS.items() if key in ids}


def _vocabulary(metadata: Metadata, kind: str) -> _Vocabulary:
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if tokens is None:
        raise TokenizerError("GGUF metadata: tokenizer.ggml.tokens is missing")
    if "".join(tokens) != well_formed("".join(tokens)):  # one check of all: nearly always they are well formed
        tokens = list(map(well_formed, tokens))
    ids = _ids(metadata, len(tokens), kind)
    declared = metadata.integers("tokenizer.ggml.token_type") or [_UNDEFINED] * len(tokens)
    if len(declared) < len(tokens):
        raise TokenizerError(f"GGUF metadata: {len(tokens)} tokens, but {len(declared)} token types")
    for name in ("bos", *_ENDS):
        token_id = metadata.integer(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and token_id not in _NO_ID and ids.get(name) != token_id:
            raise TokenizerError(f"GGUF metadata: {name}_token_id {token_id} is not among {len(tokens)} tokens")
    control = {i for name, i in ids.items() if name in ("bos", *_ENDS)}
    types = [
        token_type if token_type == _NORMAL else _type(token, token_type, i in control)
        for i, (token, token_type) in enumerate(zip(tokens, declared, strict=False))
    ]
    if _UNKNOWN not in types and "unknown" in ids and kind == "llama":
        types[ids["unknown"]] = _UNKNOWN  # sentencepiece needs one
    return _Vocabulary(tokens, types, ids)


def _type(token: str, declared: int, is_control: bool) -> int:
    if declared == _USER_DEFINED and looks_special(token):
        return _CONTROL
    if _UNDEFINED < declared <= _BYTE:
        return declared
    if is_control or looks_special(token):
        return _CONTROL
    return _BYTE if BYTE.fullmatch(token) else _NORMAL


def _ids(metadata: Metadata, num_tokens: int, kind: str) -> dict[str, int]:
    """The ids of the tokens with names, as far as they are ids."""
    ids = _DEFAULT_IDS.get(kind, {})
    for name in ("bos", *_ENDS, *_TEMPLATE_TOKENS.values()):
        token_id = metadata.integer(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and token_id not in _NO_ID:
            ids = ids | {name: token_id}
    return {name: i for name, i in ids.items() if 0 <= i < num_tokens}


def _bos_id(metadata: Metadata, vocabulary: _Vocabulary, *, default: bool) -> int | None:
    add_bos = metadata.flag("tokenizer.ggml.add_bos_token")
    return vocabulary.ids.get("bos") if (default if add_bos is None else add_bos) else None


def _byte_level(metadata: Metadata, vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    from llamajax.tokenizers.hf import HFTokenizer

    split = _split(metadata, vocabulary.tokens)
    vocab = vocabulary.of_types(_NORMAL, _USER_DEFINED, _UNUSED, _BYTE)
    merges = metadata.texts("tokenizer.ggml.merges")
    if merges is None:
        raise TokenizerError("GGUF metadata: tokenizer.ggml.merges is missing")
    backend = Backend(_merging(vocab, merges, split.ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, normalized=False) for token in vocabulary.of_types(_USER_DEFINED)])
    special = {i for i, token_type in enumerate(vocabulary.types) if token_type in (_CONTROL, _UNKNOWN)}
    return HFTokenizer(
        backend,
        {i: AddedToken(vocabulary.tokens[i]) for i in sorted(special, reverse=True)},  # of equal ones, the first stays
        tokens=dict(enumerate(vocabulary.tokens)),
        bos_id=_bos_id(metadata, vocabulary, default=split.adds_bos),
        eos_ids=[vocabulary.ids.get(name) for name in _ENDS],
    )


def _merging(vocab: dict[str, int], merges: list[str], ignore_merges: bool) -> Any:
    from tokenizers.models import BPE

    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    with suppress(Exception):  # to check each merge first would double the time
        return BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges)
    # As llama.cpp, which ignores merges of or to unknown tokens.
    known = [pair for pair in pairs if len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys()]
    return BPE(vocab=vocab, merges=known, ignore_merges=ignore_merges)


def _split(metadata: Metadata, tokens: list[str]) -> Split:
    pre = metadata.text("tokenizer.ggml.pre") or "default"
    if pre == "default" and "<|begin_of_text|>" in tokens:
        pre = "llama-bpe"  # early conversions named no split, of Llama 3 too
    if pre not in SPLITS:
        raise TokenizerError(
            f"GGUF metadata: unknown pre-tokenizer {pre!r:.80} (tokenizer.ggml.pre): expected "
            f"one of {', '.join(SPLITS)}"
        )
    return SPLITS[pre]


def _sentencepiece(metadata: Metadata, vocabulary: _Vocabulary) -> Tokenizer:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    from llamajax.tokenizers.sentencepiece import SentencePieceTokenizer

    tokens, types = vocabulary.tokens, vocabulary.types
    scores = metadata.numbers("tokenizer.ggml.scores") or [0.0] * len(tokens)
    if len(scores) < len(tokens):
        raise TokenizerError(f"GGUF metadata: {len(tokens)} tokens, but {len(scores)} scores")
    model = ModelProto()
    for token, score, token_type in zip(tokens, scores, types, strict=False):
        model.pieces.add(piece=token, score=score, type=token_type)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = len(vocabulary.of_types(_BYTE)) == 256
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = metadata.flag("tokenizer.ggml.add_space_prefix") is not False
    model.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceTokenizer(
        model,
        special={},
        added=vocabulary.of_types(_USER_DEFINED),
        bos_id=_bos_id(metadata, vocabulary, default=True),
        eos_ids=[vocabulary.ids.get(name) for name in _ENDS],
    )
