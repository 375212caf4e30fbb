"""The chat page in Chromium, and what a user does with it."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("the page is tested in Chromium, which is not installed here", allow_module_level=True)
pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright, which is not installed here")
from playwright.sync_api import Locator, Page, Request, expect  # noqa: E402

expect.set_options(timeout=30_000)

# Without a limit, an answer that only Stop ends.
LONG = "Tell me a long story."


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

    def keep(self, answer: str) -> None:
        """Has the browser keep a conversation with this answer, and shows it."""
        messages = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": answer, "finish": "stop"},
        ]
        kept = {"id": "kept", "title": "Kept", "changed": 1, "settings": {}, "messages": messages}
        self.page.evaluate("kept => localStorage.setItem('llamajax.conversation.kept', kept)", json.dumps(kept))
        self.page.reload()
        expect(self.button("Send")).to_be_enabled()


Open = Callable[..., Chat]
