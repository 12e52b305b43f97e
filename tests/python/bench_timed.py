"""What benchmarks of a whole service share: what a gigabyte took, and the lines that `make bench`
gathers.
"""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import superbatch
from bench_turns import processor_seconds
from cluster import BINARY

from scripts import bench
from scripts.bench import Ratio

#: LibTorch's threads wait for each other by spinning, unless they are told not to.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


def announce() -> None:
    """Says what is measured, since a build without optimisation gives other figures."""
    print(f"service: {BINARY}, client: {Path(superbatch.__file__).parent}")
    print("the service runs with " + ", ".join(f"{k}={v}" for k, v in ENVIRONMENT.items()))


class Timed:
    """The least of seconds, and of processor seconds, that a gigabyte took.

    Processor seconds are of this process, and of those that are named.
    """

    def __init__(self, name: str):
        self.name, self.seconds, self.processor = name, float("inf"), float("inf")

    def take(self, work: Callable[[], int], *processes: int) -> None:
        begun, own, others = perf_counter(), process_time(), processor_seconds(*processes)
        gigabytes = work() / 1e9
        self.seconds = min(self.seconds, (perf_counter() - begun) / gigabytes)
        used = process_time() - own + processor_seconds(*processes) - others
        self.processor = min(self.processor, used / gigabytes)


def ratio(name: str, value: float, **others: float | bool | None) -> None:
    """Prints a line that `make bench` gathers."""
    print(bench.line(name, Ratio(value, **others)), flush=True)


def speed(title: str, ours: Timed, peer: Timed, goal: float | None = None) -> None:
    """Our speed as a multiple of a peer's, which is what more is better of."""
    ratio(
        f"{title}: speed of {peer.name}",
        peer.seconds / ours.seconds,
        goal=goal,
        processor=peer.processor / ours.processor if ours.processor else None,
    )


def show(title: str, ours: Timed, others: list[Timed]) -> None:
    print(
        f"\n{title}\n{'':48}{'MB/s':>8}{'s/GB':>8}{'processor s/GB':>16}"
        f"{'time, ours = 1':>16}{'processor':>11}"
    )
    for row in (ours, *others):
        print(
            f"{row.name:48}{1e3 / row.seconds:8.0f}{row.seconds:8.2f}{row.processor:16.2f}"
            f"{row.seconds / ours.seconds:16.2f}{row.processor / ours.processor:11.2f}"
        )
