"""A plain PyTorch trainer: data-parallel ranks over gloo, the SigLIP loss over the whole batch,
AdamW.

Nothing in it selects data. It takes batches from whatever it is given: Superbatch for the arms
(`service.py`), a shuffled folder for the reference (`reference.py`).
"""

import copy
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed
from superbatch.torch import TwoResolutions
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from .evaluate import Evaluation
from .model import Transform, load, save_weights
from .progress import Stage
from .settings import Settings

# The file of `Settings.keep_at`.
KEPT = "early.safetensors"


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step: pixels (n, 3, height, width) and token ids as the model takes
    them. `small` holds further rows' pixels, of a smaller side; `tokens` and `ids` have them last.

    `scanned` and `flops` are the whole step's, as its receipt accounts for them.
    """

    step: int
    pixels: torch.Tensor
    tokens: torch.Tensor
    ids: list[str] = field(default_factory=list)
    scanned: int = 0
    flops: float = 0.0
    small: torch.Tensor | None = None


@dataclass
class Point:
    """One evaluation. Sums run from the start of the arm; `seconds` is wall clock, evaluations
    included.
    """

    step: int
    accuracy: float
    recall_at_1: float
    loss: float
    scanned: int
    flops: float
    seconds: float


def siglip_loss(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, rank: int
) -> torch.Tensor:
    """This rank's images, all ranks' captions: mean over its rows of the summed sigmoid losses
    (Zhai et al. 2023, eq. 1).

    Averaged over ranks, as DistributedDataParallel does with gradients, it is the loss of the whole
    batch.
    """
    texts = torch.cat(all_gather(text))
    rows = torch.arange(len(image))
    labels = torch.full((len(image), len(texts)), -1.0)
    labels[rows, rank * len(image) + rows] = 1.0
    logits = image @ texts.T * scale.exp() + bias
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(image)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moves, turns, scales and recolours pictures (n, 3, height, width) in -1 .. 1, each on its
    own.
    """
    n = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    scale, angle, right, down = (
        uniform(0.85, 1.5),
        uniform(-0.25, 0.25),
        uniform(-0.25, 0.25),
        uniform(-0.25, 0.25),
    )
    turned = torch.stack(
        [
            torch.stack([scale * angle.cos(), -scale * angle.sin(), right], dim=1),
            torch.stack([scale * angle.sin(), scale * angle.cos(), down], dim=1),
        ],
        dim=1,
    )
    grid = torch.nn.functional.affine_grid(turned, list(pixels.shape), align_corners=False)
    # Beyond the edge there are zeros: made white, as the ground of the drawings is.
    moved = torch.nn.functional.grid_sample(pixels - 1, grid, align_corners=False) + 1
    gray = moved.mean(dim=1, keepdim=True)
    faded = gray + (moved - gray) * uniform(0.3, 1.2, 1, 1, 1)
    return (faded * uniform(0.8, 1.15, 3, 1, 1) + uniform(-0.15, 0.15, 3, 1, 1)).clamp(-1, 1)


class AveragedModel:
    """The mean of the weights over about the last `share` of the steps so far: what is evaluated.

    It does what a falling learning rate would do, without knowing how long the run will be (Karras
    et al. 2024, section 3: the weight of step s in the mean of t steps grows as a power of s / t).
    """

    def __init__(self, model: torch.nn.Module, share: float):
        self.model, self.mean = model, copy.deepcopy(model).eval().requires_grad_(False)
        # An exponent of n gives a mean age of a share 1 / (n + 2) of the run.
        self.exponent = 1 / share - 2 if share else None

    def update(self, step: int) -> None:
        kept = (1 - 1 / (step + 1)) ** (self.exponent + 1) if self.exponent is not None else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.mean.parameters()), list(self.model.parameters()), 1 - kept
            )


def optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW; scale and bias do not decay."""
    temperature = [model.logit_scale, model.logit_bias]
    towers = [p for p in model.parameters() if all(p is not other for other in temperature)]
    return torch.optim.AdamW(
        [
            {"params": towers, "weight_decay": settings.weight_decay},
            {"params": temperature, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        # One pass over all parameters: of a model this small each pass costs as much as its sums.
        fused=True,
    )


class Trainer:
    """One rank's model and optimizer."""

    def __init__(
        self, model_folder: Path, settings: Settings, rank: int, weights: Path | None = None
    ):
        self.settings, self.rank = settings, rank
        self.transform = Transform(model_folder)
        self.chance = torch.Generator().manual_seed(rank)
        self.model = load(model_folder, weights).train()
        self.average = AveragedModel(self.model, settings.average_over)
        # One forward for both sizes, so that the gradients are those of one loss.
        # Its buffers are constants, which need not be sent at each step.
        self.parallel = DistributedDataParallel(
            TwoResolutions(self.model), broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self.optimizer = optimizer(self.model, settings)

    def step(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(batch.step)
        small = batch.pixels[:0] if batch.small is None else batch.small
        pixels = [batch.pixels, small]
        if self.settings.augment:
            pixels = [augment(part, self.chance) if len(part) else part for part in pixels]
        image, text, _, _ = self.parallel(*pixels, batch.tokens)
        loss = siglip_loss(
            torch.nn.functional.normalize(image, dim=-1),
            torch.nn.functional.normalize(text, dim=-1),
            self.model.logit_scale,
            self.model.logit_bias,
            self.rank,
        )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(batch.step)
        return loss.item()


def start_rank(rank: int, world_size: int, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    # Means of gradients of words that come seldom fall below what floats hold, and arithmetic on
    # such numbers is many times slower.
    torch.set_flush_denormal(True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )


def run_ranks(main: Callable, arguments: tuple, world_size: int) -> None:
    """Runs `main` with a rank and `arguments` in a process for each rank, and waits for all.

    They are forked from a process that has imported everything: to import LibTorch and transformers
    anew took each of them five seconds.
    """
    multiprocessing.set_forkserver_preload(["examples.demo.service", "examples.demo.reference"])
    torch.multiprocessing.start_processes(main, arguments, world_size, start_method="forkserver")


def fit(
    trainer: Trainer,
    batches: Iterable[Batch],
    evaluation: Evaluation,
    label: str,
    folder: Path,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains until `settings.steps`. All ranks evaluate, and rank 0 appends `Point`s to
    `curve.jsonl`; each rank keeps its ids.
    """
    settings, first = trainer.settings, trainer.rank == 0
    scanned, flops, begun = 0, 0.0, time.monotonic()
    stage = Stage(label, settings.steps, "step", silent=not first)
    # Each rank opens files of its own: a second open for writing would cut off what the first has
    # written.
    curve_path = folder / "curve.jsonl" if first else Path(os.devnull)
    with (
        curve_path.open("w", buffering=1) as curve,
        (folder / f"ids-{trainer.rank}.jsonl").open("w") as ids,
    ):

        def evaluate(done: int, loss: float) -> str:
            at_1, at_5 = evaluation.recalls(trainer.average.mean)
            point = Point(done, at_5, at_1, loss, scanned, flops, time.monotonic() - begun)
            curve.write(json.dumps(asdict(point)) + "\n")
            return f"R@5 {100 * at_5:.1f} %"

        evaluate(0, 0.0)
        for batch in batches:
            loss = trainer.step(batch)
            after_step(batch.step)
            scanned, flops, done = scanned + batch.scanned, flops + batch.flops, batch.step + 1
            ids.write(json.dumps(batch.ids) + "\n")
            if first and done == settings.keep_at:
                save_weights(trainer.model, folder / KEPT)
            due = done % settings.evaluate_every == 0 or done == settings.steps
            stage.update(note=evaluate(done, loss) if due else "")
            if done >= settings.steps:
                break
    stage.close()
    torch.distributed.barrier()


def read_curve(folder: Path) -> list[Point]:
    return [Point(**json.loads(line)) for line in (folder / "curve.jsonl").read_text().splitlines()]
