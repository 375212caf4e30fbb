"""A model without a checkpoint: a named configuration with random weights, whose tokens stand for no text."""

from llamajax.engine.runner import Runner
from llamajax.errors import RequestError
from llamajax.families import CONFIGS
from llamajax.llm import LLM
from llamajax.loading import place
from llamajax.tokenizers.base import Tokenizer
from llamajax.types import CacheDType, Device, DType
from llamajax.weights.random import random_weights


def random_llm(
    name: str,
    *,
    dtype: DType = "auto",
    cache_dtype: CacheDType = "auto",
    device: Device | None = None,
    max_seq_len: int | None = None,
    seed: int = 0,
) -> LLM:
    """A model of the size of a named one. Weights are made on the device, in `dtype` ("auto": bf16).

    Raises RequestError for a name that is not known.
    """
    config = CONFIGS.get(name.removesuffix("-instruct").removesuffix("-chat"))
    if config is None:
        raise RequestError(f"no configuration is called {name!r}: there are {', '.join(CONFIGS)}")
    placement = place(config, dtype, cache_dtype, device)
    runner = Runner(config, random_weights(config, placement, seed), placement, max_seq_len)
    return LLM(runner, _Mute(config.vocab_size), None, frozenset())


class _Mute(Tokenizer):
    """Every token stands for no text."""

    bos_id = None
    stop_ids = frozenset()
    strips_leading_space = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.special_tokens = {}

    def encode(self, text: str) -> list[int]:
        return [0] * len(text)

    def token_bytes(self, token_id: int) -> bytes:
        return b""
