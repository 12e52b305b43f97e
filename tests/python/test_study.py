"""The study's arms in one process, on a world of ten drawings."""

from pathlib import Path

import pytest
import torch
from test_demo_data import COLOURS, drawings

from examples.demo import reference
from examples.demo.data import build
from examples.demo.data.build import PoolRecipe
from examples.demo.data.render import Drawings
from examples.demo.settings import Settings
from examples.study import harness, report
from examples.study.harness import Arm, Run
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
        }
        for i, accuracy in enumerate(accuracies)
    ]


def test_costs_to_uniforms_end_are_read_off_the_curves():
    assert report.reached(curve(0.1, 0.2, 0.4), 0.3) == pytest.approx(
        {"step": 15, "flops": 3.0, "seconds": 1.5}
    )
    assert report.reached(curve(0.1, 0.2), 0.3) is None
    arms = {
        "uniform": {0: curve(0.1, 0.2, 0.3)},
        "joint": {0: curve(0.1, 0.3)},
        "other": {0: curve(0.1, 0.2)},
    }
    assert report.against_uniform(arms, "joint") == ["2.0", "2.0", "2.0"]
    assert report.against_uniform(arms, "other")[0] == "not reached"


def test_the_report_is_drawn(tmp_path: Path):
    found = {
        ("main", 1e-3): {
            "uniform": {0: curve(0.1, 0.2), 1: curve(0.1, 0.3)},
            "joint": {0: curve(0.1, 0.3)},
        }
    }
    report.draw(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000
    assert report.rows(found["main", 1e-3])[2].startswith("| uniform | 2 | 25.0 ± 63.5 % |")
