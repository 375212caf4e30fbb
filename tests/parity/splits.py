"""The vocabulary and the lines of the splits' golden ids, which scripts/make_split_goldens.py makes."""

from pathlib import Path

from llamajax.tokenizers.hf import byte_alphabet

from ..conftest import make_mixed_lines

PATH = Path(__file__).with_name("data") / "splits.npz"

# Where the splits differ from each other.
_HARD_LINES = [
    "I'LL we'Re don't it's'S 'tis y'all'd've \u2019s",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 \u0661\u0662\u0663\u0664 \u00b2\u00b3 \u2167",
    "camelCase HTTPServer2 getURLPath iPhone XMLHttpRequest ABc aBC \u0130stanbul STRASSE \u00c9COLE",
    "a  b   c    d\te\n\nf\r\n\r\ng \n h\n \n  i",
    "  leading and trailing  ",
    "\n\n\n",
    " " * 700 + "x",
    "x" + " " * 37,
    "...!!! ?? -- == += $5 <=> ^~| `code` [x] (y) {z} /path/to/file.txt a/b\n/c #tag @user \\n\n",
    "!word ?word .net $var _x (paren) \u00a1hola \u00bfqu\u00e9",
    "\u4e2d\u6587\u5b57\u7b26 \u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8\u3042 \ud55c\uad6d\uc5b4\u3131",
    "\u3105\u3106 mixed\u4e2d\u6587text123\u4e2d",
    "\uff0c\u3002\uff01\uff1f\u300c\u300d\u2026\u2014 \u0964 \u06d4 \u060c \u3000x",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 e\u0301a\u0308",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629\u064b \u05d0\u05b0\u05d1",
    "for (int i = 0; i < 10; ++i) {\n        x[i] += 2;\n}\n",
    "<sentinel:12> IMGIMGABCZ IMGIMGAZ",
    "\U0001f999\U0001f525 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \u2603\u00ae\u20ac",
]


def vocabulary(merges: list[str]) -> list[str]:
    """The bytes' letters, then what each merge makes."""
    tokens = dict.fromkeys(byte_alphabet())
    return list(tokens | dict.fromkeys(merge.replace(" ", "") for merge in merges))


def lines() -> list[str]:
    # A vocabulary with this token would be taken for Llama 3's.
    return [line.replace("begin_of_text", "begin") for line in _HARD_LINES + make_mixed_lines(400)]
