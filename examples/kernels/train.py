"""Joint selection in a loop of your own, without a service: it scores its candidates itself.

    python examples/kernels/train.py --pool data/pool --learner models/learner \\
        --reference models/reference

What the service would add: the scoring on other machines and ahead of time, receipts, resume, and
data too large for one machine.
"""

import argparse
from pathlib import Path

import pyarrow
import pyarrow.dataset
import torch
from superbatch_kernels import Model, select
from tokenizers import Tokenizer
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from transformers import SiglipModel


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=Path, required=True, help="a folder of Parquet files")
    parser.add_argument("--image-column", default="png")
    parser.add_argument(
        "--learner",
        type=Path,
        required=True,
        help="a SigLIP folder of transformers, with initial weights",
    )
    parser.add_argument(
        "--reference", type=Path, required=True, help="a folder with the frozen model"
    )
    parser.add_argument("--super-batch-size", type=int, default=640)
    parser.add_argument("--sub-batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(argv)


@torch.no_grad()
def seen_by(model: SiglipModel, images: torch.Tensor, ids: torch.Tensor) -> Model:
    """What a model makes of the candidates: embeddings of length 1, and its logits' scale and
    bias.
    """
    out = model(pixel_values=images, input_ids=ids)
    return Model(
        out.image_embeds.float().cpu(),
        out.text_embeds.float().cpu(),
        model.logit_scale.exp().item(),
        model.logit_bias.item(),
    )


def candidates(args: argparse.Namespace, side: int):
    """Super-batches of tensors, in the order of the files, again and again."""
    tokenizer = Tokenizer.from_file(str(args.learner / "tokenizer.json"))
    image = v2.Compose(
        [
            v2.Resize((side, side), v2.InterpolationMode.BILINEAR),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    held = None
    while True:
        for part in pyarrow.dataset.dataset(args.pool).to_batches(
            columns=[args.image_column, "caption"]
        ):
            table = pyarrow.Table.from_batches([part])
            held = table if held is None else pyarrow.concat_tables([held, table])
            while len(held) >= args.super_batch_size:
                now, held = held.slice(0, args.super_batch_size), held.slice(args.super_batch_size)
                stored = [
                    torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    for data in now[args.image_column].to_pylist()
                ]
                images = torch.stack(
                    [image(decode_image(data, ImageReadMode.RGB)) for data in stored]
                )
                yield (
                    images,
                    torch.tensor(
                        [found.ids for found in tokenizer.encode_batch(now["caption"].to_pylist())]
                    ),
                )


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    learner = SiglipModel.from_pretrained(args.learner).train()
    reference = SiglipModel.from_pretrained(args.reference).eval()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=args.lr)
    supers = candidates(args, learner.config.vision_config.image_size)
    for step, (images, ids) in zip(range(args.steps), supers):
        drawn = select(
            learner=seen_by(learner, images, ids),
            reference=seen_by(reference, images, ids),
            sub_batch_size=args.sub_batch_size,
            n_chunks=4,
            seed=0,
            step=step,
        )
        chosen = torch.from_numpy(drawn.indices)
        loss = learner(pixel_values=images[chosen], input_ids=ids[chosen], return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(
            f"step {step} loss {loss.item():.4f} batch score {drawn.batch_score:.3f} "
            f"(chosen {drawn.mean_score_chosen:.3f}, candidates {drawn.mean_score_candidates:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
