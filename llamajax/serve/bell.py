"""From the engine's thread to the tasks of an event loop: what a step has brought is there to read."""

import asyncio
import time
from collections import defaultdict
from contextlib import suppress

# To send a part of a stream takes about 0.1 ms of a core, however long the part is, and the kernels use all cores.
# So the more streams there are, the longer and the rarer are their parts.
SECONDS_PER_STREAM = 0.006
# A stream's next part waits no longer than this.
MOST_SECONDS = 0.25

_Events = defaultdict[asyncio.AbstractEventLoop, list[asyncio.Event]]


class Bell:
    """Wakes the tasks for which there is something, many at once.

    Each call into an event loop gives up the interpreter: one for each token would hold up the engine.
    """

    def __init__(self) -> None:
        self._due, self._urgent = _Events(list), _Events(list)
        self._next = 0.0  # when parts that are not urgent may be sent again

    def add(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event, *, urgent: bool) -> None:
        """Sets an event of an event loop when it rings next; if that is not urgent, maybe a little later."""
        (self._urgent if urgent else self._due)[loop].append(event)

    def ring(self) -> None:
        """Sets the events. Called by the thread that adds them."""
        _set_all(self._urgent, 0)
        if num_streams := sum(map(len, self._due.values())):
            now = time.monotonic()
            at = min(max(now, self._next), now + MOST_SECONDS)
            self._next = at + min(num_streams * SECONDS_PER_STREAM, MOST_SECONDS)
            _set_all(self._due, at - now)


class Wakeup:
    """What a task of an event loop waits for. It is called by the thread that rings the bell.

    Args:
      only_ends: whether it waits for ends alone.
    """

    def __init__(self, bell: Bell, *, only_ends: bool = False) -> None:
        self._bell = bell
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._event.set()  # the first `wait` returns if anything came before it
        self._is_pending = True
        self._has_begun = False
        self._only_ends = only_ends

    def __call__(self, ended: bool) -> None:
        """There is more to read, or the answer has `ended`. The first part and the end are urgent."""
        urgent = ended or not self._has_begun
        if (urgent or not self._is_pending) and (ended or not self._only_ends):
            self._has_begun = self._is_pending = True
            self._bell.add(self._loop, self._event, urgent=urgent)

    async def wait(self, seconds: float) -> bool:
        """Waits for the bell, if there was anything since the last time. False if nothing came for so long."""
        until = self._loop.time() + seconds
        timer = self._loop.call_at(until, self._event.set)  # asyncio.timeout takes twice as long
        try:
            while True:
                await self._event.wait()
                self._event.clear()
                # A later ring may be for pieces that were taken together with an urgent one.
                if self._is_pending or self._loop.time() >= until:
                    break
        finally:
            timer.cancel()
        news, self._is_pending = self._is_pending, False
        return news


def _set_all(due: _Events, seconds: float) -> None:
    """Sets them after so long."""
    for loop, events in due.items():
        with suppress(RuntimeError):  # the loop was closed
            if seconds:
                loop.call_soon_threadsafe(loop.call_later, seconds, _set, events)
            else:
                loop.call_soon_threadsafe(_set, events)
    due.clear()


def _set(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
