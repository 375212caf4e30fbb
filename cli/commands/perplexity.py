"""`llamajax perplexity`: how well a model predicts a text, and what another dtype or file of it changes."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamajax.errors import RequestError
from llamajax.hub.aliases import DEFAULT
from llamajax.utf8 import from_utf8

from .. import loading, options
from ..interrupt import raised
from ..render import note, print_json, print_rows, progress_bar

if TYPE_CHECKING:
    from llamajax.bench.perplexity import Estimate, Measured


File = Annotated[str, typer.Argument(metavar="FILE", help="A text in UTF-8; - is stdin.")]
Context = Annotated[int, typer.Option("--context", min=5, help="Tokens of a window.")]
Chunks = Annotated[int | None, typer.Option("--chunks", min=1, help="Only the first so many windows.")]
SaveLogits = Annotated[
    Path | None,
    typer.Option("--save-logits", help="Write a file for --compare: 2 bytes a scored token and vocabulary entry."),
]
Compare = Annotated[
    Path | None,
    typer.Option("--compare", help="Saved logits of the same text: print how far this run is from them."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")]


def perplexity(
    file: File,
    context: Context = 512,
    chunks: Chunks = None,
    save_logits: SaveLogits = None,
    compare: Compare = None,
    as_json: AsJson = False,
    model: options.Model = DEFAULT,
    dtype: options.DTypeOption = "auto",
    cache_dtype: options.CacheDTypeOption = "auto",
    device: options.DeviceOption = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Measure how well a model predicts a text: the lower the perplexity, the better.

    The text is read without a template, in windows of --context tokens that know nothing of each other.

    Each begins with the model's BOS token, if it has one, and goes on with the next tokens of the text.

    As in llama.cpp, only tokens of a window's second half are scored: each has at least half a window before it.

    A last window that is not full is left out, but a text of less than a window is one.

    --compare prints the KL divergence of this run's predictions from the saved ones, in nats a token: 0 if equal.

    It also prints how often both find the same token the most probable, and the ratio of the perplexities.

    What follows a ± is the standard error.
    """
    text = _read(file, save_logits, compare)
    from llamajax.bench.saved_logits import SavedLogits

    saved = SavedLogits(compare) if compare else None
    llm = loading.load(model, max_seq_len=None, dtype=dtype, cache_dtype=cache_dtype, device=device)
    from llamajax.bench.perplexity import measure
    from llamajax.bench.session import kept_dtype
    from llamajax.loading import find_device

    # Ctrl-C raises, so that half a file of logits is removed.
    with raised(), progress_bar("windows", shown=sys.stderr.isatty()) as bar:
        task = bar.add_task("")
        measured = measure(
            llm,
            text,
            context=context,
            max_windows=chunks,
            save=save_logits,
            saved=saved,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    dtype_kept = kept_dtype(llm)
    if as_json:
        about = {"model": model, "dtype": dtype_kept, "device": find_device(device).device_kind}
        print_json(about | asdict(measured))
    else:
        _print(measured)
    note(f"[{dtype_kept}, {measured.tokens_per_second:.1f} tokens/s]")


def _read(file: str, *others: Path | None) -> str:
    """The text, which must be none of the other files."""
    named = [path.resolve() for path in (Path(file), *others) if path is not None]
    if len(set(named)) < len(named):
        raise typer.BadParameter("the text, --save-logits and --compare must be different files")
    source, data = ("stdin", sys.stdin.buffer.read()) if file == "-" else (file, Path(file).read_bytes())
    text = from_utf8(data, source)
    if not text:
        raise RequestError(f"{source} is empty: expected a text")
    return text


def _print(measured: "Measured") -> None:
    rows = {
        "perplexity": _figure(measured.perplexity, 4),
        "tokens scored": str(measured.tokens),
        "windows": f"{measured.windows} of {measured.context} tokens",
    }
    if measured.comparison:
        rows |= {
            "saved perplexity": _figure(measured.comparison.saved_perplexity, 4),
            "ratio": _figure(measured.comparison.perplexity_ratio, 4),
            "KL divergence": _figure(measured.comparison.kl_divergence, 6),
            "same top token, %": _figure(measured.comparison.same_top, 2, unit=0.01),
        }
    print_rows(rows)


def _figure(estimate: "Estimate", digits: int, unit: float = 1) -> str:
    return f"{estimate.value / unit:.{digits}f} ± {estimate.error / unit:.{digits}f}"
