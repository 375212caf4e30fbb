"""The files of docs/deployment.md, where the programs that read them are installed."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from .command import COMMAND
from .pages import blocks
from .serving import serving

_NGINX = """
daemon off;
pid nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""


def file(language: str) -> str:
    [block] = blocks(language, "deployment.md")
    return block.text


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    return found or pytest.skip(f"{name} is not installed")


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "llamajax.service"
    unit.write_text(file("ini").replace("/opt/llamajax/bin/llamajax", COMMAND))
    done = subprocess.run([program("systemd-analyze"), "verify", unit], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "llamajax.service" not in done.stderr


def test_nginx_passes_streams_on_as_they_come(shallow_model: str, tmp_path: Path) -> None:
    nginx = [program("nginx"), "-p", str(tmp_path), "-e", "error.log", "-c", "nginx.conf"]
    with serving(shallow_model) as (_, client):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        location = file("nginx").replace("http://127.0.0.1:8000", str(client.base_url).rstrip("/"))
        (tmp_path / "nginx.conf").write_text(_NGINX.format(port=port, location=location))
        subprocess.run([*nginx, "-t"], check=True)
        proxy = subprocess.Popen(nginx)
        try:
            while not (tmp_path / "nginx.pid").exists():
                time.sleep(0.01)
            body = {"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}
            began = time.monotonic()
            with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as response:
                times = [time.monotonic() - began for line in response.iter_lines() if line]
        finally:
            proxy.terminate()
            proxy.wait()
    assert times[0] < times[-1] / 2
