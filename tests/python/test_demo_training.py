"""The demo's trainer, evaluation and report, on tiny inputs and without the service."""

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from examples.demo import pictures, report, tiny
from examples.demo.evaluate import GALLERY, in_galleries, recall
from examples.demo.model import Transform, load, normalise
from examples.demo.progress import Stage, progress
from examples.demo.report import ArmResult
from examples.demo.settings import Settings
from examples.demo.train import (
    AveragedModel,
    Batch,
    Point,
    Trainer,
    augment,
    siglip_loss,
    start_rank,
)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    start_rank(0, 1, tmp_path_factory.mktemp("gloo") / "rendezvous")
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_siglip(tmp_path_factory.mktemp("model") / "siglip")


def test_model_folders_are_what_transformers_loads(folder, tmp_path):
    for path in (folder, tiny.write_clip(tmp_path / "clip")):
        model = AutoModel.from_pretrained(path)
        pixels = AutoImageProcessor.from_pretrained(path)(
            Image.new("RGB", (20, 20), "red"), return_tensors="pt"
        )
        ids = Transform.captions(transform_of(path), ["a red circle"])
        assert model(input_ids=ids, **pixels).logits_per_image.isfinite().all()


def transform_of(path: Path) -> Transform:
    from tokenizers import Tokenizer

    transform = Transform.__new__(Transform)
    transform.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    return transform


def test_the_transform_is_the_processors(folder):
    data = tiny.draw("red", "cross", tiny.random.Random(0))
    ours = Transform(folder).images([data])
    theirs = AutoImageProcessor.from_pretrained(folder)(
        Image.open(__import__("io").BytesIO(data)), return_tensors="pt"
    )["pixel_values"]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_captions_are_cut_and_padded(folder):
    ids = Transform(folder).captions(["a red circle", "a red circle " * 20])
    assert ids.shape == (2, tiny.SHAPE["text_length"])
    assert ids[0].tolist().count(1) == 1 and ids[0][-1] == 0
    assert ids[1][-1] == 1


def test_siglip_loss_is_the_papers(one_rank):
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    scale, bias = torch.tensor([math.log(10.0)]), torch.tensor([-3.0])
    expected = 0.0
    for i in range(4):
        for j in range(4):
            z = 1.0 if i == j else -1.0
            expected += math.log1p(math.exp(-z * (10.0 * float(image[i] @ text[j]) - 3.0)))
    assert siglip_loss(image, text, scale, bias, 0).item() == pytest.approx(expected / 4, rel=1e-5)


def test_training_learns(one_rank, folder):
    settings = Settings(
        steps=30,
        evaluate_every=30,
        sub_batch_size=50,
        world_size=1,
        learning_rate=5e-3,
        warmup_steps=1,
    )
    trainer = Trainer(folder, settings, 0)
    rng = tiny.random.Random(0)
    images = [tiny.draw(colour, shape, rng) for colour in tiny.COLOURS for shape in tiny.SHAPES]
    pixels, tokens = trainer.transform.images(images), trainer.transform.captions(tiny.captions())
    losses = [trainer.step(Batch(step, pixels, tokens)) for step in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    before = load(folder)
    assert not torch.equal(before.logit_bias, trainer.model.logit_bias)


def test_a_batch_in_two_sizes_has_one_loss(one_rank, folder):
    """Of the same pictures in one size: whichever part of the batch they are in."""
    settings = Settings(
        steps=1, evaluate_every=1, sub_batch_size=8, world_size=1, learning_rate=1e-3
    )
    images = [tiny.draw("red", "cross", tiny.random.Random(n)) for n in range(8)]
    transform = Transform(folder)
    pixels, small = transform.images(images), transform.at(8).images(images[4:])
    tokens = transform.captions(tiny.captions()[:8])
    assert small.shape == (4, 3, 8, 8)
    whole = Trainer(folder, settings, 0).step(Batch(0, pixels, tokens))
    split = Trainer(folder, settings, 0).step(Batch(0, pixels[:4], tokens, small=pixels[4:]))
    assert split == pytest.approx(whole, rel=1e-5)
    mixed = Trainer(folder, settings, 0).step(Batch(0, pixels[:4], tokens, small=small))
    assert mixed != pytest.approx(whole, rel=1e-5)


def test_augmenting_keeps_white_ground_and_bounds():
    chance = torch.Generator().manual_seed(0)
    pixels = torch.rand(8, 3, 24, 24, generator=chance) * 2 - 1
    moved = augment(pixels, chance)
    assert moved.shape == pixels.shape and moved.abs().max() <= 1 and not torch.equal(moved, pixels)
    white = augment(torch.ones(64, 3, 24, 24), chance)
    assert white.std(dim=(2, 3)).max() < 1e-5


def test_recall_counts_ties_against(one_rank):
    assert recall(torch.eye(4), 1) == 1.0
    assert recall(torch.ones(4, 4), 1) == 0.0
    assert recall(torch.ones(4, 4), 4) == 1.0


def test_normalise():
    pixels = torch.from_numpy(numpy.array([[[[0, 127, 255]]]], numpy.uint8))
    assert normalise(pixels)[0, :, 0, 0].tolist() == pytest.approx([-1.0, 127 / 127.5 - 1, 1.0])


def test_cooldown_ends_near_nothing():
    settings = Settings(
        steps=100, evaluate_every=10, warmup_steps=10, cooldown=0.5, learning_rate=1.0
    )
    assert settings.learning_rate_at(0) == pytest.approx(0.1)
    assert settings.learning_rate_at(40) == 1.0
    assert settings.learning_rate_at(99) == pytest.approx(0.02)


START = 0.05


def arm(policy: str, accuracies: list[float], cost: float) -> ArmResult:
    points = [
        Point(10 * i, accuracy, accuracy / 2, 1.0, 100 * i, cost * i, cost * i)
        for i, accuracy in enumerate([START, *accuracies])
    ]
    return ArmResult(policy, 0, points, [["00000.parquet#0", "00000.parquet#1"]] * len(points))


def test_speedups_are_read_off_the_curves_whichever_way_it_came_out():
    arms = {
        "uniform": arm("uniform", [0.1, 0.2], 1.0),
        "joint": arm("joint", [0.2, 0.3], 4.0),
        "independent": arm("independent", [0.05, 0.1], 4.0),
    }
    need, times = report.speedups(arms)
    assert need["joint"] == {"steps": 10, "flops": 4.0, "seconds": 4.0}
    assert times["joint"] == {"steps": 2.0, "flops": 0.5, "seconds": 0.5}
    assert times["uniform"] == {"steps": 1.0, "flops": 1.0, "seconds": 1.0}
    assert need["independent"] is None and times["independent"]["steps"] is None


def test_the_whole_report_is_written(tmp_path):
    dataset = tiny.write_dataset(tmp_path / "pool", rows=64, shards=1)
    pool = report.Pool(dataset)
    results = [
        arm("uniform", [0.1, 0.2], 1.0),
        arm("independent", [0.05, 0.1], 4.0),
        arm("joint", [0.2, 0.3], 4.0),
    ]
    written = report.write_results(results, pool, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["arms"]["joint"]["steps"] == [
        0,
        10,
        20,
    ]
    said = report.table(written)
    assert "did not reach" in said and "2.0 times fewer steps, 2.0 times MORE FLOPs" in said
    pictures.draw_curves(written, tmp_path / "demo.png", "credits")
    # It can be drawn again from what was written.
    again = json.loads((tmp_path / "results.json").read_text())
    pictures.draw_curves(again, tmp_path / "again.png", "credits")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "demo.png").read_bytes()
    sheets = pictures.draw_sheets(results[2], pool, tmp_path, "credits")
    for path in (tmp_path / "demo.png", *sheets):
        assert Image.open(path).size[0] > 600


def test_a_log_that_is_a_file_gets_one_line_a_stage(capsys):
    assert list(progress(range(3), total=3, desc="count", unit="thing")) == [0, 1, 2]
    stage = Stage("train", 2, "step")
    stage.update(note="R@5 1.0 %")
    stage.update()
    stage.close()
    Stage("unseen", 1, "step", silent=True).close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["count: 3 things", "train: 2 steps"]
    assert lines[1].endswith("R@5 1.0 %")


def test_recall_is_taken_among_the_names_of_a_gallery():
    count = 2 * GALLERY
    same = torch.eye(count)
    assert in_galleries(same, same) == (1.0, 1.0)
    # Every picture is like every name: with ties against, none is found, however small the gallery.
    assert in_galleries(torch.ones(count, 1), torch.ones(count, 1)) == (0.0, 0.0)
    # A picture is taken for the next one: only where both are in one gallery is it in the way.
    one, five = in_galleries(same, same + 2 * same.roll(1, dims=0))
    assert 0.3 < one < 0.7 and five == 1.0


def test_averaged_weights_have_the_age_that_was_asked_for():
    model = torch.nn.Linear(1, 1)
    average = AveragedModel(model, 0.125)
    for step in range(400):
        with torch.no_grad():
            model.weight.fill_(step + 1)
        average.update(step)
    assert average.mean.weight.item() == pytest.approx(400 * (1 - 0.125), rel=0.01)
    last = AveragedModel(model, 0.0)
    last.update(7)
    assert last.mean.weight.item() == 400


def test_an_arm_that_begins_above_uniforms_end_is_not_called_faster():
    arms = {"uniform": arm("uniform", [0.04, 0.05], 1.0), "joint": arm("joint", [0.2, 0.3], 4.0)}
    _, times = report.speedups(arms)
    assert times["joint"]["steps"] is None
    need, _ = report.speedups(arms)
    said = report.sentence("joint", {"speedup": times, "needed_for_uniform_final": need})
    assert "no end to reach" in said


def test_a_mean_over_seeds_has_its_interval():
    mean, half = report.spread([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.30 / 3**0.5, rel=1e-3)
    assert report.spread([1.0]) == (1.0, None)
    # Of published tables.
    for count, t in ((8, 2.365), (9, 2.306), (10, 2.262), (21, 2.086), (31, 2.042)):
        assert report.student(count) == pytest.approx(t, abs=6e-3)
