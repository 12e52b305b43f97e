"""Chosen batches for `open_clip_train`. `train.py` beside this file puts them in place."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import open_clip_train.data
import superbatch
from open_clip_train.data import DataInfo
from superbatch.torch import ImageText, Pushes, SelectedBatches, incarnation


@dataclass
class Selected:
    """What open_clip's own arguments do not say."""

    service: str
    reference: str
    super_batch_size: int
    n_chunks: int = 16
    pushes: Pushes | None = None

    def run_spec(self, args: argparse.Namespace) -> superbatch.RunSpec:
        sub_batch_size = args.batch_size * args.world_size
        return superbatch.RunSpec(
            run_id=args.name,
            sources=args.train_data.split("::"),
            learner=superbatch.Learner(
                model_uri=Path(args.model.removeprefix("local-dir:")).absolute(), first_push=True
            ),
            reference=Path(self.reference).absolute()
            if "://" not in self.reference
            else self.reference,
            phases=[
                superbatch.Phase(
                    policy="joint",
                    super_batch_size=self.super_batch_size,
                    sub_batch_size=sub_batch_size,
                    n_chunks=self.n_chunks,
                )
            ],
            loss="sigmoid" if args.siglip else "softmax",
            push_every_steps=args.accum_freq,
            max_ahead=2 + args.workers,
            seed=args.seed,
        )

    def get_data(self, args, preprocess_fns, epoch=0, tokenizer=None) -> dict[str, DataInfo]:
        """Stands for `open_clip_train.data.get_data`, which still makes the data sets for
        validation.
        """
        others = argparse.Namespace(**{**vars(args), "train_data": None, "dataset_type": "auto"})
        data = open_clip_train.data.get_data(others, preprocess_fns, epoch, tokenizer)
        epoch_steps = args.train_num_samples // (args.batch_size * args.world_size)
        dataset = SelectedBatches(
            self.service,
            self.run_spec(args),
            rank=args.rank,
            world_size=args.world_size,
            start_step=epoch * epoch_steps,
            epoch_steps=epoch_steps,
            transform=ImageText(preprocess_fns[0], tokenizer),
            incarnation=incarnation(),
        )
        return {
            **data,
            "train": DataInfo(dataset.loader(num_workers=args.workers, pin_memory=True)),
        }

    def push_from(self, model, data: dict[str, DataInfo]) -> None:
        """Has the loader push the model's weights after every step; the trainer has no hook of its
        own for it.
        """
        loader = data["train"].dataloader
        loader.pushes = loader.pushes or Pushes(
            loader.dataset.open_run(), model, rank=loader.dataset.rank
        )
        self.pushes = loader.pushes
