"""Figures against ones computed by hand, and properties of the workload."""

import numpy as np
import pytest

from llamajax.bench.metrics import Percentiles, Result, Run, Served, Spread, WarmUp, with_ratios
from llamajax.bench.workload import synthetic

# Two requests, the second half a second later; three tokens each.
RUN = Run(4.0, np.array([0.0, 0.5]), np.array([[1.0, 1.5, 2.0], [2.0, 3.0, 4.0]]))


def served(name: str, requests: int, tokens_per_second: float, decode_bandwidth: float | None = None) -> Served:
    return Served(
        name=name,
        requests=requests,
        tokens=0,
        seconds=Spread(1, 1, 1),
        tokens_per_second=Spread(tokens_per_second, 0, 0),
        time_to_first_token=None,
        inter_token_latency=Percentiles(1, 2, 3),
        decode_bandwidth=decode_bandwidth,
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
    assert RUN.time_to_first_token.tolist() == [1.0, 1.5]
    assert RUN.inter_token_latency.tolist() == [0.5, 0.5, 1.0, 1.0]


def test_decode_bandwidth() -> None:
    # The two decode for 1 s and 2 s of the 3 s between the first token and the last: on average one is active.
    # A token takes 0.75 s on average.
    assert RUN.decode_bandwidth(weight_bytes=700, kv_bytes=50) == pytest.approx(750 / 0.75)
    both = Run(2.0, np.zeros(2), np.array([[1.0, 2.0], [1.0, 2.0]]))
    assert both.decode_bandwidth(weight_bytes=700, kv_bytes=50) == pytest.approx(800)
    assert Run(1.0, np.zeros(2), np.array([[1.0], [1.0]])).decode_bandwidth(700, 50) is None


def test_ratios() -> None:
    results = [
        served("sequential", 1, 10.0, decode_bandwidth=20.0),
        served("sequential", 2, 20.0),
        served("batched", 2, 50.0, decode_bandwidth=40.0),
        served("batched", 4, 50.0),
    ]
    done = with_ratios(results, memory_bandwidth=80.0)
    assert [x.bandwidth_fraction for x in done] == [0.25, None, 0.5, None]
    assert [x.speed_up for x in done if isinstance(x, Served)] == [1.0, 1.0, 2.5, None]


def test_flat() -> None:
    cells = served("batched", 2, 50.0).flat()
    assert list(cells)[:3] == ["name", "requests", "tokens_per_second.median"]
    assert cells["warm_up.programs"] == 2
    assert cells["inter_token_latency.p99"] == 3
    assert cells["time_to_first_token"] is None
    assert {"seconds.low", "speed_up"} <= set(cells)
    assert isinstance(served("batched", 2, 50.0), Result)


def test_prompts_are_the_seed_s() -> None:
    work = synthetic(100, 32, 5, vocab_size=97, seed=1)
    assert work.prompts.shape == (100, 32)
    assert set(work.prompts.ravel()) == set(range(97))
    assert (work.prompts == synthetic(100, 32, 5, vocab_size=97, seed=1).prompts).all()
    assert (work.prompts != synthetic(100, 32, 5, vocab_size=97, seed=2).prompts).any()
    assert (work.prompts[:10] == synthetic(10, 32, 5, vocab_size=97, seed=1).prompts).all()
    assert not work.arrivals.any()


def test_poisson_arrivals() -> None:
    arrivals = synthetic(10_001, 1, 5, vocab_size=97, rate=4.0, seed=1).arrivals
    assert arrivals[0] == 0 and (np.diff(arrivals) >= 0).all()
    # Gaps of a Poisson process: their mean and their standard deviation are 1 / rate.
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)
    assert (arrivals == synthetic(10_001, 1, 5, vocab_size=97, rate=4.0, seed=1).arrivals).all()
    assert (arrivals[:10] == synthetic(10, 1, 5, vocab_size=97, rate=4.0, seed=1).arrivals).all()
    assert (arrivals[1:] != synthetic(10_001, 1, 5, vocab_size=97, rate=4.0, seed=2).arrivals[1:]).any()
