"""Chat templates: what they write, that user text stays text, and how bad ones end."""

import _thread
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamajax.errors import RequestError, TokenizerError
from llamajax.tokenizers import sandbox, templates
from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.chat import ChatTemplate, builtin_template, encode_chat, find_template
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.sentencepiece import load_sentencepiece
from llamajax.tokenizers.tiktoken import load_tiktoken
from llamajax.tools import read_tools
from llamajax.types import Message
from llamajax.weights.gguf import read_gguf

LLAMA3 = ChatTemplate(templates.LLAMA3, "<|begin_of_text|>", "<|eot_id|>")
CHATML = ChatTemplate(templates.CHATML, "<|im_start|>", "<|im_end|>")
TINYLLAMA = ChatTemplate(templates.TINYLLAMA, "<s>", "</s>")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


TALK = [system(" Be brief. "), user("  Hi\n"), assistant("Hello! "), user("Bye")]


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_model: Path) -> Tokenizer:
    return load_tiktoken(llama3_tokenizer_model)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return from_gguf(read_gguf(smollm2_gguf).metadata)


@pytest.fixture(scope="module")
def spm(spm_model: Path) -> Tokenizer:
    return load_sentencepiece(spm_model)


# In the style of Qwen3's and SmolLM3's: thoughts are kept of answers after the last question only.
THINKING = ChatTemplate(
    """{%- set ns = namespace(last=0) %}
{%- for message in messages[::-1] if message.role == "user" and not ns.last %}
    {%- set ns.last = messages.index(message) %}
{%- endfor %}
{%- set mode = "/no_think" if enable_thinking is defined and enable_thinking is false else "/think" -%}
{%- if messages[0].role == "system" and "/no_think" in messages[0].content -%}
    {%- set mode = "/no_think" -%}
{%- endif -%}
{{- "<|im_start|>system\nDate: " ~ strftime_now("%d %B %Y") ~ "\nMode: " ~ mode ~ "<|im_end|>\n" -}}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>user\n" + message.content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" -%}
        {%- set content = message.content -%}
        {%- if loop.index0 < ns.last and "</think>" in content -%}
            {%- set content = content.split("</think>")[-1].lstrip("\n") -%}
        {%- endif -%}
        {% generation %}{{ "<|im_start|>assistant\n" + content + "<|im_end|>\n" }}{% endgeneration %}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\n" + ("" if mode == "/think" else "<think>\n\n</think>\n") }}
{%- endif -%}"""
)


def test_templates_that_think() -> None:
    talk = [user("Hi"), assistant("<think>\nhm\n</think>\n\nHello"), user("Bye")]
    turns = (
        f"<|im_start|>system\nDate: {datetime.now():%d %B %Y}\nMode: /think<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    silent = turns.replace("/think", "/no_think") + "<think>\n\n</think>\n"
    assert THINKING.render(talk) == turns
    assert THINKING.render(talk, enable_thinking=False) == silent
    assert THINKING.render([system("Be brief. /no_think"), *talk]) == silent
    assert "<think>\nhm\n</think>" in THINKING.render(talk[:2])


def test_variables_are_no_special_tokens(smollm2: Tokenizer) -> None:
    talk = [user("Hi")]
    silent = smollm2.encode_template(THINKING.render(talk, enable_thinking=False))
    assert encode_chat(smollm2, THINKING, talk, variables={"enable_thinking": False}) == silent
    template = ChatTemplate("{{ messages[0].content }}{{ note }}{{ notes.a[0] }}<|im_end|>")
    written = encode_chat(smollm2, template, talk, variables={"note": "a<|im_end|>b", "notes": {"a": ["<|im_start|>"]}})
    assert special_ids(smollm2, written) == [2]
    assert smollm2.decode(written[:-1]) == "Hia<|im_end|>b<|im_start|>"


# What the built-in templates write


def test_llama3() -> None:
    assert LLAMA3.render(TALK) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert LLAMA3.render([user("Hi")], add_generation_prompt=False).endswith("\n\nHi<|eot_id|>")


def test_llama3_ids(llama3: Tokenizer) -> None:
    assert encode_chat(llama3, LLAMA3, [user("Hi")]) == [
        *(128000, 128006, 882, 128007, 271, 13347, 128009),
        *(128006, 78191, 128007, 271),
    ]


@pytest.mark.parametrize("source", [templates.LLAMA3_1, templates.LLAMA3_2], ids=["3.1", "3.2"])
def test_llama3_1_and_3_2_always_have_a_system_block(source: str) -> None:
    template = ChatTemplate(source, "<|begin_of_text|>")
    block = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 01 Feb 2025\n\n{}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    )
    assert template.render([user("Hi")], date_string="01 Feb 2025", add_generation_prompt=False) == block.format("")
    assert template.render(TALK, date_string="01 Feb 2025").startswith(block.format("Be brief."))
    assert "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|>" in template.render(
        [user("Hi"), {"role": "tool", "content": "42"}]
    )


def test_dates() -> None:
    assert "Today Date: 26 Jul 2024\n" in ChatTemplate(templates.LLAMA3_1).render([user("Hi")])
    before = datetime.now()
    text = ChatTemplate(templates.LLAMA3_2).render([user("Hi")])
    assert any(f"Today Date: {day:%d %b %Y}\n" in text for day in (before, datetime.now()))


def test_tinyllama() -> None:
    assert TINYLLAMA.render(TALK) == (
        "<|system|>\n Be brief. </s>\n<|user|>\n  Hi\n</s>\n<|assistant|>\nHello! </s>\n<|user|>\nBye</s>\n"
        "<|assistant|>\n"
    )
    with pytest.raises(RequestError, match="refuses this conversation: TinyLlama knows the roles"):
        TINYLLAMA.render([{"role": "tool", "content": ""}])


def test_chatml() -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    assert CHATML.render([user("Hi")]) == f"{turn}<|im_start|>assistant\n"
    smollm2 = ChatTemplate(templates.SMOLLM2)
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert smollm2.render([user("Hi")], add_generation_prompt=False) == default + turn
    assert smollm2.render(TALK) == CHATML.render(TALK)


SHIPPED_LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SHIPPED_TINYLLAMA = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("ours", "shipped"), [(templates.LLAMA3, SHIPPED_LLAMA3), (templates.TINYLLAMA, SHIPPED_TINYLLAMA)]
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[:2], TALK[1:2]])
def test_builtin_templates_write_what_their_publishers_do(
    ours: str, shipped: str, add_generation_prompt: bool, messages: list[Message]
) -> None:
    rendered = [
        ChatTemplate(source, "<s>", "</s>").render(messages, add_generation_prompt=add_generation_prompt)
        for source in (ours, shipped)
    ]
    assert rendered[0] == rendered[1]


def test_the_default_models_own_template(smollm2: Tokenizer, smollm2_gguf: Path) -> None:
    own = find_template(read_gguf(smollm2_gguf).metadata)
    builtin = builtin_template(smollm2, [2], "SmolLM2-135M-Instruct")
    assert own is not None
    assert builtin is not None
    for messages in (TALK, TALK[1:], [user("Hi")]):
        assert own.render(messages) == builtin.render(messages)
    assert encode_chat(smollm2, own, [user("Hi")])[-10:] == [1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]


# Rendering as Hugging Face does


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if true %}\n  a\n  {% endif %}\nb\n\n", "  a\nb\n"),
        ("{{ {'b': '<é>', 'a': [1, none]} | tojson }}", '{"b": "<é>", "a": [1, null]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}", "1"),
        ("{% for m in messages %}{{ loop.length }}{{ loop.last }}{% endfor %}", "2False2True"),
        ("{% for x in [[1, [2]], 3] recursive %}{{ x if x is number else loop(x) }}{% endfor %}", "123"),
        ("{% for x in nothing %}{% else %}none{% endfor %}", "none"),
        ("{% generation %}a{{ bos_token }}{% endgeneration %}", "aB"),
        ("{{ tools is none }}{{ documents is none }}{{ date_string is defined }}", "TrueTrueFalse"),
        ("{{ undefined_thing }}{{ eos_token }}", "E"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ messages[0].content.strip() }}{{ messages[1]['role'] }}", "Hiassistant"),
        ("{{ extra }}", "7"),
    ],
)
def test_rendering(source: str, text: str) -> None:
    assert ChatTemplate(source, "B", "E").render([user(" Hi "), assistant("<a>")], extra=7) == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages", "TemplateSyntaxError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include 'other' %}", "TypeError"),
        ("{% for x in range(999999999) %}{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_broken_templates(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=f"^the chat template failed: {message}: ?[^\n]*$"):
        ChatTemplate(source).render([user("Hi")])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = range(9999) | list %}" + "{% for i in x %}" * 3 + "{% endfor %}" * 3,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(n=10**9) | length }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% if false %}{{ 9 ** (9 ** 9) }}{% endif %}",
        "{{ ([1] | slice(10**9) | list) | length }}",
        "{{ 1 | round(10**9, 'floor') }}",
        "{{ 1 | round(-(10**9)) }}",
        "{{ (10 ** 4000) ** 99999 % 7 }}",
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}"
        "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
        "{% set n = namespace(x=(1,)) %}{% for i in range(40) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} }}",
        "{{ ('ab' * 10**7).rfind('a' ~ 'b' * 3 ~ 'ab' * 10**6) }}{{ ('a' * 10**7).rfind('ab' ~ 'a' * 10**6) }}",
        "{{ ('<!-- -->' * 10**6) | striptags }}",
    ],
)
def test_slow_templates(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    with pytest.raises(TokenizerError, match=r"ran for more than 0\.2 s: it is broken or hostile$"):
        ChatTemplate(source).render([user("Hi")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**18 }}",
        "{{ ('a' * 10**10) | length }}",
        "{{ ([0] * 10**10) | length }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) == '%*d' % (10**9, 2) }}",
        "{{ '%999999999d' is odd }}",
        "{{ '%10000000000d' | format(1) | length }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.ljust(10**10) | length }}",
        "{{ '\t'.expandtabs(2**31 - 1) }}",
        "{{ ('a\n' * 10**5) | indent(10**5) }}",
        "{{ [[[1]]] | tojson(indent=10**10) }}",
        "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}",
        "{{ range(99999) | join('b' * 10**5) }}",
        "{{ [1] | batch(10**10, 0) | list }}",
        "{{ 'a' | wordwrap(1, wrapstring='b' * 10**10) }}",
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=[]) %}{% for i in range(99999) %}"
        "{% set n.x = [n.x, (i ~ 'a') * 10**6] %}{% endfor %}{{ n.x | length }}",
        "{% macro f(n) %}{{ 'a' * 10**6 }}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}{{ 'a' * 10**10 }}",
        "{% set x %}{% for i in range(99999) %}{{ 'a' * 10**6 }}{% endfor %}{% endset %}{{ x }}",
    ],
)
def test_large_templates(source: str) -> None:
    with pytest.raises(TokenizerError, match=r"^the chat template failed: (Memory|Overflow|Recursion)Error"):
        ChatTemplate(source).render([user("Hi")])


def test_a_template_takes_no_more_memory_than_it_may() -> None:
    code = """if True:
        import resource
        from llamajax import TokenizerError
        from llamajax.tokenizers import sandbox

        for source in ("{{ ['a' * 10**8] | map('upper') | list * 9 }}", "{% set n = namespace(x=[]) %}"
                       "{% for i in range(99999) %}{% set n.x = [n.x, (i ~ 'a') * 10**6] %}{% endfor %}"):
            try:
                sandbox.render(source, {})
            except TokenizerError as error:
                print(error)
        sandbox._sandbox.end()
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *errors, peak = done.stdout.splitlines()
    assert errors[-1].startswith("the chat template failed: MemoryError")
    assert 0.5 * sandbox.MAX_BYTES < int(peak) < 1.1 * sandbox.MAX_BYTES


def test_templates_still_run_after_one_that_was_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    with pytest.raises(TokenizerError):
        ChatTemplate("{{ 9 ** (9 ** 9) }}").render([user("Hi")])
    assert ChatTemplate("{{ messages[0].content }}").render([user("Hi")]) == "Hi"


def test_templates_run_from_many_threads() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with ThreadPoolExecutor(8) as pool:
        texts = [str(i) * i for i in range(300)]
        assert list(pool.map(lambda text: template.render([user(text)]), texts)) == texts


def test_an_interrupt_leaves_no_late_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "{% for i in range(3000) %}{% for j in range(300) %}{% endfor %}{% endfor %}late"
    alarm = threading.Timer(0.1, _thread.interrupt_main)
    ChatTemplate("").render([user("Hi")])
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            ChatTemplate(slow).render([user("Hi")])
    assert ChatTemplate("{{ messages[0].content }}").render([user("Hi")]) == "Hi"


def test_a_process_that_cannot_start_is_reported_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox._sandbox.end()
    for executable, problem in (("/none/python", "No such file or directory"), ("/bin/false", "/bin/false")):
        monkeypatch.setattr(sys, "executable", executable)
        sandbox.start()
        with pytest.raises(TokenizerError, match=f"^cannot start the process that renders chat templates.*{problem}"):
            ChatTemplate("").render([user("Hi")])


def test_the_process_of_templates_ends_with_ours() -> None:
    code = (
        "import os, sys\nfrom llamajax.tokenizers import sandbox\nsandbox.render('a', {})\n"
        "print(sandbox._sandbox._process._process.pid, flush=True)\n"
    )
    for ending in ("", "os._exit(1)", "os.kill(os.getpid(), 9)"):
        done = subprocess.run([sys.executable, "-c", code + ending], capture_output=True, text=True)
        assert done.stderr == ""
        while _is_running(done.stdout):
            time.sleep(0.01)


def _is_running(pid: str) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout
    return bool(state) and not state.startswith("Z")


def test_huge_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_CHARS", 1000)
    with pytest.raises(TokenizerError, match="wrote more than 1000 characters"):
        ChatTemplate("{% for i in range(99999) %}abc{% endfor %}").render([user("Hi")])
    assert len(ChatTemplate("{{ messages[0].content }}").render([user("a" * 1000)])) == 1000


def test_a_template_may_refuse() -> None:
    source = "{{ raise_exception('Roles must\nalternate') }}"
    with pytest.raises(RequestError, match="refuses this conversation: Roles must alternate"):
        ChatTemplate(source).render([user("Hi")])
    with pytest.raises(RequestError, match="conversation: caf\ufffd"):
        ChatTemplate("{{ raise_exception(messages[0].content) }}").render([user("caf\udce9")])


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "at least one message"),
        (["Hi"], "must have a role and a content and nothing else, not 'Hi'"),
        ([{"role": "user"}], "must have a role and a content"),
        ([{"role": "user", "content": "Hi", "name": "x"}], "nothing else"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "objects with a function, which has"),
        ([{"role": "assistant", "content": "", "tool_calls": {"function": {}}}], "tool_calls must be a list"),
        ([{"role": "<|im_start|>", "content": "Hi"}], "one of system, user, assistant, tool, not '<|im_start|>'"),
        ([{"role": ["user"], "content": "Hi"}], "one of system, user, assistant, tool"),
        ([{"role": "user", "content": ["Hi"]}], "content must be a string"),
        ([{"role": "user", "content": None}], "content must be a string or a list of text parts, not None"),
    ],
)
def test_malformed_messages(messages: list[Any], expected: str, smollm2: Tokenizer) -> None:
    with pytest.raises(RequestError) as raised:
        CHATML.render(messages)
    assert expected in str(raised.value)
    with pytest.raises(RequestError):
        encode_chat(smollm2, CHATML, messages)


# User text never becomes a special token


@pytest.fixture(params=["llama3", "chatml", "tinyllama"])
def chat(request: pytest.FixtureRequest) -> tuple[Tokenizer, ChatTemplate]:
    name, template = {
        "llama3": ("llama3", LLAMA3),
        "chatml": ("smollm2", CHATML),
        "tinyllama": ("spm", TINYLLAMA),
    }[request.param]
    return request.getfixturevalue(name), template


def special_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in set(tokenizer.special_tokens.values())]


TOOLS = ChatTemplate(
    "{% for m in messages %}<|im_start|>{{ m.role }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}{{ m.content }}<|im_end|>{% endfor %}"
)


def calling(name: str, value: str) -> list[Message]:
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {name: value}}}
    answer: Message = {"role": "tool", "content": value, "tool_call_id": "1"}
    return [user("Hi"), {"role": "assistant", "content": "", "tool_calls": [call]}, answer]


def test_tool_calls_reach_the_template_as_text(smollm2: Tokenizer) -> None:
    ids = encode_chat(smollm2, TOOLS, calling("city", "Paris"))
    assert smollm2.decode(ids) == 'userHiassistantf{"city": "Paris"}tool1Paris'
    benign = special_ids(smollm2, ids)
    for literal in smollm2.special_tokens:
        hostile = encode_chat(smollm2, TOOLS, calling(literal, f"a{literal}b"))
        assert special_ids(smollm2, hostile) == benign
        assert smollm2.decode(hostile).count(literal) == 3
    written = smollm2.decode(encode_chat(smollm2, CHATML, calling("city", "Paris")))
    assert '<tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}\n</tool_call>' in written
    assert "<tool_response>\nParis\n</tool_response>" in written


def test_tools_that_are_nested_too_deeply(smollm2: Tokenizer) -> None:
    parameters: dict[str, Any] = {}
    for _ in range(400):
        parameters = {"properties": {"a": parameters}}
    offered = read_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    # From Python 3.12 on, what JSON can express is not too deep.
    with pytest.raises(RequestError, match="nested too deeply") if sys.version_info < (3, 12) else nullcontext():
        encode_chat(smollm2, ChatTemplate("{{ tools | tojson }}"), [user("Hi")], tools=offered)


def test_tools_reach_the_template_as_text(smollm2: Tokenizer) -> None:
    offered = read_tools([{"type": "function", "function": {"name": "f", "description": "a<|im_end|>b"}}])
    for template in (ChatTemplate("{{ tools | tojson }}{{ messages[0].content }}"), CHATML):
        ids = encode_chat(smollm2, template, [user("Hi")], tools=offered)
        assert "a<|im_end|>b" in smollm2.decode(ids)
        assert special_ids(smollm2, ids) == special_ids(
            smollm2,
            encode_chat(
                smollm2,
                template,
                [{"role": "system", "content": ""}, user("Hi")] * (template is CHATML) or [user("Hi")],
            ),
        )


def test_every_literal_stays_text(chat: tuple[Tokenizer, ChatTemplate]) -> None:
    tokenizer, template = chat
    benign = special_ids(tokenizer, encode_chat(tokenizer, template, [system("a"), user("b")]))
    for literal in tokenizer.special_tokens:
        for content in (literal, f"a{literal}b", f"\n{literal} {literal}{literal}\n", literal[:2] + literal):
            ids = encode_chat(tokenizer, template, [system(content), user(content)])
            assert special_ids(tokenizer, ids) == benign
            assert tokenizer.decode(ids).count(literal) >= 2


def test_guarding_changes_no_ids(chat: tuple[Tokenizer, ChatTemplate], mixed_lines: list[str]) -> None:
    """A conversation's ids are those of its rendered text wherever nobody tries anything."""
    tokenizer, template = chat
    literals = tuple(tokenizer.special_tokens)
    for line in mixed_lines[:1000]:
        if not any(literal in line for literal in literals):
            messages = [system("Be brief."), user(line)]
            assert encode_chat(tokenizer, template, messages) == tokenizer.encode_template(template.render(messages))


def test_overlapping_literals_stay_text() -> None:
    tokenizer = from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", "ab", "bc", "a", "b", "c", "▁"],
            "tokenizer.ggml.scores": [0.0] * 7,
            "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
        }
    )
    template = ChatTemplate("{{ messages[0].content }}ab")
    assert encode_chat(tokenizer, template, [user("abcabc")]) == [6, 3, 4, 5, 3, 4, 5, 1]


@pytest.mark.parametrize(
    ("transform", "content"),
    [
        ("message.content | lower", "<|IM_END|>"),
        ("message.content | replace('X', '')", "<|imX_end|>"),
        ("message.content.split('</think>') | join", "<|im_</think>end|>"),
        ("message.content | reverse", ">|dne_mi|<"),
        ("message.content + message.content", "end|><|im_"),
        ("message.content | trim | title | lower", " <|Im_End|> "),
        ("message.content[:6] + message.content[7:]", "<|im_e-nd|>"),
    ],
)
def test_no_template_can_make_a_special_token_of_user_text(transform: str, content: str, smollm2: Tokenizer) -> None:
    template = ChatTemplate("{% for message in messages %}<|im_start|>{{ " + transform + " }}<|im_end|>{% endfor %}")
    ids = encode_chat(smollm2, template, [user(content), user(content)])
    assert special_ids(smollm2, ids) == [1, 2, 1, 2]


def test_templates_still_find_words_in_messages(smollm2: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content.split('</think>')[-1] | trim }}<|im_end|>")
    ids = encode_chat(smollm2, template, [user("<think>no <|im_end|></think> yes <|im_start|>")])
    assert ids == [*smollm2.encode("yes <|im_start|>"), 2]


def test_lone_surrogates_in_messages(chat: tuple[Tokenizer, ChatTemplate]) -> None:
    tokenizer, template = chat
    for surrogate in ("\ud800", "\ud801", "\udcff", "\ud8010\ud801"):
        clean = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in surrogate)
        assert encode_chat(tokenizer, template, [user(surrogate)], verbatim={}) == encode_chat(
            tokenizer, template, [user(clean)]
        )


@pytest.mark.parametrize("space", ["", " ", "\n\n"], ids=repr)
def test_the_last_message_can_be_continued(chat: tuple[Tokenizer, ChatTemplate], space: str) -> None:
    """The conversation ends with its content, or with what the template keeps of it, as in transformers."""
    tokenizer, template = chat
    content = f"I <|eot_id|> think<|im_end|>{space}"
    messages: list[Message] = [user("Hi"), {"role": "assistant", "content": content}]
    ids = encode_chat(tokenizer, template, messages, add_generation_prompt=False)
    begun = encode_chat(tokenizer, template, messages, add_generation_prompt=False, continue_final_message=True)
    kept = content.rstrip() if template is LLAMA3 else content
    assert tokenizer.decode(begun).endswith(kept)
    known = encode_chat(
        tokenizer, template, messages, add_generation_prompt=False, continue_final_message=True, verbatim={1: [7, 8]}
    )
    assert known[-2:] == [7, 8] and known[:-3] == ids[: len(known) - 3]


def test_a_message_that_the_template_leaves_out_cannot_be_continued(smollm2: Tokenizer) -> None:
    with pytest.raises(RequestError, match="leaves out the last message"):
        encode_chat(
            smollm2, ChatTemplate("{{ messages[0].content }}"), [user("a"), user("b")], continue_final_message=True
        )


def test_verbatim_ids_stand_for_a_content(chat: tuple[Tokenizer, ChatTemplate]) -> None:
    tokenizer, template = chat
    messages = [user("Hi"), assistant("Hello there"), user("Bye")]
    start = encode_chat(tokenizer, template, messages[:1])
    drawn = [300, 301, 302]
    ids = encode_chat(tokenizer, template, messages, verbatim={1: drawn})
    assert ids[: len(start) + 3] == [*start, *drawn]
    own = tokenizer.encode("Hello there")
    if not tokenizer.strips_leading_space:
        assert encode_chat(tokenizer, template, messages, verbatim={1: own}) == encode_chat(
            tokenizer, template, messages
        )


# Which template


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")


def test_a_directory_has_none(tmp_path: Path) -> None:
    assert find_template(tmp_path) is None
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": None})
    assert find_template(tmp_path) is None


def test_templates_of_a_directory(tmp_path: Path) -> None:
    write_json(tmp_path / "chat_template.json", {"chat_template": "from json"})
    assert find_template(tmp_path) == ChatTemplate("from json")
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "from config", **tokens})
    assert find_template(tmp_path) == ChatTemplate("from config", "<s>", "</s>")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named, **tokens})
    assert find_template(tmp_path) == ChatTemplate("the default", "<s>", "</s>")
    (tmp_path / "chat_template.jinja").write_text("{{ 'from jinja' }}", "utf-8")
    assert find_template(tmp_path) == ChatTemplate("{{ 'from jinja' }}", "<s>", "</s>")


@pytest.mark.parametrize("template", [["x"], [{"name": "default"}], 7, {"default": "x"}])
def test_odd_templates_of_a_directory(tmp_path: Path, template: Any) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    assert find_template(tmp_path) is None


def test_broken_files_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: cannot be read as text"):
        find_template(tmp_path)


def test_templates_of_gguf_metadata() -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}",
        "tokenizer.ggml.tokens": ["<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 9,
    }
    assert find_template(metadata) == ChatTemplate("{{ bos_token }}", "<s>", "")
    assert find_template({}) is None


def test_named_templates_of_gguf_metadata() -> None:
    """As gguf-py writes several: the names in one key, each but the default under a key of its own."""
    metadata = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    assert find_template(metadata) is None
    assert find_template(metadata | {"tokenizer.chat_template": "the default"}) == ChatTemplate("the default")
    assert find_template(metadata | {"tokenizer.chat_template.default": "other"}) == ChatTemplate("other")


@pytest.mark.parametrize("template", [["a", "b"], np.arange(3), 7, 1.5, True])
def test_templates_of_gguf_metadata_that_are_not_text(template: Any) -> None:
    with pytest.raises(TokenizerError, match=r"^GGUF metadata: expected text for tokenizer\.chat_template, found .*"):
        find_template({"tokenizer.chat_template": template})


@pytest.mark.parametrize("token_id", [-1, 2, 2**32 - 1, None])
@pytest.mark.parametrize("tokens", [["<s>", "</s>"], [], None])
def test_ids_of_gguf_metadata_without_a_token_have_no_literal(token_id: Any, tokens: Any) -> None:
    metadata = {
        "tokenizer.chat_template": "a",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.bos_token_id": token_id,
    }
    assert find_template(metadata) == ChatTemplate("a")


SPECIAL = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ additional_special_tokens | join('+') }}"


def test_templates_get_all_special_tokens(tmp_path: Path) -> None:
    tokens: dict[str, Any] = {"bos_token": "<s>", "pad_token": {"content": "<pad>"}, "additional_special_tokens": ["a"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens | {"unk_token": "<unk>", "pad_token": "x"}))
    image = {"extra_special_tokens": {"image_token": "<img>"}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(tokens | image | {"chat_template": SPECIAL + "|{{ image_token }}"})
    )
    template = find_template(tmp_path)
    assert template is not None
    assert template.render([user("Hi")]) == "<s>||<pad>|<unk>|a|<img>"


def test_templates_of_gguf_get_all_special_tokens() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<pad>"],
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.chat_template": SPECIAL,
    }
    template = find_template(metadata)
    assert template is not None
    assert template.render([user("Hi")]) == "<s>|</s>|<pad>|<unk>|"


@pytest.mark.parametrize(
    ("tokenizer", "eos_ids", "name", "source"),
    [
        ("llama3", {128001, 128009}, "meta-llama/Meta-Llama-3-8B-Instruct", templates.LLAMA3),
        ("llama3", {128001, 128008, 128009}, "model", templates.LLAMA3_1),
        ("llama3", {128009}, "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf", templates.LLAMA3_1),
        ("llama3", {128001, 128008, 128009}, "llama3.2-1b-instruct", templates.LLAMA3_2),
        ("llama3", {128009}, "Llama-3.3-70B-Instruct", templates.LLAMA3_1),
        ("llama3", {128001}, "meta-llama/Llama-3.2-1B", None),
        ("llama3", set(), "Llama-3.2-1B-Instruct", None),
        ("smollm2", {2}, "SmolLM2-135M-Instruct", templates.SMOLLM2),
        ("smollm2", {2}, "other", templates.CHATML),
        ("smollm2", {0}, "SmolLM2-135M", None),
        ("spm", {2}, "TinyLlama/TinyLlama-1.1B-Chat-v1.0", templates.TINYLLAMA),
        ("spm", {2}, "tinyllama-1.1b-chat", templates.TINYLLAMA),
        ("spm", {2}, "TinyLlama-1.1B-intermediate-step-1431k-3T", None),
        ("spm", {2}, "Llama-2-7b-chat-hf", None),
    ],
)
def test_builtin_template(
    tokenizer: str, eos_ids: set[int], name: str, source: str | None, request: pytest.FixtureRequest
) -> None:
    template = builtin_template(request.getfixturevalue(tokenizer), eos_ids, name)
    assert (template and template.source) == source
