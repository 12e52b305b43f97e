"""For trainers that are built around a `torch.utils.data.DataLoader`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from .._arguments import whole
from .._batches import Batch
from .._client import connect
from .._errors import EndOfData, Error, for_worker, invalid
from .._run import Run
from .._spec import RunSpec
from .pushes import Pushes

#: Seconds of waiting after which a loader's worker tells the service that the trainer stands still.
#: A worker runs ahead of the trainer and cannot know: this must exceed the longest time between two
#: steps, evaluation and checkpoints included.
WORKER_NEED_AFTER = 600.0

WORKERS_MAX = 256


class SelectedBatches(IterableDataset):
    """The batches of a run, whole, as a data set of torch. `loader` makes the `DataLoader` for it.

    uri, spec, rank, world_size, end_step, incarnation, prefetch: as in `connect`, `open_run` and
        `batches`.
    start_step: the step after your checkpoint's. It advances with the iteration: a second loop
        goes on after the last step of the first.
    epoch_steps: loops end at every multiple of it, so that an epoch of the trainer is so many
        steps, also where a loop begins within one. It is the length of the data set and of its
        loader. Without it a loop ends with the data.
    transform: makes of a `superbatch.Batch` what the trainer wants, such as decoded tensors
        (`ImageText`); runs where the loader iterates, so with workers beside the trainer. Without
        it the loader yields the `Batch`.
    prefetch_factor: steps that each worker of the loader holds ready. The run's `max_ahead` must be
        larger than `num_workers * prefetch_factor`.
    need_after: seconds of waiting after which the client reports a trainer that stands still, so
        that the run's fallback may apply; by default 0 without workers, else `WORKER_NEED_AFTER`.
    connection: further arguments of `connect`, such as `{"ca": "ca.pem"}`. Give a token by the
        environment or `token_file`: what is pickled with the data set may be kept somewhere.

    It connects when it is iterated, in the process that iterates: it can be pickled, and forked.
    Workers share out the steps, and the loader puts them in order again. Push weights from the
    trainer's own process.

    Also fits into a `DataLoader(dataset, batch_size=None)` of your own. Without `batch_size=None`
    torch makes batches of batches: its default collation raises `superbatch.InvalidArgument` if
    there is no transform, and adds a dimension to what a transform returns. With workers give it
    the same `prefetch_factor`, and set `start_step` before every further loop: workers run ahead,
    and cannot know which batches the trainer took. Errors of workers keep their class then, not
    their metadata (`superbatch.WorkerFailed`).
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
        epoch_steps: int | None = None,
        transform: Callable[[Batch], Any] | None = None,
        incarnation: str = "",
        prefetch: int = 1,
        prefetch_factor: int = 1,
        need_after: float | None = None,
        connection: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.uri = uri
        self.connection = dict(connection or {})
        self.spec = spec
        self.rank = rank
        self.world_size = world_size
        self.end_step = end_step
        self.epoch_steps = (
            None if epoch_steps is None else whole("epoch_steps", epoch_steps, least=1)
        )
        self.transform = transform
        self.incarnation = incarnation
        self.prefetch = prefetch
        self.prefetch_factor = prefetch_factor
        self.need_after = need_after
        #: By worker, shared with the trainer's process: 1 + the `start_step` of a loop that has
        #: yielded something.
        self._begun = torch.zeros(WORKERS_MAX, dtype=torch.int64).share_memory_()
        #: The process that opened the run, and the run.
        self._run: tuple[int, Run] | None = None
        #: Set in a worker that has yielded something.
        self._used = False
        #: Whether errors may travel to the trainer as items, for a loader that raises them there.
        self._tells_errors = False
        self.start_step = start_step

    @property
    def start_step(self) -> int:
        """Where the next loop begins."""
        return self._start_step

    @start_step.setter
    def start_step(self, step: int) -> None:
        self._start_step = step
        self._begun.zero_()

    def __len__(self) -> int:
        if self.epoch_steps is None:
            raise TypeError("the data set has no length: give SelectedBatches an epoch_steps")
        return self.epoch_steps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begun.share_memory_()

    def open_run(self) -> Run:
        """The run of these batches, to push weights to. Loops in this process go on with it.

        To go on after a rewind by another rank, call it once more.
        """
        # What asks for batches then knows which weights are on their way, and tells the service.
        self._run = os.getpid(), self._connected()
        return self._run[1]

    def _connected(self) -> Run:
        return connect(self.uri, **self.connection).open_run(
            self.spec, incarnation=self.incarnation
        )

    def loader(
        self, *, num_workers: int = 0, pushes: Pushes | None = None, **options: Any
    ) -> DataLoader:
        """A `DataLoader` of this data set. A further loop goes on where the one before was left.

        num_workers: processes that fetch and transform. options: further ones of `DataLoader`, such
            as `pin_memory`.
        pushes: for trainers that offer no place to push. The loader pushes a step's weights when it
            is asked for the next batch, so for loops that train on a batch before they ask for
            another one.
        """
        return _Loader(self, num_workers, pushes, options)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            return self._own_steps()
        return self._shared_steps(worker.id, worker.num_workers)

    def _own_steps(self) -> Iterator[Any]:
        first = self.start_step
        for step, item in self._items(
            first, self._loop_end(first), stride=1, read_ahead=0, need_after=0.0
        ):
            self.start_step = step + 1
            yield item
        self._check_end(first)

    def _loop_end(self, start: int) -> int | None:
        """The step before which a loop ends that begins at `start`; None: with the data."""
        ends = [] if self.end_step is None else [self.end_step]
        if self.epoch_steps is not None:
            ends.append((start // self.epoch_steps + 1) * self.epoch_steps)
        return min(ends, default=None)

    def _check_end(self, first: int) -> None:
        """Says that a loop that began at `first` has yielded nothing, for want of data."""
        if self.start_step > first or (self.end_step is not None and first >= self.end_step):
            return
        what = f"the data ended before step {first}: this loop has no batches"
        if self.epoch_steps is not None:
            raise EndOfData(
                f"{what}, where {self.epoch_steps} are expected; open the run with more epochs, "
                "or with 0"
            )
        warnings.warn(f"{what}; the run's epochs are over", stacklevel=3)

    def _shared_steps(self, worker: int, workers: int) -> Iterator[Any]:
        """Those of one worker."""
        start, read_ahead = self.start_step, workers * self.prefetch_factor
        try:
            self._check_loop(worker, workers)
            for _, item in self._items(
                start + worker, self._loop_end(start), workers, read_ahead, WORKER_NEED_AFTER
            ):
                self._begun[worker] = 1 + start
                self._used = True
                yield item
        except Error as error:
            if not self._tells_errors:
                raise for_worker(error) from error
            yield _Failure(error)

    def _check_loop(self, worker: int, workers: int) -> None:
        if workers > WORKERS_MAX:
            raise invalid("num_workers", f"{workers} are too many; at most {WORKERS_MAX}")
        if self._used:
            raise invalid(
                "persistent_workers",
                "workers that live on would serve the same steps again; leave it out",
            )
        if self._begun[worker] == 1 + self.start_step:
            message = (
                f"the steps from {self.start_step} on were served before, by workers that run "
                "ahead "
                "of the trainer: set it to the step after the last one trained on, or make the "
                "loader by SelectedBatches.loader"
            )
            raise invalid("start_step", message)

    def _items(
        self, start: int, end: int | None, stride: int, read_ahead: int, need_after: float
    ) -> Iterator[tuple[int, Any]]:
        """Steps and what is made of their batches."""
        own = self._run is not None and self._run[0] == os.getpid()
        run = self._run[1] if own else self._connected()
        batches = run.batches(
            rank=self.rank,
            world_size=self.world_size,
            start_step=start,
            end_step=end,
            stride=stride,
            prefetch=self.prefetch,
            read_ahead=read_ahead,
            need_after=need_after if self.need_after is None else self.need_after,
        )
        for batch in batches:
            yield batch.step, batch if self.transform is None else self.transform(batch)


def rows_chosen(spec: RunSpec, first: int, end: int) -> int:
    """How many rows all ranks together are served for the steps from `first` to before `end`."""
    phases = spec.to_dict()["phases"]
    begins = [phase.get("from_step", 0) for phase in phases]
    spans = zip(phases, begins, [*begins[1:], end])
    return sum(
        max(0, min(upto, end) - max(begin, first)) * phase["sub_batch_size"]
        for phase, begin, upto in spans
    )


def refuse_batches_of_batches(batches: list[Batch], **_: Any) -> Any:
    """What torch's default collation makes of a list of `Batch`: an error."""
    raise invalid(
        "batch_size",
        "the loader would make batches of batches, with a dimension more: give "
        "DataLoader(dataset, batch_size=None), or make it by SelectedBatches.loader",
    )


# torch's way to teach its default collation a type.
default_collate_fn_map[Batch] = refuse_batches_of_batches


class _Failure(NamedTuple):
    """What a worker failed with. Raised there, torch would make another exception of it, with a
    text of its own.
    """

    error: Error


#: What a loader of selected batches sets itself, and why it cannot be otherwise.
_FIXED = {
    "batch_size": (None, "a batch is what the run's sub_batch_size says"),
    "collate_fn": (None, "give SelectedBatches a transform"),
    "in_order": (True, "steps come in their order"),
    "persistent_workers": (False, "workers begin anew for every loop, at the right step"),
    "prefetch_factor": (None, "give it to SelectedBatches"),
}


class _Loader(DataLoader):
    """Counts what the trainer takes, which its workers cannot."""

    def __init__(
        self,
        dataset: SelectedBatches,
        num_workers: int,
        pushes: Pushes | None,
        options: dict[str, Any],
    ) -> None:
        for name, (fixed, why) in _FIXED.items():
            if options.pop(name, fixed) is not fixed:
                raise invalid(name, f"leave it out: {why}")
        factor = dataset.prefetch_factor if num_workers else None
        super().__init__(
            dataset, batch_size=None, num_workers=num_workers, prefetch_factor=factor, **options
        )
        self.pushes = pushes

    def __iter__(self) -> Iterator[Any]:
        first = self.dataset.start_step
        # Workers that were stopped before the trainer took anything have served nothing.
        self.dataset.start_step = first
        # Workers are made here, and take the data set as it is now.
        self.dataset._tells_errors = True
        items = super().__iter__()
        self.dataset._tells_errors = False
        if self.pushes is not None:
            self.pushes.before(first)
        for step, item in enumerate(items, first):
            if isinstance(item, _Failure):
                raise item.error
            if self.num_workers > 0:
                self.dataset.start_step = step + 1
            yield item
            if self.pushes is not None:
                self.pushes.after(step)
        if self.num_workers > 0:
            self.dataset._check_end(first)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, as open_clip asks for them."""
        if self.dataset.epoch_steps is None:
            raise AttributeError("an epoch has no length: give SelectedBatches an epoch_steps")
        return self.dataset.epoch_steps

    @property
    def num_samples(self) -> int:
        """Examples of an epoch, over all ranks: of the one that the next loop begins or goes on
        with.
        """
        steps = self.num_batches
        first = self.dataset.start_step // steps * steps
        return rows_chosen(self.dataset.spec, first, first + steps)
