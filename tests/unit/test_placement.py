"""Where a model is placed, and settings that count before jax has found its devices."""

from dataclasses import replace

import jaxlib.xla_client
import pytest

from llamajax.errors import PlatformError
from llamajax.families import CONFIGS
from llamajax.placement import Placement, take_most_memory

NAMES = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize(("set_by_user", "expected"), [({}, 0.9), ({NAMES[0]: ".5"}, 0.5), ({NAMES[1]: ".25"}, 0.25)])
def test_jax_takes_most_of_the_memory_unless_the_user_says_how_much(
    monkeypatch: pytest.MonkeyPatch, set_by_user: dict[str, str], expected: float
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    for name, share in set_by_user.items():
        monkeypatch.setenv(name, share)
    take_most_memory()
    assert jaxlib.xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == expected


@pytest.mark.parametrize(
    ("platform", "head_dim", "has_kernels", "has_pages", "cache_dtype"),
    [
        ("cpu", 64, True, True, "float16"),
        ("cpu", 12, True, False, "float16"),  # the kernels' attention takes heads of multiples of 8 numbers
        ("cpu", 64, False, False, "float32"),
        ("gpu", 64, True, False, "bfloat16"),
    ],
)
def test_the_kernels_are_for_a_cpu_and_pages_for_the_kernels(
    platform: str, head_dim: int, has_kernels: bool, has_pages: bool, cache_dtype: str
) -> None:
    config = replace(CONFIGS["llama3.2-1b"], head_dim=head_dim, rope_divisors=None)
    placement = Placement.of(config, platform, has_kernels=has_kernels)
    assert placement.has_kernels == (has_kernels and platform == "cpu")
    assert (placement.has_pages, placement.cache_dtype.name) == (has_pages, cache_dtype)
    if has_pages:
        assert Placement.of(config, platform, has_kernels=True, cache_dtype="int8").cache_dtype.name == "int8"
    else:
        with pytest.raises(PlatformError, match=f"heads of {head_dim} numbers on {platform}"):
            Placement.of(config, platform, has_kernels=has_kernels, cache_dtype="int8")
