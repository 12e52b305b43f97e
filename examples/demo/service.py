"""Everything that the demo knows about Superbatch: starting the server, opening a run, reading
batches, pushing weights.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import superbatch
import torch

from .data.packages import DemoError
from .evaluate import Evaluation
from .model import Transform
from .report import PROBES
from .settings import Selection, Settings
from .train import Batch, Trainer, fit, run_ranks, start_rank

BINARY = Path(
    os.environ.get("SUPERBATCH_BINARY")
    or Path(__file__).parents[2] / "target" / "debug" / "superbatch"
)
STOP_SECONDS = 40
# How often, and on how many candidates, an arm that scores small pictures compares what it would
# have chosen at full size. It is on the arm's bill.
PROBE_STEPS, PROBE_ROWS = 40, 256
# The trainer has the same cores. LibTorch's OpenMP threads spin while they wait for each other:
# that takes the trainer's time, and with every core busy a step was seen to cost three times as
# much.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Arm:
    """One training run through the service. Arms of a seed differ in who selects, and in nothing
    else.
    """

    selection: Selection
    seed: int
    settings: Settings
    dataset: Path
    learner: Path
    reference: Path
    folder: Path
    # The weights that the learner begins with; its folder's own if None.
    start: Path | None = None
    # Candidates of a lower CLIPScore are left out.
    clip_score_at_least: float | None = None
    # Whose names it is judged on.
    split: str = "test"

    @property
    def weights(self) -> Path:
        return self.start or self.learner / "model.safetensors"

    @property
    def run_id(self) -> str:
        return f"demo-{self.selection.name}-{self.seed}"

    @property
    def label(self) -> str:
        return f"{self.selection.name} (seed {self.seed})"


def fidelity(selection: Selection) -> dict:
    """What an arm that scores and trains small pictures adds to its phase."""
    if selection.low_side is None:
        return {}
    return {
        "fidelity": "approximate",
        "approximation": superbatch.Approximation(resolution=selection.low_side),
        "multi_resolution": superbatch.MultiResolution(),
        "probe": superbatch.FidelityProbe(every_steps=PROBE_STEPS, rows=PROBE_ROWS),
    }


def run_spec(arm: Arm) -> superbatch.RunSpec:
    settings, low = arm.settings, fidelity(arm.selection)
    least = arm.clip_score_at_least
    tuning = None if least is None else superbatch.Tuning(clip_score_at_least=least)
    return superbatch.RunSpec(
        run_id=arm.run_id,
        sources=[(arm.dataset / "pool").as_uri()],
        learner=superbatch.Learner(
            model_uri=arm.learner.as_uri(),
            snapshot_uri=arm.weights.as_uri(),
            # What all arms begin with was trained so, as the reference was.
            trained_fidelities=[low["approximation"]] if low else None,
        ),
        reference=arm.reference.as_uri(),
        phases=[
            superbatch.Phase(
                policy=arm.selection.policy,
                super_batch_size=arm.selection.widened * settings.super_batch_size,
                sub_batch_size=settings.sub_batch_size,
                n_chunks=settings.n_chunks,
                tuning=tuning,
                **dict(arm.selection.phase),
                **low,
            )
        ],
        loss="sigmoid",
        seed=arm.seed,
        micro_batch_rows=128,
    )


def service_batches(
    run: superbatch.Run, rank: int, arm: Arm, transform: Transform
) -> Iterator[Batch]:
    """This rank's slices, step by step, fetched ahead by the client."""
    settings, low = arm.settings, arm.selection.low_side
    for batch in run.batches(
        rank=rank, world_size=settings.world_size, start_step=0, end_step=settings.steps
    ):
        cost = batch.receipt.cost
        flops = sum(
            (
                cost.reference_flops,
                cost.learner_flops,
                cost.selection_flops,
                cost.discarded_flops,
                cost.probe_flops,
                cost.train_flops,
            )
        )
        images, captions, ids, fidelities = (
            batch[column].to_pylist()
            for column in ("image", "caption", "_superbatch_id", "_superbatch_fidelity")
        )
        # Each rank gets its full rows first.
        full = fidelities.count("full")
        yield Batch(
            batch.step,
            transform.images(images[:full]),
            transform.captions(captions),
            ids,
            cost.candidates_scanned,
            flops,
            transform.at(low).images(images[full:]) if low else None,
        )


def rank_main(rank: int, arm: Arm, address: str) -> None:
    start_rank(rank, arm.settings.world_size, arm.folder / "rendezvous")
    trainer = Trainer(arm.learner, arm.settings, rank, arm.weights)
    evaluation = Evaluation(arm.dataset / "eval", trainer.transform, arm.split)
    run = superbatch.connect(address).open_run(run_spec(arm))

    def push(step: int) -> None:
        """Uniform selection looks at no weights, so that arm is spared the push."""
        if arm.selection.looks_at_weights:
            run.push_weights(trainer.model.state_dict(), step=step, rank=rank)

    fit(
        trainer,
        service_batches(run, rank, arm, trainer.transform),
        evaluation,
        arm.label,
        arm.folder,
        push,
    )
    run.flush()
    if rank == 0 and arm.selection.low_side:
        write_probes(run, arm)


def write_probes(run: superbatch.Run, arm: Arm) -> None:
    """What each probe found, with its step."""
    steps = range(0, arm.settings.steps, PROBE_STEPS)
    probes = [(step, run.receipt(step).summary.probe) for step in steps]
    found = [{"step": step, **probe} for step, probe in probes if probe]
    (arm.folder / PROBES).write_text(json.dumps(found))


def run_arm(arm: Arm, address: str) -> None:
    """All ranks of the arm, as processes of their own."""
    try:
        run_ranks(rank_main, (arm, address), arm.settings.world_size)
    except (
        torch.multiprocessing.ProcessExitedException,
        torch.multiprocessing.ProcessRaisedException,
    ) as error:
        raise DemoError(
            f"{arm.label} failed; the server's log is {arm.folder / 'server.log'}\n{error}"
        ) from None


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """`superbatch serve` on its embedded defaults, with state of its own under `folder`; gives its
    address.
    """
    if not BINARY.exists():
        raise DemoError(f"{BINARY} is missing: run `make build` (or `make demo`, which does).")
    shutil.rmtree(folder / "state", ignore_errors=True)
    config, log = folder / "superbatch.yaml", folder / "server.log"
    config.write_text(
        json.dumps(
            {"listen": "127.0.0.1:0", "metrics_listen": None, "state": (folder / "state").as_uri()},
            indent=2,
        )
    )
    with log.open("w") as err:
        command = [BINARY, "serve", "--config", config]
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, text=True, env=os.environ | ENVIRONMENT
        )
        try:
            # The server says where it listens once it does; a server that fails closes the pipe.
            address = re.search(r"http://\S+", server.stdout.readline())
            if address is None:
                raise DemoError(
                    "superbatch serve did not come up; the end of "
                    f"{log}:\n{log.read_text()[-2000:]}"
                )
            yield address.group()
        finally:
            stop(server)


def stop(server: subprocess.Popen) -> None:
    server.terminate()
    try:
        server.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    server.stdout.close()
