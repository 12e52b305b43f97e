"""A run whose owner does not serve goes to the next coordinator, whatever answers in the owner's
place.
"""

import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import superbatch
from cluster import Process
from test_end_to_end import inputs, phase, reason, spec  # noqa: F401


@pytest.fixture
def serve(tmp_path):
    """Starts coordinators on one state."""
    started = []

    def start() -> Process:
        started.append(
            Process(
                tmp_path,
                f"coordinator-{len(started)}",
                "serve",
                {
                    "listen": "127.0.0.1:0",
                    "metrics_listen": "127.0.0.1:0",
                    "page_listen": None,
                    "state": (tmp_path / "state").as_uri(),
                },
            )
        )
        return started[-1]

    yield start
    for coordinator in started:
        coordinator.process.send_signal(signal.SIGCONT)
        coordinator.stop()


def asked(inputs) -> superbatch.RunSpec:
    uniform = phase(policy="uniform", super_batch_size=48, sub_batch_size=24, n_chunks=1)
    return spec(inputs, "taken", phases=[uniform], max_ahead=1)


def goes_on(heir: Process, inputs, first: list[str]) -> superbatch.Run:
    run = superbatch.connect(heir.address).open_run(asked(inputs))
    assert run.select(0, rank=0, world_size=1)["_superbatch_id"].to_pylist() == first
    assert len(run.select(1, rank=0, world_size=1)) == 24
    return run


def port(process: Process) -> int:
    return int(process.address.rsplit(":", 1)[1])


@pytest.fixture
def owned(inputs, serve) -> tuple[Process, superbatch.Run, list[str]]:
    """A coordinator with a run of one step."""
    owner = serve()
    run = superbatch.connect(owner.address).open_run(asked(inputs))
    return owner, run, run.select(0, rank=0, world_size=1)["_superbatch_id"].to_pylist()


def test_a_port_that_accepts_and_says_nothing_owns_nothing(inputs, serve, owned):
    owner, _, first = owned
    owner.kill()
    with socket.create_server(("127.0.0.1", port(owner))):
        goes_on(serve(), inputs, first)


def test_another_service_at_the_owners_address_owns_nothing(inputs, serve, owned):
    owner, _, first = owned
    owner.kill()
    with ThreadingHTTPServer(("127.0.0.1", port(owner)), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        goes_on(serve(), inputs, first)
        other.shutdown()


def test_an_owner_that_hangs_loses_its_run_and_learns_it(inputs, serve, owned):
    owner, old, first = owned
    owner.process.send_signal(signal.SIGSTOP)
    heir = serve()
    run = goes_on(heir, inputs, first)
    owner.process.send_signal(signal.SIGCONT)
    with pytest.raises(superbatch.Error) as caught:
        old.select(2, rank=0, world_size=1)
    assert reason(caught) == "NOT_OWNER" and caught.value.metadata["owner"] == heir.address
    assert len(run.select(2, rank=0, world_size=1)) == 24
