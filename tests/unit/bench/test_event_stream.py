"""Streams with events at known moments, cut anywhere."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamajax.bench.event_stream import Answer, AnswerError, error_message, read_answer

DONE = b"data: [DONE]\n\n"


def event(text: str | None, end: str = "\n", **others: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": None}]
    return f"data: {json.dumps({'choices': choices, **others})}{end}{end}".encode()


def usage(tokens: int) -> bytes:
    return event(None, usage={"prompt_tokens": 7, "completion_tokens": tokens})


def read(*pieces: bytes) -> Answer:
    """The first piece comes at 1, the next at 2, ..."""
    return read_answer(list(pieces), [float(i) for i in range(1, len(pieces) + 1)])


def test_a_token_in_each_event() -> None:
    answer = read(event("a"), event("b"), event("c"), event(""), usage(3), DONE)
    assert answer.token_times.tolist() == [1, 2, 4]  # the last token ends the answer
    assert (answer.prompt_tokens, answer.counted) == (7, True)


def test_without_usage_an_event_with_text_is_a_token() -> None:
    answer = read(event("a", usage=None), event("b") + event("c"), event("", usage=None), DONE)
    assert answer.token_times.tolist() == [1, 2, 3]
    assert (answer.prompt_tokens, answer.counted) == (None, False)


@pytest.mark.parametrize(
    ("tokens", "times"),
    [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (6, [1, 1, 2, 2, 3, 3]), (9, [1, 1, 1, 2, 2, 2, 3, 3, 3])],
)
def test_tokens_are_spread_over_events(tokens: int, times: list[float]) -> None:
    assert read(event("a"), event("b"), event("c"), usage(tokens), DONE).token_times.tolist() == times


def test_tokens_without_text_come_first_and_last() -> None:
    answer = read(event(""), event("a"), event("b"), event(""), event(""), usage(5), DONE)
    assert answer.token_times[0] == 2 and answer.token_times[-1] == 5


def test_an_answer_that_has_no_text_at_all() -> None:
    assert read(event(""), event(""), usage(2), DONE).token_times.tolist() == [1, 2]


def test_one_event_of_many_tokens_before_the_end() -> None:
    assert read(event("abc"), event(""), usage(3), DONE).token_times.tolist() == [1, 1, 2]


@given(data=st.data(), end=st.sampled_from(["\n", "\r\n"]))
def test_pieces_may_be_cut_anywhere(data: st.DataObject, end: str) -> None:
    """An event has come when its line has, whatever else came with it."""
    lines = [event(text, end) for text in ("a", "é\n", "data: x", "d")]
    comment = b": wait\n\n"
    whole = comment + b"".join(lines) + DONE
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    # Where each line's last byte is, without the end of the line.
    lasts = np.cumsum([len(comment), *map(len, lines)])[1:] - 2 * len(end) - 1
    expected = [1.0 + sum(cut <= last for cut in cuts) for last in lasts]
    found = read(*pieces).token_times.tolist()
    if end == "\n":
        assert found == expected
    else:  # a carriage return may count as part of the line
        assert all(a <= b for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([], "without [DONE]"),
        ([event("a")], "without [DONE]"),
        ([DONE], "no tokens"),
        ([usage(3), DONE], "no tokens"),
        ([event("a"), usage(0), DONE], "no tokens"),
        ([event("a"), b"data: {\n\n", DONE], "expected an event of a JSON object, found {"),
        ([event("a"), b"data: [1]\n\n", DONE], "found [1]"),
        ([event("a"), b'data: {"error": {"message": "x\\ny", "type": "z"}}\n\n', DONE], "an error: x y"),
        ([event("a"), b'data: {"error": "bad"}\n\n'], "an error: bad"),
    ],
)
def test_what_is_no_answer(pieces: list[bytes], says: str) -> None:
    with pytest.raises(AnswerError) as e:
        read(*pieces)
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"error": {"message": "a", "type": "b"}}, "a"),
        ({"error": "a"}, "a"),
        ({"object": "error", "message": "a"}, "a"),
        ({"detail": [{"loc": 1}]}, "[{'loc': 1}]"),
        ({"status": "compiling"}, "compiling"),
        ({"x": 1}, "{'x': 1}"),
        ("a\nb", "a b"),
    ],
)
def test_messages_of_errors(body: Any, says: str) -> None:
    assert error_message(body) == says
