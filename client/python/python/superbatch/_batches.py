"""Batches, one by one or as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pyarrow

from . import _superbatch
from ._calls import awaited
from ._record import Record, record


class Batch:
    """One rank's share of a step's sub-batch.

    `batch["image"]` (as stored) and `batch["caption"]` are pyarrow arrays, as are the extra columns
    asked for and `_superbatch_id`, `_superbatch_position`, `_superbatch_score`,
    `_superbatch_fidelity`, `_superbatch_weight`; of a run with a phase that has `token_share` also
    `_superbatch_token_mask`: a list of bools a row, null where all tokens are to be trained.
    """

    def __init__(
        self,
        record_batch: pyarrow.RecordBatch,
        receipt: dict,
        step: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.record_batch = record_batch
        #: How the step was decided: policy, mode, lag_steps, learner.version, mean_score_chosen,
        #: cost, ... The scores (batch_score, mean_score_chosen, mean_score_candidates) are None
        #: if no loss was read: policies "uniform" and "k_center", and steps degraded to uniform.
        self.receipt: Record = record(receipt)
        self.step = step
        self.rank = rank
        self.world_size = world_size

    @property
    def table(self) -> pyarrow.Table:
        """The rows as a pyarrow table, without a copy."""
        return pyarrow.Table.from_batches([self.record_batch])

    @property
    def column_names(self) -> list[str]:
        """Names that `batch[name]` knows."""
        return self.record_batch.schema.names

    def __getitem__(self, column: str) -> pyarrow.Array:
        try:
            return self.record_batch.column(column)
        except KeyError:
            raise KeyError(
                f"there is no column {column!r}; there are {', '.join(self.column_names)}"
            ) from None

    def __len__(self) -> int:
        return self.record_batch.num_rows

    def __repr__(self) -> str:
        return f"Batch(step={self.step}, rank={self.rank}/{self.world_size}, rows={len(self)})"


class Batches(Iterator[Batch], AsyncIterator[Batch]):
    """Batches in the order of their steps, asked for ahead of time. Iterate with `for` or with
    `async for`.

    Asking for a step says that all earlier ones are trained on. An exception loses nothing, nor
    does a wait that is cut short (Ctrl-C, `asyncio.wait_for`): the next call yields the same step.
    """

    def __init__(self, batches: _superbatch.Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        batch = self._batches.next().wait()
        if batch is None:
            raise StopIteration
        return Batch(*batch)

    def __aiter__(self) -> Batches:
        return self

    async def __anext__(self) -> Batch:
        batch = await awaited(self._batches.next())
        if batch is None:
            raise StopAsyncIteration
        return Batch(*batch)
