"""What the demo compares and at which sizes. How they were chosen, and what else was tried, is in
docs/study.md.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from .data.build import PoolRecipe


@dataclass(frozen=True)
class Selection:
    """One arm: who chooses the batch. `phase` goes into the run's phase beside the sizes that all
    arms share.
    """

    name: str
    policy: str
    colour: str
    phase: tuple[tuple[str, Any], ...] = ()
    # The side in pixels at which candidates are scored and half of the batch is trained
    # (Flexi-JEST); None: all of it at the model's own.
    low_side: int | None = None
    # The share of the pool, of the best CLIPScores by the reference, that candidates are left out
    # below; None: none are.
    best: float | None = None
    # How many times as many candidates as the other arms' a step looks at: what a filter leaves of
    # them has to be a batch.
    widened: int = 1

    @property
    def looks_at_weights(self) -> bool:
        return self.policy != "uniform"

    @property
    def is_baseline(self) -> bool:
        """Whether the others are measured against its end."""
        return self.name == "uniform"


# Three quarters of the model's side: nine patches in place of sixteen. Half of it leaves four.
LOW_SIDE = 12

ARMS = {
    arm.name: arm
    for arm in (
        Selection("uniform", "uniform", "#7a7a7a"),
        # The honest control: what the reference knows, used once and for all.
        Selection("filtered", "uniform", "#8a5fbf", best=0.3, widened=2),
        Selection("joint", "joint", "#1668b8"),
        Selection("flexi", "joint", "#2f9e44", low_side=LOW_SIDE),
        Selection("independent", "independent", "#d98300"),
    )
}


@dataclass(frozen=True)
class Settings:
    """What one training run is made of, the same for every arm."""

    steps: int
    evaluate_every: int
    super_batch_size: int = 640
    sub_batch_size: int = 128
    n_chunks: int = 16
    world_size: int = 2
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    # Share of the steps, at the end, over which the learning rate falls to nothing. Arms have none,
    # so that a point of a curve does not depend on how much longer the arm goes on.
    cooldown: float = 0.0
    # Mean age, as a share of the steps so far, of the averaged weights that are evaluated. 0: the
    # last weights alone.
    average_over: float = 0.0
    # Whether pictures are moved, turned and recoloured at random. For the reference, which sees few
    # pictures many times.
    augment: bool = False
    # The reference's: the side in pixels of further rows, half as many, that each batch has; None:
    # all rows are of the model's own side.
    low_side: int | None = None
    # After how many steps the weights are kept: the reference's early weights are where all arms
    # begin.
    keep_at: int | None = None

    def learning_rate_at(self, step: int) -> float:
        left = (
            1.0
            if not self.cooldown
            else min(1.0, (self.steps - step) / (self.steps * self.cooldown))
        )
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * left

    def shortened(self, share: float) -> "Settings":
        """The same for that share of the steps, up to a whole evaluation."""
        return replace(
            self, steps=math.ceil(self.steps * share / self.evaluate_every) * self.evaluate_every
        )


@dataclass(frozen=True)
class Preset:
    """A whole demo: the pool, the reference and the arms."""

    pool: PoolRecipe
    reference: Settings
    arms: Settings
    seeds: tuple[int, ...]
    # Share of uniform's steps after which the other arms stop: they have shown by then what they
    # can.
    selecting: float
    # Whose names the arms are judged on: `val` to choose settings by, `test` to report.
    split: str = "test"

    def of(self, selection: Selection) -> Settings:
        return self.arms if selection.is_baseline else self.arms.shortened(self.selecting)


FULL = Preset(
    pool=PoolRecipe(rows=24_000),
    reference=Settings(
        steps=1500,
        evaluate_every=250,
        learning_rate=3e-3,
        cooldown=0.6,
        augment=True,
        keep_at=75,
        # It has to know small pictures to score them, and so has what all arms begin with.
        low_side=LOW_SIDE,
    ),
    arms=Settings(steps=600, evaluate_every=20, average_over=0.125),
    seeds=(0, 1, 2),
    selecting=0.5,
)
# What it takes to see the same in a few minutes: a shorter reference, and arms that end sooner.
QUICK = replace(
    FULL,
    reference=replace(FULL.reference, steps=750),
    arms=replace(FULL.arms, steps=400),
    seeds=(0,),
    selecting=0.25,
)
