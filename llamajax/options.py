"""The options of an answer: their types, for editors and mypy, and what they mean for a request."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict, cast

from llamajax import checks
from llamajax.errors import RequestError
from llamajax.json_schema import schema_text
from llamajax.text import one_line
from llamajax.types import MAX_GRAMMAR_CHARS, Grammar, SamplingParams

DEFAULT_NEW_TOKENS = 50
MAX_STOPS = 256  # each is looked for after each token, while the other requests wait


class AnswerOptions(TypedDict, total=False):
    """How an answer is drawn and where it ends. `SamplingParams` documents those that it has, too.

    Attributes:
      min_tokens: stop tokens cannot be drawn, and stop strings do not count, before the answer has so many tokens.
      stop: strings that end the answer and are not part of it.
      stop_token_ids: token ids that end it, beside the model's own; they are not part of it either.
      ignore_eos: go on after the model's own tokens that end a text or a turn.
      json_schema: the answer is JSON that is valid under this schema: an object, its text, or a pydantic model.
      regex: the whole answer matches this regular expression (the syntax of Rust's regex crate).
      grammar: the whole answer fits this context-free grammar in llguidance's variant of Lark.
      sampling: how tokens are drawn; or give its fields themselves.
    """

    min_tokens: int
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    json_schema: Mapping[str, Any] | str | type | None
    regex: str | None
    grammar: str | None
    sampling: SamplingParams | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logprobs: int | None
    logit_bias: Mapping[int, float] | None


class Options(AnswerOptions, total=False):
    """All options of one answer.

    Attributes:
      max_new_tokens: at least 1; the context may end the answer sooner. None: up to the context's end. 50 if it is
        not given.
      add_generation_prompt: end the messages with the header of the assistant's next one; True if it is not given.
      continue_final_message: the answer goes on where the last message ends, instead of beginning a message.
      chat_template_kwargs: variables that the chat template reads, such as {"enable_thinking": False} for Qwen3; values
        that JSON can express.
      tools: functions that the answer may call, in OpenAI's form; `LLM.tool_format` reads the calls.
      tool_choice: "auto" lets the model decide, "required" makes it call one, {"type": "function", "function": {"name":
        "…"}} makes it call that one, "none" offers none.
      parallel_tool_calls: whether an answer may have several calls; True if it is not given.
    """

    max_new_tokens: int | None
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None


# Variables that a chat template gets from other options and from the checkpoint.
_TAKEN = ("messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token")
_SAMPLING = tuple(field.name for field in fields(SamplingParams))


def check_names(options: Mapping[str, Any], *others: str) -> None:
    """Raises RequestError for an option that there is not, and tells the nearest one. `others` are the caller's own."""
    checks.known_options(options, [*Options.__annotations__, *others])


def sampling_params(options: Options) -> SamplingParams:
    """How tokens are drawn. Raises RequestError."""
    given = {name: value for name, value in options.items() if name in _SAMPLING}
    sampling = options.get("sampling")
    if sampling is None:
        return SamplingParams(**given)  # type: ignore[arg-type]  # which checks them
    if given:
        raise RequestError(f"give either sampling or its fields, not both: {', '.join(given)}")
    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling must be SamplingParams, not {checks.shown(sampling)}")
    return sampling


def new_token_limit(options: Options, context: int) -> int:
    """How many tokens an answer may have. Raises RequestError."""
    wanted = options.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    return context if wanted is None else checks.integer("max_new_tokens", wanted, 1)


def stop_strings(options: Options) -> tuple[str, ...]:
    """The strings that end an answer. Raises RequestError."""
    stop = options.get("stop")
    stops = _items("stop", () if stop is None else [stop] if isinstance(stop, str) else stop, "one string or several")
    if not all(isinstance(stop, str) for stop in stops):
        raise RequestError(f"stop must be one string or several, not {checks.shown(stops)}")
    if not all(stops):
        raise RequestError("a stop string must not be empty")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"at most {MAX_STOPS} stop strings, not {len(stops)}")
    return tuple(stops)


def stop_token_ids(options: Options, vocab_size: int) -> frozenset[int]:
    """The token ids that end an answer beside the model's own. Raises RequestError."""
    ids = options.get("stop_token_ids")
    ids = _items("stop_token_ids", () if ids is None else ids, "a list of token ids")
    if len(ids) > MAX_STOPS:
        raise RequestError(f"at most {MAX_STOPS} stop_token_ids, not {len(ids)}")
    return frozenset(checks.integer("each of stop_token_ids", i, 0, vocab_size - 1) for i in ids)


def read_grammar(options: Options) -> Grammar | None:
    """What the answer must fit, if anything. Raises RequestError."""
    given = {name: options[name] for name in ("json_schema", "regex", "grammar") if options.get(name) is not None}
    if len(given) > 1:
        raise RequestError(f"give only one of {', '.join(given)}")
    for name, value in given.items():
        text = _schema(value) if name == "json_schema" else value
        if not isinstance(text, str):
            raise RequestError(f"{name} must be a string, not {checks.shown(value)}")
        if len(text) > MAX_GRAMMAR_CHARS:
            raise RequestError(f"{name} may have {MAX_GRAMMAR_CHARS:,} characters, not {len(text):,}")
        return Grammar(cast(Any, name), text)
    return None


def _schema(given: Any) -> str:
    """A schema's text."""
    if hasattr(given, "model_json_schema"):
        given = given.model_json_schema()
    try:
        text = given if isinstance(given, str) else json.dumps(given, allow_nan=False)
        if len(text) > MAX_GRAMMAR_CHARS:  # to read it would take long
            return text
        schema = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json_schema must be an object that JSON can express: {one_line(error)}") from None
    if not isinstance(schema, dict):
        raise RequestError(f"json_schema must be an object, its text or a pydantic model, not {checks.shown(given)}")
    return schema_text(schema, "json_schema")


def template_variables(given: object) -> dict[str, Any]:
    """What the chat template reads beside the conversation, of `chat_template_kwargs`. Raises RequestError."""
    variables = {} if given is None else given
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise RequestError(f"chat_template_kwargs must be an object, not {checks.shown(variables)}")
    if taken := [name for name in _TAKEN if name in variables]:
        raise RequestError(f"chat_template_kwargs cannot have {taken[0]}: leave it out")
    try:
        length = len(json.dumps(dict(variables), ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"chat_template_kwargs must be what JSON can express: {one_line(error)}") from None
    if length > MAX_GRAMMAR_CHARS:
        raise RequestError(f"chat_template_kwargs may have {MAX_GRAMMAR_CHARS:,} characters, not {length:,}")
    return dict(variables)


def generation_prompt(options: Options) -> tuple[bool, bool]:
    """add_generation_prompt and continue_final_message. Raises RequestError if both are asked for, as vLLM does."""
    continues = checks.flag("continue_final_message", options.get("continue_final_message", False))
    begins = checks.flag("add_generation_prompt", options.get("add_generation_prompt", not continues))
    if begins and continues:
        raise RequestError("add_generation_prompt and continue_final_message cannot both be true: leave one out")
    return begins, continues


def _items(name: str, value: object, expected: str) -> list[Any]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise RequestError(f"{name} must be {expected}, not {checks.shown(value)}")
    return list(value)
