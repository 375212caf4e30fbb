"""How much of a batch is left: what it says after a tenth is right within a factor of 1.5, whatever the answers are."""

import random
from collections.abc import Callable

import pytest

from llamajax.serve.work import Pace, Work

Lengths = Callable[[random.Random], tuple[int, int, int]]  # the most tokens, those it takes, bytes of the prompt


def _equal(rng: random.Random) -> tuple[int, int, int]:
    return 50, 50, 100


def _of_two_kinds(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice([(5, 5, 100), (200, 200, 100)])


def _as_they_like(rng: random.Random) -> tuple[int, int, int]:
    length = 1 + int(rng.expovariate(1 / 150))
    return 512, min(512, length), 100


def _with_long_prompts(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice([(10, 10, 8000), (100, 100, 100)])


def _to_the_end_of_the_context(rng: random.Random) -> tuple[int, int, int]:
    return 8000, rng.randint(20, 400), rng.randint(50, 1000)


@pytest.mark.parametrize("kind", [_equal, _of_two_kinds, _as_they_like, _with_long_prompts, _to_the_end_of_the_context])
@pytest.mark.parametrize(("reading", "step"), [(0.3, 3), (0.4, 8)])
def test_what_is_left_is_known_after_a_tenth(kind: Lengths, reading: float, step: float) -> None:
    """32 slots draw a token a step, longest first as the engine does. (The last ones to end are few, and vary.)

    A prompt's token takes `reading` of a token drawn in a step of many, and a step `step` of it, whoever shares it.
    """
    rng = random.Random(0)
    requests = dict(enumerate(kind(rng) for _ in range(600)))
    work = Work()
    for index, (limit, _, num_bytes) in requests.items():
        work.add(index, limit, num_bytes)
    waiting = sorted(requests, key=lambda index: (requests[index][2], requests[index][0]))
    running: dict[int, int] = {}
    spent, looked_at, looks = 0.0, 0, []
    while waiting or running:
        while waiting and len(running) < 32:
            running[index := waiting.pop()] = 0
            spent += reading * requests[index][2] / 4
        spent += step
        for index in list(running):
            work.token(index)
            running[index] += 1
            spent += 1
            if running[index] == requests[index][1]:
                del running[index]
                work.end(index, by_itself=requests[index][1] < requests[index][0])
        if work.tokens - looked_at > 500:
            looked_at = work.tokens
            looks.append((spent, work.done, work.left))
    assert (work.left, work.tokens) == (0, sum(taken for _, taken, _ in requests.values()))
    for now, done, left in looks:
        if 0.1 < now / spent < 0.8:
            assert 1 / 1.5 < (now / done * left) / (spent - now) < 1.5, f"after {now / spent:.0%}"


def test_a_request_that_failed_leaves_nothing() -> None:
    work = Work()
    work.add(0, 50, 100)
    work.add(1, 50, 100)
    work.end(0, by_itself=False)
    assert work.left == pytest.approx(50 + 50 * 5 + 0.4 * 25)


def test_a_slow_start_is_forgotten() -> None:
    pace, done = Pace(), 0.0
    for tick in range(100):  # of a tenth of a second: the first 20 at a third of the speed
        done += 1 if tick < 20 else 3
        speed = pace.look(tick / 10, done)
        if tick >= 40:
            assert speed == pytest.approx(30, rel=0.05)
        elif tick >= 26:
            assert 20 <= speed <= 31
    assert Pace().look(5.0, 7.0) == 0
