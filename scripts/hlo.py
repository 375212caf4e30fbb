"""What XLA's texts say of a compiled program: its HLO, and for a GPU the outline of what the host does.

Bytes and kernels are counted from them. Knows nothing of models.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import NamedTuple


class Cost(NamedTuple):
    """Of one token of each row, or of one chunk.

    Attributes:
      num_bytes: that go between the chip and its memory.
      reads: loops and conditionals that the host runs, since no CUDA graph holds them: it waits for the device to say
        what comes next. One in a loop counts once.
      launches: kernels and CUDA graphs that the host launches, outside of such inner loops.
    """

    num_bytes: int = 0
    kernels: int = 0
    reads: int = 0
    launches: int = 0


Pick = Callable[[Iterable[Cost]], Cost]


# Instructions that call other computations, by the names under which they list them.
_CALLS = {
    "while": ["body", "condition"],
    "conditional": ["true_computation", "false_computation", "branch_computations"],
    "call": ["to_apply"],
    "async-start": ["calls"],
}
# No kernel runs for these, or the one of the instruction that starts them.
_FREE = {
    "parameter",
    "constant",
    "iota",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "copy-done",
    "slice-done",
    "async-done",
    "async-update",
}
# Of their first operand they read only as much as they return.
_SLICES = {"slice", "dynamic-slice", "gather"}
# They write into their first operand, as many bytes as the operand at this place has.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
_MOVES = {
    "parameter",
    "constant",
    "bitcast",
    "broadcast",
    "copy",
    "transpose",
    "reshape",
    "convert",
    "bitcast-convert",
    "slice",
    "concatenate",
    "pad",
    "tuple",
}
_LARGE = 1 << 20
_ARRAY = re.compile(r"(pred|[a-z]+\d\w*)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """A line of HLO: `%name = type op(operands), attributes`."""

    name: str
    type: str
    op: str
    operands: list[str]
    attributes: str

    def called(self, role: str) -> list[str]:
        """The computations that it calls as its `role`."""
        found = re.search(rf"\b{role}=(?:%([\w.-]+)|{{([^}}]*)}})", self.attributes)
        return [] if found is None else re.findall(r"[\w.-]+", found[1] or found[2])


class Hlo:
    """An optimized program as XLA prints it."""

    def __init__(self, text: str) -> None:
        self.entry = name = ""
        self.computations: dict[str, list[Instruction]] = {}
        self._roots: dict[str, Instruction] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
                name, instructions = header[2], self.computations.setdefault(header[2], [])
                self.entry = name if header[1] else self.entry
            elif found := re.match(r"\s+(ROOT )?%([\w.-]+) = (.*)", line):
                instructions.append(_instruction(found[2], found[3]))
                if found[1]:
                    self._roots[name] = instructions[-1]
        self._instructions = {i.name: i for body in self.computations.values() for i in body}
        self._users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
        for body in self.computations.values():
            for i in body:
                for place, operand in enumerate(i.operands):
                    self._users[operand].append((i, place))

    def token_loop(self) -> Instruction:
        """The loop over tokens: of those that the program begins with, the one that carries most."""
        loops = (i for i in self.computations[self.entry] if i.op == "while")
        return max(loops, key=lambda i: num_bytes(i.type))

    def executed(self, name: str) -> Iterator[Instruction]:
        """The kernels of a computation and of what it calls, in all branches. A loop runs if it says how often."""
        for i in self.computations[name]:
            if i.op in _CALLS:
                if i.op != "while" or _trips(i):
                    for called in self.called(i):
                        yield from self.executed(called)
            elif i.op not in _FREE:
                yield i

    def cost(self, name: str, pick: Pick) -> Cost:
        """Of a computation. Of the branches of a conditional it costs what `pick` says."""
        return total(self._cost(i, pick) for i in self.computations[name])

    def _cost(self, i: Instruction, pick: Pick) -> Cost:
        if i.op in _FREE:
            return Cost()
        if i.op not in _CALLS:
            return Cost(self.num_bytes(i), kernels=1)
        called = [self.cost(name, pick) for name in self.called(i)]
        if i.op == "conditional":
            return pick(called)
        if i.op == "while":
            body, condition = called
            return total([condition, *[body, condition] * _trips(i)])
        return total(called)

    def called(self, i: Instruction) -> list[str]:
        return [name for role in _CALLS[i.op] for name in i.called(role)]

    def num_bytes(self, i: Instruction) -> int:
        """What a kernel reads and writes of the memory outside of the chip, at least: of slices, what they touch."""
        match i.op:
            case "copy-start":  # its type: destination, source, semaphore
                return num_bytes(i.type)
            case "slice-start":
                return sizes(i.type)[-2]
        return sum(self._read(i, place) for place in range(len(i.operands))) + self._written(i)

    def _read(self, i: Instruction, place: int) -> int:
        """Of the operand at this place."""
        whole = num_bytes(self._type(i.operands[place]))
        if i.op in _SLICES:
            return min(whole, sum(sizes(i.type))) if place == 0 else whole
        if i.op in _UPDATES and place == 0:
            return 0
        if i.op == "fusion":
            (fused,) = i.called("calls")
            (inside,) = (p.name for p in self.computations[fused] if p.op == "parameter" and p.operands == [str(place)])
        elif i.op == "bitcast":
            inside = i.name
        else:
            return whole
        users = self._users[inside]
        return min(whole, sum(self._read(*user) for user in users)) if users else whole

    def _written(self, i: Instruction) -> int:
        whole = num_bytes(i.type)
        if i.op in _UPDATES:
            return min(whole, sum(sizes(self._type(i.operands[_UPDATES[i.op]]))))
        if i.op == "fusion":
            (fused,) = i.called("calls")
            return min(whole, self._written(self._roots[fused]))
        if i.op in ("tuple", "bitcast"):
            return sum(self._written(self._instructions[operand]) for operand in i.operands)
        return whole

    def _type(self, operand: str) -> str:
        """Empty for the constant numbers that some operands are."""
        return self._instructions[operand].type if operand in self._instructions else ""

    def moves(self, i: Instruction) -> bool:
        """Whether a kernel only moves or converts what is large."""
        sources = [num_bytes(self._type(operand)) for operand in i.operands]
        is_large = num_bytes(i.type) >= _LARGE and max(sources, default=0) >= _LARGE // 2
        return is_large and self._operations(i) <= _MOVES

    def sorts(self, i: Instruction) -> bool:
        """Whether a kernel sorts."""
        return "sort" in self._operations(i)

    def _operations(self, i: Instruction) -> set[str]:
        fused = [inside for name in i.called("calls") for inside in self.computations[name]]
        return {i.op} if i.op != "fusion" else set().union(*map(self._operations, fused))


def _instruction(name: str, text: str) -> Instruction:
    type, text = _split(text, text.index(" ") if text[0] != "(" else _closing(text) + 1)
    op, text = _split(text.lstrip(), text.lstrip().index("("))
    inside, attributes = _split(text, _closing(text) + 1)
    return Instruction(name, type, op, re.findall(r"%([\w.-]+)", inside) or inside[1:-1].split(), attributes)


def _split(text: str, at: int) -> tuple[str, str]:
    return text[:at], text[at:]


def _closing(text: str) -> int:
    """Where the parenthesis closes that the text begins with."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return at
    raise ValueError(f"a parenthesis stays open: {text:.80}")


def _trips(loop: Instruction) -> int:
    """How often a loop runs, if that is known; 0 for one that runs when somebody wants it."""
    found = re.search(r'"known_trip_count":{"n":"(\d+)"', loop.attributes)
    return int(found[1]) if found else 0


def sizes(type: str) -> list[int]:
    """Bytes of each array of a type."""
    return [_size(name, shape) for name, shape, _ in _ARRAY.findall(type)]


def num_bytes(type: str) -> int:
    """Bytes of those arrays of a type that are in the device's main memory."""
    return sum(_size(name, shape) for name, shape, layout in _ARRAY.findall(type) if "S(" not in layout)


def _size(name: str, shape: str) -> int:
    width = 8 if name == "pred" else int(re.findall(r"\d+", name)[0])
    return prod(map(int, filter(None, shape.split(",")))) * width // 8


def total(costs: Iterable[Cost]) -> Cost:
    return Cost(*map(sum, zip(Cost(), *costs, strict=True)))


class Thunk(NamedTuple):
    """A step of the host, or a part of one: a loop's body, a branch."""

    kind: str
    parts: list["Thunk"]


# A loop or conditional that costs one stop of the host, and nothing inside.
STOP = Thunk("kWhile", [])


def thunks(outline: str) -> list[Thunk]:
    """What the host does to run a program on a GPU, from XLA's indented outline."""
    program = Thunk("", [])
    path, indent = [(-1, program)], 0
    for line in outline.splitlines():
        if found := re.match(r"( *)\d+: (\w+)", line):
            indent, kind = len(found[1]), found[2]
        elif found := re.match(r"( *)(\w+):$", line):
            # The condition of a loop is not indented.
            indent, kind = (indent + 2 if found[2] == "condition" else len(found[1])), found[2]
        else:
            continue
        while path[-1][0] >= indent:
            path.pop()
        path[-1][1].parts.append(Thunk(kind, []))
        path.append((indent, path[-1][1].parts[-1]))
    return program.parts


def host_cost(parts: Iterable[Thunk], pick: Pick) -> Cost:
    """What the host has to do for these; for an inner loop, to find that it does not run."""
    return total(_host_cost(part, pick) for part in parts)


def _host_cost(thunk: Thunk, pick: Pick) -> Cost:
    match thunk.kind:
        case "kConditional":
            return total([Cost(reads=1), pick([host_cost(branch.parts, pick) for branch in thunk.parts])])
        case "kWhile":
            return total([Cost(reads=1), *(host_cost(part.parts, pick) for part in thunk.parts[:1])])
        case "condition" | "body":
            return host_cost(thunk.parts, pick)
    return Cost(launches=1)
