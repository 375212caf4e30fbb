"""Files of results: what a torn one still holds, what it is of, and that one run writes it at a time."""

import json
from pathlib import Path
from typing import Any

import pytest

from llamajax.errors import DiskFullError, RequestError
from llamajax.serve.batch_file import as_line
from llamajax.serve.result_file import ResultFile, Settings

LINES = [
    as_line({"line": 1, "digest": "ab", "text": "é"}),
    as_line({"id": "batch_req_12", "digest": "cd", "custom_id": None}),
    as_line({"line": 3, "digest": "ef"}),
]
OPTIONS: dict[str, Any] = {"model": "m", "temperature": 0.6, "stop": ["a"], "max_seq_len": None}


@pytest.mark.parametrize("kept", range(3))
def test_a_torn_last_line_is_removed_wherever_it_was_torn(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "out.jsonl"
    whole, last = b"".join(LINES[:kept]), LINES[kept]
    done = dict([(1, "ab"), (12, "cd")][:kept])
    for end in range(len(last)):
        path.write_bytes(whole + last[:end])
        file = ResultFile(path, resume=True)
        assert file.done == done
        assert path.read_bytes() == whole
        file.write({"line": 3, "digest": "ef"})
        assert path.read_bytes() == whole + LINES[2]
        del file
    path.write_bytes(whole + last[:-2] + b"\n")  # torn in another way
    ResultFile(path, resume=True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("data", [b"a prompt", b"Hi\nthere\n", b'{"prompt": "Hi"}\n', LINES[0][:-2] + b"\n" + LINES[2]])
def test_a_file_that_is_not_ours_is_left_as_it_is(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(data)
    with pytest.raises(RequestError, match="is not an output of llamajax batch"):
        ResultFile(path, resume=True)
    with pytest.raises(RequestError, match="--resume continues it"):
        ResultFile(path, resume=False)
    assert path.read_bytes() == data


def test_an_output_without_digests_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"line": 1, "text": "Hi"}\n')
    with pytest.raises(
        RequestError, match=r"was written by an earlier version, .* cannot be continued: choose another file"
    ):
        ResultFile(path, resume=True)
    assert path.read_bytes() == b'{"line": 1, "text": "Hi"}\n'


def test_one_run_writes_a_file_at_a_time_by_whichever_name(tmp_path: Path) -> None:
    path, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    first = ResultFile(path, resume=False)
    for resume in (False, True):
        with pytest.raises(RequestError, match=f"another run writes {link}: wait until it ends, or choose"):
            ResultFile(link, resume)
    first.write({"line": 1, "digest": "ab"})
    del first
    assert ResultFile(link, resume=True).done == {1: "ab"}
    assert sorted(it.name for it in tmp_path.iterdir()) == ["link.jsonl", "out.jsonl"]


def test_what_is_not_a_regular_file_is_written_too() -> None:
    for _ in range(2):  # and by several at once
        null = ResultFile(Path("/dev/null"), resume=True)
        null.write({"line": 1})
    with pytest.raises(DiskFullError, match="cannot write to /dev/full: No space left on device"):
        ResultFile(Path("/dev/full"), resume=True).write({"line": 1})


def test_a_line_that_changed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(LINES[0])
    file = ResultFile(path, resume=True)
    assert file.check(1, "ab") and not file.check(2, "ab")
    with pytest.raises(RequestError, match=f"line 1 of the input is not the one that {path} has a result of"):
        file.check(1, "cd")


def test_a_digest_tells_lines_and_options_apart_but_not_their_ends() -> None:
    def digest(data: bytes, as_json: bool = True, **changes: Any) -> str:
        return Settings(OPTIONS | changes).digest(data, as_json=as_json)

    assert len({digest(spaced, as_json=False) for spaced in (b"Hi", b"  Hi", b"Hi ")}) == 3
    same = {digest(b"Hi\n"), digest(b"\xef\xbb\xbfHi\r\n"), digest(b"  Hi")}
    assert len(same) == 1 and len(same.pop()) == 16
    others = [digest(b"hi"), digest(b"Hi", False), digest(b"Hi", temperature=0.9), digest(b"Hi", stop=["a", "b"])]
    assert len({digest(b"Hi"), *others}) == 5


def test_options_that_differ_are_named_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.options.json"
    Settings(OPTIONS).check(path)  # nothing was saved
    Settings(OPTIONS).save(path)
    assert json.loads(path.read_text()) == OPTIONS
    Settings(OPTIONS).check(path)
    with pytest.raises(RequestError) as caught:
        Settings(OPTIONS | {"temperature": 0.9, "stop": [], "max_seq_len": 5, "top_p": 1}).check(path)
    assert str(caught.value) == (
        'out.jsonl was made with other options: max_seq_len was null and is 5; stop was ["a"] and is []; '
        "temperature was 0.6 and is 0.9; top_p was null and is 1. Give the same ones, or choose another file"
    )
    assert [it.name for it in tmp_path.iterdir()] == [path.name]
    path.write_bytes(b'{"mo')
    Settings(OPTIONS).check(path)
