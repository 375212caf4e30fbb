"""From the engine's thread to the tasks of an event loop: what a step has brought is there to read."""

import asyncio
from collections import defaultdict
from contextlib import suppress


class Bell:
    """Wakes the tasks for which there is something, all at once.

    Each call into an event loop gives up the interpreter: one for each token would hold up the engine.
    """

    def __init__(self) -> None:
        self._due: defaultdict[asyncio.AbstractEventLoop, list[asyncio.Event]] = defaultdict(list)

    def add(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        """Sets an event of an event loop when it rings next."""
        self._due[loop].append(event)

    def ring(self) -> None:
        """Sets the events. Called by the thread that adds them."""
        due, self._due = self._due, defaultdict(list)
        for loop, events in due.items():
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(_set, events)


class Wakeup:
    """What a task of an event loop waits for. It is called by the thread that rings the bell."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._event.set()  # what came before is looked at first
        self._is_pending = True

    def __call__(self) -> None:
        if not self._is_pending:
            self._is_pending = True
            self._bell.add(self._loop, self._event)

    async def wait(self, seconds: float) -> bool:
        """Waits for the bell, if there was anything since the last time. False if nothing came for so long."""
        timer = self._loop.call_later(seconds, self._event.set)  # asyncio.timeout takes twice as long
        try:
            await self._event.wait()
        finally:
            timer.cancel()
        self._event.clear()
        news, self._is_pending = self._is_pending, False
        return news


def _set(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
