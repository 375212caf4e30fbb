"""Makes the pictures of README and docs/: a conversation, and the speed of the strategies on this machine.

    pip install '.[dev,plot]'
    python -m scripts.make_pictures

The conversation is a real one, with `llamajax chat` on a terminal.
"""

import io
import re
import subprocess
import textwrap
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.e2e.command import COMMAND, Reply, Terminal

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
COLUMNS = 96
OPTIONS = ("-n", "80")
QUESTIONS = ("How many helicopters can a human eat in one sitting?", "/regen", "Write a haiku about the sea.", "/stats")
BENCH = ("bench", "--requests", "32", "--temperature", "0", "--repeat", "3", "--plot", str(PICTURES / "speed.svg"))


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    talk()  # its programs are compiled then
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for typed, reply in talk():
        console.print(Text(typed, "bold"))
        for line in reply.answer.strip().splitlines():
            console.print(Text(textwrap.fill(line, COLUMNS)))
        for line in reply.notes:
            console.print(Text(line, "dim"))
    svg = console.export_svg(title="llamajax chat", unique_id="chat")
    # The pages ask no other site for anything, fonts neither.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (PICTURES / "chat.svg").write_text(picture)
    subprocess.run([COMMAND, *BENCH], check=True)


def talk() -> list[tuple[str, Reply]]:
    """What is typed, and what comes of it."""
    with Terminal(*OPTIONS) as terminal:
        asked = [(f"$ llamajax chat {' '.join(OPTIONS)}", Reply("", terminal.greeting.notes))]
        return asked + [(f"> {question}", terminal.ask(question)) for question in QUESTIONS]


if __name__ == "__main__":
    main()
