"""From the engine's thread to an event loop: nobody is woken before a step is done, and then all at once."""

import asyncio
from threading import Thread

from llamajax.serve.bell import Bell, Wakeup


def _in_thread(*calls: object) -> None:
    for call in calls:
        thread = Thread(target=call)
        thread.start()
        thread.join()


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
        await asyncio.sleep(0)
        _in_thread(*wakeups[:2], *wakeups[:2])  # two tokens for each of two
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        _in_thread(bell.ring)
        assert await asyncio.gather(*waiting[:2]) == [True, True]
        assert not waiting[2].done() and len(calls) == 1
        waiting[2].cancel()
        assert not await wakeups[2].wait(0.01)

    asyncio.run(run())


def test_a_loop_that_was_closed_is_no_error() -> None:
    bell = Bell()

    async def run() -> Wakeup:
        return Wakeup(bell)

    wakeup = asyncio.run(run())
    wakeup()
    bell.ring()
