"""A server of the default model: many threads, event loops, and clients that go away."""

import asyncio
import gc
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llamajax import LLM, PromptTooLongError, QueueFullError, RequestError, Server, load

PROMPTS = ["Once upon a time", "The capital of France is", "1, 2, 3,", "def f(x):", "Dear Sir or Madam,"]


@pytest.fixture(scope="module")
def llama(default_model: None) -> LLM:
    return load(max_seq_len=512)  # quantized weights: its answers do not depend on the rows beside them


@pytest.fixture
def server(llama: LLM) -> Iterator[Server]:
    with llama.serve_requests(slots=8, max_waiting=300) as server:
        yield server


def options(number: int) -> dict[str, float]:
    return {"max_new_tokens": 3 + number % 9, "temperature": number % 2, "seed": number}


def test_a_stream_gives_the_text_in_pieces(llama: LLM, server: Server) -> None:
    stream = server.submit(PROMPTS[0], max_new_tokens=20, temperature=0, logprobs=1)
    pieces = list(stream)
    alone = llama.generate(PROMPTS[0], max_new_tokens=20, temperature=0, logprobs=1)
    assert "".join(pieces) == stream.completion.text == alone.text
    assert len(pieces) > 2
    assert (stream.completion.token_ids, stream.completion.logprobs) == (alone.token_ids, alone.logprobs)
    for times in (stream.completion.timings.token_times, alone.timings.token_times):
        assert len(times) == 20 and sorted(times) == list(times) and 0 < times[0] < times[1]
    assert (
        server.submit(PROMPTS[0], max_new_tokens=20, temperature=0, stop=alone.text[20:24]).finish().text
        == (alone.text[: alone.text.index(alone.text[20:24])])
    )


def test_several_answers_are_read_once(llama: LLM, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = {"max_new_tokens": 8, "temperature": 1, "stop": "e", "regex": "(?s:.*)"}
    alone = [llama.generate(PROMPTS[0], seed=seed, **asked).text for seed in (5, -1, 5)]
    encoded = list[str]()
    encode = llama.tokenizer.encode

    def noted(text: str) -> list[int]:
        encoded.append(text)
        return encode(text)

    monkeypatch.setattr(llama.tokenizer, "encode", noted)
    streams = list(server.submit_each(PROMPTS[0], (5, -1, 5), **asked))
    assert [stream.finish().text for stream in streams] == alone
    assert encoded == [PROMPTS[0]]


def test_two_hundred_requests_of_sixteen_threads(llama: LLM, server: Server) -> None:
    alone = {n: llama.generate(PROMPTS[n % 5], **options(n)) for n in range(10)}
    outcomes: list[str] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        for _ in range(200 // 16 + 1):
            n = rng.randrange(10)
            stream = server.submit(PROMPTS[n % 5], **options(n))
            if rng.random() < 0.3:
                for _ in range(rng.randrange(3)):
                    next(stream, None)
                stream.cancel()
            completion = stream.finish()
            assert completion.token_ids == alone[n].token_ids[: len(completion.token_ids)]
            if completion.finish_reason != "cancelled":
                assert completion.text == alone[n].text
            outcomes.append(completion.finish_reason)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(outcomes) == 16 * 13
    assert {"length", "cancelled"} <= set(outcomes)


def test_an_event_loop_is_not_blocked(server: Server) -> None:
    async def ask(number: int) -> str:
        return "".join([piece async for piece in server.submit(PROMPTS[number % 5], **options(number))])

    async def main() -> tuple[list[str], int]:
        answers = asyncio.gather(*(ask(number) for number in range(20)))
        ticks = 0
        while not answers.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await answers, ticks

    texts, ticks = asyncio.run(main())
    assert texts == [server.submit(PROMPTS[n % 5], **options(n)).finish().text for n in range(20)]
    assert ticks > 5


@pytest.mark.parametrize("readers", [2, 5])
def test_all_readers_of_one_stream_end(server: Server, readers: int) -> None:
    async def main() -> tuple[list[str], str]:
        stream = server.submit(PROMPTS[0], max_new_tokens=30, temperature=0)

        async def read() -> list[str]:
            return [piece async for piece in stream]

        async with asyncio.timeout(60):
            parts = await asyncio.gather(*(read() for _ in range(readers)))
        return [piece for part in parts for piece in part], stream.completion.text

    pieces, text = asyncio.run(main())
    assert sorted("".join(pieces)) == sorted(text) and text


def test_a_cancelled_task_cancels_its_request(server: Server) -> None:
    async def main() -> str:
        stream = server.submit(PROMPTS[0], max_new_tokens=450, temperature=0)

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return (await stream.finish_async()).finish_reason

    assert asyncio.run(main()) == "cancelled"


def test_a_stream_that_nobody_holds_is_cancelled(server: Server) -> None:
    stream = server.submit(PROMPTS[0], max_new_tokens=450, temperature=0)
    next(stream)
    del stream
    gc.collect()
    until = time.monotonic() + 30
    while server._engine.scheduler.num_jobs and time.monotonic() < until:
        time.sleep(0.01)
    assert server._engine.scheduler.num_jobs == 0


def test_a_deadline_keeps_what_there_is(server: Server) -> None:
    completion = server.submit(PROMPTS[0], max_new_tokens=450, temperature=0, deadline=1).finish()
    assert completion.finish_reason == "timeout" and 0 < len(completion.token_ids) < 450


def test_a_full_queue_refuses_or_waits(llama: LLM) -> None:
    with llama.serve_requests(slots=1, max_waiting=2) as server:
        held = [server.submit(PROMPTS[0], max_new_tokens=100)]
        next(held[0])
        held += [server.submit(PROMPTS[0], max_new_tokens=2) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            server.submit(PROMPTS[0])
        held[1].cancel()
        last = server.submit(PROMPTS[1], max_new_tokens=1, temperature=0, wait=True)
        assert last.finish().text == " Paris"


def test_an_answer_that_must_fit_ends_in_every_way(llama: LLM, server: Server) -> None:
    asked: Any = {"regex": "[a-z ]*", "temperature": 1, "ignore_eos": True, "max_new_tokens": 300}
    alone = llama.generate(PROMPTS[0], **asked)
    others = [server.submit(PROMPTS[1], max_new_tokens=40, seed=seed) for seed in range(4)]
    late = server.submit(PROMPTS[0], deadline=1, **asked)
    stopped = server.submit(PROMPTS[0], stop=alone.text[20:24], **asked)
    cancelled = server.submit(PROMPTS[0], **asked)
    next(cancelled)
    cancelled.cancel()
    for stream, reason in ((late, "timeout"), (stopped, "stop"), (cancelled, "cancelled")):
        completion = stream.finish()
        assert completion.finish_reason == reason
        assert alone.token_ids[: len(completion.token_ids)] == completion.token_ids
    for seed, stream in enumerate(others):
        assert stream.finish().text == llama.generate(PROMPTS[1], max_new_tokens=40, seed=seed).text


def test_leaving_cancels_what_is_not_finished(llama: LLM) -> None:
    with llama.serve_requests(slots=2) as server:
        streams = [server.submit(PROMPTS[0], max_new_tokens=450) for _ in range(5)]
        for _ in range(40):
            next(streams[0])
    assert [stream.finish().finish_reason for stream in streams] == ["cancelled"] * 5
    with pytest.raises(RequestError, match="closed"):
        server.submit(PROMPTS[0])
    server.close()


def test_bad_requests_are_refused_at_once(server: Server) -> None:
    with pytest.raises(RequestError, match="temperature"):
        server.submit(PROMPTS[0], temperature=-1)
    with pytest.raises(RequestError, match="deadline must be a number, not '5'"):
        server.submit(PROMPTS[0], deadline="5")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="unknown option 'deadlin': did you mean 'deadline'"):
        server.submit(PROMPTS[0], deadlin=5)  # type: ignore[call-arg]
    with pytest.raises(PromptTooLongError, match="context length is 512 tokens"):
        server.submit("word " * 600)


def test_it_tells_how_many_run_and_wait_and_the_room_they_take(llama: LLM) -> None:
    with llama.serve_requests(slots=2, max_waiting=10) as server:
        assert (server.is_alive, server.num_running, server.num_waiting, server.kv_usage) == (True, 0, 0, 0)
        streams = [server.submit(PROMPTS[0], max_new_tokens=300, ignore_eos=True) for _ in range(5)]
        next(streams[1])
        assert (server.num_running, server.num_waiting) == (2, 3)
        used = [server.kv_usage]
        for _ in range(40):
            next(streams[0])
        used.append(server.kv_usage)
        assert 0 < used[0] < used[1] < 1
        for stream in streams:
            stream.cancel()
            stream.finish()
        assert (server.num_running, server.num_waiting, server.kv_usage) == (0, 0, 0)
    assert not server.is_alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_thread_dies_says_so(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    with llama.serve_requests(slots=2) as server:
        running = server.submit(PROMPTS[0], max_new_tokens=300, ignore_eos=True)
        next(running)
        monkeypatch.setattr(server._engine, "step", die)
        assert running.finish().finish_reason == "cancelled"
        server._concurrent._thread.join(60)
        assert not server.is_alive
        with pytest.raises(RequestError, match="closed"):
            server.submit(PROMPTS[0])
