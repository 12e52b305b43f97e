"""Versions of the weights: compared with the trainer's own, built on older ones, read from storage,
and taken back by hand.
"""

import pytest
import superbatch
import torch
from cluster import Cluster
from commands import fails, prints
from safetensors.torch import save_file
from test_end_to_end import inputs, reason, spec, weights  # noqa: F401


@pytest.fixture
def service(tmp_path):
    with Cluster(tmp_path) as cluster:
        yield cluster


def scaled(state: dict, factor: float) -> dict:
    return {
        name: value * factor if value.is_floating_point() and "logit" not in name else value
        for name, value in state.items()
    }


def test_a_trainer_sees_whether_its_weights_are_the_services(inputs, service):  # noqa: F811
    run = superbatch.connect(service.address).open_run(spec(inputs, "verified"))
    state = weights(inputs, 0)
    run.select(0, rank=0, world_size=1)
    run.push_weights(state, step=0, dtype="bf16")
    first = run.flush().version
    same = run.verify_weights({f"module.{name}": value for name, value in state.items()})
    assert same.equal and same.version.version == first and not same.differing
    changed = dict(state)
    name = next(name for name in state if name.endswith("q_proj.weight"))
    changed[name] = state[name] * 2
    del changed["logit_scale"]
    found = run.verify_weights(changed | {"extra": torch.ones(1)})
    assert not found.equal
    assert (found.differing, found.absent, found.unknown) == ([name], ["logit_scale"], ["extra"])

    # Only the changed tensor is pushed; the others are those of version 1.
    run.push_weights({name: changed[name]}, step=1, dtype="bf16", base_version=first)
    run.flush()
    assert run.verify_weights(state | {name: changed[name]}).equal
    assert run.verify_weights(state, version=first).equal
    with pytest.raises(superbatch.Error, match="there is no version 77; the newest is 2"):
        run.push_weights({name: changed[name]}, step=2, base_version=77)
        run.flush()


def test_a_checkpoint_in_storage_is_pushed_by_its_uri(inputs, service, tmp_path):  # noqa: F811
    run = superbatch.connect(service.address).open_run(spec(inputs, "stored"))
    state = weights(inputs, 0)
    path = tmp_path / "step 0.safetensors"
    save_file(state, path)
    published = run.push_uri(path.as_uri(), step=0)
    assert (published.version, published.step) == (1, 0)
    assert run.verify_weights(state).equal
    with pytest.raises(superbatch.WeightsRefused, match="not the one that was given"):
        run.push_uri(path.as_uri(), step=1, blake3="0" * 64)
    with pytest.raises(superbatch.WeightsRefused, match="there is no file at"):
        run.push_uri((tmp_path / "none.safetensors").as_uri(), step=1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(superbatch.WeightsRefused, match="cut off"):
        run.push_uri(path.as_uri(), step=1)


def test_weights_that_are_rolled_back_score_no_further_step(inputs, service):  # noqa: F811
    # With max_ahead=1 no step is decided before it is asked for.
    opened = spec(inputs, "rolled-back", max_ahead=1)
    run = superbatch.connect(service.address).open_run(opened)
    state = weights(inputs, 0)
    for step in range(3):
        run.select(step, rank=0, world_size=1)
        run.push_weights(scaled(state, 1 + step / 10), step=step)
        run.flush()
    where = ["--address", service.address]
    listed = prints("weights", "rolled-back", "list", *where)
    assert [line.split()[0] for line in listed.splitlines()] == ["version", "3", "2", "1"]
    said = prints("weights", "rolled-back", "rollback", 1, *where)
    assert said == "version 1 (step 0) serves in place of those up to 3\n"
    # Under exact(1), step 3 is scored with the push after step 1, which gave way to version 1.
    run.select(3, rank=0, world_size=1)
    summary = run.receipt(3).summary
    assert (summary.learner.version, summary.mode, summary.lag_steps) == (1, "stale", 2)
    # What the trainer pushes from now on counts.
    run.push_weights(state, step=3)
    run.flush()
    run.select(4, rank=0, world_size=1)
    assert run.receipt(4).summary.learner.version == 1, "the push after step 2 was taken back too"
    run.push_weights(state, step=4)
    run.flush()
    run.select(5, rank=0, world_size=1)
    summary = run.receipt(5).summary
    assert (summary.learner.version, summary.mode) == (4, "normal")
    assert [kept.replaced_by for kept in run.weights()] == [None, None, 1, 1, None]
    assert "nothing to take back" in fails("weights", "rolled-back", "rollback", 5, *where)
    with pytest.raises(superbatch.Error) as caught:
        run.roll_back_weights(99)
    assert reason(caught) == "WEIGHTS_MISSING"
