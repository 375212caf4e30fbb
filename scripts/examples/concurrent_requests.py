"""Requests that come at any time and share the model: one, many from threads, cancelled ones, and a rush."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import llamajax

PROMPTS = ("Name three colours.", "What is a llama?", "Write a haiku about the sea.", "Count to ten.")


def messages(text: str) -> list[llamajax.Message]:
    return [{"role": "user", "content": text}]


def single(server: llamajax.Server) -> None:
    """One request. Its text comes as it is drawn, whether it is read or not."""
    for piece in server.submit(messages(PROMPTS[0]), max_new_tokens=24, temperature=0):
        print(piece, end="", flush=True)
    print()


def many(server: llamajax.Server) -> None:
    """Each client is a thread, which waits for its whole answer."""

    def ask(text: str) -> str:
        answer = server.submit(messages(text), max_new_tokens=24, temperature=0).finish()
        return f"{text}\n  {answer.text!r} [{answer.finish_reason}]"

    with ThreadPoolExecutor() as clients:
        print(*clients.map(ask, PROMPTS), sep="\n")


async def cancelled(server: llamajax.Server) -> None:
    """Each client is a task, which takes a few pieces and cancels the rest."""

    async def first_words(text: str) -> str:
        stream = server.submit(messages(text), max_new_tokens=400, temperature=0)
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == 3:
                stream.cancel()
        return "".join(pieces)

    print("first words:", await asyncio.gather(*map(first_words, PROMPTS)))


def stress(server: llamajax.Server) -> None:
    """Twice as many as there are slots, of all lengths, with a deadline; some are given up at once."""
    streams = [
        server.submit(PROMPTS[i % 4] * (1 + i % 3), max_new_tokens=5 + 5 * (i % 4), deadline=60, seed=i)
        for i in range(16)
    ]
    for stream in streams[::5]:
        stream.cancel()
    reasons = [stream.finish().finish_reason for stream in streams]
    print("sixteen under stress:", {reason: reasons.count(reason) for reason in set(reasons)})


llama = llamajax.load(max_seq_len=512)
with llama.serve_requests(slots=8) as server:
    single(server)
    many(server)
    asyncio.run(cancelled(server))
    stress(server)
