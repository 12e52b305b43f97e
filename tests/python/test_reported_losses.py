"""Losses that a trainer reports are a score column of later epochs."""

import math

import pytest
import superbatch
from cluster import Cluster
from test_end_to_end import inputs, phase, reason, spec  # noqa: F401

#: The reserved name of the column.
COLUMN = "_superbatch_loss"


def test_reported_losses_choose_the_examples_of_later_steps(inputs, tmp_path):  # noqa: F811
    with Cluster(tmp_path) as cluster:
        client = superbatch.connect(cluster.address)
        column = superbatch.ScoreColumn(name=COLUMN, missing=-1.0)
        size = {"super_batch_size": 192, "n_chunks": 1}
        phases = [
            phase(policy="uniform", sub_batch_size=192, **size),
            phase(
                from_step=1,
                policy="top_k",
                criterion="column",
                sub_batch_size=24,
                score_columns=[column],
                **size,
            ),
        ]
        asked = spec(inputs, "reported", phases=phases, epochs=0, max_ahead=1)
        run = client.open_run(asked)
        reported: dict[str, float] = {}
        for step in range(8):
            batch = run.select(step, rank=0, world_size=1)
            receipt = run.receipt(step)
            rows = [*receipt.chosen, *receipt.passed_over]
            if step:
                # Of each candidate the value is what was reported of it, or what stands for none.
                for row in rows:
                    assert math.isclose(
                        row.column_values[0], reported.get(row.id, -1.0), rel_tol=1e-6
                    )
                worst = min(row.column_values[0] for row in receipt.chosen)
                assert all(row.column_values[0] <= worst for row in receipt.passed_over)
            ids = batch["_superbatch_id"].to_pylist()
            losses = [(hash_of(id) + step) / 7 for id in ids]
            run.report_losses(batch["_superbatch_id"], losses, step=step)
            reported |= dict(zip(ids, losses, strict=True))
        seen = [row for row in run.receipt(7).chosen if row.column_values[0] >= 0]
        assert seen, "a later epoch has met examples of which losses were reported"

        # They outlive the coordinator.
        cluster.coordinator.kill()
        cluster.start_coordinator("again")
        run = superbatch.connect(cluster.address).open_run(asked)
        run.select(8, rank=0, world_size=1)
        for row in run.receipt(8).chosen:
            assert math.isclose(row.column_values[0], reported.get(row.id, -1.0), rel_tol=1e-6)

        with pytest.raises(superbatch.InvalidArgument, match="step 2 did not choose nothing#1"):
            run.report_losses(["nothing#1"], [1.0], step=2)
        with pytest.raises(superbatch.InvalidArgument, match="is NaN; leave such examples out"):
            run.report_losses([ids[0]], [math.nan], step=7)
        with pytest.raises(superbatch.Error) as caught:
            run.report_losses(ids, losses, step=99)
        assert reason(caught) == "STEP_NOT_COMMITTED"


def hash_of(id: str) -> int:
    return sum(id.encode()) % 97
