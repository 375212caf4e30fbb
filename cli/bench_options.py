"""The options of `llamajax bench`: their help, and what those that are texts mean."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from llamajax.types import SamplingParams

from . import options

Mode = Annotated[
    Literal["sequential", "concurrent", "batched", "all"], typer.Option("--mode", help="The strategy to measure.")
]
Requests = Annotated[int, typer.Option("--requests", min=1, help="How many requests there are.")]
NewTokens = Annotated[
    int, typer.Option("-n", "--new-tokens", min=1, help="Tokens that each request generates, exactly.")
]
PromptLen = Annotated[
    str, typer.Option("--prompt-len", help="Tokens of a prompt: 32; one of 16,64,256; or from 16:512.")
]
Arrival = Annotated[
    str, typer.Option("--arrival", help="When requests come: all, at once, or poisson:RATE, so many a second.")
]
Slots = Annotated[
    int | None, typer.Option("--slots", min=1, help="Requests that run at once; 16 concurrent, 32 batched.")
]
Repeat = Annotated[int, typer.Option("--repeat", min=1, help="Runs of each; medians and spread are shown.")]
PromptTokens = Annotated[int | None, typer.Option("--pp", min=1, help="Alone: prefill prompts of so many tokens.")]
GeneratedTokens = Annotated[int | None, typer.Option("--tg", min=1, help="Alone: decode so many tokens.")]
Batch = Annotated[
    str | None, typer.Option("--batch", help="Alone: so many sequences at once, as in 1,8,32; 1 if left out.")
]
Depth = Annotated[
    str | None,
    typer.Option("--depth", "-d", help="Alone: so many tokens in the cache at the start, as in 0,1024,4096."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]
Csv = Annotated[str | None, typer.Option("--csv", help="Write CSV to a file; - prints it instead.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="Draw .png, .svg or .html; measures 1, 2, 4, ... up to --requests for it."),
]
RandomWeights = Annotated[
    str | None,
    typer.Option("--random-weights", help="Instead of a model: a name's size (llama3.2-1b), weights drawn here."),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Measure only this sampling; 0 is greedy; the default is 0.6.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="And draw from the smallest set of this probability; 0.9.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="And from the k most probable tokens; 0: all.")]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="And drop tokens less probable than this, of the first; 0.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="And, above 1, make repeats rarer; 1.")
]
Url = Annotated[
    str | None, typer.Option("--url", help="Measure an OpenAI-compatible server at this address, and no model here.")
]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="With --url: the server's key.")]


def parse_rate(arrival: str) -> float | None:
    """Requests a second; None for all at once."""
    if arrival == "all":
        return None
    kind, _, rate = arrival.partition(":")
    with suppress(ValueError):
        if kind == "poisson" and 0.001 <= float(rate) < math.inf:
            return float(rate)
    raise typer.BadParameter(
        f"must be all, or poisson:RATE with a rate of at least 0.001, not {arrival!r}", param_hint="--arrival"
    )


def parse_prompt_lens(prompt_len: str) -> Sequence[int]:
    """What "32", "16,64,256" or "16:512" allows."""
    first, colon, last = prompt_len.partition(":")
    if not colon:
        return _numbers(prompt_len, 1, "--prompt-len")
    ends = _numbers(f"{first},{last}", 1, "--prompt-len")
    if ends[0] > ends[1]:
        raise typer.BadParameter(f"must be from the fewest to the most, not {prompt_len!r}", param_hint="--prompt-len")
    return range(ends[0], ends[1] + 1)


def _numbers(numbers: str, at_least: int, option: str) -> list[int]:
    """Those of "1,8,32"."""
    found = [int(number) if number.isdecimal() and len(number) < 10 else -1 for number in numbers.split(",")]
    if min(found) < at_least:
        raise typer.BadParameter(
            f"must be numbers of at least {at_least}, as in 1,8,32, not {numbers!r}", param_hint=option
        )
    return found


def parse_samplings(given: dict[str, Any], seed: int) -> list[SamplingParams]:
    """What was asked for, or else greedy and the default."""
    if given := {name: value for name, value in given.items() if value is not None}:
        return [options.sampling(**given, seed=seed)]
    return [options.sampling(temperature=0, seed=seed), options.sampling(seed=seed)]


class Alone(NamedTuple):
    """Work without a strategy: prefill of `pp` tokens, decode of `tg`, for each batch at each depth."""

    pp: int | None
    tg: int | None
    batches: Sequence[int]
    depths: Sequence[int]


def parse_alone(mode: str, pp: int | None, tg: int | None, batch: str | None, depth: str | None) -> Alone | None:
    """None if none of the options is given."""
    if pp is tg is batch is depth is None:
        return None
    batches = _numbers("1" if batch is None else batch, 1, "--batch")
    depths = _numbers("0" if depth is None else depth, 0, "--depth")
    if mode != "all":
        raise typer.BadParameter("--pp, --tg, --batch and --depth measure without a strategy: leave out --mode")
    if pp is None and tg is None:
        pp, tg = 512, 128
    return Alone(pp, tg, batches, depths)
