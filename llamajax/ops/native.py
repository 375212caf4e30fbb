"""Our C++ operations for CPUs: found, registered with XLA, and called.

Installing compiles cpu/kernels.cc where there is a compiler. LLAMAJAX_CPU limits what is used: one of INSTRUCTION_SETS
to that set and those below it, "xla" to none. Portable code is for tests: XLA's is five times as fast, and it serves
where the processor has no better. Knows the operations' arguments, not when to take them.
"""

import ctypes
import math
import os
import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int, Int32, Real, Shaped

from llamajax.errors import CheckpointError, PlatformError
from llamajax.ops.packed import GROUP, PACKED_FORMATS, PackedWeight
from llamajax.ops.stacked import Stacked

# Formats whose blocks hold in a file what they hold when packed: all but the order, or the scales' kind, is the same.
MOVED_FORMATS = ("f32", "f16", "bf16", "q4_0", "q4_1", "q8_0")
# From the best to the worst.
INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avxvnni", "avx2", "neon", "portable")
NOT_FINITE = "{} has a scale that is not finite (NaN or infinite): the file is broken, fetch or convert it again"
_Weight = TypeVar("_Weight")
_LIBRARY = Path(__file__).with_name(f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")


def available() -> bool:
    """Whether the operations can be called, on a CPU."""
    return isinstance(_library(), ctypes.CDLL)


def implementation() -> str:
    """What computes on a CPU, and why if it is XLA."""
    library = _library()
    return f"XLA ({library})" if isinstance(library, str) else f"native kernels ({_instruction_set(library)})"


def limit(instruction_set: str) -> None:
    """Takes the processor's best instruction set from this one on down."""
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    library.llamajax_limit(instruction_set.encode())


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none.

    Raises PlatformError for a LLAMAJAX_CPU without a meaning.
    """
    wanted = os.environ.get("LLAMAJAX_CPU", "")
    if wanted not in ("", "xla", *INSTRUCTION_SETS):
        raise PlatformError(f"LLAMAJAX_CPU must be one of {', '.join(INSTRUCTION_SETS)} and xla, not {wanted!r}")
    if wanted == "xla":
        return "LLAMAJAX_CPU is set"
    if not _LIBRARY.is_file():
        return "the native kernels are not built: install a C++ compiler, then llamajax again"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        for name in ("llamajax_linear", "llamajax_attention", "llamajax_sample"):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        library.llamajax_pack.restype = ctypes.c_bool
        library.llamajax_pack.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_int64] * 5,
            ctypes.c_uint8,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
    except Exception as e:  # built for another machine or another jax
        return f"the native kernels cannot be loaded: {' '.join(str(e).split())}; install llamajax again"
    library.llamajax_limit(wanted.encode())
    if not wanted and _instruction_set(library) == "portable":
        return "this processor has neither AVX2 nor NEON with dot products"
    return library


def _instruction_set(library: ctypes.CDLL) -> str:
    library.llamajax_instruction_set.restype = ctypes.c_char_p
    return library.llamajax_instruction_set().decode()


def pack(
    layers: Iterable[Sequence[Shaped[np.ndarray, "n width"]]],
    paths: Sequence[str],
    order: Int[np.ndarray, "N"],
    name: str,
) -> list[PackedWeight]:
    """What `packed` makes of rows of a file's blocks or numbers, of the parameters of these paths, in one array.

    A layer's rows are those stored, one array below the other, in this order, and are whole blocks. For MOVED_FORMATS
    only. XLA's programs take longer to be read from their cache than this does.

    Raises CheckpointError for a scale or an offset that is not finite.
    """
    format = PACKED_FORMATS[name]
    head, quants = format.head_bytes, format.block * format.bits // 8
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    signed = format.zero == 128
    for layer, stored in enumerate(layers):
        num_blocks = stored[0][0].nbytes // (head + quants)
        if layer == 0:
            group_bytes = format.first_block + num_blocks * format.block_bytes
            data = _aligned((len(paths), -(-len(order) // GROUP), group_bytes), np.uint8)
        rows = np.concatenate([part.ctypes.data + part.strides[0] * np.arange(len(part)) for part in stored])[order]
        finite = library.llamajax_pack(
            rows.ctypes.data,
            len(rows),
            num_blocks,
            head,
            quants,
            format.word_bytes,
            128 * signed,
            format.zero,
            data[layer].ctypes.data,
        )
        if not finite:
            raise CheckpointError(NOT_FINITE.format(paths[layer]))
    return [PackedWeight(array, (len(order), num_blocks * format.block), name) for array in _layers_of(data)]


def stack(weights: Iterable[_Weight], num_layers: int) -> list[_Weight]:
    """As many layers' weights of the same formats and shapes, with their arrays stacked."""
    for layer, weight in enumerate(weights):
        arrays, structure = jax.tree.flatten(weight)
        if layer == 0:
            stacks = [_aligned((num_layers, *array.shape), array.dtype) for array in arrays]
        for layers, array in zip(stacks, arrays, strict=True):
            layers[layer] = array
    return [jax.tree.unflatten(structure, arrays) for arrays in zip(*map(_layers_of, stacks), strict=True)]


def _layers_of(layers: np.ndarray) -> list[Stacked]:
    shared = jax.device_put(layers)
    return [Stacked(shared, np.int32(layer)) for layer in range(len(layers))]


def _aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Memory at a multiple of 64: JAX takes such arrays as they are, and copies others."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size].view(dtype).reshape(shape)


def _in_place(array: Array | Stacked) -> tuple[Array, Int32[Array, ""] | np.int32]:
    """A stack, and which of its arrays is meant."""
    return (array.layers, array.layer) if isinstance(array, Stacked) else (array[None], jnp.int32(0))


def linear(
    x: Float32[Array, "M K"],
    weight: PackedWeight,
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
    cos: Float32[Array, "*B T H/2"],
    sin: Float32[Array, "*B T H/2"],
    key: Real[Array, "*BL K S R"],
    value: Real[Array, "*BL K S R"],
    start: Int32[Array, "*B"],
    layer: Int32[Array, ""] | None,
) -> tuple[Float32[Array, "*B T N*H"], Real[Array, "*BL K S R"], Real[Array, "*BL K S R"]]:
    """As `ops.attention`, of one sequence or a batch. The caches are written in place where they may be.

    Fails, at run time, for start < 0 or start + T > S, for a layer that is not from 0 to L - 1, and for an H that is no
    multiple of 8.
    """
    width = qkv.shape[-1] - 2 * key.shape[-3] * 2 * cos.shape[-1]
    shapes = [((*qkv.shape[:-1], width), jnp.float32), (key.shape, key.dtype), (value.shape, value.dtype)]
    mixed, key, value = jax.ffi.ffi_call(
        "llamajax_attention",
        tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes),
        input_output_aliases={5: 1, 6: 2},
    )(qkv, cos, sin, start, jnp.int32(0) if layer is None else layer, key, value)
    return mixed, key, value


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
