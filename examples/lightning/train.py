"""Lightning on chosen batches.

    python examples/lightning/train.py --pool file:///data/pool --learner models/learner \\
        --reference models/reference
"""

import argparse
from pathlib import Path

import lightning.pytorch as lightning
import superbatch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from superbatch.torch import ImageText, SelectedBatches
from superbatch.torch.lightning import PushWeights
from transformers import SiglipModel


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--service", default="http://127.0.0.1:50051")
    parser.add_argument("--run-id", default="lightning", help="the run's id")
    parser.add_argument("--pool", required=True, help="URI of the candidates")
    parser.add_argument(
        "--learner",
        type=Path,
        required=True,
        help="a SigLIP folder of transformers, with initial weights",
    )
    parser.add_argument(
        "--reference", type=Path, required=True, help="a folder with the frozen model"
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--super-batch-size", type=int, default=640)
    parser.add_argument("--sub-batch-size", type=int, default=128)
    parser.add_argument(
        "--epoch-steps",
        type=int,
        default=None,
        help="steps of an epoch; without it, the data's end",
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--workers", type=int, default=0)
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
        # Lightning holds one batch more than it trains on if it does not know an epoch's length.
        max_ahead=3 + args.workers,
    )


class Siglip(lightning.LightningModule):
    def __init__(self, folder: Path, lr: float):
        super().__init__()
        self.model, self.lr = SiglipModel.from_pretrained(folder).train(), lr

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    dataset = SelectedBatches(
        args.service,
        run_spec(args),
        rank=0,
        world_size=1,
        start_step=0,
        epoch_steps=args.epoch_steps,
        transform=ImageText.of_folder(
            args.learner, names=("pixel_values", "input_ids"), extra={"return_loss": True}
        ),
    )
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=args.steps,
        logger=False,
        enable_model_summary=False,
        default_root_dir=args.checkpoints,
        callbacks=[
            PushWeights(dataset, prefix="model."),
            ModelCheckpoint(
                args.checkpoints, save_last=True, every_n_train_steps=args.save_every, save_top_k=-1
            ),
        ],
    )
    trainer.fit(
        Siglip(args.learner, args.lr), dataset.loader(num_workers=args.workers), ckpt_path="last"
    )


if __name__ == "__main__":
    main()
