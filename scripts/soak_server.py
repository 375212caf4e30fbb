"""Asks a server many things at once, hangs up, sends nonsense and reads slowly: all else must be answered as alone.

    pip install '.[dev]'
    python -m scripts.soak_server --requests 20000 [--hang-ups 200] [--seed 0]

Starts `llamajax serve` with a tiny model. Some 200 distinct requests (chats, completions, responses; streamed or not;
several choices and prompts, echo, log-probabilities, stop strings) are first answered by the library, alone. Then they
are sent in a random order, `--in-flight` at a time: some are cancelled at a random moment, some are bad, some are read
slowly. Every whole answer must be the one that the library gave: its text, its log-probabilities, its counts. In the
end nothing may run or wait, and the counters must say that each request ended once. No program may have been compiled
late, and memory after the first tenth must not grow by more than `--growth` MB.

Then all slots are filled again and again with clients that hang up, half of them in plain requests, and the time is
taken until all rows are free. Exit code 1 if anything was wrong.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

from llamajax import LLM, load
from llamajax.types import Completion

from .served import CONTEXT, Client, Connection, Reply, Served, Watch, choose

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SHARES = {"whole": 0.65, "cancelled": 0.2, "bad": 0.1, "slow": 0.05}
SLOTS = 8


class Asked(NamedTuple):
    """A request, and what its answer must be.

    Attributes:
      num_choices: of all its prompts.
      view: what `view_of` makes of its answer.
      usage: tokens of its prompts and of its answers.
    """

    url: str
    body: dict[str, Any]
    num_choices: int
    view: list[tuple[Any, ...]]
    usage: tuple[int, int]


def draw_options(rng: random.Random) -> dict[str, Any]:
    """Options by the names of the library; those of the protocol are the same but for the length."""
    options: dict[str, Any] = {
        "max_new_tokens": rng.choice([1, 2, 5, 16, 17, 30, 60]),
        "temperature": rng.choice([0, 0.5, 1, 1.5]),
        "seed": rng.randrange(2**40),
    }
    for name, values in {
        "top_p": [0.5, 0.9], "top_k": [1, 5, 40], "min_p": [0.05], "repetition_penalty": [1.2],
        "presence_penalty": [0.5], "stop": ["e", ["ab", "x", "Q"]], "min_tokens": [1], "ignore_eos": [True],
        "logit_bias": [{"70": 5, "71": -100}],
    }.items():  # fmt: skip
        if rng.random() < 0.2:
            options[name] = rng.choice(values)
    return options


def draw(llm: LLM, rng: random.Random, number: int) -> Asked:
    """A request, answered by the library alone."""
    url = choose(rng, {CHAT: 0.4, COMPLETIONS: 0.5, RESPONSES: 0.1})
    options = draw_options(rng)
    text = f"Request {number}: " + "abHi " * rng.choice([0, 1, 5, 15])
    body = {("max_tokens" if name == "max_new_tokens" else name): value for name, value in options.items()}
    n = 1 if url == RESPONSES else rng.choice([1, 1, 1, 2, 3])
    num_top = None if url == RESPONSES else rng.choice([None, None, 0, 3])
    echo = url == COMPLETIONS and rng.random() < 0.3
    if url == COMPLETIONS:
        prompts: list[Any] = [text, f"And {number}", llm.tokenizer.encode(text)][: rng.choice([1, 1, 3])]
        if len(prompts) > 1 or rng.random() < 0.3:
            prompts = [it if isinstance(it, list) else llm.tokenizer.encode(it) for it in prompts]
        body |= {"prompt": prompts if len(prompts) > 1 else prompts[0], "n": n, "echo": echo, "logprobs": num_top}
    else:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        prompts = [messages[rng.randrange(2) :]]
        if url == CHAT:
            body |= {"messages": prompts[0], "n": n}
            body |= {} if num_top is None else {"logprobs": True, "top_logprobs": num_top}
        else:
            body |= {"input": prompts[0], "max_output_tokens": body.pop("max_tokens")}
    if "logit_bias" in options:
        options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
    view, read, drawn = [], 0, 0
    for prompt in prompts:
        for i in range(n):
            answer = llm.generate(prompt, **{**options, "seed": options["seed"] + i, "logprobs": num_top})
            read += answer.prompt_tokens * (i == 0)
            drawn += len(answer.token_ids)
            view.append(_expected(llm, url, answer, prompt if echo else None, num_top))
    return Asked(url, body, len(view), view, (read, drawn))


def _expected(llm: LLM, url: str, answer: Completion, echoed: Any, num_top: int | None) -> tuple[Any, ...]:
    text, scores = answer.text, list(answer.logprobs or ())
    if echoed is not None:
        ids = echoed if isinstance(echoed, list) else llm.tokenizer.encode(echoed)
        text = (llm.tokenizer.decode(ids) if isinstance(echoed, list) else echoed) + text
        if num_top is not None:
            scores = [*llm.prompt_logprobs(ids, num_top), *scores]
    if url == RESPONSES:
        return text, "incomplete" if answer.finish_reason == "length" else "completed"
    logprobs = None if num_top is None else [score and score.logprob for score in scores]
    return text, answer.finish_reason, logprobs


async def send(connection: Connection, asked: Asked, streams: bool) -> None:
    body = {**asked.body, "stream": streams}
    if streams and asked.url != RESPONSES:
        body["stream_options"] = {"include_usage": True}
    await connection.post(asked.url, json.dumps(body).encode())


def check(asked: Asked, reply: Reply, streams: bool) -> None:
    """Fails unless the answer is the one that the library gave."""
    assert reply.status == 200, reply
    found = view_of(asked, reply, streams)
    assert found == (asked.view, asked.usage), f"{asked}: got {found}"


def view_of(asked: Asked, reply: Reply, streams: bool) -> tuple[list[tuple[Any, ...]], tuple[int, int]]:
    """The choices of an answer (text, why it ended, log-probabilities), and the tokens that it counts."""
    if not streams:
        body = json.loads(reply.body)
        usage = body["usage"]
        parts = body["choices"] if asked.url != RESPONSES else []
    else:
        events = [line[6:] for line in reply.body.decode().split("\n") if line.startswith("data: ")]
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
        assert all("error" not in chunk or chunk["error"] is None for chunk in chunks), chunks[-1]
        if asked.url == RESPONSES:
            body = chunks[-1]["response"]
            joined = "".join(it["delta"] for it in chunks if it["type"] == "response.output_text.delta")
            assert joined == body["output"][0]["content"][0]["text"]
            usage, parts = body["usage"], []
        else:
            assert events[-1] == "[DONE]"
            usage = chunks[-1]["usage"]
            parts = [part for chunk in chunks for part in chunk["choices"]]
    if asked.url == RESPONSES:
        view: list[tuple[Any, ...]] = [(body["output"][0]["content"][0]["text"], body["status"])]
        return view, (usage["input_tokens"], usage["output_tokens"])
    view = []
    for index in range(asked.num_choices):
        mine = [part for part in parts if part["index"] == index]
        said = [part.get("delta") or part.get("message") or part for part in mine]
        text = "".join((it.get("content") if asked.url == CHAT else it.get("text")) or "" for it in said)
        [reason] = [part["finish_reason"] for part in mine if part["finish_reason"]]
        view.append((text, reason, _logprobs(mine)))
    return view, (usage["prompt_tokens"], usage["completion_tokens"])


def _logprobs(parts: list[dict[str, Any]]) -> list[float | None] | None:
    given = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    if not given:
        return None
    return [
        value
        for it in given
        for value in ([entry["logprob"] for entry in it["content"]] if "content" in it else it["token_logprobs"])
    ]


BAD: list[tuple[str, bytes, int]] = [
    (CHAT, b"", 400),
    (CHAT, b'{"messages": [', 400),
    (CHAT, b'{"messages": [], "temperature": 1e999}', 400),
    (CHAT, json.dumps({"messages": [{"role": "user", "content": "Hi"}], "model": "other"}).encode(), 404),
    (CHAT, json.dumps({"messages": [{"role": "user", "content": "Hi"}], "top_p": 7}).encode(), 400),
    (CHAT, json.dumps({"messages": [{"role": "user", "content": "Hi"}], "tools": [{}]}).encode(), 400),
    (COMPLETIONS, json.dumps({"prompt": "Hi " * CONTEXT}).encode(), 400),
    # All but one of them are good, and must not go on without it.
    (COMPLETIONS, json.dumps({"prompt": [*["Hi"] * 5, "Hi " * CONTEXT], "max_tokens": 200}).encode(), 400),
    (COMPLETIONS, json.dumps({"prompt": [["Hi"]]}).encode(), 400),
    (RESPONSES, json.dumps({"input": [{"type": "item_reference"}]}).encode(), 400),
    ("/v1/nothing", b"{}", 404),
    ("/health", b"{}", 405),
]


class Soak:
    """The clients, what they saw, and how much of it must be in the counters of the server."""

    def __init__(self, served: Served, pool: list[Asked], num_requests: int, seed: int) -> None:
        self.failures: list[str] = []
        self.seen: Counter[str] = Counter()
        self.answered = 0  # choices: the server must have counted them
        self.cancelled = 0  # may have been counted
        self.watch = Watch(served)
        self._served = served
        self._pool = pool
        self._left = iter(range(num_requests))
        self._num_requests = num_requests
        self._seed = seed

    async def run(self, in_flight: int) -> None:
        await asyncio.gather(*(self._client() for _ in range(in_flight)))

    async def _client(self) -> None:
        connection: Connection | None = None
        for number in self._left:
            rng = random.Random(f"{self._seed} {number}")
            kind = choose(rng, SHARES)
            if connection is None or connection.reader.at_eof():
                connection = await self._served.connect(4096 if kind == "slow" else None)
            try:
                stays = await asyncio.wait_for(self._ask(connection, kind, rng), 120)
            except Exception as error:
                stays = False
                self.failures.append(f"request {number}, {kind}: {type(error).__name__}: {error!s:.300}")
                print(self.failures[-1], file=sys.stderr, flush=True)
            if not stays:
                connection.close()
                connection = None
            if number % max(self._num_requests // 100, 1) == 0:
                await self.watch.look(number / self._num_requests)

    async def _ask(self, connection: Connection, kind: str, rng: random.Random) -> bool:
        """Sends a request and judges what comes. Returns whether the connection can be used again."""
        if kind == "bad":
            url, data, status = rng.choice(BAD)
            await connection.post(url, data)
            reply = await connection.reply()
            assert (reply.status, bool(reply.error)) == (status, True), (reply, status)
            self.seen["bad"] += 1
            self.cancelled += 5  # those before the bad one
            return True
        asked, streams = rng.choice(self._pool), rng.random() < 0.5
        await send(connection, asked, streams)
        if kind == "cancelled":
            if rng.random() < 0.3:
                await connection.reader.read(1)
            await asyncio.sleep(rng.choice([0, 0.001, 0.01, 0.05, 0.2]) * rng.random())
            self.seen[f"cancelled {'in a stream' if streams else 'in a plain request'}"] += 1
            self.cancelled += asked.num_choices
            return False
        if kind == "slow":
            await asyncio.sleep(rng.random() * rng.choice([0.01, 0.1, 1]))
        check(asked, await connection.reply(pause=rng.random() * 0.02 if kind == "slow" else 0), streams)
        self.seen[f"{kind} {'stream' if streams else 'answer'}, as alone"] += 1
        self.answered += asked.num_choices
        return kind == "whole"


async def check_counters(served: Served, soak: Soak) -> list[str]:
    """What the server's counters say that cannot be."""
    await served.wait_until(is_idle=True, seconds=10)
    found = await served.metrics()
    ended = sum(value for name, value in found.items() if name.startswith("vllm:request_success_total"))
    whole = ended - found.get('vllm:request_success_total{finished_reason="abort"}', 0)
    least, most = soak.answered, soak.answered + soak.cancelled
    print(f"{ended:.0f} answers ended, {whole:.0f} of them whole; {least} were received whole")
    wrong = []
    if not least <= whole <= ended <= most:
        wrong.append(f"requests that ended must be from {least} to {most}")
    return wrong


async def hang_up(served: Client, count: int, rng: random.Random) -> list[float]:
    """Fills all slots with clients that go away. Returns the seconds from each last one to when all rows were free."""

    async def client(number: int) -> None:
        body = {
            "prompt": f"{number}",
            "max_tokens": CONTEXT - 10,
            "ignore_eos": True,
            "n": 4,
            "stream": number % 2 == 0,
        }
        connection = await served.connect()
        await connection.post(COMPLETIONS, json.dumps(body).encode())
        await asyncio.sleep(rng.random() * 0.1)
        connection.close()

    seconds = []
    for first in range(0, count, SLOTS):
        await asyncio.gather(*(client(first + i) for i in range(SLOTS)))
        seconds.append(await served.wait_until(is_idle=True, seconds=30))
    return sorted(seconds)


async def soak(served: Served, arguments: argparse.Namespace) -> list[str]:
    await served.wait_until(is_idle=False, seconds=600)
    llm = load(served.model)
    rng = random.Random(arguments.seed)
    pool = [draw(llm, rng, number) for number in range(arguments.pool)]
    print(f"{len(pool)} requests answered alone", file=sys.stderr)
    began = time.monotonic()
    it = Soak(served, pool, arguments.requests, arguments.seed)
    await it.run(arguments.in_flight)
    wrong = it.failures
    for name, number in sorted(it.seen.items()):
        print(f"{number:8} {name}")
    took = time.monotonic() - began
    print(f"{arguments.requests} requests in {took:.0f} s")
    wrong += await check_counters(served, it)
    if arguments.hang_ups:
        seconds = await hang_up(served, arguments.hang_ups, rng)
        print(f"{arguments.hang_ups} hang-ups: rows were free after {seconds[len(seconds) // 2] * 1000:.0f} ms "
              f"(median), {seconds[-1] * 1000:.0f} ms at most")  # fmt: skip
    await asyncio.sleep(1)
    return wrong + await it.watch.wrong(arguments.growth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="how many")
    parser.add_argument("--in-flight", type=int, default=64, help="how many at a time")
    parser.add_argument("--pool", type=int, default=200, help="how many of them are distinct")
    parser.add_argument("--hang-ups", type=int, default=200, help="clients that go away, after that")
    parser.add_argument("--growth", type=float, default=16, help="MB that memory may grow by after the first tenth")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with Served("--slots", str(SLOTS), "--max-waiting", "2000") as served:
        wrong = asyncio.run(soak(served, arguments))
    print("\n".join(wrong) or "nothing was wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
