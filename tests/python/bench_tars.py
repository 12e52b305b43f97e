"""How fast the service hands out the rows of tars, shuffled and read by range, beside `webdataset`
reading the same files in sequence: a ratio of one run.

    make bench-tars

The service reads rows of 16 blocks at once in a keyed order, checks and hashes them, and sends them
over two gRPC streams; `webdataset` reads members in their order and gives their bytes to the same
process. Neither shows pixels to a model. Every figure is the best of several taken in turns; each
turn of the service has other names of the same files, whose headers are walked before it begins.
"""

import io
import os
import tarfile
import tempfile
from pathlib import Path

import numpy
import superbatch
import webdataset
from bench_rows import linked
from bench_timed import ENVIRONMENT, Timed, announce, show, speed
from cluster import Cluster
from PIL import Image

SHARDS = int(os.environ.get("SHARDS", "4"))
SAMPLES, IMAGE_BYTES, BATCH, ROUNDS = 1364, 60_000, 341, 5


def write(folder: Path) -> None:
    """As img2dataset writes them. Images have many bytes and few pixels: moving them is what is
    measured, not decoding.
    """
    small = io.BytesIO()
    Image.new("RGB", (16, 16), "gray").save(small, "JPEG")
    small, rng = small.getvalue(), numpy.random.default_rng(0)
    comment = b"\xff\xfe" + (IMAGE_BYTES + 2).to_bytes(2, "big")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for sample in range(SAMPLES):
                key = f"{shard * 10_000 + sample:09d}"
                image = small[:2] + comment + rng.bytes(IMAGE_BYTES) + small[2:]
                caption = f"a picture {sample}".encode()
                for field, content in (
                    ("jpg", image),
                    ("json", b'{"caption": "a picture"}'),
                    ("txt", caption),
                ):
                    member = tarfile.TarInfo(f"{key}.{field}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def in_sequence(folder: Path) -> int:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=False).to_tuple("jpg", "txt")
    return sum(1 for _ in samples)


def opened(client: superbatch.Client, folder: Path, number: int) -> superbatch.Run:
    """A run over other names of the same files, so that the worker has no block of them in memory.
    To open it walks the tars' headers.
    """
    phase = superbatch.Phase(policy="uniform", super_batch_size=BATCH, sub_batch_size=BATCH)
    spec = superbatch.RunSpec(
        run_id=f"tars-{number}",
        sources=[linked(folder, f"tars-{number}")],
        phases=[phase],
        epochs=1,
        seed=number,
        max_ahead=4,
        window_blocks=16,
    )
    return client.open_run(spec)


def by_range(run: superbatch.Run) -> int:
    steps = SHARDS * SAMPLES // BATCH
    batches = run.batches(rank=0, world_size=1, start_step=0, end_step=steps)
    return sum(len(batch) for batch in batches)


def all_bytes(rows: int) -> int:
    assert rows == SHARDS * SAMPLES, rows
    return rows * IMAGE_BYTES


def main() -> None:
    announce()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "tars"
        folder.mkdir()
        write(folder)
        with Cluster(Path(made) / "service", environment=ENVIRONMENT) as cluster:
            client, server = superbatch.connect(cluster.address), cluster.coordinator.process.pid
            ours, theirs = Timed("superbatch, 16 blocks"), Timed("webdataset, in sequence")
            by_range(opened(client, folder, 0))
            for number in range(1, ROUNDS + 1):
                theirs.take(lambda: all_bytes(in_sequence(folder)))
                run = opened(client, folder, number)
                ours.take(lambda: all_bytes(by_range(run)), server)
                run.close()
    show(f"{SHARDS * SAMPLES} samples in {SHARDS} tars on a local disk", ours, [theirs])
    speed("Tars", ours, theirs)


if __name__ == "__main__":
    main()
