"""Requests that come at any time, from threads and from an event loop, and share the model token by token."""

import asyncio
import threading

import llamajax

PROMPTS = ("Name three colours.", "What is a llama?", "Write a haiku about the sea.", "Count to ten.")

llama = llamajax.load(max_seq_len=512)


def messages(text: str) -> list[llamajax.Message]:
    return [{"role": "user", "content": text}]


def ask(server: llamajax.Server, text: str) -> None:
    """One client thread: prints its answer when it is whole."""
    answer = server.submit(messages(text), max_new_tokens=24, temperature=0).finish()
    print(f"{text}\n  {answer.text!r} [{answer.finish_reason}]")


async def first_words(server: llamajax.Server, text: str, number: int) -> str:
    """One task: takes a few pieces, and cancels the rest."""
    stream = server.submit(messages(text), max_new_tokens=400, temperature=0)
    pieces = []
    async for piece in stream:
        pieces.append(piece)
        if len(pieces) == number:
            stream.cancel()
    return "".join(pieces)


async def many(server: llamajax.Server) -> list[str]:
    return await asyncio.gather(*(first_words(server, text, 3) for text in PROMPTS))


with llama.serve_requests(slots=8) as server:
    threads = [threading.Thread(target=ask, args=(server, text)) for text in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    print("first words:", asyncio.run(many(server)))

    # More than ten at once, of all lengths, some with a deadline, some given up.
    streams = [
        server.submit(PROMPTS[i % 4] * (1 + i % 3), max_new_tokens=5 + 5 * (i % 4), deadline=60, seed=i)
        for i in range(16)
    ]
    for stream in streams[::5]:
        stream.cancel()
    reasons = [stream.finish().finish_reason for stream in streams]
    print("sixteen under stress:", {reason: reasons.count(reason) for reason in set(reasons)})
