"""Tensors of a trainer as the parts of a push. Nothing here imports torch before a torch tensor is
handed in.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from . import _superbatch
from ._arguments import wrong
from ._errors import invalid

DTYPES = ("f32", "f16", "bf16")


class Block(NamedTuple):
    """A block of a tensor: `tensor` is what lies at `start` within `global_shape`."""

    name: str
    tensor: Any
    global_shape: tuple[int, ...]
    start: tuple[int, ...]


def blocks(state_dict: Mapping[str, Any], rank: int) -> tuple[list[Block], int]:
    """What this rank has to push of a state dict, and how many blocks all ranks push together.

    Whole tensors are rank 0's. Of a DTensor each rank pushes its own shard; of replicas, the first
    in the mesh does. Entries that are not floating point, such as position ids, are no weights.
    """
    if callable(getattr(state_dict, "state_dict", None)):
        raise wrong("state_dict", state_dict, "give what it holds: model.state_dict()")
    if not callable(getattr(state_dict, "items", None)):
        raise wrong(
            "state_dict",
            state_dict,
            "give a mapping of names to tensors, such as model.state_dict()",
        )
    mine: list[Block] = []
    total = 0
    for name, tensor in state_dict.items():
        if not is_floating(tensor):
            continue
        name = clean(name)
        check_values(name, tensor)
        if hasattr(tensor, "placements") and hasattr(tensor, "device_mesh"):
            block, count = shard(name, tensor)
            total += count
            mine += [block] if block else []
            continue
        total += 1
        if rank == 0:
            shape = tuple(tensor.shape)
            mine.append(Block(name, tensor, shape, (0,) * len(shape)))
    # Where rank 0 gathers a full state dict (FSDP 2 with full_state_dict and cpu_offload), the
    # others get an empty one.
    if total == 0 and (rank == 0 or state_dict):
        raise invalid("state_dict", "it has no floating-point tensors")
    return mine, total


def clean(name: str) -> str:
    """The name without what DistributedDataParallel, torch.compile, activation checkpointing and
    EMA put around modules.
    """
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    # Several of them may lie around each other.
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def is_floating(tensor: Any) -> bool:
    if hasattr(tensor, "is_floating_point"):
        return tensor.is_floating_point()
    return getattr(getattr(tensor, "dtype", None), "kind", "") == "f"


def check_values(name: str, tensor: Any) -> None:
    """Refuses, by name, what has no values that could be copied as they lie."""
    if getattr(tensor, "is_meta", False):
        raise invalid(
            "state_dict",
            f"tensor {name}: it is on the meta device and has no values; load the weights first",
        )
    if type(tensor).__name__ == "ShardedTensor":
        raise invalid(
            "state_dict",
            f"tensor {name}: a ShardedTensor of FSDP 1; take StateDictType.FULL_STATE_DICT, or "
            "FSDP 2 (fully_shard)",
        )
    if getattr(tensor, "is_sparse", False) or str(getattr(tensor, "layout", "")).startswith(
        "torch.sparse"
    ):
        raise invalid("state_dict", f"tensor {name}: it is sparse; push tensor.to_dense()")
    if str(getattr(tensor, "dtype", "")).startswith("torch.float8"):
        raise invalid(
            "state_dict",
            f"tensor {name}: it is 8 bits wide, and its scale is another tensor; push the weights "
            "dequantised, in bf16 or f32",
        )


def shard(name: str, tensor: Any) -> tuple[Block | None, int]:
    """This rank's block of a DTensor (None: it has none), and the number of blocks over all
    ranks.
    """
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    place = mesh.get_coordinate()
    start, extent, count, held = [0] * len(shape), list(shape), 1, place is not None
    cut: set[int] = set()
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            held = held and place[axis] == 0
            continue
        dim = getattr(placement, "dim", None)
        if type(placement).__name__ != "Shard" or dim in cut:
            raise invalid(
                "state_dict",
                f"tensor {name}: cannot tell its blocks from {placement}; use push_parts",
            )
        cut.add(dim)
        # As torch.chunk cuts: equal blocks, the last ones shorter or empty.
        step = max(1, -(-shape[dim] // mesh.size(axis)))
        count *= -(-shape[dim] // step)
        if place is not None:
            start[dim] = min(place[axis] * step, shape[dim])
            extent[dim] = min(step, shape[dim] - start[dim])
            held = held and extent[dim] > 0
    if not held:
        return None, count
    local = tensor.to_local()
    if tuple(local.shape) != tuple(extent):
        what = f"its local shard is {tuple(local.shape)}, not {tuple(extent)}; use push_parts"
        raise invalid("state_dict", f"tensor {name}: {what}")
    return Block(name, local, shape, tuple(start)), count


def add(slot: Any, items: Iterable[Block], dtype: Any) -> None:
    """Copies blocks into a push, cast to `dtype`."""
    for name, tensor, global_shape, start in items:
        # The scale and the bias of the logits: exp() of a scale in bf16 is off by up to a percent,
        # and all logits with it.
        cast = math.prod(global_shape) != 1
        kind, extent, data = buffer(name, tensor, dtype, cast)
        slot.add(name, kind, list(global_shape), list(start), extent, own(tensor, data))


def own(tensor: Any, data: Any) -> Any:
    """The bytes of a tensor, copied unless a cast or a device's transfer has made them anew: the
    push keeps them while the optimizer writes to the tensor.
    """
    import numpy

    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        return data.copy() if numpy.may_share_memory(data, numpy.asarray(tensor)) else data
    if tensor.device.type != "cpu":
        return data
    begin = tensor.untyped_storage().data_ptr()
    within = begin <= data.ctypes.data < begin + tensor.untyped_storage().nbytes()
    # By torch, whose copy takes all its threads and lets other threads of Python run.
    return torch.from_numpy(data).clone().numpy() if within else data


def buffer(name: str, tensor: Any, dtype: Any, cast: bool) -> tuple[str, list[int], Any]:
    """Dtype, shape and bytes of a tensor on the CPU. The bytes may still be the tensor's own."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        return numpy_buffer(name, tensor, dtype, cast)
    kinds = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    kind = kind_of(dtype, kinds, cast) or kinds.get(tensor.dtype, "f32")
    wanted = {kind: known for known, kind in kinds.items()}[kind]
    # Cast where it is: one call for both would move a GPU's f32 and cast it on the CPU. The copy is
    # waited for, so that the optimizer may go on at once.
    host = tensor.detach().to(wanted).to("cpu").contiguous()
    return kind, list(host.shape), host.reshape(-1).view(torch.uint8).numpy()


def numpy_buffer(name: str, array: Any, dtype: Any, cast: bool) -> tuple[str, list[int], Any]:
    import numpy

    array = numpy.asarray(array)
    kinds = {numpy.dtype(numpy.float32): "f32", numpy.dtype(numpy.float16): "f16"}
    kind = kind_of(dtype, kinds, cast) or kinds.get(array.dtype, "f32")
    if kind == "bf16":
        raise invalid(
            "dtype", f"tensor {name}: a NumPy array cannot be cast to bf16; hand in a torch tensor"
        )
    wanted = {kind: known for known, kind in kinds.items()}[kind].newbyteorder("<")
    flat = numpy.ascontiguousarray(array, dtype=wanted).reshape(-1)
    return kind, list(array.shape), flat.view(numpy.uint8)


def compare(
    state_dict: Mapping[str, Any], digests: Iterable[Mapping[str, Any]]
) -> tuple[list[str], list[str], list[str]]:
    """The names of tensors that differ from their digests, of those that the state dict lacks, and
    of those that have no digest. Values are cast as those of the digests were when they were
    pushed.
    """
    mine: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        if not is_floating(tensor):
            continue
        check_values(name, tensor)
        if hasattr(tensor, "placements"):
            raise invalid(
                "state_dict",
                f"tensor {name}: it is sharded; gather it first, with tensor.full_tensor() on "
                "all ranks",
            )
        mine[clean(name)] = tensor
    differing, absent = [], []
    for digest in digests:
        # The service takes `model.` off the names of modules around the model.
        names = [digest["name"], "model." + digest["name"]]
        name = next((name for name in names if name in mine), None)
        if name is None:
            absent.append(digest["name"])
            continue
        _, extent, data = buffer(name, mine.pop(name), digest["dtype"], True)
        shape = list(digest["shape"])
        one = math.prod(shape) == math.prod(extent) == 1
        if (extent != shape and not one) or _superbatch.blake3_of(data) != digest["blake3"]:
            differing.append(digest["name"])
    return differing, absent, list(mine)


def kind_of(dtype: Any, kinds: Mapping[Any, str], cast: bool) -> str | None:
    """ "f32", "f16" or "bf16" for such a string or the library's own dtype; None for None, and
    if nothing is cast.
    """
    if dtype is None:
        return None
    kind = dtype if isinstance(dtype, str) else kinds.get(dtype)
    if kind not in DTYPES:
        raise invalid("dtype", f"cannot be {dtype!r}; valid values are {', '.join(DTYPES)}")
    return kind if cast else None


def of_parts(parts: Iterable[Any]) -> Iterator[Block]:
    """Blocks from tuples (name, tensor, global_shape, start)."""
    for name, tensor, global_shape, start in parts:
        yield Block(name, tensor, tuple(global_shape), tuple(start))


def own_rank() -> int:
    """This process's rank in `torch.distributed`, 0 where that is not in use."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0
    return distributed.get_rank()
