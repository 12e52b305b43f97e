"""`make soak STEPS=10000`: a long run at small scale, and what it leaves behind as it goes: memory
and descriptors of every process, the state's size, and how long a step takes. At the end its
receipts are packed.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from time import monotonic

import superbatch
from cluster import BINARY, Cluster
from safetensors.torch import load_file
from test_end_to_end import spec

from examples.demo import tiny

#: Lines of the table.
WINDOWS = 10
#: What memory and descriptors may grow by from the second window, when caches are warm, to the
#: last.
GROWTH_MAX = 1.25
#: Snapshots of weights that a run keeps (`coordinator.snapshots_kept`) and some on their way.
SNAPSHOTS_MAX = 32 + 8


@dataclass
class Window:
    """What is measured after so many steps."""

    step: int
    steps_per_second: float
    step_ms_median: float
    step_ms_p99: float
    coordinator_mb: float
    worker_mb: float
    trainer_mb: float
    coordinator_files: int
    worker_files: int
    snapshots: int
    state_objects: int
    state_kb_per_step: float


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def measured(cluster: Cluster, state: Path, step: int, took: list[float]) -> Window:
    coordinator, workers = cluster.coordinator.process.pid, [w.process.pid for w in cluster.workers]
    sizes = {path: path.stat().st_size for path in state.rglob("*") if path.is_file()}
    ordered = sorted(took)
    return Window(
        step=step,
        steps_per_second=round(len(took) / sum(took), 1),
        step_ms_median=round(1000 * statistics.median(took), 1),
        step_ms_p99=round(1000 * ordered[int(0.99 * (len(ordered) - 1))], 1),
        coordinator_mb=round(resident_mb(coordinator), 1),
        worker_mb=round(max(map(resident_mb, workers)), 1),
        trainer_mb=round(resident_mb(os.getpid()), 1),
        coordinator_files=open_files(coordinator),
        worker_files=max(map(open_files, workers)),
        snapshots=sum("snapshots" in path.parts for path in sizes),
        state_objects=len(sizes),
        state_kb_per_step=round(sum(sizes.values()) / 1000 / step, 1),
    )


def weights(initial: dict, step: int) -> dict:
    """Other ones after each step, that stay within bounds."""
    return {name: tensor * (1 + 0.01 * (step % 17)) for name, tensor in initial.items()}


def soak(folder: Path, steps: int) -> Iterator[Window]:
    tiny.write_dataset(folder / "pool", rows=768)
    tiny.write_siglip(folder / "learner", seed=0)
    tiny.write_siglip(folder / "reference", seed=1)
    initial = load_file(folder / "learner" / "model.safetensors")
    with Cluster(folder / "cluster", workers=2) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(folder, "soak"))
        took, since = [], monotonic()
        for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=steps):
            run.push_weights(weights(initial, batch.step), step=batch.step)
            took.append(monotonic() - since)
            if (batch.step + 1) % max(1, steps // WINDOWS) == 0:
                yield measured(cluster, folder / "cluster" / "state", batch.step + 1, took)
                took = []
            since = monotonic()
        run.flush()
        run.close()
    compact(folder / "cluster" / "state")


def compact(state: Path) -> None:
    """Packs the run's receipts, and prints what the state was before and is after."""

    def command(what: str) -> None:
        sys.stdout.flush()
        subprocess.run([BINARY, "state", what, "soak", "--state", state.as_uri()], check=True)

    def tell(when: str) -> None:
        sizes = {path: path.stat().st_size for path in state.rglob("*") if path.is_file()}
        receipts = [size for path, size in sizes.items() if "receipts" in path.parts]
        print(
            f"{when} packing: {len(receipts)} files of receipts, {sum(receipts)} bytes; "
            f"{len(sizes)} files in all, {sum(sizes.values())} bytes"
        )

    tell("before")
    command("compact")
    tell("after")
    command("check")


def grown(windows: list[Window]) -> list[str]:
    """What is not flat."""
    if len(windows) < 3:
        return []
    warm, last = windows[1], windows[-1]
    names = ("coordinator_mb", "worker_mb", "coordinator_files", "worker_files")
    found = [
        f"{name} grew from {getattr(warm, name)} to {getattr(last, name)}"
        for name in names
        if getattr(last, name) > GROWTH_MAX * getattr(warm, name)
    ]
    if last.snapshots > SNAPSHOTS_MAX:
        found.append(f"{last.snapshots} snapshots are kept")
    return found


def main() -> int:
    steps = int(os.environ.get("STEPS") or 1000)
    names = [field.name for field in fields(Window)]
    print(" | ".join(names))
    windows = []
    with tempfile.TemporaryDirectory(prefix="superbatch-soak-") as folder:
        for window in soak(Path(folder), steps):
            windows.append(window)
            print(" | ".join(str(value) for value in astuple(window)), flush=True)
    faults = grown(windows)
    print("\n".join(faults) or "memory and descriptors stay flat")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
