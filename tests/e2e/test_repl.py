"""`llamajax chat` on a terminal: a conversation, its commands and keys."""

import json
import os
from pathlib import Path

from llamajax.ops import PAGE_LEN, native

from .command import Reply, Terminal, run


def messages_in(file: Path) -> list[dict[str, str]]:
    return json.loads(file.read_text("utf-8"))["messages"]


def shared(answer: Reply, num_read_ahead: int = 0) -> int:
    """Of a prompt that was read, and of its answer, what the next one that begins so need not read."""
    num_read = int(answer.stats["prompt"] or 0) - 1 + num_read_ahead
    return num_read // PAGE_LEN * PAGE_LEN if native.available() else 0


# The default model holds a conversation.


def test_a_conversation_with_its_commands(default_model: None, tmp_path: Path) -> None:
    file = tmp_path / "conversation.json"
    with Terminal("-n", "24") as terminal:
        assert "/help" in terminal.greeting.notes[-1]

        first = terminal.ask("Tell me a story about a llama.")
        assert first.stats["cached"] is None
        assert first.answer.strip()
        assert first.notes[:-1] == ["(cut off: -n 24)"]

        second = terminal.ask("Who is in it?")
        assert int(second.stats["cached"] or 0) >= shared(first, num_read_ahead=24)
        asked, last = terminal.ask("/stats").notes
        assert asked.startswith("4 messages, ")
        assert last == second.notes[-1]

        again = terminal.ask("/regen")
        assert again.answer != second.answer
        assert int(again.stats["cached"] or 0) == shared(second)
        assert terminal.ask("/stats").notes[0].startswith("4 messages, ")
        third = terminal.ask("/regen")
        assert third.answer not in (again.answer, second.answer)

        assert terminal.note(f"/save {file}") == f"(saved to {file})"
        assert messages_in(file) == [
            {"role": "user", "content": "Tell me a story about a llama."},
            {"role": "assistant", "content": first.answer.removesuffix("\n")},
            {"role": "user", "content": "Who is in it?"},
            {"role": "assistant", "content": third.answer.removesuffix("\n")},
        ]

        assert terminal.note("/clear") == "(forgotten)"
        assert terminal.ask("/stats").notes[0].startswith("0 messages, 0 of 8192 tokens")
        assert terminal.note("/regen") == "nothing was asked yet"
        assert terminal.note(f"/load {file}") == "(4 messages)"
        fourth = terminal.ask("And then?")
        assert int(fourth.stats["prompt"] or 0) > int(second.stats["prompt"] or 0)

        assert terminal.note("/system You are a pirate.") == "(begun again)"
        assert terminal.note("/system") == "You are a pirate."
        pirate = terminal.ask("Tell me a story about a llama.")
        assert int(pirate.stats["prompt"] or 0) < int(second.stats["prompt"] or 0)
        assert pirate.answer != first.answer
        assert terminal.note("/clear") == "(forgotten)"
        assert terminal.note("/system") == "You are a pirate."
        assert terminal.end("/exit\r")[0] == 0


def test_emoji_and_a_context_that_fills_up(default_model: None) -> None:
    with Terminal("--max-seq-len", "160", "-n", "30", "--temperature", "0") as terminal:
        llamas = terminal.ask("Please repeat after me: 🦙🦙🦙🔥").answer
        assert "🦙" in llamas
        assert "\ufffd" not in llamas

        topics = iter(["the sea", "mountains", "rivers", "deserts"])
        while not (told := [note for note in terminal.ask(f"Tell me about {next(topics)}.").notes if "forg" in note]):
            pass
        [rule] = told
        assert rule.startswith("(the context is full, forgotten: ")

        assert "the prompt has 330: shorten the prompt" in terminal.note("word " * 300)
        after = terminal.ask("Tell me more.")
        assert after.answer.strip()
        assert int(after.stats["prompt"] or 0) > 60  # the conversation is what it was before
        assert terminal.end("\x04")[0] == 0


# Keys and mistakes can be seen on a model that babbles.


def test_keys(shallow_model: str, tmp_path: Path) -> None:
    file = tmp_path / "conversation.json"
    endless = ("-n", "5000", "--temperature", "0")
    with Terminal("-m", shallow_model, *endless) as terminal:
        # Ctrl-C stops an answer as it is written, and what is typed meanwhile stays out of it.
        terminal.send("Count to a million.\r")
        begun = terminal.begun()
        terminal.process.send("typed too soon")
        terminal.process.sendintr()
        stopped = terminal.reply()
        assert stopped.notes[0] == "(stopped)"
        assert stopped.stats["reason"] == "cancelled"
        assert 0 < int(stopped.stats["generated"] or 0) < 5000
        assert "typed" not in stopped.answer
        assert stopped.answer.endswith("\n")

        # The conversation is kept.
        terminal.send("And then?\r")
        terminal.begun()
        terminal.process.sendintr()
        assert int(terminal.reply().stats["prompt"] or 0) > int(stopped.stats["prompt"] or 0)
        assert terminal.ask("/stats").notes[0].startswith("4 messages, ")

        # Ctrl-C at the prompt drops the line.
        terminal.send("half a quest\x03")
        assert terminal.reply().notes == ["(Ctrl-D or /exit leaves)"]

        # Alt-Enter, and Enter after a backslash, begin a new line.
        terminal.send("one\\\rtwo 🦙\x1b\rthree\r")
        terminal.begun()
        terminal.process.sendintr()
        terminal.reply()
        assert terminal.note(f"/save {file}") == f"(saved to {file})"
        assert [message["role"] for message in messages_in(file)] == ["user", "assistant"] * 3
        assert messages_in(file)[1]["content"] == (begun + stopped.answer).removesuffix("\n")
        assert messages_in(file)[4]["content"] == "one\ntwo 🦙\nthree"

        # Ctrl-D leaves an empty line only.
        terminal.process.send("x\x04")
        assert terminal.end("\x08\x04")[0] == 0


def test_mistakes_are_told_and_change_nothing(shallow_model: str, tmp_path: Path) -> None:
    contents: dict[str, object] = {
        "list": [1],
        "number": {"messages": 5},
        "text": {"messages": "abc"},
        "empty": {"messages": []},
        "role": {"messages": [{"role": "king", "content": "Hi"}]},
        "content": {"messages": [{"role": "user", "content": 5}]},
    }
    files = {name: json.dumps(content).encode() for name, content in contents.items()}
    files |= {"deep": b"[" * 100_000, "binary": bytes(range(256)), "half": b'{"messages": [{"role'}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with Terminal("-m", shallow_model, "-n", "5") as terminal:
        assert terminal.ask("Hi").stats["generated"] == "5"
        before = terminal.ask("/stats").notes
        assert terminal.note("/foo") == "no such command: /foo (/help lists them)"
        assert "/regen" in terminal.note("/help") and "Ctrl-C" in terminal.note("/help")
        assert terminal.note("/save") == "/save needs a file name"
        assert terminal.note("/load") == "/load needs a file name"
        missing = f"{tmp_path}/none/file"
        assert terminal.note(f"/save {missing}") == f"cannot write {missing}: No such file or directory"
        assert terminal.note(f"/load {missing}") == f"cannot read {missing}: No such file or directory"
        assert "~nobody/file" in terminal.note("/save ~nobody/file")
        assert "~nobody/file" in terminal.note("/load ~nobody/file")
        for name in ("list", "number", "deep", "binary", "half"):
            assert terminal.note(f"/load {tmp_path}/{name}") == f"{tmp_path}/{name} is not a saved conversation"
        assert "a message must have a role and a content" in terminal.note(f"/load {tmp_path}/text")
        assert "at least one message" in terminal.note(f"/load {tmp_path}/empty")
        assert "role must be one of" in terminal.note(f"/load {tmp_path}/role")
        assert "content must be a string" in terminal.note(f"/load {tmp_path}/content")
        assert terminal.ask("  ") == ("", [])
        assert terminal.ask("/stats").notes == before
        # A terminal of another encoding sends bytes that are no UTF-8.
        os.write(terminal.process.child_fd, "Grüße\r".encode("latin-1"))
        terminal.send("")
        assert terminal.reply().stats["generated"] == "5"
        assert terminal.note(f"/save {tmp_path}/saved") == f"(saved to {tmp_path}/saved)"
        assert messages_in(tmp_path / "saved")[-2]["content"] == "Gr??e"
        assert terminal.end("\x04")[0] == 0


def test_leaving_while_programs_are_compiled(shallow_model: str, tmp_path: Path) -> None:
    with Terminal("-m", shallow_model, LLAMAJAX_HOME=str(tmp_path)) as terminal:
        code, written = terminal.end("\x04")
    assert code == 0
    assert "terminate" not in written


def test_what_is_typed_or_pasted_during_an_answer_is_the_next_message(shallow_model: str, tmp_path: Path) -> None:
    pasted = [f"line {number} of a paste" for number in range(300)]
    with Terminal("-m", shallow_model, "-n", "300", "--temperature", "0") as terminal:
        terminal.send("Count.\r")
        terminal.begun()
        terminal.process.send("typed " + "\x1b[200~" + "\r".join(pasted[:100]) + "\x1b[201~")
        answer = terminal.reply().answer
        assert "typed" not in answer and "paste" not in answer
        terminal.send("!\r")
        terminal.reply()
        file = tmp_path / "conversation.json"
        terminal.note(f"/save {file}")
        assert [message["content"] for message in messages_in(file)[::2]] == [
            "Count.",
            "typed " + "\n".join(pasted[:100]) + "!",
        ]


def test_settings_models_and_words_that_leave(shallow_model: str, tmp_path: Path) -> None:
    with Terminal("-m", shallow_model, "-n", "5") as terminal:
        shown = terminal.note("/set").splitlines()
        assert {"temperature 0.6", "top_p 0.9", "n 5", "seed 42", "stop off"} <= set(shown)
        assert terminal.note("/set temperature 0") == "temperature 0.0"
        assert terminal.note("/set --top-p=0.5") == "top_p 0.5"
        assert terminal.note("/set n 7") == "n 7"
        assert terminal.ask("Hi").stats["generated"] == "7"
        assert "temperature must be in [0, 1000000], not -1" in terminal.note("/set temperature -1")
        assert terminal.note("/set n 0") == "n must be an integer of at least 1, not 0"
        assert terminal.note("/set seed x") == "seed must be an integer, not x"
        assert terminal.note("/set heat 1").startswith("no such setting: heat (there are temperature, ")
        assert terminal.note("/set temperature") == "temperature 0.0"
        assert terminal.note("/set stop 'the end' .") == "stop 'the end' ."
        assert terminal.note("/set stop off") == "stop off"

        assert terminal.note("/model") == shallow_model
        assert "no-such" in terminal.note("/model no-such")
        assert terminal.note("/model") == shallow_model
        loaded = terminal.note(f"/model {shallow_model}")
        assert loaded == f"({shallow_model}; 2 messages kept)"
        assert terminal.ask("/stats").notes[0].startswith("2 messages, ")
        assert terminal.end("quit\r")[0] == 0


def test_tab_completes_commands_and_files(shallow_model: str, tmp_path: Path) -> None:
    (tmp_path / "a conversation.json").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    with Terminal("-m", shallow_model, "-n", "5") as terminal:
        for keys, added, says in (
            ("/cl", "ear", "(forgotten)"),
            (f"/load {tmp_path}/a", "conversation.json", "(1 message)"),
            ("/set rep", "etition_penalty", "repetition_penalty 1.0"),
        ):
            terminal.process.send(keys + "\t")
            terminal.process.expect_exact(added)
            assert terminal.note("") == says
        assert terminal.note("/clear") == "(forgotten)"
        assert terminal.note("/save x") == "nothing to save: nothing was said yet"
        assert terminal.end("/bye\r")[0] == 0


def test_edit_opens_the_users_editor(shallow_model: str, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "%s and\\nmore" "$(cat "$1")" > "$1.new" && mv "$1.new" "$1"\n')
    editor.chmod(0o755)
    file = tmp_path / "conversation.json"
    with Terminal("-m", shallow_model, "-n", "5", VISUAL="", EDITOR=str(editor)) as terminal:
        assert terminal.ask("/edit this").notes[0] == "this and\nmore"
        terminal.note(f"/save {file}")
        assert messages_in(file)[0] == {"role": "user", "content": "this and\nmore"}
    with Terminal("-m", shallow_model, VISUAL="false", EDITOR=str(editor)) as terminal:
        assert terminal.ask("/edit").notes == ["the editor 'false' ended with code 1: nothing is sent"]
    with Terminal("-m", shallow_model, VISUAL="/no/editor") as terminal:
        assert terminal.ask("/edit").notes[0].startswith("cannot run the editor '/no/editor'")


def test_continue_goes_on_with_the_last_conversation(shallow_model: str, tmp_path: Path) -> None:
    home = str(tmp_path)
    assert (
        "begin one without --continue" in run("chat", "-m", shallow_model, "-c", "-p", "Hi", LLAMAJAX_HOME=home).error
    )
    with Terminal("-m", shallow_model, "-n", "5", LLAMAJAX_HOME=home) as terminal:
        terminal.ask("One")
        terminal.end("exit\r")
    kept = tmp_path / "conversation.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert messages_in(kept)[0]["content"] == "One"
    done = run("chat", "-m", shallow_model, "-n", "5", "-c", "-p", "Two", LLAMAJAX_HOME=home)
    assert done.code == 0
    assert [message["content"] for message in messages_in(kept)[::2]] == ["One", "Two"]
    assert messages_in(kept)[3]["content"] == done.stdout.removesuffix("\n")
    with Terminal("-m", shallow_model, "-n", "5", "-c", LLAMAJAX_HOME=home) as terminal:
        assert terminal.greeting.notes[-2] == "(going on after 4 messages)"
        assert terminal.ask("/stats").notes[0].startswith("4 messages, ")
