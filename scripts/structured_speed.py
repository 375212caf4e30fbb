"""The speed of one constrained stream beside a free one, in turns, on the default model.

`python -m scripts.structured_speed [ROUNDS]`
"""

import statistics
import sys
import time
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


def main(rounds: int) -> None:
    llm = llamajax.load()
    for name, options in CONSTRAINTS.items():
        speed(llm), speed(llm, **options)
        pairs = [(speed(llm), speed(llm, **options)) for _ in range(rounds)]
        free, constrained = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(constrained / free for free, constrained in pairs)
        print(f"{name}: free {free:.0f}, constrained {constrained:.0f} tokens/s, ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 15)
