"""A model hub and a package index of our own on 127.0.0.1, as small as their clients allow.

with HubServer({"org/model": {"config.json": b"{}"}}) as hub:
    subprocess.run(command, env=os.environ | hub.env(hf_home))

with PackageIndex({"thing-1.0-py3-none-any.whl": wheel("thing", "1.0", {"thing/data": b"..."})}) as index:
    subprocess.run(command, env=os.environ | index.env())
"""

import hashlib
import io
import json
import os
import re
import select
import sys
import threading
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

# Straight to loopback, whatever proxy the environment names.
_DIRECT = {"NO_PROXY": "*", "no_proxy": "*"}


class _Server(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 while its `with` block runs; `requests` lists what was asked.

    A file whose path ends with `hold` stops half-way (`half_way` is set) until `release` is set; `abandoned` is
    set if the client hangs up instead.
    """

    def __init__(self, hold: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []
        self.hold = hold
        self.half_way, self.release, self.abandoned = (threading.Event() for _ in range(3))

    def respond(self, request: "_Handler", path: str) -> None:
        raise NotImplementedError

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that hangs up is part of the tests
            super().handle_error(request, client_address)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append((self.command, path))
        self.server.respond(self, path)

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def reply(self, body: bytes, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        self._head(status, len(body), headers or {})
        if self.command == "GET":
            self.wfile.write(body)

    def reply_file(self, body: bytes, headers: Mapping[str, str]) -> None:
        held = self.command == "GET" and self.server.hold and self.path.endswith(self.server.hold)
        if not held or self.server.release.is_set():
            return self.reply(body, headers)
        self._head(200, len(body), headers)
        self.wfile.write(body[: len(body) // 2])
        self.server.half_way.set()
        while not self.server.release.wait(0.02):
            if select.select([self.connection], [], [], 0)[0]:  # it has nothing more to ask: it hung up
                return self.server.abandoned.set()
        self.wfile.write(body[len(body) // 2 :])
        return None

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class HubServer(_Server):
    """What huggingface_hub needs in order to download: a repository's facts and its files.

    Args:
      repos: each repository's files, by path.
      gated: the repositories whose files need a token; any will do. Their listing is public, as on the hub.
      architectures: what the hub has read of repositories' GGUF files.
      refusals: the status that a repository's name is answered with, instead of its facts.
    """

    _FACTS = re.compile(r"api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>refs/pr/\d+|[^/]+))?")
    _FILE = re.compile(r"(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<file>.+)")

    def __init__(
        self,
        repos: Mapping[str, Mapping[str, bytes]],
        gated: frozenset[str] = frozenset(),
        hold: str | None = None,
        architectures: Mapping[str, str] | None = None,
        refusals: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(hold)
        self.repos, self.gated = repos, gated
        self.architectures, self.refusals = architectures or {}, refusals or {}

    def env(self, hf_home: Path) -> dict[str, str]:
        """The environment that sends huggingface_hub here, without a token, and its cache to `hf_home`."""
        offline = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(hf_home), **offline, **_DIRECT}

    def fetched(self, repo: str) -> set[str]:
        """The files of a repository that were asked for so far."""
        paths = (re.fullmatch(self._FILE, path) for method, path in self.requests if method == "GET")
        return {path["file"] for path in paths if path and path["repo"] == repo}

    @staticmethod
    def commit(repo: str) -> str:
        """The hash of the only commit of a repository."""
        return hashlib.sha1(repo.encode()).hexdigest()

    def respond(self, request: _Handler, path: str) -> None:
        asked = self._FACTS.fullmatch(path) or self._FILE.fullmatch(path)
        repo, revision = (asked["repo"], asked["revision"]) if asked else ("", None)
        if repo in self.refusals:
            return self._refuse(request, self.refusals[repo], "")
        if asked is None or repo not in self.repos:
            return self._refuse(request, 404, "RepoNotFound")
        if revision not in (None, "main", self.commit(repo)):
            return self._refuse(request, 404, "RevisionNotFound")
        if asked.re is self._FACTS:
            return self._facts(request, repo)
        if repo in self.gated and not request.headers["Authorization"]:
            return self._refuse(request, 401, "GatedRepo")
        if asked["file"] not in self.repos[repo]:
            return self._refuse(request, 404, "EntryNotFound")
        return self._file(request, repo, self.repos[repo][asked["file"]])

    def _refuse(self, request: _Handler, status: int, code: str) -> None:
        request.reply(b"", {"X-Error-Code": code}, status)

    def _facts(self, request: _Handler, repo: str) -> None:
        facts: dict[str, Any] = {
            "id": repo,
            "sha": self.commit(repo),
            "siblings": [{"rfilename": path, "size": len(body)} for path, body in self.repos[repo].items()],
        }
        if repo in self.architectures:
            facts["gguf"] = {"architecture": self.architectures[repo]}
        request.reply(json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def _file(self, request: _Handler, repo: str, body: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": self.commit(repo)}
        if ranged := re.fullmatch(r"bytes=(\d+)-", request.headers["Range"] or ""):
            first = int(ranged[1])
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            return request.reply(body[first:], headers, 206)
        return request.reply_file(body, headers)


class PackageIndex(_Server):
    """What pip needs in order to download: a simple index and its files, by file name."""

    def __init__(self, files: Mapping[str, bytes], hold: str | None = None) -> None:
        super().__init__(hold)
        self.files = files

    def env(self) -> dict[str, str]:
        """The environment that sends pip here and nowhere else."""
        elsewhere = {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
        return {"PIP_INDEX_URL": f"{self.url}/simple", "PIP_RETRIES": "0", **elsewhere, **_DIRECT}

    @property
    def downloads(self) -> int:
        return sum(path.startswith("files/") for _, path in self.requests)

    def respond(self, request: _Handler, path: str) -> None:
        if path.startswith("simple/"):
            links = "".join(f'<a href="/files/{name}">{name}</a>' for name in self.files)
            return request.reply(f"<!DOCTYPE html><html>{links}</html>".encode(), {"Content-Type": "text/html"})
        body = self.files[path.removeprefix("files/")]
        return request.reply_file(body, {"Content-Type": "application/octet-stream"})


def wheel(name: str, version: str, members: Mapping[str, bytes]) -> bytes:
    """The smallest wheel that pip accepts, with these files in it, compressed."""
    info = f"{name}-{version}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for path, body in {**members, **about}.items():
            opened.writestr(path, body)
    return archive.getvalue()
