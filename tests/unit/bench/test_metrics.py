"""Figures against ones computed by hand, and properties of the workload."""

from itertools import pairwise

import numpy as np
import pytest

from llamajax import SamplingParams
from llamajax.bench.metrics import (
    Percentiles,
    Result,
    Run,
    Served,
    Spread,
    WarmUp,
    figures,
    read_bandwidth,
    with_ratios,
)
from llamajax.bench.workload import Workload, sampling_name, synthetic

# Two requests, the second half a second later; three tokens each.
RUN = Run(4.0, np.array([0.0, 0.5]), np.array([[1.0, 1.5, 2.0], [2.0, 3.0, 4.0]]))
# The first token alone, then blocks of two and of three; the other request's blocks come with them.
IN_BLOCKS = Run(3.0, np.array([0.0, 0.5]), np.array([[1.0, 1.5, 1.5, 3.0, 3.0, 3.0], [1.5, 1.5, 3.0, 3.0, 3.0, 3.0]]))
GREEDY = SamplingParams(temperature=0)


def served(
    name: str,
    requests: int,
    tokens_per_second: float,
    decode_bandwidth: float | None = None,
    read_bandwidth: float = 1.0,
    sampling: str = "greedy",
) -> Served:
    return Served(
        name=name,
        sampling=sampling,
        requests=requests,
        tokens=0,
        seconds=Spread(1, 1, 1),
        requests_per_second=Spread(1, 1, 1),
        tokens_per_second=Spread(tokens_per_second, 0, 0),
        time_to_first_token=None,
        latency=None,
        time_per_output_token=None,
        inter_token_latency=Percentiles(1, 2, 3),
        gaps=None,
        decode_bandwidth=decode_bandwidth,
        read_bandwidth=read_bandwidth,
        peak_bytes=0,
        warm_up=WarmUp(1.5, 2, 0.5),
        programs_while_measured=0,
    )


def test_spread() -> None:
    assert Spread.of([3, 1, 10]) == Spread(median=3, low=1, high=10)
    assert Spread.of([4, 2]) == Spread(median=3, low=2, high=4)


def test_percentiles() -> None:
    assert Percentiles.of(np.arange(101.0)) == Percentiles(50, 95, 99)
    # Between the neighbours 9 and 10 lie the ranks 9/11 and 10/11 of the way from the first of eleven to the last.
    assert Percentiles.of(np.arange(11.0)) == Percentiles(5, 9.5, 9.9)
    assert Percentiles.of(np.array([2.0])) == Percentiles(2, 2, 2)
    assert Percentiles.of(np.array([])) is None


def test_run() -> None:
    assert RUN.tokens_per_second == 6 / 4
    assert RUN.requests_per_second == 2 / 4
    assert RUN.time_to_first_token.tolist() == [1.0, 1.5]
    assert RUN.latency.tolist() == [2.0, 3.5]
    assert RUN.time_per_output_token.tolist() == [0.5, 1.0]
    assert RUN.inter_token_latency.tolist() == RUN.gaps.tolist() == [0.5, 0.5, 1.0, 1.0]


def test_tokens_that_come_in_blocks() -> None:
    assert IN_BLOCKS.time_per_output_token.tolist() == [2 / 5, 1.5 / 5]
    assert IN_BLOCKS.inter_token_latency.tolist() == [0.25, 0.25, 0.5, 0.5, 0.5, 1.5 / 4, 1.5 / 4, 1.5 / 4, 1.5 / 4]
    assert IN_BLOCKS.gaps.tolist() == [0.5, 1.5, 1.5]


def test_tokens_that_come_nearly_at_once_are_a_block() -> None:
    [times] = np.array([[1.0, 1.01, 1.02, 2.0, 2.01, 3.0]])
    run = Run(3.0, np.zeros(1), [times], burst=0.05)
    assert run.gaps.tolist() == [1.0, 1.0]
    assert run.inter_token_latency.tolist() == [0.5, 0.5, 1.0]
    assert run.time_to_first_token == [1.0] and run.latency == [3.0] and run.time_per_output_token == [2 / 5]
    assert len(Run(3.0, np.zeros(1), [times]).gaps) == 5


def test_answers_of_different_lengths() -> None:
    run = Run(4.0, np.array([0.0, 0.5, 1.0]), [np.array([1.0, 1.5, 2.0]), np.array([2.0]), np.array([2.0, 4.0])])
    assert (run.tokens, run.tokens_per_second, run.requests_per_second) == (6, 6 / 4, 3 / 4)
    assert run.latency.tolist() == [2.0, 1.5, 3.0]
    assert run.time_per_output_token.tolist() == [0.5, 2.0]
    assert run.gaps.tolist() == [0.5, 0.5, 2.0]
    nothing = Run(4.0, np.array([]), [])
    assert all(x.size == 0 for x in (nothing.latency, nothing.gaps, nothing.inter_token_latency))


def test_figures_of_several_runs() -> None:
    one = Run(2.0, np.zeros(1), [np.array([1.0, 2.0])])
    said = figures([one, RUN, RUN])
    assert said["tokens"] == 6 and said["seconds"] == Spread(4.0, 2.0, 4.0)
    assert said["tokens_per_second"] == Spread(1.5, 1.0, 1.5)
    assert (
        said["time_to_first_token"].p50 == 1.0 and said["latency"].p50 == 2.0
    )  # of 1, 1, 1.5, 1, 1.5 and 2, 2, 3.5, ...


def test_answers_of_one_token_have_no_time_between_tokens() -> None:
    run = Run(2.0, np.zeros(2), np.array([[1.0], [2.0]]))
    assert run.latency.tolist() == run.time_to_first_token.tolist() == [1.0, 2.0]
    for times in (run.time_per_output_token, run.inter_token_latency, run.gaps):
        assert times.size == 0


def test_decode_bandwidth() -> None:
    # The two decode for 1 s and 2 s of the 3 s between the first token and the last: on average one is active.
    # A token takes 0.75 s on average.
    assert RUN.decode_bandwidth(weight_bytes=700, kv_bytes=50) == pytest.approx(750 / 0.75)
    both = Run(2.0, np.zeros(2), np.array([[1.0, 2.0], [1.0, 2.0]]))
    assert both.decode_bandwidth(weight_bytes=700, kv_bytes=50) == pytest.approx(800)
    assert Run(1.0, np.zeros(2), np.array([[1.0], [1.0]])).decode_bandwidth(700, 50) is None


def test_ratios() -> None:
    results = [
        served("sequential", 1, 10.0, decode_bandwidth=20.0, read_bandwidth=60.0),
        served("sequential", 2, 20.0, read_bandwidth=80.0),
        served("sequential", 2, 10.0, sampling="default"),
        served("batched", 2, 50.0, decode_bandwidth=40.0, read_bandwidth=70.0),
        served("batched", 2, 40.0, sampling="default"),
        served("batched", 4, 50.0),
    ]
    done = with_ratios(results)
    assert read_bandwidth(done) == 80.0
    assert [x.bandwidth_fraction for x in done] == [0.25, None, None, 0.5, None, None]
    assert [x.speed_up for x in done if isinstance(x, Served)] == [1.0, 1.0, 1.0, 2.5, 4.0, None]


def test_no_fraction_is_above_one() -> None:
    results = [served("sequential", 1, 1.0, decode_bandwidth=x, read_bandwidth=50.0) for x in (40.0, 51.0)]
    assert [x.bandwidth_fraction for x in with_ratios(results)] == [40 / 51, 1.0]


def test_flat() -> None:
    cells = served("batched", 2, 50.0).flat()
    assert list(cells)[:3] == ["name", "sampling", "requests"]
    assert cells["warm_up.programs"] == 2
    assert cells["inter_token_latency.p99"] == 3
    assert cells["time_to_first_token"] is None
    assert {"seconds.low", "speed_up"} <= set(cells)
    assert isinstance(served("batched", 2, 50.0), Result)


def work(requests: int, *prompt_lens: int, **options: float) -> Workload:
    return synthetic(requests, prompt_lens, 5, vocab_size=97, sampling=GREEDY, **options)


def test_prompts_are_the_seed_s() -> None:
    prompts = work(100, 32, seed=1).prompts
    assert [len(prompt) for prompt in prompts] == [32] * 100
    assert set(np.concatenate(prompts)) == set(range(97))
    assert prompts == work(100, 32, seed=1).prompts != work(100, 32, seed=2).prompts
    assert prompts[:10] == work(10, 32, seed=1).prompts
    assert not work(100, 32).arrivals.any()
    assert work(3, 32, seed=-1).prompts != work(3, 32, seed=1).prompts


def test_another_draw_changes_nothing_but_the_tokens() -> None:
    works = [work(50, 8, 9, rate=4.0, seed=1, draw=draw) for draw in (0, 1, 2)]
    for one, other in pairwise(works):
        assert (one.arrivals == other.arrivals).all()
        assert [*map(len, one.prompts)] == [*map(len, other.prompts)]
        assert not {*map(tuple, one.prompts)} & {*map(tuple, other.prompts)}
    assert works[0].prompts == work(50, 8, 9, seed=1).prompts


def test_prompts_of_mixed_lengths() -> None:
    few = [len(prompt) for prompt in work(600, 4, 16, 9, seed=1).prompts]
    assert set(few) == {4, 16, 9} and min(map(few.count, few)) > 150
    many = work(600, *range(3, 12), seed=1)
    lengths = [len(prompt) for prompt in many.prompts]
    assert set(lengths) == set(range(3, 12))
    assert many.prompts == work(600, *range(3, 12), seed=1).prompts
    assert many.prompts[:50] == work(50, *range(3, 12), seed=1).prompts
    assert lengths != [len(prompt) for prompt in work(600, *range(3, 12), seed=2).prompts]


def test_poisson_arrivals() -> None:
    arrivals = work(10_001, 1, rate=4.0, seed=1).arrivals
    assert arrivals[0] == 0 and (np.diff(arrivals) >= 0).all()
    # Gaps of a Poisson process: their mean and their standard deviation are 1 / rate.
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)
    assert (arrivals == work(10_001, 1, rate=4.0, seed=1).arrivals).all()
    assert (arrivals[:10] == work(10, 1, rate=4.0, seed=1).arrivals).all()
    assert (arrivals[1:] != work(10_001, 1, rate=4.0, seed=2).arrivals[1:]).any()


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (GREEDY, "greedy"),
        (SamplingParams(), "temperature 0.6, top-p 0.9 (default)"),
        (SamplingParams(seed=7), "temperature 0.6, top-p 0.9 (default)"),
        (SamplingParams(1.0, 1.0, top_k=-1), "temperature 1"),
        (SamplingParams(0.0, 0.5, repetition_penalty=1.1), "greedy, repetition-penalty 1.1"),
        (SamplingParams(0.8, 1.0, 40, 0.05), "temperature 0.8, top-k 40, min-p 0.05"),
    ],
)
def test_sampling_has_a_name(sampling: SamplingParams, name: str) -> None:
    assert sampling_name(sampling) == name
