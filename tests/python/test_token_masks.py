"""Masks of tokens by the real binary: which tokens of a sub-batch a trainer is to train, of a
language model that gives a loss for each. Compared with the losses that PyTorch computes.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy
import pyarrow
import pytest
import superbatch
import superbatch.torch
import torch
from cluster import BINARY, Cluster
from loss_models import Language, allowing, learner, losses, pushed, train, write
from test_end_to_end import reason

from examples.demo import tiny
from examples.demo.model import train_tokenizer

LENGTH, ROWS, STEPS = 8, 192, 3
SUPER, SUB, SHARE = 48, 16, 0.6
MASK = "_superbatch_token_mask"
# Losses are a few units, and f32 rounds them and their difference.
NEAR = 1e-4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of texts and exported models, the models, and the texts' ids."""
    folder = tmp_path_factory.mktemp("tokens")
    texts = [f"{text} {number % 7}" for number in range(8) for text in tiny.captions()][:ROWS]
    write(folder, "texts", {"text": texts})
    tokenizer = train_tokenizer(texts, {**tiny.SHAPE, "text_length": LENGTH})
    of_texts = {"text_length": LENGTH, "tokenizer": tokenizer}
    models, pins = {}, {}
    for seed, name in enumerate(("learner", "reference")):
        torch.manual_seed(seed)
        models[name] = Language(tokenizer.get_vocab_size()).eval()
        pins[name] = superbatch.torch.export_losses(
            models[name], folder / name, per_token=True, **of_texts
        )
    pins["bare"] = superbatch.torch.export_losses(models["learner"], folder / "bare", **of_texts)
    tokenizer.enable_padding(length=LENGTH, pad_id=0)
    ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
    assert (ids == 0).any()
    return folder, models, pins, ids


def phase(**changes) -> superbatch.Phase:
    settings = {"policy": "top_k", "super_batch_size": SUPER, "sub_batch_size": SUB}
    return superbatch.Phase(**{**settings, "token_share": SHARE, **changes})


def spec(folder: Path, run_id: str, **changes) -> superbatch.RunSpec:
    texts = {"text_column": "text", "target_column": "text"}
    settings = {
        "sources": [superbatch.Source(uri=folder / "texts", **texts)],
        "learner": learner(folder / "learner"),
        "reference": folder / "reference",
        "phases": [phase()],
        "loss": "per_example",
        "seed": 5,
        "micro_batch_rows": 8,
        **changes,
    }
    return superbatch.RunSpec(run_id=run_id, **settings)


def masks(*batches: superbatch.Batch) -> dict[int, list]:
    """The mask of each row, by its number."""
    return {
        int(row.split("#")[1]): mask
        for batch in batches
        for row, mask in zip(
            batch["_superbatch_id"].to_pylist(), batch[MASK].to_pylist(), strict=True
        )
    }


def check_masks(found: dict[int, list], of: list[torch.nn.Module], ids: torch.Tensor) -> None:
    """The share of the rows' tokens is true, and no other token has a larger excess loss."""
    rows = list(found)
    with torch.no_grad():
        (of_learner, counts), (of_reference, _) = (
            model.loss_per_token(ids[rows], ids[rows]) for model in of
        )
    excess = (of_learner.double() - of_reference.double()).numpy()
    counts, mask = counts.numpy(), numpy.array([found[row] for row in rows])
    assert mask.shape == counts.shape == (SUB, LENGTH - 1)
    assert not (mask & ~counts).any(), "padding is not trained"
    assert mask.sum() == int(SHARE * counts.sum() + 0.5)
    assert excess[mask].min() >= excess[counts & ~mask].max() - NEAR


def test_the_tokens_of_the_largest_excess_loss_are_to_be_trained(made, tmp_path):
    folder, models, pins, ids = made
    with Cluster(tmp_path, environment=allowing(pins)) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(folder, "rho"))
        batches = train(run, models["learner"], STEPS)
        model = Language(models["learner"].words.num_embeddings).eval()
        for batch in batches:
            # Under lag exact(1) step 2 is the first that is scored with a push: that of step 0.
            model.load_state_dict(models["learner"].state_dict())
            if batch.step >= 2:
                model.load_state_dict(pushed(models["learner"], batch.step - 2))
            assert batch[MASK].type == pyarrow.list_(pyarrow.bool_())
            found = masks(batch)
            check_masks(found, [model, models["reference"]], ids)
            receipt = run.receipt(batch.step)
            assert receipt.summary.token_share == SHARE
            assert {row.row: row.token_mask for row in receipt.chosen} == found
            # Examples are drawn by the mean over their tokens.
            of_learner = losses(model, ids, ids)
            of_reference = losses(models["reference"], ids, ids)
            for row in receipt.chosen:
                expected = of_learner[row.row], of_reference[row.row]
                assert (row.learner_loss, row.reference_loss) == pytest.approx(expected, abs=NEAR)

        # Asked again after a crash, with newer weights there, and by two ranks.
        cluster.coordinator.kill()
        cluster.start_coordinator("again")
        run = superbatch.connect(cluster.address).open_run(spec(folder, "rho"))
        for batch in batches:
            again = run.select(batch.step, rank=0, world_size=1)
            assert again.record_batch.equals(batch.record_batch)
        cluster.coordinator.kill()
        cluster.start_coordinator("third")
        run = superbatch.connect(cluster.address).open_run(spec(folder, "rho"))
        for batch in batches:
            halves = [run.select(batch.step, rank=rank, world_size=2) for rank in range(2)]
            assert masks(*halves) == masks(batch)


def test_rows_that_workers_send_have_the_masks_of_the_coordinator(made, tmp_path):
    folder, models, pins, ids = made
    with Cluster(tmp_path, workers=2, environment=allowing(pins)) as cluster:
        client, found = superbatch.connect(cluster.address), {}
        for delivery in ("coordinator", "direct", "locators"):
            run = client.open_run(spec(folder, delivery, delivery=delivery))
            found[delivery] = masks(run.select(0, rank=0, world_size=1))
        assert found["direct"] == found["coordinator"] == found["locators"]
        check_masks(found["direct"], [models["learner"], models["reference"]], ids)
        workers = cluster.workers
        assert sum(worker.metric("superbatch_direct_bytes_total") for worker in workers) > 0


def test_a_step_with_masks_is_drawn_again_as_it_was(made, tmp_path):
    folder, models, pins, _ = made
    with Cluster(tmp_path, environment=allowing(pins)) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(folder, "past"))
        train(run, models["learner"], STEPS)
        was = run.receipt(2)
    command = [str(BINARY), "replay", "past", "--step", "2", "--json"]
    command += ["--state", str(tmp_path / "state")]
    env = {**os.environ, **allowing(pins)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    now = json.loads(done.stdout)
    # By the losses of examples, of which token losses are no part.
    assert now["same_draw"] and now["losses_differ_by"] == 0
    assert [row["row"] for row in now["rows"]] == [row.row for row in was.chosen]
    measured = now["measured"]
    assert measured["chosen"] == pytest.approx(was.summary.batch_score, abs=NEAR)


def test_a_phase_without_a_share_has_no_masks(made, tmp_path):
    folder, _, pins, _ = made
    with Cluster(tmp_path, environment=allowing(pins)) as cluster:
        client = superbatch.connect(cluster.address)
        phases = [phase(policy="uniform", token_share=None), phase(from_step=1)]
        run = client.open_run(spec(folder, "later", phases=phases))
        batches = [run.select(step, rank=0, world_size=1) for step in range(2)]
        assert batches[0][MASK].to_pylist() == [None] * SUB
        assert batches[1][MASK].null_count == 0
        without = client.open_run(spec(folder, "without", phases=[phase(token_share=None)]))
        batch = without.select(0, rank=0, world_size=1)
        assert MASK not in batch.record_batch.schema.names
        with pytest.raises(superbatch.Error, match="no column for masks") as caught:
            without.append_phases([phase(from_step=100)])
        assert reason(caught) == "RUN_SPEC_IMPOSSIBLE"


def test_what_has_no_losses_of_tokens_is_refused(made, tmp_path):
    folder, _, pins, _ = made
    refused = {
        "learner": ({"learner": learner(folder / "bare")}, "the learner gives one loss"),
        "reference": ({"reference": folder / "bare"}, "the reference gives one loss"),
        "criterion": ({"phases": [phase(criterion="hard")]}, "does not ask both"),
        "policy": ({"phases": [phase(policy="uniform")]}, "does not ask both"),
        "share": ({"phases": [phase(token_share=1.5)]}, "at most 1"),
    }
    with Cluster(tmp_path, environment=allowing(pins)) as cluster:
        client = superbatch.connect(cluster.address)
        for run_id, (changes, says) in refused.items():
            with pytest.raises(superbatch.Error) as caught:
                client.open_run(spec(folder, run_id, **changes))
            assert reason(caught) == "RUN_SPEC_IMPOSSIBLE", (run_id, caught.value)
            assert "phases[0].token_share" in str(caught.value), run_id
            assert says in str(caught.value), run_id
    command = [str(BINARY), "inspect", str(folder / "learner")]
    env = {**os.environ, **allowing(pins)}
    shown = subprocess.run(command, capture_output=True, text=True, env=env)
    assert shown.returncode == 0, shown.stderr
    assert f"of {LENGTH - 1} tokens" in shown.stdout
    # A type of its own: a coordinator of an older build refuses it.
    assert "token_losses_of_texts" in shown.stdout


def test_a_model_that_gives_no_losses_of_tokens_is_not_exported(made, tmp_path):
    folder, *_ = made
    tokenizer = folder / "learner" / "tokenizer.json"

    class Alone(Language):
        def loss_per_token(self, ids, targets):
            return super().loss_per_token(ids, targets)[0]

    class Endless(Language):
        def loss_per_token(self, ids, targets):
            found, counts = super().loss_per_token(ids, targets)
            return found / 0, counts

    class Fixed(Language):
        def loss_per_token(self, ids, targets):
            found, counts = super().loss_per_token(ids, targets)
            return found * float(len(ids)), counts

    how = {"text_length": LENGTH, "tokenizer": tokenizer, "per_token": True}
    for kind, says in ((Alone, "no pair"), (Endless, "not finite"), (Fixed, "number of rows")):
        with pytest.raises(superbatch.Error, match=says):
            superbatch.torch.export_losses(kind(4096).eval(), tmp_path, **how)
    with pytest.raises(superbatch.Error, match="no method loss_per_token"):
        superbatch.torch.export_losses(torch.nn.Linear(2, 2), tmp_path, **how)
    with pytest.raises(superbatch.Error, match="a class has no tokens"):
        superbatch.torch.export_losses(Language(4096), tmp_path, classes=3, **how)
