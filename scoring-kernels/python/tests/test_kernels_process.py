"""What a selection does to the process that it runs in."""

import multiprocessing
import subprocess
import sys
import threading

import pytest
from kernels_oracle import world
from superbatch_kernels import select


@pytest.fixture
def no_forced_switches():
    """A thread keeps the GIL until it lets go of it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def test_other_threads_run_during_a_selection(no_forced_switches):
    models = world(1, count=2048, dims=(64, 64))
    inside, seen, begun = False, threading.Event(), threading.Event()

    def work():
        nonlocal inside
        for _ in range(100):
            begun.set()
            inside = True
            select(*models, sub_batch_size=512)
            inside = False
            if seen.is_set():
                return

    worker = threading.Thread(target=work)
    worker.start()
    begun.wait()
    # We hold the GIL: the worker let go of it inside a selection, or else only at its end.
    was_inside = inside
    seen.set()
    worker.join()
    assert was_inside


def test_threads_may_select_at_once():
    models = world(2)
    alone = select(*models, sub_batch_size=24).indices.tolist()
    draws = []

    def work(threads):
        draws.extend(select(*models, sub_batch_size=24, threads=threads).indices.tolist() for _ in range(20))

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
    child = multiprocessing.get_context("fork").Process(target=select_and_send, args=(models, there))
    child.start()
    answered = here.poll(60)
    child.kill()
    child.join()
    assert answered and here.recv() == ours


def test_neither_libtorch_nor_the_client_is_loaded():
    script = "import superbatch_kernels, sys; print(open('/proc/self/maps').read()); print(sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "_kernels.abi3.so" in run.stdout
    assert not [word for word in ("libtorch", "libc10", "libcuda", "'torch'", "'superbatch'") if word in run.stdout]
