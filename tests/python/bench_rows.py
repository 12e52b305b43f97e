"""Rows from Parquet to a trainer, through reading, checking, hashing and gRPC, beside other ways to
move the same bytes: a part of `make bench-service`.

All the work for a turn lies within it. The service makes steps ahead of a trainer, and a DataLoader
batches; so a turn is a whole epoch, of a run that was opened before and asked for nothing. And
nobody has kept the rows of an earlier turn: each turn of the service has its own names (hard links)
of the same files, so that its blocks are not in memory. The files' pages are in the system's cache,
for the service and its peers alike.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import superbatch
import torch
from bench_peers import Flight, Grpcio, Tonic
from bench_timed import Timed, ratio, show, speed
from cluster import Cluster
from PIL import Image

ROWS, IMAGE_BYTES, ROW_GROUP, BATCH = 4096, 60_000, 256, 512
STEPS, ROUNDS = ROWS // BATCH, 5
SIZE = ROWS * IMAGE_BYTES


def write_rows(folder: Path) -> None:
    """Images whose bytes are many and whose pixels are few: moving them is what is measured, not
    decoding.
    """
    small = io.BytesIO()
    Image.new("RGB", (16, 16), "gray").save(small, "JPEG")
    small, rng = small.getvalue(), numpy.random.default_rng(0)
    comment = b"\xff\xfe" + (IMAGE_BYTES + 2).to_bytes(2, "big")
    folder.mkdir()
    for shard in range(4):
        images = [
            small[:2] + comment + rng.bytes(IMAGE_BYTES) + small[2:] for _ in range(ROWS // 4)
        ]
        table = pyarrow.table(
            {
                "jpg": pyarrow.array(images, "binary"),
                "caption": [f"a picture {k}" for k in range(ROWS // 4)],
            }
        )
        pyarrow.parquet.write_table(
            table,
            folder / f"{shard:05d}.parquet",
            row_group_size=ROW_GROUP,
            compression="none",
            use_dictionary=False,
        )


def linked(folder: Path, name: str) -> Path:
    """The same files by other names."""
    other = folder.with_name(name)
    other.mkdir()
    for file in folder.iterdir():
        os.link(file, other / file.name)
    return other


def epoch_by_arrow(folder: Path) -> Iterator[pyarrow.Table]:
    """The limit: the same row groups, read and put into an order, by the process that wants
    them.
    """
    for shard in sorted(folder.iterdir()):
        file = pyarrow.parquet.ParquetFile(shard)
        for first in range(0, file.num_row_groups, BATCH // ROW_GROUP):
            table = file.read_row_groups(range(first, first + BATCH // ROW_GROUP))
            yield table.take(numpy.random.default_rng(first).permutation(len(table)))


class ParquetRows(torch.utils.data.IterableDataset):
    """What a trainer's own loader does: batches of image bytes and captions from a worker
    process.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __iter__(self):
        for table in epoch_by_arrow(self.folder):
            yield table["jpg"].to_pylist(), table["caption"].to_pylist()


def opened(client: superbatch.Client, source: Path, run_id: str) -> superbatch.Run:
    phase = superbatch.Phase(policy="uniform", super_batch_size=BATCH, sub_batch_size=BATCH)
    spec = superbatch.RunSpec(run_id=run_id, sources=[source.as_uri()], phases=[phase], epochs=1)
    return client.open_run(spec)


def epoch_of(run: superbatch.Run) -> int:
    batches = run.batches(rank=0, world_size=1, start_step=0, end_step=STEPS)
    assert sum(len(batch["caption"]) for batch in batches) == ROWS
    return SIZE


def bench_rows(
    folder: Path, cluster: Cluster, tonic: Tonic, grpcio: Grpcio, flight: Flight
) -> None:
    data = folder / "rows"
    write_rows(data)
    client = superbatch.connect(cluster.address)
    loader = torch.utils.data.DataLoader(
        ParquetRows(data), batch_size=None, num_workers=1, persistent_workers=True
    )

    def loaded() -> int:
        assert sum(len(captions) for _, captions in loader) == ROWS
        return SIZE

    def read() -> int:
        assert sum(map(len, epoch_by_arrow(data))) == ROWS
        return SIZE

    # Starts the loader's process, and warms the service up.
    loaded()
    epoch_of(opened(client, linked(data, "rows-warm"), "rows-warm"))
    server = cluster.coordinator.process.pid
    (worker,) = (process.pid for process in loader._iterator._workers)
    ours, again = Timed("superbatch, uniform"), Timed("superbatch, a ready step asked for again")
    arrow = Timed("pyarrow in the trainer's own thread")
    by_loader = Timed("torch DataLoader over the same files, 1 worker")
    by_tonic = Timed("a plain gRPC stream from memory (tonic)")
    by_grpcio = Timed("a plain gRPC stream from memory (grpcio)")
    by_flight = Timed("Arrow Flight from memory (pyarrow.flight)")
    for turn in range(ROUNDS):
        run = opened(client, linked(data, f"rows-{turn}"), f"rows-{turn}")
        ours.take(lambda: epoch_of(run), server)

        def asked_again() -> int:
            # The newest step, which is in memory. Nothing is made ahead: it is the run's last.
            for _ in range(STEPS):
                run.select(STEPS - 1, rank=0, world_size=1)
            return SIZE

        again.take(asked_again, server)
        run.close()
        arrow.take(read)
        by_loader.take(loaded, worker)
        by_tonic.take(lambda: tonic.moved("send", SIZE), tonic.pid)
        by_grpcio.take(lambda: grpcio.moved("send", SIZE), grpcio.pid)
        by_flight.take(lambda: flight.moved(STEPS, BATCH, IMAGE_BYTES), flight.pid)
    show(
        f"Rows: {BATCH} of {IMAGE_BYTES // 1000} kB a step, one rank",
        ours,
        [again, arrow, by_loader, by_tonic, by_grpcio, by_flight],
    )
    speed("Rows", ours, by_loader, goal=1.5)
    speed("Rows", ours, by_tonic, goal=0.6)
    speed("Rows", ours, by_flight, goal=0.8)
    speed("Rows", ours, by_grpcio)
    speed("Rows", ours, arrow)
    speed("Rows, a ready step asked for again", again, by_tonic, goal=0.8)
    name = "Rows: processor seconds a GB, of all processes"
    ratio(name, ours.processor, goal=1.5, lower_is_better=True)
