"""What a run tells its trainer, and how it ends."""

import warnings

import pytest
import superbatch
from client_run import Service, service  # noqa: F401  (a fixture)


def test_a_finished_run_is_closed_by_its_id(service):  # noqa: F811
    client = superbatch.connect(service.address)
    with client.open_run(service.spec("finished")) as run:
        assert run.select(0, rank=0, world_size=1).step == 0
    assert client.get_run("finished").summary.state == "open"
    client.close_run("finished")
    client.close_run("finished")
    assert client.get_run("finished").summary.state == "closed"
    with pytest.raises(superbatch.Error) as caught:
        run.select(1, rank=0, world_size=1)
    assert caught.value.reason == "RUN_CLOSED"
    with pytest.raises(superbatch.Error) as caught:
        client.close_run("unknown")
    assert caught.value.reason == "RUN_NOT_FOUND"


def test_scores_that_no_policy_made_are_none(service):  # noqa: F811
    scores = ("batch_score", "mean_score_chosen", "mean_score_candidates")
    uniform = service.open(service.spec("no-scores")).select(0, rank=0, world_size=1)
    assert [uniform.receipt[name] for name in scores] == [None, None, None]
    model = (service.inputs / "learner").as_uri()
    k_center = superbatch.Phase(policy="k_center", super_batch_size=32, sub_batch_size=8)
    run = service.open(
        service.spec("no-loss", phases=[k_center], reference=model, micro_batch_rows=16)
    )
    run.select(0, rank=0, world_size=1)
    assert [run.receipt(0).summary[name] for name in scores] == [None, None, None]
    run = service.open(service.waiting_spec("scores"))
    run.push_weights(service.weights(), step=-1)
    assert all(
        isinstance(run.select(0, rank=0, world_size=1).receipt[name], float) for name in scores
    )


def trained(service: Service, run_id: str) -> superbatch.RunSpec:  # noqa: F811
    """The spec of a run that was trained for two steps; its trainer is gone."""
    spec = service.waiting_spec(run_id)
    with service.open(spec) as run:
        run.push_weights(service.weights(), step=-1)
        for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=2):
            run.push_weights(service.weights(), step=batch.step)
    return spec


def other(weights: dict) -> dict:
    return {name: 2 * tensor for name, tensor in weights.items()}


def test_steps_repeated_with_the_same_weights_are_no_news(service):  # noqa: F811
    spec = trained(service, "same")
    with warnings.catch_warnings(action="error"), service.open(spec) as run:
        for step in (-1, 0, 1):
            run.push_weights(service.weights(), step=step)


def test_weights_that_are_not_those_published_are_told_once(service):  # noqa: F811
    spec = trained(service, "other")
    run = service.open(spec)
    first = run.get_run().learner
    run.push_weights(other(service.weights()), step=1)
    with pytest.warns(
        UserWarning, match=r'pushed as step 1 .* run.rewind\(1, mode="reselect"\)'
    ) as told:
        version = run.flush()
    assert version.digest == first.digest
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings(action="error"):
        run.push_weights(other(service.weights()), step=0)
        run.flush()


def test_after_the_rewind_that_the_warning_names_other_weights_count(service):  # noqa: F811
    run = service.open(trained(service, "rewound"))
    run.rewind(1, mode="reselect")
    with warnings.catch_warnings(action="error"):
        run.push_weights(other(service.weights()), step=1)
        pushed = run.flush()
    assert run.get_run().learner.digest == pushed.digest


def test_initial_weights_that_are_not_those_published_are_told(service):  # noqa: F811
    run = service.open(trained(service, "initial"))
    run.push_weights(other(service.weights()), step=-1)
    with pytest.warns(UserWarning, match="pushed as step -1 .* opens a run of another id"):
        run.flush()
