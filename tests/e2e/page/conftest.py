"""A server with the chat page, and browsers that open it."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from ..serving import serving, wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from .chat import Chat


@pytest.fixture(scope="package")
def url(shallow_model: str) -> Iterator[str]:
    """Where a server listens whose model is ready."""
    # Room for answers that last until they are stopped.
    with serving(shallow_model, "--alias", "shallow", "--max-seq-len", "2048") as (_, client):
        wait_for(client, "ready")
        yield str(client.base_url)


@pytest.fixture(scope="module")  # while it is open an event loop runs, and no other test could run one
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    from .chat import CHROMIUM

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: "Browser", url: str) -> Iterator[Callable[..., "Chat"]]:
    """Opens the page in a browser that has not seen it yet. In the end nothing else was asked, and nothing failed."""
    from .chat import Chat

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
