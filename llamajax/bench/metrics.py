"""What the times of a run mean: the one place where figures are defined. Seconds, bytes and tokens throughout."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64


@dataclass(frozen=True)
class Spread:
    """Of a figure that was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(float(np.median(values)), min(values), max(values))


@dataclass(frozen=True)
class Percentiles:
    """Of many times, interpolated between neighbours. Among few, p99 is nearly the largest."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, times: Float64[np.ndarray, "N"]) -> "Percentiles | None":
        """None if there are none: an answer of one token has no time between tokens."""
        return cls(*np.percentile(times, [50, 95, 99]).tolist()) if len(times) else None


@dataclass(frozen=True)
class Run:
    """R requests, each answered once, with N tokens or as many as it got. Times are from the run's start.

    Attributes:
      seconds: until the last answer was whole.
      arrivals: when each request came; waiting begins there.
      token_times: of each request, when each token reached the reader, ascending. Tokens come in blocks: those of a
        block have the same time, or nearly.
      burst: a token that comes within so many seconds of the one before it is of the same block.
    """

    seconds: float
    arrivals: Float64[np.ndarray, "R"]
    token_times: Sequence[Float64[np.ndarray, "N"]]
    burst: float = 0.0

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.token_times))

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all requests, by the time of the whole run, prompts and waiting included."""
        return self.tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        """By the time of the whole run."""
        return len(self.token_times) / self.seconds

    @property
    def time_to_first_token(self) -> Float64[np.ndarray, "R"]:
        """From a request's arrival, so that waiting for others counts."""
        return np.array([times[0] for times in self.token_times]) - self.arrivals

    @property
    def latency(self) -> Float64[np.ndarray, "R"]:
        """End to end: from a request's arrival to its last token."""
        return np.array([times[-1] for times in self.token_times]) - self.arrivals

    @property
    def time_per_output_token(self) -> Float64[np.ndarray, "R"]:
        """One for each request of several tokens: from its first token to its last, by the tokens after the first."""
        return np.array([(times[-1] - times[0]) / (len(times) - 1) for times in self.token_times if len(times) > 1])

    @property
    def inter_token_latency(self) -> Float64[np.ndarray, "R*(N-1)"]:
        """One for each token after a request's first block: the gap before its block, by the block's tokens."""
        return np.concatenate([np.array([]), *(np.repeat(gaps / sizes, sizes) for gaps, sizes in self._blocks())])

    @property
    def gaps(self) -> Float64[np.ndarray, "G"]:
        """How long a reader of a stream sees nothing: from each block's arrival to that of the next."""
        return np.concatenate([np.array([]), *(gaps for gaps, _ in self._blocks())])

    def decode_bandwidth(self, weight_bytes: int, kv_bytes: int) -> float | None:
        """Bytes a second that decoding has to read, at least; None for answers of one token.

        A decode step gives each active sequence one token, so that it takes the mean time per output token. It reads
        the weights once, and each active sequence's keys and values. On average the active ones are as many as the
        sequences' decode times fill the time from the first token of all to the last.

        Args:
          weight_bytes: of all weights that each step reads.
          kv_bytes: of one sequence's keys and values, halfway through its answer.
        """
        decoding = self.latency - self.time_to_first_token
        if not decoding.any():
            return None
        times = np.concatenate(self.token_times)
        active = decoding.sum() / (times.max() - times.min())
        return float((weight_bytes + active * kv_bytes) / self.time_per_output_token.mean())

    def _blocks(self) -> Iterable[tuple[Float64[np.ndarray, "G"], Int64[np.ndarray, "G"]]]:
        """For each request, of the blocks after its first: the gap before each, and its tokens."""
        for times in self.token_times:
            begins = np.flatnonzero(np.diff(times, prepend=-np.inf) > self.burst)
            yield np.diff(times[begins]), np.diff(begins, append=len(times))[1:]


@dataclass(frozen=True)
class WarmUp:
    """What it took before the first measured run: XLA's programs, compiled or read from its cache on disk."""

    seconds: float
    programs: int
    compile_seconds: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one kind of work, done several times.

    Attributes:
      name: a strategy; "remote", another server; or "pp512", prefill of 512 tokens, or "tg128", generating 128.
      sampling: how tokens were drawn; None where only prefill was measured.
      requests: how many; of reading and generating alone, all at once.
      tokens_per_second: of all requests together.
    """

    name: str
    sampling: str | None
    requests: int
    tokens_per_second: Spread

    def flat(self) -> dict[str, Any]:
        """One level of names, as in "warm_up.seconds"."""
        cells: dict[str, Any] = {}
        for name, value in asdict(self).items():
            cells |= {f"{name}.{part}": x for part, x in value.items()} if isinstance(value, dict) else {name: value}
        return cells


@dataclass(frozen=True, kw_only=True)
class Local(Result):
    """Of a model that runs in this process.

    Attributes:
      decode_bandwidth: bytes a second, as in `Run`, the median; None where nothing was decoded.
      read_bandwidth: bytes a second of reading memory before, between and after the runs, the fastest.
      bandwidth_fraction: `decode_bandwidth` over the fastest reading of the session.
      peak_bytes: the most memory so far: of the device, or of the process where the device is a CPU. All that is
        measured in one process shares it, the matrix that is read for the bandwidth included.
      programs_while_measured: programs compiled during the runs; not 0 means that the times are not to be trusted.
    """

    decode_bandwidth: float | None
    read_bandwidth: float
    bandwidth_fraction: float | None = None
    peak_bytes: int
    warm_up: WarmUp
    programs_while_measured: int


@dataclass(frozen=True, kw_only=True)
class Alone(Local):
    """Reading or generating alone.

    Attributes:
      depth: tokens that the cache held of each sequence before.
    """

    depth: int


@dataclass(frozen=True, kw_only=True)
class Answered(Result):
    """Requests that arrived and were answered.

    Attributes:
      tokens: generated in one run, by all requests together; the median.
      seconds: of a run.
      time_to_first_token, latency, time_per_output_token, inter_token_latency, gaps: as in `Run`, of all runs; the
        last three None where answers have one token.
    """

    tokens: int
    seconds: Spread
    requests_per_second: Spread
    time_to_first_token: Percentiles | None
    latency: Percentiles | None
    time_per_output_token: Percentiles | None
    inter_token_latency: Percentiles | None
    gaps: Percentiles | None


@dataclass(frozen=True, kw_only=True)
class Served(Local, Answered):
    """A strategy, serving requests.

    Attributes:
      speed_up: tokens a second over the sequential strategy's with the same requests; None without it.
    """

    speed_up: float | None = None


@dataclass(frozen=True, kw_only=True)
class Remote(Answered):
    """Another server, answering requests. Failed ones are in no figure but `requests` and `failed`.

    Attributes:
      failed: requests of all runs that got no whole answer.
      ended_early: answers of all runs with fewer tokens than were asked for.
      prompt_tokens: of a request, as the server counts; None if it does not say.
      counted: whether the server said how many tokens each answer has. If not, each event counts as one.
      client_busy: the part of a run's time in which the load generator itself computed; of the run where it is the
        most. Near 1, the times are its own and not the server's.
    """

    failed: int
    ended_early: int
    prompt_tokens: Spread | None
    counted: bool
    client_busy: float


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """What every `Answered` says of its runs."""

    def all_of(figure: Callable[[Run], np.ndarray]) -> Percentiles | None:
        return Percentiles.of(np.concatenate([figure(run) for run in runs]))

    return {
        "tokens": int(np.median([run.tokens for run in runs])),
        "seconds": Spread.of(run.seconds for run in runs),
        "requests_per_second": Spread.of(run.requests_per_second for run in runs),
        "tokens_per_second": Spread.of(run.tokens_per_second for run in runs),
        "time_to_first_token": all_of(lambda run: run.time_to_first_token),
        "latency": all_of(lambda run: run.latency),
        "time_per_output_token": all_of(lambda run: run.time_per_output_token),
        "inter_token_latency": all_of(lambda run: run.inter_token_latency),
        "gaps": all_of(lambda run: run.gaps),
    }


def read_bandwidth(results: Iterable[Local]) -> float:
    """The fastest that memory was read in a session, be it for its own sake or by decoding: bytes a second."""
    return max(max(x.read_bandwidth, x.decode_bandwidth or 0) for x in results)


def with_ratios(results: Sequence[Local]) -> list[Local]:
    """The same, with what is relative to the fastest reading and to the sequential strategy."""
    fastest = read_bandwidth(results)
    sequential = {(x.requests, x.sampling): x.tokens_per_second.median for x in results if x.name == "sequential"}
    done = []
    for x in results:
        if x.decode_bandwidth is not None:
            x = replace(x, bandwidth_fraction=x.decode_bandwidth / fastest)
        if isinstance(x, Served) and (base := sequential.get((x.requests, x.sampling))):
            x = replace(x, speed_up=x.tokens_per_second.median / base)
        done.append(x)
    return done
