"""What of a state dict is pushed, by whom, and as which bytes."""

import numpy
import pytest
import superbatch
import torch
from superbatch import _weights
from torch.distributed.tensor import Replicate, Shard


class Slot:
    """Stands where the extension's `Slot` does, and keeps what it is given."""

    def __init__(self):
        self.parts, self.kept = {}, {}

    def add(self, name, dtype, global_shape, start, extent, data):
        self.parts[name] = (dtype, global_shape, start, extent, bytes(memoryview(data)))
        self.kept[name] = data


def pushed(state, dtype=None):
    blocks, _ = _weights.blocks(state, rank=0)
    slot = Slot()
    _weights.add(slot, blocks, dtype)
    return slot.parts


def test_floats_are_pushed_and_the_rest_is_not():
    tied = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state = {
        "w": tied,
        "tied": tied,
        "scale": torch.tensor(2.0),
        "transposed": tied.t(),
        "half": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        "double": torch.ones(1, dtype=torch.float64),
        "position_ids": torch.arange(4),
    }
    parts = pushed(state)
    assert list(parts) == ["w", "tied", "scale", "transposed", "half", "double"]
    assert parts["w"] == ("f32", [2, 3], [0, 0], [2, 3], tied.numpy().tobytes()) == parts["tied"]
    assert parts["scale"] == ("f32", [], [], [], numpy.float32(2).tobytes())
    assert parts["transposed"][4] == tied.t().contiguous().numpy().tobytes()
    assert parts["half"][::4] == ("bf16", b"\x80\x3f\x80\x3f")
    assert parts["double"][::4] == ("f32", numpy.float32(1).tobytes())


@pytest.mark.parametrize("dtype", [None, "f32", "bf16"])
def test_the_optimizer_may_overwrite_what_is_pushed(dtype):
    whole = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    state = {
        "whole": whole,
        "rows": whole[1:3],
        "transposed": whole.t(),
        "scale": torch.tensor(2.0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    if dtype != "bf16":
        state["array"] = numpy.ones((2, 3), numpy.float32)
        state["columns"] = numpy.ones((2, 3), numpy.float32).T
        state["double"] = numpy.ones(3)
    slot = Slot()
    _weights.add(slot, _weights.blocks(state, rank=0)[0], dtype)
    assert set(slot.parts) == set(state)
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor):
            tensor.data.fill_(-9.0)
        else:
            tensor.fill(-9.0)
    for name, (*_, before) in slot.parts.items():
        assert bytes(memoryview(slot.kept[name])) == before, name


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_a_cast_is_to_nearest(dtype):
    kind, _, _, extent, data = pushed(
        {"w": torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8])}, dtype
    )["w"]
    assert (kind, extent, data.hex()) == ("bf16", [3], "803f803f823f")


def test_the_scale_and_the_bias_of_the_logits_are_not_rounded():
    scale = torch.tensor(100.0).log()
    state = {
        "logit_scale": scale,
        "logit_bias": torch.tensor([-10.3]),
        "w": torch.ones(2),
        "half": scale.half(),
    }
    parts = pushed(state, "bf16")
    assert [parts[name][0] for name in state] == ["f32", "f32", "bf16", "f16"]
    assert parts["logit_scale"][4] == scale.numpy().tobytes()


def test_blocks_of_one_element_are_cast_with_the_rest_of_their_tensor():
    slot = Slot()
    _weights.add(slot, _weights.of_parts([("w", torch.ones(1), (5,), (4,))]), "bf16")
    assert slot.parts["w"][0] == "bf16"


def test_an_unknown_dtype_and_an_empty_state_are_refused():
    with pytest.raises(superbatch.Error, match="f32, f16, bf16"):
        pushed({"w": torch.ones(1)}, "int8")
    with pytest.raises(superbatch.Error, match="floating-point"):
        pushed({"ids": torch.arange(3)})


def test_wrappers_leave_no_trace_in_names():
    assert _weights.clean("module._orig_mod.text.weight") == "text.weight"
    # A moving average of what is trained in parallel.
    assert _weights.clean("module.module.text.weight") == "text.weight"
    assert (
        _weights.clean("text.layers.0._checkpoint_wrapped_module.weight") == "text.layers.0.weight"
    )
    assert _weights.clean("text.module.weight") == "text.module.weight"


def test_whole_tensors_are_rank_zeros():
    state = {"a": torch.ones(1), "b": torch.ones(2)}
    assert [
        len(part) if isinstance(part, list) else part for part in _weights.blocks(state, rank=0)
    ] == [2, 2]
    assert _weights.blocks(state, rank=1) == ([], 2)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(2, device="meta"), "tensor w: it is on the meta device"),
        (torch.eye(2).to_sparse(), "tensor w: it is sparse; push tensor.to_dense()"),
        (torch.eye(2).to_sparse_csr(), "tensor w: it is sparse"),
        (torch.ones(2).to(torch.float8_e4m3fn), "tensor w: it is 8 bits wide"),
    ],
)
def test_tensors_without_values_of_their_own_are_refused_by_name(tensor, said):
    with pytest.raises(superbatch.Error, match=said) as caught:
        _weights.blocks({"module.w": tensor}, rank=0)
    assert caught.value.metadata == {"field": "state_dict"}


def test_a_state_that_rank_zero_gathered_is_empty_elsewhere():
    assert _weights.blocks({}, rank=1) == ([], 0)
    with pytest.raises(superbatch.Error, match="floating-point"):
        _weights.blocks({}, rank=0)


class Sharded:
    """What `_weights` asks of a DTensor, without a process group."""

    def __init__(self, whole, placements, sizes, place):
        self.whole, self.placements, self.sizes, self.place = whole, placements, sizes, place
        self.shape, self.device_mesh = whole.shape, self

    def is_floating_point(self):
        return True

    def get_coordinate(self):
        return self.place

    def size(self, axis):
        return self.sizes[axis]

    def to_local(self):
        local = self.whole
        for axis, placement in enumerate(self.placements):
            if isinstance(placement, Shard):
                pieces = local.chunk(self.sizes[axis], placement.dim)
                empty = local.narrow(placement.dim, 0, 0)
                local = pieces[self.place[axis]] if self.place[axis] < len(pieces) else empty
        return local


@pytest.mark.parametrize(
    ("shape", "placements", "sizes"),
    [
        ((8, 3), [Shard(0)], [4]),
        ((5, 3), [Shard(0)], [4]),
        ((1,), [Shard(0)], [4]),
        ((6, 7), [Replicate(), Shard(0)], [2, 3]),
        ((6, 7), [Shard(1), Shard(0)], [2, 4]),
        ((6, 7), [Replicate()], [3]),
    ],
)
def test_the_blocks_of_all_ranks_cover_a_sharded_tensor_once(shape, placements, sizes):
    whole = torch.randn(shape)
    covered, blocks = torch.zeros(shape), 0
    for place in numpy.ndindex(*sizes):
        tensor = Sharded(whole, placements, sizes, place)
        mine, total = _weights.blocks({"w": tensor}, rank=1)
        for _, local, global_shape, start in mine:
            assert global_shape == shape
            where = tuple(slice(at, at + n) for at, n in zip(start, local.shape))
            assert torch.equal(whole[where], local)
            covered[where] += 1
            blocks += 1
    assert torch.equal(covered, torch.ones(shape))
    assert blocks == total


def test_a_tensor_cut_twice_in_one_dimension_is_refused_by_name():
    tensor = Sharded(torch.ones(8), [Shard(0), Shard(0)], [2, 2], (0, 0))
    with pytest.raises(superbatch.Error, match="tensor w: .*push_parts"):
        _weights.blocks({"w": tensor}, rank=0)


# BLAKE3 of the bytes 0 to 250 over and over, as in its test vectors. The last takes three pieces.
@pytest.mark.parametrize(
    ("size", "digest"),
    [
        (0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        (102_400, "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085"),
        ((9 << 20) + 1, "d9f250915a87453cde78f95b91746cb2dafb69970b397186538a379b42648071"),
    ],
)
def test_a_digest_is_blake3_of_all_pieces(size, digest):
    data = numpy.resize(numpy.arange(251, dtype=numpy.uint8), size)
    assert _weights._superbatch.blake3_of(data).hex() == digest
