"""`superbatch.torch` without a service: tensors of a batch, names of weights, when they are pushed,
how long an epoch is.
"""

import io
import pickle
import warnings

import pyarrow
import pytest
import superbatch
import torch
from PIL import Image
from superbatch.torch import ImageText, Pushes, SelectedBatches, state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (4, 4), shade).save(out, "PNG")
    return out.getvalue()


def batch(images: list[bytes]) -> superbatch.Batch:
    rows = pyarrow.record_batch(
        {
            "image": images,
            "caption": [f"shade {index}" for index in range(len(images))],
            "_superbatch_id": [f"a.parquet#{index}" for index in range(len(images))],
            "_superbatch_weight": [1.0 / (1 + index) for index in range(len(images))],
        }
    )
    return superbatch.Batch(rows, {}, 3, 0, 1)


def first_pixel(picture: Image.Image) -> torch.Tensor:
    assert picture.mode == "RGB"
    return torch.tensor(picture.getpixel((0, 0)))


def lengths(captions: list[str]) -> torch.Tensor:
    return torch.tensor([len(caption) for caption in captions])


@pytest.mark.parametrize("threads", [1, 3, None])
def test_images_and_captions_become_tensors_in_their_order(threads):
    transform = pickle.loads(pickle.dumps(ImageText(first_pixel, lengths, threads=threads)))
    images, texts = transform(batch([png(shade) for shade in range(20)]))
    assert images.tolist() == [[shade] * 3 for shade in range(20)]
    assert texts.tolist() == [7] * 10 + [8] * 10
    # A pool that has worked is not pickled.
    assert len(pickle.loads(pickle.dumps(transform))(batch([png(1)]))[0]) == 1


def test_names_make_a_dict_and_columns_come_along():
    pair = ImageText(first_pixel, lengths, columns=("_superbatch_weight",))(batch([png(1), png(2)]))
    assert [len(part) for part in pair] == [2, 2, 2] and pair[2].tolist() == [1.0, 0.5]
    named = ImageText(
        first_pixel, lengths, names=("pixel_values", "input_ids"), extra={"return_loss": True}
    )
    assert list(named(batch([png(1)]))) == ["pixel_values", "input_ids", "return_loss"]
    mapped = ImageText(
        first_pixel, lambda texts: {"ids": lengths(texts), "mask": 1}, names=("images", "unused")
    )
    assert list(mapped(batch([png(1)]))) == ["images", "ids", "mask"]
    with pytest.raises(superbatch.Error, match="extra: it goes into a dict: give names too"):
        ImageText(first_pixel, lengths, extra={"return_loss": True})


def fidelities(low: list[bool]) -> superbatch.Batch:
    rows = batch([png(shade) for shade in range(len(low))]).record_batch
    kinds = pyarrow.array(["approximate" if is_low else "full" for is_low in low])
    return superbatch.Batch(rows.append_column("_superbatch_fidelity", kinds), {}, 3, 0, 1)


@pytest.mark.parametrize("threads", [1, 3])
def test_low_rows_get_a_transform_of_their_own(threads):
    def twice(picture: Image.Image) -> torch.Tensor:
        return torch.cat([first_pixel(picture)] * 2)

    transform = ImageText(
        first_pixel, lengths, low=twice, columns=("_superbatch_weight",), threads=threads
    )
    mixed = fidelities([True, False, True, False, False])
    full, low, texts, weights = transform(mixed)
    assert full.tolist() == [[shade] * 3 for shade in (1, 3, 4)]
    assert low.tolist() == [[shade] * 6 for shade in (0, 2)]
    assert len(texts) == 5 and weights.tolist() == [1 / 2, 1 / 4, 1 / 5, 1, 1 / 3]
    full, low, texts, _ = transform(fidelities([False, False]))
    assert full.shape == (2, 3) and low.shape == (0, 3) and len(texts) == 2
    full, low, texts, _ = transform(fidelities([True]))
    assert full.shape == (0, 6) and low.shape == (1, 6)
    named = ImageText(first_pixel, lengths, low=twice, names=("pixels", "ids"))(mixed)
    assert [(name, len(part)) for name, part in named.items()] == [
        ("pixels", 3),
        ("low_pixels", 2),
        ("ids", 5),
    ]


def test_low_rows_without_a_transform_are_an_error():
    plain = ImageText(first_pixel, lengths)
    assert len(plain(fidelities([False, False]))[0]) == 2
    with pytest.raises(superbatch.InvalidArgument, match="low: rows of step 3 are to be trained"):
        plain(fidelities([False, True]))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_that_cannot_be_read_is_named(threads):
    with pytest.raises(OSError, match="cannot identify") as caught:
        ImageText(first_pixel, lengths, threads=threads)(batch([png(1), b"no image", png(2)]))
    assert caught.value.__notes__ == ["in row a.parquet#1 of step 3"]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_leave_the_names_of_the_model_alone(group):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    plain = model.state_dict()
    compiled = torch.compile(model)
    for wrapped in (
        model,
        DistributedDataParallel(model),
        compiled,
        DistributedDataParallel(compiled),
        torch.compile(DistributedDataParallel(model)),
    ):
        assert list(state_dict(wrapped)) == list(plain)
    averaged = state_dict(AveragedModel(DistributedDataParallel(model)))
    assert set(averaged) == {*plain, "n_averaged"}


def test_a_part_of_a_model_is_taken_by_its_prefix():
    outer = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 1)})
    assert list(state_dict(outer, prefix="model.")) == ["weight", "bias"]
    with pytest.raises(
        superbatch.Error,
        match="prefix: no tensor of the model begins with 'net.'; one of them is model",
    ):
        state_dict(outer, prefix="net.")


class Told:
    """Stands where a `Run` does, and keeps the steps that are pushed."""

    def __init__(self, *, missing=(), **spec):
        self.spec, self.steps, self.missing = superbatch.Record(spec), [], list(missing)

    def missing_pushes(self, start_step):
        return self.missing

    def push_weights(self, weights, *, step, rank, dtype):
        assert list(weights) == ["weight", "bias"]
        self.steps.append(step)


@pytest.mark.parametrize(
    ("spec", "start", "expected"),
    [
        ({"learner": {"first_push": True}}, 0, [-1, 0, 1, 2, 3]),
        ({"learner": {"random_seed": 1}, "push_every_steps": 1}, 0, [0, 1, 2, 3]),
        # A checkpoint's weights, once more: they may not have arrived before the crash.
        ({"learner": {"first_push": True}}, 2, [1, 2, 3]),
        # Two were on their way.
        ({"learner": {"first_push": True}, "missing": [0, 1]}, 2, [0, 1, 2, 3]),
        ({"learner": {"first_push": True}, "push_every_steps": 2}, 0, [-1, 1, 3]),
        ({"learner": {"first_push": True}, "push_every_steps": 2}, 2, [1, 3]),
        ({"learner": None}, 0, []),
        ({}, 2, []),
    ],
)
def test_weights_are_pushed_when_the_run_wants_them(spec, start, expected):
    run = Told(**spec)
    pushes = Pushes(run, torch.nn.Linear(2, 3))
    pushes.before(start)
    pushes.before(start)
    for step in range(start, 4):
        pushes.after(step)
    assert run.steps == expected


def test_weights_may_come_from_a_function():
    run = Told(learner={"first_push": True})
    Pushes(run, torch.nn.Linear(2, 3).state_dict).before(0)
    assert run.steps == [-1]


def dataset(**changes) -> SelectedBatches:
    phases = [
        superbatch.Phase(policy="uniform", super_batch_size=8, sub_batch_size=8),
        superbatch.Phase(from_step=15, policy="uniform", super_batch_size=8, sub_batch_size=4),
    ]
    spec = superbatch.RunSpec(run_id="r", sources=["file:///pool"], phases=phases)
    return SelectedBatches(
        "http://127.0.0.1:1", spec, **{"rank": 0, "world_size": 1, "start_step": 0, **changes}
    )


def test_an_epoch_is_as_long_as_one_says():
    data = dataset(epoch_steps=10)
    loader = data.loader()
    assert (len(data), len(loader), loader.num_batches, loader.num_samples) == (10, 10, 10, 80)
    data.start_step = 13
    assert loader.num_samples == 5 * 8 + 5 * 4
    data.start_step = 20
    assert loader.num_samples == 40


def test_an_epoch_without_a_length_has_none():
    data = dataset()
    with pytest.raises(TypeError, match="epoch_steps"):
        len(data)
    with pytest.raises(AttributeError, match="epoch_steps"):
        data.loader().num_batches
    with pytest.raises(superbatch.Error, match="epoch_steps: cannot be 0"):
        dataset(epoch_steps=0)


@pytest.mark.parametrize(
    ("changes", "start", "end"),
    [
        ({}, 7, None),
        ({"end_step": 9}, 7, 9),
        ({"epoch_steps": 5}, 0, 5),
        ({"epoch_steps": 5}, 5, 10),
        # A loop that begins within an epoch ends with it.
        ({"epoch_steps": 5}, 7, 10),
        ({"epoch_steps": 5, "end_step": 9}, 7, 9),
    ],
)
def test_a_loop_ends_with_its_epoch(changes, start, end):
    assert dataset(**changes)._loop_end(start) == end


def test_a_loop_without_batches_says_that_the_data_has_ended():
    with pytest.raises(
        superbatch.EndOfData, match="before step 5: this loop has no batches, where 5 are expected"
    ):
        dataset(epoch_steps=5, start_step=5)._check_end(5)
    with pytest.warns(UserWarning, match="the run's epochs are over"):
        dataset(start_step=5)._check_end(5)
    with warnings.catch_warnings(action="error"):
        dataset(start_step=5, end_step=5)._check_end(5)
        dataset(start_step=7, epoch_steps=5)._check_end(5)
