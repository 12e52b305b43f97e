"""For `lightning` and `pytorch_lightning`: whichever of the two is imported.

from superbatch.torch.lightning import PushWeights

dataset = SelectedBatches(uri, spec, rank=0, world_size=1, start_step=0, transform=...)
trainer = Trainer(callbacks=[PushWeights(dataset, prefix="model.")], ...)
trainer.fit(module, dataset.loader())
"""

from __future__ import annotations

import sys
from typing import Any

from .loader import SelectedBatches
from .pushes import Pushes

# A trainer of one package takes callbacks of that package alone.
if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    from lightning.pytorch import Callback


def restores_late(trainer: Any) -> bool:
    """Whether the checkpoint is loaded only after `on_fit_start`, as with FSDP and DeepSpeed."""
    return bool(trainer.ckpt_path) and trainer.strategy.restore_checkpoint_after_setup


class PushWeights(Callback):
    """Begins at the checkpoint's step, and pushes the weights after every update.

    dataset: what the trainer trains on. Checkpoints hold the step to go on with, and set the data
        set's `start_step`.
    prefix: of the learner within the LightningModule, such as "model." if it is `self.model`.
    model: whose weights are pushed, such as a moving average; by default the LightningModule.
    dtype: as in `Run.push_weights`.

    With `accumulate_grad_batches=k`, k steps of the run make one update: the run needs
    `push_every_steps=k`.
    """

    def __init__(
        self, dataset: SelectedBatches, *, prefix: str = "", model: Any = None, dtype: Any = None
    ) -> None:
        self.dataset = dataset
        self.prefix = prefix
        self.model = model
        self.dtype = dtype
        self.pushes: Pushes | None = None
        self._next_step = dataset.start_step
        self._updates = 0

    def state_dict(self) -> dict[str, Any]:
        # Not the data set's own start_step: trainers that look ahead have taken more than they
        # trained on.
        return {"next_step": self._next_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._next_step = state_dict["next_step"]
        self.dataset.start_step = self._next_step

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.pushes = Pushes(
            self.dataset.open_run(),
            self.model or pl_module,
            prefix=self.prefix,
            rank=self.dataset.rank,
            dtype=self.dtype,
        )
        if not restores_late(trainer):
            self.pushes.before(self._next_step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.pushes is not None and restores_late(trainer):
            self.pushes.before(self._next_step)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._updates = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, self._next_step = self._next_step, self._next_step + 1
        if self.pushes is not None and trainer.global_step > self._updates:
            self.pushes.after(step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.pushes is not None:
            self.pushes.flush()
