"""What an accelerator would run: the product's own decode and prefill, compiled for one that need not be there.

Two layers stand for all: they are alike, and compile in seconds. Without the wheels (`scripts/compiled.py` names them)
these tests are skipped.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.custom_batching import sequential_vmap
from jax.stages import Lowered

from llamajax import ops, sampling
from llamajax.engine import programs, steps
from llamajax.engine.programs import Program
from llamajax.families import CONFIGS
from llamajax.ops import linear, native, threshold, weight
from llamajax.types import DType
from scripts import program_report
from scripts.compiled import Report, Target, missing, native_calls, report, shapes
from scripts.hlo import Cost

# The module: the package has a function of the same name.
attention = sys.modules["llamajax.ops.attention"]

CACHE_LEN = 2048
# Versions of XLA differ in what they fuse.
MARGIN = 1.02
# Of a token of the default chat on a GPU, over a greedy one. 20 would do with a byte at a time, which is slower.
MAX_MORE_KERNELS = 32


class Case(NamedTuple):
    """A program: `size` is how many rows are decoded, or how many tokens are read."""

    target: Target
    model: str
    dtype: DType
    step: Literal["decode", "prefill"]
    size: int


class Limits(NamedTuple):
    """As measured when this was written or last made tighter: of a greedy token, of one of the default chat
    (temperature 0.6, top-p 0.9), and of the costliest way through sampling.

    Attributes:
      ratio: bytes moved over the least there are.
      kernels, reads, launches: as in `Cost`.
      temp_mb: memory beside arguments and results, in MB.
      num_moves: copies and conversions of a MiB or more that are kernels of their own.
    """

    ratio: tuple[float, float, float]
    kernels: tuple[int, int, int]
    reads: int
    launches: int
    temp_mb: float
    num_moves: int = 0


LIMITS = {
    Case("h100", "llama3.2-1b", "auto", "decode", 1): Limits((1.009, 1.024, 1.065), (70, 102, 191), 1, 2, 4.9, 0),
    Case("h100", "llama3.2-1b", "auto", "decode", 8): Limits((1.063, 1.176, 1.446), (62, 94, 183), 1, 3, 22.6, 1),
    Case("h100", "llama3.2-1b", "auto", "decode", 32): Limits((1.204, 1.568, 2.44), (62, 94, 183), 1, 3, 90.4, 1),
    Case("h100", "llama3.2-1b", "int8", "decode", 1): Limits((1.017, 1.047, 1.128), (69, 101, 190), 1, 2, 4.9, 0),
    Case("h100", "llama3.2-1b", "int8", "decode", 8): Limits((1.115, 1.324, 1.824), (63, 95, 184), 1, 3, 22.6, 1),
    Case("h100", "llama3.2-1b", "int8", "decode", 32): Limits((1.32, 1.899, 3.283), (64, 96, 185), 1, 3, 90.4, 1),
    Case("h100", "llama3.2-1b", "auto", "prefill", 16): Limits((1.066, 1.081, 1.122), (62, 94, 183), 0, 1, 6.6, 0),
    Case("h100", "llama3.2-1b", "auto", "prefill", 512): Limits((2.388, 2.403, 2.444), (62, 94, 183), 0, 1, 220.4, 1),
    Case("h100", "llama3.2-1b", "int8", "prefill", 48): Limits((1.367, 1.397, 1.478), (64, 96, 185), 0, 1, 19.4, 0),
    Case("h100", "llama3.2-1b", "int8", "prefill", 128): Limits((1.883, 1.913, 1.994), (65, 97, 186), 0, 1, 59.8, 0),
    Case("h100", "llama3.2-1b", "int8", "prefill", 512): Limits((3.629, 3.659, 3.74), (64, 96, 185), 0, 1, 219.3, 1),
    Case("h100", "llama3.1-8b", "auto", "decode", 1): Limits((1.005, 1.011, 1.027), (71, 103, 192), 1, 2, 4.9, 0),
    Case("h100", "llama3.1-8b", "auto", "decode", 8): Limits((1.03, 1.076, 1.186), (62, 94, 183), 1, 3, 22.6, 1),
    Case("h100", "llama3.1-8b", "auto", "decode", 32): Limits((1.099, 1.253, 1.62), (64, 96, 185), 1, 3, 90.4, 1),
    Case("h100", "llama3.1-8b", "int8", "decode", 1): Limits((1.009, 1.021, 1.054), (71, 103, 192), 1, 2, 4.9, 0),
    Case("h100", "llama3.1-8b", "int8", "decode", 8): Limits((1.055, 1.141, 1.348), (64, 96, 185), 1, 3, 22.6, 1),
    Case("h100", "llama3.1-8b", "int8", "decode", 32): Limits((1.162, 1.414, 2.017), (65, 97, 186), 1, 3, 90.4, 1),
    Case("h100", "llama3.1-8b", "auto", "prefill", 16): Limits((1.035, 1.041, 1.057), (64, 96, 185), 0, 1, 6.8, 0),
    Case("h100", "llama3.1-8b", "auto", "prefill", 512): Limits((1.615, 1.621, 1.638), (63, 95, 184), 0, 1, 222.6, 1),
    Case("v5e", "llama3.2-1b", "auto", "decode", 1): Limits((1.012, 1.017, 1.018), (177, 490, 537), 0, 0, 5.7, 0),
    Case("v5e", "llama3.2-1b", "auto", "decode", 8): Limits((1.015, 1.030, 1.035), (136, 176, 203), 0, 0, 139.9, 5),
    Case("v5e", "llama3.2-1b", "auto", "decode", 32): Limits((1.147, 1.194, 1.211), (116, 157, 189), 0, 0, 541.3, 8),
    Case("v5e", "llama3.2-1b", "int8", "decode", 1): Limits((1.029, 1.035, 1.038), (207, 520, 567), 0, 0, 6.5, 0),
    Case("v5e", "llama3.2-1b", "int8", "decode", 32): Limits((1.233, 1.309, 1.335), (137, 178, 210), 0, 0, 541.6, 9),
    Case("v5e", "llama3.2-1b", "int8", "prefill", 128): Limits((1.114, 1.121, 1.124), (204, 517, 565), 0, 0, 5.9, 0),
    Case("v5e", "llama3.2-1b", "auto", "prefill", 512): Limits((1.881, 1.884, 1.885), (184, 497, 545), 0, 0, 137.9, 0),
    Case("v5e", "llama3.1-8b", "auto", "decode", 1): Limits((1.012, 1.013, 1.015), (195, 507, 554), 0, 0, 6.5, 0),
    Case("v5e", "llama3.1-8b", "auto", "decode", 32): Limits((1.070, 1.090, 1.097), (154, 195, 229), 0, 0, 46.6, 1),
    Case("v5e", "llama3.1-8b", "int8", "decode", 1): Limits((1.006, 1.010, 1.012), (169, 481, 528), 0, 0, 4.8, 0),
    Case("v5e", "llama3.1-8b", "int8", "decode", 8): Limits((1.058, 1.069, 1.073), (194, 234, 261), 0, 0, 10.4, 0),
    Case("v5e", "llama3.1-8b", "int8", "decode", 32): Limits((1.139, 1.172, 1.183), (160, 201, 235), 0, 0, 46.5, 1),
    Case("v5e", "llama3.1-8b", "auto", "prefill", 16): Limits((1.076, 1.078, 1.078), (166, 479, 527), 0, 0, 8.5, 0),
    Case("v5e", "llama3.1-8b", "auto", "prefill", 512): Limits((1.513, 1.515, 1.515), (169, 482, 530), 0, 0, 160.5, 7),
}


# For tests that read the same program, without a fault in it.
report_once = cache(report)


def measured(case: Case, report: Callable[..., Report]) -> dict[str, tuple[float, float]]:
    """What is counted of a program, beside the most that it may be."""
    rows, chunk_len = (case.size, 0) if case.step == "decode" else (1, case.size)
    program = Program(case.step, CACHE_LEN, chunk_len, rows)
    model = shapes(case.target, replace(CONFIGS[case.model], num_hidden_layers=2), case.dtype)
    if calls := native_calls(model.programs.lowered(program)):
        return {f"native calls: {calls}": (len(calls), 0)}
    found, limits = report(model, program), LIMITS[case]
    figures: dict[str, tuple[float, float]] = {
        "bytes of cache and slots that are copied": (found.copied_bytes, 0),
        f"large moves: {found.moves}": (len(found.moves), limits.num_moves),
        f"sorts: {found.sorts}": (len(found.sorts), 0),
        "temporary MB": (found.temp_bytes / 1e6, limits.temp_mb * MARGIN),
        "launches": (found.sampled.launches, limits.launches),
    }
    if case.target == "h100":
        figures["more kernels of chat than of greedy"] = (found.chat.kernels - found.greedy.kernels, MAX_MORE_KERNELS)
    for place, path in enumerate(("greedy", "chat", "sampled")):
        cost: Cost = getattr(found, path)
        figures |= {
            f"bytes over ideal, {path}": (cost.num_bytes / found.ideal_bytes, limits.ratio[place] * MARGIN),
            f"kernels, {path}": (cost.kernels, limits.kernels[place] * MARGIN),
            f"reads, {path}": (cost.reads, limits.reads),
        }
    return figures


def faults(case: Case, report: Callable[..., Report]) -> dict[str, tuple[float, float]]:
    return {name: (figure, most) for name, (figure, most) in measured(case, report).items() if figure > most}


def needs(target: Target) -> pytest.MarkDecorator:
    wheels = missing(target)
    return pytest.mark.skipif(wheels is not None, reason=f"programs for a {target} are not compiled without {wheels}")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=needs(case.target), id="-".join(map(str, case))) for case in LIMITS]
)
def test_a_program_is_as_good_as_it_was(case: Case) -> None:
    assert faults(case, report_once) == {}


@pytest.fixture
def planting(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Steps are traced anew, before the test and after it."""
    jax.clear_caches()
    yield monkeypatch
    monkeypatch.undo()
    jax.clear_caches()


def native_attention(patch: pytest.MonkeyPatch) -> None:
    """Of one row, to its cache as if that were pages."""

    def of_pages(qkv: Array, key: Array, value: Array, at: ops.Positions) -> tuple[Array, Array, Array]:
        K, S, R = key.shape
        table = jnp.arange(S // ops.PAGE_LEN, dtype=jnp.int32)
        pools = (x.reshape(K, -1, ops.PAGE_LEN, R).swapaxes(0, 1)[:, None] for x in (key, value))
        mixed, *pools = native.attention(qkv, ops.KeysValues(*pools, table, jnp.int32(0)), at)
        return mixed, *(pool[:, 0].swapaxes(0, 1).reshape(K, S, R) for pool in pools)

    patch.setattr(
        attention, "_attention", lambda qkv, kv, at, *_, **options: sequential_vmap(of_pages)(qkv, *kv[:2], at)
    )


def a_cache_that_is_not_donated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(steps, "decode", jax.jit(steps.decode.__wrapped__, static_argnames="structure"))


def slots_that_are_not_donated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        steps, "decode", jax.jit(steps.decode.__wrapped__, static_argnames="structure", donate_argnames="cache")
    )


def weights_made_f32(patch: pytest.MonkeyPatch) -> None:
    dense = linear._dense
    patch.setattr(linear, "_dense", lambda x, w: dense(x, jax.lax.optimization_barrier(w.astype(jnp.float32))))


def keys_that_are_transposed(patch: pytest.MonkeyPatch) -> None:
    dot = attention._batched_dot

    def transposed(a: Array, b: Array, contract: int) -> Array:
        K, S, H = b.shape
        # In one row each, since XLA would only rename the axes of an array of three.
        rows = jax.lax.optimization_barrier(b.swapaxes(1, 2).reshape(K, -1))
        return dot(a, rows.reshape(K, H, S).swapaxes(1, 2), contract)

    patch.setattr(attention, "_batched_dot", transposed)


def weights_scaled_before_the_product(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        linear,
        "_int8_as_bf16",
        lambda x, w: linear._dense(x, (w.values * w.scale[:, None]).astype(jnp.bfloat16)),
    )


def a_sorted_vocabulary(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sampling, "_top_in_parts", lambda x: tuple(jax.lax.top_k(x, 20)))


def a_threshold_by_halves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(threshold, "_in_rounds", threshold._by_halves)


def a_norm_in_two_kernels(patch: pytest.MonkeyPatch) -> None:
    norm = weight.Norm.__call__
    patch.setattr(weight.Norm, "__call__", lambda self, x: jax.lax.optimization_barrier(norm(self, x)))


def a_loop_that_the_host_reads(patch: pytest.MonkeyPatch) -> None:
    adjusted = sampling._adjusted

    def looped(logits: Array, *rest: Any) -> Array:
        turns = (logits > 0).any().astype(jnp.int32)
        return jax.lax.fori_loop(0, turns, lambda _, x: 2 * x, adjusted(logits, *rest))

    patch.setattr(sampling, "_adjusted", looped)


def no_graphs(patch: pytest.MonkeyPatch) -> None:
    compile = Lowered.compile
    patch.setattr(
        Lowered,
        "compile",
        lambda self, options: compile(self, {**options, "xla_gpu_graph_min_graph_size": 1_000_000}),
    )


def a_table_as_integers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linear, "_embed", linear._embed_cpu)


def a_table_in_another_layout(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linear, "_embed_int8_tpu", linear._embed_int8)


OVER_IDEAL = [f"bytes over ideal, {path}" for path in ("greedy", "chat", "sampled")]
ONE_ROW = Case("h100", "llama3.2-1b", "auto", "decode", 1)
INT8_ROW = ONE_ROW._replace(dtype="int8")
FAULTS = [
    (ONE_ROW, native_attention, ["native calls"]),
    (ONE_ROW, a_cache_that_is_not_donated, ["bytes of cache and slots"]),
    (ONE_ROW, slots_that_are_not_donated, ["bytes of cache and slots"]),
    (ONE_ROW, weights_made_f32, ["large moves", *OVER_IDEAL, "temporary"]),
    (ONE_ROW, keys_that_are_transposed, ["large moves"]),
    (ONE_ROW, a_sorted_vocabulary, ["sorts"]),
    (ONE_ROW, a_norm_in_two_kernels, ["kernels, greedy"]),
    (ONE_ROW, a_loop_that_the_host_reads, ["reads, greedy", "reads, chat", "reads, sampled"]),
    (ONE_ROW, a_threshold_by_halves, ["kernels, chat", "kernels, sampled", "more kernels", "reads, chat", "launches"]),
    (ONE_ROW, no_graphs, ["launches"]),
    (INT8_ROW, weights_scaled_before_the_product, [*OVER_IDEAL, "temporary"]),
    (ONE_ROW._replace(target="v5e"), a_table_as_integers, ["large moves", "temporary"]),
    (INT8_ROW._replace(target="v5e"), a_table_in_another_layout, ["large moves", *OVER_IDEAL, "temporary"]),
]


@pytest.mark.parametrize(
    ("case", "plant", "found"),
    [
        pytest.param(*fault, marks=needs(fault[0].target), id=f"{fault[0].target}-{fault[1].__name__}")
        for fault in FAULTS
    ],
)
def test_a_planted_fault_is_found(
    case: Case, plant: Callable[[pytest.MonkeyPatch], None], found: list[str], planting: pytest.MonkeyPatch
) -> None:
    plant(planting)
    names = faults(case, report)
    assert [name for name in found if not any(fault.startswith(name) for fault in names)] == []


@needs("h100")
@pytest.mark.parametrize(
    ("dtype", "rows", "options", "is_whole"),
    [
        ("auto", 1, programs.WHOLE_GRAPHS, True),
        ("auto", 8, programs.WHOLE_GRAPHS, True),
        ("auto", 32, programs.WHOLE_GRAPHS, True),
        ("int8", 1, programs.WHOLE_GRAPHS, True),
        ("auto", 1, None, False),  # so this test can fail
    ],
)
def test_a_decode_call_can_be_one_graph(dtype: DType, rows: int, options: dict | None, is_whole: bool) -> None:
    """With LLAMAJAX_GRAPHS=call, the host launches it and reads nothing before it ends."""
    model = shapes("h100", replace(CONFIGS["llama3.2-1b"], num_hidden_layers=2), dtype)
    program = Program("decode", CACHE_LEN, num_rows=rows)
    found = report(model, program, options) if options else report_once(model, program)
    costs = found.greedy, found.chat, found.sampled
    assert all((cost.reads, cost.launches) == (0, 1) for cost in costs) == is_whole


@needs("h100")
@pytest.mark.parametrize(("dtype", "width"), [("auto", 2), ("int8", 1)])
def test_the_ideal_is_the_width_of_weights_and_cache(dtype: DType, width: int) -> None:
    """Where a program reads wider weights, they must not be the ideal that its bytes are compared with."""
    config = replace(CONFIGS["llama3.2-1b"], num_hidden_layers=2)
    model = shapes("h100", config, dtype)
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    numbers = config.vocab_size * config.hidden_size + 2 * layer
    assert model.weight_bytes == pytest.approx(width * numbers, rel=0.01)
    assert model.cache_dtype == jnp.bfloat16


@needs("h100")
def test_a_report_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(CONFIGS, "llama3.2-1b", replace(CONFIGS["llama3.2-1b"], num_hidden_layers=2))
    monkeypatch.setattr(program_report, "report", report_once)
    monkeypatch.setattr(sys, "argv", ["program_report", "llama3.2-1b", "--rows", "1", "--chunks"])
    program_report.main()
    title, _, heads, _, row = capsys.readouterr().out.splitlines()
    assert "llama3.2-1b, auto, cache 2,048, h100" in title
    cells = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
    assert cells["| program"] == "| decode 1"
    ratios = LIMITS[Case("h100", "llama3.2-1b", "auto", "decode", 1)].ratio
    assert [float(ratio) for ratio in cells["bytes over ideal"].split(" / ")] == pytest.approx(ratios, rel=0.02)
