"""Accuracy on the vendor that nobody trained on: which caption belongs to this picture?"""

from pathlib import Path

import pyarrow.parquet
import torch

from .model import Transform, embed
from transformers import SiglipModel

ROWS = 256


class Evaluation:
    """Pictures and names of one split of `eval/`, decoded once."""

    def __init__(self, folder: Path, transform: Transform, split: str = "test"):
        table = pyarrow.parquet.read_table(folder, columns=["png", "caption"], filters=[("split", "==", split)])
        self.pixels = transform.images(table["png"].to_pylist())
        self.ids = transform.captions(table["caption"].to_pylist())

    def recalls(self, model: SiglipModel) -> tuple[float, float]:
        """Image-to-text recall at 1 and at 5, over all names of the split."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            parts = [embed(model, self.pixels[i:i + ROWS], self.ids[i:i + ROWS]) for i in range(0, len(self.ids), ROWS)]
        model.train(was_training)
        image, text = (torch.cat(side) for side in zip(*parts, strict=True))
        return recall(image @ text.T, 1), recall(image @ text.T, 5)


def recall(similarity: torch.Tensor, k: int) -> float:
    """Share of rows whose own column is among the k most similar. Ties count against."""
    others_at_least = (similarity >= similarity.diagonal()[:, None]).sum(dim=1) - 1
    return (others_at_least < k).float().mean().item()
