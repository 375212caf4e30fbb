"""From the engine's thread to an event loop: nobody is woken before a step is done, and then many at once."""

import asyncio
from functools import partial
from threading import Thread

import pytest

from llamajax.serve import bell as bell_module
from llamajax.serve.bell import Bell, Wakeup


def _in_thread(*calls: object) -> None:
    for call in calls:
        thread = Thread(target=call)
        thread.start()
        thread.join()


async def _woken(*tasks: asyncio.Future[bool]) -> list[bool]:
    await asyncio.sleep(0.01)
    return [task.done() for task in tasks]


def test_tasks_are_woken_when_the_bell_rings() -> None:
    async def run() -> None:
        bell, calls = Bell(), []
        loop = asyncio.get_running_loop()
        loop_calls = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), loop_calls(*args))[1]  # type: ignore
        wakeups = [Wakeup(bell) for _ in range(3)]
        for wakeup in wakeups:
            assert await wakeup.wait(1)  # what came before
        waiting = [asyncio.ensure_future(wakeup.wait(10)) for wakeup in wakeups]
        tokens = [partial(wakeup, False) for wakeup in wakeups]
        _in_thread(*tokens[:2], *tokens[:2])  # two tokens for each of two
        assert await _woken(*waiting) == [False] * 3
        _in_thread(bell.ring)
        assert await asyncio.gather(*waiting[:2]) == [True, True]
        assert not waiting[2].done() and len(calls) == 1
        waiting[2].cancel()
        assert not await wakeups[2].wait(0.01)

    asyncio.run(run())


def test_many_streams_are_sent_more_at_a_time_but_begin_and_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bell_module, "SECONDS_PER_STREAM", 3600)

    async def run() -> None:
        bell = Bell()
        wakeups = [Wakeup(bell) for _ in range(20)]
        tokens = [partial(wakeup, False) for wakeup in wakeups]
        for wakeup in wakeups:
            await wakeup.wait(1)
        for _ in range(2):  # the first parts; and others, since none was sent lately
            waiting = [asyncio.ensure_future(wakeup.wait(10)) for wakeup in wakeups]
            _in_thread(*tokens, bell.ring)
            assert await _woken(*waiting) == [True] * 20
        monkeypatch.setattr(bell_module, "MOST_SECONDS", 3600)
        waiting = [asyncio.ensure_future(wakeup.wait(10)) for wakeup in wakeups[:10]]
        _in_thread(*tokens[:10], bell.ring, partial(wakeups[0], True), bell.ring)
        assert await _woken(*waiting) == [True] + [False] * 9
        monkeypatch.setattr(bell_module, "MOST_SECONDS", 0.001)
        late = [asyncio.ensure_future(wakeup.wait(10)) for wakeup in wakeups[10:]]
        _in_thread(*tokens[10:], bell.ring)  # nothing rings after it
        async with asyncio.timeout(5):
            assert await asyncio.gather(*late) == [True] * 10
        for task in waiting:
            task.cancel()

    asyncio.run(run())


def test_what_was_read_before_the_bell_rang_is_no_news() -> None:
    async def run() -> None:
        bell = Bell()
        wakeup = Wakeup(bell)
        await wakeup.wait(1)
        _in_thread(partial(wakeup, False), bell.ring)
        assert await wakeup.wait(1)
        _in_thread(partial(wakeup, False), partial(wakeup, True), bell.ring)  # it is set twice
        assert await wakeup.wait(1)
        await asyncio.sleep(0.02)
        waiting = asyncio.ensure_future(wakeup.wait(10))
        assert await _woken(waiting) == [False]
        waiting.cancel()

    asyncio.run(run())


def test_who_waits_for_ends_is_woken_by_nothing_else() -> None:
    async def run() -> None:
        bell = Bell()
        wakeup = Wakeup(bell, only_ends=True)
        await wakeup.wait(1)
        waiting = asyncio.ensure_future(wakeup.wait(10))
        _in_thread(partial(wakeup, False), bell.ring)
        assert await _woken(waiting) == [False]
        _in_thread(partial(wakeup, True), bell.ring)
        assert await waiting

    asyncio.run(run())


def test_a_loop_that_was_closed_is_no_error() -> None:
    bell = Bell()

    async def run() -> Wakeup:
        return Wakeup(bell)

    wakeup = asyncio.run(run())
    wakeup(True)
    bell.ring()
