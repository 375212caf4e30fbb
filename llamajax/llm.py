"""The library's front door: text -> ids -> engine -> text. Wires the tokenizer to the engine; computes nothing."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from llamajax import hub
from llamajax.config import LlamaConfig
from llamajax.engine.runner import Runner
from llamajax.engine.sequential import Sequential
from llamajax.errors import RequestError
from llamajax.model.llama import Llama
from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.chat import ChatTemplate, builtin_template, encode_chat, find_template
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.load import load_directory
from llamajax.tokenizers.stream import StopStrings, StreamDecoder
from llamajax.types import (
    Completion,
    Device,
    DType,
    FinishReason,
    Message,
    Request,
    SamplingParams,
    Timings,
    Token,
)
from llamajax.weights.checkpoint import open_checkpoint
from llamajax.weights.load import load_weights


class LLM:
    """A loaded model that takes and gives text.

    Attributes:
      config: the model's.
      tokenizer: the checkpoint's.
      template: the checkpoint's chat template, a built-in one, or None for a model that was not made to chat.
      max_seq_len: tokens that a prompt and its answer may take together.
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, template: ChatTemplate | None, stop_ids: frozenset[int]
    ) -> None:
        self.config: LlamaConfig = runner.config
        self.tokenizer = tokenizer
        self.template = template
        self.max_seq_len = runner.max_seq_len
        self._runner = runner
        self._stop_ids = stop_ids

    def generate(self, prompt: str, **options: Any) -> Completion:
        """Continues a text as it stands, without a chat template. Options as in `stream`."""
        return self.stream(prompt, **options).finish()

    def chat(self, messages: str | Sequence[Message], **options: Any) -> Completion:
        """Answers a conversation, or one message of a user, through the chat template. Options as in `stream`."""
        asked: Sequence[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.stream(asked, **options).finish()

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 50,
        stop: str | Sequence[str] = (),
        sampling: SamplingParams | None = None,
        verbatim: Mapping[int, Sequence[int]] | None = None,
        reuse_cache: bool = False,
        **sampling_options: Any,
    ) -> "Stream":
        """Starts an answer and returns its text piece by piece.

        Args:
          prompt: a text to continue as it stands, or messages to answer through the chat template.
          max_new_tokens: at least 1; the context may end the answer sooner.
          stop: strings that end the answer and are not part of it.
          sampling: how tokens are drawn; or give its fields (temperature, top_p, top_k, seed, ...) themselves.
          verbatim: message index -> token ids that stand for the content of that message, such as an earlier
            answer's: text encoded anew need not give the ids that were drawn.
          reuse_cache: leave unread what the KV cache still holds of the prompt. Off, the same request gives the
            same answer whatever was asked before.

        Raises RequestError for a bad option or a model without a chat template, CapacityError for a prompt that
        leaves no room for an answer.
        """
        if sampling is not None and sampling_options:
            raise RequestError(f"give either sampling or its fields, not both: {', '.join(sampling_options)}")
        try:
            params = sampling or SamplingParams(**sampling_options)
        except TypeError as e:
            raise RequestError(f"unknown option: {e}") from None
        if isinstance(prompt, str):
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            ids = bos + self.tokenizer.encode(prompt)
        else:
            ids = self.encode_chat(prompt, verbatim or {})
        request = Request(ids, max_new_tokens, params, self._stop_ids, reuse_cache)
        self._runner.check(request)
        decoder = StreamDecoder(self.tokenizer, continues=isinstance(prompt, str))
        stops = StopStrings((stop,) if isinstance(stop, str) else stop)
        return Stream(Sequential(self._runner, request), decoder, stops)

    def encode_chat(
        self, messages: Sequence[Message], verbatim: Mapping[int, Sequence[int]] | None = None
    ) -> list[int]:
        """Token ids of a conversation, up to where its next answer begins."""
        if self.template is None:
            raise RequestError(
                "this model has no chat template, so it cannot chat: continue a text instead (--raw; generate())"
            )
        return encode_chat(self.tokenizer, self.template, messages, verbatim=verbatim or {})

    def logits(self, token_ids: Sequence[int]) -> Float32[np.ndarray, "T V"]:
        """Scores of the next token after each of the given ones.

        Raises RequestError for ids out of range, CapacityError for more than `max_seq_len` of them.
        """
        return self._runner.logits(token_ids)

    def warm_up(self, num_tokens: int = 1) -> None:
        """Compiles what prompts and answers of this many tokens together need, so that none waits for it."""
        self._runner.warm_up(num_tokens)


class Stream(Iterator[str]):
    """An answer's text, piece by piece; what there is of it so far is in `completion`."""

    def __init__(self, tokens: Sequential, decoder: StreamDecoder, stops: StopStrings) -> None:
        self._tokens = tokens
        self._decoder = decoder
        self._stops = stops
        self._drawn: list[Token] = []
        self._text: list[str] = []
        self._finish_reason: FinishReason = "cancelled"
        self._cancelled = False
        self._began = time.perf_counter()
        self._first = self._last = self._began
        self._pieces = self._run()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def cancel(self) -> None:
        """Ends the answer before its next token. May be called from anywhere, a signal handler too."""
        self._cancelled = True

    def finish(self) -> Completion:
        """The whole answer, once it is there."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The answer so far; "cancelled" until it has ended in another way."""
        return Completion(
            text="".join(self._text),
            token_ids=tuple(token.id for token in self._drawn),
            finish_reason=self._finish_reason,
            prompt_tokens=len(self._tokens.request.token_ids),
            cached_tokens=self._tokens.cached_tokens,
            timings=Timings(self._first - self._began, self._last - self._first),
            logprobs=None
            if self._tokens.request.sampling.logprobs is None
            else tuple(token.logprobs for token in self._drawn if token.logprobs is not None),
        )

    def _run(self) -> Iterator[str]:
        for token in self._tokens:
            if self._cancelled:
                break
            self._last = time.perf_counter()
            if not self._drawn:
                self._first = self._last
            self._drawn.append(token)
            yield from self._emit(self._stops.push(self._decoder.push(token.id)))
            if self._stops.matched:
                break
        yield from self._emit(self._stops.push(self._decoder.flush()) + self._stops.flush())
        if self._stops.matched or self._tokens.stopped:
            self._finish_reason = "stop"
        elif not self._cancelled:
            self._finish_reason = "length"

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self._text.append(text)
            yield text


def load(
    name: str | Path = hub.DEFAULT,
    *,
    max_seq_len: int | None = None,
    dtype: DType = "auto",
    device: Device | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LLM:
    """Loads a model, fetching it first if it is not on disk.

    Args:
      name: a directory, a .gguf file, an alias, or a hub id `org/repo` or `org/repo:file.gguf`.
      max_seq_len: tokens that a prompt and its answer may take; the model's context if None.
      dtype: "auto" keeps dense weights as they were shipped and quantized ones in bf16; "int8" takes half of that
        memory and is faster on a CPU, for a perplexity that is 0.6 % higher (the default model's).
      device: the first accelerator, or else the CPU, if None.
      progress: called with bytes of weights read so far, and in all.

    Raises LlamaJaxError of the kind that fits: an unknown name, a checkpoint that is not a Llama or is broken.
    """
    for option, value, kinds in (("dtype", dtype, DType), ("device", device or "cpu", Device)):
        if value not in get_args(kinds):
            raise RequestError(f"{option} must be one of {', '.join(get_args(kinds))}, not {value!r}")
    _use_compilation_cache()
    path = hub.resolve(str(name))
    chosen = find_device(device)
    checkpoint = open_checkpoint(path)
    tokenizer = load_directory(path) if checkpoint.metadata is None else from_gguf(checkpoint.metadata)
    template = find_template(path if checkpoint.metadata is None else checkpoint.metadata)
    if template is None:
        template = builtin_template(tokenizer, checkpoint.stop_ids, str(name))
    model = Llama(checkpoint.config)
    load_weights(model, checkpoint.tensors, chosen, dtype, progress)
    runner = Runner(model, device=chosen, max_seq_len=max_seq_len, cache_dtype=cache_dtype(chosen, dtype))
    return LLM(runner, tokenizer, template, checkpoint.stop_ids | tokenizer.stop_ids)


def cache_dtype(device: jax.Device, dtype: DType) -> np.dtype:
    """What the KV cache is kept in."""
    # XLA's CPU products with few rows are slow in bf16.
    return jnp.dtype(jnp.float32 if device.platform == "cpu" or dtype == "float32" else jnp.bfloat16)


def find_device(kind: Device | None) -> jax.Device:
    """The first device of a kind, or of the best kind there is.

    Raises RequestError if there is none.
    """
    try:
        return jax.devices(kind)[0]
    except RuntimeError as e:
        extra = {"gpu": "llamajax[cuda12]", "tpu": "llamajax[tpu]"}.get(kind or "", "jax")
        raise RequestError(f"no {kind or 'device'} that jax can use: is {extra} installed? ({e})") from None


def _use_compilation_cache() -> None:
    """Keeps compiled programs between processes, unless the user's own settings already do."""
    setting, folder = "jax_compilation_cache_dir", hub.home() / "xla"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # Where nothing can be written, programs are compiled anew each time, and jax need not warn of each one.
    if getattr(jax.config, setting) is None and os.access(folder, os.W_OK):
        jax.config.update(setting, str(folder))
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
