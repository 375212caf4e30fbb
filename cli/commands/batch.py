"""`llamajax batch`: a file of prompts, many answered at a time."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from llamajax.errors import LlamaJaxError, RequestError
from llamajax.hub.aliases import DEFAULT
from llamajax.serve import batch_file
from llamajax.serve.batch_run import BatchRun
from llamajax.serve.input_file import Format, Input
from llamajax.serve.result_file import SETTINGS_SUFFIX, ResultFile, Settings
from llamajax.serve.work import Pace
from llamajax.text import one_line
from llamajax.types import SamplingParams

from .. import loading, options
from ..prompt import read_text
from ..render import note, note_if_interrupted, progress_bar

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A .txt file has a prompt in each line; a .jsonl or .ndjson file objects with a prompt or messages, "
        "and options of their own, or OpenAI's batch format; a .json file an array of them. - is stdin.",
    ),
]
FormatOption = Annotated[
    Format | None,
    typer.Option("--format", help="What FILE is, whatever its name; stdin is what its first line shows."),
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Where results are written as they finish; stdout.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the output of a run that was stopped, where it was.")]
KeepOrder = Annotated[
    bool, typer.Option("--keep-order", help="Write results in the input's order, not as they finish.")
]
Errors = Annotated[
    Path | None,
    typer.Option("--errors", help="Where bad lines are written; OUTPUT.errors.jsonl, or stderr without -o."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--max-new-tokens",
        min=1,
        help="Longest answer, in tokens: 50; of OpenAI's lines, 16 for completions, for chats what the context leaves.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        parser=options.parse_seed,
        metavar="<int|random>",
        help="What each line's own seed is made of; random: a number that is drawn now, and printed.",
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue prompts as they stand, without a chat template.")]
Slots = Annotated[int, typer.Option("--slots", min=1, help="How many are answered at the same time.")]


def batch(
    file: File,
    format: FormatOption = None,
    output: Output = None,
    resume: Resume = False,
    keep_order: KeepOrder = False,
    errors: Errors = None,
    max_new_tokens: MaxNewTokens = None,
    model: options.Model = DEFAULT,
    system: options.System = None,
    chat_template_kwargs: options.TemplateKwargs = None,
    temperature: options.Temperature = 0.6,
    top_p: options.TopP = 0.9,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: Seed = 42,
    stop: options.Stop = [],  # noqa: B006 (Typer's way of an option that may be repeated)
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.GrammarOption = None,
    raw: Raw = False,
    slots: Slots = 32,
    max_memory: options.MaxMemory = None,
    prefix_cache: options.PrefixCache = None,
    max_seq_len: options.MaxSeqLen = None,
    dtype: options.DTypeOption = "auto",
    cache_dtype: options.CacheDTypeOption = "auto",
    device: options.DeviceOption = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Answer each line of a file, and write the answers as JSON lines.

    Options hold for each line that does not give its own. Exit code 1 if there were bad lines.
    """
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    _check(sampling, stop, raw and (system is not None or chat_template_kwargs is not None))
    files = _Files.of(file, format, output, errors, resume)
    options.note_seed(seed)
    if system is not None:
        system = read_text(system, "the system message")
    given = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    given |= options.template_kwargs(chat_template_kwargs)
    defaults = batch_file.Defaults(
        {**sampling, **given, "stop": stop, **options.constraint(json_schema, regex, grammar)}, system, raw
    )
    kept: dict[str, Any] = {"dtype": dtype, "cache_dtype": cache_dtype, "device": device, "max_seq_len": max_seq_len}
    settings = _settings(model, kept, defaults, max_new_tokens)
    engine = {"slots": slots, "keep_order": keep_order, "prefix_cache": options.to_bytes(prefix_cache)}
    bounded = {**kept, "max_memory": options.to_bytes(max_memory)}
    _answer(files, defaults, settings, model, bounded, engine)


def _check(sampling: Mapping[str, Any], stop: list[str], raw_messages: bool) -> None:
    """Raises BadParameter for options that no line could have."""
    try:
        SamplingParams(**sampling)
    except RequestError as e:
        raise typer.BadParameter(str(e)) from None
    if not all(stop):
        raise typer.BadParameter("a stop text must not be empty", param_hint="--stop")
    if raw_messages:
        raise typer.BadParameter(
            "messages need a chat template: leave out --raw, or --system and --chat-template-kwargs"
        )


def _settings(
    model: str, kept: Mapping[str, Any], defaults: batch_file.Defaults, max_new_tokens: int | None
) -> Settings:
    """What --resume must find as it was, since it changes answers."""
    return Settings(
        {
            "model": str(Path(model).resolve()) if Path(model).exists() else model,
            "model files": _written(Path(model)),
            **kept,
            "system": defaults.system,
            "raw": defaults.raw,
            "max_new_tokens": max_new_tokens,
            **defaults.options,
        }
    )


class _Files(NamedTuple):
    """Where lines are read, and answers and errors written: without a path, to stdout and stderr.

    Attributes:
      format: the input's, whatever its name.
      settings: where the options are kept that --resume compares.
      resume: whether the output of an earlier run is continued.
    """

    input: str
    format: Format | None
    output: Path | None
    errors: Path | None
    settings: Path | None
    resume: bool

    @classmethod
    def of(cls, input: str, format: Format | None, output: Path | None, errors: Path | None, resume: bool) -> "_Files":
        """Raises BadParameter if one would be another."""
        if output == Path("-"):
            output = None
        if resume and output is None:
            raise typer.BadParameter("--resume needs the output to continue: name it with -o")
        if errors is None and output is not None:
            errors = _beside(output, ".errors.jsonl")
        settings = output and _beside(output, SETTINGS_SUFFIX)
        named = [path.resolve() for path in (Path(input), output, errors, settings) if path is not None]
        if len(set(named)) < len(named):
            raise typer.BadParameter(
                f"the input, --output, --errors and OUTPUT{SETTINGS_SUFFIX} must be different files"
            )
        return cls(input, format, output, errors, settings, resume)


def _answer(
    files: _Files,
    defaults: batch_file.Defaults,
    settings: Settings,
    model: str,
    kept: Mapping[str, Any],
    engine: Mapping[str, Any],
) -> None:
    """Answers the lines, and notes how many. `kept` is for `loading.load`, `engine` for `BatchRun.run`."""
    output = files.output
    with sys.stdin.buffer if files.input == "-" else Path(files.input).open("rb") as source:
        results = ResultFile(output, files.resume) if output else None
        faults = ResultFile(files.errors, files.resume) if files.errors else None
        progress = _Progress(shown=sys.stderr.isatty() and not (output is None and sys.stdout.isatty()))
        run = BatchRun(
            Input(source, "stdin" if files.input == "-" else files.input, files.format),
            defaults,
            settings,
            model,
            files=[opened for opened in (results, faults) if opened],
            write=results.write if results else _print_result,
            report=lambda line, error: faults.write(line.error(error)) if faults else _note_fault(line, error),
            on_token=progress.token,
        )
        if files.settings and run.num_done:
            settings.check(files.settings)
        run.check()
        if files.settings and not run.num_done:
            settings.save(files.settings)
        llm = loading.load(model, **kept)
        stopped = f"(stopped; {output} has what was answered: the same command with --resume goes on)"
        with note_if_interrupted(stopped) if output else nullcontext(), progress.of(run):
            run.run(llm, **engine)
    bad = run.bad + (len(faults.done) if faults else 0)
    see = f" (see {files.errors})" if bad and files.errors else ""
    note(
        f"[{run.answered} answered, {bad} bad{see}, {run.work.tokens} generated tokens, {progress.speed:.1f} tokens/s]"
    )
    if bad:
        raise typer.Exit(1)


def _beside(output: Path, suffix: str) -> Path | None:
    """A file that belongs to the output; None beside a pipe or a device, /dev/stdout for one."""
    if (output.exists() and not output.is_file()) or output.absolute().parts[1] in ("dev", "proc"):
        return None
    return output.with_name(output.name + suffix)


def _written(model: Path) -> dict[str, list[int]]:
    """The size of each file of a local model, and when it was written, in ns: another file answers otherwise."""
    files = [model] if model.is_file() else sorted(model.iterdir()) if model.is_dir() else []
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()}


def _print_result(value: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(batch_file.as_line(value))
    sys.stdout.buffer.flush()


def _note_fault(line: batch_file.Source, error: LlamaJaxError) -> None:
    note(f"line {line.number}: {one_line(error)}")


class _Progress:
    """A bar of how far a batch is, in lines, and the time that its work will take."""

    _SECONDS = 0.2  # between two looks

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._next_look = 0.0

    @contextmanager
    def of(self, run: BatchRun) -> Iterator[None]:
        """Shows it meanwhile."""
        from llamajax.engine.compilations import on_compilation

        self._run = run
        self._began = time.monotonic()
        self._pace = Pace()
        self._compiling: list[float] = []  # seconds of each program
        with (
            on_compilation(self._compiling.append),
            progress_bar("lines", shown=self._shown, own_time=True) as self._bar,
        ):
            self._task = self._bar.add_task("", total=run.total, completed=run.finished)
            yield

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self._run.work.tokens / (time.monotonic() - self._began)

    def token(self) -> None:
        """Looks again, if it is time."""
        now = time.monotonic()
        if not self._shown or now < self._next_look:
            return
        self._next_look = now + self._SECONDS
        # Programs are compiled early, and few of them later.
        speed = self._pace.look(now - sum(self._compiling), self._run.work.done)
        left = self._run.work_left
        time_left = f", {timedelta(seconds=round(left / speed))} left" if speed and left is not None else ""
        self._bar.update(self._task, completed=self._run.finished, description=f"{self.speed:.1f} tokens/s{time_left}")
