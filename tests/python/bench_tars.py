"""How fast the service hands out the rows of tars, shuffled and read by range, beside `webdataset`
reading the same files in sequence: a ratio of one run.

    make bench-tars

The service reads rows of 16 blocks at once in a keyed order, checks and hashes them, and sends them
over two gRPC streams; `webdataset` reads members in their order and gives their bytes to the same
process. Neither shows pixels to a model. Every figure is the best of several taken in turns.
"""

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import superbatch
import webdataset
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


def by_range(client: superbatch.Client, folder: Path, number: int) -> int:
    steps = SHARDS * SAMPLES // BATCH
    run = client.open_run(
        superbatch.RunSpec(
            run_id=f"tars-{number}",
            sources=[folder],
            phases=[
                superbatch.Phase(policy="uniform", super_batch_size=BATCH, sub_batch_size=BATCH)
            ],
            epochs=1,
            seed=number,
            max_ahead=4,
            window_blocks=16,
        )
    )
    batches = run.batches(rank=0, world_size=1, start_step=0, end_step=steps)
    rows = sum(len(batch) for batch in batches)
    run.close()
    return rows


def best(work: Callable[[int], int], rates: list[float], number: int) -> None:
    begun = time.perf_counter()
    rows = work(number)
    assert rows == SHARDS * SAMPLES, rows
    rates.append(rows / (time.perf_counter() - begun))


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "tars"
        folder.mkdir()
        write(folder)
        with Cluster(Path(made) / "service") as cluster:
            client = superbatch.connect(cluster.address)
            ours, theirs = [], []
            # The first run walks the headers, and is not counted.
            by_range(client, folder, 0)
            for number in range(1, ROUNDS + 1):
                best(lambda _: in_sequence(folder), theirs, number)
                best(lambda number: by_range(client, folder, number), ours, number)
    print(f"{SHARDS * SAMPLES} samples of {IMAGE_BYTES} bytes in {SHARDS} tars on a local disk")
    print(f"webdataset, in sequence   {max(theirs):8.0f} rows/s")
    print(f"superbatch, 16 blocks     {max(ours):8.0f} rows/s")
    print(f"ratio                     {max(ours) / max(theirs):8.2f}")


if __name__ == "__main__":
    main()
