"""SentencePiece models (Llama 1 and 2, TinyLlama): BPE over characters with byte fallback.

Knows the model's protocol buffer; where it comes from (a .model file, a GGUF file's metadata) does not matter.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llamajax.text import well_formed
from llamajax.tokenizers.base import BYTE, SPACE, Tokenizer, looks_special, refused, split_special, stop_ids
from llamajax.tokenizers.config import TokenizerConfig

_Piece = ModelProto.SentencePiece
_NO_CONFIG = TokenizerConfig()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, and tokens added to it.

    Text between special and added tokens is encoded as if it were alone, with its dummy prefix, as llama.cpp does.
    """

    def __init__(
        self,
        model: ModelProto,
        *,
        special: Mapping[str, int],
        added: Mapping[str, int],
        bos_id: int | None,
        eos_ids: Iterable[int | None],
    ) -> None:
        """
        Args:
          model: is changed. Its pieces may be empty or there twice.
          special: special tokens beyond the model's control pieces, by literal.
          added: ordinary tokens that are found before the model sees the text, by literal.

        Raises:
          RuntimeError: sentencepiece refuses the model.
        """
        control = [(p.piece, i) for i, p in enumerate(model.pieces) if p.type in (_Piece.CONTROL, _Piece.UNKNOWN)]
        self.special_tokens = dict(reversed(control)) | dict(special)
        self._added = dict(added)
        pieces = {i: _piece_bytes(piece) for i, piece in enumerate(model.pieces)}
        literals = {i: literal.encode() for literal, i in added.items()}
        self._bytes = pieces | literals | dict.fromkeys(special.values(), b"")
        self.vocab_size = 1 + max(self._bytes, default=-1)
        self.bos_id = bos_id
        self.stop_ids = stop_ids(self.special_tokens, *eos_ids)
        self.strips_leading_space = model.normalizer_spec.add_dummy_prefix
        self._processor = _processor(model, {*special, *added})

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in split_special(well_formed(text), self._added):
            ids += [piece] if isinstance(piece, int) else self._processor.EncodeAsIds(piece)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")


def load_sentencepiece(path: Path, config: TokenizerConfig = _NO_CONFIG) -> SentencePieceTokenizer:
    """Reads a SentencePiece .model file.

    Raises:
      TokenizerError: the file is not one.
    """
    model = ModelProto()
    with refused(f"{path}: expected a SentencePiece or tiktoken model, but it cannot be read as either"):
        model.ParseFromString(path.read_bytes())
        own = {piece.piece: i for i, piece in enumerate(model.pieces)}
        special = {
            p.piece: i for i, p in enumerate(model.pieces) if p.type == p.USER_DEFINED and looks_special(p.piece)
        }
        added: dict[str, int] = {}
        for literal, token in config.added_tokens.items():
            if token.id >= len(model.pieces):
                (special if token.special else added)[literal] = token.id
        ids = own | special | added
        return SentencePieceTokenizer(
            model,
            special=special,
            added=added,
            bos_id=None if config.add_bos is False else ids.get(config.bos_token or model.trainer_spec.bos_piece),
            eos_ids=[ids.get(config.eos_token or model.trainer_spec.eos_piece)],
        )


def _processor(model: ModelProto, hidden: set[str]) -> SentencePieceProcessor:
    """A processor that finds no hidden piece in text: sentencepiece finds control pieces in none."""
    seen: set[str] = set()
    for i, piece in enumerate(model.pieces):
        if piece.piece in hidden:
            piece.type = _Piece.CONTROL
        if not piece.piece or piece.piece in seen:
            piece.piece, piece.type = f"\ufffe{i}", _Piece.CONTROL
        seen.add(piece.piece)
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.SerializeToString())
    return processor


def _piece_bytes(piece: ModelProto.SentencePiece) -> bytes:
    if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN):
        return b""
    if piece.type == _Piece.BYTE and (byte := BYTE.fullmatch(piece.piece)):
        return bytes.fromhex(byte[1])
    return piece.piece.replace(SPACE, " ").encode()
