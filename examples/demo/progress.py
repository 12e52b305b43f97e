"""Shows progress: bars on a terminal, or one line a stage if the log is a file."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm


class Stage:
    """One stage of the demo. On a terminal it is a bar of `total` units; elsewhere it is one line
    when it ends.
    """

    def __init__(self, desc: str, total: int, unit: str, silent: bool = False):
        self.desc, self.unit, self.silent, self.done, self.note = desc, unit, silent, 0, ""
        self.begun = time.monotonic()
        shown = not silent and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=desc, unit=unit, smoothing=0.1) if shown else None

    def update(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif not self.silent:
            spent = time.monotonic() - self.begun
            ending = f"; {self.note}" if self.note else ""
            # Of megabytes there is no plural.
            unit = f"{self.unit}s" if self.unit.islower() else self.unit
            print(
                f"{self.desc}: {self.done:,} {unit} in {spent:.0f} s{ending}",
                file=sys.stderr,
                flush=True,
            )


def progress(things: Iterable[Any], total: int, desc: str, unit: str) -> Iterator[Any]:
    """The things, with a `Stage` that counts them; none if there is nothing to do."""
    stage = Stage(desc, total, unit, silent=total == 0)
    for thing in things:
        yield thing
        stage.update()
    stage.close()
