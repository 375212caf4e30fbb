"""What an accelerator would run: the product's own decode and prefill, compiled for one that need not be there.

Two layers stand for all: they are alike, and compile in seconds. Without the wheels (`scripts/compiled.py` names them)
these tests are skipped.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.stages import Lowered

from llamajax import sampling
from llamajax.config import CONFIGS
from llamajax.engine import steps
from llamajax.engine.programs import Program
from llamajax.ops import native
from llamajax.types import DType
from scripts import program_report
from scripts.compiled import Target, missing, native_calls, report, shapes
from scripts.hlo import Cost

# The package has functions of these names.
attention, linear = (sys.modules[f"llamajax.ops.{name}"] for name in ("attention", "linear"))

CACHE_LEN = 2048
# Versions of XLA differ in what they fuse.
MARGIN = 1.02


class Case(NamedTuple):
    """A program: `size` is how many rows are decoded, or how many tokens are read."""

    target: Target
    model: str
    dtype: DType
    step: Literal["decode", "prefill"]
    size: int


class Limits(NamedTuple):
    """As measured when this was written or last made tighter: for a greedy token and for a sampled one where two.

    Attributes:
      ratio: bytes moved over the least there are.
      kernels, reads, launches: as in `Cost`.
      temp_mb: memory beside arguments and results, in MB.
      num_moves: copies and conversions of a MiB or more that are kernels of their own.
    """

    ratio: tuple[float, float]
    kernels: tuple[int, int]
    reads: tuple[int, int]
    launches: int
    temp_mb: float
    num_moves: int = 0


LIMITS = {
    Case("h100", "llama3.2-1b", "auto", "decode", 1): Limits((1.009, 1.154), (71, 1025), (4, 12), 10, 3.3, 0),
    Case("h100", "llama3.2-1b", "auto", "decode", 8): Limits((1.067, 2.122), (64, 766), (4, 12), 14, 23.1, 2),
    Case("h100", "llama3.2-1b", "auto", "decode", 32): Limits((1.220, 4.612), (64, 900), (4, 12), 14, 90.9, 4),
    Case("h100", "llama3.2-1b", "int8", "decode", 1): Limits((1.017, 1.304), (70, 1024), (4, 12), 10, 3.3, 0),
    Case("h100", "llama3.2-1b", "int8", "decode", 32): Limits((1.345, 6.729), (66, 902), (4, 12), 14, 90.9, 4),
    Case("h100", "llama3.2-1b", "auto", "prefill", 16): Limits((1.065, 1.211), (64, 1018), (3, 11), 8, 6.4, 0),
    Case("h100", "llama3.2-1b", "auto", "prefill", 512): Limits((2.407, 2.552), (63, 1017), (3, 11), 8, 222.4, 1),
    Case("h100", "llama3.2-1b", "int8", "prefill", 512): Limits((3.630, 3.917), (65, 1019), (3, 11), 8, 219.3, 1),
    Case("h100", "llama3.1-8b", "auto", "decode", 1): Limits((1.004, 1.063), (72, 1026), (4, 12), 10, 3.3, 0),
    Case("h100", "llama3.1-8b", "auto", "decode", 8): Limits((1.032, 1.460), (64, 766), (4, 12), 14, 23.1, 2),
    Case("h100", "llama3.1-8b", "auto", "decode", 32): Limits((1.106, 2.536), (66, 902), (4, 12), 14, 90.9, 4),
    Case("h100", "llama3.1-8b", "int8", "decode", 1): Limits((1.009, 1.124), (72, 1026), (4, 12), 10, 3.3, 0),
    Case("h100", "llama3.1-8b", "int8", "decode", 32): Limits((1.172, 3.519), (67, 903), (4, 12), 14, 90.9, 4),
    Case("h100", "llama3.1-8b", "auto", "prefill", 16): Limits((1.035, 1.093), (65, 1019), (3, 11), 8, 6.6, 0),
    Case("h100", "llama3.1-8b", "auto", "prefill", 512): Limits((1.626, 1.684), (64, 1018), (3, 11), 8, 226.8, 1),
    Case("v5e", "llama3.2-1b", "auto", "decode", 1): Limits((1.012, 1.024), (172, 580), (0, 0), 0, 5.7, 0),
    Case("v5e", "llama3.2-1b", "auto", "decode", 8): Limits((1.015, 1.090), (121, 223), (0, 0), 0, 139.5, 5),
    Case("v5e", "llama3.2-1b", "auto", "decode", 32): Limits((1.131, 1.373), (107, 218), (0, 0), 0, 540.7, 9),
    Case("v5e", "llama3.2-1b", "int8", "decode", 1): Limits((1.029, 1.054), (202, 615), (0, 0), 0, 6.7, 0),
    Case("v5e", "llama3.2-1b", "int8", "decode", 32): Limits((1.208, 1.591), (115, 226), (0, 0), 0, 540.7, 9),
    Case("v5e", "llama3.2-1b", "auto", "prefill", 16): Limits((1.101, 1.113), (173, 588), (0, 0), 0, 5.8, 0),
    Case("v5e", "llama3.2-1b", "auto", "prefill", 512): Limits((1.881, 1.893), (170, 585), (0, 0), 0, 137.6, 0),
    Case("v5e", "llama3.1-8b", "auto", "decode", 1): Limits((1.012, 1.017), (190, 597), (0, 0), 0, 6.6, 0),
    Case("v5e", "llama3.1-8b", "auto", "decode", 8): Limits((1.067, 1.097), (167, 269), (0, 0), 0, 11.2, 0),
    Case("v5e", "llama3.1-8b", "auto", "decode", 32): Limits((1.064, 1.165), (142, 254), (0, 0), 0, 66.8, 1),
    Case("v5e", "llama3.1-8b", "int8", "decode", 1): Limits((1.006, 1.017), (164, 571), (0, 0), 0, 4.9, 0),
    Case("v5e", "llama3.1-8b", "int8", "decode", 32): Limits((1.128, 1.295), (148, 260), (0, 0), 0, 66.8, 1),
    Case("v5e", "llama3.1-8b", "auto", "prefill", 16): Limits((1.076, 1.081), (152, 567), (0, 0), 0, 8.3, 0),
    Case("v5e", "llama3.1-8b", "auto", "prefill", 512): Limits((1.513, 1.518), (155, 566), (0, 0), 0, 160.1, 7),
}


def measured(case: Case) -> dict[str, tuple[float, float]]:
    """What is counted of a program, beside the most that it may be."""
    rows, chunk_len = (case.size, 0) if case.step == "decode" else (1, case.size)
    program = Program(case.step, CACHE_LEN, chunk_len, rows)
    model = shapes(case.target, replace(CONFIGS[case.model], num_hidden_layers=2), case.dtype)
    if calls := native_calls(model.programs.lowered(program)):
        return {f"native calls: {calls}": (len(calls), 0)}
    found, limits = report(model, program), LIMITS[case]
    figures: dict[str, tuple[float, float]] = {
        "bytes of the cache that are copied": (found.cache_bytes - found.aliased_bytes, 0),
        f"large moves: {found.moves}": (len(found.moves), limits.num_moves),
        f"sorts: {found.sorts}": (len(found.sorts), 0),
        "temporary MB": (found.temp_bytes / 1e6, limits.temp_mb * MARGIN),
        "launches": (found.greedy.launches, limits.launches),
    }
    for path, place in ("greedy", 0), ("sampled", 1):
        cost: Cost = getattr(found, path)
        figures |= {
            f"bytes over ideal, {path}": (cost.num_bytes / found.ideal_bytes, limits.ratio[place] * MARGIN),
            f"kernels, {path}": (cost.kernels, limits.kernels[place] * MARGIN),
            f"reads, {path}": (cost.reads, limits.reads[place]),
        }
    return figures


def faults(case: Case) -> dict[str, tuple[float, float]]:
    return {name: (figure, most) for name, (figure, most) in measured(case).items() if figure > most}


def needs(target: Target) -> pytest.MarkDecorator:
    wheels = missing(target)
    return pytest.mark.skipif(wheels is not None, reason=f"programs for a {target} are not compiled without {wheels}")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=needs(case.target), id="-".join(map(str, case))) for case in LIMITS]
)
def test_a_program_is_as_good_as_it_was(case: Case) -> None:
    assert faults(case) == {}


@pytest.fixture
def planting(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Steps are traced anew, before the test and after it."""
    jax.clear_caches()
    yield monkeypatch
    monkeypatch.undo()
    jax.clear_caches()


def native_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "_either", lambda xla, *arguments: native.attention(*arguments))


def a_cache_that_is_not_donated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(steps, "decode", jax.jit(steps.decode.__wrapped__, static_argnames="structure"))


def weights_made_f32(patch: pytest.MonkeyPatch) -> None:
    dense = linear._dense
    patch.setattr(linear, "_dense", lambda x, w: dense(x, jax.lax.optimization_barrier(w.astype(jnp.float32))))


def a_sorted_vocabulary(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sampling, "_argmax", lambda x: jnp.argsort(x, descending=True)[:, 0].astype(jnp.int32))


def a_norm_in_two_kernels(patch: pytest.MonkeyPatch) -> None:
    norm = linear.Norm.__call__
    patch.setattr(linear.Norm, "__call__", lambda self, x: jax.lax.optimization_barrier(norm(self, x)))


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


FAULTS = [
    ("h100", native_attention, ["native calls"]),
    ("h100", a_cache_that_is_not_donated, ["bytes of the cache"]),
    ("h100", weights_made_f32, ["large moves", "bytes over ideal, greedy", "bytes over ideal, sampled", "temporary"]),
    ("h100", a_sorted_vocabulary, ["sorts"]),
    ("h100", a_norm_in_two_kernels, ["kernels, greedy"]),
    ("h100", a_loop_that_the_host_reads, ["reads, greedy", "reads, sampled"]),
    ("h100", no_graphs, ["launches"]),
    ("v5e", a_table_as_integers, ["large moves", "temporary"]),
]


@pytest.mark.parametrize(
    ("target", "plant", "found"), [pytest.param(*fault, marks=needs(fault[0])) for fault in FAULTS]
)
def test_a_planted_fault_is_found(
    target: Target, plant: Callable[[pytest.MonkeyPatch], None], found: list[str], planting: pytest.MonkeyPatch
) -> None:
    plant(planting)
    names = faults(Case(target, "llama3.2-1b", "auto", "decode", 1))
    assert [name for name in found if not any(fault.startswith(name) for fault in names)] == []


@needs("h100")
def test_a_report_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(CONFIGS, "llama3.2-1b", replace(CONFIGS["llama3.2-1b"], num_hidden_layers=2))
    monkeypatch.setattr(sys, "argv", ["program_report", "llama3.2-1b", "--rows", "1", "--chunks"])
    program_report.main()
    title, _, heads, _, row = capsys.readouterr().out.splitlines()
    assert "llama3.2-1b, auto, cache 2,048, h100" in title
    cells = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
    assert cells["| program"] == "| decode 1"
    ratios = LIMITS[Case("h100", "llama3.2-1b", "auto", "decode", 1)].ratio
    assert [float(ratio) for ratio in cells["bytes over ideal"].split(" / ")] == pytest.approx(ratios, rel=0.02)
