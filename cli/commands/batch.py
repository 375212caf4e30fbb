"""`llamajax batch`: a file of prompts, many answered at a time."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeVar

import typer

from llamajax.errors import LlamaJaxError, RequestError
from llamajax.hub.aliases import DEFAULT
from llamajax.serve import batch_file
from llamajax.serve.protocol import Prompt
from llamajax.text import one_line
from llamajax.types import Completion, SamplingParams

from .. import loading, options
from ..prompt import read_text
from ..render import note, note_if_interrupted, progress_bar

if TYPE_CHECKING:
    from llamajax import LLM

T = TypeVar("T")


def batch(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A .txt file has a prompt in each line; a .jsonl file objects with a prompt or messages, and options "
            "of their own, or OpenAI's batch format; - is stdin, which may be either.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where results are written as they finish; stdout.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the output of a run that was stopped, where it was.")
    ] = False,
    keep_order: Annotated[
        bool, typer.Option("--keep-order", help="Write results in the input's order, not as they finish.")
    ] = False,
    errors: Annotated[
        Path | None,
        typer.Option("--errors", help="Where bad lines are told; OUTPUT.errors.jsonl, or stderr without -o."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", min=1, help="Longest answer, in tokens.")
    ] = 50,
    model: options.Model = DEFAULT,
    system: options.System = None,
    temperature: options.Temperature = 0.6,
    top_p: options.TopP = 0.9,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 42,
    stop: options.Stop = [],  # noqa: B006 (Typer's way of an option that may be repeated)
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue prompts as they stand, without a chat template.")
    ] = False,
    slots: Annotated[int, typer.Option("--slots", min=1, help="How many are answered at the same time.")] = 32,
    max_seq_len: options.MaxSeqLen = None,
    dtype: options.DTypeOption = "auto",
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
    try:
        SamplingParams(**sampling)
    except RequestError as e:
        raise typer.BadParameter(str(e)) from None
    if not all(stop):
        raise typer.BadParameter("a stop text must not be empty", param_hint="--stop")
    if raw and system is not None:
        raise typer.BadParameter("a system message needs a chat template: leave out --raw or --system")
    if resume and output is None:
        raise typer.BadParameter("--resume needs the output to continue: name it with -o")
    if errors is None and output is not None:
        errors = output.with_name(output.name + ".errors.jsonl")
    named = [path.resolve() for path in (Path(file), output, errors) if path is not None]
    if len(set(named)) < len(named):
        raise typer.BadParameter("the input, --output and --errors must be different files")

    if system is not None:
        system = read_text(system, "the system message")
    defaults = batch_file.Defaults({**sampling, "max_new_tokens": max_new_tokens, "stop": stop}, system, raw)
    with sys.stdin.buffer if file == "-" else Path(file).open("rb") as lines:
        results = batch_file.ResultFile(output, resume) if output else None
        faults = batch_file.ResultFile(errors, resume) if errors else None
        run = _Run(defaults, results, faults, model)
        total = run.check(lines) if lines.seekable() else None
        llm = loading.load(model, max_seq_len=max_seq_len, dtype=dtype, device=device)
        as_json = {".txt": False, ".jsonl": True}.get(Path(file).suffix.lower())
        answers = llm.stream_batch(run.requests(lines, as_json), slots=slots)
        began = time.monotonic()
        stopped = f"(stopped; {output} has what was answered: the same command with --resume goes on)"
        # Results on a terminal show themselves how far it is.
        shown = sys.stderr.isatty() and not (output is None and sys.stdout.isatty())
        with note_if_interrupted(stopped) if output else nullcontext(), progress_bar("lines", shown=shown) as bar:
            task = bar.add_task("", total=total)
            for index, answer in _in_order(answers) if keep_order else answers:
                run.take(index, answer, llm)
                speed = run.tokens / (time.monotonic() - began)
                bar.update(task, completed=run.finished, description=f"{speed:.1f} tokens/s")
    speed = run.tokens / (time.monotonic() - began)
    see = f" (see {errors})" if run.bad and errors else ""
    note(f"[{run.answered} answered, {run.bad} bad{see}, {run.tokens} generated tokens, {speed:.1f} tokens/s]")
    if run.bad:
        raise typer.Exit(1)


class _Run:
    """What becomes of each line.

    Attributes:
      answered, tokens: lines and generated tokens of this run.
      bad: lines that have no answer, those of the runs that it continues among them.
    """

    def __init__(
        self,
        defaults: batch_file.Defaults,
        results: batch_file.ResultFile | None,
        faults: batch_file.ResultFile | None,
        model: str,
    ) -> None:
        self.answered = self.tokens = 0
        self.bad = len(faults.done) if faults else 0
        self._defaults = defaults
        self._results = results
        self._faults = faults
        self._model = model
        self._done = (results.done if results else set()) | (faults.done if faults else set())
        self._num_asked = 0
        self._asked: dict[int, batch_file.Source] = {}  # only those that are not answered yet
        self._before = len(self._done) - self.bad

    @property
    def finished(self) -> int:
        """Lines that need nothing more, those of the runs that it continues among them."""
        return self._before + self.answered + self.bad

    def check(self, lines: BinaryIO) -> int:
        """Counts the lines that are not blank, and goes back to the first.

        Raises RequestError if there are fewer lines than the results say.
        """
        start, num_lines, num_asking = lines.tell(), 0, 0
        for data in lines:
            num_lines += 1
            num_asking += bool(data.strip())
        lines.seek(start)
        if self._results and (last := max(self._done, default=0)) > num_lines:
            raise RequestError(f"{self._results.path} is not of this input: it has line {last}, the input {num_lines}")
        return num_asking

    def requests(self, lines: Iterable[bytes], as_json: bool | None) -> Iterator[tuple[Prompt, dict[str, Any]]]:
        """Reads the lines that are to be answered, as far as they are asked for."""
        for number, data in enumerate(lines, 1):
            if number in self._done or not data.strip():
                continue
            if as_json is None:  # the first line decides
                as_json = batch_file.is_json(data)
            source = batch_file.Source(number)
            try:
                fields = batch_file.read_fields(data, as_json)
                source = batch_file.read_source(number, fields)
                request = batch_file.read_request(fields, self._defaults)
            except RequestError as e:
                self._report(source, e)
                continue
            self._asked[self._num_asked] = source
            self._num_asked += 1
            yield request

    def take(self, index: int, answer: Completion | LlamaJaxError, llm: "LLM") -> None:
        """Writes what came of a request."""
        source = self._asked.pop(index)
        if isinstance(answer, LlamaJaxError):
            self._report(source, answer)
            return
        result = source.answer(answer, llm.tokenizer, self._model)
        if self._results:
            self._results.write(result)
        else:
            sys.stdout.buffer.write(batch_file.as_line(result))
            sys.stdout.buffer.flush()
        self.answered += 1
        self.tokens += len(answer.token_ids)

    def _report(self, source: batch_file.Source, error: LlamaJaxError) -> None:
        if self._faults:
            self._faults.write(source.error(error))
        else:
            note(f"line {source.number}: {one_line(error)}")
        self.bad += 1


def _in_order(results: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
    """Holds back each result until those before it are there: few, since a request soon gets its turn."""
    early: dict[int, T] = {}
    following = 0
    for index, result in results:
        early[index] = result
        while following in early:
            yield following, early.pop(following)
            following += 1
