"""Fetches a repository's model from the model hub, through huggingface_hub.

Tokens, cache, offline mode and progress bars are huggingface_hub's own and follow its settings. Ours is what
to ask for, in which order, and saying in one line what went wrong. It is imported when first needed, for that takes
longer than all else here.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llamajax.errors import ConfigError, LlamaJaxError, RequestError
from llamajax.hub.cache import write_error
from llamajax.hub.choice import SMALL, choose, parts, weights
from llamajax.hub.local import adapter_error, indexed_shards, whole_model
from llamajax.hub.names import HubName
from llamajax.text import one_line

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo


def cached(name: HubName) -> Path | None:
    """The model in huggingface_hub's cache, if all of it is there. Never touches the network."""
    from huggingface_hub import constants

    if not Path(constants.HF_HUB_CACHE, "--".join(["models", *name.repo.split("/")])).is_dir():
        return None  # before the rest is imported, which takes 0.2 s
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[])
    except (LocalEntryNotFoundError, ValueError):  # not there, or no possible name
        return None
    return whole_model(Path(snapshot), name.wanted, name.folder)


def fetch(name: HubName, *, progress: bool = True) -> Path:
    """The .gguf file, or a folder with safetensors, configuration and tokenizer, fetched unless it is on disk.

    The configuration comes first, and the rest only if its architecture is supported.

    Raises:
      RequestError: the repository is missing, gated, unreachable, or has no model that can be read.
      ConfigError: its model's architecture is not supported.
      DiskFullError: the disk is full.
    """
    from huggingface_hub import HfApi

    try:
        with _explained(name):
            info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    except RequestError:
        # The hub is out of reach or refuses: use the files of an earlier fetch.
        if found := cached(name):
            return found
        raise
    return _Repository(name, info, progress).fetch()


class _Repository:
    """A repository, or a folder of it, at a commit."""

    def __init__(self, name: HubName, info: "ModelInfo", progress: bool) -> None:
        self._name, self._commit, self._progress = name, info.sha, progress
        self._gguf_architecture = (info.gguf or {}).get("architecture", "llama")
        self._prefix = f"{name.folder}/" if name.folder else ""
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        self._sizes = {
            path.removeprefix(self._prefix): size for path, size in sizes.items() if path.startswith(self._prefix)
        }

    def fetch(self) -> Path:
        where = self._name.repo if self._name.revision is None else f"{self._name.repo}@{self._name.revision}"
        names = self._sizes.keys()
        if "adapter_config.json" in names and "config.json" not in names:
            raise adapter_error(where, self._download("adapter_config.json"))
        chosen = choose(names, self._name.wanted, where, lambda file: f"{where}:{self._prefix}{file}")
        if chosen.lower().endswith(".gguf"):
            from llamajax.families.registry import FAMILIES, unknown

            if all(family.gguf != self._gguf_architecture for family in FAMILIES.values()):
                raise ConfigError(f"{where}: {unknown(self._gguf_architecture)}")
            if self._name.wanted is None and self._progress:
                print(f"{where} has GGUF files only: taking {one_line(chosen)}", file=sys.stderr, flush=True)
            return self._download_all(parts(chosen))
        inside = f"{chosen}/" if chosen else ""
        small = [inside + file for file in SMALL if inside + file in names]
        config = next((name for name in (f"{inside}config.json", f"{inside}params.json") if name in names), None)
        if config is None:
            raise RequestError(f"{where} has no config.json, so its safetensors are not a model that can be read")
        _check_config(where, self._download(config))
        folder = self._download_all(small).parent
        self._download_all(weights(names, chosen, indexed_shards(folder)))
        return folder

    def _download_all(self, files: Sequence[str]) -> Path:
        """Returns the first of them."""
        missing = sum(self._sizes.get(file, 0) for file in files if self._on_disk(file) is None)
        if self._progress and missing >= 1e6:
            print(f"fetching {self._name.repo} ({missing / 1e6:,.0f} MB)", file=sys.stderr, flush=True)
        # One by one: the client's threads would not heed Ctrl-C until their files are done, which may take an hour.
        first, *_ = [self._download(file) for file in files]
        return first

    def _download(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        if found := self._on_disk(file):
            return found
        path = self._prefix + file
        # The client remembers a revision's commit only if it is asked for the revision by name.
        is_first = file.lower().endswith(("config.json", "params.json", ".gguf"))
        with _explained(self._name, path):
            revision = self._name.revision if is_first else self._commit
            return Path(hf_hub_download(self._name.repo, path, revision=revision, tqdm_class=_bars(self._progress)))

    def _on_disk(self, file: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._name.repo, self._prefix + file, revision=self._commit)
        return Path(found) if isinstance(found, str) else None


def _check_config(where: str, path: Path) -> None:
    from llamajax.families import from_hf, from_meta

    make = from_hf if path.name == "config.json" else from_meta
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ConfigError("expected a JSON object")
        make(content)
    except (ConfigError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {path.name}: {error}") from error


def _bars(progress: bool) -> type:
    """huggingface_hub's progress bars, on a terminal only, and gone when done."""
    from huggingface_hub.utils import tqdm

    ours = {"leave": False} if progress and sys.stderr.isatty() else {"disable": True}

    class Bars(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            named = {**kwargs, "desc": one_line(kwargs.get("desc") or "")}
            super().__init__(*args, **{**named, **ours})

    return Bars


@contextmanager
def _explained(name: HubName, file: str | None = None) -> Iterator[None]:
    try:
        yield
    # The client raises its own errors, its HTTP library's and the system's: for us, all are a failed fetch.
    except Exception as error:
        raise _explain(error, name, file) from error


def _explain(error: Exception, name: HubName, file: str | None) -> LlamaJaxError:
    from huggingface_hub import constants, errors

    repo, revision = name.repo, name.revision
    # "Not on this disk" only follows from the cause: the hub is out of reach or refuses.
    cause = (isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__) or error
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
        case errors.HfHubHTTPError(response=object(status_code=401 | 403)):
            message = (
                f"the model hub does not let you read {repo}: `hf auth login`, or set HF_TOKEN to a token that may"
            )
        case errors.HfHubHTTPError(response=object(status_code=int(status), reason_phrase=str(reason))):
            message = f"the model hub answers {status} ({reason}) for {repo}: try again later, or give a local path"
        case errors.OfflineModeIsEnabled():
            message = (
                f"{repo} is not, or not wholly, in {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE forbids "
                "fetching it: unset that variable, or give a local path"
            )
        case ValueError():
            message = f"{repo}: {one_line(cause)}"
        case OSError(errno=int()) if not isinstance(cause, ConnectionError | TimeoutError):
            return write_error(cause, Path(constants.HF_HUB_CACHE), "HF_HOME")
        case _:
            reason = one_line(cause).rstrip(".") or type(cause).__name__
            message = f"cannot fetch {repo} from the model hub: {reason}; try again later, or give a local path"
    return RequestError(message)
