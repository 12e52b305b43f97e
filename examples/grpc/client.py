"""A client made of the protocol alone: plain grpcio, generated stubs, pyarrow and XXH3.

    python examples/grpc/client.py --pool file:///data/pool --learner models/learner \\
        --reference models/reference

For other languages, read it as a list of what a client has to do; nothing here is special to
Python.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc_tools
import pyarrow
from google.protobuf import any_pb2
from grpc_tools import protoc
from safetensors.numpy import load_file
from xxhash import xxh3_128

PROTO = Path(__file__).resolve().parents[2] / "proto"
MESSAGE_BYTES = 1 << 20
# The largest message that the service sends is an answer's page of a receipt; grpcio takes 4 MiB by
# default.
OPTIONS = [("grpc.max_receive_message_length", 64 << 20)]


def stubs(folder: Path):
    """Generates messages and stubs from the .proto files, and imports them."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [str(path) for path in sorted((PROTO / "superbatch" / "v1").glob("*.proto"))]
    common = str(Path(grpc_tools.__file__).parent / "_proto")
    if protoc.main(
        [
            "protoc",
            f"-I{PROTO}",
            f"-I{common}",
            f"--python_out={folder}",
            f"--grpc_python_out={folder}",
            *sources,
        ]
    ):
        raise SystemExit("protoc refused the .proto files")
    # With these it is a package that comes before another `superbatch`, such as the Python client.
    for package in ("superbatch", "superbatch/v1"):
        (folder / package / "__init__.py").touch()
    sys.path.insert(0, str(folder))
    from superbatch.v1 import selection_pb2, selection_pb2_grpc

    return selection_pb2, selection_pb2_grpc


def reason_of(error: grpc.RpcError) -> str:
    """The reason of errors.proto, from google.rpc.ErrorInfo in the status details; "" where there
    is none.
    """
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    # google.rpc.Status: field 3 are Any messages. ErrorInfo: field 1 is the reason.
    for number, value in fields(details):
        if number == 3:
            packed = any_pb2.Any.FromString(value)
            if packed.type_url.endswith("google.rpc.ErrorInfo"):
                return next(
                    (text.decode() for field, text in fields(packed.value) if field == 1), ""
                )
    return ""


def fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a message, for those whose .proto is not at hand."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        tag = varint()
        size = varint()
        if tag & 7 == 2:
            yield tag >> 3, data[at : at + size]
            at += size


PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED}


def patiently(call, attempts: int = 8):
    """Faults that pass are tried again, with waits that grow and differ between ranks."""
    for attempt in range(attempts):
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() not in PASSING or attempt + 1 == attempts:
                raise
            time.sleep(random.uniform(0.5, 1) * min(10, 0.1 * 2**attempt))


class Client:
    """One rank of a run."""

    def __init__(self, address: str, folder: Path, run_id: str, rank: int = 0, world_size: int = 1):
        self.pb, rpc = stubs(folder)
        self.channel = grpc.insecure_channel(address.removeprefix("http://"), OPTIONS)
        self.service = rpc.SelectionServiceStub(self.channel)
        self.run_id, self.rank, self.world_size = run_id, rank, world_size
        self.generation, self.pushed = 0, None

    def open(self, spec):
        """Opens the run, or joins it. Returns the answer: spec with defaults filled, next_step,
        schema, sizes.
        """
        request = self.pb.OpenRunRequest(run_id=self.run_id, spec=spec)
        opened = patiently(lambda: self.service.OpenRun(request))
        self.generation = opened.generation
        return opened

    def missing_pushes(self, start_step: int) -> list[int]:
        """Pushes that a crash lost and that steps from `start_step` on wait for."""
        request = self.pb.GetRunRequest(run_id=self.run_id, resume_step=start_step)
        return list(patiently(lambda: self.service.GetRun(request)).run.missing_pushes)

    def select(self, step: int):
        """The receipt's summary and the rows of a step. A stream that breaks goes on at the byte
        where it broke.
        """
        got, summary = bytearray(), None

        def read() -> None:
            nonlocal summary
            request = self.pb.SelectBatchRequest(
                run_id=self.run_id,
                generation=self.generation,
                step=step,
                rank=self.rank,
                world_size=self.world_size,
                intent=self.pb.INTENT_NEED,
                resume_offset=len(got),
                consumed_through=step - 1 if step else None,
                pushing_through=self.pushed,
            )
            trailer = None
            for message in self.service.SelectBatch(request):
                kind = message.WhichOneof("message")
                if kind == "header":
                    summary = message.header.receipt
                elif kind == "arrow_ipc":
                    got.extend(message.arrow_ipc)
                else:
                    trailer = message.trailer
            if trailer is None or xxh3_128(got).digest() != trailer.xxh3:
                got.clear()
                raise RuntimeError(f"step {step}: the batch arrived damaged or cut short")

        patiently(read)
        return summary, pyarrow.ipc.open_stream(bytes(got)).read_all()

    def push(self, weights: dict, step: int):
        """All weights after `step` (-1: the initial ones), by this rank alone. Returns the version
        that was published.
        """
        self.pushed = step
        push_id = f"{self.generation}-{step}"
        return patiently(
            lambda: self.service.PushWeights(self._parts(weights, step, push_id))
        ).published

    def _parts(self, weights: dict, step: int, push_id: str) -> Iterator:
        pb = self.pb
        yield pb.PushWeightsRequest(
            start=pb.PushStart(
                run_id=self.run_id,
                generation=self.generation,
                step=step,
                push_id=push_id,
                rank=self.rank,
            )
        )
        for name, array in weights.items():
            data, shape = array.astype("<f4").tobytes(), array.shape
            yield pb.PushWeightsRequest(
                part=pb.PartHeader(
                    name=name,
                    dtype=pb.TENSOR_DTYPE_F32,
                    global_shape=shape,
                    start=[0] * len(shape),
                    extent=shape,
                    xxh3=xxh3_128(data).digest(),
                )
            )
            for at in range(0, len(data), MESSAGE_BYTES):
                yield pb.PushWeightsRequest(data=data[at : at + MESSAGE_BYTES])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--service", default="http://127.0.0.1:50051")
    parser.add_argument("--run-id", default="grpc", help="the run's id")
    parser.add_argument("--pool", required=True, help="URI of the candidates")
    parser.add_argument(
        "--learner",
        type=Path,
        required=True,
        help="a SigLIP folder of transformers, with initial weights",
    )
    parser.add_argument(
        "--reference", type=Path, required=True, help="a folder with the frozen model"
    )
    parser.add_argument(
        "--stubs", type=Path, default=Path("stubs"), help="where generated code goes"
    )
    parser.add_argument("--super-batch-size", type=int, default=640)
    parser.add_argument("--sub-batch-size", type=int, default=128)
    parser.add_argument("--start-step", type=int, default=0, help="the step after a checkpoint's")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args(argv)

    client = Client(args.service, args.stubs, args.run_id)
    pb = client.pb
    spec = pb.RunSpec(
        sources=[pb.Source(uri=args.pool)],
        learner=pb.LearnerSpec(model_uri=args.learner.absolute().as_uri(), first_push=True),
        reference=pb.ReferenceSpec(model_uri=args.reference.absolute().as_uri()),
        phases=[
            pb.Phase(
                policy=pb.POLICY_JOINT,
                super_batch_size=args.super_batch_size,
                sub_batch_size=args.sub_batch_size,
                n_chunks=4,
            )
        ],
        loss=pb.LOSS_SIGMOID,
    )
    try:
        weights = load_file(args.learner / "model.safetensors")
        train(client, spec, weights, args.start_step, args.steps)
    except grpc.RpcError as error:
        raise SystemExit(f"{reason_of(error) or error.code().name}: {error.details()}") from None


def train(client: Client, spec, weights: dict, start_step: int, steps: int) -> None:
    """Where a trainer would be."""
    opened = client.open(spec)
    print(f"{opened.dataset_rows} rows; the service has chosen up to step {opened.next_step - 1}")
    # The initial weights, or once more the checkpoint's. A crash may have lost the newest pushes:
    # two may have been on their way, since a step is scored one step ahead. If a push is published
    # already, its repetition changes nothing.
    for step in sorted({*client.missing_pushes(start_step), start_step - 1}):
        client.push(weights, step=step)
    for step in range(start_step, steps):
        summary, rows = client.select(step)
        # A trainer trains here, on rows["image"] and rows["caption"].
        version = client.push(weights, step=step)
        print(
            f"step {step}: {len(rows)} rows, batch score {summary.batch_score:.3f}, scored with "
            f"the weights of step {summary.learner.step}; published version {version.version}"
        )


if __name__ == "__main__":
    main()
