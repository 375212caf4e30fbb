"""Perplexity and divergences of a tiny model, against what numpy computes in float64, and files of saved logits."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llamajax import LLM, CheckpointError, PromptTooLongError, RequestError
from llamajax.bench.perplexity import Estimate, measure, windows
from llamajax.bench.saved_logits import SavedLogits, save_logits
from llamajax.ops import quantize_int8
from llamajax.tokenizers.base import Tokenizer

from ... import tiny_model
from ...tiny_model import CONFIG, random_weights, reference_logits, tiny_runner

strict_promotion = tiny_model.strict_promotion

CONTEXT, MIDDLE = 32, 16
BOS = 7
TEXT = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ,.", k=200))


class Letters(Tokenizer):
    """A token for each letter."""

    vocab_size = CONFIG.vocab_size
    stop_ids = frozenset()
    strips_leading_space = False
    special_tokens = {}  # noqa: RUF012

    def __init__(self, bos_id: int | None = None, shift: int = 0) -> None:
        self.bos_id = bos_id
        self._shift = shift

    def encode(self, text: str) -> list[int]:
        return [(ord(letter) + self._shift) % self.vocab_size for letter in text]

    def token_bytes(self, token_id: int) -> bytes:
        raise AssertionError("nothing is decoded")


IDS = np.array(Letters().encode(TEXT))


def tiny_llm(tokenizer: Tokenizer | None = None, **options: Any) -> LLM:
    return LLM(tiny_runner(**options), tokenizer or Letters(), None, frozenset())


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


@pytest.fixture(scope="module")
def int8() -> LLM:
    weights = {path: quantize_int8(x) if x.ndim == 2 else x for path, x in random_weights().items()}
    return tiny_llm(weights=weights)


@pytest.fixture
def saved(llm: LLM, tmp_path: Path) -> Path:
    measure(llm, TEXT, context=CONTEXT, save=tmp_path / "saved")
    return tmp_path / "saved"


def log_probs(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def scored(logits_of: Callable[[list[int]], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [N, V] at the positions that are scored, and the tokens [N] that follow."""
    rows, following = [], []
    for start in range(0, len(IDS) - CONTEXT + 1, CONTEXT):
        window = IDS[start : start + CONTEXT]
        rows.append(log_probs(logits_of(window.tolist()))[MIDDLE:-1])
        following.append(window[MIDDLE + 1 :])
    return np.concatenate(rows), np.concatenate(following)


def assert_mean(estimate: Estimate, sample: np.ndarray, **tolerance: float) -> None:
    error = np.sqrt(((sample - sample.mean()) ** 2).sum() / (len(sample) - 1) / len(sample))
    assert (estimate.value, estimate.error) == pytest.approx((sample.mean(), error), **tolerance)


def assert_exp_mean(estimate: Estimate, sample: np.ndarray, **tolerance: float) -> None:
    error = np.sqrt(((sample - sample.mean()) ** 2).sum() / (len(sample) - 1) / len(sample))
    value = np.exp(sample.mean())
    assert (estimate.value, estimate.error) == pytest.approx((value, value * error), **tolerance)


def test_estimates_by_hand() -> None:
    # The deviations' squares add up to 5, over 3 that is the variance, over 4 that of the mean.
    sample = np.array([1.0, 2.0, 3.0, 4.0])
    error = (5 / 3 / 4) ** 0.5
    assert Estimate.of_mean(sample) == Estimate(2.5, pytest.approx(error))
    assert Estimate.of_exp_mean(sample) == Estimate(pytest.approx(np.exp(2.5)), pytest.approx(np.exp(2.5) * error))


def test_the_delta_method_is_what_many_samples_say() -> None:
    samples = np.random.default_rng(0).exponential(0.5, (2000, 400))
    estimates = [Estimate.of_exp_mean(sample) for sample in samples]
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([estimate.error for estimate in estimates]) == pytest.approx(spread, rel=0.05)


# Windows.


def test_windows_are_whole_and_follow_each_other(llm: LLM) -> None:
    ids = windows(llm, TEXT, CONTEXT)
    assert (ids.shape, ids.dtype) == ((6, CONTEXT), np.int32)  # of 200 tokens, 8 are left out
    assert ids.ravel().tolist() == IDS[:192].tolist()
    assert windows(llm, TEXT[:64], CONTEXT).shape == (2, CONTEXT)


def test_each_window_begins_with_bos_which_replaces_nothing() -> None:
    ids = windows(tiny_llm(Letters(bos_id=BOS)), TEXT, CONTEXT)
    assert ids.shape == (6, CONTEXT)
    assert (ids[:, 0] == BOS).all()
    assert ids[:, 1:].ravel().tolist() == IDS[: 6 * (CONTEXT - 1)].tolist()


@pytest.mark.parametrize("bos_id", [None, BOS])
def test_a_text_of_less_than_a_window_is_one(bos_id: int | None) -> None:
    [window] = windows(tiny_llm(Letters(bos_id)), TEXT[:20], CONTEXT)
    assert window.tolist() == ([] if bos_id is None else [bos_id]) + IDS[:20].tolist()


def test_windows_that_cannot_be_scored_are_refused(llm: LLM) -> None:
    assert measure(llm, TEXT[:5]).tokens == 2
    assert measure(tiny_llm(Letters(BOS)), TEXT[:4]).tokens == 2
    for text in ("", TEXT[:4]):
        with pytest.raises(RequestError, match=f"must have 5 tokens: the context has 512, the text {len(text)}"):
            windows(llm, text, 512)
    for context in (-1, 0, 4):
        with pytest.raises(RequestError, match=f"must have 5 tokens: the context has {context}"):
            windows(llm, TEXT, context)
    with pytest.raises(PromptTooLongError, match="33 tokens are more than the context, 32"):
        windows(tiny_llm(max_seq_len=32), TEXT, 33)


# Figures.


def test_perplexity_is_the_references(llm: LLM) -> None:
    told: list[tuple[int, int]] = []
    measured = measure(llm, TEXT, context=CONTEXT, progress=lambda *done: told.append(done))
    expected, following = scored(reference_logits)
    assert (measured.context, measured.windows, measured.tokens) == (CONTEXT, 6, len(following)) == (32, 6, 6 * 15)
    assert_exp_mean(measured.perplexity, -expected[np.arange(len(following)), following], rel=1e-4)
    assert measured.tokens_per_second > 0
    assert measured.comparison is None
    assert told == [(done, 6) for done in range(1, 7)]


def test_bos_is_read_and_not_scored(llm: LLM) -> None:
    measured = measure(tiny_llm(Letters(bos_id=BOS)), TEXT, context=CONTEXT)
    spelled_out = "".join(chr(97 + BOS) + TEXT[start : start + 31] for start in range(0, 186, 31))
    assert measured.perplexity == measure(llm, spelled_out, context=CONTEXT).perplexity
    assert measured.tokens == 6 * 15


def test_only_the_first_windows(llm: LLM) -> None:
    few = measure(llm, TEXT, context=CONTEXT, max_windows=2)
    assert (few.windows, few.perplexity) == (2, measure(llm, TEXT[:64], context=CONTEXT).perplexity)


def test_a_run_is_like_itself(llm: LLM, saved: Path) -> None:
    again = measure(llm, TEXT, context=CONTEXT, saved=SavedLogits(saved))
    assert again.comparison
    assert again.comparison.same_top == Estimate(1.0, 0.0)
    assert again.comparison.kl_divergence.value == pytest.approx(0, abs=1e-6)
    assert again.comparison.perplexity_ratio.value == pytest.approx(1, abs=1e-3)
    assert again.comparison.saved_perplexity.value == pytest.approx(again.perplexity.value, rel=1e-3)


def test_int8_against_float32_is_what_numpy_says(llm: LLM, int8: LLM, saved: Path) -> None:
    measured = measure(int8, TEXT, context=CONTEXT, saved=SavedLogits(saved))
    (float32, following), (other, _) = scored(llm.logits), scored(int8.logits)
    tokens = np.arange(len(following)), following
    comparison = measured.comparison
    assert comparison
    assert_exp_mean(measured.perplexity, -other[tokens], rel=1e-4)
    assert_exp_mean(comparison.saved_perplexity, -float32[tokens], rel=1e-3)
    assert_exp_mean(comparison.perplexity_ratio, float32[tokens] - other[tokens], rel=0.01)
    divergences = (np.exp(float32) * (float32 - other)).sum(axis=1)
    assert divergences.mean() > 1e-3
    assert_mean(comparison.kl_divergence, divergences, abs=1e-5)
    same = (float32.argmax(axis=1) == other.argmax(axis=1)).astype(float)
    assert 0.5 < same.mean() < 1
    assert_mean(comparison.same_top, same)


def test_fewer_windows_than_were_saved_are_compared(llm: LLM, saved: Path) -> None:
    few = measure(llm, TEXT, context=CONTEXT, max_windows=2, saved=SavedLogits(saved))
    assert few.comparison and few.comparison.same_top.value == 1
    beginning = measure(llm, TEXT[:70], context=CONTEXT, saved=SavedLogits(saved))
    assert beginning.comparison == few.comparison


# Files.


def test_a_file_has_ids_and_logits_relative_to_the_largest(llm: LLM, saved: Path) -> None:
    tensors = load_file(saved)
    assert set(tensors) == {"token_ids", "logits"}
    assert np.array_equal(tensors["token_ids"], windows(llm, TEXT, CONTEXT))
    logits = llm.logits(tensors["token_ids"][2].tolist())[MIDDLE:-1]
    expected = (logits - logits.max(axis=1, keepdims=True)).astype(np.float16)
    assert np.array_equal(tensors["logits"][2], expected)
    assert tensors["logits"].shape == (6, 15, CONFIG.vocab_size)


def test_a_run_may_save_and_compare_at_once(llm: LLM, int8: LLM, saved: Path, tmp_path: Path) -> None:
    both = measure(int8, TEXT, context=CONTEXT, saved=SavedLogits(saved), save=tmp_path / "int8")
    alone = measure(int8, TEXT, context=CONTEXT, saved=SavedLogits(saved))
    assert both.comparison == alone.comparison
    again = measure(int8, TEXT, context=CONTEXT, saved=SavedLogits(tmp_path / "int8"))
    assert again.comparison and again.comparison.same_top.value == 1


def refused(saved: Path, llm: LLM, text: str = TEXT, **options: Any) -> str:
    """What is said of a comparison that cannot be made."""
    with pytest.raises(RequestError) as raised:
        measure(llm, text, **{"context": CONTEXT, **options}, saved=SavedLogits(saved))
    return str(raised.value)


def test_a_file_of_something_else_is_named(llm: LLM, saved: Path) -> None:
    assert refused(saved, llm, TEXT[1:]) == f"{saved} is of another text"
    assert refused(saved, llm, TEXT[:190] + "!" + TEXT[191:]) == f"{saved} is of another text"
    other = tiny_llm(Letters(shift=1))
    assert refused(saved, other) == f"{saved} is of another tokenizer, that gives this text other ids"
    assert refused(saved, tiny_llm(Letters(BOS))).startswith(f"{saved} is of another tokenizer")
    assert refused(saved, llm, context=40) == f"{saved} is of windows of 32 tokens, not 40: choose the same context"
    assert refused(saved, llm, TEXT * 2) == f"{saved} is of 6 windows, not 12: choose as many"


def test_another_vocabulary_is_named(llm: LLM, tmp_path: Path) -> None:
    ids = windows(llm, TEXT, CONTEXT)
    with save_logits(tmp_path / "saved", TEXT, ids, 15, 5) as write:
        for _ in ids:
            write(np.zeros((15, 5), np.float32))
    told = refused(tmp_path / "saved", llm)
    assert told == f"{tmp_path / 'saved'} is of a vocabulary of 5 tokens, the model's has {CONFIG.vocab_size}"


def test_truncated_files_and_other_ones_are_refused(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for content in (whole[:-1], whole[:100], whole[:3], b"", whole + b"\n", b"Once upon a time"):
        saved.write_bytes(content)
        with pytest.raises(RequestError, match=f"{saved} is truncated, or not a file of saved logits"):
            SavedLogits(saved)
    save_file({"logits": np.zeros(3, np.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match="not a file of saved logits"):
        SavedLogits(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        SavedLogits(tmp_path / "none")


@pytest.mark.parametrize(
    "changed",
    [
        {"logits": np.float32},
        {"logits": np.int16},
        {"token_ids": np.int64},
        {"token_ids": np.float32},
        {"logits": (6, 15 * CONFIG.vocab_size)},
        {"logits": (6 * 15 * CONFIG.vocab_size,)},
        {"logits": (15, 6, CONFIG.vocab_size)},
        {"logits": (1, 1, 6, 15 * CONFIG.vocab_size)},
        {"token_ids": (6 * 32,)},
        {"token_ids": (12, 16)},
        {"token_ids": (6, 32, 1)},
    ],
)
def test_tensors_of_other_shapes_and_types_are_refused(saved: Path, changed: dict[str, Any]) -> None:
    tensors = load_file(saved)
    for name, change in changed.items():
        tensor = tensors[name]
        tensors[name] = tensor.reshape(change) if isinstance(change, tuple) else tensor.astype(change)
    save_file(tensors, saved, {"text_sha256": ""})
    with pytest.raises(RequestError, match=f"{saved} is truncated, or not a file of saved logits [^\n]*$"):
        SavedLogits(saved)


def test_other_numbers_of_scored_tokens_are_refused(llm: LLM, saved: Path) -> None:
    tensors = load_file(saved)
    tensors["logits"] = tensors["logits"][:, 1:].copy()
    save_file(tensors, saved, {"text_sha256": ""})
    assert refused(saved, llm) == f"{saved} is of 14 scored tokens a window, not 15: save them again"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_saved_logits_that_are_no_numbers_are_refused(llm: LLM, saved: Path, value: float) -> None:
    tensors = load_file(saved)
    tensors["logits"][4, 3, 2] = value
    save_file(tensors, saved, {"text_sha256": ""})
    assert "the saved logits are not numbers" in refused(saved, llm)


def test_a_file_appears_when_it_is_whole(llm: LLM, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    measure(
        llm,
        TEXT,
        context=CONTEXT,
        save=tmp_path / "saved",
        progress=lambda done, total: seen.append([path.name for path in tmp_path.iterdir()]),
    )
    assert seen == [["saved.part"]] * 6
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_run_that_fails_leaves_what_was_there(llm: LLM, saved: Path) -> None:
    before = saved.read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(llm, TEXT[::-1], context=CONTEXT, save=saved, progress=interrupt)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_weights_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    weights = random_weights()
    weights["norm.weight"][3] = np.nan
    with pytest.raises(CheckpointError, match="NaN"):
        measure(tiny_llm(weights=weights), TEXT, context=CONTEXT, save=tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written_are_told(llm: LLM, tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path, "it is not a file"),
        (Path("/dev/null"), "it is not a file"),
        (tmp_path / "none" / "saved", "No such file or directory"),
    ):
        with pytest.raises(RequestError, match=f"cannot write {path}: {reason}"):
            measure(llm, TEXT, context=CONTEXT, save=path)
    assert Path("/dev/null").is_char_device()
