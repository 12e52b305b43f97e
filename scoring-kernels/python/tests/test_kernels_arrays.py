"""Arrays are read where they lie; those that cannot be are refused by name, with what to do."""

import array
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from kernels_oracle import world
from superbatch_kernels import Model, _arrays, select

COUNT = 96
# Arrays in files that were mapped for reading, and so many MiB for everything else.
MAPPED = """
import resource, sys
import numpy as np
from superbatch_kernels import select

mapped = [np.memmap(path, np.{dtype}, "r", shape=({count}, 256)) for path in sys.argv[1:]]
model = (*mapped[:2], 10.0, -10.0), (*mapped[2:], 10.0, -10.0)
small = [(*(tower[:64] for tower in towers), scale, bias) for *towers, scale, bias in model]
select(*small, sub_batch_size=8, threads=1)
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + ({room} << 20),) * 2)
print(select(*model, sub_batch_size=32, threads=1).indices.tolist())
"""


def draw(learner, reference, **more):
    return select(learner, reference, sub_batch_size=12, n_chunks=3, **more).indices.tolist()


# Towers that would take more than 256 MiB as float32 are not kept: four of 72 or 64 MiB are read in
# 40. Smaller ones are: four of 16 MiB in float16 are 128 MiB as float32.
@pytest.mark.parametrize(
    ("dtype", "count", "room"),
    [("float32", 73728, 40), ("float16", 131072, 40), ("float16", 32768, 168)],
)
def test_read_only_files_are_read_in_place(tmp_path, dtype, count, room):
    paths = [tmp_path / name for name in ("a", "b", "c", "d")]
    for k, path in enumerate(paths):
        with open(path, "wb") as file:
            file.truncate(count * 256 * np.dtype(dtype).itemsize)
    script = MAPPED.format(dtype=dtype, count=count, room=room)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *paths], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert len(set(json.loads(run.stdout))) == 32


def test_no_array_is_copied_on_the_way():
    image = world(1)[0].image
    image.setflags(write=False)
    tensor = torch.randn(4, 8, dtype=torch.float16, requires_grad=True)
    assert _arrays.embeddings("x", image) is image
    assert _arrays.embeddings("x", tensor).__array_interface__["data"][0] == tensor.data_ptr()
    assert np.shares_memory(_arrays.embeddings("x", memoryview(image)), image)


def test_the_same_values_in_another_kind_of_array_are_the_same_draw():
    class OnlyDlpack:
        def __init__(self, values):
            self.__dlpack__, self.__dlpack_device__ = values.__dlpack__, values.__dlpack_device__

    for dtype in (np.float32, np.float16):
        models = world(2, dtype=dtype)
        kinds = [
            torch.from_numpy,
            lambda values: torch.nn.Parameter(torch.from_numpy(values)),
            memoryview,
            OnlyDlpack,
            lambda values: np.concatenate([values, values])[:COUNT],
        ]
        for kind in kinds:
            turned = [
                Model(kind(model.image), kind(model.text), model.scale, model.bias)
                for model in models
            ]
            assert draw(*turned) == draw(*models), kind
        pair = [
            (*model[:2], torch.tensor(model.scale, requires_grad=True), np.float32(model.bias))
            for model in models
        ]
        assert draw(*pair) == draw(*models)


def test_the_two_towers_may_differ_in_dtype():
    learner, reference = world(3, dtype=np.float16)
    wide = learner._replace(text=learner.text.astype(np.float32))
    assert draw(wide, reference) == draw(learner, reference)


def test_indices_index_arrays_and_tensors():
    learner, reference = world(4)
    drawn = select(learner, reference, sub_batch_size=12)
    tensor = torch.from_numpy(learner.image)
    assert torch.equal(tensor[drawn.indices], torch.from_numpy(learner.image[drawn.indices]))
    assert torch.equal(tensor[torch.from_numpy(drawn.indices)], tensor[drawn.indices])
    assert (drawn.indices.dtype, drawn.scores.dtype, drawn.weights.dtype) == (
        np.int64,
        np.float64,
        np.float64,
    )
    drawn.weights[:] *= 2
    assert "12 chosen in 12 chunks" in repr(drawn)


def test_the_softmax_loss_needs_no_bias():
    learner, reference = world(5)
    assert draw(learner[:3], reference[:3], loss="softmax") == draw(
        learner, reference, loss="softmax"
    )


LEARNER, REFERENCE = world(6)
IMAGE, TEXT = LEARNER.image, LEARNER.text
SPREAD = np.zeros((COUNT, 48), np.float32)[:, ::2]
CROOKED = (
    np.frombuffer(bytearray(COUNT * 24 * 4 + 1), np.uint8)[1:].view(np.float32).reshape(COUNT, 24)
)


class OnDevice:
    dtype = "float32"

    def __dlpack__(self):
        raise AssertionError("device memory must not be asked for")

    def __dlpack_device__(self):
        return (2, 0)


@pytest.mark.parametrize(
    ("image", "kind", "says"),
    [
        (
            IMAGE[:, ::-1],
            ValueError,
            r"learner image of shape \(96, 24\) is not C-contiguous .*ascontiguousarray",
        ),
        (SPREAD, ValueError, r"not C-contiguous \(strides of \(192, 8\) bytes\).*\.contiguous\(\)"),
        (np.asfortranarray(IMAGE), ValueError, "not C-contiguous"),
        (torch.from_numpy(IMAGE).T.contiguous().T, ValueError, "not C-contiguous"),
        (CROOKED, ValueError, r"no multiple of 4: pass learner image\.copy\(\)"),
        (
            IMAGE.astype(np.float64),
            TypeError,
            r"learner image is float64: float32 or float16 .*astype\(numpy\.float32\)",
        ),
        (IMAGE.astype(">f4"), TypeError, "learner image is >f4: .*byte order"),
        ((IMAGE * 100).astype(np.int8), TypeError, "learner image is int8"),
        (
            torch.from_numpy(IMAGE).bfloat16(),
            TypeError,
            r"learner image is bfloat16, .*one draw in six.*\.half\(\)",
        ),
        (
            torch.from_numpy(IMAGE).to("meta"),
            ValueError,
            r"on meta, and CPU memory is read: pass learner image\.cpu\(\)",
        ),
        (
            torch.from_numpy(IMAGE).to_sparse(),
            ValueError,
            r"layout torch\.sparse_coo: pass learner image\.to_dense\(\)",
        ),
        (OnDevice(), ValueError, r"learner image is not in CPU memory \(DLPack device 2\)"),
        (
            np.ma.masked_array(IMAGE),
            TypeError,
            r"learner image is a masked array.* pass learner image\.data",
        ),
        (IMAGE.tolist(), TypeError, "learner image is a list: a NumPy array or a CPU torch tensor"),
        (
            array.array("f", [0.0] * 8),
            ValueError,
            r"learner image has the shape \(8,\): \[candidates, dim\]",
        ),
        (IMAGE[:, :0], ValueError, r"learner image has the shape \(96, 0\)"),
        (
            IMAGE[:, :23].copy(),
            ValueError,
            r"learner text has the shape \(96, 24\) and learner image \(96, 23\)",
        ),
        (
            IMAGE[:95],
            ValueError,
            r"learner text has the shape \(96, 24\) and learner image \(95, 24\)",
        ),
    ],
)
def test_embeddings_that_cannot_be_read_are_refused(image, kind, says):
    with pytest.raises(kind, match=says):
        draw((image, TEXT, 10.0, -10.0), REFERENCE)


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        (
            {"learner": None},
            ValueError,
            r"learnability criterion needs the learner's embeddings.*give learner=\(image",
        ),
        (
            {"criterion": "easy", "reference": None},
            ValueError,
            r"needs the reference's .*give reference=\(image",
        ),
        (
            {"learner": IMAGE},
            TypeError,
            r"learner is a ndarray: \(image, text, scale, bias\) is needed",
        ),
        ({"learner": (IMAGE, TEXT)}, TypeError, "learner is a tuple of 2"),
        ({"learner": LEARNER[:3]}, ValueError, "learner has no bias, which the sigmoid loss needs"),
        (
            {"learner": (IMAGE, TEXT, np.nan, 0.0)},
            ValueError,
            "learner scale is nan: it must be finite",
        ),
        (
            {"learner": (IMAGE, TEXT, IMAGE, 0.0)},
            TypeError,
            r"learner scale is array\(.* a number is needed",
        ),
        (
            {"reference": (IMAGE[:9], TEXT[:9], 1.0, 0.0)},
            ValueError,
            r"disagree .*'learner': 96, 'reference': 9",
        ),
        (
            {"learner": None, "reference": None},
            ValueError,
            "no candidates: give learner and reference",
        ),
        (
            {"sub_batch_size": 97},
            ValueError,
            "cannot draw a sub-batch of 97: of 96 candidates 0 are holes",
        ),
        ({"sub_batch_size": 0}, ValueError, "sub_batch_size is 0: it must be at least 1"),
        ({"sub_batch_size": 9.5}, TypeError, "sub_batch_size is 9.5: a whole number is needed"),
        ({"n_chunks": 0}, ValueError, "n_chunks is 0"),
        ({"threads": 0}, ValueError, "threads is 0: it must be at least 1"),
        ({"seed": -1}, ValueError, "seed is -1: it must be at least 0"),
        ({"generation": 2**32}, ValueError, "generation is 4294967296"),
        ({"step": "3"}, TypeError, "step is '3'"),
        ({"gain": np.inf}, ValueError, "gain is inf"),
        (
            {"policy": "independent", "temperature": 0.0},
            ValueError,
            "temperature is 0: it must be at least 1e-9 and at most 1e9",
        ),
        (
            {"temperature": 2.0},
            ValueError,
            "temperature belongs to policy independent, .* policy is joint; leave it out$",
        ),
        ({"pressure": 9}, ValueError, "pressure belongs to policy rank"),
        (
            {"policy": "rank", "priority_exponent": 1},
            ValueError,
            "belongs to policy proportional, and the policy is rank",
        ),
        ({"weight_exponent": 1}, ValueError, "weight_exponent belongs to policy proportional"),
        ({"policy": None}, TypeError, "policy is None: text is needed"),
        (
            {"loss": "Sigmoid", "learner": LEARNER[:3]},
            ValueError,
            "learner has no bias, which the sigmoid loss needs",
        ),
        (
            {"learner": (IMAGE, TEXT, -1.0, 0.0)},
            ValueError,
            r"learner scale is -1\.0: it must be above 0.*exp\(\)",
        ),
        (
            {"reference": (IMAGE, TEXT, 0, 0.0)},
            ValueError,
            r"reference scale is 0\.0: it must be above 0",
        ),
        ({"temperature": "2"}, TypeError, "temperature is '2': a number is needed"),
        (
            {"holes": np.ma.masked_array([1, 2], [True, False])},
            TypeError,
            "holes is a masked array",
        ),
        ({"keys": np.ma.masked_array(np.arange(96))}, TypeError, "keys is a masked array"),
        ({"pressure": None}, TypeError, "pressure is None"),
        ({"neg_clip_loss_keep": 1.5}, ValueError, "neg_clip_loss_keep is 1.5"),
        ({"policy": "jest"}, ValueError, "is no policy: use one of uniform, independent, joint"),
        ({"loss": "mse"}, ValueError, "is no loss: use one of sigmoid, softmax"),
        ({"criterion": "new"}, ValueError, "is no criterion"),
        ({"holes": [96]}, ValueError, "holes names candidate 96: there are 96"),
        ({"holes": [-1]}, ValueError, "holes names candidate -1"),
        ({"holes": [0.5]}, TypeError, r"holes is float64 of shape \(1,\)"),
        ({"holes": np.zeros(95, bool)}, ValueError, r"mask of shape \(95,\): one of shape \(96,\)"),
        ({"keys": np.arange(95)}, ValueError, r"disagree .*'keys': 95"),
        ({"keys": np.arange(96) - 1}, ValueError, "keys holds -1"),
        ({"keys": np.zeros((96, 1), int)}, TypeError, "keys is int64 of shape"),
        ({"noise": np.zeros((3, 95), np.float32)}, ValueError, r"disagree .*'noise': 95"),
        (
            {"noise": np.zeros(96, np.float32)},
            ValueError,
            r"noise has the shape \(96,\): \[draws or more, candidates\]",
        ),
        (
            {"noise": np.zeros((2, 96), np.float32)},
            ValueError,
            "3 draws from 96 candidates need 288",
        ),
        ({"noise": np.zeros((3, 96), int)}, TypeError, "noise is int64"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_are_wrong_are_named(changes, kind, says):
    arguments = {
        "learner": LEARNER,
        "reference": REFERENCE,
        "sub_batch_size": 12,
        "n_chunks": 3,
        **changes,
    }
    with pytest.raises(kind, match=says):
        select(**arguments)


def test_forgotten_normalisation_is_noticed():
    raw = LEARNER._replace(image=7 * IMAGE)
    raw.image[6] *= 2
    says = r"learner image: rows are not L2-normalised \(median norm 7, candidate 6 has 14\)"
    with pytest.warns(UserWarning, match=says) as seen:
        draw(raw, REFERENCE)
    assert [warning.filename for warning in seen] == [__file__]


def test_keys_that_candidates_share_are_noticed():
    keys = np.arange(COUNT)
    keys[[3, 50]], keys[60:] = 7, 9
    with pytest.warns(
        UserWarning,
        match=r"several candidates have the key 7 \(2 such keys\), and with it the same",
    ) as seen:
        draw(LEARNER, REFERENCE, keys=keys)
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(LEARNER, REFERENCE, keys=np.arange(COUNT)[::-1])


def test_rows_of_holes_need_no_length():
    image, holes = IMAGE.copy(), np.arange(COUNT) % 3 > 0
    image[holes] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(LEARNER._replace(image=image), REFERENCE, holes=holes)
