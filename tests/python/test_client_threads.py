"""Other Python threads run while one of them is inside the client."""

import itertools
import operator
import sys
import threading
from functools import partial

import numpy
import pytest
import superbatch
from client_run import in_next, service  # noqa: F401  (a fixture)
from superbatch import _superbatch


def test_a_thread_pushes_the_weights_that_another_waits_for(service):  # noqa: F811
    run, waits = service.open(service.waiting_spec("threads")), threading.get_ident()
    # The weights come only from a thread that begins when this one is already inside `next`.
    batches = run.batches(rank=0, world_size=1, start_step=0, end_step=1, need_after=60)

    def push() -> None:
        in_next(waits)
        run.push_weights(service.weights(), step=-1)

    pushing = threading.Thread(target=push)
    pushing.start()
    batch = next(batches)
    pushing.join()
    assert (batch.step, batch.receipt.mode, batch.receipt.learner.step) == (0, "normal", -1)


@pytest.fixture
def eager_threads():
    """Threads that wait for the interpreter ask for it at once."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_a_thread_advances_while_weights_are_hashed(eager_threads):
    data, ticks, stop = numpy.ones(64 << 20, numpy.uint8), itertools.count(), threading.Event()

    def advance() -> None:
        while not stop.is_set():
            next(ticks)

    advancing = threading.Thread(target=advance)
    advancing.start()
    try:
        digest = partial(_superbatch.blake3_of, data)
        # All three run without a Python frame in between, where the interpreter might let the other
        # thread run.
        before, _, after = map(operator.call, [ticks.__reduce__, digest, ticks.__reduce__])
    finally:
        stop.set()
        advancing.join()
    assert after > before
