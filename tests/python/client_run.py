"""Runs for the tests of the Python client: one service a test file, and small specs."""

import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import pytest
import superbatch
from cluster import DEADLINE_SECONDS, Cluster
from safetensors.torch import load_file

from examples.demo import tiny


class Service(NamedTuple):
    """A server, and a folder with a data set and a learner."""

    address: str
    inputs: Path

    def spec(self, run_id: str, **changes) -> superbatch.RunSpec:
        """Uniform batches of 8 rows, which need no weights."""
        phases = [superbatch.Phase(policy="uniform", super_batch_size=8, sub_batch_size=8)]
        settings = {"sources": [(self.inputs / "pool").as_uri()], "phases": phases, **changes}
        return superbatch.RunSpec(run_id=run_id, **settings)

    def waiting_spec(self, run_id: str) -> superbatch.RunSpec:
        """A run whose first step waits until the trainer has pushed its initial weights, as step
        -1.
        """
        learner = superbatch.Learner(model_uri=(self.inputs / "learner").as_uri(), first_push=True)
        phases = [
            superbatch.Phase(
                policy="independent", criterion="hard", super_batch_size=32, sub_batch_size=8
            )
        ]
        return self.spec(run_id, learner=learner, phases=phases, micro_batch_rows=16)

    def open(self, spec: superbatch.RunSpec) -> superbatch.Run:
        return superbatch.connect(self.address).open_run(spec)

    def weights(self) -> dict:
        return load_file(self.inputs / "learner" / "model.safetensors")


def in_next(thread: int) -> None:
    """Waits until a thread is inside `next` of `Batches`."""
    until = monotonic() + DEADLINE_SECONDS
    while sys._current_frames()[thread].f_code is not superbatch.Batches.__next__.__code__:
        assert monotonic() < until, "it never came there"
        sleep(0.001)


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    tiny.write_dataset(folder / "pool", rows=512)
    tiny.write_siglip(folder / "learner")
    with Cluster(folder / "cluster") as cluster:
        yield Service(cluster.address, folder)
