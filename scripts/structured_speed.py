"""The speed of one constrained stream, and of 31 free ones beside a constrained one, against free ones in turns.

On the default model.

`python -m scripts.structured_speed [ROUNDS]`
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import llamajax

_PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]+$"},
        "age": {"type": "integer", "maximum": 120},
        "member": {"type": "boolean"},
    },
    "required": ["name", "age", "member"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "any text": {"regex": "(?s:.*)"},
    "a long string": {"json_schema": {"type": "string", "minLength": 2000}},
    "short fields": {"json_schema": {"type": "array", "items": _PERSON, "minItems": 50}},
    "short strings of at most 12 characters": {
        "json_schema": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 100}
    },
}


def speed(llm: llamajax.LLM, **options: Any) -> float:
    """Tokens a second after the first."""
    stream = llm.stream("List people as JSON.", max_new_tokens=200, temperature=1, seed=3, ignore_eos=True, **options)
    times = [time.perf_counter() for _ in stream]
    return (len(stream.completion.token_ids) - 1) / (times[-1] - times[0])


def speed_of_others(llm: llamajax.LLM, **options: Any) -> float:
    """Tokens a second of 31 free answers, after the first, beside one with these options."""
    common = {"max_new_tokens": 100, "temperature": 1, "ignore_eos": True}
    requests = [("List people as JSON.", {**common, "seed": seed}) for seed in range(31)]
    requests.append(("List people as JSON.", {**common, "seed": 31, **options}))
    times: list[float] = []

    def noted(index: int) -> None:
        if index < 31:
            times.append(time.perf_counter())

    for _, result in llm.stream_batch(requests, slots=32, on_token=noted):
        assert isinstance(result, llamajax.Completion), result
    return (len(times) - 1) / (times[-1] - times[0])


def compare(name: str, measure: Callable[..., float], rounds: int, llm: llamajax.LLM, options: dict[str, Any]) -> None:
    measure(llm), measure(llm, **options)
    pairs = [(measure(llm), measure(llm, **options)) for _ in range(rounds)]
    free, constrained = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(constrained / free for free, constrained in pairs)
    print(f"{name}: free {free:.0f}, constrained {constrained:.0f} tokens/s, ratio {ratio:.2f}", flush=True)


def main(rounds: int) -> None:
    llm = llamajax.load()
    for name, options in CONSTRAINTS.items():
        compare(name, speed, rounds, llm, options)
    compare("31 beside short fields", speed_of_others, rounds, llm, CONSTRAINTS["short fields"])


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 15)
