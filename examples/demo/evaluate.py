"""Accuracy on the vendor held out of training: which of about GALLERY names belongs to this
picture?

The test pictures fall into galleries of about that size by a fixed draw: chance is 5 in GALLERY.
"""

from pathlib import Path

import pyarrow.parquet
import torch
from transformers import SiglipModel

from .model import Transform, embed

ROWS = 256
GALLERY = 320


class Evaluation:
    """Pictures and names of one split of `eval/`, decoded once."""

    def __init__(self, folder: Path, transform: Transform, split: str = "test"):
        table = pyarrow.parquet.read_table(
            folder, columns=["png", "caption"], filters=[("split", "==", split)]
        )
        self.pixels = transform.images(table["png"].to_pylist())
        self.ids = transform.captions(table["caption"].to_pylist())

    def recalls(self, model: SiglipModel) -> tuple[float, float]:
        """Image-to-text recall at 1 and at 5 among the names of a gallery, averaged over the
        split's galleries.
        """
        was_training = model.training
        model.eval()
        with torch.no_grad():
            parts = [
                embed(model, self.pixels[i : i + ROWS], self.ids[i : i + ROWS])
                for i in range(0, len(self.ids), ROWS)
            ]
        model.train(was_training)
        image, text = (torch.cat(side) for side in zip(*parts, strict=True))
        return in_galleries(image, text)


def in_galleries(image: torch.Tensor, text: torch.Tensor) -> tuple[float, float]:
    """Recall at 1 and at 5 of pictures among the names of their gallery, averaged over the
    galleries.
    """
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))
    tables = [
        image[rows] @ text[rows].T for rows in order.chunk(max(1, round(len(image) / GALLERY)))
    ]
    return tuple(sum(recall(table, k) for table in tables) / len(tables) for k in (1, 5))


def recall(similarity: torch.Tensor, k: int) -> float:
    """Share of rows whose own column is among the k most similar. Ties count against."""
    others_at_least = (similarity >= similarity.diagonal()[:, None]).sum(dim=1) - 1
    return (others_at_least < k).float().mean().item()
