"""The study's arms in one process, on a world of ten drawings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from superbatch_kernels import Model, select
from test_demo_data import COLOURS, drawings

from examples.demo import reference
from examples.demo.data import build
from examples.demo.data.build import PoolRecipe
from examples.demo.data.render import Drawings
from examples.demo.settings import Settings
from examples.study import __main__ as study
from examples.study import experiments, harness, report
from examples.study.experiments import JOINT, UNIFORM
from examples.study.harness import Arm, Conditions, Run
from examples.study.results import Results
from examples.study.world import World

SETTINGS = Settings(
    steps=4,
    evaluate_every=2,
    super_batch_size=32,
    sub_batch_size=8,
    warmup_steps=1,
    average_over=0.25,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    pictures = [
        picture
        for radius, source in enumerate(
            ("openmoji", "fluent/modern", "google", "fluent/flat", "twitter")
        )
        for picture in drawings(source, 4 + radius)
    ]
    sets = build.plan_sets(pictures, PoolRecipe(rows=100))
    # Ten concepts are too few to be sure of one in each split.
    for row, split in zip(sets["eval"], ["val", "test"] * len(COLOURS)):
        object.__setattr__(row, "split", split)
    dataset = folder / "dataset"
    build.write_sets(sets, Drawings.of(pictures, folder, processes=1), dataset, processes=1)
    (dataset / "dataset.json").write_text('{"clean": "ten"}')
    settings = Settings(
        steps=3,
        evaluate_every=3,
        sub_batch_size=8,
        world_size=1,
        warmup_steps=1,
        keep_at=1,
        low_side=12,
    )
    return World(dataset, reference.train_reference(folder, dataset, settings), 12)


def test_arms_begin_alike_and_part(world):
    uniform, joint = (Run(world, Arm(name, name), SETTINGS, 0) for name in ("uniform", "joint"))
    curves = [run.run() for run in (uniform, joint)]
    assert curves[0][0]["test"] == curves[1][0]["test"]
    assert [point["step"] for point in curves[1]] == [0, 2, 4]
    assert not torch.equal(uniform.model.logit_bias, joint.model.logit_bias)
    assert curves[1][-1]["flops"] > curves[0][-1]["flops"]
    assert all(len(rows) == 8 for rows in joint.chosen)


def test_the_same_seed_trains_the_same(world):
    arm = Arm("joint", "joint", {"n_chunks": 4})
    first, again, other = (Run(world, arm, SETTINGS, seed) for seed in (3, 3, 4))
    for run in (first, again, other):
        run.run()
    assert torch.equal(torch.stack(first.chosen), torch.stack(again.chosen))
    assert not torch.equal(torch.stack(first.chosen), torch.stack(other.chosen))


def test_scoring_low_is_cheaper_and_trains_half_of_the_rows_low(world):
    low, full = (Run(world, Arm("a", "joint", low=low), SETTINGS, 0) for low in (True, False))
    assert low.costs.step < full.costs.step and low.costs.once < full.costs.once
    rows = torch.arange(8)
    assert len(harness.half_low(rows)) == 4
    image, text = harness.embed_mixed(low.model, world.pool, rows, True)
    small = harness.half_low(rows)
    assert torch.allclose(
        image[:4],
        harness.embed(low.model, world.pool.low[small], world.pool.ids[small])[0],
        atol=1e-6,
    )
    assert image.shape == text.shape == (8, 64)


def test_a_filter_keeps_the_best_once(world):
    run = Run(world, Arm("filtered", "uniform", best=0.3), SETTINGS, 0)
    assert len(run.pool) == int(0.3 * len(world.pool))
    scores = (run.references.image * run.references.text).sum(dim=1)
    assert scores[run.references.best(0.3)].min() >= scores.topk(len(run.pool)).values.min()
    assert run.costs.once > 0


def curve(*accuracies: float) -> list[dict]:
    return [
        {
            "step": 10 * i,
            "flops": 2.0 * i,
            "seconds": 1.0 * i,
            "test": (0.0, accuracy),
            "val": (0.0, accuracy),
            "wrong": 0.5,
            "repeats": 0.1,
            "false": 0.25,
            "own": 1.5,
            "pairs": -0.5,
        }
        for i, accuracy in enumerate(accuracies)
    ]


def test_costs_to_uniforms_end_are_read_off_the_curves():
    assert report.reached(curve(0.1, 0.2, 0.4), 0.3) == pytest.approx(
        {"step": 15, "flops": 3.0, "seconds": 1.5}
    )
    assert report.reached(curve(0.1, 0.2), 0.3) is None
    uniform = {0: curve(0.1, 0.2, 0.3)}
    assert report.against_uniform({0: curve(0.1, 0.3)}, uniform) == ["2.0", "2.0", "2.0"]
    assert report.against_uniform({0: curve(0.1, 0.2)}, uniform)[0] == "not reached"
    assert report.against_uniform({1: curve(0.1, 0.3)}, uniform)[0] == "uniform is missing"
    # An arm that begins where uniform ends has not reached it in no time.
    sunk = {0: curve(0.3, 0.2, 0.3)}
    assert report.against_uniform({0: curve(0.3, 0.4)}, sunk)[0] == "no end to reach"


def test_the_report_is_drawn(tmp_path: Path):
    main = {
        "uniform": {0: curve(0.1, 0.2), 1: curve(0.1, 0.3)},
        "joint": {0: curve(0.1, 0.3)},
    }
    report.draw({"main": main, "flat": main}, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000
    lines = report.rows(main)
    assert lines[2].startswith("| uniform | 2 | 25.0 ± 63.5 % |")
    assert lines[3].endswith("| 0.25 | 1.50 | -0.50 | 2.0 | 2.0 | 2.0 |")
    assert report.counted(main) == "2 seeds of each arm, but joint 1"
    assert report.counted({"joint": main["uniform"]}) == "2 seeds of each arm"


def test_the_queue_trains_what_is_missing_and_nothing_twice(world, tmp_path, monkeypatch, capsys):
    small = experiments.Experiment("small", (UNIFORM, JOINT), (0, 1), settings=SETTINGS)
    other = replace(small, about="another", arms=(JOINT,), seeds=(1, 2))
    monkeypatch.setattr(experiments.Experiment, "world", lambda self, cache: world)
    for name in list(experiments.EXPERIMENTS):
        monkeypatch.delitem(experiments.EXPERIMENTS, name)
    monkeypatch.setitem(experiments.EXPERIMENTS, "small", small)
    monkeypatch.setitem(experiments.EXPERIMENTS, "other", other)
    path = tmp_path / "results.jsonl"

    def queue(*arguments: str) -> list[str]:
        given = [*arguments, "--results", str(path), "--cache", str(tmp_path)]
        study.main(given)
        return capsys.readouterr().out.splitlines()

    def trained(lines: list[str]) -> list[str]:
        return [line.split(": ")[1].split(",")[0] for line in lines if " of " in line.split(":")[0]]

    assert trained(queue("small", "--seeds", "0", "--arms", "joint")) == ["small joint 0"]
    # As a crash leaves it: the last line is cut short, and that arm is trained again.
    path.write_text(path.read_text()[:100])
    # Seed 1 of joint is in both experiments, and trained once.
    small_ones = [f"small {arm} {seed}" for seed in (0, 1) for arm in ("uniform", "joint")]
    assert trained(queue()) == [*small_ones, "other joint 2"]
    assert trained(queue()) == []
    found = Results(path).by_experiment()
    assert {name: sorted(seeds) for name, seeds in found["small"].items()} == {
        "uniform": [0, 1],
        "joint": [0, 1],
    }
    assert found["other"]["joint"][1] == found["small"]["joint"][1]
    assert any("small" in line and "4 of  4 done" in line for line in queue("--list"))
    # Other settings are another entry: what was trained by the old ones is not shown as theirs.
    monkeypatch.setitem(
        experiments.EXPERIMENTS, "small", replace(small, settings=replace(SETTINGS, steps=8))
    )
    assert "small" not in Results(path).by_experiment()


def test_each_entry_is_one_of_a_kind():
    entries = list(experiments.entries())
    assert len({entry.name for entry in entries}) == len(entries) > 100
    for entry in entries:
        assert 0 < entry.minutes < 10
        baseline = experiments.EXPERIMENTS[entry.about.baseline]
        assert UNIFORM in baseline.arms and set(entry.about.seeds) <= set(baseline.seeds)


def test_a_batch_is_judged_by_what_it_was_chosen_by(world):
    for loss in ("sigmoid", "softmax"):
        conditions = Conditions(loss=loss, begin=(20.0, -10.0))
        run = Run(world, Arm("joint", "joint"), SETTINGS, 0, conditions)
        assert run.model.logit_scale.exp().item() == pytest.approx(20.0)
        rows = run.rows(0)
        found = run.judged(rows)
        # As the kernels have it: the mean conditional score of the whole batch.
        models = [
            Model(*harness.scored(model, run.pool.pixels[rows], run.pool.ids[rows]), *scale)
            for model, scale in (
                (run.model, harness.scale_of(run.model)),
                (run.judge, harness.scale_of(run.judge)),
            )
        ]
        drawn = select(*models, sub_batch_size=len(rows), loss=loss, policy="uniform", threads=1)
        assert found["own"] + found["pairs"] == pytest.approx(drawn.batch_score, abs=1e-3)
        assert found["own"] == pytest.approx(drawn.mean_score_chosen, abs=1e-3)
        assert found["false"] >= 0 and 0 <= found["repeats"] < 1


def test_false_negatives_are_batch_mates_that_say_the_same(world):
    run = Run(world, Arm("uniform", "uniform"), SETTINGS, 0)
    run.pool = replace(
        run.pool,
        concept=["a", "a", "a", "b"] + run.pool.concept[4:],
        wrong=torch.tensor([False, False, True] + [False] * (len(run.pool) - 3)),
    )
    # The first two are each other's; the third is of both, and its own caption is wrong.
    found = run.judged(torch.arange(4))
    assert found["false"] == pytest.approx((1 + 1 + 2 + 0) / 4)
    assert found["repeats"] == 0.5
