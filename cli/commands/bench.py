"""`llamajax bench`: how fast, in each strategy, here."""

import csv
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from llamajax.errors import PromptTooLongError, RequestError
from llamajax.hub.aliases import DEFAULT
from llamajax.types import CacheDType, Device, DType, SamplingParams

from .. import loading, options
from ..render import note, print_json
from ..tables import print_tables

if TYPE_CHECKING:
    from llamajax import LLM
    from llamajax.bench.metrics import Local, Result
    from llamajax.bench.run import Strategy
    from llamajax.bench.session import Session
    from llamajax.bench.workload import Workload

_STRATEGIES: "tuple[Strategy, ...]" = ("sequential", "concurrent", "batched")
_PLOTS = (".png", ".svg", ".html")


# Options of a model that runs here.
_HERE = [
    "mode",
    "pp",
    "tg",
    "batch",
    "depth",
    "plot",
    "random_weights",
    "max_seq_len",
    "dtype",
    "cache_dtype",
    "device",
    "threads",
]


def bench(
    context: typer.Context,
    mode: Annotated[
        Literal["sequential", "concurrent", "batched", "all"], typer.Option("--mode", help="The strategy to measure.")
    ] = "all",
    requests: Annotated[int, typer.Option("--requests", min=1, help="How many requests there are.")] = 10,
    new_tokens: Annotated[
        int, typer.Option("-n", "--new-tokens", min=1, help="Tokens that each request generates, exactly.")
    ] = 50,
    prompt_len: Annotated[
        str, typer.Option("--prompt-len", help="Tokens of a prompt: 32; one of 16,64,256; or from 16:512.")
    ] = "32",
    arrival: Annotated[
        str, typer.Option("--arrival", help="When requests come: all, at once, or poisson:RATE, so many a second.")
    ] = "all",
    slots: Annotated[
        int | None, typer.Option("--slots", min=1, help="Requests served at once; 16 concurrent, 32 batched.")
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs of each; medians and spread are shown.")] = 3,
    pp: Annotated[int | None, typer.Option("--pp", min=1, help="Alone: read prompts of so many tokens.")] = None,
    tg: Annotated[int | None, typer.Option("--tg", min=1, help="Alone: generate so many tokens.")] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="Alone: so many sequences at once, as in 1,8,32; 1 if left out.")
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option("--depth", "-d", help="Alone: so many tokens in the cache before, as in 0,1024,4096."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    csv_file: Annotated[str | None, typer.Option("--csv", help="Write CSV to a file; - prints it instead.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw .png, .svg or .html; measures 1, 2, 4, ... up to --requests for it."),
    ] = None,
    model: options.Model = DEFAULT,
    random_weights: Annotated[
        str | None,
        typer.Option("--random-weights", help="Instead of a model: a name's size (llama3.2-1b), weights drawn here."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Measure only this sampling; 0 is greedy; the default is 0.6.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="And draw from the smallest set of this probability; 0.9.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="And from the k most probable tokens; 0: all.")] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="And drop tokens less probable than this, of the first; 0.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="And, above 1, make repeats rarer; 1.")
    ] = None,
    seed: options.Seed = 42,
    max_seq_len: options.MaxSeqLen = None,
    dtype: options.DTypeOption = "auto",
    cache_dtype: options.CacheDTypeOption = "auto",
    device: options.DeviceOption = None,
    threads: options.Threads = None,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Measure an OpenAI-compatible server at this address, and no model here."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="With --url: the server's key.")
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Measure the speed of a model here, in three strategies of serving several requests, or of another server.

    sequential: one after the other. The lowest latency for a single user; others wait.

    concurrent: as they come, joining those that run, as a server does. For many users at once.

    batched: all are known beforehand, and as many as fit run at once. The highest throughput, for offline work.

    With --pp, --tg, --batch or --depth: reading prompts and generating tokens alone, without a strategy; 512 and 128
    tokens if neither --pp nor --tg is given.

    With --url: whatever OpenAI-compatible server is there, through /v1/completions, as its clients see it. -m is then
    the name of its model (the first that it lists), and --slots the most requests under way at once (no limit). Prompts
    are new in each run, so that the server has none of them in a cache.

    Each is measured twice, greedily and with the default sampling, unless a sampling option is given.

    Every request generates exactly -n tokens. Tokens reach the reader in blocks. The figures:

    tokens/s, requests/s: of all requests, by the time of the whole run, prompts and waiting included. Alone, by the
    time of reading or of generating.

    TTFT: time to first token, from a request's arrival. E2E: end-to-end latency, from its arrival to its last token.

    TPOT: time per output token, from a request's first token to its last, divided by the tokens after the first.

    ITL: inter-token latency, for each token: the time from the block before to its own, divided by its block's tokens.

    gaps: from one block to the next, as a reader of the stream waits.

    of fastest read: the bytes a second that decoding has to read (the weights once a step, and the keys and values of
    the active sequences), divided by the fastest that memory was read in this session. Before and after each run a
    matrix is read, as large as the weights (at most 256 MiB on a CPU, 1 GiB elsewhere); decoding counts as reading too.

    warm-up: what happens before the first run; programs compiled for one strategy are there for the next. A run in
    which something was compiled is not to be trusted.

    peak memory: of all so far, the matrix included. To see one strategy's own, give --mode.

    failed, ended early: of a server. Failed requests are in no other figure, and make the exit code 1. Answers that end
    early, as where a server does not know ignore_eos, are measured as they are.

    client busy: the part of a run in which this command itself computed. Near 100 %, it measures itself. A server's
    tokens that come within 0.5 ms of each other count as a block.
    """
    rate, prompt_lens = _rate(arrival), _prompt_lens(prompt_len)
    batches = _numbers("1" if batch is None else batch, 1, "--batch")
    depths = _numbers("0" if depth is None else depth, 0, "--depth")
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    samplings = _samplings({name: value for name, value in given.items() if value is not None}, seed)
    alone = any(option is not None for option in (pp, tg, batch, depth))
    if alone and mode != "all":
        raise typer.BadParameter("--pp, --tg, --batch and --depth measure without a strategy: leave out --mode")
    if pp is None and tg is None:
        pp, tg = 512, 128
    if as_json and csv_file == "-":
        raise typer.BadParameter("stdout takes either --json or --csv -: give --csv a file")
    if random_weights is not None and model != DEFAULT:
        raise typer.BadParameter("give either --model or --random-weights")
    if plot is not None and plot.suffix not in _PLOTS:
        raise typer.BadParameter(f"must end in {', '.join(_PLOTS)}", param_hint="--plot")
    for option, path in (("--csv", None if csv_file is None else Path(csv_file)), ("--plot", plot)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise typer.BadParameter(f"{path} is no file in a directory that exists", param_hint=option)
    if plot is not None and not find_spec("matplotlib"):
        raise RequestError("--plot needs matplotlib: pip install 'llamajax[plot]'")

    options.note_seed(seed)
    from llamajax.bench.workload import synthetic

    asked = {"repeat": repeat, "seed": seed}
    served = asked | {"new_tokens": new_tokens, "prompt_len": prompt_len, "arrival": arrival}
    workload = partial(synthetic, prompt_lens=prompt_lens, new_tokens=new_tokens, rate=rate, seed=seed)
    if url is not None:
        _refuse(context, _HERE, "--url measures a server, and no model here")
        name = model if _given(context, "model") else None
        work = partial(workload, requests)
        from ..remote_bench import measure_server, parse_url

        server, answered, failed = measure_server(parse_url(url), name, api_key, work, samplings, slots, repeat)
        _write(server | served | {"slots": slots}, answered, as_json, csv_file)
        if failed:
            raise typer.Exit(1)
        return
    _refuse(context, ["api_key"], "--api-key is for a server at --url")
    llm = _load(random_weights or model, random_weights is not None, max_seq_len, dtype, cache_dtype, device, seed)
    # After the settings that jax reads when it is imported.
    import jax

    from llamajax.bench.metrics import read_bandwidth, with_ratios
    from llamajax.bench.session import Session, kept_dtype

    session = Session(llm, repeat)
    if alone:
        _check(session, "--depth and --pp", max(depths), pp or 0)
        _check(session, "--depth and --tg", max(*depths, 1), tg or 0)
        results = _alone(session, pp, tg, batches, depths, samplings, seed)
    else:
        _check(session, "--prompt-len and -n", max(prompt_lens), new_tokens)
        strategies = _STRATEGIES if mode == "all" else (mode,)
        workloads = [
            workload(n, vocab_size=llm.config.vocab_size, sampling=sampling)
            for n in (_doubling(requests) if plot else [requests])
            for sampling in samplings
        ]
        results = _served(session, strategies, workloads, slots)
    results = with_ratios(results)
    about: dict[str, Any] = {
        "model": f"{random_weights} (random weights)" if random_weights else model,
        "dtype": kept_dtype(llm),
        "device": llm._runner.device.device_kind,
        "jax": jax.__version__,
        "read_bandwidth": read_bandwidth(results),
        **(asked if alone else served),
    }
    _write(about, results, as_json, csv_file)
    if plot is not None:
        from llamajax.bench.plot import write_plot

        write_plot(plot, results, f"{about['model']} on {about['device']}")


def _served(
    session: "Session", strategies: "Sequence[Strategy]", workloads: "Sequence[Workload]", slots: int | None
) -> "list[Local]":
    from llamajax.bench.run import serve
    from llamajax.bench.workload import sampling_name

    results: list[Local] = []
    for strategy in strategies:
        for work in workloads:
            note(f"({strategy}: {len(work.prompts)} x {work.new_tokens} tokens, {sampling_name(work.sampling)})")
            at_once = slots or (16 if strategy == "concurrent" else 32)
            results.append(serve(session, strategy, work, slots=at_once))
    return results


def _alone(
    session: "Session",
    pp: int | None,
    tg: int | None,
    batches: Sequence[int],
    depths: Sequence[int],
    samplings: Sequence[SamplingParams],
    seed: int,
) -> "list[Local]":
    from llamajax.bench.alone import generate, read_prompts
    from llamajax.bench.workload import sampling_name

    results: list[Local] = []
    for depth, size in product(depths, batches):
        if pp is not None:
            note(f"(reading: {size} x {pp} tokens at depth {depth})")
            results.append(read_prompts(session, pp, batch=size, depth=depth, seed=seed))
        if tg is not None:
            for sampling in samplings:
                note(f"(generating: {size} x {tg} tokens at depth {depth}, {sampling_name(sampling)})")
                results.append(generate(session, tg, batch=size, depth=depth, sampling=sampling, seed=seed))
    return results


def _check(session: "Session", option: str, num_tokens: int, more: int) -> None:
    try:
        session.check(num_tokens, more)
    except PromptTooLongError as e:
        raise typer.BadParameter(str(e), param_hint=option) from None


def _samplings(given: dict[str, Any], seed: int) -> list[SamplingParams]:
    """What was asked for, or else greedy and the default."""
    try:
        if given:
            return [SamplingParams(**given, seed=seed)]
        return [SamplingParams(temperature=0, seed=seed), SamplingParams(seed=seed)]
    except RequestError as e:
        raise typer.BadParameter(str(e)) from None


def _rate(arrival: str) -> float | None:
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


def _numbers(numbers: str, at_least: int, option: str) -> list[int]:
    """Those of "1,8,32"."""
    found = [int(number) if number.isdecimal() and len(number) < 10 else -1 for number in numbers.split(",")]
    if min(found) < at_least:
        raise typer.BadParameter(
            f"must be numbers of at least {at_least}, as in 1,8,32, not {numbers!r}", param_hint=option
        )
    return found


def _prompt_lens(prompt_len: str) -> Sequence[int]:
    """What "32", "16,64,256" or "16:512" allows."""
    first, colon, last = prompt_len.partition(":")
    if not colon:
        return _numbers(prompt_len, 1, "--prompt-len")
    ends = _numbers(f"{first},{last}", 1, "--prompt-len")
    if ends[0] > ends[1]:
        raise typer.BadParameter(f"must be from the fewest to the most, not {prompt_len!r}", param_hint="--prompt-len")
    return range(ends[0], ends[1] + 1)


def _doubling(last: int) -> list[int]:
    """1, 2, 4, ... and the last."""
    return [*(2**i for i in range((last - 1).bit_length())), last]


def _load(
    name: str,
    random: bool,
    max_seq_len: int | None,
    dtype: DType,
    cache_dtype: CacheDType,
    device: Device | None,
    seed: int,
) -> "LLM":
    if not random:
        return loading.load(name, max_seq_len=max_seq_len, dtype=dtype, cache_dtype=cache_dtype, device=device)
    loading.prepare_jax(device)
    from llamajax.bench.model import random_llm

    return random_llm(name, dtype=dtype, cache_dtype=cache_dtype, device=device, max_seq_len=max_seq_len, seed=seed)


def _given(context: typer.Context, name: str) -> bool:
    """Whether the option is in the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    for option in context.command.params:
        if option.name in names and _given(context, option.name):
            raise typer.BadParameter(f"{why}: leave out {'/'.join(option.opts)}")


def _write(about: dict[str, Any], results: "Sequence[Result]", as_json: bool, csv_file: str | None) -> None:
    if as_json:
        print_json(about | {"results": [asdict(result) for result in results]})
    elif csv_file == "-":
        _write_csv(sys.stdout, results)
    else:
        print_tables(about, results)
    if csv_file is not None and csv_file != "-":
        with Path(csv_file).open("w", newline="", encoding="utf-8") as file:
            _write_csv(file, results)


def _write_csv(file: TextIO, results: "Sequence[Result]") -> None:
    rows = [result.flat() for result in results]
    # A result that has no time between tokens has fewer cells.
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
