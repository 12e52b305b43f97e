"""What a run is. Fields that are None take the service's default, which `Run.spec` shows filled
in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ._arguments import file_uri, items, text, wrong


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where candidates come from.

    uri: a Parquet file, a folder of them, or a pattern with {00000..00041} or *, at file:///,
    s3://, hf://datasets/ or memory:///; an absolute `Path` is its file:/// URI.
    weight: share of each super-batch relative to the other sources (default 1). Not 0: leave the
    source out.
    image_column, caption_column: found by the layout (img2dataset, Hugging Face) where not given.
    target_column, text_column: for the loss "per_example": integers (classes) or texts; and the
    texts that the model reads, if it reads no images. Batches hold them as `caption` and `image`.
    where: rows that are candidates, "similarity > 0.3 and language = 'en'". Columns, or of a tar
    entries of the `json` member. Rows outside are never candidates.
    allow: the ids of the rows that are candidates, a `.npy` file of uids (DataComp's) or Parquet
    files.
    id_column: the column that holds the ids (default "uid").
    scores: Parquet files of ids and numbers, in which `Phase.score_columns` are looked up by
    `id_column` (default: the data's own columns).
    caption_seed: if the captions are lists, one of each is drawn by this seed (default 0) and the
    list's own texts: a row has the same caption in every step, epoch and run of this seed.
    image_root: the folder that the images lie below, if the data has paths instead of images.
    """

    uri: str | os.PathLike
    weight: float | None = None
    image_column: str | None = None
    caption_column: str | None = None
    target_column: str | None = None
    text_column: str | None = None
    where: str | None = None
    allow: str | os.PathLike | None = None
    id_column: str | None = None
    scores: str | os.PathLike | None = None
    caption_seed: int | None = None
    image_root: str | os.PathLike | None = None


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """How the image tower is made cheaper; one of:

    resolution: smaller images in patches of the same size. The side in pixels: a multiple of the
    patch, below the model's own image size.
    patch: larger patches of the same image (FlexiViT). Their side in pixels: above the model's own,
    a divisor of its image size.
    patch_dropout: the share of the patches that is left out (FLIP), above 0 and below 1.
    layers: the first layers only, then the final norm and the head.
    """

    resolution: int | None = None
    patch: int | None = None
    patch_dropout: float | None = None
    layers: int | None = None


@dataclass(frozen=True, kw_only=True)
class MultiResolution:
    """A part of each sub-batch is to be trained at the phase's approximation.
    `_superbatch_fidelity` says which rows.

    share: of the sub-batch (default 0.5).
    whole_step: all rows of a step alike, that share of the steps: for trainers with one size a
    batch.
    """

    share: float | None = None
    whole_step: bool | None = None


@dataclass(frozen=True, kw_only=True)
class FidelityProbe:
    """Now and then, some candidates of a step are scored at full fidelity and at the phase's
    approximation: the receipt's `probe` says how far their ranks and draws agree.

    every_steps: from the phase's first step on.
    rows: candidates that are compared (default 1024).
    """

    every_steps: int
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The model that is being trained.

    model_uri: a Hugging Face model folder (config, preprocessor, tokenizer).
    Where its first weights come from, one of: random_seed (made by the service), snapshot_uri (a
    safetensors file), or first_push=True (the trainer pushes them as step -1).
    logit_bias: for the sigmoid loss with a model that has none.
    trained_fidelities: approximations that its first weights have been trained with.
    """

    model_uri: str | os.PathLike
    random_seed: int | None = None
    snapshot_uri: str | None = None
    first_push: bool | None = None
    logit_bias: float | None = None
    trained_fidelities: Sequence[Approximation] | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The frozen model: a Hugging Face model folder with weights."""

    model_uri: str | os.PathLike
    logit_bias: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The numbers that only some policies read, and the rules that leave candidates out before any
    policy draws.

    temperature: of "independent"; divides the scores (default 1; towards 0 it is "top_k", towards
    infinity "uniform").
    pressure: of "rank"; how many times as likely the first is as the last (default 100).
    priority_exponent, weight_exponent: of "proportional"; alpha and beta of Schaul et al. 2015
    (default 0.6 and 0.4). The rules go with every policy, apply in this order, and are judged by
    the reference:
    clip_score_at_least: pairs of a lower CLIPScore, 2.5 x max(cosine of image and text, 0), are
    left out.
    neg_clip_loss_keep: this share is kept, the pairs of the largest negCLIPLoss.
    duplicates_above: of images whose cosine is above this, all but one are left out; 0.95 is a
    cautious start.
    """

    temperature: float | None = None
    pressure: float | None = None
    priority_exponent: float | None = None
    weight_exponent: float | None = None
    clip_score_at_least: float | None = None
    neg_clip_loss_keep: float | None = None
    duplicates_above: float | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreColumn:
    """A numeric column of the data: part of every score, or a rule that leaves candidates out.

    name: the column, or the entry of the `json` of a tar's samples.
    weight: weight x value is added to a candidate's score (default 1, or nothing where at_least or
    at_most is given).
    at_least, at_most: candidates of other values are left out.
    missing: stands for a null or NaN; without it such candidates are left out.
    """

    name: str
    weight: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    missing: float | None = None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """How batches are chosen from `from_step` on.

    policy: "uniform", "independent", "joint", "joint_top_k", "top_k", "rank", "proportional" or
    "k_center", in any case.
    super_batch_size: candidates scanned for a step; rows that do not fill a last one sit the epoch
    out.
    sub_batch_size: rows chosen and served, over all ranks.
    criterion: "learnability" (default), "hard", "easy", or "column": the sum of score_columns
    alone.
    n_chunks: draws of "joint", "joint_top_k" and "k_center" (default 16). gain: multiplies softmax
    scores (default 1).
    fidelity: what candidates are scored at, "full" (default) or "approximate" (Flexi-JEST), as
    `approximation` says.
    approximation: what approximate means in this phase, such as
    `Approximation(resolution=...)`.
    multi_resolution: a part of the sub-batch is to be trained at the approximation,
    `MultiResolution()` for half of it.
    allow_untrained_fidelity: score at an approximation that the learner was never trained with,
    though its ranking may then be noise.
    tuning: numbers of single policies, and what is left out before the draw.
    probe: now and then, compare what the two fidelities choose, `FidelityProbe(every_steps=...)`.
    score_columns: numeric columns of the data, as the criterion, as terms of it, or as rules.
    reference_step: the reference of this phase is the learner itself as it was pushed after this
    step, instead of the run's reference.
    token_share: only this share of the tokens is to be trained (Rho-1): `_superbatch_token_mask`.
    """

    policy: str
    super_batch_size: int
    sub_batch_size: int
    from_step: int = 0
    criterion: str | None = None
    n_chunks: int | None = None
    gain: float | None = None
    fidelity: str | None = None
    tuning: Tuning | None = None
    approximation: Approximation | None = None
    multi_resolution: MultiResolution | None = None
    allow_untrained_fidelity: bool | None = None
    probe: FidelityProbe | None = None
    score_columns: Sequence[ScoreColumn] | None = None
    reference_step: int | None = None
    token_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Lag:
    """How old the weights are that a step is scored with. Made by `exact` and `at_most`."""

    exact: int | None = None
    at_most: int | None = None


def exact(steps: int) -> Lag:
    """Step s is scored with the last weights pushed at or before step s-1-steps, whatever the
    timing: reproducible.
    """
    return Lag(exact=steps)


def at_most(steps: int) -> Lag:
    """Step s is scored with the freshest weights there are, at most `steps` older than s-1."""
    return Lag(at_most=steps)


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Start from another run's history: steps before `step` are that run's, with their receipts and
    weights. The fork goes on from there in its own way; the other run is not touched.

    Sources, seed, `window_blocks`, the learner and the phases before `step` must be the other
    run's; everything else may differ. `Run.rewind` goes back within a run.
    """

    run_id: str
    step: int


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything a run is. All ranks open the same id with the same spec, which is fixed for the
    run's life; only phases can be added, by `Run.append_phases`.

    run_id: letters, digits, '-', '_' and '.', at most 128.
    sources: at least one; a plain string or absolute path is the uri of a source.
    phases: the schedule by rising from_step; the first starts at 0.
    learner: needed unless every phase is uniform, "k_center" or scores with the reference alone.
    reference: needed unless every phase is uniform or "hard", and by whatever `Tuning` leaves out;
    a plain string is its model_uri, as is an absolute path.
    loss: "sigmoid" (default), "softmax", or "per_example" of models that give losses.
    lag: `exact(1)` by default.
    push_every_steps: a push is due after every so many steps (default 1).
    micro_batches: each rank's slice is cut into so many equal micro-batches (default 1).
    columns: extra columns to deliver beside image and caption.
    fallback: when weights do not come in time: "wait" (default), "serve_flagged", "uniform" or
    "reference_only". "wait" is
        not for ever: ranks get NEED_DEADLINE after `need_deadline_seconds`, or WEIGHTS_MISSING
        after `stall_grace_seconds` if every rank waits and no push is on its way. To ask again is
        to wait again.
    max_ahead: how many steps beyond the last consumed one ranks may request (default 2). More than
    the steps that a DataLoader's workers hold ready (num_workers times prefetch_factor).
    epochs: passes over the data; 0 is without end. Rows that do not fill an epoch's last
    super-batch are not scanned in it:
        of 900 rows at super_batch_size 320, epochs=1 scans 640 in 2 steps.
        `Run.dataset.tail_rows_per_epoch` counts them.
    window_blocks: blocks whose rows are shuffled together (default 16).
    embedding_dtype: "f16" (default), or "f32" (of the loss "per_example").
    compute_dtype: "f32" or "bf16" (default: by device).
    micro_batch_rows: candidates per forward pass (default: 64 on a CPU, 256 on CUDA).
    max_bad_row_share: the run fails when more of the candidates cannot be used (default 0.1).
    fork_of: another run's history to start from.
    train_flops_per_example: what a training step costs, where known.
    need_deadline_seconds: how long a waiting trainer waits for weights before `fallback` applies
    (default 60).
    stall_grace_seconds: the run is stalled when every rank stands still for a step whose weights
    are missing, and no rank
        has called `push_weights` for them. The fallback applies when the stall has lasted for so
        long (default 5; 0 is at once).
    delivery: how ranks get their rows: "coordinator" (default) streams them; "direct" has the
        workers that hold them stream them, on tickets of the coordinator; "locators" sends where
        each row lies and no images, for trainers that read their rows themselves.
    """

    run_id: str
    sources: Sequence[Source | str | os.PathLike]
    phases: Sequence[Phase]
    learner: Learner | None = None
    reference: Reference | str | os.PathLike | None = None
    loss: str | None = None
    lag: Lag | None = None
    push_every_steps: int | None = None
    micro_batches: int | None = None
    columns: Sequence[str] = ()
    fallback: str | None = None
    seed: int | None = None
    max_ahead: int | None = None
    epochs: int | None = None
    window_blocks: int | None = None
    embedding_dtype: str | None = None
    micro_batch_rows: int | None = None
    max_bad_row_share: float | None = None
    fork_of: Fork | None = None
    compute_dtype: str | None = None
    train_flops_per_example: float | None = None
    need_deadline_seconds: float | None = None
    stall_grace_seconds: float | None = None
    delivery: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain values, with the protocol's field names; without `run_id`, and without
        what is None.
        """
        check_kinds(self)
        spec = plain(self)
        del spec["run_id"]
        spec["sources"] = [
            {"uri": source} if isinstance(source, str) else source for source in spec["sources"]
        ]
        if isinstance(spec.get("reference"), str):
            spec["reference"] = {"model_uri": spec["reference"]}
        return spec


def check_kinds(spec: RunSpec) -> None:
    """Refuses what is no part of a spec. A dict with the protocol's field names stands for any
    part.
    """
    text("run_id", spec.run_id, "give a string")
    sources = "give a URI, an absolute path or superbatch.Source(uri=...)"
    for i, source in enumerate(items("sources", spec.sources)):
        expect(f"sources[{i}]", source, (Source, str, os.PathLike), sources)
    check_phases(spec.phases)
    items("columns", spec.columns)
    expect("learner", spec.learner, Learner, "give superbatch.Learner(model_uri=...)")
    expect(
        "reference",
        spec.reference,
        (Reference, str, os.PathLike),
        "give a URI or superbatch.Reference(model_uri=...)",
    )
    expect("fork_of", spec.fork_of, Fork, "give superbatch.Fork(run_id=..., step=...)")
    steps = max(spec.lag, 0) if isinstance(spec.lag, int) else 1
    lags = f"give superbatch.exact(n) or superbatch.at_most(n), such as superbatch.exact({steps:d})"
    expect("lag", spec.lag, Lag, lags)


def check_phases(phases: Any) -> None:
    for i, phase in enumerate(items("phases", phases)):
        expect(
            f"phases[{i}]",
            phase,
            Phase,
            "give superbatch.Phase(policy=..., super_batch_size=..., sub_batch_size=...)",
        )
        if isinstance(phase, Phase):
            expect(f"phases[{i}].tuning", phase.tuning, Tuning, "give superbatch.Tuning(...)")
            columns = "give superbatch.ScoreColumn(name=...)"
            for n, column in enumerate(
                items(f"phases[{i}].score_columns", phase.score_columns or ())
            ):
                expect(f"phases[{i}].score_columns[{n}]", column, ScoreColumn, columns)
            approximations = "give superbatch.Approximation(resolution=...)"
            expect(f"phases[{i}].approximation", phase.approximation, Approximation, approximations)
            shares = "give superbatch.MultiResolution() or superbatch.MultiResolution(share=...)"
            expect(f"phases[{i}].multi_resolution", phase.multi_resolution, MultiResolution, shares)
            probes = "give superbatch.FidelityProbe(every_steps=...)"
            expect(f"phases[{i}].probe", phase.probe, FidelityProbe, probes)


def expect(name: str, value: Any, kinds: Any, instead: str) -> None:
    if value is not None and not isinstance(value, kinds) and not isinstance(value, Mapping):
        raise wrong(name, value, instead)


def plain(value: Any, name: str = "") -> Any:
    """Dataclasses as dicts without their None fields, sequences as lists, paths as URIs. `name` is
    where the value is.
    """
    if is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {
            key: plain(item, f"{name}.{key}".lstrip(".")) for key, item in pairs if item is not None
        }
    if isinstance(value, os.PathLike):
        return file_uri(name, value)
    if isinstance(value, Mapping):
        return {key: plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    return value
