"""For all tests of this folder."""

import signal
import sys

import pytest

# Where the runner was started in the background, SIGINT is ignored in it and in all processes that
# it starts; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def grpcio_stays_apart():
    yield
    assert "grpc._cython.cygrpc" not in sys.modules, (
        "a test imported grpcio into the process that runs all tests, which a fault in its C core "
        "would end: import it in a process of its own, as grpc_apart.py does"
    )
