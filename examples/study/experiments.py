"""What the study compares: experiments, in the order in which the queue runs them.

An experiment differs from `main` in one thing. Where it has no arm `uniform` of its own, that thing
does not touch uniform training, and main's is the one to compare with.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from examples.demo.data.build import PoolRecipe
from examples.demo.evaluate import GALLERY
from examples.demo.model import SHAPE, config
from examples.demo.settings import FULL, QUICK, Settings

from .harness import Arm, Conditions, Costs
from .world import World

VERSION = 2

UNIFORM = Arm("uniform", "uniform")
FILTERED = Arm("filtered", "uniform", best=0.3)
INDEPENDENT = Arm("independent", "independent")
JOINT = Arm("joint", "joint", {"n_chunks": 16})
FLEXI = Arm("flexi", "joint", {"n_chunks": 16}, low=True)
BOTH = (INDEPENDENT, JOINT)
THREE, TWO, ONE = (0, 1, 2), (0, 1), (0,)


def chunked(count: int) -> Arm:
    return Arm(f"joint-{count}", "joint", {"n_chunks": count})


def distinct(arm: Arm) -> Arm:
    return Arm(f"{arm.name}-distinct", arm.policy, {**arm.select, "duplicates_above": 0.95})


@dataclass(frozen=True)
class Experiment:
    # What differs from `main`, for the list and the report.
    about: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = THREE
    pool: PoolRecipe = FULL.pool
    # Of the arm `uniform`; all others take `FULL.selecting` of its steps.
    settings: Settings = FULL.arms
    reference: Settings = FULL.reference
    # The step of the reference's training whose weights all arms begin with; None: `keep_at`.
    start_at: int | None = None
    shape: tuple[tuple[str, int], ...] = tuple(SHAPE.items())
    conditions: Conditions = Conditions()
    # Whose arm `uniform` is compared with.
    baseline: str = "main"

    def of(self, arm: Arm) -> Settings:
        return self.settings if arm.name == "uniform" else self.settings.shortened(FULL.selecting)

    @property
    def world_key(self) -> tuple:
        """Equal where two experiments have one world."""
        return self.pool, self.reference, self.start_at, self.shape

    def world(self, cache: Path) -> World:
        """Builds, fetches and trains what is not in the cache yet: minutes, the first time."""
        return World.of(cache, self.pool, self.reference, self.start_at, dict(self.shape))


def sub_batch(size: int) -> Settings:
    """As many examples of as many candidates, in fewer and larger steps."""
    times = size // FULL.arms.sub_batch_size
    return replace(
        FULL.arms,
        steps=FULL.arms.steps // times,
        evaluate_every=FULL.arms.evaluate_every // times,
        warmup_steps=FULL.arms.warmup_steps // times,
        super_batch_size=FULL.arms.super_batch_size * times,
        sub_batch_size=size,
    )


def shaped(width: int) -> tuple[tuple[str, int], ...]:
    return tuple({**SHAPE, "width": width, "mlp": 4 * width}.items())


def super_batch(size: int) -> Settings:
    return replace(FULL.arms, super_batch_size=size)


def rate(rate: float) -> Settings:
    return replace(FULL.arms, learning_rate=rate, steps=FULL.arms.steps // 2)


EXPERIMENTS = {
    "main": Experiment("the demo's own settings", (UNIFORM, FILTERED, *BOTH, FLEXI)),
    "zipf-1.3": Experiment(
        "a pool with a longer tail",
        (UNIFORM, FILTERED, *BOTH),
        pool=replace(FULL.pool, zipf=1.3),
        baseline="zipf-1.3",
    ),
    "flat": Experiment(
        "a pool without a tail",
        (UNIFORM, FILTERED, *BOTH),
        pool=replace(FULL.pool, zipf=0.0),
        baseline="flat",
    ),
    "ratio-0.5": Experiment("half of the candidates left out", BOTH, settings=super_batch(256)),
    "ratio-0.9": Experiment("nine in ten left out", BOTH, settings=super_batch(1280)),
    "sub-batch-256": Experiment(
        "sub-batches of 256 of 1,280",
        (UNIFORM, *BOTH),
        settings=sub_batch(256),
        baseline="sub-batch-256",
    ),
    "sub-batch-512": Experiment(
        "sub-batches of 512 of 2,560",
        (UNIFORM, *BOTH),
        settings=sub_batch(512),
        baseline="sub-batch-512",
    ),
    "distinct": Experiment(
        "near-duplicates left out (`duplicates_above` 0.95)", tuple(distinct(arm) for arm in BOTH)
    ),
    "chunks": Experiment("numbers of chunks beside 16", (chunked(4), chunked(8), chunked(32))),
    # The weights that arms begin with are main's: its learning rate has not begun to fall there.
    "reference-750": Experiment(
        "a reference of half of the training", (FILTERED, *BOTH), reference=QUICK.reference
    ),
    "softmax": Experiment(
        "the softmax loss, for training and for selection",
        (UNIFORM, *BOTH),
        conditions=Conditions(loss="softmax"),
        baseline="softmax",
    ),
    "width-32": Experiment(
        "models of half the width, and the shorter reference",
        (UNIFORM, *BOTH),
        reference=QUICK.reference,
        shape=shaped(32),
        baseline="width-32",
    ),
    "width-128": Experiment(
        "models of twice the width, and the shorter reference",
        (UNIFORM, *BOTH),
        ONE,
        reference=QUICK.reference,
        shape=shaped(128),
        baseline="width-128",
    ),
    # For choices, to be read on `val`.
    "rate-0.001": Experiment(
        "half of the learning rate",
        (UNIFORM, JOINT),
        TWO,
        settings=rate(1e-3),
        baseline="rate-0.001",
    ),
    "rate-0.004": Experiment(
        "twice the learning rate", (UNIFORM, JOINT), TWO, settings=rate(4e-3), baseline="rate-0.004"
    ),
    "start-50": Experiment(
        "arms that begin at step 50 of the reference",
        (UNIFORM, JOINT),
        TWO,
        start_at=50,
        baseline="start-50",
    ),
    "start-100": Experiment(
        "arms that begin at its step 100", (UNIFORM, JOINT), TWO, start_at=100, baseline="start-100"
    ),
    "scale-20": Experiment(
        "arms that begin with scale 20 and bias -10",
        (UNIFORM, *BOTH),
        ONE,
        conditions=Conditions(begin=(20.0, -10.0)),
        baseline="scale-20",
    ),
    "scale-5": Experiment(
        "arms that begin with scale 5 and bias -5",
        (UNIFORM, *BOTH),
        ONE,
        conditions=Conditions(begin=(5.0, -5.0)),
        baseline="scale-5",
    ),
}


class Entry(NamedTuple):
    """One arm of one seed: what is trained in one go, and one line of the results."""

    experiment: str
    arm: Arm
    seed: int

    @property
    def about(self) -> Experiment:
        return EXPERIMENTS[self.experiment]

    @property
    def name(self) -> str:
        return f"{self.experiment} {self.arm.name} {self.seed}"

    @property
    def key(self) -> str:
        """Of all that the curve depends on: a line of other settings is not this entry's."""
        of = self.about
        parts = [
            VERSION,
            asdict(of.pool),
            asdict(of.of(self.arm)),
            asdict(of.reference),
            of.start_at,
            dict(of.shape),
            asdict(of.conditions),
            asdict(self.arm),
            self.seed,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def minutes(self) -> float:
        """What it takes about, on one idle core, when the world is in the cache."""
        of = self.about
        shape, settings = dict(of.shape), of.of(self.arm)
        side = shape["image_size"]
        sides = side, of.reference.low_side or side
        costs = Costs(config(shape, shape["vocab_size"]), self.arm, settings, of.pool.rows, sides)
        evaluations = settings.steps // settings.evaluate_every + 1
        judged = evaluations * costs.forward * EVALUATED
        return (costs.once + settings.steps * costs.step + judged) * SECONDS_A_FLOP / 60


# Pictures and names of `val` and `test`, and what the harness looks at beside them.
EVALUATED = 459 + 4 * GALLERY
# Of the machine that docs/study.md names.
SECONDS_A_FLOP = 1 / 16e9


def entries(names: list[str] | None = None, seeds: list[int] | None = None) -> Iterator[Entry]:
    """Those of some experiments, by default of all; of these seeds, by default each one's own."""
    for name, experiment in EXPERIMENTS.items():
        if names is None or name in names:
            for seed in seeds or experiment.seeds:
                for arm in experiment.arms:
                    yield Entry(name, arm, seed)
