"""Draws the pictures of docs/selection.md: python docs/site/pictures.py

A world of few candidates that shows what real super-batches have: pictures of the same thing, wrong
captions, a reference that tells things apart, and a learner that does so less well. The batches are
drawn by the kernels that the service uses.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from superbatch_kernels import Model, Selection, select

DOCS = Path(__file__).parents[1]
CANDIDATES, SUB_BATCH_SIZE, THINGS, N_CHUNKS, WIDTH = 40, 12, 8, 4, 24
SCALE, BIAS = 12.0, -6.0
COLOURS = {"cmap": "RdBu_r", "interpolation": "nearest"}


class World:
    """Candidates sorted by what they show, and what two models make of them."""

    def __init__(self, seed: int = 1) -> None:
        dice = np.random.default_rng(seed)
        things = dice.standard_normal((THINGS, WIDTH)).astype(np.float32)
        shown = np.sort(np.arange(CANDIDATES) % THINGS)
        said = shown.copy()
        self.wrong = dice.choice(CANDIDATES, CANDIDATES // 4, replace=False)
        said[self.wrong] = (said[self.wrong] + dice.integers(1, THINGS, len(self.wrong))) % THINGS
        own = dice.standard_normal((2, CANDIDATES, WIDTH)).astype(np.float32)

        def seen(blur: float, own_share: float) -> Model:
            noise = blur * dice.standard_normal((2, CANDIDATES, WIDTH)).astype(np.float32)
            rows = np.stack([things[shown], things[said]]) + own_share * own + noise
            image, text = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
            return Model(np.ascontiguousarray(image), np.ascontiguousarray(text), SCALE, BIAS)

        self.reference, self.learner = seen(0.25, 0.35), seen(1.0, 0.35)

    def losses(self, model: Model) -> np.ndarray:
        """Entry [i, j]: the sigmoid loss of picture i with caption j, apart but on the diagonal."""
        logits = SCALE * model[0] @ model[1].T + BIAS
        signs = 2 * np.eye(CANDIDATES) - 1
        return np.logaddexp(0, -signs * logits)

    def learnability(self) -> np.ndarray:
        return self.losses(self.learner) - self.losses(self.reference)

    def drawn(self, policy: str, seed: int = 1) -> Selection:
        chunks = {"n_chunks": N_CHUNKS} if policy == "joint" else {}
        return select(
            self.learner,
            self.reference,
            sub_batch_size=SUB_BATCH_SIZE,
            policy=policy,
            seed=seed,
            **chunks,
        )


def plain(axes: plt.Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def matrices(world: World) -> plt.Figure:
    """Losses of both models, and their difference."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained")
    learner, reference = world.losses(world.learner), world.losses(world.reference)
    top = max(learner.max(), reference.max())
    parts = [
        (learner, "learner's loss", {"cmap": "Greys", "vmin": 0, "vmax": top}),
        (reference, "− reference's loss", {"cmap": "Greys", "vmin": 0, "vmax": top}),
        (learner - reference, "= learnability", COLOURS | {"vmin": -4, "vmax": 4}),
    ]
    for place, (matrix, title, look) in zip(axes, parts, strict=True):
        shown = place.imshow(matrix, **look)
        plain(place, title)
        place.set_xlabel("caption of candidate", fontsize=8)
        figure.colorbar(shown, ax=place, shrink=0.75)
    axes[0].set_ylabel("picture of candidate", fontsize=8)
    return figure


def chunks(world: World) -> plt.Figure:
    """The candidates' scores before each chunk is drawn."""
    matrix, indices = world.learnability(), world.drawn("joint").indices
    own = np.diag(matrix)
    rows = N_CHUNKS
    figure, axes = plt.subplots(rows, 1, figsize=(10, 7), sharex=True, layout="constrained")
    size = SUB_BATCH_SIZE // N_CHUNKS
    for k, place in enumerate(axes):
        before, now = indices[: k * size], indices[k * size : (k + 1) * size]
        given = matrix[before].sum(axis=0) + matrix[:, before].sum(axis=1)
        left = np.setdiff1d(np.arange(CANDIDATES), before)
        place.bar(left, own[left], 0.8, color="0.65", label="own pair")
        place.bar(left, given[left], 0.4, color="tab:blue", label="with those drawn before")
        place.plot(now, (own + given)[now], "v", color="tab:red", label="score of those drawn now")
        place.plot(before, np.zeros(len(before)), "x", color="0.4", label="drawn before")
        place.axhline(0, color="0.2", linewidth=0.6)
        place.set_ylabel(f"chunk {k}", fontsize=9)
        place.tick_params(labelsize=7)
    axes[-1].legend(fontsize=8, ncols=4, loc="upper left", frameon=False)
    axes[-1].set_ylim(top=axes[-1].get_ylim()[1] * 1.35)
    axes[-1].set_xlabel("candidate; neighbours show the same thing", fontsize=8)
    return figure


def batches(world: World) -> plt.Figure:
    """What the pairs within a batch hold, by policy."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
    matrix = world.learnability()
    for place, policy in zip(axes, ("uniform", "independent", "joint"), strict=True):
        selection = world.drawn(policy)
        order = np.sort(selection.indices)
        shown = place.imshow(matrix[np.ix_(order, order)], vmin=-4, vmax=4, **COLOURS)
        plain(place, f"{policy}: batch score {selection.batch_score:.1f}")
    figure.colorbar(shown, ax=axes, shrink=0.75)
    return figure


def main() -> None:
    world = World()
    for name, draw in (("matrices", matrices), ("chunks", chunks), ("batches", batches)):
        figure = draw(world)
        figure.savefig(DOCS / f"selection-{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
