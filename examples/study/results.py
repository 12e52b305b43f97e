"""The study's results: a file of JSON lines, one for each arm of one seed.

A line is written whole or not at all, as far as a reader can see: a line that a crash cut short is
passed over, and that arm is trained again.
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from .experiments import Entry, entries

RESULTS = Path(__file__).with_name("results.jsonl")

Curve = list[dict[str, Any]]


def short(value: Any) -> Any:
    """Numbers to five digits: enough for tables, and small enough to keep beside the code."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: short(part) for name, part in value.items()}
    return [short(part) for part in value] if isinstance(value, list | tuple) else value


class Results:
    def __init__(self, path: Path = RESULTS):
        self.path = path
        #: By the key of an entry.
        self.done: dict[str, Curve] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                about = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.done[about["key"]] = about["curve"]

    def append(self, entry: Entry, curve: Curve, wall: float) -> None:
        about = {
            "key": entry.key,
            "experiment": entry.experiment,
            "arm": entry.arm.name,
            "seed": entry.seed,
            "wall": round(wall),
            "curve": short(curve),
        }
        with self.path.open("a+b") as file:
            # After what a crash cut short, on a line of its own.
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")
            file.write(json.dumps(about, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[entry.key] = about["curve"]

    def by_experiment(self) -> dict[str, dict[str, dict[int, Curve]]]:
        """Experiment to arm to seed to curve, of today's settings; lines of others are left out."""
        found: dict = defaultdict(lambda: defaultdict(dict))
        for entry in entries():
            if entry.key in self.done:
                found[entry.experiment][entry.arm.name][entry.seed] = self.done[entry.key]
        return found
