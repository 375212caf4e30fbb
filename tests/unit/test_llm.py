"""The library's front door, with the default model."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from threading import Event, Thread
from typing import Any

import jax
import numpy as np
import pytest

import llamajax
from llamajax import LLM, Completion, InternalError, Message, PromptTooLongError, RequestError, SamplingParams
from llamajax.answer import Answer
from llamajax.tokenizers.chat import ChatTemplate
from llamajax.tokenizers.hf import HFTokenizer
from llamajax.types import Token

from ..tiny_model import count_compilations

START = "Once upon a time"
FRANCE: list[Message] = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def llama(default_model: None) -> LLM:
    return llamajax.load("smollm2-135m-instruct", max_seq_len=1024)


@pytest.fixture(scope="module")
def tale(llama: LLM) -> Completion:
    return llama.generate(START, max_new_tokens=24, temperature=0)


def tell(llama: LLM, **options: Any) -> Completion:
    """As `tale`, but for what the options change."""
    return llama.generate(**{"prompt": START, "max_new_tokens": 24, "temperature": 0, **options})


def test_a_warm_model_compiles_nothing(llama: LLM) -> None:
    llama.warm_up(200)
    with count_compilations() as compiled:
        llama.chat(FRANCE, max_new_tokens=4)
        llama.generate("word " * 150, max_new_tokens=4, temperature=0, top_k=5, stop="x")
        llama.generate(START, max_new_tokens=4, logit_bias={7: 1.5}, min_tokens=3, stop_token_ids=range(9), seed=-1)
    assert compiled == []


def test_generate_continues_a_text(llama: LLM, tale: Completion) -> None:
    assert tale.prompt_tokens == len(llama.tokenizer.encode(START))
    assert (len(tale.token_ids), tale.finish_reason, tale.cached_tokens) == (24, "length", 0)
    assert llama.tokenizer.decode(tale.token_ids) == tale.text
    assert tale.timings.time_to_first_token > 0
    assert tale.tokens_per_second == pytest.approx(23 / tale.timings.decode_time)
    assert llama.generate("The capital of France is", max_new_tokens=1, temperature=0).text == " Paris"


def test_chat_answers_messages_and_leaves_out_the_stop_token(llama: LLM) -> None:
    answer = llama.chat(FRANCE, max_new_tokens=50, temperature=0)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.prompt_tokens == len(llama.encode_chat(FRANCE))
    assert not set(answer.token_ids) & set(llama.tokenizer.special_tokens.values())


def test_stream_gives_the_same_text_piece_by_piece(llama: LLM, tale: Completion) -> None:
    stream = llama.stream(START, max_new_tokens=24, temperature=0)
    text = ""
    for pieces, piece in enumerate(stream, 1):
        text += piece
        so_far = stream.completion
        assert so_far.text == text
        assert len(so_far.token_ids) >= pieces
        assert (so_far.finish_reason, so_far.prompt_tokens) == ("cancelled", tale.prompt_tokens)
    assert text == tale.text
    assert pieces > 12
    assert stream.finish() == stream.completion
    assert (stream.completion.token_ids, stream.completion.finish_reason) == (tale.token_ids, "length")
    assert list(stream) == []


def test_a_seed_decides_the_answer(llama: LLM) -> None:
    first, same, other, by_params = (
        tell(llama, temperature=1, seed=1),
        tell(llama, temperature=1, seed=1),
        tell(llama, temperature=1, seed=2),
        llama.generate(START, max_new_tokens=24, sampling=SamplingParams(temperature=1, seed=1)),
    )
    assert first.text == same.text == by_params.text != other.text


def test_emoji_are_never_cut(llama: LLM) -> None:
    stream = llama.stream("🦙🔥" * 8, max_new_tokens=14, temperature=0)
    pieces = list(stream)
    assert len(pieces) < len(stream.completion.token_ids)
    assert any(piece in "🦙🔥" for piece in pieces)
    assert not any("\ufffd" in piece for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 5}, "unknown option 'max_tokens': did you mean 'max_new_tokens'"),
        ({"temprature": 1}, "unknown option 'temprature': did you mean 'temperature'"),
        ({"verbatimm": {}}, "unknown option 'verbatimm': did you mean 'verbatim'"),
        ({"zzz": 5}, "unknown option 'zzz': there are add_generation_prompt, .*temperature"),
        ({"temperature": -1}, r"temperature must be in \[0, 1000000\], not -1"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], not 0"),
        ({"logprobs": 21}, "logprobs must be None or an integer from 0 to 20, not 21"),
        ({"logprobs": True}, "logprobs must be None or an integer from 0 to 20, not True"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer of at least 1, not 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer of at least 1, not True"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens must be an integer of at least 1, not nan"),
        ({"min_tokens": -1}, "min_tokens must be an integer of at least 0, not -1"),
        ({"min_tokens": 51}, "min_tokens must be at most max_new_tokens, 50, not 51"),
        ({"ignore_eos": "false"}, "ignore_eos must be true or false, not 'false'"),
        ({"reuse_cache": True}, "unknown option 'reuse_cache'"),
        ({"sampling": {"seed": 1}}, "sampling must be SamplingParams, not {'seed': 1}"),
        ({"logit_bias": {49152: 1}}, "token ids must be from 0 to 49151, logit_bias has 49152 to 49152"),
        ({"stop_token_ids": [49152]}, "each of stop_token_ids must be an integer from 0 to 49151, not 49152"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, not 5"),
        ({"stop_token_ids": range(200)}, "at most 128 stop tokens, not 20"),
        ({"stop_token_ids": [1] * 10_000}, "at most 256 stop_token_ids, not 10000"),
        ({"stop": 5}, "stop must be one string or several, not 5"),
        ({"stop": {"a": 1}}, "stop must be one string or several, not {'a': 1}"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, not 0"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be an integer of at least 1, not '5'"),
        ({"stop": [1]}, r"stop must be one string or several, not \[1\]"),
        ({"stop": ""}, "a stop string must not be empty"),
        ({"stop": ["a", ""]}, "a stop string must not be empty"),
        ({"stop": ["a"] * 257}, "at most 256 stop strings, not 257"),
    ],
    ids=str,
)
def test_bad_options_are_named(llama: LLM, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        llama.stream(START, **options)


@pytest.mark.parametrize("prompt", [5, None, b"text", {"role": "user", "content": "x"}, iter("ab")], ids=repr)
def test_what_is_no_prompt_is_refused(llama: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError, match="a prompt must be a text, messages or token ids, not"):
        llama.stream(prompt)


def test_token_ids_may_be_numpy_s(llama: LLM, tale: Completion) -> None:
    ids = llama.tokenizer.encode(START)
    for prompt in (np.array(ids), list(np.array(ids, np.uint16)), [float(i) for i in ids], tuple(ids)):
        assert tell(llama, prompt=prompt).token_ids == tale.token_ids
    with pytest.raises(RequestError, match="token ids must be from 0 to 49151"):
        llama.stream([1, 10**5000])


def test_a_stop_token_of_one_s_own_ends_an_answer(llama: LLM, tale: Completion) -> None:
    end = tale.token_ids[9]
    cut = tell(llama, stop_token_ids=[np.int64(end)])
    assert (cut.token_ids, cut.finish_reason) == (tale.token_ids[: tale.token_ids.index(end)], "stop")
    later = tell(llama, stop_token_ids=[end], min_tokens=15)
    assert len(later.token_ids) >= 15 and end not in later.token_ids
    assert later.token_ids[: len(cut.token_ids)] == cut.token_ids


def test_stop_strings_do_not_count_before_min_tokens(llama: LLM, tale: Completion) -> None:
    texts = [llama.tokenizer.decode([token]) for token in tale.token_ids]
    third, sixth = "".join(texts[1:3]), "".join(texts[5:7])
    assert tell(llama, stop=[third, sixth], min_tokens=3).text == "".join(texts[:5])
    assert tell(llama, stop=[third, sixth], min_tokens=2).text == texts[0]
    assert tell(llama, stop=[third], min_tokens=24).token_ids == tale.token_ids


def test_a_bias_makes_a_token_certain_or_impossible(llama: LLM, tale: Completion) -> None:
    assert tell(llama, logit_bias={777: 100}, max_new_tokens=3).token_ids == (777,) * 3
    without = tell(llama, logit_bias=dict.fromkeys(tale.token_ids, -100.0))
    assert set(without.token_ids).isdisjoint(tale.token_ids)


def test_a_drawn_token_that_the_tokenizer_lacks_is_no_text(llama: LLM) -> None:
    """Embeddings may be padded to more rows than there are tokens."""
    smaller = copy(llama.tokenizer)
    assert isinstance(smaller, HFTokenizer)
    smaller.vocab_size = 49000
    smaller._tokens = {token_id: token for token_id, token in smaller._tokens.items() if token_id < 49000}
    padded = LLM(llama._runner, smaller, llama.template, frozenset())
    options: dict[str, Any] = {"max_new_tokens": 3, "logit_bias": {49100: 100}}
    [batched] = padded.generate_batch([START], raise_errors=True, **options)
    for answer in (padded.generate(START, **options), padded.chat(FRANCE, **options), batched):
        assert (answer.text, answer.token_ids) == ("", (49100,) * 3)


def test_prompts_and_options_of_other_kinds_are_that_prompt_s_error(llama: LLM) -> None:
    for prompt in (np.array([[1, 2]]), np.array([], int), np.float32(1), b"Hi", [[1]], None):
        with pytest.raises(RequestError):
            llama.prepare(prompt)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="verbatim"):
        llama.prepare(FRANCE, verbatim=5)  # type: ignore[arg-type]
    pairs: list[Any] = [("Hi", {1: 2}), ("Hi", {"max_new_tokens": 1}), (np.array([[1]]), {})]
    found = dict(llama.stream_batch(pairs))
    assert [isinstance(found[i], RequestError) for i in range(3)] == [True, False, True]


def test_no_limit_is_the_context_s(llama: LLM) -> None:
    answer = llama.generate("word " * 1000, max_new_tokens=None, ignore_eos=True)
    assert (answer.prompt_tokens + len(answer.token_ids), answer.finish_reason) == (1024, "length")


def test_an_answer_may_go_on_with_the_last_message(llama: LLM) -> None:
    begun: list[Message] = [*FRANCE, {"role": "assistant", "content": "The capital of France is"}]
    ids = llama.encode_chat(begun, add_generation_prompt=False, continue_final_message=True)
    assert llama.tokenizer.decode(ids).endswith("assistant\nThe capital of France is")
    assert llama.chat(begun, continue_final_message=True, max_new_tokens=1, temperature=0).text == " Paris"
    assert len(llama.encode_chat(FRANCE)) > len(llama.encode_chat(FRANCE, add_generation_prompt=False))
    with pytest.raises(RequestError, match="cannot both be true"):
        llama.chat(begun, continue_final_message=True, add_generation_prompt=True)
    for prompt in ("Hi", [1, 2]):
        with pytest.raises(RequestError, match="need messages"):
            llama.prepare(prompt, continue_final_message=True)
        with pytest.raises(RequestError, match="need messages"):
            llama.prepare(prompt, add_generation_prompt=False)


def test_a_chat_template_s_variables(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(**variables: Any) -> tuple[int, ...]:
        return tuple(llama.prepare(FRANCE, chat_template_kwargs=variables)[0].token_ids)

    assert ids(enable_thinking=False) == ids()  # this template reads none
    source = "{{ messages[0].content }}{{ '' if enable_thinking is defined and not enable_thinking else ' Think.' }}"
    monkeypatch.setattr(llama, "template", ChatTemplate(source))
    assert llama.tokenizer.decode(ids()).endswith(" Think.")
    assert llama.tokenizer.decode(ids(enable_thinking=False)) == FRANCE[0]["content"]
    assert tuple(llama.encode_chat(FRANCE, variables={"enable_thinking": False})) == ids(enable_thinking=False)
    monkeypatch.setattr(llama, "template", ChatTemplate("{{ messages[0].content + mode | default('') }}"))
    assert ids(mode="!") != ids()
    with pytest.raises(RequestError, match="with these chat_template_kwargs, the chat template failed"):
        ids(mode=5)
    assert ids(template=1, tokenizer=2, self=3, conversations=4, source=5) == ids()
    for wrong in ("thinking", [1], {1: 2}, True):
        with pytest.raises(RequestError, match="chat_template_kwargs must be an object, not "):
            llama.prepare(FRANCE, chat_template_kwargs=wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="chat_template_kwargs cannot have messages"):
        ids(messages=[])
    deep: list[Any] = []
    for depth in range(2000):
        deep = [deep]
        if depth in (600, 1999):  # JSON can have one of these; Python before 3.12 has no room for what reads it
            fails = depth == 1999 or sys.version_info < (3, 12)
            with pytest.raises(RequestError, match=r"nested|recursion") if fails else nullcontext():
                ids(deep=deep)
    with pytest.raises(RequestError, match="what JSON can express"):
        ids(enable_thinking={1, 2})
    with pytest.raises(RequestError, match="chat_template_kwargs may have"):
        ids(text="word " * 1_000_000)
    for prompt in ("Hi", [1, 2]):
        with pytest.raises(RequestError, match="chat_template_kwargs need messages"):
            llama.prepare(prompt, chat_template_kwargs={"a": 1})


def test_a_content_may_be_parts(llama: LLM) -> None:
    parts = [{"type": "text", "text": "Name the"}, {"type": "text", "text": "capital."}]
    whole: list[Message] = [{"role": "user", "content": "Name the\ncapital."}]
    assert llama.prepare([{"role": "user", "content": parts}])[0] == llama.prepare(whole)[0]


def test_options_beside_sampling_are_refused_not_forgotten(llama: LLM) -> None:
    with pytest.raises(RequestError):
        llama.stream(START, sampling=SamplingParams(), temperature=0)


def test_a_prompt_that_is_far_too_long_is_not_encoded(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    called: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": "x" * 200_000}}],
    }
    monkeypatch.setattr(llama.tokenizer, "encode", None)
    for prompt in ("x" * 200_000, [{"role": "user", "content": "x" * 200_000}], [called]):
        with pytest.raises(PromptTooLongError, match="1024 tokens, and the prompt has at least 2470: shorten"):
            llama.stream(prompt)  # type: ignore[arg-type]


def test_a_prompt_must_fit_and_hold_something(llama: LLM) -> None:
    with pytest.raises(PromptTooLongError, match="context length is 1024 tokens, and the prompt has 1024: shorten"):
        llama.stream("\n" + " word" * 1023)
    with pytest.raises(RequestError, match="the prompt is empty"):
        llama.stream("")
    with pytest.raises(RequestError, match="at least one message"):
        llama.stream([])


# Stop strings.


def assert_cut(llama: LLM, tale: Completion, stops: Sequence[str], at: int) -> None:
    stream = llama.stream(START, max_new_tokens=24, temperature=0, stop=stops)
    assert "".join(stream) == tale.text[:at]
    assert (stream.completion.text, stream.completion.finish_reason) == (tale.text[:at], "stop")
    # The completion has all drawn tokens, the stop string's too, and nothing was drawn after them.
    drawn = stream.completion.token_ids
    assert drawn == tale.token_ids[: len(drawn)]
    without_last, whole = llama.tokenizer.decode(drawn[:-1]), llama.tokenizer.decode(drawn)
    assert [any(stop in text for stop in stops) for text in (without_last, whole)] == [False, True]


def test_a_stop_string_may_span_tokens(llama: LLM, tale: Completion) -> None:
    texts = [llama.tokenizer.decode([token]) for token in tale.token_ids]
    start = len("".join(texts[:6])) + 1
    stop = tale.text[start : len("".join(texts[:9])) + 1]  # from within the 7th token into the 10th
    assert_cut(llama, tale, [stop], tale.text.index(stop))
    assert tell(llama, stop=stop).text == tale.text[: tale.text.index(stop)]


def test_of_several_stop_strings_the_first_in_the_text_counts(llama: LLM, tale: Completion) -> None:
    late, early = tale.text[30:36], tale.text[12:20]
    assert_cut(llama, tale, [late, "never said", early], tale.text.index(early))


def test_a_stop_string_that_almost_comes_changes_nothing(llama: LLM, tale: Completion) -> None:
    almost = tell(llama, stop=[tale.text[5:12] + "\x00", tale.text[-3:] + " and more"])
    assert (almost.text, almost.finish_reason) == (tale.text, "length")


# Scores.


def test_logits_agree_with_what_is_generated(llama: LLM, tale: Completion) -> None:
    """One by one or all at once, sums round differently, and then the activations, to 8 bits: a score may move."""
    prompt = llama.tokenizer.encode(START)
    ids = [*prompt, *tale.token_ids]
    scores = llama.logits(ids)
    assert (scores.shape, scores.dtype) == ((len(ids), llama.config.vocab_size), np.float32)
    after = scores[len(prompt) - 1 : -1]
    chosen = after[np.arange(24), list(tale.token_ids)]
    assert (after.max(axis=1) - chosen).max() < 0.1
    assert np.median(np.sort(after, axis=1)[:, -1] - np.sort(after, axis=1)[:, -2]) > 0.5  # which is not easy to meet

    told = tell(llama, logprobs=3)
    assert told.token_ids == tale.token_ids
    logprobs = after - np.log(np.exp(after).sum(axis=1, keepdims=True))
    for row, token, said in zip(logprobs, told.token_ids, told.logprobs or (), strict=True):
        assert said.logprob == pytest.approx(row[token], abs=0.3)
        assert dict(said.top) == pytest.approx({id: row[id] for id, _ in said.top}, abs=0.6)
        assert said.top[0] == (token, said.logprob)


@pytest.mark.parametrize("count", [0, 3, 20])
def test_as_many_logprobs_as_were_asked_for(llama: LLM, count: int) -> None:
    told = tell(llama, max_new_tokens=3, logprobs=count).logprobs
    assert told is not None
    assert [len(token.top) for token in told] == [count] * 3
    for token in told:
        values = [value for _, value in token.top]
        assert values == sorted(values, reverse=True)


def test_logprobs_are_not_there_unless_asked_for(tale: Completion) -> None:
    assert tale.logprobs is None


def test_logits_refuse_what_is_no_prompt(llama: LLM) -> None:
    with pytest.raises(RequestError, match="at least one token"):
        llama.logits([])
    for id in (-1, llama.config.vocab_size):
        with pytest.raises(RequestError, match="token ids must be from 0 to 49151"):
            llama.logits([1, id])
    with pytest.raises(RequestError, match="logits takes token ids, not 'text'"):
        llama.logits("text")  # type: ignore[arg-type]
    assert (llama.logits(np.array([1, 2])) == llama.logits([1, 2])).all()
    with pytest.raises(PromptTooLongError, match="1025 tokens"):
        llama.logits([1] * 1025)


def test_prompt_logprobs(llama: LLM) -> None:
    ids = llama.tokenizer.encode("It was a bright cold day in April, and the clocks were striking thirteen. " * 40)[
        :600
    ]
    first, *rest = llama.prompt_logprobs(ids, num_top=2)
    assert first is None
    scores = np.asarray(jax.nn.log_softmax(llama.logits(ids)[:-1]))
    expected = scores[np.arange(599), ids[1:]]
    assert sum(token.logprob for token in rest if token) == pytest.approx(expected.sum(), abs=1e-4)
    assert [token.top[0][1] for token in rest if token] == pytest.approx(scores.max(-1), abs=1e-4)
    assert {len(token.top) for token in rest if token} == {2}
    assert llama.prompt_logprobs([5]) == (None,)
    for length in (2, 10, 15, 17, 33, 64, 100):  # padded as for the logits: rounding sees the padding
        scores = np.asarray(jax.nn.log_softmax(llama.logits(ids[:length])[:-1]))
        found = [token.logprob for token in llama.prompt_logprobs(ids[:length]) if token]
        assert found == pytest.approx(scores[np.arange(length - 1), ids[1:length]].tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [2, 6, 16, 17, 33])
def test_a_short_text_is_scored_as_by_logits(llama: LLM, length: int) -> None:
    ids = llama.tokenizer.encode("It was a bright cold day in April, and the clocks were striking thirteen. " * 3)
    scores = np.asarray(jax.nn.log_softmax(llama.logits(ids[:length])))
    expected = scores[np.arange(length - 1), ids[1:length]]
    found = [token.logprob for token in llama.prompt_logprobs(ids[:length]) if token]
    assert found == pytest.approx(expected, abs=1e-5)


def test_prompt_logprobs_refuse_what_is_no_prompt(llama: LLM) -> None:
    with pytest.raises(RequestError, match="at least one token"):
        llama.prompt_logprobs([])
    with pytest.raises(RequestError, match="token ids must be from 0 to 49151"):
        llama.prompt_logprobs([1, -1])
    with pytest.raises(RequestError, match="prompt_logprobs takes token ids, not 'text'"):
        llama.prompt_logprobs("text")  # type: ignore[arg-type]
    with pytest.raises(PromptTooLongError, match="1025 tokens"):
        llama.prompt_logprobs([1] * 1025)
    with pytest.raises(RequestError, match="num_top must be an integer from 0 to 20, not 21"):
        llama.prompt_logprobs([1], 21)


# A stream that does not run to its end.


def test_cancel_inside_the_loop(llama: LLM, tale: Completion) -> None:
    stream = llama.stream(START, max_new_tokens=24, temperature=0)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 5:
            stream.cancel()
    completion = stream.completion
    assert completion.finish_reason == "cancelled"
    assert completion.text == "".join(pieces)
    assert tale.text.startswith(completion.text)
    assert completion.token_ids == tale.token_ids[:5]


def test_cancel_from_another_thread(llama: LLM) -> None:
    begun = Event()
    stream = llama.stream(START, max_new_tokens=900)

    def cancel() -> None:
        begun.wait()
        stream.cancel()

    Thread(target=cancel).start()
    for _ in stream:
        begun.set()
    assert stream.completion.finish_reason == "cancelled"
    assert 0 < len(stream.completion.token_ids) < 900


def test_cancel_before_it_began(llama: LLM) -> None:
    stream = llama.stream(START, max_new_tokens=900)
    stream.cancel()
    completion = stream.finish()
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", (), "cancelled")


def test_a_dropped_stream_leaves_no_trace(llama: LLM, tale: Completion) -> None:
    for prompt in ("The capital of France is", START):
        stream = llama.stream(prompt, max_new_tokens=500)
        next(stream)
        next(stream)
        del stream
        assert tell(llama).token_ids == tale.token_ids


def test_a_stream_that_was_overtaken_goes_on_with_its_own_tokens(llama: LLM, tale: Completion) -> None:
    """The engine has one slot."""
    expected = llama.generate("The capital of France is", max_new_tokens=24, temperature=0)
    overtaken = llama.stream("The capital of France is", max_new_tokens=24, temperature=0)
    next(overtaken)
    running = llama.stream(START, max_new_tokens=24, temperature=0)
    next(running)
    assert overtaken.finish().token_ids == expected.token_ids
    assert running.finish().token_ids == tale.token_ids


def test_threads_that_generate_take_turns(llama: LLM) -> None:
    def options(number: int) -> dict[str, Any]:
        return {"max_new_tokens": 6, "temperature": number % 2, "seed": number, "logprobs": 2 if number % 3 else None}

    expected = [llama.generate(f"{START} {number}", **options(number)) for number in range(8)]
    found: dict[int, Completion] = {}
    threads = [
        Thread(target=lambda n=n: found.update({n: llama.generate(f"{START} {n}", **options(n))})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for number, answer in enumerate(expected):
        assert (found[number].token_ids, found[number].logprobs) == (answer.token_ids, answer.logprobs)


def test_streams_of_several_threads_end_with_their_own_text(llama: LLM) -> None:
    prompts = [START, "The capital of France is", "1, 2, 3,"] * 2
    expected = [llama.generate(prompt, max_new_tokens=40, temperature=0) for prompt in prompts]
    found: dict[int, str] = {}

    def read(number: int) -> None:
        found[number] = "".join(llama.stream(prompts[number], max_new_tokens=40, temperature=0))

    threads = [Thread(target=read, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert [found[number] for number in range(6)] == [answer.text for answer in expected]


# A batch.


def test_a_prompt_that_cannot_be_answered_has_its_error_among_the_answers(llama: LLM, tale: Completion) -> None:
    prompts = [START, "word " * 1100, [], START, 7]
    results = llamajax.generate_batch(llama, prompts, max_new_tokens=24, temperature=0)  # type: ignore[arg-type]
    kinds = [type(result) for result in results]
    assert kinds == [Completion, PromptTooLongError, RequestError, Completion, RequestError]
    assert [result.text for result in results if isinstance(result, Completion)] == [tale.text] * 2
    with pytest.raises(PromptTooLongError):
        llama.generate_batch(prompts[:2], max_new_tokens=24, raise_errors=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", ["hello", b"hello", 5, None, {"prompt": "x"}], ids=repr)
def test_a_batch_is_a_list(llama: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="generate_batch takes a list of prompts, not"):
        llama.generate_batch(prompts)


def test_a_batch_s_options_are_checked_once(llama: LLM) -> None:
    with pytest.raises(RequestError, match="unknown option 'slot': did you mean 'slots'"):
        llama.generate_batch([START], slot=3)  # type: ignore[call-overload]
    [(_, error)] = llama.stream_batch([START])  # type: ignore[list-item]
    assert isinstance(error, RequestError) and "pairs of a prompt and its options" in str(error)


def test_a_fault_in_one_request_is_its_own(llama: LLM, tale: Completion, monkeypatch: pytest.MonkeyPatch) -> None:
    push = Answer.push

    def faulty(self: Answer, token: Token) -> str:
        if len(self.request.token_ids) == 1:
            raise TypeError("a fault")
        return push(self, token)

    monkeypatch.setattr(Answer, "push", faulty)
    failed, whole = llama.generate_batch([[5], START], max_new_tokens=24, temperature=0)
    assert isinstance(failed, InternalError) and isinstance(failed.__cause__, TypeError)
    assert isinstance(whole, Completion) and whole.token_ids == tale.token_ids


# Loading.


def test_load_tells_its_progress_and_keeps_to_max_seq_len(default_model: None) -> None:
    told: list[tuple[int, int]] = []
    small = llamajax.load(max_seq_len=32, progress=lambda done, total: told.append((done, total)))
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert {total for _, total in told} == {done[-1]}
    assert 90e6 < done[-1] < 100e6

    answer = small.generate("Count: one two three", max_new_tokens=1000)
    assert answer.prompt_tokens + len(answer.token_ids) == 32
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "smolm2-135m"}, "did you mean 'smollm2-135m-instruct'"),
        ({"max_seq_len": 0}, "max_seq_len must be from 2 to the model's context, 8192, not 0"),
        ({"max_seq_len": 2.5}, "max_seq_len must be from 2 to the model's context, 8192, not 2.5"),
        ({"max_seq_len": 8193}, "max_seq_len must be from 2 to the model's context, 8192, not 8193"),
        ({"device": "tpu"}, "no tpu that jax can use"),
    ],
    ids=str,
)
def test_load_refuses_in_one_line(default_model: None, options: dict[str, Any], says: str) -> None:
    if options.get("device") == jax.default_backend():
        pytest.skip("there is one here")
    with pytest.raises(RequestError, match=says) as error:
        llamajax.load(**options)
    assert "\n" not in str(error.value)


def test_a_model_without_a_chat_template_cannot_chat(llama: LLM) -> None:
    base = LLM(llama._runner, llama.tokenizer, None, frozenset())
    assert base.generate("The capital of France is", max_new_tokens=1, temperature=0).text == " Paris"
    with pytest.raises(RequestError, match="no chat template"):
        base.chat(FRANCE)
