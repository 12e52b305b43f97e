"""Other ways to move the bytes that the service moves: plain gRPC streams, by tonic and by grpcio,
and Arrow Flight. None reads, checks or keeps anything.
"""

import functools
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import pyarrow
import pyarrow.flight

PLAIN = os.environ.get("SUPERBATCH_BENCH_PLAIN", "target/release/examples/plain")
PART = 1 << 20


class Tonic:
    """Streams between the two ends of `client/rust/examples/plain.rs`, a process of its own."""

    def __init__(self):
        self.process = subprocess.Popen(
            [PLAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def moved(self, way: str, size: int) -> int:
        """Moves about `size` bytes; `way` is "send" or "take". Returns how many."""
        self.process.stdin.write(f"{way} {size // PART}\n")
        self.process.stdin.flush()
        moved = int(self.process.stdout.readline())
        assert moved == size // PART * PART, (moved, size)
        return moved

    def __enter__(self) -> "Tonic":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def served(server: Callable[["multiprocessing.Queue[str]"], None]) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: the address that it puts into the queue, and its id."""
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    process = context.Process(target=server, args=(address,), daemon=True)
    process.start()
    try:
        yield address.get(), process.pid
    finally:
        process.kill()


def stream_server(address: "multiprocessing.Queue[str]") -> None:
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


class Grpcio:
    """Streams from a server by grpcio, a process of its own, to this one, and back."""

    def __init__(self, channel: grpc.Channel, pid: int):
        self.channel, self.pid = channel, pid

    def moved(self, way: str, size: int) -> int:
        """As [`Tonic.moved`]."""
        count = size // PART
        if way == "send":
            parts = self.channel.unary_stream("/plain/send")(str(count).encode())
            return sum(map(len, parts))
        data = bytes(PART)
        return int(self.channel.stream_unary("/plain/take")(data for _ in range(count)))


@contextmanager
def grpcio() -> Iterator[Grpcio]:
    options = [("grpc.max_receive_message_length", 2 * PART)]
    with served(stream_server) as (address, pid):
        with grpc.insecure_channel(address, options=options) as channel:
            yield Grpcio(channel, pid)


class Flights(pyarrow.flight.FlightServerBase):
    """Record batches of the rows' size, from memory. A ticket is `batches,rows,image bytes`."""

    def do_get(
        self, context: pyarrow.flight.ServerCallContext, ticket: pyarrow.flight.Ticket
    ) -> pyarrow.flight.RecordBatchStream:
        batches, rows, image_bytes = map(int, ticket.ticket.decode().split(","))
        batch = flight_rows(rows, image_bytes)
        return pyarrow.flight.RecordBatchStream(pyarrow.Table.from_batches([batch] * batches))


@functools.cache
def flight_rows(rows: int, image_bytes: int) -> pyarrow.RecordBatch:
    images = [os.urandom(image_bytes) for _ in range(rows)]
    captions = [f"a picture {k}" for k in range(rows)]
    return pyarrow.record_batch({"jpg": pyarrow.array(images, "binary"), "caption": captions})


def flight_server(address: "multiprocessing.Queue[str]") -> None:
    with Flights("grpc://127.0.0.1:0") as server:
        address.put(f"grpc://127.0.0.1:{server.port}")
        server.serve()


class Flight:
    def __init__(self, client: pyarrow.flight.FlightClient, pid: int):
        self.client, self.pid = client, pid

    def moved(self, batches: int, rows: int, image_bytes: int) -> int:
        ticket = pyarrow.flight.Ticket(f"{batches},{rows},{image_bytes}".encode())
        table = self.client.do_get(ticket).read_all()
        assert len(table) == batches * rows
        return batches * rows * image_bytes


@contextmanager
def flights() -> Iterator[Flight]:
    with served(flight_server) as (address, pid):
        with pyarrow.flight.connect(address) as client:
            yield Flight(client, pid)
