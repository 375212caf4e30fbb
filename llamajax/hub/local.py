"""Models in folders of this disk: what a folder holds, whole or not, as its owner or the hub's client left it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from llamajax.errors import CheckpointError, RequestError
from llamajax.hub.choice import choose, parts, weights

_POINTER = b"version https://git-lfs.github.com/spec/"


def find_model(folder: Path) -> Path:
    """The folder itself if it has safetensors, else its only GGUF file; of the hub's cache, the snapshot of main.

    Raises:
      RequestError: it has several GGUF files, or an adapter.
      CheckpointError: a file is not the file itself but git-lfs's pointer to it.
    """
    if (folder / "snapshots").is_dir():
        folder = _newest_snapshot(folder)
    names = _names(folder)
    if "adapter_config.json" in names and "config.json" not in names:
        raise adapter_error(str(folder), folder / "adapter_config.json")
    chosen = ""
    if not weights(names) and not weights(names, "original") and any(name.lower().endswith(".gguf") for name in names):
        chosen = choose(names, None, str(folder), lambda name: str(folder / name))
    refuse_pointers(folder / name for name in (parts(chosen) if chosen else names))
    return folder / chosen


def whole_model(snapshot: Path, wanted: str | None, folder: str) -> Path | None:
    """The model in a snapshot of the hub's cache, where each name is a link to a whole file; None if some are missing.

    Args:
      wanted: as in `choose`.
      folder: of the repository.
    """
    snapshot = snapshot / folder
    names = _names(snapshot)
    try:
        chosen = choose(names, wanted, str(snapshot), str)
    except RequestError:
        return None
    is_file = chosen.lower().endswith(".gguf")
    needed = parts(chosen) if is_file else weights(names, chosen, indexed_shards(snapshot / chosen))
    return snapshot / chosen if needed and names.issuperset(needed) else None


def is_gguf(path: Path) -> bool:
    """By its name, or by its first bytes: Ollama names its files by their digests."""
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def indexed_shards(folder: Path) -> set[str]:
    """The files that a folder's index of shards names; none if there is no index, or a broken one."""
    try:
        content = json.loads((folder / "model.safetensors.index.json").read_bytes())
        return {name for name in content["weight_map"].values() if Path(name).name == name}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return set()  # the reader of weights says what is wrong with it


def adapter_error(where: str, config: Path) -> RequestError:
    try:
        base = json.loads(config.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        base = "another model"
    return RequestError(
        f"{where} is an adapter of {base!s:.200}, and adapters cannot be read: choose a repository with the adapter "
        "merged into its model"
    )


def refuse_pointers(files: Iterable[Path]) -> None:
    """Raises CheckpointError for a file that git left a pointer for, because git-lfs was not installed."""
    for path in files:
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(_POINTER):
            raise CheckpointError(
                f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in {path.parent}"
            )


def _newest_snapshot(cache: Path) -> Path:
    """Of a repository's folder in the hub's cache: what main stands for, or else the one that was made last."""
    main = cache / "refs" / "main"
    if main.is_file() and (snapshot := cache / "snapshots" / main.read_text("utf-8", "replace").strip()).is_dir():
        return snapshot
    snapshots = [path for path in (cache / "snapshots").iterdir() if path.is_dir()]
    if not snapshots:
        raise RequestError(f"{cache} has no snapshot of the repository: give its hub id to fetch it")
    return max(snapshots, key=lambda path: path.stat().st_mtime)


def _names(folder: Path) -> set[str]:
    """Names of files in a folder; of a snapshot in the hub's cache, those in its folders too."""
    if not folder.is_dir():
        return set()
    is_snapshot = "snapshots" in folder.parts and any(part.startswith("models--") for part in folder.parts)
    return set(_relative(folder, folder.rglob("*") if is_snapshot else [*folder.iterdir(), *folder.glob("original/*")]))


def _relative(folder: Path, paths: Iterable[Path]) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in paths if path.is_file())
