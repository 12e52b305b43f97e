"""What the service's two large data paths cost beside other ways to move the same bytes, as ratios
of one run.

    make bench-service

`Rows` go from Parquet to a trainer, through reading, checking, hashing and two gRPC streams;
`weights` go from a trainer to durable snapshots. Processor time is of all processes that take part.
Every figure is the best of several taken in turns.
"""

import functools
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy
import pyarrow
import pyarrow.flight
import pyarrow.parquet
import safetensors.torch
import superbatch
import torch
from cluster import Cluster
from PIL import Image

from examples.demo import tiny
from examples.demo.model import write_folder

ROWS, IMAGE_BYTES, ROW_GROUP, BATCH = 4096, 60_000, 256, 512
STEPS, ROUNDS, RANKS = 8, 5, 4
PART = 1 << 20
# About 100 million weights.
LARGE = {**tiny.SHAPE, "width": 768, "heads": 12, "mlp": 3072, "vision_layers": 7, "text_layers": 7}


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


def processor_seconds(*processes: int) -> float:
    """Of other processes, user and system."""
    total = 0.0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


class Timed:
    """The least of seconds, and of processor seconds, that a gigabyte took."""

    def __init__(self, name: str):
        self.name, self.seconds, self.processor = name, float("inf"), float("inf")

    def take(self, work: Callable[[], int], *processes: int) -> None:
        begun, own, others = time.perf_counter(), time.process_time(), processor_seconds(*processes)
        gigabytes = work() / 1e9
        self.seconds = min(self.seconds, (time.perf_counter() - begun) / gigabytes)
        used = time.process_time() - own + processor_seconds(*processes) - others
        self.processor = min(self.processor, used / gigabytes)


def show(title: str, ours: Timed, peers: list[Timed]) -> None:
    print(
        f"\n{title}\n{'':44}{'MB/s':>8}{'s/GB':>8}{'processor s/GB':>16}"
        f"{'time, ours = 1':>16}{'processor':>11}"
    )
    for peer in peers:
        # A line that `make bench` gathers.
        print(
            f"ratio\t{title.split(':')[0]}: speed of {peer.name}\t{peer.seconds / ours.seconds:.3f}"
        )
    for row in (ours, *peers):
        print(
            f"{row.name:44}{1e3 / row.seconds:8.0f}{row.seconds:8.2f}{row.processor:16.2f}"
            f"{row.seconds / ours.seconds:16.2f}{row.processor / ours.processor:11.2f}"
        )


def read_by_arrow(folder: Path) -> Iterator[pyarrow.Table]:
    """The limit: the same row groups, read and put into an order, by the process that wants
    them.
    """
    while True:
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
        for table in read_by_arrow(self.folder):
            yield table["jpg"].to_pylist(), table["caption"].to_pylist()


def stream_server(folder: str, address: "multiprocessing.Queue[str]") -> None:
    """Plain gRPC: streams bytes from memory, and takes them."""
    data = os.urandom(PART)

    def send(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in range(int(request)):
            yield data

    def take(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return str(sum(map(len, requests))).encode()

    server = grpc.server(
        futures.ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 2 * PART)]
    )
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "plain",
                {
                    "send": grpc.unary_stream_rpc_method_handler(send),
                    "take": grpc.stream_unary_rpc_method_handler(take),
                },
            )
        ]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    address.put(f"127.0.0.1:{port}")
    server.wait_for_termination()


class Flights(pyarrow.flight.FlightServerBase):
    """Arrow Flight: record batches of the rows' size, from memory."""

    def do_get(
        self, context: pyarrow.flight.ServerCallContext, ticket: pyarrow.flight.Ticket
    ) -> pyarrow.flight.RecordBatchStream:
        table = flight_rows()
        return pyarrow.flight.RecordBatchStream(pyarrow.Table.from_batches([table] * STEPS))


@functools.cache
def flight_rows() -> pyarrow.RecordBatch:
    images = [os.urandom(IMAGE_BYTES) for _ in range(BATCH)]
    captions = [f"a picture {k}" for k in range(BATCH)]
    return pyarrow.record_batch({"jpg": pyarrow.array(images, "binary"), "caption": captions})


def flight_server(address: "multiprocessing.Queue[str]") -> None:
    with Flights("grpc://127.0.0.1:0") as server:
        flight_rows()
        address.put(f"grpc://127.0.0.1:{server.port}")
        server.serve()


@contextmanager
def flights() -> Iterator[tuple[pyarrow.flight.FlightClient, int]]:
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    server = context.Process(target=flight_server, args=(address,), daemon=True)
    server.start()
    try:
        with pyarrow.flight.connect(address.get()) as client:
            yield client, server.pid
    finally:
        server.kill()


@contextmanager
def plain_grpc() -> Iterator[tuple[grpc.Channel, int]]:
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    server = context.Process(target=stream_server, args=("", address), daemon=True)
    server.start()
    try:
        with grpc.insecure_channel(
            address.get(), options=[("grpc.max_receive_message_length", 2 * PART)]
        ) as channel:
            yield channel, server.pid
    finally:
        server.kill()


def bench_rows(
    folder: Path,
    cluster: Cluster,
    channel: grpc.Channel,
    plain: int,
    flight: pyarrow.flight.FlightClient,
    flying: int,
) -> None:
    data = folder / "rows"
    write_rows(data)
    phase = superbatch.Phase(policy="uniform", super_batch_size=BATCH, sub_batch_size=BATCH)
    run = superbatch.connect(cluster.address).open_run(
        superbatch.RunSpec(run_id="rows", sources=[data.as_uri()], phases=[phase])
    )
    batches, tables = iter(run.batches(rank=0, world_size=1, start_step=0)), read_by_arrow(data)
    loader = torch.utils.data.DataLoader(ParquetRows(data), batch_size=None, num_workers=1)
    loaded = iter(loader)
    size = BATCH * IMAGE_BYTES

    def repeated(one: Callable[[], object]) -> Callable[[], int]:
        def work() -> int:
            for _ in range(STEPS):
                one()
            return STEPS * size

        return work

    def streamed() -> int:
        count = STEPS * size // PART
        return sum(map(len, channel.unary_stream("/plain/send")(str(count).encode())))

    def again() -> None:
        run.select(ready, rank=0, world_size=1)

    ours = Timed("superbatch, uniform")
    arrow, torch_loader, plain_stream = (
        Timed("pyarrow in the trainer's own thread"),
        Timed("torch DataLoader over the same files, 1 worker"),
        Timed("a plain gRPC stream from memory (grpcio)"),
    )

    def flown() -> int:
        table = flight.do_get(pyarrow.flight.Ticket(b"")).read_all()
        assert len(table) == STEPS * BATCH
        return STEPS * size

    asked_again = Timed("superbatch, a ready step asked for again")
    by_flight = Timed("Arrow Flight from memory (pyarrow.flight)")
    next(batches), next(loaded)
    server = cluster.coordinator.process.pid
    (worker,) = (process.pid for process in loaded._workers)
    for _ in range(ROUNDS):
        ours.take(repeated(lambda: next(batches)), server)
        # Asked for just now, so it is in memory. The same rank asks again.
        ready = next(batches).step
        asked_again.take(repeated(again), server)
        arrow.take(repeated(lambda: next(tables)))
        torch_loader.take(repeated(lambda: next(loaded)), worker)
        plain_stream.take(streamed, plain)
        by_flight.take(flown, flying)
    show(
        f"Rows: {BATCH} of {IMAGE_BYTES // 1000} kB a step, one rank",
        ours,
        [asked_again, arrow, torch_loader, plain_stream, by_flight],
    )


def bench_weights(folder: Path, cluster: Cluster, channel: grpc.Channel, plain: int) -> None:
    model = write_folder(folder / "large", tiny.captions(), 0, LARGE)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    size = sum(tensor.nbytes for tensor in weights.values())
    # The first steps look at no weights, so that a push waits for nothing but itself.
    sizes = {"super_batch_size": 8, "sub_batch_size": 4}
    phases = [
        superbatch.Phase(policy="uniform", **sizes),
        superbatch.Phase(policy="joint", from_step=1000, **sizes),
    ]
    spec = superbatch.RunSpec(
        run_id="weights",
        sources=[(folder / "rows").as_uri()],
        reference=model.as_uri(),
        phases=phases,
        learner=superbatch.Learner(model_uri=model.as_uri(), first_push=True),
    )
    # Each rank is a client of its own, as in a process of its own.
    ranks = [superbatch.connect(cluster.address).open_run(spec) for _ in range(RANKS)]
    run = ranks[0]
    for step in range(2 * ROUNDS + 2):
        run.select(step, rank=0, world_size=1)
    pushes = iter(range(-1, 1 << 30))
    trainer, copy = [], []

    def pushed() -> int:
        # As after a step of training: other weights, which the worker has not loaded yet.
        weights["logit_bias"].add_(0.01)
        begun = time.perf_counter()
        run.push_weights(weights, step=next(pushes))
        trainer.append(time.perf_counter() - begun)
        run.flush()
        return size

    def pushed_by_ranks() -> int:
        """By four ranks at once, each with a quarter of every tensor's first dimension."""
        weights["logit_bias"].add_(0.01)
        step, shares = next(pushes), [[] for _ in range(RANKS)]
        for name, tensor in weights.items():
            if tensor.ndim == 0 or len(tensor) < RANKS:
                shares[0].append((name, tensor, tensor.shape, [0] * tensor.ndim))
                continue
            for rank, part in enumerate(tensor.chunk(RANKS)):
                first = sum(len(p) for p in tensor.chunk(RANKS)[:rank])
                shares[rank].append((name, part, tensor.shape, [first] + [0] * (tensor.ndim - 1)))
        total = sum(map(len, shares))

        def push(rank: int) -> None:
            ranks[rank].push_parts(shares[rank], step=step, expected_parts=total, rank=rank)
            ranks[rank].flush()

        with futures.ThreadPoolExecutor(RANKS) as threads:
            list(threads.map(push, range(RANKS)))
        return size

    def copied() -> None:
        begun = time.perf_counter()
        kept = [tensor.clone() for tensor in weights.values()]
        copy.append(time.perf_counter() - begun)
        del kept

    def saved(save: Callable[[Path], None]) -> Callable[[], int]:
        def work() -> int:
            path = folder / "saved"
            save(path)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            return size

        return work

    def taken() -> int:
        data = bytes(PART)
        return int(channel.stream_unary("/plain/take")(data for _ in range(size // PART)))

    ours = Timed("superbatch, durable and verified")
    by_ranks = Timed(f"superbatch, by {RANKS} ranks")
    file, pickle, plain_stream = (
        Timed("safetensors.torch.save_file and fsync"),
        Timed("torch.save and fsync"),
        Timed("a plain gRPC stream to memory (grpcio)"),
    )
    server = cluster.coordinator.process.pid
    for _ in range(ROUNDS):
        ours.take(pushed, server)
        copied()
        by_ranks.take(pushed_by_ranks, server)
        file.take(saved(lambda path: safetensors.torch.save_file(weights, path)))
        pickle.take(saved(lambda path: torch.save(weights, path)))
        plain_stream.take(taken, plain)
    peers = [by_ranks, file, pickle, plain_stream]
    show(f"Weights: a push of {size / 1e6:.0f} MB in f32", ours, peers)
    blocked, copying = min(trainer), min(copy)
    print(f"the trainer's thread: {blocked:.3f} s, a copy of the tensors {copying:.3f} s")
    print(f"ratio\tWeights, trainer's thread: speed of a copy\t{copying / blocked:.3f}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, plain_grpc() as (channel, plain):
        folder = Path(name)
        with Cluster(folder / "service") as cluster:
            with flights() as (flight, flying):
                bench_rows(folder, cluster, channel, plain, flight, flying)
            bench_weights(folder, cluster, channel, plain)


if __name__ == "__main__":
    sys.exit(main())
