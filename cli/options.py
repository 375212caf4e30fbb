"""The options that commands share: their names, help and ranges, once."""

import json
import math
import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from llamajax.errors import RequestError
from llamajax.hub.aliases import ALIASES
from llamajax.types import MAX_THREADS, CacheDType, Device, DType, SamplingParams

from .prompt import read_text
from .render import note


def model_names(begun: str) -> list[str]:
    return [name for name in ALIASES if name.startswith(begun)]


class DrawnSeed(int):
    """A seed that nobody knows before it is printed."""


def parse_seed(text: str | int) -> int:
    if text == "random":
        return DrawnSeed(secrets.randbits(32))
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"expected an integer or 'random', not {text!r}") from None


def finite(value: float | None) -> float | None:
    """Refuses infinity, which an option's range does not."""
    if value is not None and math.isinf(value):
        raise typer.BadParameter("must be finite")
    return value


def note_seed(seed: int) -> None:
    """Prints a seed that was drawn, so that the same answer can be drawn again."""
    if isinstance(seed, DrawnSeed):
        note(f"(seed {seed})")


def constraint(json_schema: Path | None, regex: str | None, grammar: str | None) -> dict[str, Any]:
    """What an answer must fit, as options of `LLM.stream`. The file of a schema is read."""
    schema = None if json_schema is None else read_text(f"@{json_schema}", "the schema")
    lark = None if grammar is None else read_text(grammar, "the grammar")
    given: Any = {"json_schema": schema, "regex": regex, "grammar": lark}
    options = {name: value for name, value in given.items() if value is not None}
    if len(options) > 1:
        raise typer.BadParameter("give only one of --json-schema, --regex and --grammar")
    return options


def template_kwargs(text: str | None) -> dict[str, Any]:
    """What the chat template reads beside the messages, as an option of `LLM.stream`."""
    from llamajax.options import template_variables

    if text is None:
        return {}
    try:
        return {"chat_template_kwargs": template_variables(json.loads(text))}
    except (ValueError, RecursionError):
        raise typer.BadParameter(f"--chat-template-kwargs must be a JSON object, not {text!r:.80}") from None
    except RequestError as e:
        raise typer.BadParameter(str(e)) from None


def sampling(**values: Any) -> SamplingParams:
    """Raises a usage error for a value out of range."""
    try:
        return SamplingParams(**values)
    except RequestError as e:
        raise typer.BadParameter(str(e)) from None


def to_bytes(megabytes: float | None) -> int | None:
    """What --max-memory and --prefix-cache mean."""
    return None if megabytes is None else round(megabytes * 1e6)


def _use_threads(number: int | None) -> None:
    if number is not None:
        os.environ["LLAMAJAX_THREADS"] = str(number)


Model = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        autocompletion=model_names,
        help="A name ('llamajax models' lists them), a directory, a .gguf file, or a repository on the hub: "
        "its address, org/repo, or one of its GGUF files, org/repo:Q4_K_M or org/repo:file.gguf.",
    ),
]
MaxSeqLen = Annotated[
    int | None,
    typer.Option("--max-seq-len", min=1, help="Tokens that prompt and answer may take; the model's context."),
]
DTypeOption = Annotated[
    DType,
    typer.Option(
        "--dtype",
        "--quantize",
        help="How weights are kept; auto: as in their file (elsewhere than on a CPU, quantized ones become bf16); "
        "int8, q8_0, q4_k, q4_0: each smaller and less exact than the one before.",
    ),
]
CacheDTypeOption = Annotated[
    CacheDType,
    typer.Option(
        "--cache-dtype",
        help="How keys and values are kept; auto: in 16 bits on most devices; int8: on a CPU, in half of the memory.",
    ),
]
DeviceOption = Annotated[
    Device | None, typer.Option("--device", help="Where to compute; the first accelerator if there is one.")
]
System = Annotated[str | None, typer.Option("-s", "--system", help="The system message, or @FILE.")]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        "--max-memory",
        min=0,
        callback=finite,
        metavar="MB",
        help="Memory for keys and values, beside the weights: requests wait until there is room.",
        show_default="half of the computer's, or what an accelerator has left",
    ),
]
PrefixCache = Annotated[
    float | None,
    typer.Option(
        "--prefix-cache",
        min=0,
        callback=finite,
        metavar="MB",
        help="Memory for the beginnings of prompts: a prompt that begins alike prefills only the rest. 0 keeps none.",
        show_default="a 32nd of the computer's",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        callback=_use_threads,
        min=1,
        max=MAX_THREADS,
        help="Threads to compute with on a CPU; LLAMAJAX_THREADS, or else one for each processor.",
    ),
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 always takes the most probable token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the smallest set of tokens of this probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from the k most probable tokens; 0: all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens less probable than this, relative to the first.")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: repeats become rarer.")]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        parser=parse_seed,
        metavar="<int|random>",
        help="The same seed draws the same answer; random: one that is drawn now, and printed.",
    ),
]
Stop = Annotated[list[str], typer.Option("--stop", help="A text that ends the answer; may be given several times.")]
JsonSchema = Annotated[
    Path | None,
    typer.Option("--json-schema", metavar="FILE", help="The answer is JSON that is valid under this file's schema."),
]
Regex = Annotated[str | None, typer.Option("--regex", help="The whole answer matches this regular expression.")]
GrammarOption = Annotated[
    str | None, typer.Option("--grammar", help="The whole answer fits this grammar in Lark's form, or @FILE's.")
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="What the chat template reads beside the messages: '{\"enable_thinking\": false}' for Qwen3.",
    ),
]
Stats = Annotated[bool, typer.Option("--stats/--no-stats", help="Tokens and speed, on stderr, after the answer.")]
# Read by main, which handles errors; commands only accept it.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
