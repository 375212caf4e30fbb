"""SentencePiece models (Llama 1 and 2, TinyLlama): BPE over characters with byte fallback.

Knows the model's protocol buffer; where it comes from (a .model file, a GGUF file's metadata) does not matter.
"""

from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llamajax.errors import TokenizerError
from llamajax.text import one_line, well_formed
from llamajax.tokenizers.base import Tokenizer, check_id, looks_special, stop_ids
from llamajax.tokenizers.config import TokenizerConfig

SPACE = "▁"
_Piece = ModelProto.SentencePiece
_NO_CONFIG = TokenizerConfig()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Text between special tokens is encoded as if it stood alone, with its dummy prefix."""

    def __init__(self, model: ModelProto, *, bos_id: int | None, eos_ids: Iterable[int | None]) -> None:
        """
        Raises:
          ValueError: sentencepiece refuses the model.
        """
        for piece in model.pieces:
            # sentencepiece finds user-defined pieces in any text, control pieces in none.
            if piece.type == _Piece.USER_DEFINED and looks_special(piece.piece):
                piece.type = _Piece.CONTROL
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model.SerializeToString())
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        self.vocab_size = len(model.pieces)
        self.special_tokens = {
            piece.piece: i for i, piece in enumerate(model.pieces) if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN)
        }
        self.bos_id = bos_id
        self.stop_ids = stop_ids(self.special_tokens, *eos_ids)
        self.strips_leading_space = model.normalizer_spec.add_dummy_prefix
        self._bytes = [_piece_bytes(piece) for piece in model.pieces]

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(well_formed(text))

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        return self._bytes[token_id]


def load_sentencepiece(path: Path, config: TokenizerConfig = _NO_CONFIG) -> SentencePieceTokenizer:
    """Reads a SentencePiece .model file.

    Raises:
      TokenizerError: the file is not one.
    """
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        for literal, i in sorted(config.added_tokens.items(), key=itemgetter(1)):
            if i == len(model.pieces):
                model.pieces.add(piece=literal, type=_Piece.USER_DEFINED)
        ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        bos_token = config.bos_token or model.trainer_spec.bos_piece
        eos_token = config.eos_token or model.trainer_spec.eos_piece
        return SentencePieceTokenizer(
            model, bos_id=None if config.add_bos is False else ids.get(bos_token), eos_ids=[ids.get(eos_token)]
        )
    except (OSError, DecodeError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{path}: expected a SentencePiece or tiktoken model, but it cannot be read as either: {one_line(error)}"
        ) from error


def _piece_bytes(piece: ModelProto.SentencePiece) -> bytes:
    if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN):
        return b""
    if piece.type == _Piece.BYTE:
        return bytes([int(piece.piece[3:5], 16)])  # "<0x0A>"
    return piece.piece.replace(SPACE, " ").encode()
