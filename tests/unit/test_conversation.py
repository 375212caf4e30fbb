"""Conversations with the default model: what is remembered, what is read again, what is forgotten."""

import subprocess
import sys
from threading import Event
from typing import Any

import pytest

import llamajax
from llamajax import LLM, Completion, Conversation, LlamaJaxError, Message, PromptTooLongError, RequestError
from llamajax.engine.batch import Prompts
from llamajax.engine.paged import PagedBatch
from llamajax.engine.steps import Drawn
from llamajax.ops import PAGE_LEN, native
from llamajax.tokenizers.chat import ChatTemplate

from ..tiny_model import count_compilations


@pytest.fixture(scope="module")
def llama(default_model: None) -> LLM:
    return llamajax.load(max_seq_len=1024)


@pytest.fixture(scope="module")
def small(default_model: None) -> LLM:
    return llamajax.load(max_seq_len=256)


def ask(conversation: Conversation, question: str, **options: Any) -> Completion:
    """A whole answer, the same each time."""
    return conversation.ask(question, **{"max_new_tokens": 12, "temperature": 0, **options}).finish()


def roles(conversation: Conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]


def shared(prompt_tokens: int) -> int:
    """Of a prompt that was read, what the next one that begins so need not read."""
    return (prompt_tokens - 1) // PAGE_LEN * PAGE_LEN if native.available() else 0


def test_a_turn_shares_what_was_read_before(llama: LLM) -> None:
    conversation = Conversation(llama)
    first = ask(conversation, "Name the capital of France.")
    second = ask(conversation, "And of Italy?")
    assert "Paris" in first.text
    assert first.cached_tokens == 0
    assert second.cached_tokens == shared(first.prompt_tokens)
    assert conversation.messages == [
        {"role": "user", "content": "Name the capital of France."},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": second.text},
    ]
    assert conversation.forgotten == 0


def test_the_template_reads_the_same_variables_in_each_turn(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% for message in messages %}{{ message.content }}{% endfor %} {{ mode }}"
    monkeypatch.setattr(llama, "template", ChatTemplate(source))
    conversation = Conversation(llama, chat_template_kwargs={"mode": "Shortly"})
    for question in ("Hi", "Bye"):
        stream = conversation.ask(question, max_new_tokens=2, temperature=0)
        stream.finish()
        assert llama.tokenizer.decode(stream.request.token_ids).endswith(f"{question} Shortly")
        if thread := conversation.read_ahead():
            thread.join()
    long = Conversation(llama, chat_template_kwargs={"mode": "long " * 2000})
    with pytest.raises(PromptTooLongError):
        long.ask("Hi", max_new_tokens=2)


def test_what_was_read_ahead_is_not_read_again(llama: LLM) -> None:
    conversation = Conversation(llama)
    assert conversation.read_ahead() is None  # nothing was said yet
    asked: Any = {"max_new_tokens": 100, "ignore_eos": True}
    first = ask(conversation, "Which animals live in the sea?", **asked)
    thread = conversation.read_ahead()
    assert (thread is not None) == native.available()
    if thread:
        thread.join()
    second = ask(conversation, "And which in the desert?", **asked)
    if native.available():
        assert second.cached_tokens >= (first.prompt_tokens + 100) // PAGE_LEN * PAGE_LEN
    # The same tokens as without it.
    other = Conversation(llama)
    assert ask(other, "Which animals live in the sea?", **asked).token_ids == first.token_ids
    assert ask(other, "And which in the desert?", **asked).token_ids == second.token_ids


def test_once_it_is_warm_nothing_compiles(llama: LLM) -> None:
    llama.warm_up(512)
    conversation = Conversation(llama)
    ask(conversation, "Name a colour.")
    ask(conversation, "Another one?", temperature=0.8)
    with count_compilations() as compiled:
        for question in ("And one more?", "Which of them is the colour of the sky on a bright day in summer?", "Why?"):
            ask(conversation, question, temperature=0.8, top_k=40, stop="\n\n\n")
        conversation.ask_again(max_new_tokens=12, seed=7).finish()
    assert compiled == []


def test_asking_again_replaces_the_answer(llama: LLM) -> None:
    conversation = Conversation(llama, "You are a poet.")
    ask(conversation, "Hello!")
    first = ask(conversation, "Tell me about the sea.", temperature=1, seed=1)
    again = conversation.ask_again(max_new_tokens=12, temperature=1, seed=2).finish()
    assert again.text != first.text
    assert again.prompt_tokens == first.prompt_tokens
    assert again.cached_tokens == shared(again.prompt_tokens)
    assert roles(conversation) == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[-1]["content"] == again.text
    same = conversation.ask_again(max_new_tokens=12, temperature=1, seed=2).finish()
    assert same.token_ids == again.token_ids


def test_asking_again_before_anything_was_asked_changes_nothing(llama: LLM) -> None:
    conversation = Conversation(llama, "Be brief.")
    with pytest.raises(RequestError, match="nothing was asked yet"):
        conversation.ask_again(max_new_tokens=12)
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_a_question_that_is_cancelled_while_it_is_read_can_be_asked_again(llama: LLM) -> None:
    conversation = Conversation(llama)
    ask(conversation, "Hello!")
    before = conversation.messages
    question = "word " * 700 + "How many words?"
    stream = conversation.ask(question, max_new_tokens=12, temperature=0)
    told: list[tuple[int, int]] = []

    def cancel(read: int, total: int) -> None:
        told.append((read, total))
        if read > 500:
            stream.cancel()

    stream.on_read = cancel
    cancelled = stream.finish()
    assert (cancelled.token_ids, cancelled.finish_reason) == ((), "cancelled")
    reads = [read for read, _ in told]
    assert reads == sorted(set(reads)) and 500 < reads[-1] < cancelled.prompt_tokens
    assert {total for _, total in told} == {cancelled.prompt_tokens}
    assert conversation.messages == before

    again = conversation.ask_again(max_new_tokens=12, temperature=0, ignore_eos=True).finish()
    assert [message["content"] for message in conversation.messages[2:]] == [question, again.text]

    # Another question takes its place.
    stream = conversation.ask_again(max_new_tokens=12)
    stream.cancel()
    stream.finish()
    ask(conversation, "And now?")
    assert [message["content"] for message in conversation.messages[2::2]] == ["And now?"]


def test_restart(llama: LLM) -> None:
    conversation = Conversation(llama, "Be brief.")
    ask(conversation, "Hello!")
    conversation.restart()
    assert conversation.messages == []
    before: list[Message] = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada."},
    ]
    conversation.restart("Be polite.", before)
    assert roles(conversation) == ["system", "user", "assistant"]
    expected = llama.encode_chat([*conversation.messages, {"role": "user", "content": "What is my name?"}])
    assert ask(conversation, "What is my name?").prompt_tokens == len(expected)
    assert len(before) == 2


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full(small: LLM) -> None:
    conversation = Conversation(small, "You are a helpful guide.")
    questions = [f"Tell me about the number {number}." for number in range(20)]
    for question in questions:
        before = list(conversation.messages)
        answer = ask(conversation, question, max_new_tokens=30)
        asked = conversation.messages[:-1]
        assert answer.prompt_tokens + 30 <= small.max_seq_len
        # The rule: what is left is the system message and the newest exchanges, at most half of the context.
        forgotten = conversation.forgotten
        assert asked == [before[0], *before[1 + 2 * forgotten :], {"role": "user", "content": question}]
        if forgotten:
            break
    assert forgotten > 1
    assert answer.prompt_tokens <= small.max_seq_len // 2
    one_more = asked[:1] + before[1 + 2 * (forgotten - 1) :] + asked[-1:]
    assert len(small.encode_chat(one_more)) > small.max_seq_len // 2
    # And it goes on.
    after = ask(conversation, "Tell me more.")
    assert conversation.forgotten == 0
    assert after.cached_tokens == shared(answer.prompt_tokens)


def test_an_answer_is_recorded_as_far_as_it_came(llama: LLM) -> None:
    conversation = Conversation(llama)
    stream = conversation.ask("Tell me a long story.", max_new_tokens=500, temperature=0)
    pieces = [next(stream) for _ in range(4)]
    stream.cancel()
    stream.finish()
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    ask(conversation, "Go on.")
    assert roles(conversation) == ["user", "assistant"] * 2


def test_a_question_whose_answer_never_began_is_dropped(llama: LLM) -> None:
    conversation = Conversation(llama)
    ask(conversation, "Hello!")
    stream = conversation.ask("Tell me a long story.", max_new_tokens=500)
    stream.cancel()
    stream.finish()
    assert roles(conversation) == ["user", "assistant"]


def test_looking_at_the_messages_does_not_cut_the_answer(llama: LLM) -> None:
    conversation = Conversation(llama)
    stream = conversation.ask("Tell me a long story.", max_new_tokens=12, temperature=0)
    begun = next(stream)
    assert conversation.messages[-1] == {"role": "assistant", "content": begun}
    answer = stream.finish()
    assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}


def test_an_answer_cut_by_a_stop_string_is_remembered_without_it(llama: LLM) -> None:
    whole = ask(Conversation(llama), "Name the capital of France.").text
    conversation = Conversation(llama)
    cut = ask(conversation, "Name the capital of France.", stop=whole[8:12])
    assert cut.finish_reason == "stop"
    assert conversation.messages[-1]["content"] == whole[:8] == cut.text
    # The tokens that were drawn are not those of what is remembered.
    question: Message = {"role": "user", "content": "Why?"}
    expected = llama.encode_chat([*conversation.messages, question])
    after = ask(conversation, "Why?")
    assert after.prompt_tokens == len(expected)


@pytest.mark.parametrize(
    ("question", "options", "kind"),
    [
        ("word " * 300, {"max_new_tokens": 12}, PromptTooLongError),
        ("Why?", {"max_new_tokens": 0}, RequestError),
        ("Why?", {"max_new_tokens": 12, "heat": 1}, RequestError),
        ("Why?", {"max_new_tokens": 12, "stop": ""}, RequestError),
    ],
    ids=["too long", "no tokens", "unknown option", "empty stop"],
)
def test_a_failure_leaves_the_conversation_as_it_was(
    small: LLM, question: str, options: dict[str, Any], kind: type[LlamaJaxError]
) -> None:
    conversation = Conversation(small, "Be brief.")
    first = ask(conversation, "Hello!")
    before = list(conversation.messages)
    with pytest.raises(kind):
        conversation.ask(question, **options)
    assert conversation.messages == before
    if kind is RequestError:
        with pytest.raises(kind):
            conversation.ask_again(**options)
        assert conversation.messages == before
    assert ask(conversation, "And now?").cached_tokens == shared(first.prompt_tokens)


def test_two_conversations_share_a_model_in_turns(llama: LLM) -> None:
    france, italy = Conversation(llama), Conversation(llama)
    said = {
        france: ask(france, "Name the capital of France.").token_ids,
        italy: ask(italy, "What is the capital of Italy?").token_ids,
    }
    for conversation, first in said.items():
        answer = ask(conversation, "Why is it the capital?")
        # Each token is the most probable one, but for rounding, after its own conversation.
        prompt = llama.encode_chat(conversation.messages[:-1], {1: first})
        scores = llama.logits([*prompt, *answer.token_ids])[len(prompt) - 1 : -1]
        assert (scores.max(axis=1) - scores[range(len(answer.token_ids)), list(answer.token_ids)]).max() < 0.2


@pytest.mark.skipif(not native.available(), reason="prompts share nothing")
def test_a_turn_goes_on_from_what_was_read_ahead_so_far(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[Message] = [
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "one two three four " * 200},
    ]
    conversation, other = Conversation(llama), Conversation(llama)
    conversation.restart(messages=before)
    reads: list[int] = []
    is_half_read, goes_on = Event(), Event()
    prefill = PagedBatch.prefill

    def prefill_slowly(batch: PagedBatch, prompts: Prompts) -> Drawn:
        drawn = prefill(batch, prompts)
        reads.append(prompts.num_prefilled)
        is_half_read.set()
        assert goes_on.wait(60)
        return drawn

    monkeypatch.setattr(PagedBatch, "prefill", prefill_slowly)
    thread = conversation.read_ahead()
    assert thread and is_half_read.wait(60)
    stream = conversation.ask("And backwards?", max_new_tokens=12, temperature=0)
    goes_on.set()
    thread.join()
    assert reads == [512]  # the rest is the turn's own
    answer = stream.finish()
    assert answer.cached_tokens == 512
    llama.generate("x" * 4000, max_new_tokens=1)  # in the place of what was kept
    other.restart(messages=before)
    assert ask(other, "And backwards?").token_ids == answer.token_ids


@pytest.mark.skipif(not native.available(), reason="prompts share nothing")
def test_a_program_that_ends_while_it_reads_ahead_does_not_crash(default_model: None) -> None:
    program = """
import time, llamajax
llm = llamajax.load(max_seq_len=8192)
conversation = llamajax.Conversation(llm)
answer = {"role": "assistant", "content": "one two three four " * 1000}
conversation.restart(messages=[{"role": "user", "content": "Count."}, answer])
thread = conversation.read_ahead()
while not llm._alone.scheduler.prefilling:
    time.sleep(0.01)
print(thread.is_alive())
"""
    ended = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")
