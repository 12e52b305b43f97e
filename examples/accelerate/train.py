"""A loop with Hugging Face Accelerate on chosen batches, on one process or several.

    accelerate launch --num_processes 2 examples/accelerate/train.py --pool file:///data/pool \\
        --learner models/learner --reference models/reference

The loader is not given to `accelerator.prepare`: each rank is already served its own slice, which
Accelerate would cut once more. Model and optimizer are.
"""

import argparse
from pathlib import Path

import superbatch
import torch
from accelerate import Accelerator
from superbatch.torch import ImageText, Pushes, SelectedBatches, incarnation, sigmoid_loss
from transformers import SiglipModel


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--service", default="http://127.0.0.1:50051")
    parser.add_argument("--run-id", default="accelerate", help="the run's id")
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
        max_ahead=2 + args.workers,
    )


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    # Else, on a machine without one, each process takes itself for the only one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    rank, world_size = accelerator.process_index, accelerator.num_processes
    model = SiglipModel.from_pretrained(args.learner).train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=args.lr))
    found = max(args.checkpoints.glob("step-*"), default=None)
    start_step = 0 if found is None else int(found.name.removeprefix("step-")) + 1
    if found is not None:
        accelerator.load_state(str(found))

    dataset = SelectedBatches(
        args.service,
        run_spec(args),
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        end_step=args.steps,
        transform=ImageText.of_folder(args.learner, names=("pixel_values", "input_ids")),
        incarnation=incarnation(),
    )
    pushes = Pushes(dataset.open_run(), model, rank=rank)
    pushes.before(start_step)
    for step, batch in enumerate(dataset.loader(num_workers=args.workers), start_step):
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        # Over all ranks' rows: joint selection counts on all pairs.
        out, learner = model(**batch), accelerator.unwrap_model(model)
        loss = sigmoid_loss(
            out.image_embeds, out.text_embeds, learner.logit_scale.exp(), learner.logit_bias
        )
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        pushes.after(step)
        accelerator.print(f"step {step} loss {loss.item():.4f}", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            accelerator.save_state(str(args.checkpoints / f"step-{step:08d}"))
    pushes.flush()
    accelerator.end_training()


if __name__ == "__main__":
    main()
