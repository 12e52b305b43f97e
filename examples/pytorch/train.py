"""A plain PyTorch trainer on chosen batches: one process, or several with DDP or FSDP 2.

    python examples/pytorch/train.py --pool file:///data/pool --learner models/learner \\
        --reference models/reference
    torchrun --nproc-per-node 2 examples/pytorch/train.py --parallel fsdp ...

Only what is marked with (1) to (4) knows of Superbatch.
"""

import argparse
import os
from pathlib import Path

import superbatch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from superbatch.torch import ImageText, Pushes, SelectedBatches, incarnation, sigmoid_loss
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import SiglipModel


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--service", default="http://127.0.0.1:50051")
    parser.add_argument("--run-id", default="pytorch", help="the run's id")
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
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that decode; 0 decodes in threads"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    return parser.parse_args(argv)


def run_spec(args: argparse.Namespace) -> superbatch.RunSpec:
    """(1) What is chosen from what, by which models. All ranks, and every restart, open the run
    with the same spec.
    """
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
        max_ahead=2 + args.workers,
    )


def transform(folder: Path) -> ImageText:
    """(2) From the stored bytes to tensors, here as the learner's folder has it. `ImageText(image,
    text)` takes any other transform and tokenizer, such as one that augments.
    """
    return ImageText.of_folder(folder)


class Learner(torch.nn.Module):
    """The model and its loss in one forward pass, which DDP and FSDP then wrap as one."""

    def __init__(self, folder: Path):
        super().__init__()
        self.model = SiglipModel.from_pretrained(folder).train()

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Over all ranks' rows: joint selection counts on all pairs."""
        out, model = self.model(pixel_values=images, input_ids=ids), self.model
        return sigmoid_loss(
            out.image_embeds, out.text_embeds, model.logit_scale.exp(), model.logit_bias
        )


def wrapped(learner: Learner, args: argparse.Namespace) -> torch.nn.Module:
    if not dist.is_initialized():
        return learner
    if args.parallel == "ddp":
        return DistributedDataParallel(learner)
    for layer in [
        *learner.model.vision_model.encoder.layers,
        *learner.model.text_model.encoder.layers,
    ]:
        fully_shard(layer)
    return fully_shard(learner)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: `.metadata` is written last."""
    return max((found.parent for found in folder.glob("*/.metadata")), default=None)


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    checkpoints.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"{step:08d}")


def load(found: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Returns the checkpoint's step."""
    weights, moments = get_state_dict(model, optimizer)
    checkpoints.load({"model": weights, "optimizer": moments}, checkpoint_id=found)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(found.name)


def train(args: argparse.Namespace, rank: int, world_size: int) -> None:
    model = wrapped(Learner(args.learner), args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    found = newest(args.checkpoints)
    start_step = 0 if found is None else load(found, model, optimizer) + 1

    # (3) Batches: this rank's slice of each step. A restart names the step after the checkpoint's,
    # and itself.
    dataset = SelectedBatches(
        args.service,
        run_spec(args),
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        end_step=args.steps,
        transform=transform(args.learner),
        incarnation=incarnation(),
    )
    # (4) Weights: before the first step, and after every update.
    run = dataset.open_run()
    pushes = Pushes(run, model, prefix="model.", rank=rank)
    pushes.before(start_step)
    for step, (images, ids) in enumerate(dataset.loader(num_workers=args.workers), start_step):
        loss = model(images, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pushes.after(step)
        if rank == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args.checkpoints, step, model, optimizer)
    pushes.flush()


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
    train(args, rank, world_size)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
