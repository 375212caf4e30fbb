"""Fetches a repository or a single file from the model hub, through huggingface_hub.

Tokens, cache, offline mode and progress bars are huggingface_hub's own and follow its settings. Ours is what
to ask for, and saying in one line what went wrong. It is imported when first needed, for that takes longer
than all else here.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamajax.errors import LlamaJaxError, RequestError
from llamajax.hub.cache import write_error

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

_WANTED = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")


def cached(repo: str) -> Path | None:
    """The repository's snapshot in huggingface_hub's cache, or None. Never touches the network."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(_snapshot(repo)(local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def fetch(repo: str, *, revision: str | None = None, progress: bool = True) -> Path:
    """A folder with the repository's safetensors, configuration and tokenizer.

    They are looked for at the top level, then in `original/` (the layout Meta ships).

    Raises:
      RequestError: the repository is missing, gated, unreachable, or has no safetensors.
      DiskFullError: the disk is full.
    """
    from huggingface_hub import list_repo_files

    with _explained(repo, revision):
        for inside in ("", "original/"):
            folder = Path(_complete(repo, revision, inside, progress), inside)
            if any(folder.glob("*.safetensors")):
                return folder
        files = list_repo_files(repo, revision=revision)
    at = f"{repo}@{revision}" if revision else repo
    if ggufs := [f"-m {at}:{file}" for file in files if file.endswith(".gguf")]:
        raise RequestError(f"{at} has GGUF files only; choose one: {', '.join(ggufs)}")
    raise RequestError(f"{at} has neither safetensors nor GGUF files, the two formats that can be read")


def fetch_file(repo: str, file: str, *, revision: str | None = None, progress: bool = True) -> Path:
    """One file of a repository. Raises as `fetch` does."""
    from huggingface_hub import hf_hub_download

    with _explained(repo, revision, file):
        _announce(repo, [hf_hub_download(repo, file, revision=revision, dry_run=True)], progress)
        return Path(hf_hub_download(repo, file, revision=revision, tqdm_class=_bars(progress)))


def _snapshot(repo: str, revision: str | None = None, inside: str = "") -> "partial[Any]":
    """snapshot_download of what we want from one folder of a repository."""
    from huggingface_hub import snapshot_download

    # It warns when no file matches: that is ours to judge, once we have looked everywhere.
    logging.getLogger("huggingface_hub._snapshot_download").setLevel(logging.ERROR)
    return partial(
        snapshot_download,
        repo,
        revision=revision,
        allow_patterns=[inside + pattern for pattern in _WANTED],
        # A pattern's * matches slashes too. What is consolidated is there a second time.
        ignore_patterns=[f"{inside}*/*", "consolidated*"],
    )


def _complete(repo: str, revision: str | None, inside: str, progress: bool) -> str:
    """The snapshot on disk: brought up to date, or as it is if the hub is out of reach."""
    from huggingface_hub import errors, hf_hub_download

    snapshot = partial(_snapshot(repo, revision, inside), tqdm_class=_bars(False))
    try:
        files = snapshot(dry_run=True)
    except errors.DryRunError:
        with suppress(errors.LocalEntryNotFoundError):
            return snapshot(local_files_only=True)
        raise
    # Asked for no file, it records which ones there are: an interrupted snapshot is then known to be incomplete.
    folder = snapshot(revision=files[0].commit_hash if files else revision, allow_patterns=[])
    # Its threads would not heed Ctrl-C until their files are done, which may take an hour.
    for file in _announce(repo, files, progress):
        hf_hub_download(repo, file.filename, revision=file.commit_hash, tqdm_class=_bars(progress))
    return folder


def _announce(repo: str, files: "list[DryRunFileInfo]", progress: bool) -> "list[DryRunFileInfo]":
    """Those of the files that are not on disk, after telling how much will travel."""
    missing = [file for file in files if file.will_download]
    if missing and progress:
        size = sum(file.file_size or 0 for file in missing)
        print(f"fetching {repo} ({size / 1e6:,.0f} MB)", file=sys.stderr, flush=True)
    return missing


def _bars(progress: bool) -> type:
    """huggingface_hub's progress bars, on a terminal only, and gone when done."""
    from huggingface_hub.utils import tqdm

    ours = {"leave": False} if progress and sys.stderr.isatty() else {"disable": True}

    class Bars(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, **ours})

    return Bars


@contextmanager
def _explained(repo: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    try:
        yield
    # The client raises its own errors, its HTTP library's and the system's: for us, all are a failed fetch.
    except Exception as error:
        raise _explain(error, repo, revision, file) from error


def _explain(error: Exception, repo: str, revision: str | None, file: str | None) -> LlamaJaxError:
    from huggingface_hub import constants, errors

    # "Not on this disk" and "no dry run" only follow from the cause: the hub is out of reach or refuses.
    consequence = isinstance(error, errors.LocalEntryNotFoundError | errors.DryRunError)
    cause = (consequence and error.__cause__) or error
    page = f"https://huggingface.co/{repo}"
    match cause:
        case errors.GatedRepoError():
            message = f"{repo} is gated: accept its licence at {page}, then `hf auth login` (or set HF_TOKEN)"
        case errors.RepositoryNotFoundError():
            message = f"the model hub has no repository {repo}, or it is private (then `hf auth login`)"
        case errors.RevisionNotFoundError():
            message = f"{repo} has no revision {revision!r}: see {page}"
        case errors.EntryNotFoundError():
            message = f"{repo} has no file {file!r}: see {page}/tree/{revision or 'main'}"
        case errors.OfflineModeIsEnabled():
            message = (
                f"{repo} is not, or not wholly, in {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE forbids "
                "fetching it: unset that variable, or give a local path"
            )
        case ValueError():
            message = f"{repo}: {' '.join(str(cause).split())}"
        case OSError(errno=int()) if not isinstance(cause, ConnectionError | TimeoutError):
            return write_error(cause, Path(constants.HF_HUB_CACHE), "HF_HOME")
        case _:
            reason = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
            message = f"cannot fetch {repo} from the model hub: {reason}; try again later, or give a local path"
    return RequestError(message)
