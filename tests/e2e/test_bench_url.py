"""`llamajax bench --url` against a server whose answers and their times are known."""

import csv
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from llamajax.bench.remote import WORDS
from llamajax.bench.workload import synthetic
from llamajax.types import SamplingParams

from .command import Finished, run, start
from .openai_server import Body, Events, OpenAIServer, error, event, events
from .serving import serving, wait_for

GREEDY = ["--temperature", "0"]
TEXTS = [" a", " b", " c", " d", " e"]  # one token each
FIVE = {"prompt_tokens": 33, "completion_tokens": 5}


def bench(server: OpenAIServer, *options: str, **env: str) -> Finished:
    return run("bench", "--url", server.url, "-n", "5", "--requests", "6", *options, **env)


def test_figures_hold_what_the_server_waited() -> None:
    """All bounds hold on any machine: what was sent after a time was not read before it."""
    wait, between = 0.05, 0.02
    with OpenAIServer(lambda body: events(TEXTS, FIVE, wait, between)) as server:
        done = bench(server, *GREEDY, "--slots", "2", "--repeat", "2", "--prompt-len", "3:9", "--json")
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["model"], said["url"], said["prompts"]) == ("a-model", server.url, "token ids")
    [result] = said["results"]
    assert (result["name"], result["sampling"], result["requests"]) == ("remote", "greedy", 6)
    assert (result["tokens"], result["failed"], result["ended_early"], result["counted"]) == (30, 0, 0, True)
    assert result["prompt_tokens"] == {"median": 33, "low": 33, "high": 33}
    answer = wait + 4 * between
    assert result["seconds"]["low"] >= 3 * answer  # six answers, two at once
    assert result["tokens_per_second"]["high"] == pytest.approx(30 / result["seconds"]["low"])
    assert result["requests_per_second"]["low"] == pytest.approx(6 / result["seconds"]["high"])
    # Four of six waited for one answer or two before their own.
    assert result["time_to_first_token"]["p50"] >= answer + wait
    assert result["time_to_first_token"]["p99"] >= 1.5 * answer + wait
    assert result["latency"]["p50"] >= 2 * answer
    assert result["gaps"]["p99"] >= between and result["inter_token_latency"]["p99"] >= between
    assert result["client_busy"] > 0
    assert server.most_at_once == 2


def test_requests_are_what_was_asked_for() -> None:
    with OpenAIServer(lambda body: events(TEXTS, FIVE)) as server:
        done = bench(server, "--repeat", "2", "--prompt-len", "3:9", "-m", "another")
    assert done.code == 0, done.stderr
    assert len(server.bodies) == 2 * (1 + 2 * 6)
    ours = {"model": "another", "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    for body in server.bodies:
        assert body | ours | {"ignore_eos": True} == body
        assert 3 <= len(body["prompt"]) <= 9 and all(0 <= i < 100 for i in body["prompt"])
    drawn = Counter((body["temperature"], body["top_p"]) for body in server.bodies)
    assert list(drawn.values()) == [13, 13] and list(drawn)[1] == (0.6, 0.9)
    # The same lengths in each run, but no prompt again, which the server could have in a cache.
    assert len({str(body["prompt"]) for body in server.bodies}) == len(server.bodies)
    lengths = [len(body["prompt"]) for body in server.bodies]
    assert sorted(lengths[1:7]) == sorted(lengths[7:13]) == sorted(lengths[14:20])


def test_requests_arrive_as_a_poisson_process() -> None:
    with OpenAIServer(lambda body: events(TEXTS, FIVE)) as server:
        done = bench(server, *GREEDY, "--repeat", "1", "--arrival", "poisson:20", "--json")
    work = synthetic(6, [32], 5, vocab_size=100, rate=20, sampling=SamplingParams(temperature=0), seed=42)
    [result] = json.loads(done.stdout)["results"]
    assert result["seconds"]["low"] >= work.arrivals[-1] > 0.1


def test_the_table_and_csv(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    with OpenAIServer(lambda body: events(TEXTS, FIVE, between=0.001)) as server:
        done = bench(server, "--repeat", "2", "--csv", str(file))
    assert done.code == 0, done.stderr
    about, *tables = done.stdout.strip().split("\n\n")
    assert about == f"a-model, at {server.url}; prompts are token ids; medians of 2"
    assert [table.splitlines()[0] for table in tables] == [
        "6 requests, greedy",
        "6 requests, temperature 0.6, top-p 0.9 (default)",
    ]
    for table in tables:
        rows = dict(re.split(r"  +", line, maxsplit=1) for line in table.splitlines()[2:])
        figures = [f"{name} p50/95/99, ms" for name in ("TTFT", "E2E", "TPOT", "ITL", "gaps")]
        others = ["prompt tokens", "failed", "ended early", "client busy"]
        assert list(rows) == ["time, s", "requests/s", "tokens/s", *figures, *others]
        assert (rows["prompt tokens"], rows["failed"], rows["ended early"]) == ("33 (33-33)", "0 of 12", "0 of 12")
    assert server.url in done.stderr
    with file.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["name"], row["tokens"], row["failed"]) for row in rows] == [("remote", "30", "0")] * 2


def test_tokens_are_counted_by_the_server() -> None:
    """Two events of 20 tokens; of what it says, not of what was asked."""
    with OpenAIServer(lambda body: events([" a b c", " d"], {"prompt_tokens": 1, "completion_tokens": 20})) as server:
        done = bench(server, *GREEDY, "-n", "20", "--json")
    [result] = json.loads(done.stdout)["results"]
    assert (result["tokens"], result["ended_early"], result["counted"]) == (120, 0, True)


def refusing(body: Body) -> Events | Response:
    """Knows neither token ids as prompts nor any field that OpenAI did not have at first."""
    if not isinstance(body["prompt"], str):
        return JSONResponse({"detail": "prompt must be a string"}, 422)
    if unknown := {"ignore_eos", "stream_options"} & body.keys():
        return error(400, f"unknown: {unknown}")
    return events(TEXTS)


@pytest.mark.parametrize("vocab_size", [100, None])
def test_a_server_that_knows_little(vocab_size: int | None) -> None:
    with OpenAIServer(refusing, vocab_size=vocab_size) as server:
        done = bench(server, *GREEDY, "--repeat", "1")
    assert done.code == 0, done.stderr
    assert "prompts are texts" in done.stdout
    assert re.search(r"tokens counted by +events\n", done.stdout)
    taken = [body["prompt"].split() for body in server.bodies[-6:]]
    assert all(len(words) == 32 and set(words) <= set(WORDS) for words in taken)


def test_ids_stay_ids_if_only_a_field_is_refused() -> None:
    def answer(body: Body) -> Events | Response:
        return error(400, "unknown") if "ignore_eos" in body else events(TEXTS, FIVE)

    with OpenAIServer(answer) as server:
        done = bench(server, *GREEDY, "--json")
    said = json.loads(done.stdout)
    assert (said["prompts"], said["ignore_eos"], said["results"][0]["counted"]) == ("token ids", False, True)


def test_the_size_of_the_vocabulary_in_the_list_of_models() -> None:
    models = [{"id": "other", "meta": {"n_vocab": 10**6}}, {"id": "a-model", "meta": {"n_vocab": 7}}]
    with OpenAIServer(lambda body: events(TEXTS, FIVE), models=models, vocab_size=None) as server:
        bench(server, *GREEDY, "-m", "a-model")
    assert {i for body in server.bodies for i in body["prompt"]} == set(range(7))


async def broken(body: Body) -> Events:
    yield event(" a")
    yield b'data: {"error": {"message": "out of\\nluck"}}\n\n'


async def cut(body: Body) -> Events:
    yield event(" a")
    yield event(" b")


async def aborted(body: Body) -> Events:
    yield event(" a")
    raise ConnectionError


class Every:
    """Answers every third measured request in another way."""

    def __init__(self, other: Callable[[Body], Events | Response]) -> None:
        self.asked, self.other = 0, other

    def __call__(self, body: Body) -> Events | Response:
        self.asked += 1
        return self.other(body) if self.asked % 3 == 2 else events(TEXTS, FIVE)


FAILURES = [
    (broken, "the stream ended with an error: out of luck"),
    (cut, "the stream ended without [DONE]"),
    (aborted, "the server hung up before the answer had ended"),
    (lambda body: error(429, "too many"), "the server answered 429: too many"),
    (lambda body: error(503, "full"), "the server answered 503: full"),
    (lambda body: events([], {"completion_tokens": 0}), "the answer has no tokens"),
    (lambda body: JSONResponse({"choices": []}), "expected a stream of events, found application/json"),
]


@pytest.mark.parametrize(("other", "says"), FAILURES)
def test_failed_requests_are_counted_and_measured_in_no_figure(
    other: Callable[[Body], Events | Response], says: str
) -> None:
    with OpenAIServer(Every(other)) as server:
        done = bench(server, *GREEDY, "--repeat", "1", "--json")
    assert done.code == 1
    [result] = json.loads(done.stdout)["results"]
    assert (result["failed"], result["tokens"]) == (2, 20)
    assert result["requests_per_second"]["median"] == pytest.approx(4 / result["seconds"]["median"])
    assert any(line.startswith("(2 of 6 requests failed: ") and says in line for line in done.notes), done.stderr


@pytest.mark.parametrize(("other", "says"), FAILURES)
def test_a_server_that_answers_nothing(other: Callable[[Body], Events | Response], says: str) -> None:
    with OpenAIServer(other) as server:
        done = bench(server, *GREEDY)
    assert done.code == 1 and says in done.error


def test_all_requests_fail() -> None:
    asked: list[Body] = []

    def answer(body: Body) -> Events | Response:
        asked.append(body)
        return events(TEXTS, FIVE) if len(asked) == 1 else error(429, "too many")

    with OpenAIServer(answer) as server:
        done = bench(server, *GREEDY, "--repeat", "1")
    assert done.code == 1 and done.stdout == ""
    assert done.notes[-1] == "llamajax: all 6 requests failed: the server answered 429: too many"


def test_answers_that_end_early_are_told() -> None:
    with OpenAIServer(Every(lambda body: events([" a", " b"], {"completion_tokens": 2}))) as server:
        done = bench(server, *GREEDY, "--repeat", "1", "--json")
    assert done.code == 0
    [result] = json.loads(done.stdout)["results"]
    assert (result["ended_early"], result["failed"], result["tokens"]) == (2, 0, 4 * 5 + 2 * 2)
    assert any("2 of 6 answers" in line and "ended early" in line for line in done.notes)


@pytest.mark.parametrize("options", [{"OPENAI_API_KEY": "secret"}, {}])
def test_the_key(options: dict[str, str]) -> None:
    with OpenAIServer(lambda body: events(TEXTS, FIVE)) as server:
        given = [] if options else ["--api-key", "secret"]
        assert bench(server, *GREEDY, *given, **options).code == 0
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("models", "answer", "options", "says"),
    [
        (error(401, "no key"), events, [], "401: no key; give the server's API key"),
        (error(404, "what?"), events, [], "/v1/models lists no models: name the one to ask for"),
        ([], events, [], "lists no models"),
        (PlainTextResponse("hello"), events, [], "lists no models"),
        (error(500, "what?"), lambda body: error(400, "the prompt is too long"), ["-m", "x"], "400: the prompt is too"),
        ([{"id": "a"}, {"id": "b"}], lambda body: error(404, "no x"), ["-m", "x"], "404: no x; its models are a, b"),
        ([{"id": "a"}], lambda body: PlainTextResponse("oh\nno", 502), [], "the server answered 502: oh no"),
    ],
)
def test_one_line_says_what_is_wrong(models: Any, answer: Any, options: list[str], says: str) -> None:
    with OpenAIServer(answer, models=models) as server:
        done = bench(server, *options)
    assert done.code == 1 and says in done.error


@pytest.mark.parametrize(
    ("health", "says"),
    [
        (JSONResponse({"status": "compiling 2 of 9"}, 503), "the server answered 503: compiling 2 of 9"),
        (error(503, "Loading model"), "the server answered 503: Loading model"),
        (error(404, "what?"), None),
    ],
)
def test_a_server_that_is_not_ready(health: Response, says: str | None) -> None:
    with OpenAIServer(lambda body: events(TEXTS, FIVE), health=health) as server:
        done = bench(server, *GREEDY, "--repeat", "1")
    assert done.code == (1 if says else 0)
    assert says is None or says in done.error


def test_no_server() -> None:
    with OpenAIServer(lambda body: events(TEXTS)) as server:
        pass
    done = bench(server)
    assert done.code == 1 and f"cannot connect to {server.url}" in done.error


@pytest.mark.parametrize("suffix", ["/", "/v1", "/v1/"])
def test_an_address_with_or_without_v1(suffix: str) -> None:
    with OpenAIServer(lambda body: events(TEXTS, FIVE)) as server:
        done = run("bench", "--url", server.url + suffix, *GREEDY, "--requests", "1", "-n", "5")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["localhost:8000"], "--url"),
        (["ftp://localhost"], "--url"),
        (["http://"], "--url"),
        (["http://a:b"], "--url"),
        (["http://[a"], "--url"),
        (["http://a/?b=c"], "--url"),
        (["http://name:word@a"], "--url"),
        (["http://a", "--pp", "5"], "leave out --pp"),
        (["http://a", "--tg", "5"], "leave out --tg"),
        (["http://a", "--batch", "1"], "leave out --batch"),
        (["http://a", "-d", "1"], "leave out --depth/-d"),
        (["http://a", "--mode", "all"], "leave out --mode"),
        (["http://a", "--plot", "a.png"], "leave out --plot"),
        (["http://a", "--random-weights", "llama3.2-1b"], "leave out --random-weights"),
        (["http://a", "--dtype", "int8"], "leave out --dtype/--quantize"),
        (["http://a", "--device", "cpu"], "leave out --device"),
        (["http://a", "--max-seq-len", "64"], "leave out --max-seq-len"),
        (["http://a", "--threads", "1"], "leave out --threads"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str) -> None:
    done = run("bench", "--url", *arguments)
    assert done.code == 2
    assert says in done.error and "see 'llamajax bench --help'" in done.error


def test_a_key_without_a_server() -> None:
    done = run("bench", "--api-key", "x")
    assert done.code == 2 and "--api-key" in done.error


def test_ctrl_c_hangs_up() -> None:
    with OpenAIServer(lambda body: events(TEXTS, FIVE, between=60)) as server:
        process = start("bench", "--url", server.url)
        while not server.most_at_once:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
        assert (process.returncode, stdout, stderr) == (130, b"", b"")
        assert server.hung_up.wait(10)


def test_our_own_server(shallow_model: str) -> None:
    """More requests at once than it has slots; each sampling, ids below its vocabulary, answers of full length."""
    with serving(shallow_model, "--api-key", "secret") as (_, client):
        url = str(client.base_url)
        wait_for(client, "ready")
        with_key = ["bench", "--url", url, "--api-key", "secret"]
        done = run(*with_key, "-n", "20", "--repeat", "2", "--prompt-len", "3:60", "--json")
        assert "401" in run("bench", "--url", url).error
        too_long = run(*with_key, "--prompt-len", "600").error
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["prompts"], said["ignore_eos"], said["model"]) == ("token ids", True, Path(shallow_model).stem)
    for result in said["results"]:
        assert (result["requests"], result["tokens"], result["counted"]) == (10, 200, True)
        assert (result["failed"], result["ended_early"]) == (0, 0)
        assert 3 <= result["prompt_tokens"]["low"] < result["prompt_tokens"]["high"] <= 60
        assert 0 < result["time_to_first_token"]["p50"] < result["latency"]["p50"] < result["seconds"]["high"]
    assert "the server answered 400" in too_long and "600" in too_long
