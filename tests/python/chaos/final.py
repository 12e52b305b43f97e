"""What is left when chaos is over: the state has to be complete."""

from pathlib import Path
from typing import Any

import superbatch

from .members import alone


def receipts(
    folder: Path, state: str, environment: dict, spec: superbatch.RunSpec, known: list
) -> list[Any]:
    """Of the run, as a coordinator reads them that has just started."""
    with alone(folder, state, environment) as client:
        run = client.open_run(spec, incarnation="after")
        return [run.receipt(step) for step in range(len(known))]


def complete(chaos, found: list[Any]) -> list[str]:
    """What the state lacks, or has too much of."""
    faults = []
    keys = [key for key in chaos.keys("receipts")]
    for step in range(len(found)):
        of_step = [key for key in keys if key.startswith(f"{step // 1000}/{step}/")]
        if of_step != [f"{step // 1000}/{step}/0.parquet"]:
            faults.append(f"step {step} has the receipts {of_step}")
    pushes = set(chaos.keys("pushes"))
    for step, receipt in enumerate(found):
        summary = receipt["summary"]
        wanted = max(step - 2, -1)
        if summary["mode"] != "normal" or summary["learner"]["step"] != wanted:
            faults.append(
                f"step {step} was scored in mode {summary['mode']} with {summary['learner']}"
            )
        elif wanted >= 0 and f"0/{wanted}.json" not in pushes:
            faults.append(f"the push of step {wanted} is not in the state")
    return faults
