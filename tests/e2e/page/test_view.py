"""What the page looks like, to eyes and to screen readers, and what it does with what a model writes."""

import re

from .chat import LONG, Open, expect

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


def test_the_reader_is_not_taken_to_the_end(open_page: Open) -> None:
    chat = open_page(viewport={"width": 900, "height": 500})
    chat.keep("word\n\n" * 100)
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
    chat.keep(wide)
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
    chat.keep(HOSTILE)
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


def test_markdown_that_nests_too_deeply_is_shown_as_it_is(open_page: Open) -> None:
    chat = open_page()
    chat.keep(">" * 8000)
    assert chat.answers.locator("code").inner_text().count(">") == 8000


def test_code_is_copied(open_page: Open) -> None:
    chat = open_page(permissions=["clipboard-read", "clipboard-write"])
    chat.keep("Look:\n\n```python\nif 1 < 2:\n    print('<b>')\n```\n")
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
