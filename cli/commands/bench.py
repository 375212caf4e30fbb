"""`llamajax bench`: how fast a model is here, in each strategy or alone, or a server elsewhere."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from llamajax.errors import RequestError
from llamajax.hub.aliases import DEFAULT
from llamajax.types import CacheDType, Device, DType

from .. import bench_options as its
from .. import loading, options
from ..local_bench import about_model, check, measure_alone, measure_strategies
from ..render import print_json
from ..tables import print_tables

if TYPE_CHECKING:
    from llamajax.bench.metrics import Result
    from llamajax.bench.session import Session

_PLOTS = (".png", ".svg", ".html")
HELP = """\
Measure the speed of a model here, in three strategies of answering several requests, or of another server.

sequential: one after the other. The lowest latency for a single user; others wait.

concurrent: as they come, joining those that run, as a server does. For many users at once.

batched: all are known beforehand, and as many as fit run at once. The highest throughput, for offline work.

With --pp, --tg, --batch or --depth: prefill and decode alone, without a strategy; 512 and 128 tokens if neither --pp
nor --tg is given.

With --url: the OpenAI-compatible server at that address, through /v1/completions, as its clients see it. -m is then
the name of its model (the first that it lists), and --slots the most requests under way at once (no limit). Prompts
are new in each run, so that the server has none of them in a cache.

Each is measured twice, greedily and with the default sampling, unless a sampling option is given.

Every request generates exactly -n tokens. Tokens reach the reader in blocks. The figures:

tokens/s, requests/s: of all requests, by the time of the whole run, prompts and waiting included. Alone, by the
time of prefill or of decode.

TTFT: time to first token, from a request's arrival. E2E: end-to-end latency, from its arrival to its last token.

TPOT: time per output token, from a request's first token to its last, divided by the tokens after the first.

ITL: inter-token latency, for each token: the time from the block before to its own, divided by its block's tokens.

gaps: from one block to the next, as a reader of the stream waits.

of fastest read: the bytes a second that decoding has to read (the weights once a step, and the keys and values of
the active sequences), divided by the fastest read of memory in this session. Before and after each run, the
command reads a matrix as large as the weights (at most 256 MiB on a CPU, 1 GiB elsewhere). Decoding counts, too.

warm-up: what happens before the first run; programs compiled for one strategy are there for the next. A run in
which something was compiled is not to be trusted.

peak memory: of all so far, the matrix included. To see one strategy's own, give --mode.

failed, ended early: of a server. Failed requests are in no other figure, and make the exit code 1. Answers that end
early, as where a server does not know ignore_eos, are measured as they are.

client busy: the part of a run in which this command itself computed. Near 100 %, it measures itself. A server's
tokens that come within 0.5 ms of each other count as a block.
"""

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
_OF_STRATEGIES = ["requests", "new_tokens", "prompt_len", "arrival", "slots"]


def bench(
    context: typer.Context,
    mode: its.Mode = "all",
    requests: its.Requests = 10,
    new_tokens: its.NewTokens = 50,
    prompt_len: its.PromptLen = "32",
    arrival: its.Arrival = "all",
    slots: its.Slots = None,
    repeat: its.Repeat = 3,
    pp: its.PromptTokens = None,
    tg: its.GeneratedTokens = None,
    batch: its.Batch = None,
    depth: its.Depth = None,
    as_json: its.AsJson = False,
    csv_file: its.Csv = None,
    plot: its.Plot = None,
    model: options.Model = DEFAULT,
    random_weights: its.RandomWeights = None,
    temperature: its.Temperature = None,
    top_p: its.TopP = None,
    top_k: its.TopK = None,
    min_p: its.MinP = None,
    repetition_penalty: its.RepetitionPenalty = None,
    seed: options.Seed = 42,
    max_seq_len: options.MaxSeqLen = None,
    dtype: options.DTypeOption = "auto",
    cache_dtype: options.CacheDTypeOption = "auto",
    device: options.DeviceOption = None,
    threads: options.Threads = None,
    url: its.Url = None,
    api_key: its.ApiKey = None,
    debug: options.Debug = False,
) -> None:
    rate, prompt_lens = its.parse_rate(arrival), its.parse_prompt_lens(prompt_len)
    alone = its.parse_alone(mode, pp, tg, batch, depth)
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    samplings = its.parse_samplings(drawn | {"repetition_penalty": repetition_penalty}, seed)
    if alone:
        _refuse(context, _OF_STRATEGIES, "--pp, --tg, --batch and --depth measure no strategies")
    output = _Output(as_json, csv_file, plot)
    options.note_seed(seed)
    from llamajax.bench.workload import synthetic

    workload = partial(synthetic, prompt_lens=prompt_lens, new_tokens=new_tokens, rate=rate, seed=seed)
    served = {} if alone else {"new_tokens": new_tokens, "prompt_len": prompt_len, "arrival": arrival}
    asked = {"repeat": repeat, "seed": seed, **served}
    if url is not None:
        from ..remote_bench import measure_server, parse_url

        _refuse(context, _HERE, "--url measures a server, and no model here")
        name, work = model if _given(context, "model") else None, partial(workload, requests)
        server, answered, failed = measure_server(parse_url(url), name, api_key, work, samplings, slots, repeat)
        output.write(server | asked | {"slots": slots}, answered)
        raise typer.Exit(failed)
    _refuse(context, ["api_key"], "--api-key is for a server at --url")
    session = _open(model, random_weights, max_seq_len, dtype, cache_dtype, device, seed, repeat)
    if alone:
        results = measure_alone(session, alone, samplings, seed)
    else:
        check(session, "--prompt-len and -n", max(prompt_lens), new_tokens)
        results = measure_strategies(session, mode, workload, output.numbers(requests), samplings, slots)
    output.write(about_model(session, model, random_weights, results) | asked, results)


@dataclass(frozen=True)
class _Output:
    """Where results go. Raises a usage error for options that do not go together, or files that cannot be written."""

    as_json: bool
    csv_file: str | None
    plot: Path | None

    def __post_init__(self) -> None:
        csv_file = None if self.csv_file is None else Path(self.csv_file)
        if self.as_json and self.csv_file == "-":
            raise typer.BadParameter("stdout takes either --json or --csv -: give --csv a file")
        if self.plot is not None and self.plot.suffix not in _PLOTS:
            raise typer.BadParameter(f"must end in {', '.join(_PLOTS)}", param_hint="--plot")
        for option, path in (("--csv", csv_file), ("--plot", self.plot)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise typer.BadParameter(f"{path} is no file in a directory that exists", param_hint=option)
        if self.plot is not None and not find_spec("matplotlib"):
            raise RequestError("--plot needs matplotlib: pip install 'llamajax[plot]'")

    def numbers(self, last: int) -> list[int]:
        """How many requests to measure: a plot shows 1, 2, 4, ... and the last."""
        return [*(2**i for i in range((last - 1).bit_length())), last] if self.plot else [last]

    def write(self, about: dict[str, Any], results: "Sequence[Result]") -> None:
        if self.as_json:
            print_json(about | {"results": [asdict(result) for result in results]})
        elif self.csv_file == "-":
            _write_csv(sys.stdout, results)
        else:
            print_tables(about, results)
        if self.csv_file is not None and self.csv_file != "-":
            with Path(self.csv_file).open("w", newline="", encoding="utf-8") as file:
                _write_csv(file, results)
        if self.plot is not None:
            from llamajax.bench.plot import write_plot

            write_plot(self.plot, results, f"{about['model']} on {about['device']}")


def _open(
    model: str,
    random_weights: str | None,
    max_seq_len: int | None,
    dtype: DType,
    cache_dtype: CacheDType,
    device: Device | None,
    seed: int,
    repeat: int,
) -> "Session":
    if random_weights is not None and model != DEFAULT:
        raise typer.BadParameter("give either --model or --random-weights")
    how: Any = {"max_seq_len": max_seq_len, "dtype": dtype, "cache_dtype": cache_dtype, "device": device}
    if random_weights is None:
        llm = loading.load(model, **how)
    else:
        loading.prepare_jax(device)
        from llamajax.bench.model import random_llm

        llm = random_llm(random_weights, seed=seed, **how)
    from llamajax.bench.session import Session

    return Session(llm, repeat)


def _given(context: typer.Context, name: str) -> bool:
    """Whether the option is in the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    for option in context.command.params:
        if option.name in names and _given(context, option.name):
            raise typer.BadParameter(f"{why}: leave out {'/'.join(option.opts)}")


def _write_csv(file: TextIO, results: "Sequence[Result]") -> None:
    rows = [result.flat() for result in results]
    # A result that has no time between tokens has fewer cells.
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
