"""Approximate scoring and training at two resolutions, by the real binary."""

import dataclasses
import subprocess

import pytest
import superbatch
from cluster import BINARY, Cluster
from test_end_to_end import inputs, phase, reason, service, spec, weights  # noqa: F401
from test_refusals import refused

from examples.demo import tiny

LOW = superbatch.Approximation(resolution=tiny.SIDE // 2)
HALF = superbatch.MultiResolution()
STEPS = 4


def flexi(inputs, run_id: str, **changes) -> superbatch.RunSpec:
    """A uniform warm-up of two steps at both resolutions, then approximate scoring."""
    phases = [
        phase(policy="uniform", approximation=LOW, multi_resolution=HALF),
        phase(from_step=2, fidelity="approximate", approximation=LOW, multi_resolution=HALF),
    ]
    return spec(inputs, run_id, **{"phases": phases, **changes})


def train(run: superbatch.Run, inputs, end: int = STEPS) -> list[superbatch.Batch]:
    batches = []
    for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=end):
        batches.append(batch)
        run.push_weights(weights(inputs, batch.step), step=batch.step)
    run.flush()
    return batches


def test_half_of_each_batch_is_low_after_its_full_rows(inputs, service):
    run = superbatch.connect(service.address).open_run(flexi(inputs, "flexi", micro_batches=2))
    batches = train(run, inputs)
    names = ["full"] * 6 + ["approximate"] * 6
    for batch in batches:
        assert batch["_superbatch_fidelity"].to_pylist() == names * 2, (
            "each micro-batch: full rows, then low ones"
        )
    assert [batch.receipt.fidelity for batch in batches] == [
        "full",
        "full",
        "approximate",
        "approximate",
    ]
    assert batches[2].receipt.approximation == {"resolution": LOW.resolution}
    receipt = run.receipt(3)
    assert sum(row.fidelity == "approximate" for row in receipt.chosen) == 12
    again = superbatch.connect(service.address).open_run(
        flexi(inputs, "flexi", micro_batches=2), incarnation="again"
    )
    slices = [again.select(3, rank=rank, world_size=3) for rank in range(3)]
    assert all(
        batch["_superbatch_fidelity"].to_pylist() == (["full"] * 2 + ["approximate"] * 2) * 2
        for batch in slices
    )
    ids = {
        name: fidelity
        for batch in slices
        for name, fidelity in zip(
            batch["_superbatch_id"].to_pylist(),
            batch["_superbatch_fidelity"].to_pylist(),
            strict=True,
        )
    }
    assert ids == {row.id: row.fidelity for row in receipt.chosen}, (
        "who is low does not depend on the world size"
    )
    assert service.coordinator.metric("superbatch_selected_approximate_total") >= 48


def test_what_is_scored_low_costs_less_and_is_accounted_by_tower(inputs, service):
    client = superbatch.connect(service.address)
    run = client.open_run(flexi(inputs, "accounts"))
    train(run, inputs)
    full = client.open_run(spec(inputs, "accounts-full"))
    for batch in full.batches(rank=0, world_size=1, start_step=0, end_step=2):
        full.push_weights(weights(inputs, batch.step), step=batch.step)
    low_cost, full_cost = run.receipt(3).summary.cost, full.receipt(1).summary.cost
    assert low_cost.scoring.image_full == 0 < low_cost.scoring.image_approximate
    assert full_cost.scoring.image_approximate == 0
    assert low_cost.learner_flops < 0.7 * full_cost.learner_flops
    scored = sum(low_cost.scoring.values())
    assert scored == pytest.approx(low_cost.learner_flops + low_cost.reference_flops)
    assert sum(low_cost.training.values()) == pytest.approx(low_cost.train_flops)
    assert 0 < low_cost.training.image_approximate < 0.5 * low_cost.training.image_full
    assert low_cost.train_flops < 0.9 * full_cost.train_flops
    assert full_cost.training.image_approximate == 0
    # A uniform step of the same sub-batch is what both prices are relative to.
    assert low_cost.uniform_flops == full_cost.uniform_flops == full_cost.train_flops
    spent = [
        sum(cost[f"{what}_flops"] for what in ("reference", "learner", "selection", "train"))
        for cost in (low_cost, full_cost)
    ]
    assert spent[0] / low_cost.uniform_flops < spent[1] / full_cost.uniform_flops
    printed = subprocess.run(
        [BINARY, "receipts", "accounts", "--step", "3", "--state", service.state],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"price     {spent[0] / low_cost.uniform_flops:.3f} of a uniform step" in printed


def test_reference_embeddings_of_both_fidelities_are_kept_apart(inputs, tmp_path):
    """A second run at full fidelity over the same rows chooses what it chooses without the
    first.
    """

    def chosen(cluster, run_id, asked):
        run = superbatch.connect(cluster.address).open_run(asked(inputs, run_id))
        return [batch["_superbatch_id"].to_pylist() for batch in train(run, inputs)]

    with Cluster(tmp_path / "alone") as cluster:
        alone = chosen(cluster, "full", spec)
    with Cluster(tmp_path / "after") as cluster:
        low = chosen(cluster, "low", flexi)
        assert chosen(cluster, "full", spec) == alone
    assert low[2:] != alone[2:]


def test_whole_steps_may_be_low(inputs, service):
    whole = superbatch.MultiResolution(whole_step=True)
    run = superbatch.connect(service.address).open_run(
        spec(
            inputs,
            "whole",
            phases=[
                phase(
                    policy="uniform", super_batch_size=48, approximation=LOW, multi_resolution=whole
                )
            ],
        )
    )
    kinds = [
        set(run.select(step, rank=0, world_size=1)["_superbatch_fidelity"].to_pylist())
        for step in range(1)
    ]
    kinds += [
        set(batch["_superbatch_fidelity"].to_pylist())
        for batch in run.batches(rank=0, world_size=1, start_step=1, end_step=16)
    ]
    assert all(len(kind) == 1 for kind in kinds) and {"full"} in kinds and {"approximate"} in kinds


def test_what_can_never_work_is_refused(inputs, service):
    low = {"fidelity": "approximate", "approximation": LOW}
    refused(
        service,
        "RUN_SPEC_IMPOSSIBLE",
        spec(inputs, "a", phases=[phase(**low)]),
        "never trained with",
    )
    refused(
        service,
        "RUN_SPEC_IMPOSSIBLE",
        spec(inputs, "b", phases=[phase(fidelity="approximate")]),
        "resolution",
    )
    for side in (tiny.SIDE - 1, tiny.SIDE, 2 * tiny.SIDE):
        asked = phase(
            policy="uniform",
            approximation=superbatch.Approximation(resolution=side),
            multi_resolution=HALF,
        )
        refused(
            service, "RUN_SPEC_IMPOSSIBLE", spec(inputs, "c", phases=[asked]), "in patches of 8"
        )
    run = superbatch.connect(service.address).open_run(
        spec(
            inputs,
            "allowed",
            phases=[phase(allow_untrained_fidelity=True, multi_resolution=HALF, **low)],
        )
    )
    with pytest.raises(superbatch.Error) as caught:
        run.select(0, rank=0, world_size=8)
    assert reason(caught) == "WORLD_SIZE_INVALID" and "12 approximate" in str(caught.value)
    assert len(run.select(0, rank=0, world_size=4)) == 6
    with pytest.raises(superbatch.Error) as caught:
        run.append_phases(
            [
                phase(
                    from_step=9,
                    approximation=superbatch.Approximation(resolution=12),
                    multi_resolution=HALF,
                )
            ]
        )
    assert reason(caught) == "RUN_SPEC_IMPOSSIBLE"


def test_a_probe_takes_the_reference_from_what_was_embedded_ahead(inputs, tmp_path):
    probe = superbatch.FidelityProbe(every_steps=1, rows=48)
    phases = [
        phase(policy="uniform", approximation=LOW, multi_resolution=HALF),
        phase(from_step=1, fidelity="approximate", approximation=LOW, probe=probe),
    ]
    with Cluster(tmp_path) as cluster:
        command = [BINARY, "embed", "--model", inputs / "reference", "--state", cluster.state]
        command += ["--sources", (inputs / "pool").as_uri()]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)
        run = superbatch.connect(cluster.address).open_run(
            spec(inputs, "ahead", phases=phases, micro_batch_rows=16)
        )
        train(run, inputs, end=3)
        summary = run.receipt(2).summary
        assert summary.probe.rows == 48
        # Only the learner embeds its rows.
        pair = summary.cost.train_flops / (3 * 24)
        assert summary.cost.probe_flops == pytest.approx(48 * pair, rel=1e-6)


def test_a_probe_compares_both_fidelities_and_changes_nothing(inputs, tmp_path):
    """Every second step, half of the candidates are embedded at full fidelity, too."""
    probe = superbatch.FidelityProbe(every_steps=2, rows=48)
    phases = [
        phase(policy="uniform", approximation=LOW, multi_resolution=HALF),
        phase(from_step=1, fidelity="approximate", approximation=LOW, probe=probe),
    ]
    with Cluster(tmp_path) as cluster:
        client = superbatch.connect(cluster.address)
        # No step is under way beyond the last one asked for, so all counts are exact.
        asked = spec(inputs, "probed", phases=phases, micro_batch_rows=16, max_ahead=1)
        run = client.open_run(asked)
        assert run.spec.phases[1].probe == {"every_steps": 2, "rows": 48}
        batches = train(run, inputs, end=5)
        summaries = [run.receipt(step).summary for step in range(5)]
        found = summaries[3].probe
        assert [summary.probe is None for summary in summaries] == [True, False, True, False, True]
        assert (found.rows, found.draw) == (48, 12)
        assert -1 <= found.rank_correlation <= 1 and 0 <= found.overlap <= 1
        assert found.score_full > found.score_uniform, "joint selection draws what scores high"
        cost = summaries[3].cost
        # Two models, 48 rows, at full fidelity; none of it is in the other fields. The reference
        # embeds them block by block, and pads the last rows of each.
        pair = cost.train_flops / (3 * 24)
        assert 2 * 48 * pair * (1 - 1e-6) < cost.probe_flops < 3 * 48 * pair
        assert cost.scoring.image_full == 0
        assert summaries[2].cost.probe_flops == 0
        metric = cluster.coordinator.metric
        assert metric("superbatch_probes_total", outcome="ok") == 2
        assert metric("superbatch_probes_total", outcome="failed") == 0
        last = superbatch_probe(metric)
        assert last == pytest.approx((found.rank_correlation, found.overlap))
        totals = run.get_run().accounts
        models = totals.reference_flops + totals.learner_flops + totals.probe_flops
        counted = [metric("superbatch_flops_total", stage=s) for s in ("reference", "learner")]
        assert sum(counted) == pytest.approx(models + totals.discarded_flops, rel=1e-6)
        assert metric("superbatch_flops_total", stage="selection") == pytest.approx(
            totals.selection_flops, abs=100
        )
        printed = subprocess.run(
            [BINARY, "receipts", "probed", "--step", "3", "--state", cluster.state],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "of 48 rows at both fidelities" in printed
        quiet = [phases[0], dataclasses.replace(phases[1], probe=None)]
        without = client.open_run(spec(inputs, "without", phases=quiet, micro_batch_rows=16))
        ids = [batch["_superbatch_id"].to_pylist() for batch in train(without, inputs, end=5)]
        assert ids == [batch["_superbatch_id"].to_pylist() for batch in batches]


def superbatch_probe(metric) -> tuple[float, float]:
    """What the gauges say of the newest probe."""
    return metric("superbatch_probe_rank_correlation"), metric("superbatch_probe_overlap")


def test_a_probe_that_can_tell_nothing_is_refused(inputs, service):
    probe = superbatch.FidelityProbe(every_steps=0)
    asked = phase(approximation=LOW, multi_resolution=HALF, probe=probe)
    refused(service, "RUN_SPEC_IMPOSSIBLE", spec(inputs, "p", phases=[asked]), "every_steps")
    few = dataclasses.replace(asked, probe=superbatch.FidelityProbe(every_steps=5, rows=4))
    refused(service, "RUN_SPEC_IMPOSSIBLE", spec(inputs, "q", phases=[few]), "fewer than 2")
    bare = phase(probe=superbatch.FidelityProbe(every_steps=5))
    refused(service, "RUN_SPEC_IMPOSSIBLE", spec(inputs, "r", phases=[bare]), "approximation")
