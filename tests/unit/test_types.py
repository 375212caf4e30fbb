"""Sampling parameters' ranges, and what a completion computes."""

import math
import re
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamajax.errors import LlamaJaxError, RequestError
from llamajax.types import MAX_TOP_LOGPROBS, Completion, Request, SamplingParams, Timings, TokenLogprobs

IN_RANGE = {
    "temperature": st.floats(0, 1e6),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(0, 2**31 - 1),
    "logit_bias": st.none() | st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100), max_size=5),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(1e-3, 1e3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logprobs": st.none() | st.integers(0, MAX_TOP_LOGPROBS),
}


def test_numbers_become_plain_ones() -> None:
    """A float without a fraction, as JSON may write an integer, and numpy's numbers."""
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=5.0, seed=np.int64(-3), logprobs=1.0, logit_bias={np.int32(7): 2, 8.0: -1}
    )
    assert params == SamplingParams(temperature=0.5, top_k=5, seed=-3, logprobs=1, logit_bias={7: 2.0, 8: -1.0})
    values = [params.temperature, params.top_k, params.seed, params.logprobs, *(params.logit_bias or {})]
    assert [type(value) for value in values] == [float, int, int, int, int, int]
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


@pytest.mark.parametrize(
    ("bias", "says"),
    [
        ([1, 2], "must be a mapping of token ids to numbers, not [1, 2]"),
        ({-1: 1}, "a token id of logit_bias must be an integer of at least 0, not -1"),
        ({"the": 1}, "a token id of logit_bias must be an integer of at least 0, not 'the'"),
        ({1: 101}, "logit_bias of token 1 must be in [-100, 100], not 101"),
        ({1: math.nan}, "logit_bias of token 1 must be in [-100, 100], not nan"),
        ({1: "x"}, "logit_bias of token 1 must be a number, not 'x'"),
        (dict.fromkeys(range(301), 1), "logit_bias may have 300 token ids, not 301"),
    ],
    ids=["list", "negative", "name", "large", "nan", "text", "many"],
)
def test_a_bias_that_is_none_is_refused(bias: Any, says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        SamplingParams(logit_bias=bias)


@pytest.mark.parametrize("name", ["temperature", "seed", "top_k", "logprobs"])
def test_an_integer_that_python_does_not_print_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} must be"):
        SamplingParams(**{name: 10**5000})


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
        ("top_k", (-2, 2**31, 2.5, [3], True), "an integer in [-1, 2**31); 0 and -1 keep all tokens"),
        ("min_p", (-0.1, 1.1, math.nan), "in [0, 1]"),
        ("repetition_penalty", (0, -1, 1e39, math.inf, math.nan), "in [0.001, 1000000]"),
        ("presence_penalty", (-2.1, 2.1, math.nan), "in [-2, 2]"),
        ("frequency_penalty", (-2.1, 2.1, math.nan), "in [-2, 2]"),
        ("seed", (-(2**63) - 1, 2**63, 1.5, math.nan, None, "1"), "an integer in [-2**63, 2**63)"),
        ("logprobs", (-1, 21, 2.5, True, math.inf, "5"), "None or an integer from 0 to 20"),
    ],
)
def test_parameters_out_of_range_are_named(name: str, values: tuple, expected: str) -> None:
    for value in values:
        with pytest.raises(RequestError, match=re.escape(f"{name} must be {expected}, not {value!r}")) as raised:
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
    assert (request.sampling, request.stop_ids) == (SamplingParams(), frozenset())
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
    [("temperature", "hot"), ("top_p", None), ("min_p", True), ("presence_penalty", 1j), ("top_p", np.bool_(True))],
)
def test_a_parameter_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} must be a number, not {re.escape(repr(value))}"):
        SamplingParams(**{name: value})
