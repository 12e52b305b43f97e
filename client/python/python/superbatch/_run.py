"""An open run: batches are taken from it, and weights are pushed to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow

from . import _superbatch, _weights
from ._arguments import seconds, text, whole
from ._batches import Batch, Batches
from ._calls import awaited
from ._record import Record, record
from ._spec import Phase, check_phases, plain


def placed(rank: Any, world_size: Any) -> tuple[int, int]:
    return whole("rank", rank, bits=32), whole("world_size", world_size, least=1, bits=32)


class Run:
    """An open run.

    As a context manager it flushes pushes at the end, and no more: the run stays open, for other
    ranks and for a trainer that comes back. When it is finished, `close` it, or `Client.close_run`
    by its id.
    """

    def __init__(self, run: _superbatch.Run) -> None:
        self._run = run
        self._warned = False
        self._rank: int | None = None
        #: The schema of every batch.
        self.schema: pyarrow.Schema = run.schema
        #: The spec in force, defaults filled.
        self.spec: Record = record(run.spec)
        #: dataset_manifest, dataset_rows, and steps_total (0: without end).
        self.dataset: Record = record(run.dataset)

    @property
    def run_id(self) -> str:
        """The id that the run was opened with."""
        return self._run.run_id

    @property
    def generation(self) -> int:
        """The trajectory of this run's requests and pushes: 0 until the first rewind."""
        return self._run.generation

    @property
    def next_step(self) -> int:
        """When the run was opened, the step after the last committed one: where to go on without a
        checkpoint.
        """
        return self._run.next_step

    def batches(
        self,
        *,
        rank: int,
        world_size: int,
        start_step: int,
        end_step: int | None = None,
        stride: int = 1,
        prefetch: int = 1,
        read_ahead: int = 0,
        need_after: float = 0.0,
    ) -> Batches:
        """The steps from `start_step` on, until the data or `end_step` (not included) ends. For
        `for` and `async for`.

        start_step: the step after your checkpoint's.
        stride: only every so many steps, if several processes share them, such as a loader's
        workers.
        prefetch: batches asked for beyond the one being trained on; cut to what the run's
        `max_ahead` allows.
        read_ahead: steps that the consumer holds before it trains on them.
        need_after: seconds of waiting after which the client reports to the service that the
        trainer stands still.
        """
        self._rank, world_size = placed(rank, world_size)
        made = self._run.batches(
            self._rank,
            world_size,
            whole("start_step", start_step),
            None if end_step is None else whole("end_step", end_step),
            whole("stride", stride, least=1),
            whole("prefetch", prefetch),
            whole("read_ahead", read_ahead),
            seconds("need_after", need_after),
        )
        return Batches(made)

    def select(self, step: int, *, rank: int, world_size: int, intent: str = "need") -> Batch:
        """One step, any that is committed or not too far ahead. intent: "need", or "prefetch" (no
        deadline runs).
        """
        return Batch(*self._selecting(step, rank, world_size, intent).wait())

    async def select_async(
        self, step: int, *, rank: int, world_size: int, intent: str = "need"
    ) -> Batch:
        """`select`, in asyncio."""
        return Batch(*await awaited(self._selecting(step, rank, world_size, intent)))

    def _selecting(self, step: int, rank: int, world_size: int, intent: str) -> _superbatch.Call:
        text("intent", intent, 'give "need" or "prefetch"')
        return self._run.select(whole("step", step), *placed(rank, world_size), intent)

    def push_weights(
        self,
        state_dict: Mapping[str, Any],
        *,
        step: int,
        rank: int | None = None,
        dtype: Any = None,
        base_version: int | None = None,
    ) -> None:
        """Copies the weights that `step` left behind (-1: the initial ones) and uploads them in the
        background.

        When it returns, the optimizer may overwrite them. At most one push waits beside the one
        being uploaded; beyond that the call blocks. The next call, or `flush`,
        raises the error of a failed upload. Flush before the process ends: the rest is lost.

        A step's weights are published once. A trainer that goes back to a checkpoint and repeats
        steps pushes them again, and the published ones stay; if it pushes other weights, they
        change nothing, and a warning names the first such step (where one rank pushes whole
        tensors, as `push_weights` does outside of FSDP). To train on from other weights,
        go back first: `run.rewind(step, mode="reselect")`.

        Every rank may call it: rank 0 pushes what is replicated, and each rank its shards of
        DTensors (FSDP 2). A model that one process alone trains, such as a smaller proxy, is pushed
        with `rank=0` by that process, whatever its rank: others push nothing of whole tensors.
        Entries that are not floating point are left out, and the prefixes of
        DistributedDataParallel and torch.compile are taken off the names.

        dtype: "bf16", "f16" or "f32" to cast to; by default tensors stay as they are, and other
        float types become f32. Tensors of one element, such as the scale and the bias of the
        logits, are never cast.
        rank: where not given, the one that batches were asked for with, else `torch.distributed`'s,
        else 0.
        base_version: push changed tensors only. Those that the state dict lacks are taken from this
        version, such as `run.flush().version`; all ranks give the same. It is refused if the
        version is no longer kept.
        """
        if rank is None:
            rank = _weights.own_rank() if self._rank is None else self._rank
        step, rank = whole("step", step, least=-1, bits=63), whole("rank", rank, bits=32)
        mine, total = _weights.blocks(state_dict, rank)
        if mine:
            expected_parts = 0 if len(mine) == total else total
            self._push(mine, step, rank, dtype, None, expected_parts, base_version)

    def push_parts(
        self,
        parts: Iterable[tuple[str, Any, Sequence[int], Sequence[int]]],
        *,
        step: int,
        expected_parts: int,
        push_id: str | None = None,
        rank: int = 0,
        dtype: Any = None,
        base_version: int | None = None,
    ) -> None:
        """Pushes this rank's blocks of the weights, for other kinds of sharding; else as
        `push_weights`.

        parts: tuples (name, tensor, global_shape, start): the tensor is the block at `start` of the
        whole.
        expected_parts: blocks of the whole push, over all ranks.
        push_id: the same on all ranks; it follows from generation and step where not given.
        """
        step, rank = whole("step", step, least=-1, bits=63), whole("rank", rank, bits=32)
        expected_parts = whole("expected_parts", expected_parts, bits=32)
        blocks = _weights.of_parts(parts)
        self._push(blocks, step, rank, dtype, push_id, expected_parts, base_version)

    def _push(
        self,
        blocks: Iterable[_weights.Block],
        step: int,
        rank: int,
        dtype: Any,
        push_id: str | None,
        expected_parts: int,
        base_version: int | None,
    ) -> None:
        if base_version is not None:
            base_version = whole("base_version", base_version)
        # The service hears of the push first, whichever process asks for the next step. Room before
        # copies: no more copies exist than can wait.
        slot = self._run.reserve_push(step, rank).wait()
        self._warn_of_dropped(stacklevel=4)
        _weights.add(slot, blocks, dtype)
        slot.submit(push_id, expected_parts, base_version)

    def push_uri(self, uri: str, *, step: int, blake3: str | None = None) -> Record:
        """Has the service read the weights that `step` left behind from a safetensors file in
        storage, such as a checkpoint that was saved there, and waits until they are published.

        The file must be on the operator's allow-list. It is verified like any push.

        blake3: of the file, in hex. The push is refused if the file has another.
        """
        text("uri", uri, 'give a URI such as "s3://bucket/step-100/model.safetensors"')
        return record(
            self._run.push_uri(uri, whole("step", step, least=-1, bits=63), blake3).wait()
        )

    def verify_weights(
        self, state_dict: Mapping[str, Any], *, version: int | None = None
    ) -> Record:
        """Compares a state dict with weights that the service holds, tensor by tensor: by the
        BLAKE3 of the bytes in its storage, which workers check as well when they load them.

        Returns `equal`, the `version`, and the names of tensors: `differing`, `absent` from the
        state dict, and `unknown` to the service. Values are cast to the dtype in which they were
        pushed. DTensors have to be gathered first.

        version: the newest that serves, where not given. Flush first: pushes that are under way are
        not compared.
        """
        if version is not None:
            version = whole("version", version)
        of, digests = self._run.weights_digests(version).wait()
        differing, absent, unknown = _weights.compare(state_dict, digests)
        return record(
            {
                "equal": not (differing or absent or unknown),
                "version": of,
                "differing": differing,
                "absent": absent,
                "unknown": unknown,
            }
        )

    def weights(self, newest: int = 100) -> list[Record]:
        """The newest published weights, the newest first: `version`, `push_id`, `state` (kept,
        retired, missing), and the version that they were `replaced_by` in a roll-back.
        """
        return record(self._run.weights(whole("newest", newest, least=1, bits=32)).wait())

    def roll_back_weights(self, version: int) -> Record:
        """Takes back all weights that were pushed after `version`. It serves in their place from
        the next step on, until weights that are pushed from now on are due. Needs a token of scope
        `admin`.

        Steps that are decided keep their weights. Steps that are scored with the older version have
        the mode `stale`.
        """
        return record(self._run.roll_back_weights(whole("version", version)).wait())

    def report_losses(self, ids: Iterable[Any], losses: Iterable[Any], *, step: int) -> None:
        """Reports your own losses of examples of a step: they are the score column
        `_superbatch_loss` of steps that are decided later, such as those of the next epoch. Each
        rank may report its own. When it returns, they are durable.

        ids: `batch["_superbatch_id"]`, or some of it, as an Arrow array or texts.
        losses: one finite number each: a tensor, an array or numbers. Of an example the last report
        counts.
        """
        ids = ids.to_pylist() if hasattr(ids, "to_pylist") else list(ids)
        losses = losses.tolist() if hasattr(losses, "tolist") else list(losses)
        self._run.report_losses(whole("step", step), ids, losses).wait()

    def missing_pushes(self, start_step: int) -> list[int]:
        """Steps whose pushes were on their way when the trainer ended, and which steps from
        `start_step` on wait for.

        A trainer that resumes at `start_step`, the step after its checkpoint's, pushes the
        checkpoint's weights as each of them, before it asks for a batch. Under `exact(1)` two may
        be missing, of which the older has the weights of a step
        before the checkpoint: the checkpoint's are the nearest that are left, and receipts show by
        the digest of `learner` that both are the same.
        """
        return self._run.missing_pushes(whole("start_step", start_step)).wait()

    def flush(self) -> Record | None:
        """Waits until every push is published. Returns the newest version, or None if this process
        pushed nothing.
        """
        version = record(self._run.flush().wait())
        self._warn_of_dropped(stacklevel=3)
        return version

    async def flush_async(self) -> Record | None:
        """`flush`, in asyncio."""
        version = record(await awaited(self._run.flush()))
        self._warn_of_dropped(stacklevel=3)
        return version

    def _warn_of_dropped(self, stacklevel: int) -> None:
        """Warns, once, of weights that were pushed for a step and are not those that are
        published.
        """
        step = self._run.dropped_push
        if step is None or self._warned:
            return
        self._warned = True
        if step < 0:
            way_out = "a trainer that starts from other weights opens a run of another id"
        else:
            way_out = (
                "a trainer that goes on from other weights calls "
                f'run.rewind({step}, mode="reselect") first'
            )
        warnings.warn(
            f"the weights pushed as step {step} are not those that are published as it: a step's "
            "weights are published "
            f"once, and what is pushed for it again changes nothing; {way_out}",
            stacklevel=stacklevel,
        )

    def close(self) -> None:
        """Flushes, and ends the run for all ranks: no further steps or pushes. Its receipts
        stay.
        """
        self.flush()
        self._run.close_run().wait()

    def get_run(self) -> Record:
        """What is known about the run: state, spec, cursors, accounts, newest weights."""
        return record(self._run.get_run().wait())

    def receipt(self, step: int, *, generation: int | None = None) -> Record:
        """Why the step's rows were chosen: `summary`, and `chosen`, `bad_rows` and `passed_over`
        row by row.
        """
        generation = None if generation is None else whole("generation", generation, bits=32)
        return record(self._run.receipt(whole("step", step), generation).wait())

    def rewind(self, to_step: int, *, mode: str) -> int:
        """Goes back to a step in a new generation: "replay" serves the old choices, "reselect"
        chooses anew.
        """
        text("mode", mode, 'give "replay" or "reselect"')
        return self._run.rewind(whole("to_step", to_step), mode).wait()

    def append_phases(self, phases: Sequence[Phase]) -> Record:
        """Adds phases for steps that are not committed yet, and returns the spec in force."""
        check_phases(phases)
        self.spec = record(self._run.append_phases(plain(list(phases), "phases")).wait())
        return self.spec

    def __enter__(self) -> Run:
        return self

    def __exit__(self, exception_type: Any, *_: Any) -> None:
        if exception_type is None:
            self.flush()

    def __repr__(self) -> str:
        return f"Run({self.run_id!r}, generation={self.generation})"
