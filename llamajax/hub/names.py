"""What a user may type for a repository on the model hub -> its parts. Pure text."""

import os
import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from llamajax.errors import RequestError


class HubName(NamedTuple):
    """A repository, or a part of it.

    Attributes:
      repo: "org/repo".
      revision: a branch, tag, pull request or commit; None for the main branch.
      wanted: which GGUF file of several: its path, or its quantization, such as "Q4_K_M"; None for what there is.
      folder: a folder of the repository; "" for all of it.
    """

    repo: str
    revision: str | None = None
    wanted: str | None = None
    folder: str = ""


_REPO = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
_TYPED = re.compile(rf"{_REPO}(?:@(?P<revision>[^:]+))?(?::(?P<wanted>.+))?")
_PAGE = re.compile(
    rf"{_REPO}(?:/(?:tree|blob|resolve|raw)/(?P<revision>refs/\w+/[^/]+|[^/]+)(?:/(?P<path>.+))?)?(?::(?P<wanted>.+))?"
)
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


def parse(name: str) -> HubName | None:
    """The parts of `org/repo[@revision][:file.gguf or quantization]`, of a page's address on the hub, with or without
    https://, or of Ollama's `hf.co/org/repo:Q4_K_M`. None for anything else.

    Raises RequestError for an address on another host.
    """
    name = name.removesuffix("/")
    if name.startswith(("http://", "https://")):
        address = urlsplit(name)
        if address.netloc not in (*_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc):
            raise RequestError(
                f"cannot fetch a model from {address.netloc}, only from huggingface.co: download it, and give its path"
            )
        return _page(unquote(address.path).strip("/"))
    host, _, path = name.partition("/")
    if host in _HOSTS:
        return _page(unquote(path.partition("?")[0]).strip("/"))
    name = re.sub(r"^hf:(//)?", "", name)
    typed = _TYPED.fullmatch(name)
    return HubName(typed["repo"], typed["revision"], typed["wanted"]) if typed else _page(name)


def _page(path: str) -> HubName | None:
    page = _PAGE.fullmatch(path)
    if page is None:
        return None
    inside = page["path"] or ""
    if inside.lower().endswith(".gguf"):
        return HubName(page["repo"], page["revision"], inside)
    # The page of any other file means the folder that has it.
    folder = inside.rpartition("/")[0] if re.search(r"\.(safetensors|json|model|jinja|md)$", inside) else inside
    return HubName(page["repo"], page["revision"], page["wanted"], folder)
