"""The kinds of errors: which of today's names each is, and what a bad environment raises."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llamajax
from llamajax.hub.cache import write_error


@pytest.mark.parametrize(
    ("kind", "of"),
    [
        ("QueueFullError", "CapacityError"),
        ("PromptTooLongError", "CapacityError"),
        ("DiskFullError", "CapacityError"),
        ("PlatformError", "RequestError"),
    ],
)
def test_each_kind_is_under_the_name_that_callers_catch_already(kind: str, of: str) -> None:
    assert issubclass(getattr(llamajax, kind), getattr(llamajax, of))
    assert issubclass(getattr(llamajax, of), llamajax.LlamaJaxError)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"LLAMAJAX_CPU": "avx1024"}, "LLAMAJAX_CPU must be one of"),
        ({"JAX_PLATFORMS": "abacus"}, "JAX_PLATFORMS='abacus'"),
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS='cuda'"),
        ({"LLAMAJAX_HOME": "/proc/nowhere"}, "cannot write to /proc/nowhere"),
    ],
    ids=str,
)
def test_a_bad_environment_is_a_kind_of_its_own(variables: dict[str, str], says: str) -> None:
    code = "import llamajax\ntry: llamajax.load()\nexcept llamajax.PlatformError as e: print(e)"
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert says in done.stdout and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, llamajax.DiskFullError),
        (errno.EDQUOT, llamajax.DiskFullError),
        (errno.EROFS, llamajax.PlatformError),
    ],
)
def test_a_full_disk_is_told_from_one_that_cannot_be_written(number: int, kind: type[Exception]) -> None:
    error = write_error(OSError(number, os.strerror(number)), Path("/models"), "LLAMAJAX_HOME")
    assert type(error) is kind and "LLAMAJAX_HOME" in str(error)
