"""Numeric columns of the data as criterion, as a term, and as a rule, beside a direct
computation.
"""

from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import Cluster
from test_end_to_end import inputs, phase, reason, service, spec  # noqa: F401
from test_inputs import table  # noqa: F401
from test_tar import tars  # noqa: F401

ROWS, ASKED = 768, {"lag": superbatch.at_most(8), "max_ahead": 1, "epochs": 1}


@pytest.fixture(scope="module")
def pool(inputs, table) -> tuple[Path, numpy.ndarray]:  # noqa: F811
    """A shard with aesthetic scores, of which some are null."""
    scores = numpy.random.default_rng(3).normal(5, 1, ROWS)
    column = pyarrow.array(scores, mask=numpy.arange(ROWS) % 50 == 0)
    folder = inputs / "aesthetic pool"
    folder.mkdir()
    pyarrow.parquet.write_table(
        table.append_column("aesthetic", column), folder / "0.parquet", row_group_size=64
    )
    scores[::50] = numpy.nan
    return folder, scores


def scanned(client: superbatch.Client, inputs: Path, source, run_id: str) -> list[list[int]]:
    """The candidates of each step, as a uniform run of the same data that takes all tells them."""
    whole = phase(policy="uniform", super_batch_size=96, sub_batch_size=96, n_chunks=1)
    run = client.open_run(spec(inputs, run_id, sources=[source], phases=[whole], **ASKED))
    return [rows(run.receipt(batch.step).chosen) for batch in every(run)]


def every(run: superbatch.Run):
    return run.batches(rank=0, world_size=1, start_step=0)


def rows(chosen) -> list[int]:
    return [row.row for row in chosen]


def test_top_k_takes_the_largest_values_and_reads_no_model(inputs, service, pool):  # noqa: F811
    folder, scores = pool
    client = superbatch.connect(service.address)
    candidates = scanned(client, inputs, folder, "column-all")
    column = superbatch.ScoreColumn(name="aesthetic", weight=-2.0)
    asked = phase(policy="top_k", criterion="column", score_columns=[column])
    run = client.open_run(
        spec(
            inputs,
            "column-top",
            sources=[folder],
            phases=[asked],
            learner=None,
            reference=None,
            **ASKED,
        )
    )
    for batch in every(run):
        receipt = run.receipt(batch.step)
        known = [row for row in candidates[batch.step] if not numpy.isnan(scores[row])]
        expected = sorted(known, key=lambda row: scores[row])[:24]
        assert sorted(rows(receipt.chosen)) == sorted(expected)
        for row in [*receipt.chosen, *receipt.passed_over]:
            assert row.column_values == [scores[row.row]]
            assert row.own_score == pytest.approx(-2 * scores[row.row], rel=1e-6)
        summary = receipt.summary
        assert summary.left_out.score_columns == 96 - len(known)
        assert summary.score_columns[0].name == "aesthetic"
        mean = numpy.mean([-2 * scores[row] for row in rows(receipt.chosen)])
        assert summary.batch_score == pytest.approx(mean)
        assert summary.cost.learner_flops == summary.cost.reference_flops == 0
    assert batch.step == 7


def gumbel_counts(chances: numpy.ndarray, groups: numpy.ndarray, wanted: int) -> tuple:
    """How many of each group a draw without replacement has: its mean and variance, by 1,000 such
    draws.
    """
    noise = numpy.random.default_rng(7).gumbel(size=(1_000, len(chances)))
    chosen = numpy.argsort(-(numpy.log(chances) + noise), axis=1)[:, :wanted]
    counts = numpy.stack([(groups[chosen] == group).sum(axis=1) for group in range(4)], axis=1)
    return counts.mean(axis=0), counts.var(axis=0)


def check_draws(run, candidates, values, chances_of, groups_of) -> None:
    """Chosen rows come from four groups as NumPy draws them; a uniform draw would be far off."""
    found, expected, variance, uniform = (numpy.zeros(4) for _ in range(4))
    for batch in every(run):
        chosen = rows(run.receipt(batch.step).chosen)
        offered = numpy.array([n for n in candidates[batch.step] if not numpy.isnan(values[n])])
        assert set(chosen) <= set(offered.tolist()) and len(set(chosen)) == len(chosen)
        groups = groups_of(offered)
        mean, of_one = gumbel_counts(chances_of(values[offered]), groups, len(chosen))
        expected, variance = expected + mean, variance + of_one
        known = dict(zip(offered.tolist(), groups.tolist(), strict=True))
        found += numpy.bincount([known[row] for row in chosen], minlength=4)
        uniform += len(chosen) * numpy.bincount(groups, minlength=4) / len(offered)
    off = numpy.abs(found - expected) / numpy.sqrt(variance)
    assert off.max() < 4, (found, expected)
    assert (numpy.abs(uniform - expected) / numpy.sqrt(variance)).max() > 8, "it shows nothing"


def by_rank(values: numpy.ndarray) -> numpy.ndarray:
    ranks = numpy.argsort(numpy.argsort(-values))
    return 100.0 ** (-ranks / (len(values) - 1))


def by_size(values: numpy.ndarray) -> numpy.ndarray:
    return (numpy.maximum(values, 0) + 1e-6) ** 4


@pytest.mark.parametrize(
    ("policy", "tuning", "chances_of"),
    [
        ("rank", superbatch.Tuning(pressure=100.0), by_rank),
        ("proportional", superbatch.Tuning(priority_exponent=4.0, weight_exponent=0.5), by_size),
    ],
)
def test_policies_that_draw_by_chance_draw_by_the_column(
    inputs, service, pool, policy, tuning, chances_of
):  # noqa: F811
    folder, scores = pool
    client, often = superbatch.connect(service.address), {**ASKED, "epochs": 6}
    column = superbatch.ScoreColumn(name="aesthetic")
    whole = phase(policy="uniform", sub_batch_size=96, n_chunks=1)
    asked = phase(
        policy=policy,
        criterion="column",
        sub_batch_size=8,
        n_chunks=1,
        tuning=tuning,
        score_columns=[column],
    )
    settings = {"sources": [folder], **often}
    run = client.open_run(spec(inputs, f"{policy}-all", phases=[whole], **settings))
    candidates = [rows(run.receipt(batch.step).chosen) for batch in every(run)]
    run = client.open_run(spec(inputs, f"column-{policy}", phases=[asked], **settings))
    # Quarters, from the largest value to the least.
    order = numpy.argsort(numpy.argsort(-numpy.nan_to_num(scores, nan=-1e9)))
    check_draws(run, candidates, scores, chances_of, lambda offered: order[offered] * 4 // ROWS)
    for step in range(4):
        chosen = run.receipt(step).chosen
        assert [row.column_values for row in chosen] == [[scores[row.row]] for row in chosen]
        chances = chances_of(scores[rows(chosen)])
        expected = (chances.min() / chances) ** 0.5
        weights = expected if policy == "proportional" else numpy.ones(len(chosen))
        assert [row.weight for row in chosen] == pytest.approx(weights.tolist(), rel=1e-5)


def test_a_column_of_probabilities_balances_as_metaclip_does(inputs, service, table):  # noqa: F811
    """Four entries of the metadata, of which the first has 14 times as many rows as the last. A
    row's probability is that by which MetaCLIP keeps it: t over its entry's rows, at most 1.
    """
    sizes = numpy.array([448, 192, 96, 32])
    entries = numpy.random.default_rng(5).permutation(numpy.repeat(numpy.arange(4), sizes))
    kept = numpy.minimum(32 / sizes, 1.0)[entries]
    folder = inputs / "balanced"
    folder.mkdir()
    balanced = table.append_column("probability", pyarrow.array(kept))
    pyarrow.parquet.write_table(balanced, folder / "0.parquet", row_group_size=64)
    asked = phase(
        policy="proportional",
        criterion="column",
        super_batch_size=ROWS,
        sub_batch_size=24,
        n_chunks=1,
        tuning=superbatch.Tuning(priority_exponent=1.0),
        score_columns=[superbatch.ScoreColumn(name="probability")],
    )
    settings = {"sources": [folder], **ASKED, "epochs": 12, "phases": [asked]}
    run = superbatch.connect(service.address).open_run(spec(inputs, "balanced", **settings))
    every_row = [list(range(ROWS))] * 12
    chances = lambda values: values + 1e-6  # noqa: E731
    check_draws(run, every_row, kept, chances, lambda offered: entries[offered])


def test_a_rule_leaves_out_and_a_missing_value_may_be_given(inputs, service, pool):  # noqa: F811
    folder, scores = pool
    client = superbatch.connect(service.address)
    candidates = scanned(client, inputs, folder, "rule-all")
    for name, missing in (("without", None), ("with", 5.0)):
        filled = numpy.where(numpy.isnan(scores), numpy.nan if missing is None else missing, scores)
        rule = superbatch.ScoreColumn(name="aesthetic", at_least=4.5, at_most=6.0, missing=missing)
        asked = phase(policy="uniform", sub_batch_size=32, n_chunks=1, score_columns=[rule])
        run = client.open_run(
            spec(inputs, f"rule-{name}", sources=[folder], phases=[asked], **ASKED)
        )
        for batch in every(run):
            receipt = run.receipt(batch.step)
            inside = [row for row in candidates[batch.step] if 4.5 <= filled[row] <= 6.0]
            assert set(rows(receipt.chosen)) <= set(inside)
            assert receipt.summary.left_out.score_columns == 96 - len(inside)


def test_a_term_is_added_to_learnability(inputs, service, pool, tmp_path):  # noqa: F811
    """By the receipts' own losses; and two workers choose what one process does."""
    folder, scores = pool
    column = superbatch.ScoreColumn(name="aesthetic", weight=0.5, missing=4.0)
    asked = phase(policy="top_k", n_chunks=1, score_columns=[column])
    settings = {"sources": [folder], "phases": [asked], **ASKED}
    run = superbatch.connect(service.address).open_run(spec(inputs, "term", **settings))
    chosen = []
    for step in range(3):
        run.select(step, rank=0, world_size=1)
        receipt = run.receipt(step)
        chosen.append(rows(receipt.chosen))
        filled = numpy.where(numpy.isnan(scores), 4.0, scores)
        for row in receipt.chosen:
            sum_of_both = row.learner_loss - row.reference_loss + 0.5 * filled[row.row]
            assert row.own_score == pytest.approx(sum_of_both, abs=1e-5)
            assert row.score == pytest.approx(sum_of_both, abs=1e-2)
        least = min(row.own_score for row in receipt.chosen)
        assert all(row.own_score <= least + 1e-2 for row in receipt.passed_over)
    with Cluster(tmp_path, workers=2) as cluster:
        client = superbatch.connect(cluster.address)
        again = client.open_run(spec(inputs, "term", **settings))
        for step in range(3):
            again.select(step, rank=0, world_size=1)
            assert rows(again.receipt(step).chosen) == chosen[step]


def test_scores_may_lie_beside_tars(inputs, service, tars, tmp_path):  # noqa: F811
    """As img2dataset's Parquet beside each tar: by key. Keys repeat between the first two
    shards.
    """
    source = superbatch.Source(
        uri=tars / "00000.tar", scores=tmp_path / "scores.parquet", id_column="__key__"
    )
    values = numpy.random.default_rng(9).random(256)
    keys = [f"{number:09d}" for number in range(256)]
    beside = pyarrow.table({"key": keys[::-1], "quality": values[::-1]})
    pyarrow.parquet.write_table(beside, tmp_path / "scores.parquet")
    client = superbatch.connect(service.address)
    column = superbatch.ScoreColumn(name="quality")
    asked = phase(
        policy="top_k",
        criterion="column",
        super_batch_size=256,
        sub_batch_size=32,
        score_columns=[column],
    )
    run = client.open_run(spec(inputs, "beside", sources=[source], phases=[asked], **ASKED))
    run.select(0, rank=0, world_size=1)
    assert sorted(rows(run.receipt(0).chosen)) == sorted(numpy.argsort(values)[-32:].tolist())


def test_what_can_never_be_a_score_is_refused_by_name(inputs, service, pool):  # noqa: F811
    folder, _ = pool
    column = superbatch.ScoreColumn

    def refused(**changes) -> pytest.ExceptionInfo:
        asked = spec(
            inputs, "never", sources=[folder], **ASKED, phases=[phase(n_chunks=1, **changes)]
        )
        with pytest.raises(superbatch.Error) as caught:
            superbatch.connect(service.address).open_run(asked)
        return caught

    caught = refused(criterion="column", score_columns=[column(name="aesthetic")])
    assert reason(caught) == "RUN_SPEC_IMPOSSIBLE" and "nothing of pairs" in str(caught.value)
    caught = refused(policy="top_k", score_columns=[column(name="esthetic")])
    assert reason(caught) == "COLUMN_NOT_FOUND" and "esthetic" in str(caught.value)
    caught = refused(policy="top_k", score_columns=[column(name="caption")])
    assert reason(caught) == "SCHEMA_MISMATCH" and "no number" in str(caught.value)
    rule = column(name="aesthetic", at_least=50)
    asked = spec(inputs, "nobody", sources=[folder], **ASKED, phases=[phase(score_columns=[rule])])
    run = superbatch.connect(service.address).open_run(asked)
    with pytest.raises(superbatch.Error) as caught:
        run.select(0, rank=0, world_size=1)
    assert reason(caught) == "TOO_FEW_CANDIDATES" and "score_columns leave out 96" in str(
        caught.value
    )
