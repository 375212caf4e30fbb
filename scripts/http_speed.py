"""The speed of 32 streams over HTTP beside `generate_batch`, in turns, on the default model; their texts are compared.

`python -m scripts.http_speed [ROUNDS]`
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time

import llamajax
from llamajax.bench.http_client import Client, Response

from .served import COMMAND

STREAMS, TOKENS = 32, 200
PROMPTS = [f"{number} things to know about llamas:" for number in range(STREAMS)]


def batch(llm: llamajax.LLM) -> list[str]:
    answers = llm.generate_batch(
        PROMPTS, slots=STREAMS, max_new_tokens=TOKENS, temperature=1, seed=3, ignore_eos=True, raise_errors=True
    )
    return [answer.text for answer in answers]


async def ask(client: Client, prompt: str) -> Response:
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 1, "seed": 3, "ignore_eos": True, "stream": True}
    return await client.request("POST", "/v1/completions", json.dumps(body).encode())


async def over_http(client: Client) -> list[bytes]:
    return [answer.body for answer in await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS))]


def text_of(stream: bytes) -> str:
    events = [json.loads(event) for event in stream.decode().split("data: ")[1:-1]]
    return "".join(choice["text"] for event in events for choice in event["choices"])


async def measure(url: str, rounds: int) -> None:
    llm = llamajax.load()
    with Client(url, {}) as client:
        while (await client.request("GET", "/health")).status != 200:
            await asyncio.sleep(0.1)
        assert batch(llm) == [text_of(stream) for stream in await over_http(client)]
        pairs = []
        for _ in range(rounds):
            began = time.perf_counter()
            batch(llm)
            between = time.perf_counter()
            await over_http(client)
            pairs.append([STREAMS * TOKENS / taken for taken in (between - began, time.perf_counter() - between)])
            print("generate_batch {:.0f}, over HTTP {:.0f} tokens/s".format(*pairs[-1]), flush=True)
    alone, served = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(served / alone for alone, served in pairs)
    print(f"medians: {alone:.0f} and {served:.0f}; median of the rounds' ratios {ratio:.3f}")


def main(rounds: int) -> None:
    command = [COMMAND, "serve", "--slots", str(STREAMS), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        said = next(line for line in server.stderr if "http://" in line)
        try:
            asyncio.run(measure("http://" + said.split("http://")[1].split()[0].rstrip("/:"), rounds))
        finally:
            server.terminate()


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 9)
