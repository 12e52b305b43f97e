"""Trains a small SigLIP through the service of compose.yaml: data and models go into its object
storage, batches come from the service, weights go back after every step.

    docker compose --file docker/compose.yaml run --rm trainer
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import boto3
import superbatch
import torch

from examples.demo import tiny
from examples.demo.model import Transform, load

BUCKET = os.environ.get("SUPERBATCH_DEMO_BUCKET", "superbatch")


def upload(folder: Path) -> None:
    """Puts the folder into the bucket. The store's address and keys come from the environment, as
    AWS's tools take them.
    """
    client = boto3.client("s3")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"demo/{path.relative_to(folder).as_posix()}")


def loss(model: torch.nn.Module, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """SigLIP's: every image against every caption."""
    logits = model(pixel_values=pixels, input_ids=tokens).logits_per_image
    labels = 2 * torch.eye(len(logits)) - 1
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(logits)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--run", default=f"compose-{int(time.time())}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write_dataset(folder / "data" / "pool", rows=4096)
        learner = tiny.write_siglip(folder / "models" / "learner", seed=0)
        tiny.write_siglip(folder / "models" / "reference", seed=1)
        upload(folder)
        train(learner, arguments.steps, arguments.run)


def train(learner: Path, steps: int, run_id: str) -> None:
    token = os.environ.get("SUPERBATCH_TOKEN_FILE")
    options = {"ca": os.environ.get("SUPERBATCH_CA"), "token": token and Path(token).read_text()}
    uri = os.environ.get("SUPERBATCH_URI", "http://127.0.0.1:50051")
    client = superbatch.connect(uri, **{name: value for name, value in options.items() if value})
    run = client.open_run(
        superbatch.RunSpec(
            run_id=run_id,
            sources=[f"s3://{BUCKET}/demo/data/pool"],
            learner=superbatch.Learner(
                model_uri=f"s3://{BUCKET}/demo/models/learner",
                snapshot_uri=f"s3://{BUCKET}/demo/models/learner/model.safetensors",
            ),
            reference=f"s3://{BUCKET}/demo/models/reference",
            phases=[
                superbatch.Phase(
                    policy="joint", super_batch_size=320, sub_batch_size=64, n_chunks=4
                )
            ],
            loss="sigmoid",
            micro_batch_rows=32,
        )
    )
    model, transform = load(learner), Transform(learner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    waited = 0.0
    batches = run.batches(rank=0, world_size=1, start_step=0, end_step=steps)
    for step in range(steps):
        begun = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - begun
        optimizer.zero_grad()
        value = loss(
            model,
            transform.images(batch["image"].to_pylist()),
            transform.captions(batch["caption"].to_pylist()),
        )
        value.backward()
        optimizer.step()
        run.push_weights(model.state_dict(), step=step, rank=0)
        if step % 10 == 0:
            print(
                f"step {step}: loss {value.item():.3f}, waited {waited:.1f} s in all, "
                f"{batch.receipt.mode}",
                flush=True,
            )
    run.flush()
    run.close()
    print(
        f"{steps} steps of run {run_id}: `superbatch receipts {run_id}` tells why each batch was "
        "chosen"
    )


if __name__ == "__main__":
    main()
