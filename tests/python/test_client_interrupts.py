"""A `next` that is cut short loses no batch: the one after it yields the same step."""

import _thread
import asyncio
import operator
import threading

import pytest
from client_run import service  # noqa: F401  (a fixture)


class Watched:
    """Stands where a `Batches` has the extension's, and tells when a call of its `next` is done."""

    def __init__(self, batches) -> None:
        self.batches = batches
        self.done = threading.Event()

    def next(self):
        self.done.clear()
        call = self.batches.next()
        call.on_done(self.done.set)
        return call


def watched(batches) -> Watched:
    batches._batches = Watched(batches._batches)
    return batches._batches


def test_a_batch_that_came_before_its_wait_was_cancelled_is_not_lost(service):  # noqa: F811
    async def main() -> list[int]:
        batches = service.open(service.spec("cancelled")).batches(
            rank=0, world_size=1, start_step=0, end_step=2
        )
        call = watched(batches)
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        # The batch is there, and the loop, which is busy here, has not heard of it.
        assert call.done.wait(60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return [batch.step async for batch in batches]

    assert asyncio.run(main()) == [0, 1]


def test_a_batch_that_came_together_with_a_signal_is_not_lost(service):  # noqa: F811
    batches = service.open(service.spec("signalled")).batches(
        rank=0, world_size=1, start_step=0, end_step=2
    )
    native = watched(batches)
    call = native.next()
    assert native.done.wait(60)
    # Without a Python frame between the two calls, the wait itself is the first to see the signal.
    with pytest.raises(KeyboardInterrupt):
        list(map(operator.call, [_thread.interrupt_main, call.wait]))
    assert [batch.step for batch in batches] == [0, 1]


def test_a_call_that_nobody_waits_for_any_more_is_not_lost(service):  # noqa: F811
    batches = service.open(service.spec("dropped")).batches(
        rank=0, world_size=1, start_step=0, end_step=2
    )
    native = watched(batches)
    call = native.next()
    assert native.done.wait(60)
    del call
    assert [batch.step for batch in batches] == [0, 1]
