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


class World:
    """Candidates sorted by what they show, and what two models make of them."""

    def __init__(self, seed: int = 1) -> None:
        dice = np.random.default_rng(seed)
        things = dice.standard_normal((THINGS, WIDTH)).astype(np.float32)
        shown = np.sort(np.arange(CANDIDATES) % THINGS)
        #: What each candidate's picture shows. Candidates of one thing are neighbours.
        self.shown = shown
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


# Where the colours of a difference end; what is beyond has the last one.
CLIP = 4
NAMED = {"cmap": "RdBu_r", "interpolation": "nearest", "vmin": -CLIP, "vmax": CLIP}
STYLE = {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left"}


def borders(shown: np.ndarray) -> np.ndarray:
    """Between which candidates one thing ends and the next begins."""
    return np.flatnonzero(np.diff(shown)) + 0.5


def delimit(axes: plt.Axes, shown: np.ndarray) -> None:
    """Thin lines between things, in both directions, and their numbers as ticks."""
    for border in borders(shown):
        axes.axhline(border, color="0.55", linewidth=0.5)
        axes.axvline(border, color="0.55", linewidth=0.5)
    things = sorted(set(shown.tolist()))
    middles = [np.flatnonzero(shown == thing).mean() for thing in things]
    axes.set_xticks(middles, things)
    axes.set_yticks(middles, things)
    axes.tick_params(length=0, labelsize=9)
    axes.set_xlabel("caption, by what its picture shows")


def matrices(world: World) -> plt.Figure:
    """Losses of both models, and their difference."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.1), layout="constrained")
    learner, reference = world.losses(world.learner), world.losses(world.reference)
    greys = {"cmap": "Greys", "vmin": 0, "vmax": max(learner.max(), reference.max())}
    parts = [
        (learner, "Learner's loss", greys, {}),
        (reference, "less: reference's loss", greys, {}),
        (
            learner - reference,
            "is: learnability",
            NAMED,
            {"extend": "both", "ticks": [-CLIP, 0, CLIP]},
        ),
    ]
    for place, (matrix, title, look, scale) in zip(axes, parts, strict=True):
        shown = place.imshow(matrix, **look)
        place.set_title(title)
        delimit(place, world.shown)
        place.plot(world.wrong, world.wrong, "o", mfc="none", mec="#2f9e44", ms=4.5, mew=1.1)
        bar = figure.colorbar(shown, ax=place, location="bottom", shrink=0.9, pad=0.03, **scale)
        bar.ax.tick_params(labelsize=9)
        bar.set_label("nats" if not scale else f"nats; beyond ±{CLIP} the last colour")
    axes[0].set_ylabel("picture, by what it shows")
    figure.suptitle(
        f"{CANDIDATES} pictures × {CANDIDATES} captions of {THINGS} things; green circles: "
        "pairs whose caption is wrong",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    return figure


def chunks(world: World) -> plt.Figure:
    """The candidates' scores before each chunk is drawn."""
    matrix, indices = world.learnability(), world.drawn("joint").indices
    own, size = np.diag(matrix), SUB_BATCH_SIZE // N_CHUNKS
    figure, axes = plt.subplots(
        N_CHUNKS, 1, figsize=(10, 8.2), sharex=True, sharey=True, layout="constrained"
    )
    for k, place in enumerate(axes):
        before, now = indices[: k * size], indices[k * size : (k + 1) * size]
        given = matrix[before].sum(axis=0) + matrix[:, before].sum(axis=1)
        left = np.setdiff1d(np.arange(CANDIDATES), before)
        place.bar(left, own[left], 0.8, color="0.72", label="own pair")
        place.bar(left, given[left], 0.4, color="tab:blue", label="pairs with those drawn before")
        place.plot(
            now,
            (own + given)[now],
            "v",
            color="tab:red",
            ms=8,
            mec="white",
            zorder=3,
            label="drawn now: the sum of both",
        )
        for candidate in before:
            place.axvspan(candidate - 0.5, candidate + 0.5, color="0.92", zorder=0, linewidth=0)
        place.axhline(0, color="0.2", linewidth=0.6)
        for border in borders(world.shown):
            place.axvline(border, color="0.55", linewidth=0.5, linestyle=":")
        place.set_title(f"Chunk {k}" + (", given those drawn before (shaded)" if k else ""))
        place.set_ylabel("score (nats)")
    axes[-1].set_xlim(-0.6, CANDIDATES - 0.4)
    axes[-1].set_xticks(range(0, CANDIDATES, 5))
    axes[-1].set_xlabel("candidate; between dotted lines all pictures show the same thing")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def batches(world: World) -> plt.Figure:
    """What the pairs within a batch hold, by policy."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.75), layout="constrained")
    matrix = world.learnability()
    for place, policy in zip(axes, ("uniform", "independent", "joint"), strict=True):
        selection = world.drawn(policy)
        order = np.sort(selection.indices)
        shown = place.imshow(matrix[np.ix_(order, order)], **NAMED)
        place.set_title(f"{policy}: batch score {selection.batch_score:.1f}")
        delimit(place, world.shown[order])
    axes[0].set_ylabel("picture, by what it shows")
    bar = figure.colorbar(
        shown, ax=axes, shrink=0.8, pad=0.01, extend="both", ticks=[-CLIP, 0, CLIP]
    )
    bar.set_label("learnability of a pair (nats)")
    return figure


def main() -> None:
    world = World()
    for name, draw in (("matrices", matrices), ("chunks", chunks), ("batches", batches)):
        with plt.rc_context(STYLE):
            figure = draw(world)
            figure.savefig(DOCS / f"selection-{name}.png", dpi=150, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
