"""The call."""

import math
import operator
import reprlib
from typing import Any

import numpy as np

from . import _arrays, _kernels
from ._types import Criterion, Loss, Model, Policy, Selection

DEFAULTS, READERS, POLICIES = _kernels.defaults(), _kernels.readers(), _kernels.words()[0]


def select(
    learner: Model | tuple[Any, ...] | None = None,
    reference: Model | tuple[Any, ...] | None = None,
    *,
    sub_batch_size: int,
    policy: Policy = "joint",
    criterion: Criterion = "learnability",
    loss: Loss = "sigmoid",
    n_chunks: int = 16,
    gain: float = 1.0,
    seed: int = 0,
    generation: int = 0,
    step: int = 0,
    keys: Any = None,
    holes: Any = None,
    noise: Any = None,
    temperature: float = 1.0,
    pressure: float = 100.0,
    priority_exponent: float = 0.6,
    weight_exponent: float = 0.4,
    duplicates_above: float | None = None,
    clip_score_at_least: float | None = None,
    neg_clip_loss_keep: float | None = None,
    threads: int | None = None,
) -> Selection:
    """Draws the sub-batch of b = `sub_batch_size` of B candidates (Algorithm 1 of arXiv 2406.17711,
    and other policies).

    With `T` drawn so far, joint selection draws its next chunk with p ~ exp(score[x | T]), without
    replacement, where

        score[x | T] = s[x, x] + sum over k in T of (s[k, x] + s[x, k])
        s            = pair_learner - pair_reference                      (criterion="learnability")
        pair[i, i]   = softplus(-logit[i, i]),  pair[i, j] = softplus(logit[i, j])
        (loss="sigmoid")

    Embeddings are read where they lie, without a B x B matrix, in 8 * B * b * d operations for two
    models. Where more than two chunks are drawn and all towers as float32 take at most 256 MiB (8 *
    B * d bytes a model, holes not counted), the kernels keep them so, in their own order, until the
    call returns; else only a drawn chunk and a few rows a thread. Other Python threads run
    meanwhile; none may write to the arrays. The same arguments give the same draw, whatever
    `threads` is.

    Args:
        learner: `(image, text, scale, bias)` of the model in training (see `Model`). Not needed for
        `criterion="easy"`.
        reference: The same of the frozen model that says what can be learned. Not needed for
        `criterion="hard"`. Its width
            may differ from the learner's.
        sub_batch_size: b: exactly so many are drawn.
        policy: How they are drawn. `joint`: chunk by chunk, given what was drawn before.
        `independent`: one draw with
            p ~ exp(s[x, x] / temperature). `uniform`: from noise alone. Without noise:
            `joint_top_k` and `top_k` (RHO-LOSS). `rank`, `proportional` and `k_center` are in
            docs/policies.md, with their sources.
        criterion: Whose losses make a score: `learnability` (learner - reference), `hard`
        (learner), `easy` (-reference).
        loss: `sigmoid` (SigLIP) or `softmax` (CLIP; biases are ignored).
        n_chunks: Draws of `joint`, `joint_top_k` and `k_center`. More follow the exact law more
        closely.
        gain: Multiplies softmax scores, which do not grow with what is drawn.
        seed: With `generation`, `step`, the chunk and a candidate's key, what its noise depends on,
        and nothing else.
            Processes that select each for itself need a seed each.
        generation: To draw anew on purpose, for example after going back to an older checkpoint.
        step: The training step. Without it, every step has the same noise at the same place.
        keys: `[B]` integers of at least 0, no two the same (else a warning), for example row
        numbers in the data set:
            candidates in another order, with their keys, are drawn the same. Default: 0 .. B - 1.
        holes: Candidates that may not be chosen, as indices or as a boolean mask `[B]`. Their
        embeddings are not read.
            Candidates whose embeddings are not finite become holes as well; `Selection.not_finite`
            names them.
        noise: Standard Gumbel noise in place of the seeded one, float32 `[draws or more, B]`: row k
        serves chunk k.
        temperature: `independent`: divides the scores. This and the three below are refused under
        any other policy.
        pressure: `rank`: how many times as likely the first is as the last.
        priority_exponent: `proportional`: alpha. 0 is uniform.
        weight_exponent: `proportional`: beta. 1 corrects the whole bias of the draw, 0 nothing.
        duplicates_above: Leaves out all but one of images whose cosine is above this (SemDeDup), as
        the reference sees them.
        clip_score_at_least: Leaves out pairs whose CLIPScore, 2.5 * max(cosine, 0), is lower.
        neg_clip_loss_keep: Keeps this share of the pairs, those of the largest negCLIPLoss; above
        0, at most 1.
        threads: Of the processor; default: one a core, or RAYON_NUM_THREADS.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: An argument of the wrong shape, layout, device or range, or fewer candidates
        left than are to be drawn.
            Nothing is drawn; the message names the argument and says what to do.
    """
    policy, loss, criterion = (
        _word("policy", policy),
        _word("loss", loss),
        _word("criterion", criterion),
    )
    numbers = {
        "temperature": _real("temperature", temperature),
        "pressure": _real("pressure", pressure),
        "priority_exponent": _real("priority_exponent", priority_exponent),
        "weight_exponent": _real("weight_exponent", weight_exponent),
    }
    _refuse_what_another_policy_reads(policy, numbers)
    learner, reference = _model("learner", learner, loss), _model("reference", reference, loss)
    keys = None if keys is None else _arrays.keys(keys)
    noise = None if noise is None else _arrays.noise(noise)
    count = _count(learner, reference, keys, noise)
    holes = _arrays.holes(holes, count)
    looked_at = _arrays.some_of(count, holes)
    for name, model in (("learner", learner), ("reference", reference)):
        for tower, rows in zip(("image", "text"), model or ()):
            _arrays.warn_unless_normalised(f"{name} {tower}", rows, looked_at)
    drawn = _kernels.select(
        {
            "count": count,
            "learner": learner,
            "reference": reference,
            "holes": holes,
            "keys": np.arange(count, dtype=np.uint64) if keys is None else keys,
            "noise": noise,
            "seed": _whole("seed", seed, 2**64),
            "generation": _whole("generation", generation, 2**32),
            "step": _whole("step", step, 2**64),
            "policy": policy,
            "loss": loss,
            "criterion": criterion,
            "sub_batch_size": _whole("sub_batch_size", sub_batch_size, 2**32),
            "n_chunks": _whole("n_chunks", n_chunks, 2**32),
            "gain": _real("gain", gain),
            **numbers,
            "duplicates_above": _real_or_none("duplicates_above", duplicates_above),
            "clip_score_at_least": _real_or_none("clip_score_at_least", clip_score_at_least),
            "neg_clip_loss_keep": _real_or_none("neg_clip_loss_keep", neg_clip_loss_keep),
            "threads": None if threads is None else _whole("threads", threads, 2**16, least=1),
        }
    )
    for name in ("indices", "chunks", "not_finite"):
        drawn[name] = np.frombuffer(drawn[name], np.int64)
    for name in ("scores", "weights"):
        drawn[name] = np.frombuffer(drawn[name], np.float64)
    return Selection(**drawn)


def _model(name: str, given: Any, loss: str) -> tuple[Any, Any, float, float] | None:
    """A model whose arrays fit each other, or None."""
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(given) not in (3, 4):
        what = f"a {type(given).__name__}" + (
            f" of {len(given)}" if isinstance(given, (tuple, list)) else ""
        )
        raise TypeError(f"{name} is {what}: (image, text, scale, bias) is needed")
    image, text, scale, bias = Model(*given)
    image, text = (
        _arrays.embeddings(f"{name} image", image),
        _arrays.embeddings(f"{name} text", text),
    )
    if image.shape != text.shape:
        raise ValueError(
            f"{name} text has the shape {text.shape} and {name} image {image.shape}: they must "
            "agree"
        )
    if bias is None and loss == "sigmoid":
        raise ValueError(
            f"{name} has no bias, which the sigmoid loss needs: give {name}=(image, text, scale, "
            "bias)"
        )
    scale = _real(f"{name} scale", scale)
    if scale <= 0:
        raise ValueError(
            f"{name} scale is {scale}: it must be above 0, the temperature already "
            "exponentiated (torch: logit_scale.exp())"
        )
    return image, text, scale, 0.0 if bias is None else _real(f"{name} bias", bias)


def _count(learner: Any, reference: Any, keys: Any, noise: Any) -> int:
    """B, on which all that is given must agree."""
    arrays = {
        "learner": learner and learner[0],
        "reference": reference and reference[0],
        "keys": keys,
        "noise": None if noise is None else noise.T,
    }
    counts = {name: len(array) for name, array in arrays.items() if array is not None}
    if not counts:
        raise ValueError(
            "there are no candidates: give learner and reference; for the uniform policy keys or "
            "noise will do"
        )
    if len(set(counts.values())) > 1:
        raise ValueError(f"the arguments disagree on the number of candidates: {counts}")
    return next(iter(counts.values()))


def _refuse_what_another_policy_reads(policy: str, numbers: dict[str, float]) -> None:
    if policy not in POLICIES:  # The kernels refuse it.
        return
    for name, reader in READERS.items():
        if policy != reader and numbers[name] != DEFAULTS[name]:
            raise ValueError(
                f"{name} belongs to policy {reader}, and the policy is {policy}; leave it out"
            )


def _word(name: str, given: Any) -> Any:
    """In any case, as in a run; the kernels know which there are."""
    if not isinstance(given, str):
        raise TypeError(f"{name} is {reprlib.repr(given)}: text is needed")
    return given.lower()


def _whole(name: str, given: Any, end: int, least: int = 0) -> int:
    try:
        value = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} is {reprlib.repr(given)}: a whole number is needed") from None
    if not least <= value < end:
        raise ValueError(f"{name} is {value}: it must be at least {least} and less than {end}")
    return value


def _real(name: str, given: Any) -> float:
    try:
        # float() reads text as well.
        if isinstance(given, (str, bytes, bytearray)):
            raise TypeError
        value = float(given.detach() if hasattr(given, "detach") else given)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {reprlib.repr(given)}: a number is needed") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: it must be finite")
    return value


def _real_or_none(name: str, given: Any) -> float | None:
    return None if given is None else _real(name, given)
