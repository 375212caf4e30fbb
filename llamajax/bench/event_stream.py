"""What a streamed completion of OpenAI's protocol says, and when. Knows no network.

A stream is read after it has ended: while it comes, only its pieces and their times are kept.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from llamajax.errors import LlamaJaxError
from llamajax.text import one_line

_DATA = re.compile(rb"^data:(.*)$", re.MULTILINE)


class AnswerError(LlamaJaxError):
    """A server cannot be reached, refuses a request, or gives no whole answer.

    Attributes:
      status: of the answer, if one came that was not 200.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
      token_times: when each token came, in seconds.
      prompt_tokens: as the server counts; None if it does not say.
      counted: whether the server said how many tokens there are; if not, each event with text is one.
    """

    token_times: Float64[np.ndarray, "N"]
    prompt_tokens: int | None
    counted: bool


def read_answer(pieces: list[bytes], times: list[float]) -> Answer:
    """Of a stream's pieces, cut anywhere, and when each came. An event came when the last of its bytes did.

    Raises AnswerError for an error event, an end without [DONE], and an answer without tokens.
    """
    whole, ends = b"".join(pieces), np.cumsum([len(piece) for piece in pieces])
    with_text: list[int] = []
    with_choice: list[int] = []
    usage: dict[str, Any] = {}
    for line in _DATA.finditer(whole):
        data = line[1].strip()
        if data == b"[DONE]":
            break
        event = _event(data)
        usage = event.get("usage") or usage
        for choice in event.get("choices") or []:
            with_choice.append(line.end())
            if choice.get("text"):
                with_text.append(line.end())
    else:
        raise AnswerError("the stream ended without [DONE]")
    num_tokens = usage.get("completion_tokens", len(with_text))
    if not num_tokens or not with_choice:
        raise AnswerError("the answer has no tokens")
    # Tokens without text, such as an end that is ignored, may come first and last: time begins with the first text,
    # as for a reader, and ends with the last choice.
    came = np.array(times)[np.searchsorted(ends, [*(with_text or with_choice), with_choice[-1]])]
    return Answer(_spread(came, num_tokens), usage.get("prompt_tokens"), "completion_tokens" in usage)


def error_message(value: Any) -> str:
    """What the body of an error says, in any of the usual forms."""
    while isinstance(value, dict):
        value = next((value[name] for name in ("error", "message", "detail", "status") if value.get(name)), str(value))
    return one_line(value)


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise AnswerError(f"expected an event of a JSON object, found {one_line(data[:100].decode(errors='replace'))}")
    if event.get("error"):
        raise AnswerError(f"the stream ended with an error: {error_message(event)}")
    return event


def _spread(came: Float64[np.ndarray, "E"], num_tokens: int) -> Float64[np.ndarray, "N"]:
    """Tokens evenly over the events with text, exactly if each event has one; the last token comes at the end.

    Args:
      came: of the events with text, and of the end.
    """
    events = came[:-1]
    token_times = events[np.rint(np.linspace(0, len(events) - 1, num_tokens)).astype(int)]
    if num_tokens > 1:
        token_times[-1] = came[-1]
    return token_times
