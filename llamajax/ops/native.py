"""The operations of our C++ library: registered with XLA, and called.

Knows their arguments, not when to take them. `kernels` finds the library.
"""

import atexit
import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int32, Real, Shaped

from llamajax import kernels
from llamajax.kernels import aligned
from llamajax.ops.kv import KeysValues, Positions
from llamajax.ops.stacked import Stacked

if TYPE_CHECKING:
    from llamajax.ops.packed import PackedWeight

_Weight = TypeVar("_Weight")


def available() -> bool:
    """Whether the operations can be called, on a CPU."""
    return isinstance(_library(), ctypes.CDLL)


def implementation() -> str:
    """What computes on a CPU, and why if it is XLA."""
    return kernels.described(_library())


def limit(instruction_set: str) -> None:
    """Takes the processor's best instruction set from this one on down."""
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    library.llamajax_limit(instruction_set.encode())


@cache
def _library() -> ctypes.CDLL | str:
    """The library, known to XLA, or why there is none. Raises as `kernels.library` does."""
    library = kernels.library()
    if isinstance(library, ctypes.CDLL):
        try:
            for name in ("linear", "attention", "unwritten", "sample", "begin_to_ask", "ask"):
                target = f"llamajax_{name}"
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
            library.llamajax_answer(_answer)
            atexit.register(library.llamajax_answer, None)  # XLA's threads go on, and must not call Python then
        except Exception as e:  # built for another jax
            return kernels.not_loaded(e)
    return library


def stack(weights: Iterable[_Weight], num_layers: int) -> list[_Weight]:
    """As many layers' weights of the same formats and shapes, with their arrays stacked."""
    for layer, weight in enumerate(weights):
        arrays, structure = jax.tree.flatten(weight)
        if layer == 0:
            stacks = [aligned((num_layers, *array.shape), array.dtype) for array in arrays]
        for layers, array in zip(stacks, arrays, strict=True):
            layers[layer] = array
    return [jax.tree.unflatten(structure, arrays) for arrays in zip(*map(layers_of, stacks), strict=True)]


def layers_of(layers: Shaped[np.ndarray, "L ..."]) -> list[Stacked]:
    """The arrays of layers, which stay in one."""
    shared = jax.device_put(layers)
    return [Stacked(shared, np.int32(layer)) for layer in range(len(layers))]


def _in_place(array: Array | Stacked) -> tuple[Array, Int32[Array, ""] | np.int32]:
    """A stack, and which of its arrays is meant."""
    return (array.layers, array.layer) if isinstance(array, Stacked) else (array[None], jnp.int32(0))


def linear(
    x: Float32[Array, "M K"],
    weight: "PackedWeight",
    norm: Float32[Array, "K"] | Stacked | None,
    residual: Float32[Array, "M N"] | None,
    *,
    eps: float,
    gated: bool,
) -> Float32[Array, "M N"]:
    """x W^T + residual, or silu(gate) * up of W's halves; of rms_norm(x) if there is a norm.

    Fails, at run time, for a layer that is not among those stacked.
    """
    format, none = weight.format, jnp.zeros(0, jnp.float32)
    N = weight.shape[0] // (2 if gated else 1)
    return jax.ffi.ffi_call("llamajax_linear", jax.ShapeDtypeStruct((x.shape[0], N), jnp.float32))(
        x,
        *_in_place(weight.data),
        *_in_place(none if norm is None else norm),
        none if residual is None else residual,
        numbers=format.numbers,
        block=np.int64(format.block),
        offsets=format.has_offsets,
        zero=np.int64(format.zero),
        eps=np.float32(eps),
        gated=gated,
    )


def attention(
    qkv: Float32[Array, "*B T (N+2K)*H"],
    kv: KeysValues,
    at: Positions,
    norms: Float32[Array, "2*H"] | None = None,
    *,
    eps: float = 0.0,
    window: int | None = None,
) -> tuple[Float32[Array, "*B T N*H"], Real[Array, "P L K 64 R"], Real[Array, "P L K 64 R"]]:
    """As `ops.attention`, of one sequence or a batch, over pages: with B, the table and the positions have it, too.

    The pages are written in place where they may be.

    Fails, at run time, for start + T > 64 M, and for a page or a layer that there is not. Fails for an H that is no
    multiple of 8. Table entries behind the last position may be anything.
    """
    key, value, table, layer = kv
    width = qkv.shape[-1] - 2 * key.shape[2] * 2 * at.cos.shape[-1]
    shapes = [((*qkv.shape[:-1], width), jnp.float32), (key.shape, key.dtype), (value.shape, value.dtype)]
    mixed, key, value = jax.ffi.ffi_call(
        "llamajax_attention",
        tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        input_output_aliases={6: 1, 7: 2},
    )(
        *(qkv, at.cos, at.sin, at.start, layer, table, key, value),
        jnp.zeros(0, jnp.float32) if norms is None else norms,
        eps=np.float32(eps),
        window=np.int64(window or np.iinfo(np.int64).max),
    )
    return mixed, key, value


def unwritten(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[Array, Array]:
    """Two arrays of any content, which take no memory until they are written."""
    array = jax.ShapeDtypeStruct(shape, dtype)
    first, second = jax.ffi.ffi_call("llamajax_unwritten", (array, array))()
    return first, second


def sample(
    logits: Float32[Array, "B V"],
    prompt_mask: Bool[Array, "B V"],
    counts: Int32[Array, "B V"],
    bias_ids: Int32[Array, "B N"],
    bias: Float32[Array, "B N"],
    options: Float32[Array, "B 8"],
) -> Int32[Array, "B"]:
    """Each row's token, as `sampling.sample` draws it.

    The options are temperature, min_p, top_k, top_p, the repetition, presence and frequency penalties, and a number in
    [0, 1) that decides the draw. A temperature of 0 is greedy.
    """
    shape = jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32)
    return jax.ffi.ffi_call("llamajax_sample", shape)(logits, prompt_mask, counts, bias_ids, bias, options)


@contextmanager
def asked(function: Callable[[int], bytes | None]) -> Iterator[Int32[np.ndarray, "1"]]:
    """The number by which `ask` asks this function, as long as the context lasts: after that all answers have ended.

    The function is given a token, and returns a mask of the tokens that may follow it, or None if the answer has ended.
    XLA's threads call it, and it must not raise.
    """
    number = next(_numbers)
    _asked[number] = function
    try:
        yield np.array([number], np.int32)
    finally:
        del _asked[number]


def begin_to_ask(number: Int32[Array, "1"], token: Int32[Array, "1"], vocab_size: int) -> Int32[Array, "1"]:
    """Asks the host, while the program goes on, which tokens may follow one.

    Returns the token: what is computed of it comes after this.
    """
    shape = jax.ShapeDtypeStruct((1,), jnp.int32)
    call = jax.ffi.ffi_call("llamajax_begin_to_ask", shape, has_side_effect=True)
    return call(number, token, vocab_size=np.int64(vocab_size))


def ask(number: Int32[Array, "1"], logits: Float32[Array, "1 V"]) -> tuple[Float32[Array, "1 V"], Bool[Array, "1"]]:
    """Waits for what the host says of the token that it was asked about last.

    Returns the logits of what may follow it, with -inf for the others, and whether the answer has ended.
    """
    shapes = jax.ShapeDtypeStruct(logits.shape, jnp.float32), jax.ShapeDtypeStruct((1,), jnp.bool_)
    allowed, ended = jax.ffi.ffi_call("llamajax_ask", shapes, has_side_effect=True)(number, logits)
    return allowed, ended


_asked: dict[int, Callable[[int], bytes | None]] = {}
_numbers = count()


@ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
def _answer(number: int, token: int, address: int) -> bool:
    """Copies the mask to this address. Returns whether there is one."""
    function = _asked.get(number)
    mask = function(token) if function else None
    if mask is not None:
        ctypes.memmove(address, mask, len(mask))
    return mask is not None
