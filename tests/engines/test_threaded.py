"""Writing beside an event loop: a cancelled task does not leave while its thread still writes."""

import asyncio
import threading

import pytest

from trajstore.threaded import run_threaded, until_done


def test_a_call_gives_its_result_or_its_error():
    def divide(number, *, by):
        return number / by

    assert asyncio.run(run_threaded(None, divide, 6, by=3)) == 2
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_threaded(None, divide, 6, by=0))


@pytest.mark.parametrize("fails", [False, True])
def test_a_task_that_is_cancelled_time_after_time_waits_for_its_thread(fails):
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def write():
        begun.set()
        assert may_end.wait(30)
        ended.set()
        if fails:
            raise ValueError("the cancellation tells more")

    async def scenario():
        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        task = asyncio.create_task(run_threaded(None, write))
        assert await asyncio.to_thread(begun.wait, 30)
        for _ in range(3):
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=0)
            assert not done
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
        return complaints

    assert asyncio.run(scenario()) == []


def test_until_done_outlives_cancellations():
    async def scenario():
        work = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(until_done(work))
        for _ in range(2):
            await asyncio.wait({waiting}, timeout=0)
            waiting.cancel()
        work.set_result(None)
        await asyncio.wait_for(waiting, 30)

    asyncio.run(scenario())
