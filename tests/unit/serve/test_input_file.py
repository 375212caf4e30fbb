"""What a batch's input is: by its name, by --format, by its first line; and pipes that are slow."""

import gzip
import json
import os
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from llamajax.errors import RequestError
from llamajax.serve.input_file import Format, Input

HI = {"prompt": "Hi"}
ARRAY = json.dumps([HI, {"prompt": "é"}], indent=2)


def read(path: Path, data: bytes | str, format: Format | None = None) -> list[tuple[int, Any]]:
    """Each line that is not blank: its fields, or what is wrong with it. Read twice, they are the same."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with path.open("rb") as file:
        lines = Input(file, path.name, format)
        assert lines.is_counted
        first, second = (list(lines.lines()) for _ in range(2))
    assert first == second
    found: list[tuple[int, Any]] = []
    for line in first:
        assert line is not None
        if line.is_blank:
            continue
        try:
            found.append((line.number, line.fields()))
        except RequestError as e:
            found.append((line.number, str(e)))
    return found


@pytest.mark.parametrize("name", ["in.jsonl", "in.ndjson", "IN.JSONL"])
def test_json_lines_are_json_whatever_the_first_one_is(tmp_path: Path, name: str) -> None:
    found = dict(
        read(tmp_path / name, '{"broken\n\nHi\n\ufeff{"prompt": "Hi"}\r\n[{"prompt": "Hi"}]\n{"prompt": "Hi"}')
    )
    assert found[4] == found[6] == HI
    assert found[1].startswith("not JSON") and found[3].startswith("not JSON")
    assert found[5].startswith("expected a JSON object")
    assert 2 not in found


@pytest.mark.parametrize("text", ['{"prompt": "Hi"}', "[", "{Hi}", "Hi"])
def test_a_text_file_is_text_whatever_its_lines_look_like(tmp_path: Path, text: str) -> None:
    for data in (f"{text}\n", f"\ufeff{text}\r\n", text):
        assert read(tmp_path / "in.txt", data) == [(1, {"prompt": text})]
    assert read(tmp_path / "in.jsonl", text, "text") == [(1, {"prompt": text})]


def test_a_json_file_is_an_array_or_one_object(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    for data in (ARRAY, "\ufeff" + ARRAY, "\r\n" + ARRAY.replace("\n", "\r\n"), ARRAY.replace("\n", "")):
        assert read(path, data) == [(1, HI), (2, {"prompt": "é"})]
    for data in (json.dumps(HI, indent=4), json.dumps(HI)):
        assert read(path, data) == [(1, HI)]
    assert read(path, "[]") == read(path, "") == read(path, " \n") == []
    assert read(tmp_path / "in.txt", ARRAY, "json") == [(1, HI), (2, {"prompt": "é"})]


def test_elements_of_an_array_that_are_no_objects_are_named_by_their_index(tmp_path: Path) -> None:
    found = read(tmp_path / "in.json", '[{"prompt": "Hi"}, "Hi", null, {"seed": NaN}, {"id": 1e999}, {"prompt": "Hi"}]')
    assert [number for number, _ in found] == [1, 2, 3, 4, 5, 6]
    assert found[0][1] == found[5][1] == HI
    assert found[1][1].startswith('expected a JSON object such as {"prompt": "Hi"}, not "Hi"')
    assert found[3][1].startswith("not JSON: NaN") and found[4][1].startswith("not JSON: Infinity")


def test_a_json_file_may_have_an_object_in_each_line(tmp_path: Path) -> None:
    found = read(tmp_path / "in.json", '\n{"prompt": "Hi"}\n{"broken\n{"prompt": "Hi"}\n')
    assert found[0] == (2, HI) and found[2] == (4, HI)
    assert found[1][1].startswith("not JSON")


@pytest.mark.parametrize("data", [ARRAY[:-1], "{", "Hi", '[{"prompt": "Hi"}\n{"prompt": "Hi"}]', "[" * 100_000])
def test_a_json_file_that_is_not_json_is_refused_whole(tmp_path: Path, data: str) -> None:
    with pytest.raises(RequestError, match=r"in[.]json is not JSON: "):
        read(tmp_path / "in.json", data)


def test_another_name_is_what_its_first_line_shows(tmp_path: Path) -> None:
    path = tmp_path / "in.prompts"
    assert read(path, '\n{"prompt": "Hi"}\n') == [(2, HI)]
    assert read(path, "Hi\n[1] is a footnote\n42") == [
        (1, {"prompt": "Hi"}),
        (2, {"prompt": "[1] is a footnote"}),
        (3, {"prompt": "42"}),
    ]
    for data in ("{Hi}\n", '\n{"prompt": "Hi"\n', ARRAY, '[{"prompt": "Hi"}]', json.dumps(HI, indent=2)):
        with pytest.raises(RequestError, match=r"its first line is not a whole object .* --format jsonl, json or text"):
            read(path, data)


def test_json_among_lines_that_were_taken_for_text_is_no_prompt(tmp_path: Path) -> None:
    found = read(tmp_path / "in.prompts", 'Hi\n{"prompt": "Hi"}\n{"broken\n')
    assert found[0] == (1, {"prompt": "Hi"})
    assert [said for _, said in found[1:]] == ["looks like JSON among lines of text: say which it is with --format"] * 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.json", "in.prompts"])
def test_utf_16_is_named_before_anything_is_asked(tmp_path: Path, name: str, encoding: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is UTF-(16|32) text, expected UTF-8"):
        read(tmp_path / name, ("\ufeff" if encoding.endswith("be") else "").encode(encoding) + "Hi\n".encode(encoding))


def test_a_pipe_is_waited_for_only_if_it_may_be() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as file:  # noqa: PTH123
        lines = Input(file, "stdin", None)
        assert not lines.is_counted
        may_wait = True
        found = lines.lines(lambda: may_wait)
        os.write(writing, b'{"prompt": "Hi"}\n{"prompt"')
        first = next(found)
        assert first is not None and first.fields() == HI
        may_wait = False
        assert next(found) is None
        os.write(writing, b': "there"}\n')
        may_wait = True
        second = next(found)
        assert second is not None and (second.number, second.fields()) == (2, {"prompt": "there"})
        os.close(writing)
        assert list(found) == []


@pytest.mark.parametrize("first", ['[ {"prompt": "Hi"},', '["a", "b"]', "[[1]]"])
def test_a_guess_does_not_send_an_array_as_a_prompt(tmp_path: Path, first: str) -> None:
    with pytest.raises(RequestError, match="--format"):
        read(tmp_path / "in", f"{first}\nHi\n")
    assert read(tmp_path / "in", "[1] Hi\n") == [(1, {"prompt": "[1] Hi"})]


def test_a_pipe_that_stays_open_can_be_closed_while_it_is_read() -> None:
    ours, partner = os.pipe()
    file = os.fdopen(ours, "rb")
    os.write(partner, b'{"prompt": "Hi"}\n')
    lines = Input(file, "stdin", None).lines()
    assert next(lines)
    closing = Thread(target=file.close, daemon=True)
    closing.start()
    closing.join(timeout=30)
    assert not closing.is_alive()
    os.close(partner)


def test_what_is_no_text_is_said_once(tmp_path: Path) -> None:
    for data, said in (
        (gzip.compress(b"Hi"), "gzip"),
        ("Hi\nHi\n".encode("utf-16-be"), "UTF-16"),
        (b"\xff\xfeH\0", "UTF-16"),
    ):
        for name in ("in.jsonl", "in.txt", "in"):
            with pytest.raises(RequestError, match=said):
                read(tmp_path / name, data)


def test_a_name_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    twice = '{"prompt": "A", "body": {"n": 1, "n": 2}}'
    assert read(tmp_path / "in.jsonl", twice) == [(1, "not JSON: 'n' is given twice")]
    with pytest.raises(RequestError, match="'n' is given twice"):
        read(tmp_path / "in.json", f"[{twice}]")


def test_a_repeated_name_is_found_among_many(tmp_path: Path) -> None:
    names = ",".join(f'"{i}": 1' for i in range(200_000))
    assert read(tmp_path / "in.jsonl", f'{{{names}, "7": 2}}') == [(1, "not JSON: '7' is given twice")]
