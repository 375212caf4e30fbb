"""How answers and figures look. stdout is the answer, stderr is everything else."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from llamajax.text import printable
from llamajax.types import Completion

from .interrupt import last_words

if TYPE_CHECKING:
    from rich.progress import Progress


def write_stream(pieces: Iterable[str], show: Callable[[str], str] | None = None) -> None:
    """Writes an answer as it comes, and ends its last line: what `show` makes of each piece, or `shown`."""
    show = show or shown
    end = ""
    try:
        with last_words("\n", sys.stdout.fileno()):
            for piece in pieces:
                sys.stdout.write(show(piece))
                sys.stdout.flush()
                end = piece[-1]
    finally:
        if end != "\n":
            sys.stdout.write("\n")
            sys.stdout.flush()


def shown(text: str) -> str:
    """An answer or a name as stdout gets it. On a terminal, control characters become visible, and are not obeyed."""
    return printable(text) if sys.stdout.isatty() else text


def stats_line(completion: Completion) -> str:
    """What an answer took, in one line."""
    prompt = f"{completion.prompt_tokens} prompt"
    if completion.cached_tokens:
        prompt += f" ({completion.cached_tokens} cached)"
    return (
        f"[{prompt} + {len(completion.token_ids)} generated tokens, "
        f"first token {completion.timings.time_to_first_token:.2f} s, "
        f"{completion.tokens_per_second:.1f} tokens/s, {completion.finish_reason}]"
    )


def note_cut(completion: Completion, max_new_tokens: int, max_seq_len: int) -> None:
    """Says what cut an answer off, if anything did."""
    if completion.finish_reason == "length":
        room = max_seq_len - completion.prompt_tokens
        note(f"(cut off: {f'-n {max_new_tokens}' if max_new_tokens <= room else 'the context is full'})")


def note(text: str) -> None:
    """Says something about the answer, dimmed on a terminal."""
    print(_dimmed(text), file=sys.stderr, flush=True)


def note_if_interrupted(text: str) -> AbstractContextManager[None]:
    """If Ctrl-C ends the command meanwhile, this note is its last."""
    return last_words(_dimmed(text) + "\n", sys.stderr.fileno())


def _dimmed(text: str) -> str:
    dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return f"\x1b[2m{printable(text)}\x1b[0m" if dim else printable(text)


def erase_if_interrupted() -> AbstractContextManager[None]:
    """If Ctrl-C ends the command meanwhile, the line of a progress bar goes and the cursor that rich hid is back."""
    return last_words("\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else "", sys.stderr.fileno())


def print_rows(rows: Mapping[str, object]) -> None:
    """Prints each name and its value on a line."""
    width = max(map(len, rows))
    for name, value in rows.items():
        line = str(value).replace("\n", "\\n")
        print(f"{name.ljust(width)}  {printable(line)}")


@contextmanager
def progress_bar(unit: str, *, shown: bool, own_time: bool = False) -> Iterator["Progress"]:
    """On stderr: how many of how many, the task's description, and the time left unless the description has it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        MofNCompleteColumn(),
        TextColumn(unit),
        BarColumn(),
        TextColumn("{task.description}"),
        *([] if own_time else [TimeRemainingColumn()]),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # it would go to stderr
        disable=not shown,
    )
    with erase_if_interrupted(), progress:
        yield progress


def print_answer_json(completion: Completion, model: str, seed: int) -> None:
    """Prints an answer as one JSON object."""
    generated = len(completion.token_ids)
    print_json(
        {
            "model": model,
            "seed": seed,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "usage": {
                "prompt_tokens": completion.prompt_tokens,
                "completion_tokens": generated,
                "total_tokens": completion.prompt_tokens + generated,
            },
            "timings": {
                "time_to_first_token": completion.timings.time_to_first_token,
                "decode_time": completion.timings.decode_time,
                "tokens_per_second": completion.tokens_per_second,
            },
        }
    )


def print_json(value: object) -> None:
    """Prints a value as JSON, in one line."""
    print(printable(json.dumps(value, ensure_ascii=sys.stdout.encoding != "utf-8")))


def human_count(number: int) -> str:
    """1235814400 -> '1.24 B'."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def human_bytes(number: int) -> str:
    """98362432 -> '98.4 MB'; powers of ten, as disks and downloads are counted."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"
