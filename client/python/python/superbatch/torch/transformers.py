"""For `transformers.Trainer`.

from superbatch.torch.transformers import PushWeights

class SelectedTrainer(Trainer):
    def get_train_dataloader(self):
        return self.train_dataset.loader(num_workers=self.args.dataloader_num_workers)

dataset = SelectedBatches(uri, spec, rank=rank, world_size=world_size, start_step=0, ...)
trainer = SelectedTrainer(model, args, train_dataset=dataset, callbacks=[PushWeights(dataset)])
trainer.train(resume_from_checkpoint=...)
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._errors import invalid
from .loader import SelectedBatches
from .pushes import Pushes


class PushWeights(TrainerCallback):
    """Begins at the checkpoint's step, and pushes the weights after every update.

    dataset: what the trainer trains on. Its `start_step` is set when training begins, from the
        trainer's own state.
    model: whose weights are pushed, such as a moving average; by default the trainer's model.
    dtype: as in `Run.push_weights`.

    With `gradient_accumulation_steps=k`, k steps of the run make one update: the run needs
    `push_every_steps=k`.
    """

    def __init__(self, dataset: SelectedBatches, *, model: Any = None, dtype: Any = None) -> None:
        self.dataset = dataset
        self.model = model
        self.dtype = dtype
        self.pushes: Pushes | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The data begins at the right step by itself. To skip batches would be to train on none of
        # them.
        args.ignore_data_skip = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        steps_per_update = args.gradient_accumulation_steps
        if state.global_step > 0 and not args.ignore_data_skip:
            raise invalid(
                "ignore_data_skip",
                "set it in TrainingArguments: the service begins at the checkpoint's step",
            )
        if (self.dataset.epoch_steps or 0) % steps_per_update:
            raise invalid(
                "epoch_steps",
                f"it must be a multiple of gradient_accumulation_steps={steps_per_update}",
            )
        check_ranks(args, self.dataset.world_size)
        self.dataset.start_step = state.global_step * steps_per_update
        self.pushes = Pushes(
            self.dataset.open_run(), self.model or model, rank=self.dataset.rank, dtype=self.dtype
        )
        self.pushes.before(self.dataset.start_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pushes is not None:
            self.pushes.after(state.global_step * args.gradient_accumulation_steps - 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pushes is not None:
            self.pushes.flush()


def check_ranks(args: TrainingArguments, world_size: int) -> None:
    """Refuses processes of which each takes itself for rank 0 of one: on a machine without an
    accelerator they do so, although their process group knows better. All would train on the same
    rows, and push the same weights.
    """
    joined = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if args.world_size == 1 and max(joined, world_size) > 1:
        raise invalid(
            "world_size",
            f"TrainingArguments knows of one process, and there are {max(joined, world_size)}; "
            "without an accelerator give it use_cpu=True",
        )
