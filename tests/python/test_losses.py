"""Models that give one loss an example, by the real binary: a classifier of images with wrong
labels, and a language model. Their losses, computed in PyTorch, are the receipts' scores.
"""

import json
import os
import random
import subprocess
from pathlib import Path

import numpy
import pyarrow
import pytest
import superbatch
import superbatch.torch
import torch
import torch.nn.functional as F
from cluster import BINARY, Cluster
from loss_models import (
    BLOCK,
    CLASSES,
    SIDE,
    Classifier,
    Language,
    allowing,
    classifier,
    drawings,
    learner,
    losses,
    pixels,
    pushed,
    train,
    write,
)
from test_end_to_end import reason

from examples.demo import tiny
from examples.demo.model import train_tokenizer

LENGTH, ROWS, STEPS = 8, 384, 3
SUPER, SUB = 96, 24
# Losses reach 70, and a score is the difference of two in f32, where one step is 7.6e-6.
NEAR = {"rel": 2e-6, "abs": 1e-5}


class Sure(Classifier):
    """One that has nothing left to learn."""

    def loss_per_example(self, pixels, targets):
        return 0 * super().loss_per_example(pixels, targets)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a pool of which a third has wrong labels, and the models."""
    folder = tmp_path_factory.mktemp("losses")
    images, right = drawings(ROWS, seed=0)
    rng = random.Random(1)
    wrong = [rng.random() < 1 / 3 for _ in right]
    labels = [
        (label + rng.randrange(1, CLASSES)) % CLASSES if is_wrong else label
        for label, is_wrong in zip(right, wrong, strict=True)
    ]
    write(folder, "pool", {"png": images, "label": labels})
    models = {"learner": classifier(0), "reference": classifier(1, steps=150)}
    pins = {
        name: superbatch.torch.export_losses(
            model, folder / name, image_size=SIDE, classes=CLASSES, resample=2
        )
        for name, model in models.items()
    }
    pins["sure"] = superbatch.torch.export_losses(
        Sure().eval(), folder / "sure", image_size=SIDE, classes=CLASSES, resample=2
    )
    return folder, models, pins, pixels(images), torch.tensor(labels), numpy.array(wrong)


@pytest.fixture(scope="module")
def service(made, tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("service"), environment=allowing(made[2])) as cluster:
        yield cluster


def phase(**changes) -> superbatch.Phase:
    return superbatch.Phase(
        **{"policy": "top_k", "super_batch_size": SUPER, "sub_batch_size": SUB, **changes}
    )


def spec(folder: Path, run_id: str, **changes) -> superbatch.RunSpec:
    source = superbatch.Source(uri=folder / "pool", target_column="label")
    settings = {
        "sources": [source],
        "learner": learner(folder / "learner"),
        "reference": folder / "reference",
        "phases": [phase()],
        "loss": "per_example",
        "seed": 5,
        "micro_batch_rows": 16,
        **changes,
    }
    return superbatch.RunSpec(run_id=run_id, **settings)


def scanned(client: superbatch.Client, asked: superbatch.RunSpec, steps: int) -> list[list[int]]:
    """The candidates of each step, as a uniform run that takes all of them tells."""
    run = client.open_run(asked)
    batches = run.batches(rank=0, world_size=1, start_step=0, end_step=steps)
    return [[row.row for row in run.receipt(batch.step).chosen] for batch in batches]


def check_rows(receipt, of_learner: numpy.ndarray, of_reference: numpy.ndarray) -> None:
    """Every row of a receipt has the losses of its models, and the score that they make."""
    for row in [*receipt.chosen, *receipt.passed_over]:
        expected = of_learner[row.row], of_reference[row.row]
        assert (row.learner_loss, row.reference_loss) == pytest.approx(expected, **NEAR)
        assert row.own_score == pytest.approx(expected[0] - expected[1], **NEAR)
    for row in receipt.chosen:
        assert row.score == pytest.approx(row.own_score, abs=1e-9)


def test_a_classifier_is_trained_on_what_it_can_still_learn(made, service):
    folder, models, _, inputs, labels, wrong = made
    client = superbatch.connect(service.address)
    whole = phase(policy="uniform", sub_batch_size=SUPER)
    all_rows = spec(folder, "all", phases=[whole], learner=None, reference=None)
    candidates = scanned(client, all_rows, STEPS)
    run = client.open_run(spec(folder, "top", columns=["label"]))
    batches = train(run, models["learner"], STEPS)
    of_reference = losses(models["reference"], inputs, labels)
    model, scores, noisy = Classifier().eval(), [], []
    for batch in batches:
        receipt = run.receipt(batch.step)
        # Under lag exact(1) step 2 is the first that is scored with a push: that of step 0.
        model.load_state_dict(models["learner"].state_dict())
        if batch.step >= 2:
            model.load_state_dict(pushed(models["learner"], batch.step - 2), strict=False)
        assert receipt.summary.learner.step == max(batch.step - 2, -1)
        of_learner = losses(model, inputs, labels)
        check_rows(receipt, of_learner, of_reference)
        reducible = of_learner - of_reference
        offered = reducible[candidates[batch.step]]
        chosen = reducible[[row.row for row in receipt.chosen]]
        assert chosen == pytest.approx(numpy.sort(offered)[-SUB:][::-1], **NEAR)
        summary = receipt.summary
        assert (summary.loss, summary.embedding_dtype) == ("per_example", "f32")
        assert summary.batch_score == pytest.approx(chosen.mean(), **NEAR)
        assert summary.mean_score_candidates == pytest.approx(offered.mean(), **NEAR)
        assert summary.uniform_score == pytest.approx(offered.mean(), **NEAR)
        about = json.loads((folder / "learner" / "module.json").read_text())
        assert summary.cost.learner_flops >= SUPER * about["flops"]
        given = [row.split("#")[1] for row in batch["_superbatch_id"].to_pylist()]
        expected = labels[[int(row) for row in given]].tolist()
        assert batch["label"].type == pyarrow.int64() and batch["label"].to_pylist() == expected
        assert batch["caption"].to_pylist() == [str(label) for label in expected]
        scores.append(reducible)
        noisy += [wrong[row.row] for row in receipt.chosen]
    assert not numpy.allclose(scores[0], scores[2], atol=1e-2), "a push changes scores"
    assert numpy.mean(noisy) < wrong.mean() / 2, "wrong labels are passed over"


def test_reference_losses_are_kept_and_may_be_made_ahead(made, tmp_path):
    folder, models, pins, _, _, _ = made
    with Cluster(tmp_path, environment=allowing(pins)) as cluster:
        command = [BINARY, "embed", "--model", folder / "reference", "--json"]
        command += ["--state", cluster.state, "--target-column", "label"]

        def embed(*more: object, source: Path = folder / "pool") -> subprocess.CompletedProcess:
            return subprocess.run(
                [str(word) for word in (*command, "--sources", source.as_uri(), *more)],
                capture_output=True,
                text=True,
                env={**os.environ, **allowing(pins)},
            )

        refused = embed("--embedding-dtype", "f32", "--out", tmp_path / "out")
        assert refused.returncode == 1 and "--out" in refused.stderr
        texts = write(tmp_path, "texts", {"text": ["a text"] * BLOCK, "label": [0] * BLOCK})
        refused = embed("--embedding-dtype", "f32", "--text-column", "text", source=texts)
        assert refused.returncode == 1 and "reads images" in refused.stderr
        refused = embed()
        assert refused.returncode == 1 and "f32" in refused.stderr
        made_ahead = embed("--embedding-dtype", "f32")
        assert made_ahead.returncode == 0, made_ahead.stderr
        assert json.loads(made_ahead.stdout)["blocks"] == ROWS // BLOCK
        run = superbatch.connect(cluster.address).open_run(spec(folder, "ahead"))
        train(run, models["learner"], STEPS)
        costs = [run.receipt(step).summary.cost for step in range(STEPS)]
        assert all(cost.reference_flops == 0 < cost.learner_flops for cost in costs)


def test_other_policies_of_single_scores_and_several_workers(made, tmp_path):
    folder, models, pins, inputs, labels, _ = made
    of_reference = losses(models["reference"], inputs, labels)
    of_learner = losses(models["learner"], inputs, labels)
    with Cluster(tmp_path, workers=2, environment=allowing(pins)) as cluster:
        client = superbatch.connect(cluster.address)
        for policy in ("independent", "rank", "proportional"):
            run = client.open_run(spec(folder, policy, phases=[phase(policy=policy)]))
            assert len(run.select(0, rank=0, world_size=1)) == SUB
            receipt = run.receipt(0)
            check_rows(receipt, of_learner, of_reference)
        hard = phase(criterion="hard")
        run = client.open_run(spec(folder, "hard", phases=[hard], reference=None))
        run.select(0, rank=0, world_size=1)
        for row in run.receipt(0).chosen:
            assert row.own_score == pytest.approx(of_learner[row.row], **NEAR)
            assert row.reference_loss is None


def test_a_loss_of_nothing_is_a_loss(made, service):
    folder, models, _, inputs, labels, _ = made
    asked = spec(folder, "sure", reference=folder / "sure")
    run = superbatch.connect(service.address).open_run(asked)
    run.select(0, rank=0, world_size=1)
    receipt, of_learner = run.receipt(0), losses(models["learner"], inputs, labels)
    assert receipt.summary.holes == 0
    check_rows(receipt, of_learner, numpy.zeros(ROWS))


def test_a_row_without_a_usable_target_is_a_hole(made, service, tmp_path):
    folder, *_ = made
    images, labels = drawings(SUPER, seed=3)
    labels[3], labels[5], labels[7] = None, CLASSES, -1
    write(tmp_path, "bad", {"png": images, "label": labels})
    source = superbatch.Source(uri=tmp_path / "bad", target_column="label")
    run = superbatch.connect(service.address).open_run(spec(folder, "bad", sources=[source]))
    run.select(0, rank=0, world_size=1)
    bad = {int(row.id.split("#")[1]): row for row in run.receipt(0).bad_rows}
    assert sorted(bad) == [3, 5, 7]
    assert bad[3].reason == "caption_null"
    for row in (bad[5], bad[7]):
        assert row.reason == "caption_invalid" and f"0 to {CLASSES - 1}" in row.detail


def test_what_has_no_pairs_is_refused(made, service, tmp_path):
    folder, *_ = made
    client = superbatch.connect(service.address)
    tiny.write_dataset(tmp_path / "pairs", rows=128)
    tiny.write_siglip(tmp_path / "siglip", seed=0)
    pairs = {"sources": [tmp_path / "pairs"], "loss": "sigmoid"}
    low = superbatch.Approximation(resolution=8)
    refused = {
        "joint": ({"phases": [phase(policy="joint")]}, "no pairs"),
        "spread": ({"phases": [phase(policy="k_center")]}, "k_center"),
        "twins": (
            {"phases": [phase(tuning=superbatch.Tuning(duplicates_above=0.9))]},
            "duplicates_above",
        ),
        "low": (
            {
                "phases": [
                    phase(fidelity="approximate", approximation=low, allow_untrained_fidelity=True)
                ]
            },
            "full fidelity only",
        ),
        "rounded": ({"embedding_dtype": "f16"}, "embedding_dtype"),
        "targetless": ({"sources": [folder / "pool"]}, "target_column"),
        "pairs": (pairs, "set loss to per_example"),
        "dual": ({"reference": tmp_path / "siglip"}, "dual encoder"),
        "texts": (
            {
                "sources": [
                    superbatch.Source(
                        uri=tmp_path / "pairs", text_column="caption", target_column="kind"
                    )
                ]
            },
            "reads images",
        ),
    }
    for run_id, (changes, says) in refused.items():
        with pytest.raises(superbatch.Error) as caught:
            client.open_run(spec(folder, f"refused-{run_id}", **changes))
        assert reason(caught) == "RUN_SPEC_IMPOSSIBLE", (run_id, caught.value)
        assert says in str(caught.value), run_id


@pytest.mark.parametrize(("pad", "is_tied"), [(0, False), (2, True)])
def test_a_language_model_scores_texts(tmp_path, pad, is_tied):
    texts = [f"{text} {number % 7}" for number in range(8) for text in tiny.captions()][:ROWS]
    write(tmp_path, "texts", {"text": texts, "number": list(range(len(texts)))})
    tokenizer = train_tokenizer(texts, {**tiny.SHAPE, "text_length": LENGTH})
    models, pins = {}, {}
    for seed, name in enumerate(("learner", "reference")):
        torch.manual_seed(seed)
        models[name] = Language(tokenizer.get_vocab_size(), pad, is_tied).eval()
        pins[name] = superbatch.torch.export_losses(
            models[name],
            tmp_path / name,
            text_length=LENGTH,
            tokenizer=tokenizer,
            pad_token_id=pad,
        )
    # What was exported pads with 0 in tokenizer.json; the module's own id is the one that counts.
    tokenizer.enable_padding(length=LENGTH, pad_id=pad)
    ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
    assert (ids == pad).any()
    texts_of = {"text_column": "text", "target_column": "text"}
    source = superbatch.Source(uri=tmp_path / "texts", **texts_of)
    with Cluster(tmp_path, environment=allowing(pins)) as cluster:
        client = superbatch.connect(cluster.address)
        asked = {"sources": [source], "columns": ["number"]}
        whole = phase(policy="uniform", sub_batch_size=SUPER)
        uniform = spec(tmp_path, "all", phases=[whole], learner=None, reference=None, **asked)
        candidates = scanned(client, uniform, 1)[0]
        run = client.open_run(spec(tmp_path, "texts", **asked))
        batch = run.select(0, rank=0, world_size=1)
        receipt = run.receipt(0)
        of = [losses(models[name], ids, ids) for name in ("learner", "reference")]
        check_rows(receipt, *of)
        reducible = of[0] - of[1]
        chosen = reducible[[row.row for row in receipt.chosen]]
        assert chosen == pytest.approx(numpy.sort(reducible[candidates])[-SUB:][::-1], **NEAR)
        expected = [texts[number] for number in batch["number"].to_pylist()]
        assert [text.decode() for text in batch["image"].to_pylist()] == expected
        assert batch["caption"].to_pylist() == expected
        cost = receipt.summary.cost.scoring
        assert cost.image_full == 0 < cost.text


def test_inspect_says_what_a_module_compares(made):
    folder, _, pins, _, _, _ = made
    command = [str(BINARY), "inspect", str(folder / "reference")]
    env = {**os.environ, **allowing(pins)}
    shown = subprocess.run(command, capture_output=True, text=True, env=env)
    assert shown.returncode == 0, shown.stderr
    assert f"one loss for each image and one of {CLASSES} classes" in shown.stdout
    shown = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env)
    told = json.loads(shown.stdout)
    assert (told["family"], told["gives"]) == ("losses_of_images", "loss_per_example")


def test_a_model_that_gives_no_loss_a_row_is_not_exported(tmp_path):
    class Mean(Classifier):
        def loss_per_example(self, pixels, targets):
            return F.cross_entropy(self(pixels), targets)

    class Fixed(Classifier):
        def loss_per_example(self, pixels, targets):
            return super().loss_per_example(pixels, targets) * float(len(targets))

    class Endless(Classifier):
        def loss_per_example(self, pixels, targets):
            return super().loss_per_example(pixels, targets) / 0

    how = {"image_size": SIDE, "classes": CLASSES}
    with pytest.raises(superbatch.Error, match="not one loss a row"):
        superbatch.torch.export_losses(Mean().eval(), tmp_path, **how)
    with pytest.raises(superbatch.Error, match="must not depend on the number of rows"):
        superbatch.torch.export_losses(Fixed().eval(), tmp_path, **how)
    with pytest.raises(superbatch.Error, match="inf of row 0 .* must be finite"):
        superbatch.torch.export_losses(Endless().eval(), tmp_path, **how)
    with pytest.raises(superbatch.Error, match="no method loss_per_example"):
        superbatch.torch.export_losses(torch.nn.Linear(2, 2), tmp_path, **how)
    with pytest.raises(superbatch.Error, match="give text_length and tokenizer"):
        superbatch.torch.export_losses(Language(9), tmp_path)
