"""What each actor of `train.py` runs: a rank of an ordinary PyTorch trainer."""

import argparse
import tempfile
from pathlib import Path

import ray.train
import ray.train.torch
import superbatch
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from superbatch.torch import ImageText, Pushes, SelectedBatches, incarnation, sigmoid_loss
from transformers import SiglipModel


def run_spec(args: argparse.Namespace) -> superbatch.RunSpec:
    return superbatch.RunSpec(
        run_id=args.run_id,
        sources=[args.pool],
        learner=superbatch.Learner(model_uri=Path(args.learner), first_push=True),
        reference=Path(args.reference),
        phases=[
            superbatch.Phase(
                policy="joint",
                super_batch_size=args.super_batch_size,
                sub_batch_size=args.sub_batch_size,
                n_chunks=4,
            )
        ],
    )


def train(args: argparse.Namespace) -> None:
    """Trains to the last step, from the checkpoint that Ray knows."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    model = ray.train.torch.prepare_model(SiglipModel.from_pretrained(args.learner).train())
    learner = getattr(model, "module", model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    device, start_step = ray.train.torch.get_device(), 0
    if (found := ray.train.get_checkpoint()) is not None:
        with found.as_directory() as folder:
            kept = torch.load(Path(folder) / "state.pt", map_location=device)
        learner.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        start_step = kept["step"] + 1

    # A restart may have another number of ranks: its incarnation tells it from the ranks that were
    # lost.
    dataset = SelectedBatches(
        args.service,
        run_spec(args),
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        end_step=args.steps,
        transform=ImageText.of_folder(args.learner),
        incarnation=incarnation(),
    )
    pushes = Pushes(dataset.open_run(), model, rank=rank)
    pushes.before(start_step)
    if rank == 0:
        print(f"begins at step {start_step}", flush=True)
    for step, (images, ids) in enumerate(dataset.loader(), start_step):
        out = model(pixel_values=images.to(device), input_ids=ids.to(device))
        # Over all ranks' rows: joint selection counts on all pairs.
        loss = sigmoid_loss(
            out.image_embeds, out.text_embeds, learner.logit_scale.exp(), learner.logit_bias
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pushes.after(step)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            report(rank, step, loss.item(), learner, optimizer)
    pushes.flush()
    if dist.is_initialized():
        dist.barrier()


def report(
    rank: int, step: int, loss: float, model: SiglipModel, optimizer: torch.optim.Optimizer
) -> None:
    """Tells Ray where the training is; rank 0 brings the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        kept = None
        if rank == 0:
            torch.save(
                {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()},
                Path(folder) / "state.pt",
            )
            kept = Checkpoint.from_directory(folder)
        ray.train.report({"step": step, "loss": loss}, checkpoint=kept)
