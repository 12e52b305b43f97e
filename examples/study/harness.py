"""One arm in one process: the demo's model, loss and optimizer, batches chosen by
`superbatch_kernels`.

It differs from the demo in what the service does around the choice: no sockets, no decoding, one
rank, and the reference's embeddings of the whole pool are made before the first step. The lag is
the service's default.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy
import torch
from superbatch_kernels import Model, select
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import SiglipConfig, SiglipModel

from examples.demo.evaluate import in_galleries
from examples.demo.model import embed
from examples.demo.settings import Settings
from examples.demo.train import AveragedModel, optimizer

from .world import Rows, World

ROWS = 256
# Step s is scored with what was pushed after step s - 2: `lag: exact(1)`.
LAG = 2


@dataclass(frozen=True)
class Arm:
    """Who chooses: a policy and what goes with it, or uniform from what a filter left."""

    name: str
    policy: str
    select: dict = field(default_factory=dict)
    # Share of the pool with the best CLIPScore of the reference, taken once before the first step.
    best: float = 1.0
    # Learner and reference score candidates at the low side, and half of the rows are trained so.
    low: bool = False


@dataclass(frozen=True)
class Conditions:
    """What an experiment changes for all of its arms, beside the demo's settings."""

    loss: str = "sigmoid"
    # Scale and bias that the learner begins with; None: those of the weights that it begins with.
    begin: tuple[float, float] | None = None


class Order:
    """Rows of a pool in an order that is shuffled anew each epoch."""

    def __init__(self, count: int, seed: int):
        self.chance, self.count, self.left = (
            torch.Generator().manual_seed(seed),
            count,
            torch.zeros(0, dtype=torch.long),
        )

    def take(self, size: int) -> torch.Tensor:
        if len(self.left) < size:
            self.left = torch.randperm(self.count, generator=self.chance)
        taken, self.left = self.left[:size], self.left[size:]
        return taken


def scored(
    model: SiglipModel, pixels: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        parts = [
            embed(model, pixels[i : i + ROWS], ids[i : i + ROWS]) for i in range(0, len(ids), ROWS)
        ]
    return torch.cat([image for image, _ in parts]), torch.cat([text for _, text in parts])


def scale_of(model: SiglipModel) -> tuple[float, float]:
    return model.logit_scale.exp().item(), model.logit_bias.item()


def begin(model: SiglipModel, scale: float, bias: float) -> None:
    """Sets the temperature that training begins with."""
    with torch.no_grad():
        model.logit_scale.fill_(math.log(scale))
        model.logit_bias.fill_(bias)


def loss_of(
    image: torch.Tensor, text: torch.Tensor, model: SiglipModel, loss: str = "sigmoid"
) -> torch.Tensor:
    """The mean over the rows of a batch."""
    logits = image @ text.T * model.logit_scale.exp()
    if loss == "softmax":
        own = torch.arange(len(image))
        return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    logits = logits + model.logit_bias
    return -logsigmoid((2 * torch.eye(len(image)) - 1) * logits).sum() / len(image)


def own_loss_of(
    image: torch.Tensor, text: torch.Tensor, model: SiglipModel, loss: str = "sigmoid"
) -> torch.Tensor:
    """The part of `loss_of` that a row has by its own pair, without its batch-mates."""
    logits = (image * text).sum(dim=1) * model.logit_scale.exp()
    return -(logits if loss == "softmax" else logsigmoid(logits + model.logit_bias)).mean()


class References:
    """The reference's embeddings of a pool."""

    def __init__(self, world: World, pool: Rows, low: bool):
        model = world.reference()
        self.image, self.text = scored(model, pool.low if low else pool.pixels, pool.ids)
        self.scale, self.bias = scale_of(model)

    def best(self, share: float) -> torch.Tensor:
        return (
            (self.image * self.text)
            .sum(dim=1)
            .topk(int(len(self.image) * share))
            .indices.sort()
            .values
        )

    def of(self, rows: torch.Tensor) -> Model:
        return Model(self.image[rows], self.text[rows], self.scale, self.bias)


def forward_flops(about: SiglipConfig, side: int) -> tuple[float, float]:
    """Operations of one picture and of one caption through their towers."""

    def tower(of, tokens: int) -> float:
        layer = 2 * (4 * of.hidden_size**2 + 2 * of.hidden_size * of.intermediate_size)
        return of.num_hidden_layers * (tokens * layer + 4 * tokens**2 * of.hidden_size)

    vision, text = about.vision_config, about.text_config
    patches = (side // vision.patch_size) ** 2
    entry = patches * (6 * vision.patch_size**2 * vision.hidden_size + 4 * vision.hidden_size**2)
    return tower(vision, patches) + entry, tower(text, text.max_position_embeddings)


class Costs:
    """FLOPs of one step and of what comes before the first, as the service accounts for them, for
    a pool of `count` rows and pictures of two sides.
    """

    def __init__(
        self, about: SiglipConfig, arm: Arm, settings: Settings, count: int, sides: tuple[int, int]
    ):
        (picture, caption), (small, _) = (forward_flops(about, side) for side in sides)
        # Of one row, at full side.
        self.forward = picture + caption
        trained = (picture + small) / 2 if arm.low else picture
        self.step, self.once = 3 * settings.sub_batch_size * (trained + caption), 0.0
        looked = (small if arm.low else picture) + caption
        if arm.policy != "uniform":
            width = about.vision_config.hidden_size
            self.step += settings.super_batch_size * (looked + 8 * settings.sub_batch_size * width)
        if arm.policy != "uniform" or arm.best < 1:
            self.once = count * looked


def half_low(rows: torch.Tensor) -> torch.Tensor:
    """Half of the places of a batch, by a hash of the row."""
    return torch.argsort((rows * 2654435761) % 2**32)[: len(rows) // 2]


def embed_mixed(
    model: SiglipModel, pool: Rows, rows: torch.Tensor, low: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not low:
        return embed(model, pool.pixels[rows], pool.ids[rows])
    small = half_low(rows)
    large = torch.ones(len(rows), dtype=torch.bool).index_fill(0, small, False).nonzero()[:, 0]
    parts = [
        embed(model, pool.low[rows[small]], pool.ids[rows[small]]),
        embed(model, pool.pixels[rows[large]], pool.ids[rows[large]]),
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class Run:
    """One arm of one seed."""

    def __init__(
        self,
        world: World,
        arm: Arm,
        settings: Settings,
        seed: int,
        conditions: Conditions = Conditions(),
    ):
        self.arm, self.settings, self.seed, self.tests = arm, settings, seed, world.tests
        self.loss = conditions.loss
        self.model, self.scorer = world.learner(), world.learner().eval()
        if conditions.begin:
            begin(self.model, *conditions.begin)
        # What batches are judged by, of all arms alike.
        self.judge = world.reference()
        self.pool = world.pool
        sides = self.pool.pixels.shape[-1], self.pool.low.shape[-1]
        self.costs = Costs(self.model.config, arm, settings, len(self.pool), sides)
        self.references = References(world, self.pool, arm.low) if self.costs.once else None
        if arm.best < 1:
            self.pool = self.pool.only(self.references.best(arm.best))
        self.order = Order(len(self.pool), seed)
        self.optimizer, self.average = (
            optimizer(self.model, settings),
            AveragedModel(self.model, settings.average_over),
        )
        self.past: list[dict] = []
        self.chosen: list[torch.Tensor] = []
        self.spent = Counter()

    def rows(self, step: int) -> torch.Tensor:
        if self.arm.policy == "uniform":
            return self.order.take(self.settings.sub_batch_size)
        rows = self.order.take(self.settings.super_batch_size)
        self.past = [
            *self.past[1 - LAG :],
            {name: value.clone() for name, value in self.model.state_dict().items()},
        ]
        self.scorer.load_state_dict(self.past[0])
        image, text = scored(
            self.scorer,
            self.pool.low[rows] if self.arm.low else self.pool.pixels[rows],
            self.pool.ids[rows],
        )
        drawn = select(
            learner=Model(image, text, *scale_of(self.scorer)),
            reference=self.references.of(rows),
            policy=self.arm.policy,
            loss=self.loss,
            sub_batch_size=self.settings.sub_batch_size,
            seed=self.seed,
            step=step,
            threads=1,
            **self.arm.select,
        )
        return rows[torch.as_tensor(numpy.asarray(drawn.indices).astype(numpy.int64))]

    def train(self, step: int, rows: torch.Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step)
        embedded = embed_mixed(self.model, self.pool, rows, self.arm.low)
        loss = loss_of(*embedded, self.model, self.loss)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(step)
        return loss.item()

    def point(self, step: int, loss: float, batch: dict[str, float]) -> dict:
        """An evaluation, with what is known of the batch before it."""
        recent = (
            torch.cat(self.chosen[-self.settings.evaluate_every :])
            if self.chosen
            else torch.zeros(0, dtype=torch.long)
        )
        found = {
            split: in_galleries(*scored(self.average.mean, rows.pixels, rows.ids))
            for split, rows in self.tests.items()
        }
        return {
            "step": step,
            "loss": loss,
            **found,
            "scale": scale_of(self.model),
            "wrong": self.pool.wrong[recent].float().mean().item(),
            **batch,
            "flops": self.costs.once + step * self.costs.step,
            "seconds": self.spent["choose"] + self.spent["train"],
        }

    @torch.no_grad()
    def judged(self, rows: torch.Tensor) -> dict[str, float]:
        """A batch as selection would see it before it is trained on, whoever chose it: `own` is the
        mean learnability of its rows' own pairs, `pairs` what their batch-mates add. `false` counts
        a row's batch-mates that show the same and say so: the loss takes them for negatives.
        """
        pixels, ids = self.pool.pixels[rows], self.pool.ids[rows]

        def losses(model: SiglipModel) -> torch.Tensor:
            image, text = embed(model, pixels, ids)
            return torch.stack([of(image, text, model, self.loss) for of in (loss_of, own_loss_of)])

        whole, own = (losses(self.model) - losses(self.judge)).tolist()
        shown = [self.pool.concept[row] for row in rows.tolist()]
        right = (~self.pool.wrong[rows]).tolist()
        said = Counter(concept for concept, is_right in zip(shown, right, strict=True) if is_right)
        others = [said[concept] - is_right for concept, is_right in zip(shown, right, strict=True)]
        return {
            "own": own,
            "pairs": whole - own,
            "false": sum(others) / len(others),
            # Rows whose concept is in the batch already.
            "repeats": 1 - len(set(shown)) / len(shown),
        }

    def run(self, say: Callable[[dict], None] = lambda point: None) -> list[dict]:
        """The curve. `seconds` are those of this process's processor, without evaluations and the
        reference's pass.
        """
        curve = [self.point(0, 0.0, {})]
        say(curve[0])
        for step in range(self.settings.steps):
            done = step + 1
            due = done % self.settings.evaluate_every == 0 or done == self.settings.steps
            begun = time.process_time()
            rows = self.rows(step)
            self.spent["choose"] += time.process_time() - begun
            batch = self.judged(rows) if due else {}
            begun = time.process_time()
            loss = self.train(step, rows)
            self.spent["train"] += time.process_time() - begun
            self.chosen.append(rows)
            if due:
                curve.append(self.point(done, loss, batch))
                say(curve[-1])
        return curve
