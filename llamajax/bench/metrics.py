"""What the times of a run mean: the one place where figures are defined. Seconds, bytes and tokens throughout."""

from collections.abc import Iterable, Sequence
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
    """R requests, served once, N tokens each. Times are from the run's start.

    Attributes:
      seconds: until the last answer was whole.
      arrivals: when each request came; waiting begins there.
      token_times: when each token reached the host. Tokens come in blocks: those of a block have the same time.
    """

    seconds: float
    arrivals: Float64[np.ndarray, "R"]
    token_times: Float64[np.ndarray, "R N"]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all requests, by the time of the whole run, prompts and waiting included."""
        return self.token_times.size / self.seconds

    @property
    def requests_per_second(self) -> float:
        """By the time of the whole run."""
        return len(self.token_times) / self.seconds

    @property
    def time_to_first_token(self) -> Float64[np.ndarray, "R"]:
        """From a request's arrival, so that waiting for others counts."""
        return self.token_times[:, 0] - self.arrivals

    @property
    def latency(self) -> Float64[np.ndarray, "R"]:
        """End to end: from a request's arrival to its last token."""
        return self.token_times[:, -1] - self.arrivals

    @property
    def time_per_output_token(self) -> Float64[np.ndarray, "R"]:
        """One for each request: from its first token to its last, by the tokens after the first."""
        N = self.token_times.shape[1]
        return (self.token_times[:, -1] - self.token_times[:, 0]) / (N - 1) if N > 1 else np.array([])

    @property
    def inter_token_latency(self) -> Float64[np.ndarray, "R*(N-1)"]:
        """One for each token after a request's first block: the gap before its block, by the block's tokens."""
        return np.concatenate([np.repeat(gaps / sizes, sizes) for gaps, sizes in self._blocks()])

    @property
    def gaps(self) -> Float64[np.ndarray, "G"]:
        """How long a reader of a stream sees nothing: from each block's arrival to that of the next."""
        return np.concatenate([gaps for gaps, _ in self._blocks()])

    def decode_bandwidth(self, weight_bytes: int, kv_bytes: int) -> float | None:
        """Bytes a second that decoding has to read, at least; None for answers of one token.

        A decode step gives each active sequence one token, so that it takes the mean time per output token. It reads
        the weights once, and each active sequence's keys and values. On average the active ones are as many as the
        sequences' decode times fill the time from the first token of all to the last.

        Args:
          weight_bytes: of all weights that each step reads.
          kv_bytes: of one sequence's keys and values, halfway through its answer.
        """
        spans = self.token_times[:, -1] - self.token_times[:, 0]
        if not spans.any():
            return None
        active = spans.sum() / (self.token_times.max() - self.token_times.min())
        return float((weight_bytes + active * kv_bytes) / self.time_per_output_token.mean())

    def _blocks(self) -> Iterable[tuple[Float64[np.ndarray, "G"], Int64[np.ndarray, "G"]]]:
        """For each request, of the blocks after its first: the gap before each, and its tokens."""
        for times in self.token_times:
            arrivals, sizes = np.unique(times, return_counts=True)
            yield np.diff(arrivals), sizes[1:]


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
      name: a strategy; or "pp512", reading prompts of 512 tokens, or "tg128", generating 128 tokens.
      sampling: how tokens were drawn; None where only prompts were read.
      requests: how many; of reading and generating alone, all at once.
      tokens_per_second: of all requests together.
      decode_bandwidth: bytes a second, as in `Run`, the median; None where nothing was decoded.
      read_bandwidth: bytes a second of reading memory before, between and after the runs, the fastest.
      bandwidth_fraction: `decode_bandwidth` over the fastest reading of the session.
      peak_bytes: the most memory so far: of the device, or of the process where the device is a CPU. All that is
        measured in one process shares it, the matrix that is read for the bandwidth included.
      programs_while_measured: programs compiled during the runs; not 0 means that the times are not to be trusted.
    """

    name: str
    sampling: str | None
    requests: int
    tokens_per_second: Spread
    decode_bandwidth: float | None
    read_bandwidth: float
    bandwidth_fraction: float | None = None
    peak_bytes: int
    warm_up: WarmUp
    programs_while_measured: int

    def flat(self) -> dict[str, Any]:
        """One level of names, as in "warm_up.seconds"."""
        cells: dict[str, Any] = {}
        for name, value in asdict(self).items():
            cells |= {f"{name}.{part}": x for part, x in value.items()} if isinstance(value, dict) else {name: value}
        return cells


@dataclass(frozen=True, kw_only=True)
class Alone(Result):
    """Reading or generating alone.

    Attributes:
      depth: tokens that the cache held of each sequence before.
    """

    depth: int


@dataclass(frozen=True, kw_only=True)
class Served(Result):
    """A strategy, serving requests.

    Attributes:
      tokens: generated in one run, by all requests together.
      seconds: of a run.
      speed_up: tokens a second over the sequential strategy's with the same requests; None without it.
      time_to_first_token, latency, time_per_output_token, inter_token_latency, gaps: as in `Run`, of all runs; the
        last three None where answers have one token.
    """

    tokens: int
    seconds: Spread
    requests_per_second: Spread
    speed_up: float | None = None
    time_to_first_token: Percentiles | None
    latency: Percentiles | None
    time_per_output_token: Percentiles | None
    inter_token_latency: Percentiles | None
    gaps: Percentiles | None


def read_bandwidth(results: Iterable[Result]) -> float:
    """The fastest that memory was read in a session, be it for its own sake or by decoding: bytes a second."""
    return max(max(x.read_bandwidth, x.decode_bandwidth or 0) for x in results)


def with_ratios(results: Sequence[Result]) -> list[Result]:
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
