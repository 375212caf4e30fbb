"""Cases by their kind: each breaks a valid file or request, writes it into a folder, and reads it."""

import json
from base64 import b64encode
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import llamajax.ops.quants

from . import readers, subjects
from .mutations import json_bytes, mutate_bytes, mutate_gguf, mutate_json, mutate_text, nested, odd_value
from .subjects import CHATML

SNIPPETS = [
    "{{ 9 ** (9 ** 9) }}", "{{ lipsum(n=10**9) }}", "{{ 'a' * 10**10 }}", "{{ messages }}", "{{ x.y.z }}", "{{", "}}",
    "{%", "%}", "{#", "-%}", "{% for x in range(9999) %}", "{% endfor %}", "{% if tools %}", "{% endif %}",
    "{% else %}", "{% set x = messages %}", "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}", "{{ ''.__class__ }}",
    "{% raw %}", "'", "{{ raise_exception('\x1b[31mno') }}", "{{ strftime_now('%d %b') }}",
    "{{ [1] | slice(10**9) | list }}", "| tojson", "| length", "| replace('a', 'b')", "[0]", "['content']",
    ".content", " + 1", " ~ 'x'", "<|im_end|>", "\0", "\udcff", "(", ")", "{% include 'x' %}",
    "{% block a %}{% endblock %}", "{{ 1 / 0 }}", "{{ messages[0].content | reverse }}", "{{ loop(1) }}",
]  # fmt: skip


LOADED = 0.1  # the share of models that are not only opened but loaded, and asked


def gguf(format: str, rng: Random, folder: Path) -> None:
    file, whole = _gguf(format)
    if rng.random() < 0.6:
        content = mutate_gguf(rng, file).to_bytes()
    else:
        content = mutate_bytes(rng, whole, header=len(whole) - sum(len(tensor.data) for tensor in file.tensors))
    path = folder / "model.gguf"
    path.write_bytes(content)
    readers.read_gguf_model(path, rng.random() < LOADED)


@cache
def _gguf(format: str) -> tuple[subjects.GGUF, bytes]:
    file = subjects.tiny_gguf(format)
    return file, file.to_bytes()


def directory(rng: Random, folder: Path, name: str) -> None:
    """A checkpoint directory, one file of which is broken."""
    files = dict(subjects.other_layouts().get(name, subjects.directory()))
    data = files[name]
    if name.endswith(".json"):
        files[name] = _mutated_json(rng, json.loads(data))
    else:
        size = 8 + int.from_bytes(data[:8], "little")
        if rng.random() < 0.6:
            header = json_bytes(mutate_json(rng, json.loads(data[8:size])))
            files[name] = len(header).to_bytes(8, "little") + header + data[size:]
        else:
            files[name] = mutate_bytes(rng, data, header=size)
    _write(folder, files)
    readers.read_directory(folder, rng.random() < LOADED)


def tokenizer_model(rng: Random, folder: Path) -> None:
    files = dict(subjects.directory())
    del files["tokenizer.json"]
    if rng.random() < 0.5:
        model = subjects.ModelProto()
        model.CopyFrom(subjects.sentencepiece_model())
        _mutate_pieces(rng, model)
        files["tokenizer.model"] = model.SerializeToString()
    else:
        files["tokenizer.model"] = mutate_bytes(rng, subjects.sentencepiece_model().SerializeToString())
    if rng.random() < 0.2:
        files["added_tokens.json"] = json_bytes(mutate_json(rng, {"<x>": 268, "<|y|>": 269}))
    _write(folder, files)
    readers.read_directory(folder, load=False)


def _mutate_pieces(rng: Random, model: subjects.ModelProto) -> None:
    texts = ["", "a", "<s>", "<unk>", "\u2581", "<0x0A>", "<0xZZ>", "\0", "ab" * 1000, "<|x|>"]
    for _ in range(rng.choice([1, 2, 5])):
        piece = rng.choice(model.pieces)
        match rng.randrange(6):
            case 0:
                piece.piece = rng.choice(texts)
            case 1:
                piece.score = rng.choice([float("nan"), float("inf"), -float("inf"), 0.0, 1e30])
            case 2:
                piece.type = rng.choice([1, 2, 3, 4, 5, 6])
            case 3:
                model.pieces.add(piece=rng.choice(texts), type=rng.choice([1, 2, 3, 4, 5, 6]))
            case 4:
                setattr(model.trainer_spec, *_odd_setting(rng))
            case _:
                model.normalizer_spec.precompiled_charsmap = rng.randbytes(rng.choice([0, 3, 4, 100, 2000]))
                model.normalizer_spec.name = rng.choice(["nmt_nfkc", "identity", ""])


def _odd_setting(rng: Random) -> tuple[str, object]:
    name = rng.choice(
        ["model_type", "unk_id", "bos_id", "eos_id", "pad_id", "vocab_size", "byte_fallback", "unk_piece"]
    )
    if name == "byte_fallback":
        return name, rng.random() < 0.5
    if name == "unk_piece":
        return name, rng.choice(["", "a", "<s>"])
    return name, rng.choice([1, 2, 3, 4] if name == "model_type" else [-1, 0, 1, 5, 10**6, 2**31 - 1])


def tiktoken(rng: Random, folder: Path) -> None:
    """Of the 128,000 ranks only a few, so that most are refused for their number; some have them all."""
    whole = rng.random() < 0.002
    content = mutate_bytes(rng, _ranks(128_000) if whole else _ranks(300))
    if rng.random() < 0.3:
        lines = content.splitlines(keepends=True)
        lines[rng.randrange(len(lines))] = rng.choice(
            [
                b"",
                b"\n",
                b"QQ==\n",
                b"QQ== x\n",
                b"QQ== 1 2\n",
                b"QQ== -1\n",
                b"QQ== 1e5\n",
                b"QQ== " + b"9" * 5000 + b"\n",
            ]
        )
        content = b"".join(lines)
    files = {name: data for name, data in subjects.directory().items() if name != "tokenizer.json"}
    _write(folder, files | {"tokenizer.model": content})
    readers.read_directory(folder, load=False)


@cache
def _ranks(count: int) -> bytes:
    tokens = (bytes([i]) if i < 256 else b"%x" % (i + 16**5) for i in range(count))
    return b"".join(b"%s %d\n" % (b64encode(token), rank) for rank, token in enumerate(tokens))


def template(rng: Random, folder: Path) -> None:
    path = folder / "template.jinja"
    path.write_bytes(mutate_text(rng, CHATML, SNIPPETS).encode("utf-8", "surrogatepass"))
    readers.read_template(path, rng)


def line(rng: Random, folder: Path) -> None:
    path = folder / "line.jsonl"
    path.write_bytes(_mutated_json(rng, rng.choice(subjects.LINES)))
    readers.read_line(path, rng.random() < LOADED)


def batch_input(rng: Random, folder: Path) -> None:
    path = folder / f"in{rng.choice(['.json', '.jsonl', '.ndjson', '.txt', ''])}"
    lines = [_mutated_json(rng, rng.choice(subjects.LINES)) for _ in range(rng.randrange(4))]
    whole = json_bytes(subjects.LINES[: rng.randrange(4)])
    mark = rng.choice([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"])
    path.write_bytes(mark + rng.choice([b"\n".join(lines), mutate_bytes(rng, whole), b"Hi\n" + b"\n".join(lines)]))
    readers.read_input(path)


def results(rng: Random, folder: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"line": 1, "digest": "00ff", "text": "Hi", "usage": {}},
        {"id": "batch_req_2", "digest": "00fe", "custom_id": "a", "response": {}, "error": None},
    ]
    path = folder / "out.jsonl"
    whole = b"".join(json_bytes(line) + b"\n" for line in lines)
    path.write_bytes(rng.choice([whole, mutate_bytes(rng, whole), _mutated_json(rng, lines[rng.randrange(2)]) + b"\n"]))
    settings = _mutated_json(rng, {"seed": 42, "temperature": 0.5})
    path.with_name("out.jsonl.options.json").write_bytes(settings)
    readers.read_results(path)


def saved_logits(rng: Random, folder: Path) -> None:
    data = subjects.saved_logits()
    size = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = json_bytes(mutate_json(rng, json.loads(data[8:size])))
        data = len(header).to_bytes(8, "little") + header + data[size:]
    else:
        data = mutate_bytes(rng, data, header=size)
    path = folder / "saved.logits"
    path.write_bytes(data)
    readers.read_saved_logits(path)


def _mutated_json(rng: Random, value: Any) -> bytes:
    share = rng.random()
    if share < 0.8:
        return json_bytes(mutate_json(rng, value))
    if share < 0.95:
        return mutate_bytes(rng, json_bytes(value))
    return nested(rng, json_bytes(value)) if share < 0.98 else json_bytes(odd_value(rng))


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


Case = Callable[[Random, Path], None]
# How often a kind is drawn, and what it does.
CASES: dict[str, tuple[int, Case]] = {
    **{f"gguf {format}": (1, partial(gguf, format)) for format in ("f32", "f16", "bf16", *llamajax.ops.quants.FORMATS)},
    **{name: (2, partial(directory, name=name)) for name in subjects.directory()},
    **{name: (1, partial(directory, name=name)) for name in subjects.other_layouts()},
    "tokenizer.model": (3, tokenizer_model),
    "tiktoken": (1, tiktoken),
    "template": (4, template),
    "line": (6, line),
    "batch input": (2, batch_input),
    "batch results": (1, results),
    "saved logits": (2, saved_logits),
}


def draw(seed: int) -> str:
    """The kind that a seed stands for."""
    return Random(seed).choices(list(CASES), [weight for weight, _ in CASES.values()])[0]


def run(kind: str, seed: int, folder: Path) -> str:
    """Makes and reads an input in an empty folder: "answered" or "refused".

    Raises whatever else comes of it.
    """
    try:
        CASES[kind][1](Random(seed), folder)
    except llamajax.LlamaJaxError as error:
        readers.check_message(error)
        return "refused"
    return "answered"
