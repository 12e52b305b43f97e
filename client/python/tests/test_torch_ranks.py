"""What ranks do together, on real gloo ranks: the loss over all rows, and pushes of FSDP 2."""

from pathlib import Path

import torch
import torch.distributed as dist
from superbatch import _weights
from superbatch.torch import incarnation, sigmoid_loss, softmax_loss, state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

RANKS, ROWS = 2, 3


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 5)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(RANKS * ROWS, 4, generator=generator) for _ in range(2))


def loss_of(tower: torch.nn.Module, images: torch.Tensor, texts: torch.Tensor):
    """Both losses of these rows with all ranks' rows."""
    images, texts = tower(images), tower(texts)
    return sigmoid_loss(images, texts, 2.0, -1.0) + softmax_loss(images, texts, 3.0)


def rank_main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS
    )
    images, texts = rows()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    parallel = torch.nn.parallel.DistributedDataParallel(model())
    loss_of(parallel, images[mine], texts[mine]).backward()

    sharded = model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (RANKS,)))
    blocks, total = _weights.blocks(state_dict(sharded), rank)
    whole = get_model_state_dict(
        sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    told = {
        "gradients": {name: value.grad for name, value in parallel.module.named_parameters()},
        "incarnation": incarnation(),
        "blocks": [(block.name, block.start, block.tensor.clone()) for block in blocks],
        "total": total,
        "whole": _weights.blocks(whole, rank)[0] != [],
    }
    torch.save(told, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    torch.multiprocessing.spawn(rank_main, (tmp_path,), nprocs=RANKS)
    told = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    alone = model()
    loss_of(alone, *rows()).backward()
    for name, value in alone.named_parameters():
        for rank in told:
            torch.testing.assert_close(rank["gradients"][name], value.grad)
    assert told[0]["incarnation"] == told[1]["incarnation"] != incarnation()
    # A full state dict is empty on ranks above 0, which then push nothing.
    assert [rank["whole"] for rank in told] == [True, False]
    # Each rank pushes its shards, and together they are the model.
    assert [rank["total"] for rank in told] == [4, 4]
    for name, value in alone.state_dict().items():
        parts = [part for rank in told for found, _, part in rank["blocks"] if found == name]
        assert torch.equal(torch.cat(parts), value)
