"""The reference: the same architecture, trained on the small clean set without the service. Its
early weights start the arms.

This is data-quality bootstrapping as in JEST++ (Evans et al. 2024, section 4): a model of a small
curated set says what is worth learning in a large uncurated one. Trained once and kept, by what it
was made of.
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

from .data.captions import junk
from .data.packages import DemoError
from .evaluate import Evaluation
from .model import SHAPE, Transform, embed, load, save_weights, write_folder
from .progress import progress
from .settings import Settings
from .train import Batch, Trainer, fit, run_ranks, start_rank

VERSION = 3
SEED = 7
# How many junk captions the tokenizer learns from.
JUNK = 2000
SCORED_ROWS = 256


def shuffled_batches(
    folder: Path, transform: Transform, settings: Settings, rank: int, seed: int
) -> Iterator[Batch]:
    """Epoch after epoch of a folder in an order of its own; each rank takes its slice of each
    batch. With a low side, half as many further rows come at that side.
    """
    table = pyarrow.parquet.read_table(folder, columns=["png", "caption"])
    images = table["png"].to_pylist()
    pixels, tokens = transform.images(images), transform.captions(table["caption"].to_pylist())
    low = settings.low_side
    small = None if low is None else transform.at(low).images(images)
    full = settings.sub_batch_size // settings.world_size
    local = full if small is None else full + full // 2
    size = local * settings.world_size
    rng, order, step = random.Random(seed), [], 0
    while True:
        while len(order) < size:
            order += rng.sample(range(len(pixels)), len(pixels))
        chosen, order = order[:size][rank * local : (rank + 1) * local], order[size:]
        if small is None:
            yield Batch(step, pixels[chosen], tokens[chosen])
        else:
            large, low = pixels[chosen[:full]], small[chosen[full:]]
            yield Batch(step, large, tokens[chosen], small=low)
        step += 1


def rank_main(
    rank: int, dataset: Path, model_folder: Path, folder: Path, settings: Settings
) -> None:
    start_rank(rank, settings.world_size, folder / "rendezvous")
    trainer = Trainer(model_folder, settings, rank)
    evaluation = Evaluation(dataset / "eval", trainer.transform, "val")
    batches = shuffled_batches(dataset / "clean", trainer.transform, settings, rank, SEED)
    fit(trainer, batches, evaluation, "train reference", folder)
    if rank == 0:
        save_weights(trainer.model, folder / "model.safetensors")


def start_folder(cache: Path, dataset: Path, shape: dict = SHAPE) -> Path:
    """A model folder with random weights. Its words are those of the clean set and of junk: the
    same for every pool.
    """
    captions = pyarrow.parquet.read_table(dataset / "clean", columns=["caption"])[
        "caption"
    ].to_pylist()
    rng = random.Random(SEED)
    words = captions + [junk(rng) for _ in range(JUNK)]
    return write_folder(cache / "reference-start", words, SEED, shape)


def train_reference(
    cache: Path,
    dataset: Path,
    settings: Settings,
    start: Path | None = None,
    shape: dict = SHAPE,
) -> Path:
    """A model folder with the reference's weights, and those of step `keep_at` beside them in
    KEPT.
    """
    clean = json.loads((dataset / "dataset.json").read_text())["clean"]
    recipe = json.dumps([VERSION, SEED, clean, shape, asdict(settings)], sort_keys=True)
    folder = cache / f"reference-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if (folder / "model.safetensors").exists():
        return folder
    start = start or start_folder(cache, dataset, shape)
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        shutil.copy(start / name, partial / name)
    run_ranks(rank_main, (dataset, start, partial, settings), settings.world_size)
    partial.rename(folder)
    return folder


def clip_scores(folder: Path, pool: Path) -> torch.Tensor:
    """Of a pool's rows in their order, by the model of `folder`: 2.5 * max(cosine, 0), as in Hessel
    et al. 2021, arXiv 2104.08718.
    """
    model, transform = load(folder).eval(), Transform(folder)
    shards, scores = sorted(pool.glob("*.parquet")), []
    for shard in progress(shards, len(shards), "score the pool once", "shard"):
        for batch in pyarrow.parquet.ParquetFile(shard).iter_batches(
            SCORED_ROWS, columns=["png", "caption"]
        ):
            pixels = transform.images(batch["png"].to_pylist())
            with torch.no_grad():
                image, text = embed(model, pixels, transform.captions(batch["caption"].to_pylist()))
            scores.append(2.5 * (image * text).sum(dim=1).clamp(min=0))
    return torch.cat(scores)


def clip_score_of_best(folder: Path, pool: Path, share: float) -> float:
    """The CLIPScore that this share of the pool reaches. Kept beside the reference, by the pool."""
    kept = folder / f"clip-score-of-best-{share:g}-{pool.parent.name}.json"
    if not kept.exists():
        kept.write_text(json.dumps(threshold(clip_scores(folder, pool), share)))
    return json.loads(kept.read_text())


def threshold(scores: torch.Tensor, share: float) -> float:
    """The least score of the best `share`, or the least above 0 if fewer are above it: CLIPScore
    ends at 0, so a filter at 0 would leave nothing out.
    """
    above = scores[scores > 0]
    if not len(above):
        raise DemoError("the reference gives no row of the pool a CLIPScore above 0; train it more")
    return max(torch.quantile(scores, 1 - share).item(), above.min().item())
