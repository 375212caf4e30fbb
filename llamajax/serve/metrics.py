"""What a server counts, for Prometheus, under the names of vLLM, so that its dashboards carry over."""

from collections.abc import Callable
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from llamajax.types import Completion

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "timeout": "abort"}


class Metrics:
    """The counters of one server.

    Args:
      model: the name that clients know it by.
      running, waiting, kv_usage: how many requests are answered, how many wait, and how full the KV cache is, in
        [0, 1], at this moment.
    """

    def __init__(
        self, model: str, *, running: Callable[[], int], waiting: Callable[[], int], kv_usage: Callable[[], float]
    ) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        for name, text, value in (
            ("num_requests_running", "Requests that are being answered.", running),
            ("num_requests_waiting", "Requests that wait for a slot.", waiting),
            ("kv_cache_usage_perc", "The share of the KV cache that is used; 1 is all of it.", kv_usage),
        ):
            Gauge(f"vllm:{name}", text, ["model_name"], registry=self._registry).labels(model).set_function(value)
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts that were read.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens that were generated.")
        self._late_compilations = self._counter(
            "llamajax:late_compilations", "Programs compiled after the server was ready, for which requests waited."
        )
        self._success = Counter(
            "vllm:request_success",
            "Answers that have ended, by why.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token.")
        self._gaps = self._histogram("inter_token_latency_seconds", "From one token to the next.")
        self._latency = self._histogram("e2e_request_latency_seconds", "From a request to its last token.")
        self._queue_time = self._histogram("request_queue_time_seconds", "From a request to when its turn came.")
        self._prompt_len = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer_len = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)

    def answered(self, completion: Completion, queue_time: float) -> None:
        """Counts an answer that has ended."""
        self._success.labels(self._model, _REASONS[completion.finish_reason]).inc()
        if completion.timings.token_times:  # else it was given up before it was read
            self._prompt_tokens.inc(completion.prompt_tokens)
        self._generation_tokens.inc(len(completion.token_ids))
        self._queue_time.observe(queue_time)
        self._prompt_len.observe(completion.prompt_tokens)
        self._answer_len.observe(len(completion.token_ids))
        if times := completion.timings.token_times:
            self._first_token.observe(times[0])
            self._latency.observe(times[-1])
            for before, after in pairwise(times):
                self._gaps.observe(after - before)

    def compiled_late(self) -> None:
        """Counts a program that was compiled after the server was ready."""
        self._late_compilations.inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets).labels(
            self._model
        )
