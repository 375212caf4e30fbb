"""`llamajax chat`: one answer, or a conversation."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamajax.errors import RequestError
from llamajax.hub.aliases import DEFAULT
from llamajax.types import Message

from .. import loading, options, render, saved
from ..interrupt import raised
from ..prompt import read_prompt, read_text
from ..settings import Settings

if TYPE_CHECKING:
    from llamajax import LLM, Stream

ONE_ANSWER_TOKENS = 50
CONVERSATION_TOKENS = 512


Argument = Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="As -p.", show_default=False)]
Prompt = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--prompt",
        help="A text, @FILE or - for stdin. What is piped into stdin beside a text comes before it.",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--max-new-tokens",
        min=1,
        help=f"Longest answer, in tokens: {ONE_ANSWER_TOKENS}, or {CONVERSATION_TOKENS} in a conversation.",
    ),
]
Continue = Annotated[bool, typer.Option("-c", "--continue", help="Go on with the last conversation.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without a chat template.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")]


def chat(
    argument: Argument = None,
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = None,
    model: options.Model = DEFAULT,
    system: options.System = None,
    chat_template_kwargs: options.TemplateKwargs = None,
    goes_on: Continue = False,
    temperature: options.Temperature = 0.6,
    top_p: options.TopP = 0.9,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 42,
    stop: options.Stop = [],  # noqa: B006 (Typer's way of an option that may be repeated)
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.GrammarOption = None,
    raw: Raw = False,
    as_json: AsJson = False,
    stats: options.Stats = True,
    max_seq_len: options.MaxSeqLen = None,
    dtype: options.DTypeOption = "auto",
    cache_dtype: options.CacheDTypeOption = "auto",
    device: options.DeviceOption = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Answer a prompt; without one, on a terminal, hold a conversation.

    The answer goes to stdout, everything else to stderr.

    In a loop that reads lines from stdin, give each command "< /dev/null": otherwise it takes the lines that follow.
    """
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    sampling = options.sampling(**drawn, repetition_penalty=repetition_penalty)
    if not all(stop):
        raise typer.BadParameter("a stop text must not be empty", param_hint="--stop")
    if raw and (system is not None or goes_on or chat_template_kwargs is not None):
        raise typer.BadParameter(
            "messages need a chat template: leave out --raw, or --system, --continue and --chat-template-kwargs"
        )
    template = options.template_kwargs(chat_template_kwargs)
    constraint = options.constraint(json_schema, regex, grammar)
    text = _read(argument, prompt, raw=raw, needed=bool(raw or as_json or constraint))
    messages = _messages(system, goes_on)
    if stats:
        options.note_seed(seed)
    load = partial(loading.load, max_seq_len=max_seq_len, dtype=dtype, cache_dtype=cache_dtype, device=device)
    llm = load(model)
    limit = max_new_tokens or (CONVERSATION_TOKENS if text is None else ONE_ANSWER_TOKENS)
    if text is None:
        from ..repl import Repl

        with raised():
            Repl(llm, model, load, messages, Settings(sampling, limit, stop), template, stats).run()
        return
    asked = {"max_new_tokens": limit, "stop": stop, "sampling": sampling, **constraint}
    with _stream(llm, text, messages, asked, template, raw=raw, goes_on=goes_on) as stream:
        render.print_answer_json(stream.finish(), model, seed) if as_json else render.write_stream(stream)
        if stats:
            render.note_cut(stream.completion, limit, llm.max_seq_len)
            render.note(render.stats_line(stream.completion))


def _read(argument: str | None, prompt: str | None, *, raw: bool, needed: bool) -> str | None:
    """The prompt's text; None for a conversation."""
    if argument is not None and prompt is not None:
        raise typer.BadParameter("give the prompt once: as an argument or with -p")
    text = read_prompt(prompt if argument is None else argument)
    if text is None and needed:
        raise typer.BadParameter("--raw, --json, --json-schema, --regex and --grammar need a prompt")
    if text is not None and not text.strip() and not raw:
        raise RequestError("the prompt is empty: give a text, @FILE, or a text on stdin")
    return text


def _messages(system: str | None, goes_on: bool) -> list[Message]:
    """Those before the first question."""
    messages = saved.load_last() if goes_on else []
    if system is None:
        return messages
    said: Message = {"role": "system", "content": read_text(system, "the system message")}
    return [said, *(message for message in messages if message["role"] != "system")]


@contextmanager
def _stream(
    llm: "LLM",
    text: str,
    messages: list[Message],
    asked: dict[str, Any],
    template: dict[str, Any],
    *,
    raw: bool,
    goes_on: bool,
) -> "Iterator[Stream]":
    """The answer to one prompt. If the last conversation goes on, it is saved with the answer."""
    from llamajax import Conversation

    if goes_on:
        conversation = Conversation(llm, **template)
        conversation.restart(messages=messages)
        yield conversation.ask(text, **asked)
        saved.keep_last(conversation.messages)
    else:
        question: Message = {"role": "user", "content": text}
        yield llm.stream(text if raw else [*messages, question], **asked, **template)
