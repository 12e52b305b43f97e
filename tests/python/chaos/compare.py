"""What ranks were served, beside what a run was served that nothing disturbed. Pure."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Slice(NamedTuple):
    """What one rank asks for."""

    world_size: int
    step: int
    rank: int


#: Of a receipt, what tells when and by whom a step was decided, not how.
INCIDENTAL = ("committed_unix_ms", "writer_nonce", "trainer_wait_seconds", "cost")
#: Of its accounts, what depends on the step alone. Embeddings may be computed again after a kill.
COSTS = ("candidates_scanned", "examples_selected", "bad_rows", "train_flops", "learner_flops")


def essence(receipt: Any) -> dict:
    """A receipt without what may differ between two runs."""
    summary = {k: v for k, v in receipt["summary"].items() if k not in INCIDENTAL}
    summary["cost"] = {name: receipt["summary"]["cost"][name] for name in COSTS}
    if summary.get("learner"):
        # Versions count publications, which lost pushes may reorder.
        summary["learner"] = {k: v for k, v in summary["learner"].items() if k != "version"}
    return {**receipt, "summary": summary}


def differences(known: Any, found: Any, where: str) -> list[str]:
    """The places, at any depth, where two plain values differ."""
    if isinstance(known, dict) and isinstance(found, dict):
        names = sorted(known.keys() | found.keys())
        pairs = [(f"{where}.{name}", known.get(name), found.get(name)) for name in names]
    elif isinstance(known, list) and isinstance(found, list) and len(known) == len(found):
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(known, found))]
    else:
        return [] if known == found else [f"{where}: {found!r} instead of {known!r}"]
    return [line for name, one, other in pairs for line in differences(one, other, name)]


def of_batches(
    batches: Iterable[dict], calm: dict[Slice, str], nonces: dict[int, str]
) -> list[str]:
    """Batches that are not the undisturbed run's, or not of the one decision of their step."""
    found = []
    for batch in batches:
        asked = Slice(batch["world_size"], batch["step"], batch["rank"])
        where = f"step {asked.step}, rank {asked.rank} of {asked.world_size}"
        if batch["digest"] != calm[asked]:
            found.append(f"{where}: other bytes than the undisturbed run's")
        if batch["nonce"] != nonces[asked.step]:
            found.append(f"{where}: served from a decision that is not its step's receipt")
    return found
