"""The extension must be built: `maturin develop`, or its library beside the package (see the
README).
"""

import signal
import socket
import sys

import pytest
import superbatch

# Where the runner was started in the background, SIGINT is ignored in it and in all processes that
# it starts; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def grpcio_stays_apart():
    yield
    assert "grpc._cython.cygrpc" not in sys.modules, (
        "a test imported grpcio into the process that runs all tests, which a fault in its C core "
        "would end: import it in a process of its own, as no_superbatch.py is"
    )


@pytest.fixture
def spec():
    return superbatch.RunSpec(
        run_id="demo",
        sources=[
            "file:///data/{00000..00003}.parquet",
            superbatch.Source(uri="s3://b/p", weight=2.0),
        ],
        learner=superbatch.Learner(model_uri="file:///models/learner", random_seed=0),
        reference="file:///models/reference",
        phases=[
            superbatch.Phase(policy="uniform", super_batch_size=64, sub_batch_size=64),
            superbatch.Phase(
                from_step=10, policy="joint", super_batch_size=320, sub_batch_size=64, n_chunks=4
            ),
        ],
        loss="sigmoid",
        lag=superbatch.exact(1),
        columns=("url",),
        seed=7,
    )


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def silent():
    """A listener that never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener
