"""The jitted steps: prefill and decode of B slots at once, and what makes and moves rows. `programs` compiles them.

A model enters as a flat list of arrays: flattening a Flax module at each call takes milliseconds. The KV cache and the
slots are donated, so that they are written in place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from llamajax.config import LlamaConfig
from llamajax.model.cache import Cache, empty_cache, paged_cache
from llamajax.ops import PAGE_LEN, KeysValues, Parameter, native
from llamajax.sampling import Sampling, TopLogprobs, sample, top_logprobs, wanted_logprobs
from llamajax.types import SamplingParams

if TYPE_CHECKING:
    from llamajax.model.llama import Llama

# Tokens that one decode call returns at most.
BLOCK_LEN = 16
MAX_STOP_IDS = 128
# Tokens of a text to score that are read at once, and whose scores are in memory at once.
READ_LEN = 512
_SCORED_LEN = 64

_Arrays = TypeVar("_Arrays")


@dataclass(frozen=True)
class _Place:
    """Where an array is in a list."""

    index: int


@dataclass(frozen=True, eq=False)
class Structure:
    """All of a model but its arrays. Compared by identity: comparing the formats of 120 weights takes 0.1 ms a call."""

    config: LlamaConfig
    weights: tuple[tuple[str, Any], ...]  # by the paths of their parameters, with places for arrays


_structure = once(Structure)


class FlatModel(NamedTuple):
    """A model as the steps take it: each array once, and numbers as parts of the program."""

    arrays: list[Array]
    structure: Structure

    @classmethod
    def of(cls, config: LlamaConfig, weights: Mapping[str, Parameter], device: jax.Device) -> "FlatModel":
        """A model of these weights, by the paths of its parameters, put on the device."""
        arrays = {id(x): x for x in jax.tree.leaves(weights) if not isinstance(x, np.int32)}
        places = {key: _Place(i) for i, key in enumerate(arrays)}
        placed = jax.tree.map(lambda x: places.get(id(x), x), dict(weights))
        return cls(jax.device_put(list(arrays.values()), device), _structure(config, tuple(sorted(placed.items()))))

    def weights(self) -> dict[str, Parameter]:
        """The weights again, of these arrays."""
        places = dict(self.structure.weights)
        return jax.tree.map(lambda x: self.arrays[x.index] if isinstance(x, _Place) else x, places)

    def llama(self) -> "Llama":
        """The model, of these arrays."""
        # Imported here, since Flax takes 0.2 s, and what was compiled before needs none of it.
        from llamajax.model.llama import Llama

        return Llama.with_weights(self.structure.config, self.weights())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Requests:
    """The requests of B slots: constant from the first token of an answer to the last."""

    sampling: Sampling
    stop_ids: Int32[Array, "B E"]  # padded with -1
    first_stop: Int32[Array, "B"]  # the first position at which a stop token may be drawn
    prompt_mask: Bool[Array, "B V"]  # which tokens occur in the prompt
    wants_logprobs: Bool[Array, "B"]
    last_token: Int32[Array, "B"]  # the prompt's


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """The state of B slots, which changes with each token. A slot with nothing left to draw is idle."""

    token: Int32[Array, "B"]  # the last one drawn, not yet in the cache
    position: Int32[Array, "B"]  # of that token
    left: Int32[Array, "B"]  # tokens still to draw
    counts: Int32[Array, "B V"]  # how often each token occurs in the answer


class Drawn(NamedTuple):
    """Tokens drawn in one call, -1 where a slot drew none."""

    tokens: Int32[Array, "B N"]
    logprobs: TopLogprobs  # each with N after B; zeros if no slot wanted any


class Rows(NamedTuple):
    """All that the device holds for B sequences."""

    cache: Cache  # each with B in front; none if the cache is in pages, which no row has for itself
    slots: Slots
    requests: Requests


@partial(jax.jit, static_argnames="structure", donate_argnames="cache")
def prefill(
    arrays: list[Array],
    cache: Cache,
    token_ids: Int32[Array, "B T"],
    start: Int32[Array, "B"],
    length: Int32[Array, "B"],
    max_new_tokens: Int32[Array, "B"],
    requests: Requests,
    *,
    structure: Structure,
) -> tuple[Drawn, Cache, Slots]:
    """Computes keys and values of `length` tokens of each row, which begin at `start`, and draws the token after them.

    Rows are padded to T; what the padding writes into the cache is masked, and overwritten by what follows.
    A chunk that is not a prompt's last one has no new tokens: it draws none. A row with a constraint does not draw
    here, either, since prefill knows no masks. Its new tokens are negative, and its length leaves out the prompt's last
    token, which `forward` reads.
    """
    model = FlatModel(arrays, structure).llama()
    x, cache = _over_slots(model, token_ids, _enter(cache), start, length - 1)
    cache = _leave(cache)
    logits = jax.vmap(model.logits)(x)[:, 0]
    slots = Slots(
        token=requests.last_token,
        position=start + length,
        left=max_new_tokens,
        counts=jnp.zeros(logits.shape, jnp.int32),
    )
    drawn, slots = _draw(logits, logits, slots, requests)
    slots = replace(slots, left=jnp.maximum(slots.left, -max_new_tokens))
    return jax.tree.map(lambda x: x[:, None], drawn), cache, slots


@partial(jax.jit, static_argnames="structure", donate_argnames=("cache", "slots"))
def decode(
    arrays: list[Array],
    cache: Cache,
    slots: Slots,
    steps: Int32[Array, ""],
    requests: Requests,
    asked: Int32[Array, "1"] | None = None,
    rows: Int32[Array, "P"] | None = None,
    *,
    structure: Structure,
) -> tuple[Drawn, Cache, Slots]:
    """Draws up to `steps` (at most BLOCK_LEN) tokens for each slot that has any left.

    The loop ends early when no slot has: a stop token takes what its slot had left. If there is somebody to ask
    (`native.asked`), each step of the only slot asks for its mask, which is found while the scores are computed.

    If there are `rows`, only those slots draw, and the cache has the tables of their pages. So no slot has to move.
    Each count of rows is a program of its own. A row beyond the last slot is idle.
    """
    model = FlatModel(arrays, structure).llama()
    part, requests = _slots_of(rows, slots), _of(rows, requests)

    def step(carry: tuple[Array, Drawn, Cache, Slots]) -> tuple[Array, Drawn, Cache, Slots]:
        t, block, cache, slots = carry
        token = slots.token if asked is None else native.begin_to_ask(asked, slots.token, model.config.vocab_size)
        x, cache = _over_slots(model, token[:, None], cache, _places(slots, cache))
        logits = scores = jax.vmap(model.logits)(x)[:, 0]
        if asked is not None:
            scores, ended = native.ask(asked, logits)
            slots = replace(slots, left=jnp.where(ended, 0, slots.left))
        slots = replace(slots, position=slots.position + (slots.left > 0).astype(jnp.int32))
        drawn, slots = _draw(logits, scores, slots, requests)
        block = jax.tree.map(lambda xs, x: jax.lax.dynamic_update_index_in_dim(xs, x, t, axis=1), block, drawn)
        return t + 1, block, cache, slots

    def goes_on(carry: tuple[Array, Drawn, Cache, Slots]) -> Bool[Array, ""]:
        t, _, _, slots = carry
        return (t < steps) & (slots.left > 0).any()

    block = _nothing_drawn(part, BLOCK_LEN)
    _, block, cache, part = jax.lax.while_loop(goes_on, step, (jnp.int32(0), block, _enter(cache), part))
    return _put(rows, block, _nothing_drawn(slots, BLOCK_LEN)), _leave(cache), _put(rows, part, slots)


@partial(jax.jit, static_argnames="structure", donate_argnames="cache")
def forward(
    arrays: list[Array], cache: Cache, slots: Slots, rows: Int32[Array, "P"] | None = None, *, structure: Structure
) -> tuple[Float32[Array, "P V"], Cache]:
    """Scores of the token after each slot's last one; nothing is drawn. Rows are as in `decode`."""
    model, slots = FlatModel(arrays, structure).llama(), _slots_of(rows, slots)
    x, cache = _over_slots(model, slots.token[:, None], _enter(cache), _places(slots, cache))
    return jax.vmap(model.logits)(x)[:, 0], _leave(cache)


@partial(jax.jit, donate_argnames="slots")
def draw(
    logits: Float32[Array, "P V"],
    slots: Slots,
    requests: Requests,
    mask: Int32[Array, "P W"],
    rows: Int32[Array, "P"] | None = None,
) -> tuple[Drawn, Slots]:
    """Draws a token of the mask for each slot that has any left. Rows are as in `decode`."""
    part = _slots_of(rows, slots)
    part = replace(part, position=part.position + (part.left > 0).astype(jnp.int32))
    drawn, part = _draw(logits, _masked(logits, mask), part, _of(rows, requests))
    drawn = jax.tree.map(lambda x: x[:, None], drawn)
    return _put(rows, drawn, _nothing_drawn(slots, 1)), _put(rows, part, slots)


@partial(jax.jit, static_argnames=("structure", "cache_dtype", "paged"))
def logits(
    arrays: list[Array], token_ids: Int32[Array, "T"], *, structure: Structure, cache_dtype: DTypeLike, paged: bool
) -> Float32[Array, "T V"]:
    """Scores of the next token after each of T tokens; nothing is drawn."""
    model = FlatModel(arrays, structure).llama()
    cache = _enter(_cache_of_one(model.config, token_ids.shape[0], cache_dtype, paged))
    x, _ = _over_slots(model, token_ids[None], cache, jnp.zeros(1, jnp.int32))
    return model.logits(x[0])


@partial(jax.jit, static_argnames=("structure", "cache_dtype", "paged"))
def prompt_logprobs(
    arrays: list[Array],
    token_ids: Int32[Array, "T"],
    length: Int32[Array, ""],
    *,
    structure: Structure,
    cache_dtype: DTypeLike,
    paged: bool,
) -> TopLogprobs:
    """Log-probabilities of the token after each of the first `length` tokens, given those up to it.

    T is a power of two. The text is read in chunks, since scores [T, V] may take gigabytes.
    """
    model, T = FlatModel(arrays, structure).llama(), token_ids.shape[0]
    read_len, next_ids = min(T, READ_LEN), jnp.roll(token_ids, -1)
    cache = _cache_of_one(model.config, T, cache_dtype, paged)

    def read(number: Int32[Array, ""], carry: tuple[Cache, TopLogprobs]) -> tuple[Cache, TopLogprobs]:
        cache, found = carry
        start = number * read_len
        ids, after = (jax.lax.dynamic_slice_in_dim(x, start, read_len) for x in (token_ids, next_ids))
        x, cache = _over_slots(model, ids[None], cache, start[None])
        scored_len = min(read_len, _SCORED_LEN)
        parts = x[0].reshape(-1, scored_len, x.shape[-1]), after.reshape(-1, scored_len)
        scored = jax.lax.map(lambda part: top_logprobs(model.logits(part[0]), part[1]), parts)

        def put(found: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(found, part.reshape(read_len, *found.shape[1:]), start, 0)

        return cache, jax.tree.map(put, found, scored)

    zeros = TopLogprobs.zeros((T,), model.config.vocab_size)
    return jax.lax.fori_loop(0, (length + read_len - 1) // read_len, read, (_enter(cache), zeros))[1]


@partial(jax.jit, static_argnames=("num_rows", "length", "config", "cache_dtype", "paged"))
def empty_rows(*, num_rows: int, length: int, config: LlamaConfig, cache_dtype: DTypeLike, paged: bool) -> Rows:
    """Idle rows, with caches of `length` positions if the cache is not in pages."""
    B, V = num_rows, config.vocab_size
    zeros = partial(jnp.zeros, (B,), jnp.int32)
    one = () if paged else empty_cache(config, length, cache_dtype)
    cache = jax.tree.map(lambda x: jnp.zeros((B, *x.shape), x.dtype), one)
    slots = Slots(zeros(), zeros(), zeros(), jnp.zeros((B, V), jnp.int32))
    stop_ids, mask = jnp.full((B, MAX_STOP_IDS), -1, jnp.int32), jnp.zeros((B, V), bool)
    sampling, wants_logprobs = Sampling.of([SamplingParams(temperature=0)] * B), jnp.zeros(B, bool)
    requests = Requests(sampling, stop_ids, zeros(), mask, wants_logprobs, zeros())
    return Rows(cache, slots, requests)


@partial(jax.jit, static_argnames=("num_pages", "config", "cache_dtype"))
def empty_pages(*, num_pages: int, config: LlamaConfig, cache_dtype: DTypeLike) -> Cache:
    """A pool of so many pages, without a table."""
    return paged_cache(config, num_pages, cache_dtype)


@partial(jax.jit, donate_argnames="pages")
def put_page(pages: Cache, page: Cache, number: Int32[Array, ""]) -> Cache:
    """Overwrites the page of this number."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, number, 0), pages, page)


@partial(jax.jit, donate_argnames=("rows",))
def insert(rows: Rows, new: Rows, sources: Int32[Array, "P"], places: Int32[Array, "P"]) -> Rows:
    """Copies rows `sources` of `new`, whose caches may be shorter, to these places of `rows`."""

    def put(p: Int32[Array, ""], x: Array, new: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(new, sources[p], 1)
        return jax.lax.dynamic_update_slice(x, row, (places[p], *(0,) * (x.ndim - 1)))

    # A loop: one copy for each row in the program would take as many times as long to compile.
    return jax.lax.fori_loop(0, len(places), lambda p, rows: jax.tree.map(partial(put, p), rows, new), rows)


@partial(jax.jit, static_argnames=("length",))
def resize(cache: Cache, keep: Int32[Array, "B"], *, length: int) -> Cache:
    """The rows `keep` of these layers (-1: any), with room for `length` positions, more or fewer than before."""
    return jax.tree.map(lambda x: _of_length(x[keep, ..., :length, :], length), cache)


@jax.jit
def keep(slots: Slots, requests: Requests, keep: Int32[Array, "B"]) -> tuple[Slots, Requests]:
    """The rows `keep`, or an idle one for -1."""
    slots, requests = jax.tree.map(lambda x: x[keep], (slots, requests))
    left = jnp.where(keep < 0, 0, slots.left)
    # Position 0 of an idle row is in any cache.
    return replace(slots, left=left, position=jnp.where(left > 0, slots.position, 0)), requests


def by_layer(step: Callable[[Cache], Cache], layers: list[KeysValues]) -> None:
    """Puts what a step makes of each layer in its place, one after the other, and frees the old one before the next.

    The new one is of another size, so that XLA cannot write it over the old one, and all of both would fill the memory.
    If the memory ends meanwhile, each layer is there, old or new.
    """
    for i, layer in enumerate(layers):
        [layers[i]] = step((layer,))
        for array in jax.tree.leaves(layer):
            array.delete()


def _of_length(cache: Float[Array, "... S H"], length: int) -> Float[Array, "... length H"]:
    room = [(0, 0)] * cache.ndim
    room[-2] = (0, length - cache.shape[-2])
    return jnp.pad(cache, room)


@partial(jax.jit, donate_argnames=("left",))
def stop(left: Int32[Array, "B"], row: Int32[Array, ""]) -> Int32[Array, "B"]:
    """What rows have left to draw, with nothing for one of them."""
    return left.at[row].set(0)


def _places(slots: Slots, cache: Cache) -> Int32[Array, "B"]:
    """The position of the next token of each slot.

    Idle slots are computed, too. With pages they attend to nothing. Else they are where any cache has room: one that
    has ended at a cache's last position would be after it. An only slot is not computed when it is idle.
    """
    if _is_paged(cache):
        return jnp.where(slots.left > 0, slots.position, -1)
    return slots.position if slots.position.shape[0] == 1 else jnp.where(slots.left > 0, slots.position, 0)


def _is_paged(cache: Cache) -> bool:
    return cache[0].table is not None


def _cache_of_one(config: LlamaConfig, length: int, dtype: DTypeLike, paged: bool) -> Cache:
    """A new cache of one slot, with room for so many positions."""
    if paged:
        num_pages = -(-length // PAGE_LEN)
        return paged_cache(config, num_pages, dtype, jnp.arange(num_pages)[None])
    return jax.tree.map(lambda x: x[None], empty_cache(config, length, dtype))


# One slot is no batch: with a batch axis of one, XLA's CPU compiler makes two of each cache, one to attend to and
# one to keep, and copies both at each step. So inside a step the cache of one slot goes without that axis. Pages have
# none: the rows share them.


def _enter(cache: Cache) -> Cache:
    return jax.tree.map(lambda x: x.reshape(x.shape[1:]) if x.shape[0] == 1 and x.ndim == 4 else x, cache)


def _leave(cache: Cache) -> Cache:
    return jax.tree.map(lambda x: x[None] if x.ndim == 3 else x, cache)


def _over_slots(
    model: "Llama",
    token_ids: Int32[Array, "B T"],
    cache: Cache,
    start: Int32[Array, "B"],
    only: Int32[Array, "B"] | None = None,
) -> tuple[Float32[Array, "B T D"], Cache]:
    if _is_paged(cache) or cache[0].key.ndim > 3:
        axes: Any = (KeysValues(None, None, 0),) if _is_paged(cache) else 0  # type: ignore[arg-type]  # numbers of axes
        # Of a model itself, jax would make a text at each trace, which takes 0.1 s.
        step = jax.vmap(model.__call__, in_axes=(0, axes, 0, 0), out_axes=(0, axes))
        return step(token_ids, cache, start, only)
    x, cache = model(token_ids[0], cache, start[0], None if only is None else only[0])
    return x[None], cache


def _of(rows: Int32[Array, "P"] | None, arrays: _Arrays) -> _Arrays:
    """These rows of arrays; all of them if `rows` is None."""
    return arrays if rows is None else jax.tree.map(lambda x: x.at[rows].get(mode="clip"), arrays)


def _slots_of(rows: Int32[Array, "P"] | None, slots: Slots) -> Slots:
    if rows is None:
        return slots
    part = _of(rows, slots)
    return replace(part, left=jnp.where(rows < slots.left.shape[0], part.left, 0))


def _put(rows: Int32[Array, "P"] | None, part: _Arrays, whole: _Arrays) -> _Arrays:
    """Arrays with these rows replaced. A row beyond the last one is dropped."""
    return part if rows is None else jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), whole, part)


def _nothing_drawn(slots: Slots, length: int) -> Drawn:
    shape = slots.token.shape[0], length
    return Drawn(jnp.full(shape, -1, jnp.int32), TopLogprobs.zeros(shape, slots.counts.shape[1]))


def _masked(logits: Float32[Array, "B V"], mask: Int32[Array, "B W"]) -> Float32[Array, "B V"]:
    """Bit i % 32 of integer i // 32 allows token i; the others get -inf."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None] & 1
    return jnp.where(bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)


def _draw(
    logits: Float32[Array, "B V"], scores: Float32[Array, "B V"], slots: Slots, requests: Requests
) -> tuple[Drawn, Slots]:
    """Draws a token for each slot that has any left; `slots.position` is where it will be.

    The scores are the logits, or -inf where a token may not come.
    """
    too_early = (slots.position < requests.first_stop)[:, None]
    sampling = requests.sampling.forbidding(jnp.where(too_early, requests.stop_ids, -1))
    token = sample(scores, sampling, slots.position, requests.prompt_mask, slots.counts)
    active = slots.left > 0
    stops = (token[:, None] == requests.stop_ids).any(axis=1)
    moved = Slots(
        token=jnp.where(active, token, slots.token),
        position=slots.position,
        left=jnp.where(active & ~stops, slots.left - 1, 0),
        counts=slots.counts.at[jnp.arange(token.shape[0]), token].add(active.astype(jnp.int32)),
    )
    logprobs = wanted_logprobs(logits, token, active & requests.wants_logprobs)
    return Drawn(jnp.where(active, token, -1), logprobs), moved
