"""The undisturbed run: the same spec, on the same store, with one coordinator that nothing happens
to.
"""

from pathlib import Path
from typing import Any

import superbatch
from safetensors.torch import load_file

from .compare import Slice
from .members import alone
from .rank import digest, weights


def undisturbed(
    folder: Path, state: str, environment: dict, spec: superbatch.RunSpec, initial: Path, asked
) -> tuple[dict[Slice, str], list[Any]]:
    """Digests of the slices `asked`, and receipts by step."""
    steps = 1 + max(one.step for one in asked)
    first, digests = load_file(initial), {}
    with alone(folder, state, environment) as client:
        run = client.open_run(spec, incarnation="world of 1")
        for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=steps):
            digests[Slice(1, batch.step, 0)] = digest(batch)
            run.push_weights(weights(first, batch.step), step=batch.step)
        run.flush()
        for world_size in sorted({one.world_size for one in asked} - {1}):
            run = client.open_run(spec, incarnation=f"world of {world_size}")
            for one in sorted(one for one in asked if one.world_size == world_size):
                batch = run.select(one.step, rank=one.rank, world_size=world_size)
                digests[one] = digest(batch)
        return digests, [run.receipt(step) for step in range(steps)]
