"""What a selection does to the process that it runs in."""

import multiprocessing
import subprocess
import sys
import threading
import types

import pytest
from kernels_oracle import world
from superbatch_kernels import _kernels, _select, select


@pytest.fixture
def no_forced_switches():
    """A thread keeps the GIL until it lets go of it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def test_other_threads_run_during_a_selection(no_forced_switches, monkeypatch):
    models = world(1, count=2048, dims=(64, 64))
    inside, done, begun = False, False, threading.Event()

    def observed(request):
        nonlocal inside
        begun.set()
        inside = True
        drawn = _kernels.select(request)
        inside = False
        return drawn

    def work():
        nonlocal done
        for _ in range(100):
            if not done:
                select(*models, sub_batch_size=512)
        done = True
        begun.set()

    # The first call of all lets go of the GIL for a moment, to keep the names of arguments.
    select(*models, sub_batch_size=1)
    monkeypatch.setattr(_select, "_kernels", types.SimpleNamespace(select=observed))
    worker = threading.Thread(target=work)
    worker.start()
    was_inside = False
    while not (was_inside or done):
        begun.wait()
        begun.clear()
        # We have the GIL: the worker let go of it inside the kernels, or (NumPy does for a moment)
        # outside of them.
        was_inside = inside
    done = True
    worker.join()
    assert was_inside


def test_threads_may_select_at_once():
    models = world(2)
    alone = select(*models, sub_batch_size=24).indices.tolist()
    draws = []

    def work(threads):
        draws.extend(
            select(*models, sub_batch_size=24, threads=threads).indices.tolist() for _ in range(20)
        )

    workers = [threading.Thread(target=work, args=(threads,)) for threads in (None, 1, 2)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert draws == [alone] * 60


def select_and_send(models, to):
    to.send(select(*models, sub_batch_size=24).indices.tolist())


def test_a_forked_process_selects_with_threads_of_its_own():
    models = world(3)
    ours = select(*models, sub_batch_size=24).indices.tolist()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(
        target=select_and_send, args=(models, there)
    )
    child.start()
    answered = here.poll(60)
    child.kill()
    child.join()
    assert answered and here.recv() == ours


def test_neither_libtorch_nor_the_client_is_loaded():
    script = (
        "import superbatch_kernels, sys; print(open('/proc/self/maps').read()); "
        "print(sorted(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "_kernels.abi3.so" in run.stdout
    assert not [
        word
        for word in ("libtorch", "libc10", "libcuda", "'torch'", "'superbatch'")
        if word in run.stdout
    ]
