"""Everything that the demo knows about Superbatch: starting the server, opening a run, reading batches, pushing weights."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import superbatch

from .data.packages import DemoError
from .evaluate import Evaluation
from .settings import Settings
from .train import Batch, Trainer, fit, start_rank

BINARY = Path(__file__).parents[2] / "target" / "debug" / "superbatch"
START_SECONDS = 60


@dataclass(frozen=True)
class Arm:
    """One training run through the service. Arms of a seed differ in the policy, and in nothing else."""

    policy: str
    seed: int
    settings: Settings
    dataset: Path
    learner: Path
    reference: Path
    folder: Path

    @property
    def run_id(self) -> str:
        return f"demo-{self.policy}-{self.seed}"

    @property
    def label(self) -> str:
        return f"{self.policy} (seed {self.seed})"


def run_spec(arm: Arm) -> superbatch.RunSpec:
    settings = arm.settings
    return superbatch.RunSpec(
        run_id=arm.run_id,
        sources=[(arm.dataset / "pool").as_uri()],
        learner=superbatch.Learner(arm.learner.as_uri(), snapshot_uri=(arm.learner / "model.safetensors").as_uri()),
        reference=arm.reference.as_uri(),
        phases=[superbatch.Phase(
            policy=arm.policy, super_batch_size=settings.super_batch_size, sub_batch_size=settings.sub_batch_size,
            n_chunks=settings.n_chunks)],
        loss="sigmoid",
        seed=arm.seed,
        micro_batch_rows=128,
    )


def service_batches(run: superbatch.Run, rank: int, settings: Settings) -> Iterator[Batch]:
    """This rank's slices, step by step, fetched ahead by the client."""
    for batch in run.batches(rank=rank, world_size=settings.world_size, start_step=0):
        cost = batch.receipt.cost
        flops = sum((cost.reference_flops, cost.learner_flops, cost.selection_flops, cost.discarded_flops, cost.train_flops))
        yield Batch(batch.step, values(batch["image"]), values(batch["caption"]), values(batch["_superbatch_id"]),
                    cost.candidates_scanned, flops)


def values(column: object) -> list:
    return pyarrow.array(column).to_pylist()


def rank_main(rank: int, arm: Arm, address: str) -> None:
    start_rank(rank, arm.settings.world_size, arm.folder / "rendezvous")
    trainer = Trainer(arm.learner, arm.settings, rank)
    evaluation = Evaluation(arm.dataset / "eval", trainer.transform)
    run = superbatch.connect(address).open_run(run_spec(arm))

    def push(step: int) -> None:
        """All ranks hold the same weights, so one of them pushes. Uniform selection looks at no weights."""
        if rank == 0 and arm.policy != "uniform" and step + 1 < arm.settings.steps:
            run.push_weights(trainer.model.state_dict(), step=step)

    fit(trainer, service_batches(run, rank, arm.settings), evaluation, arm.label, arm.folder, push)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """`superbatch serve` on its embedded defaults, with state of its own under `folder`; gives its address."""
    if not BINARY.exists():
        raise DemoError(f"{BINARY} is missing: run `make build` (or `make demo`, which does).")
    shutil.rmtree(folder / "state", ignore_errors=True)
    address = f"127.0.0.1:{free_port()}"
    config = folder / "superbatch.yaml"
    config.write_text(json.dumps({"listen": address, "state": (folder / "state").as_uri()}, indent=2))
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen([BINARY, "serve", "--config", config], stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_until_up(server, address, log)
            yield f"http://{address}"
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_up(server: subprocess.Popen, address: str, log: Path) -> None:
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise DemoError(f"superbatch serve did not come up; the end of {log}:\n" + log.read_text()[-2000:])
