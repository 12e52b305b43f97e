"""What the ranks of a trainer agree on."""

from __future__ import annotations

import uuid
from typing import Any

import torch
import torch.distributed as dist


def incarnation(group: Any = None) -> str:
    """A new id for this start of the trainer, agreed on by all ranks of the initialised process
    group.

    Without a process group it is this process's own.
    """
    agreed = [uuid.uuid4().hex]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(agreed, src=0, group=group)
    return agreed[0]


class _Gather(torch.autograd.Function):
    """torch's own gather with gradients needs all_to_all, which gloo does not have everywhere."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group, ctx.rows = group, len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Each rank's loss is a function of all ranks' rows: their gradients add up.
        whole = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.rows
        return whole[first : first + ctx.rows], None


def gather(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
    """The rows of all ranks of the process group, in the order of ranks, with gradients to each.

    For a contrastive loss over the whole sub-batch: this rank's images against all captions. All
    ranks have as many rows. Without a process group, the tensor itself.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return tensor
    return _Gather.apply(tensor, group)
