"""What the study compares. One experiment is a pool, the settings of its arms, and the arms."""

from dataclasses import dataclass, replace

from examples.demo.data.build import PoolRecipe
from examples.demo.settings import FULL, Settings

from .harness import Arm

UNIFORM = Arm("uniform", "uniform")
FILTERED = Arm("filtered", "uniform", best=0.3)
INDEPENDENT = Arm("independent", "independent")
JOINT = Arm("joint", "joint", {"n_chunks": 16})
FLEXI = Arm("flexi", "joint", {"n_chunks": 16}, low=True)


@dataclass(frozen=True)
class Experiment:
    pool: PoolRecipe
    settings: Settings
    arms: tuple[Arm, ...]


LONG_TAIL, SETTINGS = FULL.pool, FULL.arms
MEDIUM, SHORT = replace(SETTINGS, steps=400), replace(SETTINGS, steps=200)

EXPERIMENTS = {
    # The demo's own, and beside it pools with a longer tail and with none.
    "main": Experiment(LONG_TAIL, SETTINGS, (UNIFORM, FILTERED, INDEPENDENT, JOINT, FLEXI)),
    "flat": Experiment(replace(LONG_TAIL, zipf=0.0), MEDIUM, (UNIFORM, INDEPENDENT, JOINT)),
    "zipf-1.3": Experiment(replace(LONG_TAIL, zipf=1.3), MEDIUM, (UNIFORM, INDEPENDENT, JOINT)),
    # The learning rate of uniform and of joint, read on `val`.
    "rates": Experiment(LONG_TAIL, SHORT, (UNIFORM, JOINT)),
    "chunks": Experiment(
        LONG_TAIL,
        SHORT,
        (Arm("joint-4", "joint", {"n_chunks": 4}), Arm("joint-8", "joint", {"n_chunks": 8})),
    ),
    "ratio-0.5": Experiment(LONG_TAIL, replace(SHORT, super_batch_size=256), (JOINT,)),
    "ratio-0.9": Experiment(LONG_TAIL, replace(SHORT, super_batch_size=1280), (JOINT,)),
    "sub-batch-256": Experiment(
        LONG_TAIL,
        replace(SHORT, super_batch_size=1280, sub_batch_size=256),
        (UNIFORM, INDEPENDENT, JOINT),
    ),
    "distinct": Experiment(
        LONG_TAIL,
        SHORT,
        (
            Arm("joint-distinct", "joint", {"n_chunks": 16, "duplicates_above": 0.95}),
            Arm("independent-distinct", "independent", {"duplicates_above": 0.95}),
        ),
    ),
}
RATES = (1e-3, 2e-3, 4e-3)
