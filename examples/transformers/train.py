"""Hugging Face's `Trainer` on chosen batches, on one process or several.

    python examples/transformers/train.py --pool file:///data/pool --learner models/learner \\
        --reference models/reference
    torchrun --nproc-per-node 2 examples/transformers/train.py ...
"""

import argparse
from pathlib import Path

import superbatch
import torch
import torch.distributed as dist
from superbatch.torch import ImageText, SelectedBatches, sigmoid_loss
from superbatch.torch.transformers import PushWeights
from transformers import (
    SiglipModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--service", default="http://127.0.0.1:50051")
    parser.add_argument("--run-id", default="transformers", help="the run's id")
    parser.add_argument("--pool", required=True, help="URI of the candidates")
    parser.add_argument(
        "--learner", type=Path, required=True, help="a SigLIP folder, with initial weights"
    )
    parser.add_argument(
        "--reference", type=Path, required=True, help="a folder with the frozen model"
    )
    parser.add_argument("--output", type=Path, default=Path("trained"))
    parser.add_argument("--super-batch-size", type=int, default=640)
    parser.add_argument("--sub-batch-size", type=int, default=128)
    parser.add_argument("--epoch-steps", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--accumulate", type=int, default=1, help="steps of the run that make one update"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(argv)


def run_spec(args: argparse.Namespace) -> superbatch.RunSpec:
    return superbatch.RunSpec(
        run_id=args.run_id,
        sources=[args.pool],
        learner=superbatch.Learner(model_uri=args.learner.absolute(), first_push=True),
        reference=args.reference.absolute(),
        phases=[
            superbatch.Phase(
                policy="joint",
                super_batch_size=args.super_batch_size,
                sub_batch_size=args.sub_batch_size,
                n_chunks=4,
            )
        ],
        push_every_steps=args.accumulate,
        # More than are held ready: by workers, by Trainer's accumulation, and one that is asked for
        # meanwhile.
        max_ahead=1 + args.workers + args.accumulate,
    )


class SelectedTrainer(Trainer):
    """`Trainer` on a data set that is served in batches."""

    def get_train_dataloader(self):
        # Not through accelerate: each rank is already served its own slice.
        return self.train_dataset.loader(num_workers=self.args.dataloader_num_workers)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """SigLIP's loss over all ranks' captions: joint selection counts on all pairs, a rank's own
        are too few.
        """
        out, learner = model(**inputs), self.model
        loss = sigmoid_loss(
            out.image_embeds, out.text_embeds, learner.logit_scale.exp(), learner.logit_bias
        )
        return (loss, out) if return_outputs else loss


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    training = TrainingArguments(
        output_dir=str(args.output),
        learning_rate=args.lr,
        num_train_epochs=args.epochs,
        save_steps=args.save_every,
        gradient_accumulation_steps=args.accumulate,
        dataloader_num_workers=args.workers,
        remove_unused_columns=False,
        logging_steps=1,
        report_to="none",
        # Else, on a machine without one, each process takes itself for the only one.
        use_cpu=not torch.accelerator.is_available(),
    )
    # For what Trainer prints: the run decides.
    training.per_device_train_batch_size = args.sub_batch_size // training.world_size
    # Without start_step's real value: the callback reads it from Trainer's checkpoint.
    dataset = SelectedBatches(
        args.service,
        run_spec(args),
        rank=training.process_index,
        world_size=training.world_size,
        start_step=0,
        epoch_steps=args.epoch_steps,
        transform=ImageText.of_folder(args.learner, names=("pixel_values", "input_ids")),
    )
    trainer = SelectedTrainer(
        SiglipModel.from_pretrained(args.learner),
        training,
        train_dataset=dataset,
        callbacks=[PushWeights(dataset)],
    )
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(args.output) if args.output.exists() else None
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
