"""Which files of a repository or a folder are the model. Pure: names in, names out."""

import re
from collections.abc import Callable, Collection

from llamajax.errors import RequestError

# All files that are read beside the weights.
SMALL = (
    "config.json",
    "params.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

# The default among several quantizations: Ollama's choice.
_USUAL = "Q4_K_M"
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|int8)[.-]|^consolidated")


def choose(names: Collection[str], wanted: str | None, where: str, address: Callable[[str], str]) -> str:
    """The model among a folder's files: a .gguf file's name, or the folder in which safetensors are ("" for the top).

    Args:
      names: of all files, with "/" between folders.
      wanted: a .gguf file's name, or a quantization such as "q4_k_m"; None for safetensors if there are any, else the
        only GGUF, or the one in Q4_K_M.
      where: what errors call the folder.
      address: a .gguf file's name -> what to type for it.

    Raises RequestError, listing what there is, if nothing fits or several do.
    """
    ggufs = [name for name in names if _is_gguf_model(name)]
    if wanted is None:
        for folder in ("", "original"):
            if weights(names, folder):
                return folder
        if not ggufs:
            elsewhere = sorted({name.rpartition("/")[0] for name in names if name.endswith(".safetensors")} - {""})
            raise RequestError(
                f"{where} has neither safetensors nor GGUF files, the two formats that can be read"
                + (
                    f"; there are safetensors in {', '.join(elsewhere)}: give that folder's address"
                    if elsewhere
                    else ""
                )
            )
        found = ggufs if len(ggufs) == 1 else _of_quantization(ggufs, _USUAL)
    elif wanted.lower().endswith(".gguf"):
        found = [parts(name)[0] for name in names if name == wanted]
    elif not ggufs:
        raise RequestError(f"{where} has no GGUF files, of which {wanted!r} could be one")
    else:
        found = _of_quantization(ggufs, wanted)
    if len(found) == 1:
        return found[0]
    if found:
        problem = f"has several files in {wanted or _USUAL}"
    elif wanted is None:
        problem = "has several GGUF files"
    else:
        problem = f"has no file {wanted!r}" if wanted.lower().endswith(".gguf") else f"has no {wanted!r}"
    listed = ", ".join(f"-m {address(name)}" for name in found or ggufs)
    raise RequestError(f"{where} {problem}; choose one: {listed}" if listed else f"{where} {problem}")


def weights(names: Collection[str], folder: str = "", shards: Collection[str] = ()) -> list[str]:
    """The safetensors files in a folder that are a model's weights: not adapters, nor second copies in other dtypes.

    Args:
      shards: the files that the folder's index names, if it has one; all of them are needed.
    """
    prefix = f"{folder}/" if folder else ""
    here = [name.removeprefix(prefix) for name in names if name.startswith(prefix) and name.endswith(".safetensors")]
    here = sorted(name for name in here if "/" not in name and not name.startswith("adapter"))
    if "model.safetensors" in here:
        here = ["model.safetensors"]
    elif shards:
        here = sorted(shards)
    chosen = [name for name in here if not _VARIANT.search(name)] or here
    return [prefix + name for name in chosen]


def parts(gguf: str) -> list[str]:
    """The names of all parts of a GGUF file that may be split into `name-00001-of-00003.gguf` and so on."""
    part = _PART.fullmatch(gguf)
    if part is None:
        return [gguf]
    count = int(part["count"])
    return [f"{part['stem']}-{number:05}-of-{count:05}{part['suffix']}" for number in range(1, count + 1)]


def _is_gguf_model(name: str) -> bool:
    part = _PART.fullmatch(name)
    is_first = part is None or int(part["number"]) == 1
    return name.lower().endswith(".gguf") and is_first and not _NO_MODEL.search(name.rpartition("/")[2])


def _of_quantization(ggufs: Collection[str], quantization: str) -> list[str]:
    """Those with these letters in their names, between dots, dashes or slashes."""
    # An underscore may come before the name, but not after it: Q4_K is not Q4_K_M.
    word = re.compile(rf"(^|[-._/]){re.escape(quantization)}($|[-./])", re.IGNORECASE)
    return [name for name in ggufs if word.search(name)]
