"""The reference: the same architecture, trained on the small clean set without the service.

This is data-quality bootstrapping as in JEST++ (Evans et al. 2024, section 4): a model of a small curated set says what is
worth learning in a large uncurated one. Trained once and kept, by what it was made of.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet
import torch

from .evaluate import Evaluation
from .model import SHAPE, save_weights
from .settings import Settings
from .train import Batch, Trainer, fit, start_rank

VERSION = 1
SEED = 7


def shuffled_batches(folder: Path, settings: Settings, rank: int, seed: int) -> Iterator[Batch]:
    """Epoch after epoch of a folder in an order of its own; each rank takes its slice of each batch."""
    table = pyarrow.parquet.read_table(folder, columns=["png", "caption"])
    images, captions = table["png"].to_pylist(), table["caption"].to_pylist()
    size, local = settings.sub_batch_size, settings.sub_batch_size // settings.world_size
    rng, order, step = random.Random(seed), [], 0
    while True:
        while len(order) < size:
            order += rng.sample(range(len(images)), len(images))
        chosen, order = order[:size][rank * local:(rank + 1) * local], order[size:]
        yield Batch(step, [images[i] for i in chosen], [captions[i] for i in chosen])
        step += 1


def rank_main(rank: int, dataset: Path, model_folder: Path, folder: Path, settings: Settings) -> None:
    start_rank(rank, settings.world_size, folder / "rendezvous")
    trainer = Trainer(model_folder, settings, rank)
    evaluation = Evaluation(dataset / "eval", trainer.transform)
    batches = shuffled_batches(dataset / "clean", settings, rank, SEED)
    fit(trainer, batches, evaluation, "train reference", folder)
    if rank == 0:
        save_weights(trainer.model, folder / "model.safetensors")


def train_reference(cache: Path, dataset: Path, model_folder: Path, settings: Settings) -> Path:
    """A model folder with the reference's weights."""
    recipe = json.dumps([VERSION, SEED, dataset.name, SHAPE, asdict(settings)], sort_keys=True)
    folder = cache / f"reference-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if (folder / "model.safetensors").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        shutil.copy(model_folder / name, partial / name)
    torch.multiprocessing.spawn(rank_main, (dataset, model_folder, partial, settings), nprocs=settings.world_size)
    partial.rename(folder)
    return folder
