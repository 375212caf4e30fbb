"""Settings that count before jax has found its devices."""

import jaxlib.xla_client
import pytest

from llamajax.placement import take_most_memory

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
