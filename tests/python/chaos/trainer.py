"""The trainer as its launcher sees it: ranks in processes of their own, killed together or one by
one.
"""

import json
import multiprocessing
import os
import signal
from pathlib import Path

from . import rank

# Ranks are forked from a process that has imported everything: a start takes a tenth of a second.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["chaos.rank"])


class Trail:
    """What a rank wrote down, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.path, self.read, self.lines = path, 0, []

    def update(self) -> list[dict]:
        """All lines so far. A last one that was cut short, by a kill, is left out."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.read)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self.read += len(whole) + 1
                self.lines += [json.loads(line) for line in whole.splitlines()]
        return self.lines


class Trainer:
    """One start of the trainer."""

    def __init__(self, folder: Path, number: int, places: list[rank.Place]) -> None:
        self.number, self.places = number, places
        self.trails = [Trail(Path(place.log)) for place in places]
        self.processes = [
            CONTEXT.Process(target=rank.main, args=(place,), name=f"rank {place.rank}")
            for place in places
        ]
        for process in self.processes:
            process.start()
        #: Ranks that were killed.
        self.killed: set[int] = set()

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self, ranks=None) -> None:
        for number, process in enumerate(self.processes):
            if ranks is None or number in ranks:
                process.kill()
                process.join()
                self.killed.add(number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def lines(self, what: str) -> list[list[dict]]:
        """Of each rank, what it wrote of this kind."""
        return [[line for line in trail.update() if line["what"] == what] for trail in self.trails]

    def has_begun(self) -> bool:
        """Whether the service has let it in."""
        return any(self.lines("batch"))

    def completed(self) -> int:
        """The newest step that all of its ranks were served; -1 before that."""
        newest = [
            max((line["step"] for line in lines), default=-1) for lines in self.lines("batch")
        ]
        return min(newest)

    def is_done(self) -> bool:
        return all(self.lines("done"))

    def faults(self, is_current: bool) -> list[str]:
        """What no rank should meet, and ends without a reason."""
        found = []
        for place, fatal, errors, done, process in zip(
            self.places,
            self.lines("fatal"),
            self.lines("error"),
            self.lines("done"),
            self.processes,
        ):
            name = f"rank {place.rank} of trainer {self.number}"
            found += [f"{name}: {line['reason']}: {line['message']}" for line in fatal]
            replaced = any(line["reason"] == rank.REPLACED for line in errors)
            if is_current and replaced:
                found.append(f"{name}, of the newest trainer, was told that it was replaced")
            ended = not process.is_alive() and place.rank not in self.killed
            if ended and not (fatal or replaced or done):
                found.append(f"{name} ended by itself with code {process.exitcode}")
        return found
