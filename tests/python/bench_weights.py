"""Weights from a trainer to durable snapshots that a worker has verified, beside saving them and
plain streams: a part of `make bench-service`.
"""

import os
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from statistics import median
from time import perf_counter

import safetensors.torch
import superbatch
import torch
from bench_peers import Grpcio, Tonic
from bench_timed import ENVIRONMENT, Timed, ratio, show, speed
from cluster import Cluster, Process

from examples.demo import tiny
from examples.demo.model import write_folder

RANKS = 4
#: About 100 million weights, 429 MB in f32.
LARGE = {**tiny.SHAPE, "width": 768, "heads": 12, "mlp": 3072, "vision_layers": 7, "text_layers": 7}
#: About 400 million weights, 0.8 GB in bf16.
LARGER = {
    **tiny.SHAPE,
    "width": 1024,
    "heads": 16,
    "mlp": 4096,
    "vision_layers": 16,
    "text_layers": 16,
}
#: What the larger one needs: a reference and up to four states of a learner, each in f32.
LARGER_BYTES = 16 << 30
SIZES = {"super_batch_size": 8, "sub_batch_size": 4}


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) << 10


def made(folder: Path, shape: dict, dtype: torch.dtype) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model's folder, and weights as its trainer holds them."""
    model = write_folder(folder, tiny.captions(), 0, shape)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    return model, {name: tensor.to(dtype) for name, tensor in weights.items()}


def bytes_of(weights: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def trained(weights: dict[str, torch.Tensor]) -> None:
    """As after a step of training: other weights, which the worker has not loaded yet."""
    # One that is not lost in bf16, at about 10.
    weights["logit_bias"].add_(0.125)


def shares(weights: dict[str, torch.Tensor]) -> list[list[tuple]]:
    """For each rank a quarter of every tensor's first dimension."""
    parts = [[] for _ in range(RANKS)]
    for name, tensor in weights.items():
        if tensor.ndim == 0 or len(tensor) < RANKS:
            parts[0].append((name, tensor, tensor.shape, [0] * tensor.ndim))
            continue
        first = 0
        for rank, part in enumerate(tensor.chunk(RANKS)):
            begins = [first] + [0] * (tensor.ndim - 1)
            parts[rank].append((name, part, tensor.shape, begins))
            first += len(part)
    return parts


class Trainer:
    """One that pushes, by one rank or by all."""

    def __init__(self, cluster: Cluster, rows: Path, model: Path, weights: dict, run_id: str):
        # The first steps look at no weights, so that a push waits for nothing but itself.
        phases = [
            superbatch.Phase(policy="uniform", **SIZES),
            superbatch.Phase(policy="joint", from_step=1000, **SIZES),
        ]
        spec = superbatch.RunSpec(
            run_id=run_id,
            sources=[rows.as_uri()],
            reference=model.as_uri(),
            phases=phases,
            learner=superbatch.Learner(model_uri=model.as_uri(), first_push=True),
        )
        # Each rank is a client of its own, as in a process of its own.
        self.ranks = [superbatch.connect(cluster.address).open_run(spec) for _ in range(RANKS)]
        self.weights, self.size = weights, bytes_of(weights)
        #: Seconds for which `push_weights` held the trainer's thread.
        self.held = []
        self.step = -2

    def take_steps(self, count: int) -> None:
        for step in range(count):
            self.ranks[0].select(step, rank=0, world_size=1)

    def push(self) -> int:
        trained(self.weights)
        self.step += 1
        begun = perf_counter()
        self.ranks[0].push_weights(self.weights, step=self.step)
        self.held.append(perf_counter() - begun)
        self.ranks[0].flush()
        return self.size

    def push_by_ranks(self) -> int:
        trained(self.weights)
        self.step += 1
        parts = shares(self.weights)
        total = sum(map(len, parts))

        def push(rank: int) -> None:
            run = self.ranks[rank]
            run.push_parts(parts[rank], step=self.step, expected_parts=total, rank=rank)
            run.flush()

        with futures.ThreadPoolExecutor(RANKS) as threads:
            list(threads.map(push, range(RANKS)))
        return self.size


def bench_pushes(
    folder: Path,
    cluster: Cluster,
    tonic: Tonic,
    grpcio: Grpcio,
    shape: dict = LARGE,
    dtype: torch.dtype = torch.float32,
    rounds: int = 5,
) -> None:
    kind = str(dtype).removeprefix("torch.")
    title = "Weights" if dtype == torch.float32 else f"Weights in {kind}"
    model, weights = made(folder / f"model-{kind}", shape, dtype)
    trainer = Trainer(cluster, folder / "rows", model, weights, f"weights-{kind}")
    trainer.take_steps(2 * rounds + 2)
    size, copies = trainer.size, []

    def copied() -> None:
        begun = perf_counter()
        kept = [tensor.clone() for tensor in weights.values()]
        copies.append(perf_counter() - begun)
        del kept

    def saved(save: Callable[[Path], None]) -> Callable[[], int]:
        def work() -> int:
            path = folder / "saved"
            save(path)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            return size

        return work

    ours, by_ranks = (
        Timed("superbatch, durable and verified"),
        Timed(f"superbatch, by {RANKS} ranks at once"),
    )
    file, pickle = Timed("safetensors.torch.save_file and fsync"), Timed("torch.save and fsync")
    by_tonic = Timed("a plain gRPC stream to memory (tonic)")
    by_grpcio = Timed("a plain gRPC stream to memory (grpcio)")
    server = cluster.coordinator.process.pid
    for _ in range(rounds):
        ours.take(trainer.push, server)
        copied()
        by_ranks.take(trainer.push_by_ranks, server)
        file.take(saved(lambda path: safetensors.torch.save_file(weights, path)))
        pickle.take(saved(lambda path: torch.save(weights, path)))
        by_tonic.take(lambda: tonic.moved("take", size), tonic.pid)
        by_grpcio.take(lambda: grpcio.moved("take", size), grpcio.pid)
    others = [by_ranks, file, pickle, by_tonic, by_grpcio]
    show(f"{title}: a push of {size / 1e6:.0f} MB", ours, others)
    speed(title, ours, file, goal=0.667)
    speed(title, ours, pickle)
    speed(title, ours, by_tonic)
    speed(title, ours, by_grpcio)
    # As a multiple of one rank's: more is better.
    ratio(
        f"{title}: {RANKS} ranks' speed, of one rank's",
        ours.seconds / by_ranks.seconds,
        goal=0.9,
        processor=ours.processor / by_ranks.processor,
    )
    blocked, copying = min(trainer.held), min(copies)
    print(f"the trainer's thread: {blocked:.3f} s, a copy of the tensors {copying:.3f} s")
    ratio(f"{title}, trainer's thread: speed of a copy", copying / blocked, goal=0.77)
    trainer.ranks[0].close()


def status(process: int, field: str) -> int:
    """Bytes of memory, as `/proc` has them."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[field].split()[0]) << 10


class FirstSlice:
    """A run of which each second step is the first that a push's weights score."""

    def __init__(self, cluster: Cluster, pool: Path, model: Path, weights: dict):
        scorers: list[Process] = cluster.workers or [cluster.coordinator]
        self.pids = [scorer.process.pid for scorer in scorers]
        self.weights, self.size = weights, bytes_of(weights)
        spec = superbatch.RunSpec(
            run_id="first",
            sources=[pool.as_uri()],
            reference=model.as_uri(),
            phases=[superbatch.Phase(policy="joint", **SIZES)],
            learner=superbatch.Learner(model_uri=model.as_uri(), first_push=True),
            # Step s is scored with the newest push of step s-2 or before.
            push_every_steps=2,
        )
        self.run = superbatch.connect(cluster.address).open_run(spec)
        self.push(-1)
        for step in range(3):
            self.selected(step)
        self.step = 3

    def push(self, step: int) -> int:
        trained(self.weights)
        self.run.push_weights(self.weights, step=step)
        return self.run.flush().version

    def selected(self, step: int) -> tuple[float, int]:
        """The seconds that a step takes, and the version of the weights that scored it."""
        begun = perf_counter()
        batch = self.run.select(step, rank=0, world_size=1)
        return perf_counter() - begun, batch.receipt.learner.version

    def turn(self) -> tuple[float, float]:
        """How much later the first step comes than the second, and the most memory of a process
        beyond what it held before or holds after, by the size of the weights.
        """
        before = [status(pid, "VmRSS") for pid in self.pids]
        for pid in self.pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        pushed = self.push(self.step - 2)
        first, second = self.selected(self.step), self.selected(self.step + 1)
        assert first[1] == second[1] == pushed, (first, second, pushed)
        self.step += 2
        beyond = []
        for pid, held in zip(self.pids, before, strict=True):
            beyond.append(status(pid, "VmHWM") - max(held, status(pid, "VmRSS")))
        return first[0] - second[0], max(beyond) / self.size


def bench_first_slice(folder: Path, workers: int, rounds: int = 5, warm: int = 4) -> None:
    """How much later the first step is that a push's weights score, than the next one, which they
    score too; and the memory that this takes. `warm` rounds before fill a worker's places for
    models.
    """
    model, weights = made(folder / f"model-first-{workers}", LARGE, torch.float32)
    # Few rows, whose reference embeddings are all kept after the first rounds.
    pool = tiny.write_dataset(folder / f"pool-{workers}", rows=256, row_group_rows=32)
    where = f"{workers} workers of their own" if workers else "the coordinator's own worker"
    path, turns, reads = folder / "read", [], []
    safetensors.torch.save_file(weights, path)
    with Cluster(folder / f"first-{workers}", workers=workers, environment=ENVIRONMENT) as cluster:
        measured = FirstSlice(cluster, pool, model, weights)
        for _ in range(warm + rounds):
            turns.append(measured.turn())
            begun = perf_counter()
            path.read_bytes()
            reads.append(perf_counter() - begun)
        measured.run.close()
    # The difference of two times may be anything once; so the middle of them counts.
    delay, beyond = (median(values) for values in zip(*turns[warm:], strict=True))
    print(
        f"\nThe first step after a push of {measured.size / 1e6:.0f} MB, {where}: {delay:.3f} s "
        f"later than the next; reading the file takes {min(reads):.3f} s; {beyond:.2f} times the "
        "weights in memory beyond what stays"
    )
    name = f"Weights, first slice by {where}"
    late = max(delay, 0.0) / min(reads)
    ratio(f"{name}: its delay, of reading the file", late, lower_is_better=True)
    # The coordinator's own worker shares a process with what receives the push.
    if workers:
        what = f"{name}: memory beyond the models, of the weights"
        ratio(what, beyond, goal=1.2, lower_is_better=True)
