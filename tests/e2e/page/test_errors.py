"""What the page says when the server does not answer."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from .chat import Open, expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route


def refuse(status: int, message: str, **headers: str) -> Callable[["Route"], None]:
    return lambda route: route.fulfill(status=status, json={"error": {"message": message}}, headers=headers)


PART = 'data: {"choices": [{"index": 0, "delta": {"content": "So far"}}]}\n\n'


@pytest.mark.parametrize(
    "handler, said",
    [
        (refuse(400, "the prompt has 9000 tokens"), "The server refused the request: the prompt has 9000 tokens"),
        (refuse(429, "the queue is full", **{"Retry-After": "3"}), "busy: the queue is full. Try again in 3 s."),
        (refuse(503, "stopping"), "The server cannot answer now: stopping."),
        (lambda route: route.fulfill(status=502, body="<html>"), "The server failed (502)"),
        (lambda route: route.abort(), "The server does not answer. Is llamajax serve still running?"),
        (lambda route: route.fulfill(body=PART), "The connection ended before the answer did."),
        (
            lambda route: route.fulfill(body=PART + 'data: {"error": {"message": "the engine has stopped"}}\n\n'),
            "The answer broke off: the engine has stopped",
        ),
    ],
    ids=["bad", "busy", "stopping", "proxy", "gone", "cut", "broken"],
)
def test_errors_are_said(open_page: Open, handler: Callable[["Route"], None], said: str) -> None:
    chat = open_page()
    chat.set(max_tokens="4")
    chat.ask("Hello")
    chat.page.route("**/v1/chat/completions", handler)
    chat.send("Again")
    expect(chat.foot).to_contain_text(said)
    chat.page.reload()
    expect(chat.foot).to_contain_text(said)
    expect(chat.button("Send")).to_be_enabled()
    assert chat.answers.last.inner_text() in ("", "So far")

    chat.page.unroute("**/v1/chat/completions")
    chat.button("Try again").click()
    expect(chat.foot).to_contain_text("4 tokens")
    first, _, second = [message["content"] for message in chat.bodies[-1]["messages"]]
    assert (first, second) == ("Hello", "Again")
    chat.errors.clear()  # Chromium reports each refused request


def test_a_refused_edit_loses_nothing(open_page: Open) -> None:
    chat = open_page()
    chat.set(max_tokens="4")
    chat.ask("one")
    chat.ask("two")
    messages = chat.page.locator("#messages").inner_text()
    chat.page.route("**/v1/chat/completions", refuse(429, "the queue is full"))
    chat.button("Regenerate").click()
    expect(chat.page.get_by_role("alert").first).to_contain_text("the queue is full")
    chat.button("Edit").first.click()
    chat.page.get_by_label("Edit your message").press("Enter")
    expect(chat.questions).to_have_text(["one", "two"])
    assert chat.page.locator("#messages").inner_text() == messages
    chat.errors.clear()


def test_a_key_is_asked_for(open_page: Open, browser: "Browser", url: str) -> None:
    def check_key(route: "Route") -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.fallback()
        else:
            refuse(401, "a key is needed")(route)

    context = browser.new_context()
    context.route("**/v1/**", check_key)
    page = context.new_page()
    page.goto(url)
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    expect(page.get_by_text("The server refused this API key.")).to_be_visible()
    key.fill("secret")
    key.press("Enter")
    send = page.get_by_role("button", name="Send", exact=True)
    expect(send).to_be_enabled()
    page.reload()
    expect(send).to_be_enabled()
    context.close()


def test_the_page_waits_for_the_server(open_page: Open) -> None:
    chat = open_page()
    ready = False

    def health(route: "Route") -> None:
        route.fallback() if ready else route.fulfill(status=503, json={"status": "loading shallow"})

    def models(route: "Route") -> None:
        size = 512 if ready else None
        route.fulfill(json={"object": "list", "data": [{"id": "shallow", "max_model_len": size}]})

    chat.page.route("**/health", health)
    chat.page.route("**/v1/models", models)
    chat.page.reload()
    expect(chat.page.locator("#model")).to_have_text("loading shallow")
    expect(chat.button("Send")).to_be_disabled()
    chat.send("Hello")
    notice = chat.page.get_by_text("Not sent: loading shallow")
    expect(notice).to_be_visible()
    expect(chat.prompt).to_have_value("Hello")
    ready = True
    expect(chat.button("Send")).to_be_enabled()
    expect(notice).to_be_hidden()
    expect(chat.page.locator("#model")).to_have_text("shallow")
    chat.errors.clear()
