"""How byte-level BPE vocabularies split a text before they merge its bytes, by the names that GGUF files use.

A file's `tokenizer.ggml.pre` names its split. Sources: llama.cpp's src/llama-vocab.cpp for the names and most patterns;
where it approximates a model's own pattern (tekken, gpt-4o), the own one is here. Left out are splits that no list of
patterns can express (kimi-k2, afmoe) and those of vocabularies that are not byte-level.
"""

from typing import NamedTuple


class Split(NamedTuple):
    """How a text is split, and what llama.cpp ties to the same name.

    Attributes:
      patterns: a pattern's matches and the text between them are pieces, which the next pattern splits further.
      ignore_merges: a piece that is a token is that token, whether or not merges make it.
      adds_bos: a raw completion gets a BOS unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


def _class(ranges: str) -> str:
    """A class of characters: of "41-5a b5", [A-Zµ]."""
    ends = (entry.split("-") for entry in ranges.split())
    return f"[{''.join('-'.join(chr(int(end, 16)) for end in pair) for pair in ends)}]"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _SYMBOLS, _SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_SPACES}"
#: Source: Meta's llama-models, models/llama3/tokenizer.py.
LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_LINES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_LINES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"
)
_BAILING = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|{_SPACES}"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"
_UFAKZEKA = rf"{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_LINES}"
_MINICPM5 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}[\r\n]*|{_LINES}"
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"|{_SYMBOLS}[\r\n/]?|\s*[\r\n]|{_SPACES}"
)
_JAIS2 = (
    rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]+|"
    + "|".join(rf"\s{{{2**i}}}(?!\S)" for i in range(9, 1, -1))
    + r"|\s{1,2}(?!\S)|\s"
)

# Words of mixed case in parts: "camelCase" is "camel", "Case".
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_LINES}"
_CASED = rf"{_FIRST}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_FIRST}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
_GPT4O = rf"{_CASED}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_LINES}"
_YOUTU = rf"{_CASED}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_LINES}"
_YOUTU_SCRIPTS = "|".join(
    f"{_class(ranges)}+"
    for ranges in (
        "ac00-d7a3 3131-318e",
        "ff01 2026 201c 201d 2018 2019 2014 ff1a ff1b ff0c 3001-303f fe30-fe4f",
        "3105-312f",
        "4e00-9fa5 3040-309f 30a0-30ff",
    )
)

# Letters that have a case, as DeepSeek lists them.
_DEEPSEEK_LETTERS = _class(
    """
    41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1
    3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a
    1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4
    1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128
    212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d
    a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f
    104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
    """
)
_DEEPSEEK_SYMBOLS = _class("21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002")
_DEEPSEEK_CJK = f"{_class('4e00-9fa5 800-4e00 ac00-d7ff')}+"
_DEEPSEEK3_CJK = f"{_class('4e00-9fa5 3040-309f 30a0-30ff')}+"
_DEEPSEEK3_WORD = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
)
_DEEPSEEK3 = (r"\p{N}{1,3}", _DEEPSEEK3_CJK, rf"{_DEEPSEEK3_WORD}[\r\n]*|{_LINES}")

_PUNCTUATED = r" ?[^(\s|.,!?…。，、।۔،)]+"

_SPLITS: list[tuple[str, Split]] = [
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", Split((LLAMA3,), True, True)),
    ("smaug-bpe dbrx chatglm-bpe", Split((LLAMA3,))),
    ("glm4 glm5", Split((LLAMA3,), True)),
    ("jais-2", Split((_JAIS2,))),
    ("minicpm5", Split((r"\p{N}{1,3}", _MINICPM5), True)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2", Split((_QWEN2,))),
    ("laguna", Split((r"[^\n]+|\n+", _QWEN2))),
    ("qwen35", Split((_QWEN35,))),
    ("bailingmoe bailingmoe2 llada-moe", Split((_BAILING,))),
    ("seed-coder", Split((_SEED_CODER,))),
    ("ufakzeka", Split((_UFAKZEKA,))),
    ("exaone-moe", Split((_EXAONE_MOE,))),
    ("tekken", Split((_TEKKEN,), True, True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Split((_GPT4O,))),
    ("tiny_aya cohere2moe", Split((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    ("youtu", Split((_YOUTU_SCRIPTS, _YOUTU), True)),
    (
        "deepseek-llm",
        Split(
            (
                r"[\r\n]",
                rf"\s?{_DEEPSEEK_LETTERS}+",
                rf"\s?{_DEEPSEEK_SYMBOLS}+",
                r"\s+$",
                _DEEPSEEK_CJK,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Split(_DEEPSEEK3)),
    (
        "spark2_5",
        Split((r"\p{N}{1,3}", _DEEPSEEK3_CJK, rf"{_DEEPSEEK3_WORD}|[\r\n]|{_SPACES}", r"\p{N}")),
    ),
    (
        "gpt-2 phi-2 olmo mpt jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert",
        Split((_GPT2,)),
    ),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", Split((r"\p{N}", _GPT2))),
    ("falcon", Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("default", Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("bloom poro-chat gpt3-finnish", Split((_PUNCTUATED,))),
    ("viking", Split((_PUNCTUATED, r"\p{N}"))),
    ("superbpe", Split((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    (
        "chameleon",
        Split(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            adds_bos=True,
        ),
    ),
]

#: By the value of tokenizer.ggml.pre.
SPLITS = {name: split for names, split in _SPLITS for name in names.split()}
