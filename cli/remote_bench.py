"""`llamajax bench --url`: how fast another server answers."""

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer

from llamajax.types import SamplingParams

from .render import note

if TYPE_CHECKING:
    from llamajax.bench.metrics import Remote
    from llamajax.bench.workload import Workload


def parse_url(url: str) -> str:
    """Without /v1 at its end, whether it was there or not."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.username or parts.query or parts.fragment:
        raise typer.BadParameter(f"must be an address as http://localhost:8000, not {url!r}", param_hint="--url")
    return url.rstrip("/").removesuffix("/v1")


def measure_server(
    url: str,
    model: str | None,
    api_key: str | None,
    workload: "Callable[..., Workload]",
    samplings: Sequence[SamplingParams],
    slots: int | None,
    repeat: int,
) -> "tuple[dict[str, Any], list[Remote], bool]":
    """What is to be said of the server, a result for each sampling, and whether a request failed.

    Args:
      workload: makes one of `vocab_size`, `sampling` and `draw`.
    """
    from llamajax.bench.remote import connect, measure
    from llamajax.bench.workload import sampling_name

    async def run() -> "tuple[dict[str, Any], list[Remote], bool]":
        results, failures, draws = [], Counter[str](), count()
        async with connect(url, model, api_key) as server:
            for sampling in samplings:
                unmeasured, *works = (
                    workload(vocab_size=server.vocab_size, sampling=sampling, draw=next(draws))
                    for _ in range(repeat + 1)
                )
                await server.warm_up(unmeasured)
                note(f"({url}: {len(unmeasured.prompts)} x {unmeasured.new_tokens} tokens, {sampling_name(sampling)})")
                result, failed = await measure(server, works, slots)
                results.append(result)
                failures += failed
            about = {
                "model": server.model,
                "url": url,
                "prompts": "token ids" if server.form.as_ids else "texts",
                "ignore_eos": "ignore_eos" in server.form.extras,
            }
        total = len(samplings) * repeat * len(unmeasured.prompts)
        for message, times in failures.most_common():
            note(f"({times} of {total} requests failed: {message})")
        if short := sum(result.ended_early for result in results):
            note(f"({short} of {total} answers ended early: figures are of fewer tokens than were asked for)")
        return about, results, bool(failures)

    gc.freeze()  # a collection that walks all imported objects would delay what is being timed
    return asyncio.run(run())
