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
    weight_decay: float = 0.1
    # Share of the steps, at the end, over which the learning rate falls to nothing. Arms have none, so that a point of a
    # curve does not depend on how much longer the arm goes on.
    cooldown: float = 0.0
    # Whether pictures are moved, turned and recoloured at random. For the reference, which sees few pictures many times.
    augment: bool = False

    def learning_rate_at(self, step: int) -> float:
        left = 1.0 if not self.cooldown else min(1.0, (self.steps - step) / (self.steps * self.cooldown))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * left


# Uniform's recall on the `val` split, which nothing reports, was the same within noise at 3e-3, 1e-3 and 4e-4.
FULL = Settings(steps=1000, evaluate_every=50, learning_rate=1e-3)
FULL_REFERENCE = Settings(steps=3000, evaluate_every=250, cooldown=0.6, augment=True)
QUICK = Settings(steps=200, evaluate_every=20, learning_rate=1e-3)
QUICK_REFERENCE = Settings(steps=800, evaluate_every=200, cooldown=0.6, augment=True)
