"""Absent and silent services: errors come fast, and Ctrl-C at once."""

import asyncio
import dataclasses
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import superbatch
import torch
from superbatch.torch import SelectedBatches
from torch.utils.data import DataLoader


def address(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_absent_service_is_told_after_the_timeout(free_port):
    started = time.monotonic()
    with pytest.raises(superbatch.Unavailable, match=f"127.0.0.1:{free_port}") as caught:
        superbatch.connect(f"http://127.0.0.1:{free_port}", timeout=1.0)
    assert caught.value.reason == "UNAVAILABLE"
    assert 1 <= time.monotonic() - started < 60


def test_a_server_that_is_no_superbatch_is_told_without_trying_again():
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("no_superbatch.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        port = server.stdout.readline().strip()
        with pytest.raises(superbatch.Error, match="no Superbatch") as caught:
            superbatch.connect(f"http://127.0.0.1:{port}").list_runs()
    finally:
        asked, _ = server.communicate()
    assert caught.value.reason == "UNIMPLEMENTED" and not isinstance(
        caught.value, superbatch.Unavailable
    )
    assert asked.splitlines() == ["/superbatch.v1.SelectionService/ListRuns"]


def test_a_uri_that_is_none_is_refused():
    with pytest.raises(superbatch.Error, match="http://HOST:PORT") as caught:
        superbatch.connect("localhost:50051")
    assert (caught.value.reason, caught.value.metadata) == ("INVALID_ARGUMENT", {"field": "uri"})


def test_a_run_id_that_is_none_is_refused_before_it_is_sent(silent, spec):
    client = superbatch.connect(address(silent))
    with pytest.raises(superbatch.Error) as caught:
        client.open_run(dataclasses.replace(spec, run_id="a/b"))
    assert caught.value.metadata == {"field": "run_id"}


WAITING = """
import sys, superbatch
try:
    superbatch.connect(sys.argv[1]).list_runs()
except KeyboardInterrupt:
    sys.exit(7)
"""


def read_until_called(connection: socket.socket) -> None:
    """Reads HTTP/2 from a client until the headers of its first call have come."""
    stream = connection.makefile("rb")
    assert stream.read(24).startswith(b"PRI * HTTP/2.0")
    kind = None
    while kind != HEADERS:
        frame = stream.read(9)
        kind = frame[3]
        stream.read(int.from_bytes(frame[:3], "big"))


HEADERS = 1


def test_ctrl_c_ends_a_wait_at_once(silent):
    command = [sys.executable, "-c", WAITING, address(silent)]
    child = subprocess.Popen(command)
    try:
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            read_until_called(connection)
            child.send_signal(signal.SIGINT)
            assert child.wait(timeout=60) == 7
    finally:
        child.kill()


def test_waiting_in_asyncio_can_be_cancelled(silent, spec):
    async def main():
        client = superbatch.connect(address(silent))
        await asyncio.wait_for(client.open_run_async(spec), timeout=0.1)

    with pytest.raises(TimeoutError):
        asyncio.run(main())


def test_asyncio_hears_of_errors(silent, spec):
    async def main():
        client = superbatch.connect(address(silent))
        await client.open_run_async(dataclasses.replace(spec, run_id=".."))

    with pytest.raises(superbatch.Error) as caught:
        asyncio.run(main())
    assert caught.value.reason == "INVALID_ARGUMENT"


def test_a_forked_child_makes_its_own_connection_and_does_not_hang_on_the_parents(
    silent, free_port
):
    client = superbatch.connect(address(silent))
    child = os.fork()
    if child == 0:
        try:
            client.list_runs()
        except RuntimeError:
            pass
        else:
            os._exit(1)
        try:
            superbatch.connect(f"http://127.0.0.1:{free_port}")
        except superbatch.Unavailable:
            os._exit(0)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_connects_where_it_iterates(free_port, silent, spec, workers):
    # The client's threads run already when the worker is forked.
    superbatch.connect(address(silent))
    dataset = SelectedBatches(
        f"http://127.0.0.1:{free_port}", spec, rank=0, world_size=1, start_step=0
    )
    dataset = pickle.loads(pickle.dumps(dataset))
    with pytest.raises(superbatch.Unavailable):
        next(iter(DataLoader(dataset, batch_size=None, num_workers=workers)))


def test_without_a_process_group_an_incarnation_is_ones_own():
    assert not torch.distributed.is_initialized()
    assert superbatch.torch.incarnation() != superbatch.torch.incarnation()
