"""Ray Train with one actor a rank, on chosen batches. The service runs beside Ray, not in it.

    python examples/ray/train.py --pool s3://bucket/pool --learner /shared/learner \\
        --reference /shared/reference --ranks 8

Each actor is a rank: it opens the run, is served its slice, and rank 0 pushes. Ray restarts actors
that fail, from the last checkpoint that was reported, and with another number of ranks where the
cluster has shrunk.
"""

import argparse
import tempfile
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import superbatch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from superbatch.torch import ImageText, Pushes, SelectedBatches, gather, incarnation
from tokenizers import Tokenizer
from torchvision.transforms import v2
from transformers import SiglipModel


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--service", default="http://127.0.0.1:50051", help="as every node reaches it"
    )
    parser.add_argument("--run-id", default="ray", help="the run's id")
    parser.add_argument("--pool", required=True, help="URI of the candidates")
    parser.add_argument(
        "--learner",
        required=True,
        help="a SigLIP folder of transformers, on a path that all nodes have",
    )
    parser.add_argument("--reference", required=True, help="a folder with the frozen model")
    parser.add_argument(
        "--storage", default=str(Path("ray-results").absolute()), help="where Ray keeps checkpoints"
    )
    parser.add_argument("--super-batch-size", type=int, default=640)
    parser.add_argument("--sub-batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(argv)


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


def transform(folder: Path) -> ImageText:
    side = SiglipModel.config_class.from_pretrained(folder).vision_config.image_size
    image = v2.Compose(
        [
            v2.Resize((side, side), v2.InterpolationMode.BILINEAR),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ImageText(
        image,
        lambda captions: torch.tensor([found.ids for found in tokenizer.encode_batch(captions)]),
    )


def siglip_loss(out, model: SiglipModel, rank: int) -> torch.Tensor:
    """This rank's images against all ranks' captions: joint selection counts on all pairs."""
    texts = gather(out.text_embeds)
    logits = out.image_embeds @ texts.T * model.logit_scale.exp() + model.logit_bias
    rows = torch.arange(len(logits), device=logits.device)
    labels = torch.full_like(logits, -1.0)
    labels[rows, rank * len(logits) + rows] = 1.0
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(logits)


def rank_main(args: argparse.Namespace) -> None:
    """What each actor runs."""
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
        transform=transform(Path(args.learner)),
        incarnation=incarnation(),
    )
    pushes = Pushes(dataset.open_run(), model, rank=rank)
    pushes.before(start_step)
    for step, (images, ids) in enumerate(dataset.loader(), start_step):
        out = model(pixel_values=images.to(device), input_ids=ids.to(device))
        loss = siglip_loss(out, learner, rank)
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


def main(argv: list[str] | None = None) -> ray.train.Result:
    args = arguments(argv)
    trainer = ray.train.torch.TorchTrainer(
        rank_main,
        train_loop_config=args,
        scaling_config=ScalingConfig(num_workers=args.ranks, use_gpu=args.gpu),
        run_config=RunConfig(
            name=args.run_id,
            storage_path=args.storage,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    result = trainer.fit()
    print(f"step {result.metrics['step']} loss {result.metrics['loss']:.4f}")
    return result


if __name__ == "__main__":
    main()
