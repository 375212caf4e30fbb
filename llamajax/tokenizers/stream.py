"""Text that arrives token by token: whole characters only, and stop strings cut off.

Knows UTF-8 and string matching. Does not know the engine.
"""

import codecs
from collections.abc import Sequence

from llamajax.tokenizers.base import Tokenizer


class StreamDecoder:
    """Turns ids into text piece by piece; the pieces joined equal `tokenizer.decode` of all ids.

    Args:
      tokenizer: of the ids.
      continues: the text continues a prompt, so a space at its start belongs to it.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_first = not continues

    def push(self, token_id: int) -> str:
        """The characters that this token completes, maybe none. U+FFFD only for bytes that no next one can mend."""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._is_first:
            data = self._tokenizer.first_bytes(token_id)
            self._is_first = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Ends the text: U+FFFD if a character was left unfinished."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Passes text through until the first stop string in it, whichever pieces the text comes in.

    Args:
      stops: not empty strings; of several found, the one that starts first cuts the text.

    Attributes:
      matched: a stop string was found; no more text comes out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched = False
        self._stops = tuple(stops)
        self._held = ""
        self._exempt = 0  # characters of `_held` in which no stop string may end

    def push(self, text: str, *, may_end: bool = True) -> str:
        """The text that no stop string can claim any more; what could still begin one is held back.

        A stop string that is whole before the end of a piece that may not end the text does not count.
        """
        if self.matched:
            return ""
        self._held += text
        if not may_end:
            self._exempt = len(self._held)
        match, partial = self._first_match(), self._first_partial()
        self.matched = match <= partial and match < len(self._held)
        end = min(match, partial)
        safe, self._held = self._held[:end], self._held[end:]
        self._exempt = max(0, self._exempt - end)
        return safe

    def flush(self) -> str:
        """Ends the text: what was held back, up to a stop string in it."""
        end = self._first_match()
        self.matched = self.matched or end < len(self._held)
        held, self._held = self._held[:end], ""
        return held

    def _first_match(self) -> int:
        """Where the first whole stop string begins in the held text; its length if there is none."""
        found = (self._held.find(stop, max(0, self._exempt + 1 - len(stop))) for stop in self._stops)
        return min((start for start in found if start >= 0), default=len(self._held))

    def _first_partial(self) -> int:
        """Where the longest suffix that could begin a stop string begins; the text's length if there is none."""
        longest = max(map(len, self._stops), default=1) - 1
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)
