"""What goes into a selection and what comes out."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Policy = Literal[
    "uniform", "independent", "joint", "joint_top_k", "top_k", "rank", "proportional", "k_center"
]
"""How examples are drawn."""

Loss = Literal["sigmoid", "softmax"]
"""The contrastive loss that scores are differences of: SigLIP's or CLIP's."""

Criterion = Literal["learnability", "hard", "easy"]
"""Which losses make a score: learner - reference, learner, or -reference."""


class Model(NamedTuple):
    """One model's view of the B candidates. A plain tuple in this order does as well.

    Its logit for image i and text j is `scale * cosine(image[i], text[j]) + bias`, as in
    big_vision, open_clip and transformers.
    """

    image: Any
    """`[B, d]`, float32 or float16, C-contiguous, rows L2-normalised: a NumPy array, a CPU torch
    tensor, or what else exports the buffer protocol or DLPack. The two models may differ in d.
    """

    text: Any
    """As `image`: row i is the text of candidate i."""

    scale: float
    """The temperature, already exponentiated: `model.logit_scale.exp()` in most implementations."""

    bias: float | None = None
    """About -10 at SigLIP's initialisation. The softmax loss has none; the sigmoid loss must have
    one.
    """


@dataclass(frozen=True, eq=False)
class Selection:
    """The sub-batch of b examples, chosen from B candidates."""

    indices: NDArray[np.int64]
    """`[b]`, the chosen candidates in the order drawn; indexes NumPy arrays and torch tensors as it
    is. Shuffle before cutting it into micro-batches or ranks: early chunks are drawn from scores
    that know less of the others.
    """

    chunks: NDArray[np.int64]
    """How many each chunk drew; sums to b."""

    scores: NDArray[np.float64]
    """`[b]`, the conditional score that each was drawn with, in nats of loss, without noise, with
    gain. `uniform`: 0. `k_center`: the distance (1 - cosine) from the nearest of the chunks before.
    """

    weights: NDArray[np.float64]
    """`[b]`, importance weights to multiply the losses with, the largest 1: those of
    `proportional`; under all others 1.
    """

    batch_score: float | None
    """Mean conditional score per example of the whole sub-batch, in nats, without gain: the
    difference of the batch losses that the criterion compares. This is what joint selection tries
    to make large. None where `uniform` or `k_center` lack the embeddings of the criterion.
    """

    mean_score_chosen: float | None
    """Mean unconditional score of the chosen; None as `batch_score` is."""

    mean_score_candidates: float | None
    """Mean unconditional score of all candidates that are not holes; None as `batch_score` is."""

    left_out: int
    """Candidates that `duplicates_above`, `clip_score_at_least` and `neg_clip_loss_keep` left
    out.
    """

    not_finite: NDArray[np.int64]
    """Candidates that were no holes, but whose embeddings hold a NaN or an infinity: they could not
    be chosen. Rising.
    """

    flops: float
    """Floating-point operations spent on dot products."""

    def __repr__(self) -> str:
        of = f"{len(self.indices)} chosen in {len(self.chunks)} chunks"
        score = "" if self.batch_score is None else f", batch_score={self.batch_score:.4g}"
        bad = f", {len(self.not_finite)} not finite" if len(self.not_finite) else ""
        return f"<Selection: {of}{score}{bad}>"
