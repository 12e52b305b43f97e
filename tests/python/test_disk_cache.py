"""Blocks of remote shards on a worker's disk: each is read from its store once, whoever is killed,
and never instead of an object that has changed.
"""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import superbatch
from cluster import Cluster, Process
from s3_store import BUCKET, Proxy, command, credentials, proxy, remote, store  # noqa: F401
from test_disk import Disk, disk  # noqa: F401
from test_end_to_end import (  # noqa: F401
    STEPS,
    inputs,
    service,
    train,
    undisturbed,
)

from examples.demo import tiny

#: Of 96 candidates each, from the 768 rows of the pool.
STEPS_OF_EPOCH = 8
LIMIT = 1 << 30
READS = "superbatch_disk_cache_reads_total"
FAILURES = "superbatch_disk_cache_failures_total"


def environment(port: int, folder: Path) -> dict[str, str]:
    return {
        **credentials(port),
        "SUPERBATCH_WORKER__DISK_CACHE_DIR": str(folder),
        "SUPERBATCH_WORKER__DISK_CACHE_BYTES": str(LIMIT),
    }


def entries(folder: Path) -> int:
    return len(list(folder.glob("*.block")))


def wait_until_kept(process: Process, folder: Path) -> None:
    """Waits until all that the cache did not have is written."""
    process.wait_for(READS, lambda misses: misses == entries(folder), outcome="miss")


def ranges_of_pool(through: Proxy) -> Counter:
    return Counter(asked for asked in through.ranges if asked[0].startswith(f"/{BUCKET}/pool/"))


def test_two_epochs_and_a_killed_worker_read_each_block_once(inputs, proxy, tmp_path, undisturbed):
    through, folder, state = proxy(), tmp_path / "cache", f"s3://{BUCKET}/state-of-epochs"
    settings = environment(through.port, folder)
    with Cluster(tmp_path, workers=1, state=state, environment=settings) as cluster:
        run = superbatch.connect(cluster.address).open_run(remote("epochs"))
        # The coordinator reads footers when it indexes, and nothing of the pool later.
        through.ranges.clear()
        ids = train(run, inputs, end=STEPS_OF_EPOCH)
        assert ids[:STEPS] == undisturbed[0]
        worker = cluster.workers[0]
        wait_until_kept(worker, folder)
        read = ranges_of_pool(through)
        assert set(read.values()) == {1}
        assert len(read) == worker.metric(READS, outcome="miss")
        assert 0 < worker.metric("superbatch_disk_cache_bytes") <= LIMIT

        second = tmp_path / "second.yaml"
        role = {"coordinator": cluster.address, "listen": "127.0.0.1:0"}
        cached = {"disk_cache_dir": str(folder), "disk_cache_bytes": LIMIT}
        second.write_text(json.dumps({"state": state, "worker": cached, "worker_role": role}))
        refused = command(through.port, "worker", "--config", str(second))
        assert refused.returncode == 1
        assert str(folder) in refused.stderr and "a folder of its own" in refused.stderr

        worker.kill()
        # As if it had been killed in the middle of a write.
        (folder / "part").write_bytes(b"half of a block")
        again = cluster.start_worker("again")
        ids += train(run, inputs, start=STEPS_OF_EPOCH, end=2 * STEPS_OF_EPOCH)
        first, next_one = ids[:STEPS_OF_EPOCH], ids[STEPS_OF_EPOCH:]
        assert len(next_one) == STEPS_OF_EPOCH and first != next_one
        assert again.metric(READS, outcome="hit") > 0
        assert again.metric(READS, outcome="miss") == 0
        assert again.metric(FAILURES) == 0
        assert ranges_of_pool(through) == read, "nothing is asked of the store again"
        assert not (folder / "part").exists()


def test_an_object_that_changed_is_not_served_from_the_cache(inputs, store, tmp_path):
    folder, state, kept = tmp_path / "cache", f"s3://{BUCKET}/state-of-change", {}
    settings = environment(store.port, folder)
    with Cluster(tmp_path, state=state, environment=settings) as cluster:
        client = superbatch.connect(cluster.address)
        for seed in (1, 2):
            written = tiny.write_dataset(tmp_path / f"{seed}", rows=192, seed=seed, shards=1)
            (shard,) = written.glob("*.parquet")
            store.client.upload_file(str(shard), BUCKET, "changing/0.parquet")
            run = client.open_run(remote(f"of-{seed}", sources=[f"s3://{BUCKET}/changing"]))
            batch = run.select(0, rank=0, world_size=1)
            pictures = pyarrow.parquet.read_table(shard)["png"].to_pylist()
            assert set(batch["image"].to_pylist()) <= set(pictures)
            wait_until_kept(cluster.coordinator, folder)
            kept[seed] = entries(folder)
        assert 0 < kept[1] < kept[2], "both are kept, as what they are"


def test_a_full_disk_costs_the_cache_and_no_step(inputs, store, tmp_path, disk, undisturbed):
    with (disk.folder / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError as full:
            assert "No space left" in str(full)
    state = f"s3://{BUCKET}/state-of-full"
    settings = environment(store.port, disk.folder)
    with Cluster(tmp_path, state=state, environment=settings) as cluster:
        run = superbatch.connect(cluster.address).open_run(remote("full"))
        assert train(run, inputs) == undisturbed[0]
        cluster.coordinator.wait_for(FAILURES, lambda failed: failed > 0, operation="write")
        assert cluster.coordinator.metric("superbatch_disk_cache_bytes") == 0
        assert "its block is read from its store" in cluster.coordinator.log.read_text()
    assert {path.name for path in disk.folder.iterdir()} == {"filler", "lock"}
