"""Runs chaos and says what came of it."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from s3_store import BUCKET, credentials

from examples.demo import tiny

from . import compare
from .calm import undisturbed
from .chaos import Chaos, Failed
from .compare import Slice


@dataclass
class Verdict:
    folder: Path
    seed: int
    faults: list[str]
    events: list[tuple[float, str]]
    figures: dict[str, object] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.figures.items()]
        if self.is_good:
            return "\n".join([*lines, f"seed {self.seed}: every batch is the undisturbed run's"])
        schedule = [f"{at:9.3f} {what}" for at, what in self.events]
        shown = self.faults[:20] + [f"and {len(self.faults) - 20} more"] * (len(self.faults) > 20)
        return "\n".join(
            [
                f"chaos failed under seed {self.seed}. What happened, by seconds:",
                *schedule,
                *lines,
                f"chaos failed under seed {self.seed}:",
                *shown,
                f"logs: {self.folder}; again: make chaos SEED={self.seed}",
            ]
        )


def write_inputs(folder: Path) -> Path:
    tiny.write_dataset(folder / "pool", rows=768)
    tiny.write_siglip(folder / "learner", seed=0)
    tiny.write_siglip(folder / "reference", seed=1)
    return folder


def run(folder: Path, seed: int, kills: int | None, seconds: float | None) -> Verdict:
    folder.mkdir(parents=True, exist_ok=True)
    with Chaos(folder, write_inputs(folder / "inputs"), seed) as chaos:
        faults = []
        try:
            chaos.run(kills, seconds)
        except Failed as failed:
            chaos.say(f"failed: {failed}")
            faults.append(str(failed))
        disturbed = monotonic() - chaos.began
        for member in chaos.members:
            member.kill(0.0)
        for trainer in chaos.trainers:
            trainer.kill()
        faults += [line for member in chaos.members for line in member.faults()]
        # Of those that were replaced before a wait looked at them, too.
        faults += [line for one in chaos.trainers for line in one.faults(is_current=False)]
        batches = [line for one in chaos.trainers for lines in one.lines("batch") for line in lines]
        if batches:
            faults += judged(chaos, batches)
        figures = of(chaos, batches, disturbed)
        return Verdict(folder, seed, list(dict.fromkeys(faults)), chaos.happened, figures)


def judged(chaos: Chaos, batches: list[dict]) -> list[str]:
    """Compares with the undisturbed run, on the same store."""
    from .final import complete, receipts

    asked = {Slice(one["world_size"], one["step"], one["rank"]) for one in batches}
    environment = credentials(chaos.store.port)
    calm, known = undisturbed(
        chaos.folder / "calm",
        f"s3://{BUCKET}/calm",
        environment,
        chaos.spec,
        chaos.inputs / "learner" / "model.safetensors",
        asked,
    )
    found = receipts(chaos.folder / "after", f"s3://{BUCKET}/state", environment, chaos.spec, known)
    faults = []
    for step, (one, other) in enumerate(zip(known, found)):
        where = f"receipt of step {step}"
        faults += compare.differences(compare.essence(one), compare.essence(other), where)
    nonces = {step: one["summary"]["writer_nonce"] for step, one in enumerate(found)}
    faults += compare.of_batches(batches, calm, nonces)
    return faults + complete(chaos, found)


def of(chaos: Chaos, batches: list[dict], disturbed: float) -> dict[str, object]:
    opened = [line for one in chaos.trainers for lines in one.lines("opened") for line in lines]
    errors = [
        line["reason"] for one in chaos.trainers for lines in one.lines("error") for line in lines
    ]
    took = sorted(chaos.recoveries) or [0.0]
    return {
        "kills": chaos.kills,
        "events": dict(sorted(chaos.counts.items())),
        "seconds of chaos": round(disturbed, 1),
        "seconds with the comparison": round(monotonic() - chaos.began, 1),
        "steps": 1 + max((one["step"] for one in batches), default=-1),
        "batches compared": len(batches),
        "starts of the trainer": len(chaos.trainers),
        "resumes that lacked two pushes": sum(len(one["missing"]) == 2 for one in opened),
        "owners": len(chaos.keys("owner")),
        "starts of servers": {one.name: one.starts for one in chaos.members},
        "requests to storage": dict(sorted(chaos.weather.done.items())),
        "what ranks were told": {reason: errors.count(reason) for reason in sorted(set(errors))},
        "seconds until the next step": f"median {statistics.median(took):.2f}, most {took[-1]:.2f}",
    }
