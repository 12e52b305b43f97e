"""One rank of the trainer, in a process of its own."""

import hashlib
import json
import math
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import superbatch
import torch
from safetensors.torch import load_file

#: What passes: the rank asks again, of the next coordinator.
PASSES = {
    "UNAVAILABLE",
    "NO_WORKERS",
    "OVERLOADED",
    "SHUTTING_DOWN",
    "STORAGE_UNREACHABLE",
    "NEED_DEADLINE",
    "WEIGHTS_MISSING",
    "NOT_OWNER",
}
#: What a rank is told whose trainer was started anew.
REPLACED = "WORLD_SIZE_CONFLICT"


@dataclass(frozen=True)
class Place:
    """What a rank has to know."""

    spec: superbatch.RunSpec
    addresses: tuple[str, ...]
    incarnation: str
    rank: int
    world_size: int
    start_step: int
    sharded: bool
    #: File of the learner's first weights.
    weights: str
    #: What it did, a JSON object a line.
    log: str
    #: File that says where to end, once that is known.
    end: str
    #: How long training on a batch takes, in seconds.
    training: float


class Log:
    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def __call__(self, what: str, **values) -> None:
        line = json.dumps({"at": monotonic(), "what": what, **values})
        os.write(self.file, f"{line}\n".encode())


def weights(initial: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """What the trainer has after `step`: the same on every call and every rank."""
    factor = 1 + 0.2 * math.sin(0.7 * (step + 1))
    return {name: tensor * factor for name, tensor in initial.items()}


def digest(batch: superbatch.Batch) -> str:
    """Of all that the rank was given to train on."""
    contents = [(name, batch[name].to_pylist()) for name in batch.column_names]
    return hashlib.sha256(repr(contents).encode()).hexdigest()


def push(run: superbatch.Run, place: Place, state: dict, step: int) -> None:
    if not place.sharded:
        run.push_weights(state, step=step, rank=place.rank)
        return
    parts = list(sharded(state, place.world_size))
    mine = [part for rank, *part in parts if rank == place.rank]
    run.push_parts(mine, step=step, expected_parts=len(parts), rank=place.rank)


def sharded(state: dict, world_size: int) -> Iterator[tuple]:
    """(rank, name, block, global shape, start): the first dimension is cut, as FSDP does."""
    for name, tensor in state.items():
        if tensor.dim() == 0 or tensor.shape[0] < world_size:
            yield 0, name, tensor, tuple(tensor.shape), (0,) * tensor.dim()
            continue
        first = 0
        for rank, block in enumerate(torch.tensor_split(tensor, world_size)):
            yield rank, name, block, tuple(tensor.shape), (first,) + (0,) * (tensor.dim() - 1)
            first += block.shape[0]


def main(place: Place) -> None:
    torch.set_num_threads(1)
    log, initial = Log(place.log), load_file(place.weights)
    log("started", pid=os.getpid())
    try:
        run_to_end(place, log, initial)
    except Exception:
        log("fatal", reason="EXCEPTION", message=traceback.format_exc())
        raise


def run_to_end(place: Place, log: Log, initial: dict) -> None:
    following, addresses = place.start_step, list(place.addresses)
    while True:
        try:
            for step in train(place, log, initial, addresses[0], following):
                following = step + 1
            log("done")
            return
        except superbatch.Error as error:
            told = {"reason": error.reason, "message": str(error), "address": addresses[0]}
            log("error", **told)
            if error.reason == REPLACED:
                return
            if error.reason not in PASSES:
                log("fatal", **told)
                return
            addresses.append(addresses.pop(0))
            if (owner := error.metadata.get("owner")) in addresses:
                addresses.remove(owner)
                addresses.insert(0, owner)
            else:
                # One that is not there says so at once.
                sleep(0.05)


def train(place: Place, log: Log, initial: dict, address: str, following: int) -> Iterator[int]:
    """Trains until the end, and yields each step that it has trained on."""
    client = superbatch.connect(address, timeout=2.0, retry_attempts=6, retry_seconds=5.0)
    run = client.open_run(place.spec, incarnation=place.incarnation)
    missing = run.missing_pushes(following)
    log("opened", address=address, following=following, missing=missing)
    for step in missing:
        push(run, place, weights(initial, step), step)
    batches = run.batches(
        rank=place.rank, world_size=place.world_size, start_step=following, prefetch=1
    )
    for batch in batches:
        log(
            "batch",
            step=batch.step,
            rank=place.rank,
            world_size=place.world_size,
            digest=digest(batch),
            nonce=batch.receipt.writer_nonce,
        )
        sleep(place.training)
        push(run, place, weights(initial, batch.step), batch.step)
        end = Path(place.end)
        if end.exists() and batch.step + 1 >= int(end.read_text()):
            run.flush()
            yield batch.step
            return
        yield batch.step
