"""Ways to break a file: bytes, JSON values, and the typed values of a GGUF file. Each takes a source of randomness."""

import copy
import json
import math
import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

HUGE = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
ODD_NUMBERS = [0, 1, -1, 2, 3, 7, 255, 256, 1000, -(2**31), *HUGE, 0.0, -0.0, 0.5, -1.5, 1.0, 1e-300, 1e308]
ODD_NUMBERS += [float("nan"), float("inf"), float("-inf")]
ODD_TEXTS = [
    "",
    " ",
    "a",
    "\0",
    "\x1b[31m",
    "\ud800",
    "\udcff",
    "é🦙",
    "▁",
    "<s>",
    "{{",
    "llama",
    "a" * 5000,
    "../x",
    "1",
]


def odd_value(rng: Random, depth: int = 0) -> Any:
    """A JSON value that somebody may not expect."""
    match rng.randrange(9 if depth < 3 else 5):
        case 0 | 1:
            return rng.choice(ODD_NUMBERS)
        case 2 | 3:
            return rng.choice(ODD_TEXTS)
        case 4:
            return rng.choice([None, True, False])
        case 5 | 6:
            return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        case _:
            names = ["content", "type", "text", "id", "name", *ODD_TEXTS]
            return {rng.choice(names): odd_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutate_json(rng: Random, value: Any) -> Any:
    """A copy in which some values, wherever they are, are others, gone, moved or there twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        parents = _containers(value)
        if not parents:
            return odd_value(rng)
        parent = rng.choice(parents)
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            continue
        key = rng.choice(keys)
        match rng.randrange(6):
            case 0:
                del parent[key]
            case 1:
                parent[key] = [parent[key]]
            case 2:
                parent[key] = json_bytes(parent[key]).decode("utf-8", "surrogatepass")[:100]
            case 3:
                parent[key] = copy.deepcopy(parent[rng.choice(keys)])
            case _:
                parent[key] = odd_value(rng)
    return value


def _containers(value: Any) -> list[Any]:
    found: list[Any] = []
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict | list):
            found.append(item)
            todo += item.values() if isinstance(item, dict) else item[:50]
    return found


def json_bytes(value: Any) -> bytes:
    """JSON, with numbers and lone surrogates that it should not have."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def nested(rng: Random, data: bytes) -> bytes:
    """JSON in which an array or object is too deep."""
    depth, at = rng.choice([100, 900, 1100, 100_000]), data.find(rng.choice([b'": ', b"[", b"{"])) + 3
    return data[:at] + b"[" * depth + b"]" * depth + data[rng.choice([at, len(data)]) :]


def mutate_bytes(rng: Random, data: bytes, header: int | None = None) -> bytes:
    """A copy that is cut, or in which some bytes are others, gone, or there twice; mostly among the first `header`."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        size = len(changed)
        if not size:
            return bytes(changed)
        end = min(size, header) if header and rng.random() < 0.9 else size
        at = rng.randrange(end)
        match rng.randrange(8):
            case 0 | 1:
                changed[at] = rng.randrange(256)
            case 2:
                changed[at] ^= 1 << rng.randrange(8)
            case 3:
                width = rng.choice([4, 8])
                changed[at : at + width] = (rng.choice(HUGE) % 2 ** (8 * width)).to_bytes(width, "little")
            case 4:
                del changed[at : at + rng.choice([1, 2, 8, 100])]
            case 5:
                changed[at:at] = changed[at : at + rng.choice([1, 2, 8, 100])]
            case 6:
                changed[at:at] = rng.randbytes(rng.choice([1, 2, 8, 100]))
            case _:
                if rng.random() < 0.3:
                    del changed[at:]
    return bytes(changed)


def mutate_text(rng: Random, text: str, snippets: list[str]) -> str:
    """A copy in which pieces are cut, moved or there twice, and snippets are put in."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        end = min(end, at + rng.choice([1, 5, 50]))
        match rng.randrange(5):
            case 0:
                text = text[:at] + text[end:]
            case 1:
                text = text[:at] + text[at:end] * 2 + text[end:]
            case _:
                text = text[:at] + rng.choice(snippets) + text[rng.choice([at, end]) :]
    return text


# A GGUF file's values by their numbers in the file.
_STRUCTS = dict(zip((0, 1, 2, 3, 4, 5, 7, 10, 11), "BbHhIi?Qq", strict=True)) | {6: "f", 12: "d"}
_UINT32, _INT32, _FLOAT, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass
class GGUFTensor:
    """What a header says of a tensor, and its bytes."""

    name: str
    dims: list[int]  # the fastest first, as in the file
    type: int
    data: bytes
    offset: int | None = None  # where it belongs if None


@dataclass
class GGUF:
    """A file's content: values are (type, value); an array's value is (type, values)."""

    fields: list[tuple[str, int, Any]] = field(default_factory=list)
    tensors: list[GGUFTensor] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        self.fields.append((name, *_typed(value)))

    def to_bytes(self) -> bytes:
        header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.fields)))
        for name, type_, value in self.fields:
            header += _string(name) + struct.pack("<I", type_) + _value(type_, value)
        data = bytearray()
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            header += _string(tensor.name) + struct.pack("<I", len(tensor.dims))
            header += b"".join(struct.pack("<Q", dim % 2**64) for dim in tensor.dims)
            header += struct.pack("<IQ", tensor.type % 2**32, offset % 2**64)
            data += tensor.data + bytes(-len(tensor.data) % 32)
        return bytes(header + bytes(-len(header) % 32) + data)


def mutate_gguf(rng: Random, file: GGUF) -> GGUF:
    """A copy with values of other types and sizes, and tensors of other names, shapes and formats."""
    fields, tensors = list(file.fields), [copy.copy(tensor) for tensor in file.tensors]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.75:
            at = rng.randrange(len(fields))
            name, type_, value = fields[at]
            match rng.randrange(8):
                case 0:
                    del fields[at]
                case 1 if type_ == _ARRAY:
                    fields[at] = name, type_, _shortened(rng, *value)
                case 2:
                    fields[at] = (rng.choice([name + "x", rng.choice(ODD_TEXTS)]), type_, value)
                case 3:
                    fields[at] = name, *rng.choice(fields)[1:]
                case _ if type_ == _ARRAY and rng.random() < 0.7:
                    fields[at] = name, type_, _with_odd_items(rng, *value)
                case _:
                    fields[at] = name, *_odd_typed(rng)
        else:
            tensor = rng.choice(tensors)
            match rng.randrange(6):
                case 0:
                    tensor.name = rng.choice([*ODD_TEXTS, rng.choice(tensors).name])
                case 1:
                    tensor.dims = [
                        rng.choice([0, 1, 2, 3, 32, 256, *tensor.dims, *HUGE]) for _ in range(rng.randrange(6))
                    ]
                case 2:
                    tensor.dims = tensor.dims[::-1]
                case 3:
                    tensor.type = rng.choice([*range(40), 2**31, 2**32 - 1])
                case 4:
                    tensor.offset = rng.choice([0, 1, 32, 64, *HUGE])
                case _:
                    tensor.data = mutate_bytes(rng, tensor.data)
    return GGUF(fields, tensors)


def _typed(value: Any) -> tuple[int, Any]:
    match value:
        case bool():
            return _BOOL, value
        case int():
            return _UINT32 if value >= 0 else _INT32, value
        case float():
            return _FLOAT, value
        case str():
            return _STRING, value
    return _ARRAY, (_typed(value[0])[0], value)


def _odd_typed(rng: Random) -> tuple[int, Any]:
    type_ = rng.choice([*_STRUCTS, _STRING, _STRING, _ARRAY, 13, 2**32 - 1])
    if type_ != _ARRAY:
        return type_, rng.choice(ODD_TEXTS) if type_ == _STRING else rng.choice(ODD_NUMBERS)
    item = rng.choice([*_STRUCTS, _STRING, _ARRAY, 13])
    return type_, (item, [_odd_item(rng, item) for _ in range(rng.choice([0, 1, 2, 300]))])


def _odd_item(rng: Random, type_: int) -> Any:
    if type_ == _ARRAY:
        return _INT32, [1]
    return rng.choice(ODD_TEXTS) if type_ == _STRING else rng.choice(ODD_NUMBERS)


def _with_odd_items(rng: Random, type_: int, values: list[Any]) -> tuple[int, list[Any]]:
    values = list(values)
    for _ in range(rng.choice([1, 1, 2, 20])):
        if values:
            at = rng.randrange(len(values))
            values[at] = rng.choice([_odd_item(rng, type_), rng.choice(values)])
    return type_, values


def _shortened(rng: Random, type_: int, values: list[Any]) -> tuple[int, list[Any]]:
    return type_, rng.choice([values[:-1], values[:1], [], values[1:], values * 2, [*values, *values[:1]]])


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(type_: int, value: Any) -> bytes:
    if type_ == _STRING:
        return _string(str(value))
    if type_ == _ARRAY:
        item, values = value
        return struct.pack("<IQ", item, len(values)) + b"".join(_value(item, x) for x in values)
    code = _STRUCTS.get(type_, "I")
    if code in "fd":
        try:
            return struct.pack("<" + code, value)
        except OverflowError:
            return struct.pack("<" + code, float("inf"))
    size = struct.calcsize(code)
    whole = int(value) if isinstance(value, int) or math.isfinite(value) else 0
    return (whole % 2 ** (8 * size)).to_bytes(size, "little")
