"""What tests of operations with several implementations share."""

from collections.abc import Iterator

import jax
import pytest

from llamajax.kernels import INSTRUCTION_SETS
from llamajax.ops import native

# Where there are no native kernels, "native" is XLA as well.
IMPLEMENTATIONS = ["xla", *(INSTRUCTION_SETS if native.available() else [])]


@pytest.fixture(params=IMPLEMENTATIONS, scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "xla":
            patch.setattr(native, "available", lambda: False)
        else:
            native.limit(request.param)
            if request.param not in native.implementation():
                pytest.skip(f"this processor has no {request.param}")
        jax.clear_caches()
        yield request.param
    if native.available():
        native.limit(INSTRUCTION_SETS[0])
    jax.clear_caches()
