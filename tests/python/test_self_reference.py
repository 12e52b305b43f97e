"""The learner's own earlier weights as the reference, and a smaller proxy learner, by the real
binary.
"""

import multiprocessing
from pathlib import Path

import pytest
import superbatch
from cluster import Cluster
from safetensors.torch import load_file
from test_end_to_end import inputs, phase, reason, service, spec, weights  # noqa: F401
from test_refusals import refused

from examples.demo import tiny
from examples.demo.model import write_folder

STEPS = 6
#: With the default lag, exact(1), step 3 is scored with the weights pushed after step 1.
FIRST, PUSHED = 3, 1


def asked(inputs, run_id: str, **changes) -> superbatch.RunSpec:
    """Uniform at first, then against the learner of step 1. No reference is named."""
    phases = [phase(policy="uniform"), phase(from_step=FIRST, reference_step=PUSHED)]
    return spec(inputs, run_id, **{"phases": phases, "reference": None, **changes})


def train(run: superbatch.Run, inputs, steps: int = STEPS) -> list[list[str]]:
    ids = []
    for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=steps):
        ids.append(batch["_superbatch_id"].to_pylist())
        run.push_weights(weights(inputs, batch.step), step=batch.step)
    run.flush()
    return ids


def test_the_reference_is_what_the_run_pushed_after_that_step(inputs, service, tmp_path):
    run = superbatch.connect(service.address).open_run(asked(inputs, "own"))
    assert run.spec.phases[1].reference_step == PUSHED
    ids = train(run, inputs)
    receipts = [run.receipt(step) for step in range(FIRST, STEPS)]
    # Step 3 has the same weights on both sides: there is nothing to learn.
    for row in receipts[0].chosen:
        assert row.learner_loss == pytest.approx(row.reference_loss, rel=1e-5)
    assert receipts[0].summary.learner.step == PUSHED
    for receipt in receipts[1:]:
        assert any(abs(row.learner_loss - row.reference_loss) > 1e-3 for row in receipt.chosen)
    assert len({receipt.summary.reference_digest for receipt in receipts}) == 1
    assert receipts[0].summary.reference_digest and receipts[0].summary.mode == "normal"
    with Cluster(tmp_path, workers=2) as other:
        again = superbatch.connect(other.address).open_run(asked(inputs, "own"))
        assert train(again, inputs) == ids


def test_it_takes_over_from_the_reference_and_moves_on(inputs, service):
    phases = [
        phase(),
        phase(from_step=FIRST, reference_step=PUSHED),
        phase(from_step=FIRST + 2, reference_step=PUSHED + 2),
    ]
    run = superbatch.connect(service.address).open_run(
        spec(inputs, "swapped", phases=phases, loss="softmax")
    )
    train(run, inputs, steps=FIRST + 4)
    digests = [run.receipt(step).summary.reference_digest for step in range(FIRST + 4)]
    assert len(set(digests[:FIRST])) == 1 and len(set(digests)) == 3
    assert digests[FIRST] == digests[FIRST + 1] and digests[-1] == digests[-2]


def test_a_rewind_into_its_phase_is_refused_once_it_was_rolled_back(inputs, service):
    over = FIRST + 2
    phases = [
        phase(policy="uniform"),
        phase(from_step=FIRST, reference_step=PUSHED),
        phase(from_step=over, policy="uniform"),
    ]
    run = superbatch.connect(service.address).open_run(asked(inputs, "back", phases=phases))
    train(run, inputs, steps=over + 1)
    # The phase is over, so that its reference may be taken back.
    run.roll_back_weights(1)
    with pytest.raises(superbatch.Error, match="were rolled back") as caught:
        run.rewind(FIRST + 1, mode="reselect")
    assert caught.value.metadata["step"] == str(PUSHED)
    assert reason(caught) == "WEIGHTS_MISSING"
    # What was chosen is served again, and the phase after it has no reference.
    run.rewind(over, mode="reselect")
    run.rewind(FIRST + 1, mode="replay")


def test_its_snapshot_is_kept_where_others_are_deleted(inputs, tmp_path):
    keep_one = {"SUPERBATCH_COORDINATOR__SNAPSHOTS_KEPT": "1"}
    with Cluster(tmp_path, environment=keep_one) as cluster:
        run = superbatch.connect(cluster.address).open_run(asked(inputs, "kept"))
        train(run, inputs, steps=5)
        cluster.coordinator.kill()
        cluster.start_coordinator()
        run = superbatch.connect(cluster.address).open_run(
            asked(inputs, "kept"), incarnation="again"
        )
        for batch in run.batches(rank=0, world_size=1, start_step=5, end_step=8):
            run.push_weights(weights(inputs, batch.step), step=batch.step)
        digests = {run.receipt(step).summary.reference_digest for step in range(FIRST, 8)}
        assert len(digests) == 1 and "" not in digests


def test_weights_that_may_not_be_there_are_refused(inputs, service):
    for changes, said in (
        (
            {"phases": [phase(policy="uniform"), phase(from_step=2, reference_step=1)]},
            "begin at step 3 or later",
        ),
        ({"lag": superbatch.at_most(1)}, "at_most"),
        ({"push_every_steps": 4}, "no push is due after that step"),
        ({"phases": [phase(reference_step=0)]}, "begin at step 2 or later"),
    ):
        refused(service, "RUN_SPEC_IMPOSSIBLE", asked(inputs, "no", **changes), said)
    alone = [phase(policy="uniform"), phase(from_step=3, criterion="easy", reference_step=1)]
    refused(
        service,
        "RUN_SPEC_IMPOSSIBLE",
        asked(inputs, "no", learner=None, phases=alone),
        "no learner",
    )


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> Path:
    """A model of half the width of the one that is trained."""
    folder = tmp_path_factory.mktemp("proxy") / "proxy"
    return write_folder(folder, tiny.captions(), 3, {**tiny.SHAPE, "width": 8, "mlp": 16})


def test_a_smaller_proxy_chooses_for_the_model_that_is_trained(inputs, service, proxy):
    """The run's learner is the proxy, which its trainer trains beside the large model on the same
    batches, and pushes. The reference is of the proxy's size, too.
    """
    learner = superbatch.Learner(
        model_uri=proxy.as_uri(), snapshot_uri=(proxy / "model.safetensors").as_uri()
    )
    run = superbatch.connect(service.address).open_run(
        spec(inputs, "proxy", learner=learner, reference=proxy.as_uri())
    )
    small, large = load_file(proxy / "model.safetensors"), weights(inputs, 0)
    for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=3):
        run.push_weights(
            {n: v * (1 + 0.01 * batch.step) for n, v in small.items()}, step=batch.step
        )
    run.flush()
    full = superbatch.connect(service.address).open_run(spec(inputs, "not-proxy"))
    full.select(0, rank=0, world_size=1)
    costs = [one.receipt(0).summary.cost for one in (run, full)]
    assert costs[0].learner_flops < 0.5 * costs[1].learner_flops
    with pytest.raises(superbatch.Error, match="shape"):
        run.push_weights(large, step=3)
        run.flush()


def push_proxy(address, asked, proxy) -> None:
    """In a process of its own. Of whole tensors only rank 0 pushes, so it says that it is."""
    run = superbatch.connect(address).open_run(asked)
    small = load_file(proxy / "model.safetensors")
    run.push_weights(small, step=0, rank=1)
    assert run.flush() is None, "another rank pushes nothing"
    for step in range(2):
        run.push_weights(small, step=step, rank=0)
    run.flush()


def test_a_proxy_is_pushed_by_a_process_of_its_own(inputs, service, proxy):
    """This process asks for batches and trains the large model; another one trains the proxy."""
    learner = superbatch.Learner(
        model_uri=proxy.as_uri(), snapshot_uri=(proxy / "model.safetensors").as_uri()
    )
    asked = spec(inputs, "proxy-apart", learner=learner, reference=proxy.as_uri())
    run = superbatch.connect(service.address).open_run(asked)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pushed = pool.apply_async(push_proxy, (service.address, asked, proxy))
        # The other process may be behind: waiting for it is no stall.
        places = {"rank": 0, "world_size": 1, "start_step": 0, "end_step": 4}
        steps = [batch.step for batch in run.batches(**places, need_after=60)]
        pushed.get(60)
    assert steps == [0, 1, 2, 3]
    # With the default lag the last step needs what was left behind by step 1.
    assert run.receipt(3).summary.learner.step == 1
