"""`llamajax chat`: one answer, or a conversation."""

from functools import partial
from typing import Annotated, Any

import typer

from llamajax.errors import RequestError
from llamajax.hub.aliases import DEFAULT
from llamajax.types import Message, SamplingParams

from .. import loading, options, render, saved
from ..interrupt import raised
from ..prompt import read_prompt, read_text

ONE_ANSWER_TOKENS = 50
CONVERSATION_TOKENS = 512


def chat(
    argument: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="As -p.", show_default=False)] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--prompt",
            help="A text, @FILE or - for stdin. What is piped into stdin beside a text comes before it.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-new-tokens",
            min=1,
            help=f"Longest answer, in tokens: {ONE_ANSWER_TOKENS}, or {CONVERSATION_TOKENS} in a conversation.",
        ),
    ] = None,
    model: options.Model = DEFAULT,
    system: options.System = None,
    goes_on: Annotated[bool, typer.Option("-c", "--continue", help="Go on with the last conversation.")] = False,
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
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without a chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
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

    In a loop that reads lines from stdin, give each command "< /dev/null": it would take the lines that follow.
    """
    if argument is not None and prompt is not None:
        raise typer.BadParameter("give the prompt once: as an argument or with -p")
    prompt = prompt if argument is None else argument
    try:
        sampling = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
    except RequestError as e:
        raise typer.BadParameter(str(e)) from None
    if not all(stop):
        raise typer.BadParameter("a stop text must not be empty", param_hint="--stop")
    if raw and (system is not None or goes_on):
        raise typer.BadParameter("messages need a chat template: leave out --raw, or --system and --continue")
    text = read_prompt(prompt)
    constraint = options.constraint(json_schema, regex, grammar)
    if text is None and (raw or as_json or constraint):
        raise typer.BadParameter("--raw, --json, --json-schema, --regex and --grammar need a prompt")
    if text is not None and not text.strip() and not raw:
        raise RequestError("the prompt is empty: give a text, @FILE, or a text on stdin")

    messages = saved.load_last() if goes_on else []
    if system is not None:
        said: Message = {"role": "system", "content": read_text(system, "the system message")}
        messages = [said, *(message for message in messages if message["role"] != "system")]
    if stats:
        options.note_seed(seed)
    load = partial(loading.load, max_seq_len=max_seq_len, dtype=dtype, cache_dtype=cache_dtype, device=device)
    llm = load(model)
    from llamajax import Conversation

    if text is None:
        from ..repl import Repl
        from ..settings import Settings

        with raised():
            asked = Settings(sampling, max_new_tokens or CONVERSATION_TOKENS, stop)
            Repl(llm, model, load, messages, asked, stats).run()
        return

    limit = max_new_tokens or ONE_ANSWER_TOKENS
    if goes_on:
        conversation = Conversation(llm)
        conversation.restart(messages=messages)
        stream = conversation.ask(text, max_new_tokens=limit, stop=stop, sampling=sampling, **constraint)
    else:
        question: Message = {"role": "user", "content": text}
        asked_for: Any = {"max_new_tokens": limit, "stop": stop, "sampling": sampling, **constraint}
        stream = llm.stream(text if raw else [*messages, question], **asked_for)
    if as_json:
        render.print_answer_json(stream.finish(), model, seed)
    else:
        render.write_stream(stream)
    if stats:
        render.note_cut(stream.completion, limit, llm.max_seq_len)
        render.note(render.stats_line(stream.completion))
    if goes_on:
        saved.keep_last(conversation.messages)
