"""Saves a run's predictions in a safetensors file, and compares a later run with them. Knows no model.

Two tensors: `token_ids`, int32 [W, T], of W windows of T tokens, and `logits`, float16 [W, P, V], of the P positions
that are scored in each. A position's largest logit is subtracted from all of its logits. So float16, half the size of
float32, does not change which token is the most probable, and is finest among the probable ones: it moved mean KL
divergences by less than 2e-7 (SmolLM2-135M: bf16 and int8 against float32). The metadata has `text_sha256`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Float32, Int32
from safetensors import SafetensorError, safe_open

from llamajax.errors import DiskFullError, RequestError
from llamajax.hub.cache import DISK_FULL
from llamajax.text import one_line


@contextmanager
def save_logits(
    path: Path, text: str, token_ids: Int32[np.ndarray, "W T"], num_positions: int, vocab_size: int
) -> Iterator[Callable[[Float32[np.ndarray, "P V"]], None]]:
    """Yields a function that writes the logits of one window. The file gets its name when it is complete.

    Raises DiskFullError for a full disk, RequestError for a path that cannot be written.
    """
    if path.exists() and not path.is_file():
        raise RequestError(f"cannot write {path}: it is not a file")
    shape = len(token_ids), num_positions, vocab_size
    begin, end = token_ids.nbytes, token_ids.nbytes + 2 * int(np.prod(shape))
    header = json.dumps(
        {
            "__metadata__": {"text_sha256": _digest(text)},
            "token_ids": {"dtype": "I32", "shape": token_ids.shape, "data_offsets": (0, begin)},
            "logits": {"dtype": "F16", "shape": shape, "data_offsets": (begin, end)},
        }
    ).encode()
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with unfinished.open("wb") as file:

            def write(logits: Float32[np.ndarray, "P V"]) -> None:
                file.write((logits - logits.max(axis=1, keepdims=True)).astype("<f2").tobytes())

            file.write(len(header).to_bytes(8, "little") + header + token_ids.astype("<i4").tobytes())
            yield write
        unfinished.replace(path)
    except OSError as e:
        kind = DiskFullError if e.errno in DISK_FULL else RequestError
        raise kind(f"cannot write {path}: {e.strerror}") from None
    finally:
        with suppress(OSError):
            unfinished.unlink()


class SavedLogits:
    """A file of `save_logits`, mapped from disk.

    Attributes:
      token_ids: of its windows.

    Raises RequestError for another file or a truncated one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.open("rb").close()  # an error that names the file, which safetensors' own do not
        try:
            file = safe_open(path, "numpy")
            ids, self._logits = file.get_slice("token_ids"), file.get_slice("logits")
            self._text_sha256 = (file.metadata() or {})["text_sha256"]
            kinds, shapes = zip(*((x.get_dtype(), x.get_shape()) for x in (ids, self._logits)), strict=True)
            if kinds != ("I32", "F16") or [len(shape) for shape in shapes] != [2, 3] or shapes[0][0] != shapes[1][0]:
                raise ValueError(
                    f"expected I32 [W, T] and F16 [W, P, V], found {' and '.join(map(str, kinds))} {shapes}"
                )
            self.token_ids: Int32[np.ndarray, "W T"] = file.get_tensor("token_ids")
        except (SafetensorError, KeyError, ValueError) as e:
            raise RequestError(f"{path} is truncated, or not a file of saved logits ({one_line(e)})") from None

    def check(self, text: str, token_ids: Int32[np.ndarray, "W T"], num_positions: int, vocab_size: int) -> None:
        """Raises RequestError, saying why, if it does not hold these windows, or more, of the text."""
        _, saved_num_positions, saved_vocab_size = self._logits.get_shape()
        W, T = token_ids.shape
        saved_W, saved_T = self.token_ids.shape
        if saved_vocab_size != vocab_size:
            problem = f"a vocabulary of {saved_vocab_size} tokens, the model's has {vocab_size}"
        elif saved_T != T:
            problem = f"windows of {saved_T} tokens, not {T}: choose the same context"
        elif saved_num_positions != num_positions:
            problem = f"{saved_num_positions} scored tokens a window, not {num_positions}: save them again"
        elif not np.array_equal(self.token_ids[:W], token_ids[:saved_W]):
            same_text = self._text_sha256 == _digest(text)
            problem = "another tokenizer, that gives this text other ids" if same_text else "another text"
        elif saved_W < W:
            problem = f"{saved_W} windows, not {W}: choose as many"
        else:
            return
        raise RequestError(f"{self._path} is of {problem}")

    def __getitem__(self, window: int) -> Float16[np.ndarray, "P V"]:
        """Logits, each position's less its largest."""
        return self._logits[window]


def _digest(text: str) -> str:
    return sha256(text.encode(errors="replace")).hexdigest()
