"""Answers of the default model that must fit: a small part of scripts/structured.py."""

from pathlib import Path

from llamajax import load
from scripts import structured


def test_what_ends_by_itself_fits(smollm2_gguf: Path) -> None:
    cases = [
        *(structured.of_schema("pydantic", model.model_json_schema(), model) for model in structured.MODELS),
        *structured.drawn_regexes(10),
        *[structured.of_arithmetic()] * 3,
    ]
    outcomes, wrong = structured.ask(load(smollm2_gguf, max_seq_len=256), cases, 60, 8)
    assert not wrong
    assert not any("refused" in outcome for outcome in outcomes)
    assert outcomes["regexes: fits"] >= 5 and outcomes["pydantic: fits"] + outcomes["arithmetic: fits"] >= 1
