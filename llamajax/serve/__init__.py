"""Requests of programs: batches in files, and a server that speaks OpenAI's protocol.

app = llamajax.serve.app(llama)  # ASGI
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .http import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'llamajax.serve' has no attribute {name!r}")
    # A batch needs no HTTP, whose import takes 0.2 s.
    from .http import app

    return app
