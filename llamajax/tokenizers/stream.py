"""Text that arrives token by token: whole characters only, and stop strings cut off.

Knows UTF-8 and string matching. Does not know the engine.
"""

import codecs
from collections.abc import Sequence

from llamajax.errors import RequestError
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
        self._strips = tokenizer.strips_leading_space and not continues

    def push(self, token_id: int) -> str:
        """The characters that this token completes, maybe none. U+FFFD only for bytes that no next one can mend."""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._strips:
            data = data.removeprefix(b" ")
            self._strips = False
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

    Raises:
      RequestError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(isinstance(stop, str) for stop in stops):
            raise RequestError(f"stop must be one string or several, not {stops!r}")
        if not all(stops):
            raise RequestError("a stop string must not be empty")
        self.matched = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that no stop string can claim any more; what could still begin one is held back."""
        if self.matched:
            return ""
        self._held += text
        match, partial = self._first_match(), self._first_partial()
        self.matched = match <= partial and match < len(self._held)
        end = min(match, partial)
        safe, self._held = self._held[:end], self._held[end:]
        return safe

    def flush(self) -> str:
        """Ends the text: what was held back, up to a stop string in it."""
        end = self._first_match()
        self.matched = self.matched or end < len(self._held)
        held, self._held = self._held[:end], ""
        return held

    def _first_match(self) -> int:
        """Where the first whole stop string begins in the held text; its length if there is none."""
        found = (self._held.find(stop) for stop in self._stops)
        return min((start for start in found if start >= 0), default=len(self._held))

    def _first_partial(self) -> int:
        """Where the longest suffix that could begin a stop string begins; the text's length if there is none."""
        longest = max(map(len, self._stops), default=1) - 1
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)
