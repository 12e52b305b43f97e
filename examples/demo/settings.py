"""Sizes of the demo: chosen so that two slow cores finish in time, see docs/demo.md for what was measured."""

from dataclasses import dataclass

ARMS = ("uniform", "independent", "joint")


@dataclass(frozen=True)
class Settings:
    """What one training run is made of, the same for every arm."""

    steps: int
    evaluate_every: int
    super_batch_size: int = 640
    sub_batch_size: int = 128
    n_chunks: int = 4
    world_size: int = 2
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 1e-3
    # Share of the steps, at the end, over which the learning rate falls to nothing. Arms have none, so that a point of a
    # curve does not depend on how much longer the arm goes on.
    cooldown: float = 0.0

    def learning_rate_at(self, step: int) -> float:
        left = 1.0 if not self.cooldown else min(1.0, (self.steps - step) / (self.steps * self.cooldown))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * left


FULL = Settings(steps=1000, evaluate_every=50)
FULL_REFERENCE = Settings(steps=1500, evaluate_every=500, cooldown=0.4)
QUICK = Settings(steps=150, evaluate_every=25)
QUICK_REFERENCE = Settings(steps=400, evaluate_every=200, cooldown=0.4)
