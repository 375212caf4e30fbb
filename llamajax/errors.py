"""Every error llamajax raises on purpose.

Each message says what was expected, what was found and what to do, in one line.
"""

import re

from llamajax.text import printable, well_formed

_LONGEST = 4000


class LlamaJaxError(Exception):
    """Base of all of them. Names and values of a file in a message cannot break its line or steer a terminal."""

    def __str__(self) -> str:
        return printable(well_formed(re.sub(r"\s*[\r\n]\s*", " ", super().__str__())))[:_LONGEST]


class ConfigError(LlamaJaxError):
    """A model's configuration is missing, malformed or of an architecture we do not run."""


class CheckpointError(LlamaJaxError):
    """Weights are missing, truncated, corrupt or do not fit the configuration."""


class TokenizerError(LlamaJaxError):
    """A tokenizer or chat template is missing, malformed or of an unknown kind."""


class RequestError(LlamaJaxError):
    """The caller asked for something invalid: a parameter out of range, a model that does not exist."""


class InternalError(LlamaJaxError):
    """A fault of llamajax itself in one request; `__cause__` is what was raised. Other requests went on."""


class PlatformError(RequestError):
    """The machine or an environment variable does not allow it: no such device, a folder that cannot be written."""


class CapacityError(LlamaJaxError):
    """A valid request does not fit: the context, the queue, the memory or the disk is too small."""


class PromptTooLongError(CapacityError):
    """A prompt leaves no room in the context for an answer. A shorter prompt or a larger max_seq_len helps."""


class QueueFullError(CapacityError):
    """As many requests wait as may. The same request may succeed later."""


class DeviceMemoryError(CapacityError):
    """The memory of the device has no room for a request, even alone."""


class UnavailableError(CapacityError):
    """A server loads its model, or stops. The same request may succeed later."""


class DiskFullError(CapacityError):
    """A file does not fit the disk."""
