"""Superbatch: batches chosen for your learner, from your own data, by a service beside your
trainer.

    import superbatch

    client = superbatch.connect("http://127.0.0.1:50051")
    run = client.open_run(superbatch.RunSpec(...))
    for batch in run.batches(rank=rank, world_size=world, start_step=step):
        images, captions = batch["image"], batch["caption"]
        ...
        run.push_weights(model.state_dict(), step=batch.step, rank=rank)

`superbatch.torch` has an `IterableDataset` for trainers that are built around a `DataLoader`.
`superbatch.kernels` selects in your own loop, without a service, if the package
superbatch-kernels is installed.
"""

from typing import Any

from ._batches import Batch, Batches
from ._client import Client, connect
from ._errors import (
    EndOfData,
    Error,
    InvalidArgument,
    NeedDeadline,
    Unavailable,
    WeightsRefused,
    WorkerFailed,
)
from ._record import Record
from ._run import Run
from ._spec import (
    Approximation,
    FidelityProbe,
    Fork,
    Lag,
    Learner,
    MultiResolution,
    Phase,
    Reference,
    RunSpec,
    ScoreColumn,
    Source,
    Tuning,
    at_most,
    exact,
)

__all__ = [
    "Approximation",
    "Batch",
    "Batches",
    "Client",
    "EndOfData",
    "Error",
    "FidelityProbe",
    "Fork",
    "InvalidArgument",
    "Lag",
    "Learner",
    "MultiResolution",
    "NeedDeadline",
    "Phase",
    "Record",
    "Reference",
    "Run",
    "RunSpec",
    "ScoreColumn",
    "Source",
    "Tuning",
    "Unavailable",
    "WeightsRefused",
    "WorkerFailed",
    "at_most",
    "connect",
    "exact",
]


def __getattr__(name: str) -> Any:
    """`superbatch.torch` and `superbatch.kernels` without an import of their own; loaded when they
    are first named.
    """
    if name in ("kernels", "torch"):
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
