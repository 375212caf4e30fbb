"""A batch from its lines to its results: which lines are asked, and what becomes of each. Knows no terminal."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from llamajax.errors import LlamaJaxError, RequestError
from llamajax.tools import Tools
from llamajax.types import Completion

from .batch_file import Asked, Defaults, Source, read_request, read_source
from .input_file import Input, Line
from .protocol import Prompt
from .result_file import ResultFile, Settings
from .work import Work

if TYPE_CHECKING:
    from llamajax.llm import LLM

T = TypeVar("T")


@dataclass
class _Pending:
    """A line whose choices are on their way."""

    source: Source
    tools: Tools | None
    choices: list[Completion | LlamaJaxError | None]


@dataclass
class BatchRun:
    """What becomes of each line of an input.

    Attributes:
      lines: the input.
      defaults: what holds for each line.
      settings: the command's options, which digests are made of.
      model: its name, for the results.
      files: the results and bad lines of the runs that this one continues: those lines are left out.
      write: takes the line of each answer.
      report: takes each bad line, and what is wrong with it.
      on_token: called after each token of an answer.
      answered: lines of this run that have an answer.
      bad: lines of this run that have none.
      total: lines that are not blank, if they can be counted.
      work: what the requests of this run cost.
    """

    lines: Input
    defaults: Defaults
    settings: Settings
    model: str
    files: Sequence[ResultFile]
    write: Callable[[Mapping[str, Any]], None]
    report: Callable[[Source, LlamaJaxError], None]
    on_token: Callable[[], None]
    answered: int = 0
    bad: int = 0
    total: int | None = None
    work: Work = field(default_factory=Work)
    _asked: dict[int, tuple[_Pending, int]] = field(default_factory=dict)  # by index: a line, and which choice
    _num_asked: int = 0
    _num_read: int = 0  # lines that were to be answered, bad ones among them

    @property
    def num_done(self) -> int:
        """Lines that the runs before had done."""
        return sum(len(file.done) for file in self.files)

    @property
    def finished(self) -> int:
        """Lines that need nothing more."""
        return self.num_done + self.answered + self.bad

    @property
    def work_left(self) -> float | None:
        """What this run has still to do, in the unit of `work`; None if nobody knows.

        A line that was not read yet is taken for the mean of those that were.
        """
        if self.total is None or not self._num_read:
            return None
        num_unread = self.total - self.num_done - self._num_read
        return self.work.left + num_unread * (self.work.done + self.work.left) / self._num_read

    def check(self) -> None:
        """Counts the lines, and compares those that are done with what was answered, if they can be read twice.

        Raises RequestError if they are others.
        """
        if not self.lines.is_counted:
            return
        self.total = number = 0
        for line in self.lines.lines():
            assert line is not None
            number = line.number
            self.total += not line.is_blank
            self._is_done(line)
        self._check_length(number)

    def run(self, llm: "LLM", *, slots: int, keep_order: bool, prefix_cache: int | None = None) -> None:
        """Answers the lines; the options are those of `LLM.stream_batch`."""
        self.work.num_slots = slots
        answers = llm.stream_batch(self._requests(llm), slots=slots, prefix_cache=prefix_cache, on_token=self._token)
        for index, answer in _in_order(answers) if keep_order else answers:
            self._take(index, answer, llm)

    def _token(self, index: int) -> None:
        self.work.token(index)
        self.on_token()

    def _requests(self, llm: "LLM") -> Iterator[tuple[Prompt, Mapping[str, Any]] | None]:
        """What the lines ask for, read as far as it is wanted; None while a pipe's next line is not there."""
        number = 0
        # While answers are on their way, a line that is not there yet must not hold them up.
        for line in self.lines.lines(may_wait=lambda: not self._asked):
            if line is None:
                yield None
                continue
            number = line.number
            if self._is_done(line) or line.is_blank:
                continue
            self._num_read += 1
            source = Source(line.number, self._digest(line))
            try:
                fields = line.fields()
                source = read_source(source.number, source.digest, fields)
                asked = read_request(line.number, fields, self.defaults)
            except RequestError as e:
                self._fail(source, e)
                continue
            yield from self._ask(source, asked, len(line.data), llm.max_seq_len)
        self._check_length(number)

    def _ask(
        self, source: Source, asked: Asked, num_bytes: int, context: int
    ) -> Iterator[tuple[Prompt, Mapping[str, Any]]]:
        pending = _Pending(source, asked.tools, [None] * len(asked.choices))
        for choice, options in enumerate(asked.choices):
            self._asked[self._num_asked] = pending, choice
            self.work.add(self._num_asked, min(options["max_new_tokens"] or context, context), num_bytes)
            self._num_asked += 1
            yield asked.prompt, options

    def _take(self, index: int, answer: Completion | LlamaJaxError, llm: "LLM") -> None:
        """Writes what came of a line when the last of its choices is there."""
        pending, choice = self._asked.pop(index)
        self.work.end(index, by_itself=isinstance(answer, Completion) and answer.finish_reason == "stop")
        pending.choices[choice] = answer
        if None in pending.choices:
            return
        completions = [it for it in pending.choices if isinstance(it, Completion)]
        errors = [it for it in pending.choices if isinstance(it, LlamaJaxError)]
        if errors:
            self._fail(pending.source, errors[0])
            return
        calls = (llm.tool_format, pending.tools) if pending.tools else None
        self.write(pending.source.answer(completions, llm.tokenizer, self.model, calls))
        self.answered += 1

    def _fail(self, source: Source, error: LlamaJaxError) -> None:
        self.report(source, error)
        self.bad += 1

    def _digest(self, line: Line) -> str:
        return self.settings.digest(line.data, as_json=line.as_json)

    def _is_done(self, line: Line) -> bool:
        found = [file for file in self.files if line.number in file.done]
        return bool(found) and all(file.check(line.number, self._digest(line)) for file in found)

    def _check_length(self, num_lines: int) -> None:
        for file in self.files:
            if (last := max(file.done, default=0)) > num_lines:
                raise RequestError(
                    f"{file.path} is not of this input: it has line {last}, the input {num_lines}. Put the input "
                    "back, or choose another file"
                )


def _in_order(results: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
    """Holds back each result until those before it are there: few, since a request soon gets its turn."""
    early: dict[int, T] = {}
    following = 0
    for index, result in results:
        early[index] = result
        while following in early:
            yield following, early.pop(following)
            following += 1
