"""Llama models on JAX.

    import llamajax

    llama = llamajax.load("smollm2-135m-instruct", max_seq_len=1024)
    print(llama.generate("The capital of France is", max_new_tokens=50, temperature=0.7).text)

Names are imported when they are first used: what needs no jax, as the command's help, does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamajax.answer import ServedStream, Stream
    from llamajax.config import LlamaConfig
    from llamajax.conversation import Conversation
    from llamajax.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DeviceMemoryError,
        DiskFullError,
        InternalError,
        LlamaJaxError,
        PlatformError,
        PromptTooLongError,
        QueueFullError,
        RequestError,
        TokenizerError,
        UnavailableError,
    )
    from llamajax.families import CONFIGS
    from llamajax.llm import LLM, Server, generate_batch
    from llamajax.loading import load
    from llamajax.types import Completion, Message, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "CONFIGS",
    "LLM",
    "CapacityError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Conversation",
    "DeviceMemoryError",
    "DiskFullError",
    "InternalError",
    "LlamaConfig",
    "LlamaJaxError",
    "Message",
    "PlatformError",
    "PromptTooLongError",
    "QueueFullError",
    "RequestError",
    "SamplingParams",
    "ServedStream",
    "Server",
    "Stream",
    "TokenizerError",
    "UnavailableError",
    "generate_batch",
    "load",
]

_ROOMS = {
    "llamajax.config": ("LlamaConfig",),
    "llamajax.families": ("CONFIGS",),
    "llamajax.conversation": ("Conversation",),
    "llamajax.answer": ("ServedStream", "Stream"),
    "llamajax.llm": ("LLM", "Server", "generate_batch"),
    "llamajax.loading": ("load",),
    "llamajax.types": ("Completion", "Message", "SamplingParams"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llamajax' has no attribute {name!r}")
    room = next((room for room, names in _ROOMS.items() if name in names), "llamajax.errors")
    return getattr(import_module(room), name)


def __dir__() -> list[str]:
    return __all__
