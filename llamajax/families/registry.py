"""The families there are."""

from llamajax.config import LlamaConfig
from llamajax.errors import ConfigError
from llamajax.families.llama import LLAMA
from llamajax.families.mistral import MISTRAL
from llamajax.families.qwen2 import QWEN2
from llamajax.families.qwen3 import QWEN3
from llamajax.families.smollm3 import SMOLLM3

#: By `model_type` in config.json. Of those that have one name in GGUF, the first is read from it.
FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3)}

#: The named configurations.
CONFIGS: dict[str, LlamaConfig] = {
    name: config for family in FAMILIES.values() for name, config in family.presets.items()
}


def unknown(architecture: object) -> ConfigError:
    """What to say of an architecture that is not here."""
    known = ", ".join(family.architectures[0] for family in FAMILIES.values())
    return ConfigError(f"architecture {architecture!r:.80} is not supported: llamajax runs {known}")
