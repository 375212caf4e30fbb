"""Conversations: asked, answered, stopped, changed and kept."""

import re

import pytest

from .chat import LONG, Open, expect


def test_a_conversation(open_page: Open) -> None:
    chat = open_page()
    expect(chat.page.get_by_role("heading", name="shallow")).to_be_visible()
    chat.set(system="Be brief.", seed="7", temperature="0.8", max_tokens="24")
    first = chat.ask("What is a queue?")
    assert first
    assert chat.bodies[0] == {
        "model": "shallow",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a queue?"}],
        "temperature": 0.8,
        "seed": 7,
        "max_tokens": 24,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    expect(chat.foot).to_contain_text(re.compile(r"^24 tokens · [\d.]+ tokens/s · cut off by the token limit"))
    expect(chat.page.locator("#context")).to_contain_text(re.compile(r"^ *\d+ of [\d,]+ tokens"))

    chat.prompt.fill("line one")
    chat.prompt.press("Shift+Enter")
    chat.prompt.press_sequentially("line two")
    chat.prompt.press("Enter")
    second = chat.answer()
    assert [message["content"] for message in chat.bodies[1]["messages"][1::2]] == [
        "What is a queue?",
        "line one\nline two",
    ]
    assert chat.bodies[1]["messages"][2]["role"] == "assistant"

    # The seed is given, so that the same question has the same answer.
    chat.button("Regenerate").click()
    assert chat.answer() == second
    assert chat.bodies[2] == chat.bodies[1]

    chat.questions.first.hover()
    chat.button("Edit").first.click()
    editor = chat.page.get_by_label("Edit your message")
    expect(editor).to_have_value("What is a queue?")
    editor.press("Escape")
    expect(chat.questions).to_have_text(["What is a queue?", "line one\nline two"])
    chat.button("Edit").first.click()
    editor.fill("What is a stack?")
    editor.press("Enter")
    edited = chat.answer()
    expect(chat.questions).to_have_text(["What is a stack?"])
    expect(chat.answers).to_have_count(1)
    assert edited != first

    chat.page.reload()
    expect(chat.questions).to_have_text(["What is a stack?"])
    assert chat.answers.inner_text() == edited
    expect(chat.foot).to_contain_text("24 tokens")


def test_several_conversations_are_kept(open_page: Open) -> None:
    chat = open_page()
    chat.set(max_tokens="4")
    chat.ask("one")
    chat.button("New conversation").click()
    expect(chat.answers).to_have_count(0)
    chat.ask("two")  # with the settings of the one before
    assert chat.bodies[1]["max_tokens"] == 4
    listed = chat.page.locator("#list button")
    expect(listed).to_have_text(["two", "one"])

    listed.nth(1).click()
    expect(chat.questions).to_have_text(["one"])
    title = chat.page.get_by_label("Title of this conversation")
    title.fill("Renamed")
    title.press("Enter")
    expect(listed).to_have_text(["two", "Renamed"])
    chat.page.reload()
    expect(listed).to_have_text(["two", "Renamed"])
    expect(chat.questions).to_have_text(["two"])

    chat.button("Delete").click()
    expect(listed).to_have_text(["Renamed"])
    chat.button("Undo").click()
    expect(listed).to_have_text(["two", "Renamed"])
    chat.button("Delete").click()
    chat.page.reload()
    expect(listed).to_have_text(["Renamed"])


@pytest.mark.parametrize("stop", ["key", "button"])
def test_stop(open_page: Open, stop: str) -> None:
    chat = open_page()
    chat.send(LONG)
    chat.expect_stream()
    if stop == "key":
        chat.page.keyboard.press("Escape")
    else:
        chat.button("Stop").click()
    stopped = chat.answer()
    expect(chat.foot).to_contain_text("stopped")
    expect(chat.prompt).to_be_focused()
    chat.set(max_tokens="4")
    chat.ask("And then?")
    assert chat.bodies[1]["messages"][1]["role"] == "assistant"
    assert chat.answers.first.inner_text() == stopped


def test_a_reload_in_the_middle_keeps_the_part_so_far(open_page: Open) -> None:
    chat = open_page()
    chat.send(LONG)
    chat.expect_stream()
    part = chat.answers.last.inner_text()
    chat.page.reload()
    expect(chat.foot).to_contain_text("interrupted")
    # Markdown may be drawn otherwise as it goes on; its first word is not.
    assert chat.answers.last.inner_text().split()[0] == part.split()[0]
    chat.set(max_tokens="4")
    chat.button("Regenerate").click()
    expect(chat.foot).to_contain_text("4 tokens")


def test_an_answer_goes_on_while_another_conversation_is_read(open_page: Open) -> None:
    chat = open_page()
    chat.set(max_tokens="200", seed="1")
    chat.send(LONG)
    chat.button("New conversation").click()
    chat.ask("Hello")
    chat.page.locator("#list button").nth(1).click()
    chat.answer()
    expect(chat.questions).to_have_text([LONG])
    expect(chat.foot).to_contain_text("200 tokens")


def test_full_storage_is_said(open_page: Open) -> None:
    chat = open_page()
    chat.set(max_tokens="4")
    chat.page.evaluate(
        """() => {
          for (let size = 2 ** 22; size; size >>= 1) {
            try { localStorage.setItem("other" + size, "x".repeat(size)); } catch {}
          }
        }"""
    )
    chat.ask("Hello")
    expect(chat.page.get_by_role("alert").first).to_contain_text("no room to keep this conversation")
