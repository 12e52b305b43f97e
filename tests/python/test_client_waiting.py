"""What can be done while `next` waits for a step: await other things, give up after a time, press
Ctrl-C.
"""

import asyncio
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import superbatch
from client_run import Service, service  # noqa: F401  (a fixture)
from cluster import Cluster, Process

#: A client that waits for weights, says so, and on Ctrl-C pushes them and goes on.
WAITER = """
import sys, threading
from pathlib import Path
from client_run import Service, in_next

service, run_id = Service(sys.argv[1], Path(sys.argv[2])), sys.argv[3]
run, main = service.open(service.waiting_spec(run_id)), threading.get_ident()
batches = run.batches(rank=0, world_size=1, start_step=0, need_after=600)

def tell():
    in_next(main)
    print("waiting", flush=True)

threading.Thread(target=tell).start()
try:
    next(batches)
except KeyboardInterrupt:
    print("interrupted", flush=True)
run.push_weights(service.weights(), step=-1)
print("step", next(batches).step, flush=True)
"""


def python_environment() -> dict[str, str]:
    """For a process of Python that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def waiting_batches(service: Service, run_id: str):  # noqa: F811
    """A run without initial weights, and its batches, of which the first waits for them."""
    run = service.open(service.waiting_spec(run_id))
    return run, run.batches(rank=0, world_size=1, start_step=0, end_step=2, need_after=60)


def test_ctrl_c_ends_a_next_that_waits_and_the_next_one_yields_the_same_step(service):  # noqa: F811
    command = [sys.executable, "-c", WAITER, service.address, service.inputs, "ctrl-c"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=python_environment())
    try:
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(signal.SIGINT)
        # The service would go on waiting for ten minutes.
        said, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (said, child.returncode) == ("interrupted\nstep 0\n", 0)


def test_batches_can_be_iterated_in_asyncio_beside_other_work(service):  # noqa: F811
    async def main() -> list[int]:
        run, batches = waiting_batches(service, "async")

        async def push() -> None:
            run.push_weights(service.weights(), step=-1)
            await run.flush_async()

        steps = []

        async def train() -> None:
            async for batch in batches:
                steps.append(batch.step)
                run.push_weights(service.weights(), step=batch.step)

        training = asyncio.ensure_future(train())
        await asyncio.sleep(0)
        # The loop is free, and the trainer waits for what it does next.
        assert not training.done() and steps == []
        await asyncio.gather(training, push())
        return steps

    assert asyncio.run(main()) == [0, 1]


def test_a_wait_with_a_time_limit_gives_up_and_the_next_one_yields_the_same_step(service):
    async def main() -> list[int]:
        run, batches = waiting_batches(service, "limited")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(batches), timeout=0.2)
        run.push_weights(service.weights(), step=-1)
        return [batch.step async for batch in batches]

    assert asyncio.run(main()) == [0, 1]


def test_a_service_that_stands_still_is_given_up_in_time(service, tmp_path):  # noqa: F811
    with Cluster(tmp_path) as stopped:
        run = superbatch.connect(stopped.address, retry_seconds=5).open_run(service.spec("stopped"))
        stopped.coordinator.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(
                superbatch.Unavailable, match="gave up after 1 attempt in"
            ) as caught:
                run.select(0, rank=0, world_size=1)
        finally:
            stopped.coordinator.process.send_signal(signal.SIGCONT)
        assert f"the call to {stopped.address} broke" in str(caught.value)
        # It is there again, and nothing was lost.
        assert run.select(0, rank=0, world_size=1).step == 0


def test_connect_waits_for_a_coordinator_that_restarts(service, tmp_path):  # noqa: F811
    with Cluster(tmp_path) as cluster, ThreadPoolExecutor() as threads:
        address = cluster.address
        cluster.coordinator.kill()
        connecting = threads.submit(superbatch.connect, address, timeout=60.0)
        again = Process(
            tmp_path,
            "again",
            "serve",
            {
                "listen": address.removeprefix("http://"),
                "metrics_listen": None,
                "page_listen": None,
                "state": cluster.state,
            },
            is_awaited=False,
        )
        try:
            assert connecting.result(60).list_runs() == []
        finally:
            again.stop()


def test_a_service_that_is_gone_is_told_with_its_address(service, tmp_path):  # noqa: F811
    with Cluster(tmp_path) as gone:
        run = superbatch.connect(gone.address, retry_attempts=2).open_run(service.spec("gone"))
        gone.coordinator.kill()
        with pytest.raises(superbatch.Unavailable) as caught:
            run.select(0, rank=0, world_size=1)
    assert f"the call to {gone.address} broke" in str(caught.value)
    assert str(caught.value).endswith("is the service running there?")
