"""Serves a workload by another server, through OpenAI's completions, and measures it. Knows no model and no jax."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import product
from typing import Any, NamedTuple

from llamajax.bench.event_stream import Answer, AnswerError, error_message, read_answer
from llamajax.bench.http_client import Client, Response
from llamajax.bench.metrics import Remote, Run, Spread, figures
from llamajax.bench.workload import Workload, sampling_name
from llamajax.text import one_line

# Nearly each is one token in any vocabulary.
_TEXT = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know
"""
WORDS = _TEXT.split()

# What a server may refuse: a first request tries all, and then fewer.
_EXTRAS: Sequence[dict[str, Any]] = (
    {"stream_options": {"include_usage": True}, "ignore_eos": True},
    {"stream_options": {"include_usage": True}},
    {},
)
_REFUSED = (400, 422, 500)
# What reading JSON that has another form raises.
_UNEXPECTED = (ValueError, LookupError, TypeError, AttributeError)
# A server that decodes several tokens at once sends them in a row, 0.01 to 0.1 ms apart.
_BURST = 0.0005


class Form(NamedTuple):
    """How the server takes a request.

    Attributes:
      as_ids: whether prompts are token ids; else they are texts of common words.
      extras: which of the fields that not every server knows.
    """

    as_ids: bool
    extras: Mapping[str, Any]


class Outcome(NamedTuple):
    """What came of a workload: of each request its answer, or what was wrong."""

    seconds: float
    answers: list[Answer | AnswerError]
    client_busy: float


class Server:
    """An OpenAI-compatible server. `connect` makes one.

    Attributes:
      model: the name of the model that is asked for.
      vocab_size: tokens that prompts may be drawn from: the model's, or words if the server does not tell.
      form: as `warm_up` found it.
    """

    def __init__(self, client: Client, model: str, names: Sequence[str], vocab_size: int | None) -> None:
        self._client = client
        self._names = names
        self.model = model
        self.vocab_size = vocab_size or len(WORDS)
        self.form = Form(vocab_size is not None, _EXTRAS[0])
        self._num_runs = 0

    async def warm_up(self, workload: Workload) -> None:
        """Sends the first request, with all that `Form` has, and with less if the server refuses it.

        Raises AnswerError, if the server takes none, for the first of them.
        """
        refused: AnswerError | None = None
        for form in product([True, False] if self.form.as_ids else [False], _EXTRAS):
            self.form = Form(*form)
            try:
                _read(await _request(self._client, "POST", "/v1/completions", self._body(workload, 0)))
                return
            except AnswerError as e:
                if e.status == 404 and self._names:
                    raise AnswerError(f"{e}; its models are {', '.join(self._names)}", e.status) from None
                if e.status not in _REFUSED:
                    raise
                refused = refused or e
        assert refused
        raise refused

    async def serve(self, workload: Workload, slots: int | None) -> Outcome:
        """Sends each request when it arrives, or when fewer than `slots` are being answered."""
        self._num_runs += 1
        bodies = [self._body(workload, i) for i in range(len(workload.prompts))]
        free = asyncio.Semaphore(slots or len(bodies))
        start, computed = time.perf_counter(), time.process_time()

        async def send(body: bytes, arrival: float) -> Response | OSError:
            await asyncio.sleep(start + arrival - time.perf_counter())
            async with free:
                return await _request(self._client, "POST", "/v1/completions", body)

        responses = await asyncio.gather(*map(send, bodies, workload.arrivals.tolist()))
        seconds = time.perf_counter() - start
        busy = (time.process_time() - computed) / seconds
        return Outcome(seconds, [_answer(response, start) for response in responses], busy)

    def _body(self, workload: Workload, index: int) -> bytes:
        """Without a seed: some servers draw more slowly with one, and how much there is to do does not depend on it.

        Each run has other prompts, since a server may keep what it has read.
        """
        ids, sampling = workload.prompts[index], workload.sampling
        ids = [(id + self._num_runs) % self.vocab_size for id in ids]
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": ids if self.form.as_ids else " ".join(WORDS[i % len(WORDS)] for i in ids),
            "max_tokens": workload.new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            **self.form.extras,
        }
        for name, off in (("top_k", 0), ("min_p", 0), ("repetition_penalty", 1)):
            if (value := getattr(sampling, name)) != off:
                fields[name] = value
        return json.dumps(fields).encode()


@asynccontextmanager
async def connect(url: str, model: str | None = None, api_key: str | None = None) -> AsyncIterator[Server]:
    """The server at an address, which /v1 follows, and its model of that name, or else the first that it lists.

    Raises AnswerError if it cannot be reached, is not ready yet, wants another key, or lists no models and none is
    named.
    """
    with Client(url, {"Authorization": f"Bearer {api_key}"} if api_key else {}) as client:
        health = await _request(client, "GET", "/health")
        if isinstance(health, OSError) or health.status == 503:  # it loads or compiles, which would be measured too
            _checked(health)
        models = await _models(client)
        if not (models or model):
            raise AnswerError(f"{url}/v1/models lists no models: name the one to ask for")
        model = model or next(iter(models))
        yield Server(client, model, list(models), models.get(model) or await _vocab_size(client))


async def measure(server: Server, workloads: Sequence[Workload], slots: int | None) -> tuple[Remote, Counter[str]]:
    """Serves each workload, and gives what was measured and what was wrong with requests, the most frequent first.

    Workloads differ in their prompts only, so that the server cannot have read those of a later one.
    Raises AnswerError if all requests fail.
    """
    outcomes = [await server.serve(workload, slots) for workload in workloads]
    results = [answer for outcome in outcomes for answer in outcome.answers]
    answers = [answer for answer in results if isinstance(answer, Answer)]
    failures = Counter(str(answer) for answer in results if isinstance(answer, AnswerError))
    if not answers:
        raise AnswerError(f"all {len(results)} requests failed: {failures.most_common(1)[0][0]}")
    prompt_tokens = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
    work = workloads[0]
    runs = [_run(outcome, workload) for outcome, workload in zip(outcomes, workloads, strict=True)]
    remote = Remote(
        name="remote",
        sampling=sampling_name(work.sampling),
        requests=len(work.prompts),
        **figures(runs),
        failed=failures.total(),
        ended_early=sum(len(answer.token_times) < work.new_tokens for answer in answers),
        prompt_tokens=Spread.of(prompt_tokens) if prompt_tokens else None,
        counted=all(answer.counted for answer in answers),
        client_busy=max(outcome.client_busy for outcome in outcomes),
    )
    return remote, failures


def _run(outcome: Outcome, workload: Workload) -> Run:
    whole = [isinstance(answer, Answer) for answer in outcome.answers]
    times = [answer.token_times for answer in outcome.answers if isinstance(answer, Answer)]
    return Run(outcome.seconds, workload.arrivals[whole], times, _BURST)


def _answer(response: Response | OSError, start: float) -> Answer | AnswerError:
    try:
        return _read(response, start)
    except AnswerError as e:
        return e


def _read(response: Response | OSError, start: float = 0.0) -> Answer:
    """With times from the start. Raises AnswerError."""
    checked = _checked(response)
    kind = checked.headers.get("content-type", "no content type")
    if not kind.startswith("text/event-stream"):
        raise AnswerError(f"expected a stream of events, found {one_line(kind)}")
    return read_answer(checked.pieces, [moment - start for moment in checked.times])


def _checked(response: Response | OSError) -> Response:
    """Raises AnswerError for any status but 200."""
    if isinstance(response, OSError):
        raise AnswerError(str(response)) from response
    if response.status == 200:
        return response
    body = response.body.decode(errors="replace")
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = one_line(body) or "no reason given"
    hint = "; give the server's API key" if response.status in (401, 403) else ""
    raise AnswerError(f"the server answered {response.status}: {message}{hint}", response.status)


async def _request(client: Client, method: str, path: str, body: bytes = b"") -> Response | OSError:
    try:
        return await client.request(method, path, body)
    except OSError as e:
        return e


async def _get(client: Client, path: str) -> Any:
    return json.loads(_checked(await _request(client, "GET", path)).body)


async def _models(client: Client) -> dict[str, int | None]:
    """The names that the server lists, with the sizes of their vocabularies (llama.cpp gives them)."""
    try:
        listed = (await _get(client, "/v1/models"))["data"]
        return {model["id"]: (model.get("meta") or {}).get("n_vocab") for model in listed}
    except AnswerError as e:
        if e.status in (None, 401, 403):
            raise
    except _UNEXPECTED:
        pass
    return {}


async def _vocab_size(client: Client) -> int | None:
    """What llamajax's server says of its vocabulary."""
    with suppress(AnswerError, *_UNEXPECTED):
        return int((await _get(client, "/tokenizer_info"))["vocab_size"])
    return None
