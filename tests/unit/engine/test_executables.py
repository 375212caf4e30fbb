"""Programs on disk: another process's are found without compiling, and whatever else is there is not used."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from llamajax.engine import executables, programs
from llamajax.engine.executables import Executables
from llamajax.engine.programs import Program, graph_options
from llamajax.errors import PlatformError
from llamajax.ops import native
from llamajax.types import Request, SamplingParams

from ...tiny_model import answer_alone, count_compilations, forget_programs, random_ids, tiny_runner

REQUEST = Request(random_ids(20), 30, SamplingParams(temperature=0))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty cache of jax, with our programs in a folder of it."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path / "llamajax"
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


class Store(Executables):
    """Gives a function that doubles; counts how often it is lowered."""

    num_lowered = 0

    def doubled(self, factor: int = 2) -> list[float]:
        def lower() -> jax.stages.Lowered:
            self.num_lowered += 1
            return jax.jit(lambda x: {"product": jnp.sort(factor * x)}).lower(np.zeros(3, np.float32))

        return self.get("double", lower, dict)(np.array([5, 1, 7], np.float32))["product"].tolist()


def store(settings: str = "settings") -> Store:
    return Store(jax.devices()[0], settings)


def test_a_program_is_lowered_and_compiled_once(folder: Path) -> None:
    first, then, other = store(), store(), store("other settings")
    assert first.is_empty and not first.has("double")
    with count_compilations() as compiled:
        assert first.doubled() == [2, 10, 14]
    assert first.has("double") and other.is_empty and not then.is_empty
    assert (first.num_lowered, len(compiled)) == (1, 1)
    with count_compilations() as compiled:
        assert then.doubled() == [2, 10, 14]
        # With other settings a program of this name may be another; this one is not.
        assert other.doubled() == [2, 10, 14]
        assert store("other settings").doubled() == [2, 10, 14]
    assert (then.num_lowered, other.num_lowered, compiled) == (0, 1, [])
    assert store("more settings").doubled(3) == [3, 15, 21]


def test_answers_are_the_same_with_programs_from_disk(folder: Path) -> None:
    forget_programs()
    expected = answer_alone(tiny_runner(256), REQUEST)
    empty, decode = ("empty_pages", "decode_rows") if native.available() else ("empty_rows", "decode")
    assert {file.name.split("-")[1] for file in folder.glob("*-*")} == {empty, "prefill", decode}
    forget_programs()
    with count_compilations() as compiled:
        assert answer_alone(tiny_runner(256), REQUEST) == expected
    assert compiled == []


def test_a_prepared_program_is_on_disk_only(folder: Path) -> None:
    forget_programs()
    runner, program = tiny_runner(256), Program("decode", 256)
    runner.prepare(program)
    assert not programs._programs
    with count_compilations() as compiled:
        runner.prepare(program)
        runner.compile(program)
    assert compiled == []


@pytest.mark.parametrize("broken", [b"", b"\0" * 500, "cut", "turned"])
def test_a_broken_file_is_not_used_and_is_replaced(folder: Path, broken: bytes | str) -> None:
    forget_programs()
    expected = answer_alone(tiny_runner(256), REQUEST)
    files = {file: file.read_bytes() for file in folder.iterdir() if not file.is_symlink()}
    assert files
    for file, content in files.items():
        last = bytes([content[-1] ^ 1])
        kept = {"cut": content[: len(content) // 2], "turned": content[:-1] + last}
        file.write_bytes(broken if isinstance(broken, bytes) else kept[broken])
    forget_programs()
    assert answer_alone(tiny_runner(256), REQUEST) == expected
    forget_programs()
    with count_compilations() as compiled:
        assert answer_alone(tiny_runner(256), REQUEST) == expected
    assert compiled == []


def test_another_source_option_or_flag_is_another_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identities = {store().identity, store("other").identity}
    with jax.default_matmul_precision("float32"):
        identities.add(store().identity)
    with monkeypatch.context() as changed:
        changed.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        identities.add(store().identity)
    with monkeypatch.context() as changed:
        changed.setattr(executables, "_source_digest", lambda: "other sources")
        identities.add(store().identity)
    with monkeypatch.context() as changed:
        changed.setattr(executables, "_processor", lambda: "another processor")
        identities.add(store().identity)
    assert len(identities) == 6
    assert store().identity in identities


def test_nothing_is_kept_where_jax_keeps_nothing(folder: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        off = store()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert off.doubled() == [2, 10, 14] and not off.has("double") and not off.is_empty


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", "/proc/nowhere")
    nowhere = store()
    assert nowhere.doubled() == [2, 10, 14] and not nowhere.has("double")


def test_jax_keeps_its_own_programs_as_before(folder: Path) -> None:
    on = jax.config.jax_persistent_cache_min_compile_time_secs, jax.config.jax_persistent_cache_min_entry_size_bytes
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    try:
        assert store().doubled() == [2, 10, 14]
        assert not list(folder.parent.glob("*-cache"))
        jax.jit(lambda x: 5 * x)(1.0)
        assert list(folder.parent.glob("*-cache"))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", on[0])
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", on[1])


def test_another_process_finds_the_same_identity(folder: Path) -> None:
    code = (
        "import jax\nfrom llamajax.engine.executables import Executables\n"
        "print(Executables(jax.devices()[0], 'settings').identity)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == store().identity


def test_the_identity_is_the_same_while_another_thread_compiles(folder: Path) -> None:
    before = store().identity
    with executables._jax_cache.off():
        assert store().identity == before


def test_all_modules_that_the_steps_import_are_sources() -> None:
    code = "import sys, llamajax.engine.steps; print(*(m.__file__ for n, m in sys.modules.items() if 'llamajax.' in n))"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    # These check what is given, or say what is wrong with it: no program depends on them.
    others = {"checks.py", "errors.py", "fields.py", "text.py"}
    assert {Path(name) for name in found.split() if Path(name).name not in others} <= {*executables._source_files()}


def test_whole_graphs_are_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMAJAX_GRAPHS", raising=False)
    assert graph_options() == {}
    monkeypatch.setenv("LLAMAJAX_GRAPHS", "call")
    assert "WHILE" in str(graph_options()["xla_gpu_enable_command_buffer"])
    monkeypatch.setenv("LLAMAJAX_GRAPHS", "calls")
    with pytest.raises(PlatformError, match="LLAMAJAX_GRAPHS must be call or empty, not 'calls'"):
        graph_options()
