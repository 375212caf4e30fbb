"""A conversation with a model: its messages, the tokens they were made of, and what is forgotten when it is long."""

import atexit
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any, Unpack

from llamajax.errors import LlamaJaxError, RequestError
from llamajax.llm import LLM, Stream
from llamajax.options import AnswerOptions, new_token_limit
from llamajax.types import Message


class Conversation:
    """Messages back and forth. A new turn reads the last answer and the question: what was read before is shared.
    `read_ahead` reads the answer while the user reads it.

    When a question and the room for its answer no longer fit the context, the oldest exchanges are forgotten until
    the rest takes at most half of it; a system message stays.

    Attributes:
      forgotten: how many exchanges the last turn forgot.
    """

    def __init__(
        self, llm: LLM, system: str | None = None, *, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """`chat_template_kwargs` are what the template reads beside the messages, as in `LLM.stream`."""
        self.forgotten = 0
        self._llm = llm
        self._variables = chat_template_kwargs
        self._messages: list[Message] = []
        # Message index -> its own token ids, since encoding an answer's text again need not give them.
        self._answers: dict[int, tuple[int, ...]] = {}
        self._stream: Stream | None = None
        self._ahead: Stream | None = None
        self.restart(system)

    def restart(self, system: str | None = None, messages: Sequence[Message] = ()) -> None:
        """Begins again, with a system message or without, or with earlier messages."""
        self._end_reading_ahead()
        self._stream = None
        self._answers = {}
        self._messages = [{"role": "system", "content": system}] if system else []
        self._messages += messages

    @property
    def messages(self) -> list[Message]:
        """All that is remembered, oldest first; an answer as far as it has come.

        A question without any answer, since it was cancelled, counts for `ask_again` only.
        """
        return self._remembered()[0]

    def ask(self, question: str, *, max_new_tokens: int | None, **options: Unpack[AnswerOptions]) -> Stream:
        """Starts the answer to a question. Options as in `LLM.stream`.

        Raises PromptTooLongError if the question does not fit the context alone; the conversation is then as before.
        """
        messages, answers = self._remembered()
        return self._start([*messages, {"role": "user", "content": question}], answers, max_new_tokens, options)

    def ask_again(self, *, max_new_tokens: int | None, **options: Unpack[AnswerOptions]) -> Stream:
        """Starts another answer to the last question; the one there was is dropped.

        Raises RequestError if nothing was asked yet.
        """
        messages, answers = self._messages, self._answers
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            raise RequestError("nothing was asked yet")
        earlier = {i: ids for i, ids in answers.items() if i < asked[-1]}
        return self._start(messages[: asked[-1] + 1], earlier, max_new_tokens, options)

    def read_ahead(self) -> Thread | None:
        """Begins to read the last answer, in a thread, while nobody asks: the next turn then reads little more than its
        question. It ends this, and goes on from what was read.

        Returns the thread. None if there is nothing to read, or where prompts share nothing.
        """
        self._end_reading_ahead()
        messages, answers = self._remembered()
        if not self._llm.shares_prompts or not messages or messages[-1]["role"] != "assistant":
            return None
        with suppress(LlamaJaxError):  # too long, or refused by the template: the next turn will say so
            # What a template writes of a question depends on it, but not what it writes before.
            question: Message = {"role": "user", "content": "?"}
            self._ahead = self._llm.stream(
                [*messages, question], max_new_tokens=1, verbatim=answers, chat_template_kwargs=self._variables
            )
            thread = _Finishing(self._ahead)
            thread.start()
            return thread
        return None

    def _end_reading_ahead(self) -> None:
        if self._ahead:
            self._ahead.cancel()
        self._ahead = None

    def _start(
        self,
        messages: list[Message],
        answers: dict[int, tuple[int, ...]],
        max_new_tokens: int | None,
        options: AnswerOptions,
    ) -> Stream:
        limit = new_token_limit({"max_new_tokens": max_new_tokens}, self._llm.max_seq_len)
        room = min(limit, self._llm.max_seq_len // 2)
        messages, answers, forgotten = self._fitting(messages, answers, room)
        self._end_reading_ahead()
        stream = self._llm.stream(
            messages, max_new_tokens=limit, verbatim=answers, chat_template_kwargs=self._variables, **options
        )
        self._messages, self._answers, self.forgotten, self._stream = messages, answers, forgotten, stream
        return stream

    def _remembered(self) -> tuple[list[Message], dict[int, tuple[int, ...]]]:
        if self._stream is None:
            return self._messages, self._answers
        answer = self._stream.completion
        if not answer.token_ids:
            return self._messages[:-1], self._answers
        answers = dict(self._answers)
        if self._llm.tokenizer.decode(answer.token_ids) == answer.text:  # not cut at a stop string
            answers[len(self._messages)] = answer.token_ids
        return [*self._messages, {"role": "assistant", "content": answer.text}], answers

    def _fitting(
        self, messages: list[Message], answers: dict[int, tuple[int, ...]], room: int
    ) -> tuple[list[Message], dict[int, tuple[int, ...]], int]:
        """The messages without the oldest exchanges if they leave too little room, its answers' ids, how many went."""
        forgotten = 0
        first = 1 if messages[0]["role"] == "system" else 0
        num_tokens = len(self._llm.encode_chat(messages, answers, variables=self._variables))
        if num_tokens <= self._llm.max_seq_len - room:
            return messages, answers, 0
        while num_tokens > self._llm.max_seq_len // 2 and len(messages) > first + 1:
            next_question = next(i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user")
            messages = messages[:first] + messages[next_question:]
            answers = {i - next_question + first: ids for i, ids in answers.items() if i >= next_question}
            num_tokens = len(self._llm.encode_chat(messages, answers, variables=self._variables))
            forgotten += 1
        return messages, answers, forgotten


class _Finishing(Thread):
    """Reads a stream to its end that nobody waits for."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        # A program that ends while XLA computes would crash.
        atexit.register(self._end)

    def run(self) -> None:
        with suppress(LlamaJaxError):  # as when the device's memory is full: the next turn will say so
            self._stream.finish()
        atexit.unregister(self._end)

    def _end(self) -> None:
        self._stream.cancel()
        self.join()
