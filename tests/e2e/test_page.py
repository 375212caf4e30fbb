"""The chat page in Chromium, with the server that sends it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .command import start

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("the page is tested in Chromium, which is not installed here", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
from playwright.sync_api import Browser, Locator, Page, Request, Route, expect  # noqa: E402

expect.set_options(timeout=30_000)

# More than the context has room for: an answer that only Stop ends.
LONG = "Tell me a long story."
HOSTILE = """\
<img src=x onerror="document.title='hacked'"> <script>document.title='hacked'</script>
[click](javascript:document.title='hacked') [data](data:text/html,hello) [safe](https://example.com/page)
![picture](https://example.com/picture.png) ![inner](/picture.png)

<iframe src="https://example.com"></iframe>
<div onclick="document.title='hacked'" style="position:fixed;inset:0">over all</div>

<svg><style><img src=x onerror="document.title='hacked'"></style></svg>

```html"><img/src=x/onerror=document.title='hacked'>
<b>code</b>
```
"""


@pytest.fixture(scope="module")
def url(shallow_model: str) -> Iterator[str]:
    """Where a server listens whose model is ready."""
    process = start("serve", "-m", shallow_model, "--alias", "shallow", "--port", "0", "--slots", "2")
    try:
        said = b""
        while not (match := re.search(rb"\((http://[^ ]+): ready\)", said)):
            said += (line := process.stderr.readline())
            assert line, said
        yield match[1].decode()
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Callable[..., "Chat"]]:
    """Opens the page in a browser that has not seen it yet. In the end nothing else was asked, and nothing failed."""
    chats: list[Chat] = []

    def open_page(**options: Any) -> Chat:
        context = browser.new_context(**options)
        chats.append(Chat(context.new_page(), url))
        return chats[-1]

    yield open_page
    for chat in chats:
        chat.page.context.close()
        assert chat.errors == []
        assert [asked for asked in chat.asked if not asked.startswith(url)] == []


class Chat:
    """The page, and what a user does with it.

    Attributes:
      errors: what the console and uncaught exceptions said.
      asked: the addresses of all requests.
      bodies: what the server was asked to answer.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._note)
        page.goto(url)
        expect(self.button("Send")).to_be_enabled()

    def _note(self, request: Request) -> None:
        self.asked.append(request.url)
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def prompt(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def questions(self) -> Locator:
        return self.page.locator(".user .body")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".assistant .body")

    @property
    def foot(self) -> Locator:
        """What is said below the last answer."""
        return self.page.locator(".assistant .foot").last

    def send(self, text: str) -> None:
        self.prompt.fill(text)
        self.prompt.press("Enter")

    def ask(self, text: str) -> str:
        """Sends a message and waits for the whole answer."""
        self.send(text)
        return self.answer()

    def answer(self) -> str:
        expect(self.button("Send")).to_be_visible()
        return self.answers.last.inner_text()

    def set(self, **values: str) -> None:
        self.button("Settings").click()
        for name, value in values.items():
            self.page.locator(f"#settings [name={name}]").fill(value)
        self.button("Done").click()

    def expect_stream(self) -> None:
        expect(self.answers.last).not_to_be_empty()
        expect(self.button("Stop")).to_be_visible()


Open = Callable[..., Chat]


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


def test_the_reader_is_not_taken_to_the_end(open_page: Open) -> None:
    chat = open_page(viewport={"width": 900, "height": 500})
    keep(chat, "word\n\n" * 100)
    chat.send(LONG)
    chat.expect_stream()
    scroller = chat.page.get_by_role("region", name="Conversation")
    hidden = "e => e.scrollHeight - e.clientHeight - e.scrollTop"
    assert scroller.evaluate(hidden) < 8
    scroller.hover()
    chat.page.mouse.wheel(0, -1000)
    expect(chat.button("Go to the last message")).to_be_visible()
    top = scroller.evaluate("e => e.scrollTop")
    length = len(chat.answers.last.inner_text())
    expect(chat.answers.last).to_contain_text(re.compile(rf".{{{length + 100}}}", re.DOTALL))
    assert scroller.evaluate("e => e.scrollTop") == top
    chat.button("Go to the last message").click()
    chat.button("Stop").click()
    chat.answer()
    assert scroller.evaluate(hidden) < 8


def test_narrow_and_dark(open_page: Open) -> None:
    chat = open_page(viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True, is_mobile=True)
    wide = "| a | b |\n| --- | --- |\n" + f"| {'wide ' * 30} | {'x' * 90} |\n\n```\n{'long ' * 60}\n```\n\n" + "y" * 200
    keep(chat, wide)
    expect(chat.answers.last.locator("table")).to_be_visible()
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 360
    assert chat.page.locator("#scroller").evaluate("e => e.scrollWidth") <= 360

    def lightness() -> float:
        colour = chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return float(re.findall(r"[\d.]+", colour)[0])

    expect(chat.page.locator("#sidebar")).to_be_hidden()
    dark = lightness()
    chat.page.get_by_role("button", name="Conversations").tap()
    chat.button("Light theme").tap()
    assert dark < 0.3 < 0.9 < lightness()
    chat.page.reload()
    assert lightness() > 0.9
    chat.page.get_by_role("button", name="Conversations").tap()
    chat.page.locator("#list button").tap()
    expect(chat.page.locator("#sidebar")).to_be_hidden()


def test_hostile_markdown_does_nothing(open_page: Open) -> None:
    chat = open_page()
    keep(chat, HOSTILE)
    answer = chat.answers.last
    expect(answer).to_contain_text("over all")
    expect(answer).to_contain_text('<img src=x onerror="')
    assert answer.locator("img, script, iframe, svg, style, [onclick], [onerror], [style]").count() == 0
    links = answer.locator("a[href]")
    assert links.evaluate_all("links => links.map(link => link.href)") == [
        "https://example.com/page",
        "https://example.com/picture.png",
    ]
    assert set(links.evaluate_all("links => links.map(link => link.rel + link.target)")) == {
        "noopener noreferrer nofollow_blank"
    }
    answer.get_by_text("click", exact=True).click()
    answer.get_by_text("over all").click()
    assert chat.page.title() == "Kept · llamajax"


def test_code_is_copied(open_page: Open) -> None:
    chat = open_page(permissions=["clipboard-read", "clipboard-write"])
    keep(chat, "Look:\n\n```python\nif 1 < 2:\n    print('<b>')\n```\n")
    chat.button("Copy python code").click()
    expect(chat.page.get_by_role("status")).to_have_text("Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "if 1 < 2:\n    print('<b>')"


def test_a_screen_reader_hears_the_answer_once(open_page: Open) -> None:
    chat = open_page()
    chat.page.evaluate(
        """() => {
          window.heard = [];
          const announcer = document.querySelector("#announcer");
          new MutationObserver(() => heard.push(announcer.textContent)).observe(announcer, { childList: true });
        }"""
    )
    chat.set(max_tokens="40")
    chat.ask("Hello")
    heard = chat.page.evaluate("heard")
    assert heard[0] == "Writing an answer"
    assert len(heard) == 2
    assert len(heard[1]) > 40
    for landmark in ("navigation", "main"):
        expect(chat.page.get_by_role(landmark)).to_have_count(1)
    unnamed = "e => [...e.querySelectorAll('input, textarea')].filter(f => !f.labels?.length && !f.ariaLabel).length"
    assert chat.page.locator("body").evaluate(unnamed) == 0


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


# ---- What a server says when it cannot answer


def refuse(status: int, message: str, **headers: str) -> Callable[[Route], None]:
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
def test_errors_are_said(open_page: Open, handler: Callable[[Route], None], said: str) -> None:
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


def test_a_key_is_asked_for(open_page: Open, browser: Browser, url: str) -> None:
    def check_key(route: Route) -> None:
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

    def health(route: Route) -> None:
        route.fallback() if ready else route.fulfill(status=503, json={"status": "loading shallow"})

    def models(route: Route) -> None:
        size = 512 if ready else None
        route.fulfill(json={"object": "list", "data": [{"id": "shallow", "max_model_len": size}]})

    chat.page.route("**/health", health)
    chat.page.route("**/v1/models", models)
    chat.page.reload()
    expect(chat.page.locator("#model")).to_have_text("loading shallow")
    expect(chat.button("Send")).to_be_disabled()
    ready = True
    expect(chat.button("Send")).to_be_enabled()
    expect(chat.page.locator("#model")).to_have_text("shallow")
    chat.errors.clear()


def keep(chat: Chat, answer: str) -> None:
    """Has the browser keep a conversation with this answer, and shows it."""
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": answer, "finish": "stop"},
    ]
    kept = {"id": "kept", "title": "Kept", "changed": 1, "settings": {}, "messages": messages}
    chat.page.evaluate("kept => localStorage.setItem('llamajax.conversation.kept', kept)", json.dumps(kept))
    chat.page.reload()
    expect(chat.button("Send")).to_be_enabled()
