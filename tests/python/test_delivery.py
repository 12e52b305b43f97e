"""Ways of a batch to its rank, from Python, with real processes: the same rows on each, also after
a worker that holds some was killed.
"""

from pathlib import Path

import pytest
import superbatch
from cluster import Cluster

from examples.demo import tiny

STEPS, RANKS = 3, 2


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("delivery") / "pool", rows=512)


def opened(cluster: Cluster, pool: Path, delivery: str) -> superbatch.Run:
    return opened_by(superbatch.connect(cluster.address), pool, delivery)


def opened_by(client: superbatch.Client, pool: Path, delivery: str, prefix="") -> superbatch.Run:
    phase = superbatch.Phase(policy="uniform", super_batch_size=64, sub_batch_size=32)
    # Micro-batches so small that both workers have rows of each step.
    spec = superbatch.RunSpec(
        run_id=prefix + delivery,
        sources=[pool.as_uri()],
        phases=[phase],
        delivery=delivery,
        micro_batch_rows=8,
        seed=3,
    )
    return client.open_run(spec)


def rows(run: superbatch.Run, step: int, *columns: str) -> list:
    batches = [run.select(step, rank=rank, world_size=RANKS) for rank in range(RANKS)]
    return [[batch[column].to_pylist() for column in columns] for batch in batches]


def test_each_way_brings_the_same_rows(tmp_path, pool):
    with Cluster(tmp_path, workers=2) as cluster:
        through, direct, located = (
            opened(cluster, pool, delivery) for delivery in ("coordinator", "direct", "locators")
        )
        columns = ("_superbatch_id", "caption", "image")
        expected = [rows(through, step, *columns) for step in range(STEPS)]
        assert [rows(direct, step, *columns) for step in range(STEPS)] == expected
        coordinator = cluster.coordinator
        assert coordinator.metric("superbatch_direct_fallbacks_total") == 0
        assert all(worker.metric("superbatch_direct_bytes_total") > 0 for worker in cluster.workers)
        whole, own = (
            coordinator.metric("superbatch_sent_bytes_total", delivery=delivery)
            for delivery in ("coordinator", "direct")
        )
        assert own < whole / 2
        assert direct.spec["delivery"] == "direct"
        found = [rows(located, step, "_superbatch_id", "caption") for step in range(STEPS)]
        assert found == [[ranks[:2] for ranks in step] for step in expected]


def test_a_worker_that_is_killed_costs_its_batches_a_fallback(tmp_path, pool):
    with Cluster(tmp_path, workers=2) as cluster:
        run = opened(cluster, pool, "direct")
        ids = rows(run, 0, "_superbatch_id", "image")
        cluster.workers[0].kill()
        assert rows(run, 0, "_superbatch_id", "image") == ids
        assert cluster.coordinator.metric("superbatch_direct_fallbacks_total", cause="asked") > 0


def test_a_delivery_that_there_is_not_is_refused_by_name(tmp_path, pool):
    with pytest.raises(superbatch.Error, match="delivery"):
        with Cluster(tmp_path) as cluster:
            opened(cluster, pool, "pigeon")
