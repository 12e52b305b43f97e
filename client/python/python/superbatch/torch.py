"""For trainers that are built around a `torch.utils.data.DataLoader`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from ._client import Batch, connect
from ._errors import invalid
from ._spec import RunSpec

#: Seconds after which a loader's worker tells the service that the trainer stands still. A worker runs ahead of the
#: trainer and cannot know whether it really does.
WORKER_NEED_AFTER = 30.0


class SelectedBatches(IterableDataset):
    """The batches of a run, whole: use it with `DataLoader(dataset, batch_size=None)`.

    uri, spec, rank, world_size, start_step, end_step, incarnation: as in `connect`, `open_run` and `batches`.
    transform: makes of a `superbatch.Batch` what the trainer wants, such as decoded tensors; runs where the loader
    iterates, so with `num_workers=1` beside the trainer. Without it the loader yields the `Batch`.
    prefetch_factor: with `num_workers=1`, the loader's own `prefetch_factor`. The run's `max_ahead` must be larger
    (hand 1 to both, or open the run with a larger `max_ahead`).
    need_after: as in `batches`; by default 0 without workers, else `WORKER_NEED_AFTER`.

    It connects when it is iterated, in the process that iterates: it can be pickled, and forked. `num_workers` is 0 or
    1: one stream of steps cannot be shared out among several. Push weights from the trainer's own process.
    """

    def __init__(
        self,
        uri: str,
        spec: RunSpec,
        *,
        rank: int,
        world_size: int,
        start_step: int,
        end_step: int | None = None,
        transform: Callable[[Batch], Any] | None = None,
        incarnation: str = "",
        prefetch: int = 1,
        prefetch_factor: int = 1,
        need_after: float | None = None,
    ) -> None:
        super().__init__()
        self.uri = uri
        self.spec = spec
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.end_step = end_step
        self.transform = transform
        self.incarnation = incarnation
        self.prefetch = prefetch
        self.prefetch_factor = prefetch_factor
        self.need_after = need_after

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            message = f"{worker.num_workers} workers would each get every batch; use num_workers 0 or 1"
            raise invalid("num_workers", message)
        need_after = self.need_after
        if need_after is None:
            need_after = 0.0 if worker is None else WORKER_NEED_AFTER
        run = connect(self.uri).open_run(self.spec, incarnation=self.incarnation)
        batches = run.batches(
            rank=self.rank,
            world_size=self.world_size,
            start_step=self.start_step,
            end_step=self.end_step,
            prefetch=self.prefetch,
            read_ahead=0 if worker is None else self.prefetch_factor,
            need_after=need_after,
        )
        for batch in batches:
            yield batch if self.transform is None else self.transform(batch)


def incarnation(group: Any = None) -> str:
    """A new id for this start of the trainer, agreed on by all ranks of the initialised process group.

    Without a process group it is this process's own.
    """
    agreed = [uuid.uuid4().hex]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(agreed, src=0, group=group)
    return agreed[0]
