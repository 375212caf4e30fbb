"""A model's programs, compiled for an accelerator that need not be there, and what can be read from the result.

Bytes and kernels are counted, not measured: autotuning needs the device, and so does time.

Wheels of jax's own version are needed, and no driver: for an H100 `pip install --no-deps jax-cuda12-plugin
jax-cuda12-pjrt`, for a v5e `libtpu`.
"""

import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jax.stages import Lowered
from jax.typing import DTypeLike

from llamajax.config import LlamaConfig
from llamajax.engine.programs import Program, Programs
from llamajax.engine.steps import FlatModel
from llamajax.placement import Placement, bytes_per_token
from llamajax.types import DType
from llamajax.weights.random import random_weights

from .hlo import STOP, Cost, Hlo, Pick, host_cost, thunks, total

Target = Literal["h100", "v5e"]

# The plugins look for devices otherwise.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# From NVIDIA's data sheet, and what the driver says of such a card.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 12 }
"""


def missing(target: Target) -> str | None:
    """Which wheels are to be installed before programs can be compiled for this target; None if all are there."""
    if target == "v5e":
        return None if find_spec("libtpu") else "libtpu"
    return (
        None
        if find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda12")
        else "jax-cuda12-plugin and jax-cuda12-pjrt"
    )


@cache
def device(target: Target) -> jax.Device:
    """The first one of its kind, to compile for. Sets environment variables."""
    os.environ.update(_ENVIRONMENT)
    if target == "v5e":
        return topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
    return topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1").devices[0]


class Shapes(NamedTuple):
    """A model without its numbers.

    Attributes:
      weight_bytes: what a token reads of the weights.
    """

    target: Target
    config: LlamaConfig
    programs: Programs
    cache_dtype: DTypeLike
    weight_bytes: int


@cache
def shapes(target: Target, config: LlamaConfig, dtype: DType) -> Shapes:
    """A model of this configuration, kept as `llamajax.load` keeps it."""
    place, structures = device(target), []
    placement = Placement.of(config, place.platform, has_kernels=False, dtype=dtype, device=place)

    def arrays() -> list[jax.Array]:
        model = FlatModel.of(config, random_weights(config, placement), place)
        structures.append(model.structure)
        return model.arrays

    sharding = SingleDeviceSharding(place)
    made = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in jax.eval_shape(arrays)]
    model = FlatModel(made, structures[0])
    weights = model.weights()
    if not config.tie_word_embeddings:
        del weights["embed_tokens.weight"]  # a token reads one row
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    return Shapes(target, config, Programs(model, placement), placement.cache_dtype, weight_bytes)


@dataclass(frozen=True)
class Report:
    """What a program would do.

    Attributes:
      greedy: the cheapest way. Nobody wants log-probabilities or adds to logits.
      chat: a token of the default chat: top-p alone, and no two logits are equal.
      sampled: the costliest way: top-k, top-p and equal logits at once.
      ideal_bytes: weights, keys and values, read once.
      cache_bytes: of all keys and values.
      copied_bytes: of the cache, and in a decode of the slots, that are not written in place.
      moves: copies, transpositions and conversions of a MiB or more that are kernels of their own.
      sorts: those that do not wait for somebody to want log-probabilities.
      seconds: to compile.
    """

    greedy: Cost
    chat: Cost
    sampled: Cost
    ideal_bytes: int
    cache_bytes: int
    copied_bytes: int
    temp_bytes: int
    moves: list[str]
    sorts: list[str]
    seconds: float


def native_calls(lowered: Lowered) -> list[str]:
    """The operations that only a CPU has, among those that a program calls."""
    return sorted(set(re.findall(r"llamajax_\w+", lowered.as_text())))


def _drawing(branch: int) -> Pick:
    """The way through this one of the four branches that draw (greedy, min-p, top-p, top-k); else the cheapest."""

    def pick(branches: Iterable[Cost]) -> Cost:
        costs = [*branches]
        return costs[branch] if len(costs) == 4 else min(costs)

    return pick


def report(model: Shapes, program: Program, options: Mapping[str, str | bool] | None = None) -> Report:
    """Compiles a decode or a prefill, with these options of XLA's, and reads what comes out."""
    lowered = model.programs.lowered(program)
    with tempfile.TemporaryDirectory() as folder:
        dump: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        began = time.perf_counter()
        compiled = lowered.compile({**dump, **(options or {})} if model.target == "h100" else None)
        seconds = time.perf_counter() - began
        # Passes write one each: the last is what runs. A TPU has none.
        outlines = sorted(Path(folder).glob("*.thunk_sequence*.txt"))
        outline = outlines[-1].read_text() if outlines else ""
    hlo, host, memory = Hlo(compiled.as_text()), thunks(outline), compiled.memory_analysis()
    computations, parts, executed = [hlo.entry], host, [*hlo.executed(hlo.entry)]
    if program.step == "decode":
        # One turn of the loop over tokens: how many there will be is not known.
        computations = hlo.called(hlo.token_loop())
        executed += [i for name in computations for i in hlo.executed(name)]
        # A graph that holds the loop is launched once in a call.
        if any(thunk.kind == "kWhile" for thunk in host):
            parts = [part for thunk in host if thunk.kind == "kWhile" for part in (STOP, *thunk.parts)]
    greedy, chat, sampled = (
        total([*(hlo.cost(name, pick) for name in computations), host_cost(parts, pick)])
        for pick in (_drawing(0), _drawing(2), max)
    )
    rows = model.programs.shapes(program.num_rows, program.cache_len)
    donated = jax.tree.leaves((rows.cache, rows.slots) if program.step == "decode" else rows.cache)
    cache_bytes = program.num_rows * program.cache_len * bytes_per_token(model.config, model.cache_dtype)
    return Report(
        greedy=greedy,
        chat=chat,
        sampled=sampled,
        ideal_bytes=model.weight_bytes + cache_bytes,
        cache_bytes=cache_bytes,
        copied_bytes=sum(x.size * x.dtype.itemsize for x in donated) - memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        moves=[f"{i.name} {i.type}" for i in executed if hlo.moves(i)],
        sorts=[i.name for i in executed if hlo.sorts(i)],
        seconds=seconds,
    )
