"""Two real gloo ranks train as one rank does on the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file

from examples.demo import reference, tiny
from examples.demo.settings import Settings
from examples.demo.train import KEPT, read_curve


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    tiny.write_dataset(folder / "clean", rows=64, mismatched_share=0.0, shards=1)
    # Settings of the reference are chosen by `val`: it looks at no other split.
    tiny.write_dataset(
        folder / "eval", rows=33, mismatched_share=0.0, shards=1, seed=1, split="val"
    )
    (folder / "dataset.json").write_text('{"clean": "tiny"}')
    return folder


def settings(world_size: int) -> Settings:
    return Settings(
        steps=3,
        evaluate_every=3,
        sub_batch_size=16,
        world_size=world_size,
        warmup_steps=1,
        keep_at=2,
    )


def test_two_ranks_are_one(dataset, tmp_path):
    start = tiny.write_siglip(tmp_path / "start")
    two = reference.train_reference(tmp_path, dataset, settings(2), start)
    one = reference.train_reference(tmp_path, dataset, settings(1), start)
    assert one != two
    weights, others, begun = (
        load_file(folder / "model.safetensors") for folder in (one, two, start)
    )
    # Keys' biases have no gradient but rounding, which AdamW blows up to whole steps.
    names = [name for name in weights if "k_proj.bias" not in name and "in_proj_bias" not in name]

    def distance(left: dict, right: dict) -> float:
        return torch.stack([(left[name] - right[name]).norm() for name in names]).norm().item()

    assert distance(weights, others) < 0.02 * distance(weights, begun)
    assert read_curve(two)[-1].loss > 0 and [point.step for point in read_curve(two)] == [0, 3]
    # Each rank embeds its share of the test, and together they judge as one.
    judged = [(curve[0].accuracy, curve[0].recall_at_1) for curve in map(read_curve, (one, two))]
    assert judged[0] == judged[1] != (0.0, 0.0)
    early = load_file(two / KEPT)
    assert 0 < distance(early, begun) and 0 < distance(early, others)


def test_a_reference_is_kept_by_what_it_was_made_of(dataset, tmp_path, monkeypatch):
    start = tiny.write_siglip(tmp_path / "start")
    first = reference.train_reference(tmp_path, dataset, settings(1), start)

    def trained_again(*_, **__):
        raise AssertionError("the reference was trained again")

    monkeypatch.setattr(reference, "run_ranks", trained_again)
    assert reference.train_reference(tmp_path, dataset, settings(1), start) == first
