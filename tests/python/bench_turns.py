"""What benchmarks share that take turns: processes that wait for theirs, what a turn took, and the
least of all turns.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

#: Seconds, and processor seconds.
Took = tuple[float, float]


def processor_seconds(*processes: int) -> float:
    """User and system time of other processes, with their threads."""
    total = 0.0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


class Waiting:
    """A process that works once for each line, and answers with a line."""

    def __init__(self, *command: str | Path):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self) -> tuple[list[str], float]:
        """The words of its answer, and its processor seconds."""
        before = processor_seconds(self.process.pid)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        return answer, processor_seconds(self.process.pid) - before

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def timed(work: Callable[[], None]) -> Callable[[], Took]:
    """A turn of what this process does itself."""

    def turn() -> Took:
        wall, processor = perf_counter(), process_time()
        work()
        return perf_counter() - wall, process_time() - processor

    return turn


def least(calls: dict[str, Callable[[], Took]], turns: int) -> dict[str, Took]:
    """The least that a turn of each took. One more turn, before the others, warms up."""
    found = {name: (float("inf"), float("inf")) for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            took = call()
            if turn:
                best = zip(found[name], took, strict=True)
                found[name] = tuple(min(pair) for pair in best)
    return found
