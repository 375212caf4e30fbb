"""LangChain, unchanged, against a server; README.md says how to start both.

pip install langchain-openai
python scripts/clients/with_langchain.py http://127.0.0.1:8123
"""

import asyncio
import sys

import checks
import httpx
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

url, key = (*sys.argv[1:], "secret")[:2]
name = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"][0]["id"]
options = {"model": name, "base_url": f"{url}/v1", "api_key": key, "max_tokens": 20, "seed": 7, "max_retries": 0}
chat = ChatOpenAI(**options, stream_usage=True)
messages = [SystemMessage("You tell short stories."), HumanMessage("Tell me a story about a llama.")]


def answer() -> None:
    message = chat.invoke(messages)
    assert message.content
    assert message.usage_metadata["output_tokens"] <= 20
    assert message.response_metadata["finish_reason"] in ("stop", "length")


def stream() -> None:
    whole, *rest = chat.stream(messages)
    for chunk in rest:
        whole += chunk
    message = chat.invoke(messages)
    assert whole.content == message.content
    assert whole.usage_metadata["total_tokens"] == message.usage_metadata["total_tokens"]


def conversation() -> None:
    assert chat.invoke([*messages, AIMessage("Once."), HumanMessage("Go on.")]).content


def chain_and_batch() -> None:
    chain = ChatPromptTemplate.from_template("Tell me about {animal}.") | chat | StrOutputParser()
    animals = [{"animal": animal} for animal in ("llamas", "yaks", "bees", "eels")]
    assert chain.batch(animals) == [chain.invoke(animal) for animal in animals]


def events_from_a_loop() -> None:
    async def ask() -> str:
        return "".join([str(chunk.content) async for chunk in chat.astream(messages)])

    assert asyncio.run(ask()) == chat.invoke(messages).content


def token_logprobs() -> None:
    message = chat.bind(logprobs=True, top_logprobs=2).invoke(messages)
    assert all(len(token["top_logprobs"]) == 2 for token in message.response_metadata["logprobs"]["content"])


def responses_api() -> None:
    asked = {name: value for name, value in options.items() if name != "seed"}
    message = ChatOpenAI(**asked, temperature=0, use_responses_api=True).invoke(messages)
    assert message.text


def completion() -> None:
    model = OpenAI(**options)
    assert "".join(model.stream("Once upon a time")) == model.invoke("Once upon a time")


checks.run(answer, stream, conversation, chain_and_batch, events_from_a_loop, token_logprobs, responses_api, completion)
