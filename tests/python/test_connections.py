"""Ten thousand callers that connect and then say nothing, or nothing that ends: the service goes
on, its memory is bounded, and it closes what gives no sign of life.
"""

import re
import resource
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
import superbatch
from cluster import Cluster

IDLE, HALF = 10_000, 500
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
# The head of a HEADERS frame of 16,000 bytes, and the first of them.
HEADERS = (16_000).to_bytes(3, "big") + bytes([1, 4, 0, 0, 0, 1, 0x82])
# One connection's buffers, task and state of HTTP/2. Its windows are limits, and hold no memory.
BYTES_MAX = 64 << 10


def resident(cluster: Cluster) -> int:
    status = Path(f"/proc/{cluster.coordinator.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10


@pytest.fixture
def room():
    """As many open files as this test and the service need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE + 2 * HALF + 1_000
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} open files, and this machine allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_idle_connections_are_held_and_then_closed(tmp_path, room):
    environment = {"SUPERBATCH_CONNECTIONS_MAX": str(IDLE + 3 * HALF)}
    with Cluster(tmp_path, environment=environment) as cluster, ExitStack() as stack:
        host, port = cluster.address.removeprefix("http://").split(":")
        client = superbatch.connect(cluster.address)
        assert client.list_runs() == []
        before = resident(cluster)

        def opened(said: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(said)
            return connection

        idle = [opened(PREFACE + SETTINGS) for _ in range(IDLE)]
        # Each is served: its SETTINGS come back.
        assert all(connection.recv(9, socket.MSG_WAITALL)[3] == 4 for connection in idle)
        for _ in range(HALF):
            opened(PREFACE[:10])
            opened(PREFACE + SETTINGS + HEADERS)
        grown = resident(cluster) - before
        print(
            f"{IDLE} idle connections: {grown / 2**20:.0f} MiB, {grown / IDLE / 1024:.1f} KiB each"
        )
        assert grown < IDLE * BYTES_MAX
        # Others are served all the while.
        assert client.list_runs() == []
        assert len(superbatch.connect(cluster.address).list_runs()) == 0
        # None of these callers answers a ping, or ends what it began.
        cluster.coordinator.wait_for(
            "superbatch_connections", lambda count: count < HALF, seconds=180
        )
        assert resident(cluster) - before < IDLE * BYTES_MAX
        assert client.list_runs() == []
