"""Sampling parameters' ranges, and what a completion computes."""

import math
import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamajax.errors import LlamaJaxError, RequestError
from llamajax.types import MAX_TOP_LOGPROBS, Completion, Request, SamplingParams, Timings, TokenLogprobs

IN_RANGE = {
    "temperature": st.floats(0, 1e6),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(0, 2**31 - 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(1e-3, 1e3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "seed": st.integers(0, 2**32 - 1),
    "logprobs": st.none() | st.integers(0, MAX_TOP_LOGPROBS),
}


@given(st.fixed_dictionaries({}, optional=IN_RANGE))
def test_parameters_in_range_are_taken(options: dict) -> None:
    params = SamplingParams(**options)
    assert {name: getattr(params, name) for name in options} == options


def test_every_parameter_is_checked() -> None:
    assert set(IN_RANGE) == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("temperature", (-0.1, math.inf, math.nan, -math.inf), "in [0, 1000000]"),
        ("top_p", (0, -0.5, 1.0001, math.nan), "in (0, 1]"),
        ("top_k", (-1, 2**31, 2.5), "an integer in [0, 2**31); 0 keeps all tokens"),
        ("min_p", (-0.1, 1.1, math.nan), "in [0, 1]"),
        ("repetition_penalty", (0, -1, 1e39, math.inf, math.nan), "in [0.001, 1000000]"),
        ("presence_penalty", (-2.1, 2.1, math.nan), "in [-2, 2]"),
        ("frequency_penalty", (-2.1, 2.1, math.nan), "in [-2, 2]"),
        ("seed", (-1, 2**32, 1.5), "an integer in [0, 2**32)"),
        ("logprobs", (-1, 21, 2.5), "None or 0 to 20"),
    ],
)
def test_parameters_out_of_range_are_named(name: str, values: tuple, expected: str) -> None:
    for value in values:
        with pytest.raises(RequestError, match=re.escape(f"{name} must be {expected}, not {value}")) as raised:
            SamplingParams(**{name: value})
        assert isinstance(raised.value, LlamaJaxError) and "\n" not in str(raised.value)
        with pytest.raises(RequestError):
            replace(SamplingParams(), **{name: value})


def test_the_default_is_what_the_command_says() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.seed, params.logprobs) == (0.6, 0.9, 42, None)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (0, 0, 1)
    assert (params.presence_penalty, params.frequency_penalty) == (0, 0)


def test_a_request_does_not_change() -> None:
    request = Request([1, 2], 3)
    assert (request.sampling, request.stop_ids, request.reuse_cache) == (SamplingParams(), frozenset(), False)
    with pytest.raises(FrozenInstanceError):
        request.max_new_tokens = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("num_tokens", "decode_time", "speed"),
    [(0, 0.0, 0), (1, 0.0, 0), (1, 2.0, 0), (5, 0.0, 0), (5, 2.0, 2), (2, 4.0, 0.25)],
)
def test_speed_is_of_the_tokens_after_the_first(num_tokens: int, decode_time: float, speed: float) -> None:
    completion = Completion("", (7,) * num_tokens, "length", 3, 0, Timings(9.0, decode_time))
    assert completion.tokens_per_second == speed
    assert completion.logprobs is None


def test_values_compare_by_what_they_hold() -> None:
    assert TokenLogprobs(-1.0, ((2, -0.5),)) == TokenLogprobs(-1.0, ((2, -0.5),))
    assert hash(Request((1,), 2)) == hash(Request((1,), 2))
    assert SamplingParams(seed=1) != SamplingParams(seed=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "hot"), ("top_p", None), ("top_k", [3]), ("seed", "1"), ("min_p", True), ("logprobs", "5")],
)
def test_a_parameter_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} must be a number, not {re.escape(repr(value))}"):
        SamplingParams(**{name: value})
