"""Accuracy on the vendor held out of training: which of about GALLERY names belongs to this
picture?

The test pictures fall into galleries of about that size by a fixed draw: chance is 5 in GALLERY.
Those of `val` are one gallery. Settings are chosen by `val`, and reported on `test`.
"""

from pathlib import Path

import pyarrow.parquet
import torch
from transformers import SiglipModel

from .data.packages import DemoError
from .model import Transform, embed

ROWS = 256
GALLERY = 320


class Evaluation:
    """Pictures and names of one split of `eval/`, decoded once."""

    def __init__(self, folder: Path, transform: Transform, split: str = "test"):
        table = pyarrow.parquet.read_table(
            folder, columns=["png", "caption"], filters=[("split", "==", split)]
        )
        if not len(table):
            raise DemoError(f"{folder} has no names of `{split}`")
        self.pixels = transform.images(table["png"].to_pylist())
        self.ids = transform.captions(table["caption"].to_pylist())

    def recalls(self, model: SiglipModel) -> tuple[float, float]:
        """Image-to-text recall at 1 and at 5 among the names of a gallery, averaged over the
        split's galleries. Where there are ranks, all of them call it, and each embeds its share.
        """
        distributed = torch.distributed.is_initialized()
        rank, world_size = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size())
            if distributed
            else (0, 1)
        )
        # Shares of one size, which gathering needs: the last ones begin again from the first row.
        share = -(-len(self.ids) // world_size)
        mine = torch.arange(rank * share, (rank + 1) * share) % len(self.ids)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            parts = [embed(model, self.pixels[rows], self.ids[rows]) for rows in mine.split(ROWS)]
        model.train(was_training)
        both = torch.cat([torch.stack(part) for part in parts], dim=1)
        shares = [both]
        if distributed:
            shares = [torch.empty_like(both) for _ in range(world_size)]
            torch.distributed.all_gather(shares, both.contiguous())
        image, text = torch.cat(shares, dim=1)[:, : len(self.ids)]
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
