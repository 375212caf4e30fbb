"""The library's front door: text -> ids -> engine -> text. Wires the tokenizer to the engine; computes nothing."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal, Self, Unpack, cast, overload

import jax
import numpy as np
from jaxtyping import Float32

from llamajax.answer import Answer, Collector, Inbox, ServedStream, Stream
from llamajax.checks import flag, integer, is_whole, number, shown
from llamajax.config import LlamaConfig
from llamajax.constraints import GrammarCompiler
from llamajax.engine.ahead import AheadCompiler
from llamajax.engine.concurrent import Concurrent
from llamajax.engine.engine import Engine
from llamajax.engine.runner import Runner
from llamajax.engine.sequential import OneSlot, Sequential
from llamajax.errors import InternalError, LlamaJaxError, RequestError
from llamajax.options import (
    Options,
    check_names,
    generation_prompt,
    new_token_limit,
    read_grammar,
    sampling_params,
    stop_strings,
    stop_token_ids,
    template_variables,
)
from llamajax.text import one_line
from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.chat import ChatTemplate, encode_chat
from llamajax.tokenizers.stream import StopStrings, StreamDecoder
from llamajax.tools import ToolFormat, Tools, read_tools
from llamajax.types import (
    MAX_TOP_LOGPROBS,
    Completion,
    Messages,
    Request,
    TokenLogprobs,
)

Prompt = str | Sequence[int] | Messages
OnResult = Callable[[int, Completion | LlamaJaxError], None]

_WRITTEN = ("content", "tool_calls")  # members of a message that a template writes out


class LLM:
    """A loaded model that takes and gives text.

    Attributes:
      config: the model's.
      tokenizer: the checkpoint's.
      template: the checkpoint's chat template, a built-in one, or None for a model that was not made to chat.
      tool_format: how the model calls functions.
      max_seq_len: tokens that a prompt and its answer may take together.
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, template: ChatTemplate | None, stop_ids: frozenset[int]
    ) -> None:
        self.config: LlamaConfig = runner.config
        self.tokenizer = tokenizer
        self.template = template
        self.max_seq_len = runner.max_seq_len
        self._runner = runner
        self._alone = OneSlot(runner)
        self.tool_format = ToolFormat.of(template.source if template else "")
        self._stop_ids = stop_ids
        self._grammars = GrammarCompiler(tokenizer, self.config.vocab_size, stop_ids)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continues a text as it stands, without a chat template. Options as in `stream`.

        Several threads may call it: they take turns, as with `chat`. `serve_requests` answers them together.
        """
        stream = self.stream(prompt, **options)
        with self._alone.turn:
            return stream.finish()

    def chat(self, messages: str | Messages, **options: Unpack[Options]) -> Completion:
        """Answers a conversation, or one message of a user, through the chat template. Options as in `stream`."""
        asked: Messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.generate(asked, **options)

    def stream(
        self,
        prompt: Prompt,
        *,
        verbatim: Mapping[int, Sequence[int]] | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Starts an answer and returns its text piece by piece: the sequential strategy.

        Args:
          prompt: a text to continue as it stands, or messages to answer through the chat template, or token ids.
          verbatim: message index -> token ids that stand for the content of that message, such as an earlier
            answer's: text encoded anew need not give the ids that were drawn.
          options: `Options` documents them.

        Raises RequestError for a bad option or a model without a chat template, PromptTooLongError for a prompt
        that leaves no room for an answer.
        """
        request, answer = self.prepare(prompt, verbatim=verbatim, **options)
        return Stream(Sequential(self._alone, request), answer)

    def prepare(
        self,
        prompt: Prompt,
        /,
        *,
        verbatim: Mapping[int, Sequence[int]] | None = None,
        **options: Unpack[Options],
    ) -> tuple[Request, Answer]:
        """Makes a request of a prompt and its options, and the answer that its tokens will fill. All strategies use it.

        Arguments and errors as in `stream`.
        """
        request, answer_to = self._prepared(prompt, verbatim, options)
        return request, answer_to(request)

    def _prepared(
        self, prompt: Prompt, verbatim: Mapping[int, Sequence[int]] | None, options: Options
    ) -> tuple[Request, Callable[[Request], Answer]]:
        """A request, and a function that makes an answer to it, or to the same with another seed."""
        check_names(options, "verbatim")
        tools = read_tools(*(options.get(name) for name in ("tools", "tool_choice", "parallel_tool_calls")))
        ids = self._encode(prompt, options, verbatim, tools)
        ignores_end = flag("ignore_eos", options.get("ignore_eos", False))
        stop_ids = stop_token_ids(options, self.config.vocab_size)
        grammar = read_grammar(options)
        if tools:
            if grammar:
                raise RequestError(
                    "give either tools or what the answer must fit, not both: tool_choice none offers none"
                )
            grammar = self.tool_format.grammar(tools)
        request = Request(
            ids,
            new_token_limit(options, self.max_seq_len),
            sampling_params(options),
            stop_ids if ignores_end and grammar is None else stop_ids | self._stop_ids,
            integer("min_tokens", options.get("min_tokens", 0), 0),
        )
        self._runner.check(request)
        if grammar is not None:
            constraint = self._grammars.compile(
                grammar, request.stop_ids, min_tokens=request.min_tokens, ignores_end=ignores_end
            )
            request = replace(request, constraint=constraint)
        # A space at the text's start belongs to it if the text goes on from something, or a grammar has it there.
        continues = isinstance(prompt, str) or options.get("continue_final_message", False) or grammar is not None
        stops = stop_strings(options)
        return request, lambda request: Answer(
            request, StreamDecoder(self.tokenizer, continues=continues), StopStrings(stops)
        )

    def _encode(
        self, prompt: Prompt, options: Options, verbatim: Mapping[int, Sequence[int]] | None, tools: Tools | None
    ) -> list[int]:
        begins, continues = generation_prompt(options)
        variables = template_variables(options.get("chat_template_kwargs"))
        ids = _token_ids(prompt)
        if (isinstance(prompt, str) or ids is not None) and (continues or not begins):
            raise RequestError(
                "add_generation_prompt and continue_final_message need messages, not a text or token ids"
            )
        if tools and (isinstance(prompt, str) or ids is not None or verbatim):
            raise RequestError("tools need messages, not a text or token ids")
        if variables and (isinstance(prompt, str) or ids is not None):
            raise RequestError("chat_template_kwargs need messages, not a text or token ids")
        if isinstance(prompt, str):
            self._check_len(prompt)
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            return bos + self.tokenizer.encode(prompt)
        if ids is not None:
            self._runner.check_len(len(ids))
            return ids
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise RequestError(f"a prompt must be a text, messages or token ids, not {shown(prompt)}")
        if not isinstance(verbatim or {}, Mapping):
            raise RequestError(f"verbatim must map a message's index to token ids, not {shown(verbatim)}")
        said = (message.get(name) for message in prompt if isinstance(message, Mapping) for name in _WRITTEN)
        self._check_len(*(str(part) for part in said if part))
        return self.encode_chat(
            cast(Messages, prompt),
            verbatim,
            add_generation_prompt=begins,
            continue_final_message=continues,
            tools=tools,
            variables=variables,
        )

    def _check_len(self, *texts: str) -> None:
        """Raises PromptTooLongError for texts that are too long in any case. To encode them takes 1 s a megabyte."""
        num_chars = sum(map(len, texts))
        if num_chars >= self.max_seq_len:
            self._runner.check_len(-(-num_chars // self._longest_token), "at least ")

    @cached_property
    def _longest_token(self) -> int:
        """The most characters that one token stands for."""
        return max(len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size))

    def serve_requests(
        self,
        *,
        slots: int = 16,
        max_waiting: int = 1024,
        prefix_cache: int | None = None,
        on_answer: Callable[[Completion, float], None] = lambda completion, queue_time: None,
        on_step: Callable[[], None] = lambda: None,
    ) -> "Server":
        """Starts a server of many requests at once: the concurrent strategy.

        Args:
          slots: how many are answered at once, token by token.
          max_waiting: how many more may wait.
          prefix_cache: bytes of ended prompts that may be kept for others that begin alike, 0 for none; by default a
            32nd of the computer's memory. Only where the native kernels compute.
          on_answer: called, from the engine's thread, with each answer that has ended and the seconds that it had
            waited for its turn.
          on_step: called, from the engine's thread, after each step, when all of its tokens can be read.
        """
        engine = Engine(self._runner, num_slots=slots, max_waiting=max_waiting, prefix_bytes=prefix_cache)
        return Server(self, engine, on_answer, on_step)

    @overload
    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        slots: int = 32,
        on_result: OnResult = ...,
        raise_errors: Literal[False] = ...,
        **options: Unpack[Options],
    ) -> list[Completion | LlamaJaxError]: ...

    @overload
    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        slots: int = 32,
        on_result: OnResult = ...,
        raise_errors: Literal[True],
        **options: Unpack[Options],
    ) -> list[Completion]: ...

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        slots: int = 32,
        on_result: OnResult = lambda index, result: None,
        raise_errors: bool = False,
        **options: Unpack[Options],
    ) -> Sequence[Completion | LlamaJaxError]:
        """Answers any number of prompts, in their order: the batched strategy.

        Args:
          prompts: each as in `stream`; the options, as in `prepare`, are for all of them.
          slots: how many are answered at once.
          on_result: called with the index and the answer, or the error, of each prompt as soon as it is there.
          raise_errors: raise the first error of a prompt, and answer no more.

        Returns each prompt's answer, or the error of one that cannot be answered, such as a prompt that is too long.

        Raises RequestError for options that no prompt could have.
        """
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise RequestError(f"generate_batch takes a list of prompts, not {shown(prompts)}: for one, use generate")
        check_names(options, "slots", "on_result", "raise_errors")
        asked = [(prompt, options) for prompt in prompts]
        results: dict[int, Completion | LlamaJaxError] = {}
        for index, result in self.stream_batch(asked, slots=slots):
            if raise_errors and isinstance(result, LlamaJaxError):
                raise result
            results[index] = result
            on_result(index, result)
        return [results[index] for index in range(len(asked))]

    def stream_batch(
        self,
        prompts: Iterable[tuple[Prompt, Mapping[str, Any]] | None],
        *,
        slots: int = 32,
        ahead: int = 1024,
        prefix_cache: int | None = None,
        on_token: Callable[[int], None] = lambda index: None,
    ) -> Iterator[tuple[int, Completion | LlamaJaxError]]:
        """Answers prompts, each with options of its own, and gives each answer as it is finished.

        Args:
          prompts: (prompt, options), as in `prepare`; taken as they are needed. None says that the next one is not
            ready: the engine goes on with those it has. (With none left, the source itself should wait.)
          slots: how many are answered at once.
          ahead: how many prompts are taken at once, to be answered longest first; no more are held in memory.
          prefix_cache: as in `serve_requests`.
          on_token: called with the prompt's index for each token of its answer.

        Yields the prompt's index and its answer, or its error.
        """
        engine = Engine(self._runner, num_slots=slots, max_waiting=ahead, prefix_bytes=prefix_cache)
        source, num_taken, more, busy = iter(prompts), 0, True, False
        finished: list[tuple[int, Completion | Exception]] = []

        def collect(index: int, result: Completion | Exception) -> None:
            finished.append((index, result))

        try:
            while more or busy:
                # The next ones are taken when the last of these begins, so that no slot is ever idle.
                if more and not engine.scheduler.num_waiting:
                    taken, more = _ready(source, ahead)
                    jobs = []
                    for index, pair in enumerate(taken, num_taken):
                        try:
                            prompt, options = _pair(pair)
                            request, answer = self.prepare(prompt, **options)
                            listener = Collector(answer, partial(on_token, index), partial(collect, index))
                            jobs.append(engine.job(request, listener))
                        except LlamaJaxError as error:
                            finished.append((index, error))
                    num_taken += len(taken)
                    for job in sorted(jobs, key=lambda job: (job.plan, job.limit), reverse=True):
                        engine.scheduler.submit(job)
                busy = engine.step()
                yield from _drained(finished)
        finally:
            engine.abort()

    def encode_chat(
        self,
        messages: Messages,
        verbatim: Mapping[int, Sequence[int]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Tools | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where its next answer begins, or its last message goes on.

        `variables` are what else the template reads.
        """
        if self.template is None:
            raise RequestError(
                "this model has no chat template, so it cannot chat: continue a text instead (--raw; generate())"
            )
        return encode_chat(
            self.tokenizer,
            self.template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            verbatim=verbatim,
            tools=tools,
            variables=variables,
        )

    def logits(self, token_ids: Sequence[int]) -> Float32[np.ndarray, "T V"]:
        """Scores of the next token after each of the given ones. A text is encoded by `tokenizer.encode` first.

        Raises RequestError for ids out of range, PromptTooLongError for more than `max_seq_len` of them.
        """
        return self._runner.logits(_text_ids("logits", token_ids))

    def prompt_logprobs(self, token_ids: Sequence[int], num_top: int = 0) -> tuple[TokenLogprobs | None, ...]:
        """The log-probability of each token of a text, given those before it; None for the first.

        Takes little memory, where `logits` of a long text would take gigabytes. Any thread may call it, also while a
        server runs.

        Args:
          token_ids: the text's, as in `logits`.
          num_top: how many of the most probable tokens to tell at each place, from 0 to 20.

        Raises as `logits` does, and RequestError for a bad `num_top`.
        """
        num_top = integer("num_top", num_top, 0, MAX_TOP_LOGPROBS)
        return None, *self._runner.prompt_logprobs(_text_ids("prompt_logprobs", token_ids), num_top)

    @property
    def shares_prompts(self) -> bool:
        """Whether prompts that begin alike share their first pages."""
        return self._alone.shares_prompts

    def warm_up(self, num_tokens: int = 1) -> None:
        """Compiles what prompts and answers of this many tokens together need, so that none waits for it."""
        self._alone.warm_up(num_tokens)

    def compile_ahead(self, num_tokens: int) -> AheadCompiler:
        """Begins to compile, in a thread, what prompts and answers of up to this many tokens together need.

        It waits until it knows which request comes first.
        """
        return AheadCompiler(self._alone, min(num_tokens, self.max_seq_len))

    def warm_up_batches(self, slots: int, num_tokens: int) -> None:
        """As `warm_up`, for so many requests at once, in a server or a batch."""
        Engine(self._runner, num_slots=slots).compile(num_tokens)


class Server:
    """A model that answers many requests at once, from any thread or event loop; made by `LLM.serve_requests`.

    A context manager: leaving it cancels the unfinished requests.
    """

    def __init__(
        self, llm: LLM, engine: Engine, on_answer: Callable[[Completion, float], None], on_step: Callable[[], None]
    ) -> None:
        self._llm = llm
        self._engine = engine
        self._on_answer = on_answer
        self._concurrent = Concurrent(engine, on_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether it answers: False once the engine's thread has ended, for whatever reason."""
        return self._concurrent.is_alive

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return self._engine.scheduler.num_admitted

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._concurrent.num_waiting

    @property
    def kv_usage(self) -> float:
        """The share of the slots' positions that running sequences take, from 0 to 1."""
        return self._engine.num_positions / (self._engine.scheduler.num_slots * self._llm.max_seq_len)

    def compile(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles all that requests may need, in the calling thread: afterwards no request waits for a compilation.

        Requests may run meanwhile. What a first, short one needs is compiled first.

        Args:
          progress: called with how many programs are compiled, of how many, before the first and after each.
        """
        self._engine.compile(self._llm.max_seq_len, progress)

    def submit(
        self,
        prompt: Prompt,
        *,
        deadline: float | None = None,
        wait: bool = False,
        **options: Unpack[Options],
    ) -> ServedStream:
        """Asks for an answer. Returns at once; its text comes piece by piece.

        Args:
          prompt: as in `LLM.stream`, and so the options.
          deadline: seconds from now after which the answer ends as it is ("timeout").
          wait: wait for room in a full queue, instead of raising.

        Raises QueueFullError for a full queue, PromptTooLongError for a prompt that leaves no room for an answer,
        RequestError for a bad option or a closed server.
        """
        check_names(options, "deadline", "wait")
        return self._submit(*self._llm.prepare(prompt, **options), deadline, wait)

    def submit_each(
        self, prompt: Prompt, seeds: Iterable[int], *, deadline: float | None = None, **options: Unpack[Options]
    ) -> Iterator[ServedStream]:
        """Asks for an answer with each of these seeds, as `submit` does. The prompt and the options are read once."""
        request, answer_to = self._llm._prepared(prompt, None, options)
        for seed in seeds:
            seeded = replace(request, sampling=replace(request.sampling, seed=seed))
            yield self._submit(seeded, answer_to(seeded), deadline, wait=False)

    def _submit(self, request: Request, answer: Answer, deadline: float | None, wait: bool) -> ServedStream:
        inbox = Inbox(answer)
        if deadline is not None:
            deadline = time.monotonic() + number("deadline", deadline, -1e12, 1e12, "a number of seconds, or None")
        job = self._engine.job(request, inbox, deadline)
        inbox.on_end = lambda: self._on_answer(answer.completion, job.queue_time)
        self._concurrent.submit(job, wait=flag("wait", wait))
        return ServedStream(inbox, job.cancel)

    def close(self) -> None:
        """Cancels the unfinished requests, and waits until all have stopped. May be called again."""
        self._concurrent.close()


def _text_ids(name: str, value: object) -> list[int]:
    ids = [] if isinstance(value, Sequence) and not value else _token_ids(value)
    if ids is None:
        raise RequestError(f"{name} takes token ids, not {shown(value)}: encode a text with tokenizer.encode")
    return ids


def _token_ids(value: object) -> list[int] | None:
    """Token ids as plain integers; None if they are not token ids, or empty."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, bytes) and value:
        if set(map(type, value)) == {int}:  # as most are: a million are checked in 30 ms, and one by one in 600
            return list(value)
        if all(map(is_whole, value)):
            return [int(i) for i in value]
    return None


def _pair(item: Any) -> tuple[Prompt, Mapping[str, Any]]:
    pair = isinstance(item, Sequence) and len(item) == 2 and isinstance(item[1], Mapping)
    if not pair or not all(isinstance(name, str) for name in item[1]):
        raise RequestError(f"stream_batch takes pairs of a prompt and its options, not {shown(item)}")
    return item[0], item[1]


def _drained(items: list[tuple[int, Completion | Exception]]) -> Iterator[tuple[int, Completion | LlamaJaxError]]:
    """Raises an error of the device, which ends all prompts; an error of one prompt is its result."""
    while items:
        index, result = items.pop(0)
        if isinstance(result, jax.errors.JaxRuntimeError | MemoryError):
            raise result
        if isinstance(result, Exception) and not isinstance(result, LlamaJaxError):
            failed = InternalError(f"internal error, {type(result).__name__}: {one_line(result)}")
            failed.__cause__ = result
            result = failed
        yield index, result


def _ready(source: Iterator[object], most: int) -> tuple[list[object], bool]:
    """The items up to the first None or the most there may be, and whether there may be more."""
    items: list[object] = []
    for item in islice(source, most):
        if item is None:
            return items, True
        items.append(item)
    return items, len(items) == most


generate_batch = LLM.generate_batch
