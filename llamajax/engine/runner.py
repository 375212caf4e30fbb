"""Owns a model's weights and programs on a device, and moves requests and tokens between host and device.

Knows token ids; knows nothing of text, caches, queues or strategies.
"""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled
from jaxtyping import Float32, Int32

from llamajax import checks
from llamajax.config import LlamaConfig
from llamajax.engine.memory import cache_bytes
from llamajax.engine.programs import Program, Programs
from llamajax.engine.steps import BLOCK_LEN, MAX_STOP_IDS, READ_LEN, Drawn, FlatModel, Requests, Rows
from llamajax.errors import CheckpointError, PromptTooLongError, RequestError
from llamajax.model.cache import Cache
from llamajax.ops import PAGE_LEN, Parameter
from llamajax.placement import Placement, bytes_per_token
from llamajax.sampling import Sampling, TopLogprobs
from llamajax.types import Request, Token, TokenLogprobs, mask_len

# Prompts are prefilled in chunks, each padded to one of these lengths, and caches have one of few lengths. So there are
# few programs: at most len(CHUNKS) + 1 for each length of the cache.
CHUNKS = (16, 48, 64, 128, 512)
# How many positions of its last page a prompt may fill, and the cost of a plan that is not possible.
_FILLED, _NO_CHUNK = (16, 48, PAGE_LEN), 1 << 40
# On a CPU, each call of prefill costs as much as this many tokens more in a chunk.
CALL_COST = 32
MIN_CACHE_LEN = 128
# A context that is no power of two ends in a cache of a multiple of this length: each has programs of its own.
LAST_CACHE_STEP = 1024


@lru_cache(1 << 12)
def chunk_lens(num_tokens: int, num_cached: int = 0, longest: int = CHUNKS[-1]) -> tuple[int, ...]:
    """The cheapest chunks to prefill a prompt in, of which the cache has the first `num_cached` tokens, in whole pages.

    Each chunk has at most `longest` tokens, 128 or more. The last chunk is padded. All others end with a page, and how
    much of the last page is filled depends on the number of tokens alone: native attention rounds the keys and values
    of a page together. So a prompt gives the same bits in any chunks, however much of it was there.
    """
    plans = [_chunks(num_tokens, filled, _NO_CHUNK, CHUNKS[-1]) for filled in _FILLED]
    best = min(plans, key=_cost)
    return _chunks(num_tokens - num_cached, _FILLED[plans.index(best)], sum(best) - num_cached, longest)


@lru_cache(1 << 12)
def _chunks(num_tokens: int, filled: int, room: int, longest: int) -> tuple[int, ...]:
    """The cheapest chunks that fill `filled` positions of the last page and have at most `room` in all, longest first.

    If there are none, a single one of cost _NO_CHUNK.
    """
    if num_tokens <= 0:
        return ()
    if whole := (num_tokens - 1) // longest:
        return (longest,) * whole + _chunks(num_tokens - whole * longest, filled, room - whole * longest, longest)
    last = (num_tokens - 1) // PAGE_LEN * PAGE_LEN  # where the last page begins

    def may_begin(chunk: int) -> bool:
        if chunk > longest:
            return False
        if chunk < num_tokens:
            return chunk % PAGE_LEN == 0
        return chunk <= room and min(chunk - last, PAGE_LEN) == filled

    first_chunks = [chunk for chunk in CHUNKS[::-1] if may_begin(chunk)]
    plans = [(first, *_chunks(num_tokens - first, filled, room - first, longest)) for first in first_chunks]
    return min(plans, key=_cost, default=(_NO_CHUNK,))


def _cost(plan: Sequence[int]) -> int:
    return sum(plan) + CALL_COST * len(plan)


class Runner:
    """A model on a device: engines decode rows with it, and texts are scored with it.

    Attributes:
      config: the model's.
      placement: where it computes, and how it is kept there.
      max_seq_len: positions that a prompt and its answer may take.
      max_memory: bytes that KV caches may take, if the user says how many.
      step_counts: the numbers from 0 to BLOCK_LEN, on the device.
      can_ask: whether steps can ask the host for masks.
      paged: whether caches are in pages.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, Parameter],
        placement: Placement,
        max_seq_len: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        assert placement.device is not None
        self.config = config
        self.placement = placement
        self.device = placement.device
        self.paged = placement.has_pages
        longest = self.config.max_position_embeddings
        default, most = min(longest, self._most_positions) if self.paged else longest, f"the model's context, {longest}"
        if max_memory is not None:
            page = PAGE_LEN * bytes_per_token(config, placement.cache_dtype)
            expected = f"an integer of at least {page} bytes, for {PAGE_LEN} tokens"
            max_memory = checks.integer("max_memory", max_memory, page, expected=expected)
            room = max_memory // page * PAGE_LEN
            if (
                self.paged and sum(chunk_lens(room - 1)) > room
            ):  # the cheapest last chunk has a page more than its tokens
                room -= PAGE_LEN
            if room < longest:
                longest, most = room, f"{room}, for which there is room in {max_memory} bytes"
        self.max_memory = max_memory
        if max_seq_len is None:
            max_seq_len = min(default, longest)
        self.max_seq_len = checks.integer("max_seq_len", max_seq_len, 2, longest, f"from 2 to {most}")
        self.model = FlatModel.of(config, weights, self.device)
        # Made once: to copy a number to the device would add 0.05 ms to each call.
        self.step_counts = jax.device_put([np.int32(n) for n in range(BLOCK_LEN + 1)], self.device)
        self.can_ask = self.paged
        self._programs = Programs(self.model, placement, self.table_len if self.paged else None)

    @cached_property
    def table_len(self) -> int:
        """How many pages a sequence may have.

        Those of the model's whole context, if the computer has memory for it: so the programs are the same for any
        `max_seq_len`. Pages take no memory before they are written.
        """
        context = self.config.max_position_embeddings
        longest = context if context <= self._most_positions else self.max_seq_len
        return cache_len(longest, longest) // PAGE_LEN

    @property
    def _most_positions(self) -> int:
        """The largest power of two of positions that fits the memory for caches."""
        most = cache_bytes() // bytes_per_token(self.config, self.placement.cache_dtype)
        return max(MIN_CACHE_LEN, power_of_two(most + 1) // 2)

    def free_bytes(self) -> float:
        """What the device has left, or `max_memory` if that is less; infinite if there is neither, as on a CPU."""
        statistics = self.device.memory_stats() or {}
        free = statistics.get("bytes_limit", math.inf) - statistics.get("bytes_in_use", 0)
        return free if self.max_memory is None else min(free, self.max_memory)

    def check(self, request: Request) -> None:
        """Raises PromptTooLongError if the prompt leaves no room for an answer, RequestError for what is invalid."""
        ids = request.token_ids
        self._check_ids(ids)
        for name, number, least in (
            ("max_new_tokens", request.max_new_tokens, 1),
            ("min_tokens", request.min_tokens, 0),
        ):
            if type(number) is not int or number < least:
                raise RequestError(f"{name} must be an integer of at least {least}, not {checks.shown(number)}")
        if request.min_tokens > request.max_new_tokens:
            raise RequestError(
                f"min_tokens must be at most max_new_tokens, {request.max_new_tokens}, not {request.min_tokens}"
            )
        self._check_vocabulary("logit_bias has", request.sampling.logit_bias or ())
        if len(request.stop_ids) > MAX_STOP_IDS:
            raise RequestError(f"at most {MAX_STOP_IDS} stop tokens, not {len(request.stop_ids)}")
        self.check_len(len(ids))

    def check_len(self, num_tokens: int, at_least: str = "") -> None:
        """Raises PromptTooLongError if a prompt of at least so many tokens leaves no room for an answer."""
        if num_tokens >= self.max_seq_len:
            # OpenAI's own words: clients such as LiteLLM recognise this error by them, not by its code.
            longest = self.config.max_position_embeddings
            raise PromptTooLongError(
                f"this model's maximum context length is {self.max_seq_len} tokens, and the prompt has "
                f"{at_least}{num_tokens}: shorten the prompt"
                + f", or raise max_seq_len: the model has {longest}"
                * (self.max_seq_len < longest)
            )

    def copy_ahead(self, drawn: Drawn) -> None:
        """Starts to copy tokens to the host as soon as they are drawn."""
        if self.device.platform != "cpu":  # on a CPU they are on the host, and the call would take 0.1 ms
            drawn.tokens.copy_to_host_async()

    def to_host(self, drawn: Drawn, with_logprobs: bool) -> Drawn:
        """Waits for a block, and copies it. Log-probabilities are copied only if wanted: each array takes time."""
        logprobs = jax.tree.map(np.asarray, drawn.logprobs) if with_logprobs else drawn.logprobs
        return Drawn(jax.tree.map(np.asarray, drawn.tokens), logprobs)

    def tokens(self, drawn: Drawn, row: int, num_logprobs: int | None) -> list[Token]:
        """A row's tokens, of a block that is on the host.

        Raises CheckpointError if the model's scores are not numbers.
        """
        now = time.perf_counter()
        ids = [id for id in drawn.tokens[row].tolist() if id >= 0]
        if self.config.vocab_size in ids:
            raise CheckpointError("the model's scores are not finite numbers: its weights are broken")
        if num_logprobs is None:
            return [Token(id, None, now) for id in ids]
        logprobs = _token_logprobs(jax.tree.map(lambda x: x[row, : len(ids)], drawn.logprobs), num_logprobs)
        return [Token(id, token_logprobs, now) for id, token_logprobs in zip(ids, logprobs, strict=True)]

    def bucket(self, num_positions: int) -> int:
        """The length of a cache with room for this many positions."""
        return self.table_len * PAGE_LEN if self.paged else cache_len(num_positions, self.max_seq_len)

    def empty_rows(self, num_rows: int, length: int) -> Rows:
        """Makes idle rows on the device."""
        rows = self.compile(Program("empty_rows", length, num_rows=num_rows))()
        # Committed to the device, as the arrays that steps return are.
        return jax.device_put(rows, self.device)

    def empty_pages(self, length: int) -> Cache:
        """Makes pages for so many positions on the device, without a table."""
        return jax.device_put(self.compile(Program("empty_pages", length))(), self.device)

    def lengths(self, longest: int) -> list[int]:
        """The lengths of caches with room for up to this many positions, the shortest first."""
        lengths = [self.bucket(1)]
        while lengths[-1] < self.bucket(longest):
            lengths.append(self.bucket(lengths[-1] + 1))
        return lengths

    def prefills(self, num_rows: int, length: int) -> Iterator[Program]:
        """All programs that prefill prompts into caches of this length."""
        return (Program("prefill", length, chunk_len, num_rows) for chunk_len in CHUNKS if chunk_len <= length)

    def compile(self, program: Program) -> Compiled:
        """Returns a program, ready to run. Any thread may call it: it touches no array on the device."""
        return self._programs.compile(program)

    def prepare(self, program: Program) -> None:
        """Compiles a program unless it is in memory or on disk. One that goes to disk does not stay in memory."""
        self._programs.prepare(program)

    @property
    def is_new(self) -> bool:
        """Whether the model was never run on this machine, so that its first answer waits for programs."""
        return self._programs.is_new

    def logits(self, token_ids: Sequence[int]) -> Float32[np.ndarray, "T V"]:
        """Scores of the next token after each of the given ones."""
        self._check_text(token_ids)
        padded = np.zeros(power_of_two(len(token_ids), CHUNKS[0]), np.int32)
        padded[: len(token_ids)] = token_ids
        scores = self.compile(Program("logits", len(padded)))(self.model.arrays, padded)
        return np.asarray(scores)[: len(token_ids)]

    def prompt_logprobs(self, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """The log-probability of each token but the first, given those before it. Any thread may call it."""
        self._check_text(token_ids)
        padded = np.zeros(next(n for n in self._scored_lens if n >= len(token_ids)), np.int32)
        padded[: len(token_ids)] = token_ids
        # The last token's scores are of a token that the text does not have.
        length = np.int32(len(token_ids) - 1)
        found = self.compile(Program("prompt_logprobs", len(padded)))(self.model.arrays, padded, length)
        return _token_logprobs(jax.tree.map(lambda x: np.asarray(x)[: len(token_ids) - 1], found), num_top)

    def scorings(self) -> list[Program]:
        """All programs that `prompt_logprobs` needs."""
        return [Program("prompt_logprobs", length) for length in self._scored_lens]

    @cached_property
    def _scored_lens(self) -> list[int]:
        """The lengths that texts to score are padded to: powers of two, as in `logits`, since attention rounds by them.

        With pages, texts of more than one chunk are all padded to the longest: only pages that are read take memory.
        """
        longest = power_of_two(self.max_seq_len, CHUNKS[0])
        lengths = [1 << bits for bits in range(CHUNKS[0].bit_length() - 1, longest.bit_length())]
        return [n for n in lengths if not self.paged or n <= READ_LEN or n == longest]

    def _check_text(self, ids: Sequence[int]) -> None:
        self._check_ids(ids)
        if len(ids) > self.max_seq_len:
            raise PromptTooLongError(f"{len(ids)} tokens are more than the context, {self.max_seq_len}")

    def _check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) == 0:
            raise RequestError("the prompt is empty: it needs at least one token")
        self._check_vocabulary("found", ids)

    def _check_vocabulary(self, where: str, ids: Collection[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise RequestError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}, {where} "
                f"{checks.shown(min(ids))} to {checks.shown(max(ids))}"
            )

    def free_mask(self, num_rows: int) -> Int32[np.ndarray, "B W"]:
        """Makes a mask that allows all tokens; the caller forbids some."""
        return np.full((num_rows, mask_len(self.config.vocab_size)), -1, np.int32)

    def device_requests(self, requests: Sequence[Request]) -> Requests:
        """The requests of rows, as arrays on the device."""
        stop_ids: Any = np.full((len(requests), MAX_STOP_IDS), -1, np.int32)
        first_stop: Any = np.zeros(len(requests), np.int32)
        prompt_mask: Any = np.zeros((len(requests), self.config.vocab_size), bool)
        for row, request in enumerate(requests):
            stop_ids[row, : len(request.stop_ids)] = sorted(request.stop_ids)
            if request.constraint is None:  # a constraint says itself where the answer may end
                first_stop[row] = min(len(request.token_ids) + request.min_tokens, self.max_seq_len)
            prompt_mask[row, list(request.token_ids)] = True
        sampling = Sampling.of([request.sampling for request in requests])
        wants_logprobs: Any = np.array([request.sampling.logprobs is not None for request in requests])
        last_token: Any = np.array([request.token_ids[-1] for request in requests], np.int32)
        asked = Requests(sampling, stop_ids, first_stop, prompt_mask, wants_logprobs, last_token)
        return jax.device_put(asked, self.device)


def cache_len(num_positions: int, max_seq_len: int) -> int:
    """The length of a cache with room for this many positions: a power of two, up to the context."""
    longest = min(power_of_two(max_seq_len, MIN_CACHE_LEN), _multiple(max_seq_len, LAST_CACHE_STEP))
    return min(power_of_two(num_positions, MIN_CACHE_LEN), longest)


def last_of_chunk(request: Request, end: int, length: int, limit: int) -> tuple[int, int]:
    """The length and the limit of new tokens that `prefill` takes with a chunk that ends there."""
    if end < len(request.token_ids):
        return length, 0
    return (length - 1, -limit) if request.constraint else (length, limit)


def _token_logprobs(found: TopLogprobs, num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of T tokens: arrays [T] and [T, 20], on the host."""
    chosen, top, top_ids = (np.asarray(x) for x in found)
    tops = zip(top_ids[:, :num_top].tolist(), top[:, :num_top].tolist(), strict=True)
    return [
        TokenLogprobs(logprob, tuple(zip(ids, values, strict=True)))
        for logprob, (ids, values) in zip(chosen.tolist(), tops, strict=True)
    ]


def _multiple(number: int, of: int) -> int:
    """The smallest multiple of `of` that is at least the number."""
    return -(-number // of) * of


def power_of_two(number: int, at_least: int = 1) -> int:
    """The smallest power of two that is not below either."""
    return max(at_least, 1 << (number - 1).bit_length())
