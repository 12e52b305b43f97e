"""Weights that are written while they arrive: a disk that is full in the middle, and a coordinator
that is killed there.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep

import pytest
import superbatch
from cluster import DEADLINE_SECONDS, Cluster
from safetensors.torch import load_file
from test_disk import FULL, disk

from examples.demo import tiny
from examples.demo.model import write_folder

#: About 16 MB: smaller pushes are not written ahead.
SHAPE = {
    **tiny.SHAPE,
    "width": 256,
    "heads": 4,
    "mlp": 1024,
    "vision_layers": 2,
    "text_layers": 2,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    tiny.write_dataset(folder / "pool", rows=96)
    write_folder(folder / "model", tiny.captions(), 0, SHAPE)
    return folder


def opened(cluster: Cluster, large: Path, incarnation: str = "", **options) -> superbatch.Run:
    """A run whose first steps look at no weights, so that a push waits for nothing but itself."""
    sizes = {"super_batch_size": 8, "sub_batch_size": 4}
    model = (large / "model").as_uri()
    spec = superbatch.RunSpec(
        run_id="large",
        sources=[(large / "pool").as_uri()],
        reference=model,
        phases=[
            superbatch.Phase(policy="uniform", **sizes),
            superbatch.Phase(policy="joint", from_step=1000, **sizes),
        ],
        learner=superbatch.Learner(model_uri=model, first_push=True),
    )
    client = superbatch.connect(cluster.address, **options)
    return client.open_run(spec, incarnation=incarnation)


def weights(large: Path, factor: float) -> dict:
    state = load_file(large / "model/model.safetensors")
    return {
        name: value if "logit" in name else value * factor
        for name, value in state.items()
        if value.is_floating_point()
    }


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("snapshots/*") if "#" in path.name]


def push(run: superbatch.Run, state: dict, step: int) -> int:
    run.push_weights(state, step=step)
    return run.flush().version


def test_weights_that_fill_the_disk_are_published_once_there_is_room(large, disk, tmp_path):
    disk.remount("size=24m")
    with Cluster(tmp_path / "full", state=(disk.folder / "state").as_uri()) as cluster:
        run = opened(cluster, large)
        for step in range(2):
            run.select(step, rank=0, world_size=1)
        assert push(run, weights(large, 1.0), -1) == 1
        with ThreadPoolExecutor() as threads:
            pushing = threads.submit(push, run, weights(large, 1.1), 0)
            until, log = monotonic() + DEADLINE_SECONDS, cluster.coordinator.log
            while not any(
                FULL in line and "weights refused" in line for line in log.read_text().splitlines()
            ):
                assert monotonic() < until, log.read_text()[-3000:]
                sleep(0.02)
            disk.remount("size=64m")
            assert pushing.result(DEADLINE_SECONDS) == 2
        assert run.verify_weights(weights(large, 1.1)).equal
    assert not unfinished(disk.folder)


def test_a_coordinator_killed_while_weights_arrive_leaves_nothing_behind(large, tmp_path):
    with Cluster(tmp_path) as cluster:
        run = opened(cluster, large, retry_attempts=1)
        for step in range(2):
            run.select(step, rank=0, world_size=1)
        assert push(run, weights(large, 1.0), -1) == 1
        # One of two ranks: the push stays open.
        state = weights(large, 1.1)
        half = list(state.items())[: len(state) // 2]
        parts = [(name, value, value.shape, [0] * value.ndim) for name, value in half]
        run.push_parts(parts, step=0, expected_parts=len(state), rank=0)
        until = monotonic() + DEADLINE_SECONDS
        while not unfinished(tmp_path / "state"):
            assert monotonic() < until, cluster.coordinator.log.read_text()[-3000:]
            sleep(0.02)
        cluster.coordinator.kill()
        assert len(unfinished(tmp_path / "state")) == 1
        cluster.start_coordinator("second")
        run = opened(cluster, large, incarnation="second")
        assert not unfinished(tmp_path / "state")
        assert push(run, state, 0) == 2
        assert run.verify_weights(state).equal
