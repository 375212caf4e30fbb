"""Conversations to token ids, through a chat template.

Knows whose template is used and that what a user writes can never become a special token. Does not know how
Jinja is contained (sandbox.py) nor any template's text (templates.py).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamajax.errors import RequestError, TokenizerError
from llamajax.text import well_formed
from llamajax.tokenizers import sandbox, templates
from llamajax.tokenizers.base import BREAK, Tokenizer, special_pattern
from llamajax.tokenizers.config import read_config
from llamajax.tokenizers.gguf import template_of
from llamajax.tools import ToolFormat, Tools, written_out
from llamajax.types import Messages

ROLES = ("system", "user", "assistant", "tool")

_MESSAGE_NAMES = {"role", "content", "tool_calls", "tool_call_id"}

# Encloses the index of a message whose token ids are known. Like `BREAK` a lone surrogate, which no text contains.
_VERBATIM = "\ud801"
# Follows the last message's content if the answer continues it.
_END = "\ud802"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, rendered as Hugging Face renders it.

    Attributes:
      source: Jinja. It is compiled when it is rendered, so a broken one does no harm to raw completions.
      bos_token, eos_token: literals that the template may write; "" for none.
      special_tokens: other literals that it may write, by name: pad_token, unk_token and so on.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""
    special_tokens: Mapping[str, str | list[str]] = field(default_factory=dict)

    def render(
        self,
        messages: Messages,
        /,
        *,
        add_generation_prompt: bool = True,
        date_string: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        Args:
          messages: at least one; roles system, user, assistant and tool.
          add_generation_prompt: end with the header of the assistant's next message.
          date_string: what the template takes for today's date, "26 Jul 2024"; None leaves it to the template.
          **variables: anything else that the template reads: values that JSON can express.

        Raises:
          RequestError: malformed messages or variables, or the template refuses them.
          TokenizerError: the template is broken or hostile.
        """
        return self.render_each(
            [messages], add_generation_prompt=add_generation_prompt, date_string=date_string, **variables
        )[0]

    def render_each(
        self,
        conversations: Sequence[Messages],
        /,
        *,
        add_generation_prompt: bool = True,
        date_string: str | None = None,
        **variables: Any,
    ) -> list[str]:
        """Several conversations, for little more than the price of one. Arguments and errors as of `render`."""
        given = {
            **self.special_tokens,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            **({} if date_string is None else {"date_string": date_string}),
            **variables,
        }
        return sandbox.render(
            self.source,
            *({**given, "messages": _checked(messages)} for messages in conversations),
        )


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    verbatim: Mapping[int, Sequence[int]] | None = None,
    tools: Tools | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a conversation; the special tokens among them are the template's own, whatever the messages contain.

    Literals of special tokens are broken up in the messages and variables before the template sees them, and nothing
    else is, since a template may look for words there. Should it still make a special token of message text (by
    deleting or joining pieces), the conversation is rendered again with every word of it broken up.

    Args:
      continue_final_message: end where the last message's content ends, so that the answer goes on with it. Spaces
        at its end are dropped where the template drops them, as in transformers.
      tools: what the answer may call. A template that knows none gets them, and calls and results, as text.
      verbatim: message index -> ids that stand for that message's content, such as an answer's own: encoding its
        text again need not give them.
      messages, add_generation_prompt, variables: as for `ChatTemplate.render`, which says what is raised.
    """
    verbatim = verbatim or {}
    checked = _checked(messages)
    calls = any(message.get("tool_calls") for message in checked)
    if (tools and not ToolFormat.of(template.source).is_rendered) or (calls and "tool_calls" not in template.source):
        checked, tools = written_out(checked, tools), None
    literal = special_pattern(tuple(tokenizer.special_tokens))
    literals = rf"(?={literal.pattern})[\s\S]"
    given = {**(variables or {}), "tools": [*tools.definitions] if tools else None}
    try:
        given = _broken(given, literals, literals)
        conversations = [_guarded(checked, after, literals, verbatim) for after in (literals, r"\S(?=\S)")]
    except RecursionError:
        raise RequestError("tools, calls or variables of the chat template are nested too deeply") from None
    if continue_final_message:
        for conversation in conversations:
            conversation[-1]["content"] += f"{_END} "
    try:
        texts = template.render_each(conversations, add_generation_prompt=add_generation_prompt, **given)
    except TokenizerError as error:
        if not variables:
            raise
        raise RequestError(f"with these chat_template_kwargs, {error}") from None
    text, safe_text = map(_up_to_end, texts) if continue_final_message else texts
    if literal.findall(text) != literal.findall(safe_text):
        text = safe_text
    # split gives text, index, text, ...
    ids: list[int] = []
    for i, part in enumerate(re.split(f"{_VERBATIM}([0-9]+){_VERBATIM}", text)):
        ids += verbatim[int(part)] if i % 2 else tokenizer.encode_template(part)
    return ids


def _up_to_end(text: str) -> str:
    before, mark, after = text.rpartition(_END)
    if not mark:
        raise RequestError("the chat template leaves out the last message, so that it cannot be continued")
    return before if after.startswith(" ") else before.rstrip()


def find_template(source: Path | Mapping[str, Any]) -> ChatTemplate | None:
    """The template that a checkpoint carries: of a directory, or of a GGUF file's metadata; None if it has none.

    Of several templates with names, it is the one that is named "default".

    Raises:
      TokenizerError: a file of the directory is broken, or the metadata has a template that is not text.
    """
    if isinstance(source, Path):
        config = read_config(source)
        text, bos_token, eos_token = config.chat_template, config.bos_token, config.eos_token
        special_tokens = config.special_tokens
    else:
        text, tokens = template_of(source)
        bos_token, eos_token = tokens.pop("bos_token", None), tokens.pop("eos_token", None)
        special_tokens = dict(tokens)
    return ChatTemplate(text, bos_token or "", eos_token or "", special_tokens) if text else None


def builtin_template(tokenizer: Tokenizer, eos_ids: Collection[int], name: str = "") -> ChatTemplate | None:
    """A template of our own for a checkpoint that carries none; None if it was not trained to chat, or not known.

    Args:
      tokenizer: the checkpoint's.
      eos_ids: the end-of-text ids of the checkpoint's configuration, without the tokenizer's `stop_ids`: a base
        model's name <|end_of_text|> only, though its vocabulary has the tokens of a chat.
      name: the model's name or path. It tells Llama 3.1 (whose date is fixed) from 3.2 (today's), SmolLM2 (which
        has a default system message) from other ChatML, and TinyLlama-Chat from other models of its vocabulary.
    """
    ends = {literal for literal, i in tokenizer.special_tokens.items() if i in eos_ids}
    name = name.lower()
    if "<|eot_id|>" in ends:
        version = re.search(r"llama[-_ ]?3[._]([123])", name)
        if version and version[1] == "2":
            source = templates.LLAMA3_2
        else:
            source = templates.LLAMA3_1 if version or "<|eom_id|>" in ends else templates.LLAMA3
        return ChatTemplate(source, "<|begin_of_text|>", "<|eot_id|>")
    if "<|im_end|>" in ends:
        source = templates.SMOLLM2 if "smollm2" in name else templates.CHATML
        return ChatTemplate(source, "<|im_start|>", "<|im_end|>")
    if "</s>" in ends and re.search("tinyllama.*chat|zephyr", name):
        return ChatTemplate(templates.TINYLLAMA, "<s>", "</s>")
    return None


def _guarded(
    messages: list[dict[str, Any]], broken_after: str, literals: str, verbatim: Collection[int]
) -> list[dict[str, Any]]:
    """Messages with their text broken up, and marks in place of the contents whose ids are known."""
    guarded = [
        {name: value if name == "role" else _broken(value, broken_after, literals) for name, value in message.items()}
        for message in messages
    ]
    for i, message in enumerate(guarded):
        if i in verbatim:
            message["content"] = f"{_VERBATIM}{i}{_VERBATIM}"
    return guarded


def _broken(value: Any, broken_after: str, names_broken_after: str) -> Any:
    """A content or tool calls with all text in it broken up; of names, which a template looks up, only literals."""
    if isinstance(value, str):
        return re.sub(broken_after, rf"\g<0>{BREAK}", well_formed(value))
    if isinstance(value, list):
        return [_broken(item, broken_after, names_broken_after) for item in value]
    if isinstance(value, dict):
        return {
            _broken(name, names_broken_after, ""): _broken(item, broken_after, names_broken_after)
            for name, item in value.items()
        }
    return value


def _checked(messages: Messages) -> list[dict[str, Any]]:
    """The messages with each content as one string. Raises RequestError for what is none."""
    if not messages:
        raise RequestError("a conversation needs at least one message")
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) <= _MESSAGE_NAMES:
            raise RequestError(f"a message must have a role and a content and nothing else, not {message!r:.200}")
        if message["role"] not in ROLES:
            raise RequestError(f"a message's role must be one of {', '.join(ROLES)}, not {message['role']!r:.80}")
        if not _are_calls(message.get("tool_calls") or []):
            raise RequestError("tool_calls must be a list of objects with a function, which has a name and arguments")
        others = {name: message[name] for name in ("tool_calls", "tool_call_id") if name in message}
        checked.append({"role": message["role"], "content": _text(message["content"]), **others})
    return checked


def _are_calls(calls: object) -> bool:
    return isinstance(calls, Sequence) and all(
        isinstance(call, Mapping)
        and isinstance(function := call.get("function"), Mapping)
        and isinstance(function.get("name"), str)
        for call in calls
    )


def _text(content: object) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise RequestError(f"a message's content must be a string or a list of text parts, not {content!r:.80}")
    return "\n".join(part["text"] for part in parts)
