"""The demo's data and reference as tensors: what an arm in one process needs, decoded once and
kept.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet
import torch

from examples.demo.data.build import PoolRecipe, build_dataset
from examples.demo.data.captions import MISMATCHED
from examples.demo.model import SHAPE, Transform, load
from examples.demo.reference import train_reference
from examples.demo.settings import Settings
from examples.demo.train import KEPT


@dataclass
class Rows:
    """Pixels (n, 3, side, side), pixels of the low side, token ids, and what only the study
    knows.
    """

    pixels: torch.Tensor
    low: torch.Tensor
    ids: torch.Tensor
    wrong: torch.Tensor
    concept: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, rows: torch.Tensor) -> "Rows":
        concepts = [self.concept[row] for row in rows.tolist()]
        return Rows(self.pixels[rows], self.low[rows], self.ids[rows], self.wrong[rows], concepts)


class World:
    """One pool, the test splits, the reference, and the weights that every arm begins with."""

    def __init__(self, dataset: Path, folder: Path, low_side: int, start: Path | None = None):
        self.dataset, self.folder = dataset, folder
        self.start = start or folder / KEPT
        self.transform = Transform(folder)
        self.small = self.transform.at(low_side)
        self.pool = self.rows("pool")
        self.tests = {split: self.rows("eval", split) for split in ("val", "test")}

    @classmethod
    def of(
        cls,
        cache: Path,
        recipe: PoolRecipe,
        reference: Settings,
        start_at: int | None = None,
        shape: dict = SHAPE,
        processes: int = 1,
    ) -> "World":
        dataset = build_dataset(cache, recipe, processes)
        folder = train_reference(cache, dataset, reference, shape=shape)
        start = None
        if start_at is not None:
            # The same first steps: the learning rate does not fall yet.
            early = replace(reference, steps=start_at, keep_at=start_at, cooldown=0.0)
            start = train_reference(cache, dataset, early, shape=shape) / KEPT
        return cls(dataset, folder, reference.low_side, start)

    def reference(self):
        return load(self.folder).eval()

    def learner(self):
        return load(self.folder, self.start).train()

    def rows(self, name: str, split: str = "train") -> Rows:
        low = self.small.size[0]
        kept = self.folder / f"{self.dataset.name}-{name}-{split}-{low}.pt"
        if not kept.exists():
            columns = ["png", "caption", "kind", "concept"]
            table = pyarrow.parquet.read_table(
                self.dataset / name, columns=columns, filters=[("split", "==", split)]
            )
            images, texts, kinds, concepts = (table[column].to_pylist() for column in columns)
            wrong = torch.tensor([kind in MISMATCHED for kind in kinds])
            torch.save(
                [
                    self.transform.images(images),
                    self.small.images(images),
                    self.transform.captions(texts),
                    wrong,
                    concepts,
                ],
                kept,
            )
        return Rows(*torch.load(kept))
