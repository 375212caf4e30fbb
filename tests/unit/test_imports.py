"""What importing costs, and what is installed."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import llamajax

from ..parity.tiny import CASES, state_dict, write_gguf, write_hf

SLOW = {"jax", "flax", "transformers", "torch", "huggingface_hub", "tokenizers", "sentencepiece", "tiktoken", "jinja2"}
COMMAND = str(Path(sys.executable).with_name("llamajax"))


def imported_by(*command: str) -> set[str]:
    """The slow packages that Python has imported when it ends."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stderr
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "llamajax" in modules
    return SLOW & {module.partition(".")[0] for module in modules}


def test_the_package_imports_nothing_slow() -> None:
    code = "import llamajax; llamajax.__version__; llamajax.LlamaJaxError; llamajax.SamplingParams"
    assert imported_by("-c", code) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["chat", "-n", "0"]], ids=" ".join)
def test_the_command_imports_nothing_slow_before_it_needs_it(arguments: list[str]) -> None:
    assert imported_by(COMMAND, *arguments) == set()


def test_the_load_generator_imports_nothing_slow() -> None:
    assert imported_by(COMMAND, "bench", "--help") == imported_by("-c", "import llamajax.bench.remote") == set()


def test_shell_completion_imports_nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LLAMAJAX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "llamajax chat -m ll")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert imported_by(COMMAND) == set()


def test_listing_models_may_ask_the_hub_s_cache_only() -> None:
    imported = imported_by(COMMAND, "models")
    assert imported <= {"huggingface_hub"}


def test_a_model_is_described_without_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # with an accelerator, jax is asked
    case = "llama3.1-8b"
    weights = state_dict(case)
    for path in (
        write_hf(tmp_path / "hf", CASES[case], weights),
        write_gguf(tmp_path / "a.gguf", CASES[case], weights, None),
    ):
        assert imported_by(COMMAND, "info", "-m", str(path)) == set()


def test_names_appear_when_they_are_used() -> None:
    assert {name: getattr(llamajax, name).__name__ for name in llamajax.__all__ if name != "CONFIGS"} == {
        name: name for name in llamajax.__all__ if name != "CONFIGS"
    }
    assert dir(llamajax) == sorted(llamajax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Llama'"):
        _ = llamajax.Llama


def test_no_module_called_cli_is_installed(tmp_path: Path) -> None:
    top_level = importlib.metadata.distribution("llamajax").read_text("top_level.txt")
    assert top_level and set(top_level.split()) == {"llamajax", "llamajax_cli"}
    code = "from importlib.util import find_spec; print(*(name for name in ('cli', 'llamajax_cli') if find_spec(name)))"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["llamajax_cli"]


def test_the_kernels_are_compiled_with_the_oldest_headers() -> None:
    """A jaxlib refuses what newer headers made: with those, whoever has another jax than the newest has no kernels."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    requirements = map(Requirement, project["build-system"]["requires"] + project["project"]["dependencies"])
    here = {r.name: str(r.specifier) for r in requirements if r.marker is None or r.marker.evaluate()}
    assert here["jaxlib"] == here["jax"].replace(">=", "==")


def test_a_source_distribution_has_all_that_builds_the_kernels() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    [kernels] = project["tool"]["setuptools"]["ext-modules"]
    folder = Path(__file__).parents[2] / "llamajax" / "ops" / "cpu"
    assert {*kernels["sources"], *kernels["depends"]} == {
        f"llamajax/ops/cpu/{file.name}" for file in folder.iterdir() if file.is_file()
    }


def test_a_compiler_is_fetched_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    path = Path(__file__).parents[2] / "llamajax" / "ops" / "cpu" / "build_kernels.py"
    spec = importlib.util.spec_from_file_location("build_kernels", path)
    assert spec and spec.loader
    building = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(building)
    monkeypatch.setattr(building.sys, "platform", "linux")
    monkeypatch.setattr(building.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert building._installed() is None and building._compiler_s_package() == ["ziglang"]
    (tmp_path / "clang++").touch(0o755)
    assert building._installed() == ["clang++"] and building._compiler_s_package() == []
    (tmp_path / "mine").touch(0o755)
    monkeypatch.setenv("CXX", "mine -g")
    assert building._installed() == ["mine", "-g"]
