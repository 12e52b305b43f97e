"""`python -m examples.study.fidelities`: what each approximation of the demo's model costs, and how
much of the choice it keeps. The table of docs/flexi.md.

A learner and a reference go on for some steps with half of each batch approximated, and again
without. Then super-batches are drawn from by embeddings of full fidelity and by approximate ones,
with the same noise and the same weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from superbatch_kernels import Model, select
from timm.layers import resample_patch_embed
from transformers import SiglipModel

from examples.demo.settings import FULL
from examples.demo.train import optimizer

from .harness import Order, half_low, loss_of, scale_of
from .world import Rows, World

SUPER_BATCH, SUB_BATCH, CHUNKS = 640, 128, 16
TIMED = 15


@dataclass(frozen=True)
class Way:
    """An approximation, by the field of `superbatch.Approximation` that asks for it."""

    field: str
    value: float

    def __str__(self) -> str:
        return f"{self.field}={self.value:g}"


FULL_FIDELITY = Way("layers", 2)
WAYS = (
    Way("resolution", 12),
    Way("resolution", 8),
    Way("patch", 8),
    Way("patch_dropout", 0.5),
    Way("patch_dropout", 0.75),
    Way("layers", 1),
)


def image(model: SiglipModel, pixels: torch.Tensor, rows: torch.Tensor, way: Way) -> torch.Tensor:
    """Image embeddings at a fidelity. `rows` are the rows' numbers, which decide what is left
    out.
    """
    tower, side, patch = model.vision_model, pixels.shape[-1], model.config.vision_config.patch_size
    entry, layers = tower.embeddings, tower.encoder.layers
    kernel, grid = entry.patch_embedding.weight, side // patch
    if way.field == "resolution":
        size = (int(way.value),) * 2
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        grid = int(way.value) // patch
    elif way.field == "patch":
        patch, grid = int(way.value), side // int(way.value)
        kernel = resample_patch_embed(
            kernel, [patch, patch], interpolation="bilinear", antialias=False
        )
    x = F.conv2d(pixels, kernel, entry.patch_embedding.bias, stride=patch).flatten(2).mT
    if grid * grid == entry.num_positions:
        x = x + entry.position_embedding.weight
    else:
        own = model.config.vision_config.patch_size
        x = x + entry.interpolate_pos_encoding(x, grid * own, grid * own)
    if way.field == "patch_dropout":
        x = x.gather(1, kept(rows, x.shape[1], way.value).unsqueeze(-1).expand(-1, -1, x.shape[2]))
    for layer in layers[: int(way.value)] if way.field == "layers" else layers:
        x = layer(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
    return F.normalize(tower.head(tower.post_layernorm(x)), dim=-1)


def kept(rows: torch.Tensor, patches: int, share: float) -> torch.Tensor:
    """The places of the patches that each row keeps, by its number alone."""
    count = max(1, int(patches * (1 - share)))
    keys = [numpy.random.default_rng(row).permutation(patches)[:count] for row in rows.tolist()]
    return torch.from_numpy(numpy.sort(numpy.stack(keys), axis=1))


def text(model: SiglipModel, ids: torch.Tensor) -> torch.Tensor:
    return F.normalize(model.get_text_features(input_ids=ids), dim=-1)


def go_on(model: SiglipModel, pool: Rows, steps: int, rate: float, way: Way | None) -> SiglipModel:
    """Trains on, half of each batch at the approximation; all of it in full without one."""
    model.train()
    order, adam = Order(len(pool), seed=1), optimizer(model, FULL.arms)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rows = order.take(SUB_BATCH)
        low = half_low(rows)
        high = torch.ones(len(rows), dtype=torch.bool).index_fill(0, low, False).nonzero()[:, 0]
        parts = [(rows[high], FULL_FIDELITY), (rows[low], way or FULL_FIDELITY)]
        images = torch.cat([image(model, pool.pixels[part], part, how) for part, how in parts])
        ids = pool.ids[torch.cat([part for part, _ in parts])]
        loss = loss_of(images, text(model, ids), model)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    return model.eval()


def score(learner: SiglipModel, reference: SiglipModel, given, rows) -> float:
    """The learnability of a sub-batch by embeddings of full fidelity."""
    learnt, known = (
        loss_of(images[rows], texts[rows], model)
        for model, (images, texts) in zip((learner, reference), given, strict=True)
    )
    return (learnt - known).item()


@torch.no_grad()
def compared(learner, reference, pool: Rows, way: Way, count: int) -> tuple[float, float]:
    """The overlap of the draws at both fidelities, and the share of the gain that the approximate
    one keeps, as means over super-batches.
    """
    order, chance = Order(len(pool), seed=2), torch.Generator().manual_seed(3)
    overlaps, gains = [], []
    for step in range(count):
        rows = order.take(SUPER_BATCH)
        texts = [text(model, pool.ids[rows]) for model in (learner, reference)]

        def embedded(how: Way, rows=rows, texts=texts) -> list:
            images = [image(model, pool.pixels[rows], rows, how) for model in (learner, reference)]
            return list(zip(images, texts, strict=True))

        def draw(given, step=step) -> torch.Tensor:
            models = [
                Model(*pair, *scale_of(model))
                for pair, model in zip(given, (learner, reference), strict=True)
            ]
            drawn = select(
                learner=models[0],
                reference=models[1],
                policy="joint",
                sub_batch_size=SUB_BATCH,
                n_chunks=CHUNKS,
                seed=0,
                step=step,
                threads=1,
            )
            return torch.as_tensor(numpy.asarray(drawn.indices).astype(numpy.int64))

        full = embedded(FULL_FIDELITY)
        whole, low = draw(full), draw(embedded(way))
        chance_rows = torch.randperm(SUPER_BATCH, generator=chance)[:SUB_BATCH]
        scores = [score(learner, reference, full, drawn) for drawn in (whole, low, chance_rows)]
        overlaps.append(len(set(whole.tolist()) & set(low.tolist())) / SUB_BATCH)
        gains.append((scores[1] - scores[2]) / (scores[0] - scores[2]))
    return statistics.mean(overlaps), statistics.mean(gains)


@torch.no_grad()
def seconds(model: SiglipModel, pool: Rows) -> dict[Way, float]:
    """The least processor time of the image tower for one super-batch, by fidelity, measured in
    turns.
    """
    rows = torch.arange(SUPER_BATCH)
    best: dict[Way, float] = {}
    for _ in range(TIMED):
        for way in (FULL_FIDELITY, *WAYS):
            begun = time.process_time()
            image(model, pool.pixels[rows], rows, way)
            spent = time.process_time() - begun
            best[way] = min(spent, best.get(way, spent))
    return best


def flops(model: SiglipModel, way: Way) -> float:
    """Operations of one picture, as the service counts them."""
    about = model.config.vision_config
    d, inner, depth = about.hidden_size, about.intermediate_size, about.num_hidden_layers
    side, patch = about.image_size, about.patch_size
    n = (side // patch) ** 2
    embed = 3 * side * side * d
    if way.field == "resolution":
        n, embed = (way.value // patch) ** 2, 3 * way.value**2 * d
    elif way.field == "patch":
        n = (side // way.value) ** 2
    elif way.field == "patch_dropout":
        n = max(1, int(n * (1 - way.value)))
    elif way.field == "layers":
        depth = way.value
    layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * inner
    head = 2 * d * d + 2 * n * d * d + 2 * n * d + 2 * d * inner
    return 2 * (embed + depth * layer + head)


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study.fidelities", description=__doc__
    )
    parser.add_argument("--cache", type=Path, default=Path("target/demo-cache"))
    parser.add_argument("--steps", type=int, default=150, help="of training at both fidelities")
    parser.add_argument("--super-batches", type=int, default=8, help="that are drawn from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    world = World.of(args.cache.resolve(), FULL.pool, FULL.reference)
    curated = world.pool.only((~world.pool.wrong).nonzero()[:, 0])

    def models(way: Way | None) -> tuple[SiglipModel, SiglipModel]:
        rate = FULL.arms.learning_rate
        return (
            go_on(world.learner(), world.pool, args.steps, rate, way),
            go_on(world.reference(), curated, args.steps, rate / 2, way),
        )

    strangers, spent = models(None), seconds(world.reference(), world.pool)
    own = flops(strangers[0], FULL_FIDELITY)
    say("| way | image FLOPs | image seconds | overlap, gain | the same, never trained so |")
    say("|---|---|---|---|---|")
    for way in WAYS:
        knows = compared(*models(way), world.pool, way, args.super_batches)
        other = compared(*strangers, world.pool, way, args.super_batches)
        price = flops(strangers[0], way) / own
        say(
            f"| `{way}` | {price:.2f} | {spent[way] / spent[FULL_FIDELITY]:.2f} "
            f"| {knows[0]:.2f}, {knows[1]:.2f} | {other[0]:.2f}, {other[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
