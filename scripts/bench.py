"""Runs the benchmarks, and writes one table of their ratios: `make bench`.

Every benchmark prints lines `ratio<TAB>name<TAB>value`, with `goal=`, `better=lower` and
`processor=` after further tabs where they apply. A value is our speed as a multiple of a peer's, or
of what the machine can do, both measured in that run, so more is better unless the line says
otherwise; `processor` is the same ratio by processor time. Times differ from machine to machine,
and ratios much less; so the table is compared with the one that is kept in docs/bench.tsv, and what
moved by more than a tenth is shown, as is a goal that is missed. Neither is a failure. The table is
written after each benchmark. One that fails is named at the end, after the others have run.

    python scripts/bench.py                    all
    python scripts/bench.py kernels images     some
    python scripts/bench.py --keep             writes docs/bench.tsv, too
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs/bench.tsv"
OUT = ROOT / "target/bench.tsv"
#: What each is called with, beside its name.
BENCHES = {
    "kernels": [],
    "images": [],
    "inputs": [],
    "step": [],
    "open": [],
    "service": [],
    "direct": [],
    "tars": [],
    # torch.compile takes minutes, or does not end at all.
    "embed": ["ARGS=--eager-only"],
}
MOVED = 0.1
PREFIX = "ratio\t"
COLUMNS = ("ratio", "value", "goal", "better", "processor")
NONE = "-"


@dataclass(frozen=True)
class Ratio:
    """What one line says."""

    value: float
    goal: float | None = None
    lower_is_better: bool = False
    processor: float | None = None

    @property
    def better(self) -> str:
        return "lower" if self.lower_is_better else "higher"

    @property
    def is_missed(self) -> bool:
        if self.goal is None:
            return False
        return self.value > self.goal if self.lower_is_better else self.value < self.goal


class BenchFailed(Exception):
    """It ended with an error, printed nothing to gather, or a line that cannot be read."""


def line(name: str, ratio: Ratio) -> str:
    """What a benchmark prints, to be read by [`parsed`]."""
    parts = [name, f"{ratio.value:.3f}"]
    if ratio.goal is not None:
        parts.append(f"goal={ratio.goal:g}")
    if ratio.lower_is_better:
        parts.append("better=lower")
    if ratio.processor is not None:
        parts.append(f"processor={ratio.processor:.3f}")
    return PREFIX + "\t".join(parts)


def parsed(said: str) -> tuple[str, Ratio]:
    name, value, *others = said.rstrip("\n").removeprefix(PREFIX).split("\t")
    fields = dict(other.split("=", 1) for other in others)
    better = fields.pop("better", "higher")
    numbers = {field: float(number) for field, number in fields.items()}
    if better not in ("higher", "lower") or numbers.keys() - {"goal", "processor"}:
        raise ValueError(said)
    return name, Ratio(float(value), lower_is_better=better == "lower", **numbers)


def gathered(lines: Iterable[str], show: Callable[[str], None]) -> dict[str, Ratio]:
    """The ratios among a benchmark's lines. All others are shown as they come."""
    ratios = {}
    for said in lines:
        if not said.startswith(PREFIX):
            show(said)
            continue
        try:
            name, ratio = parsed(said)
        except ValueError as error:
            raise BenchFailed(f"it printed {said!r}, which is no ratio") from error
        ratios[name] = ratio
    return ratios


def run(name: str, command: list[str] | None = None) -> dict[str, Ratio]:
    """The ratios that `make bench-NAME` prints.

    A benchmark that fails may have printed some before; they do not count.
    """
    command = command or ["make", "--no-print-directory", f"bench-{name}", *BENCHES[name]]
    print(f"== {' '.join(command)}", flush=True)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        ratios = gathered(bench.stdout, lambda said: print(said, end="", flush=True))
    if bench.returncode:
        raise BenchFailed(f"it ended with {bench.returncode}")
    if not ratios:
        raise BenchFailed("it printed no ratio")
    return ratios


def read(path: Path) -> dict[str, Ratio]:
    if not path.exists():
        return {}
    found = {}
    for row in path.read_text().splitlines()[1:]:
        name, value, goal, better, processor = row.split("\t")
        goal, processor = (None if part == NONE else float(part) for part in (goal, processor))
        found[name] = Ratio(float(value), goal, better == "lower", processor)
    return found


def write(path: Path, ratios: dict[str, Ratio]) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = ["\t".join(COLUMNS)]
    for name, ratio in sorted(ratios.items()):
        goal = NONE if ratio.goal is None else f"{ratio.goal:g}"
        processor = NONE if ratio.processor is None else f"{ratio.processor:.3f}"
        rows.append("\t".join((name, f"{ratio.value:.3f}", goal, ratio.better, processor)))
    path.write_text("\n".join(rows) + "\n")


def moved(now: float | None, before: float | None, lower_is_better: bool) -> str | None:
    """How far a number went, if by more than a tenth."""
    if now is None or not before or abs(now / before - 1) <= MOVED:
        return None
    word = "better" if (now < before) == lower_is_better else "WORSE"
    return f"{word} by {abs(now / before - 1):.0%}"


def compared(ratios: dict[str, Ratio], kept: dict[str, Ratio]) -> list[str]:
    """One line of text for each ratio."""
    width = max(map(len, ratios), default=0)
    lines = []
    for name, ratio in sorted(ratios.items()):
        before = kept.get(name)
        notes = ["new" if before is None else f"kept {before.value:.2f}"]
        if ratio.goal is not None:
            sign = "<=" if ratio.lower_is_better else ">="
            notes.append(f"goal {sign} {ratio.goal:g}{' MISSED' if ratio.is_missed else ''}")
        elif ratio.lower_is_better:
            notes.append("lower is better")
        if before is not None:
            notes.append(moved(ratio.value, before.value, ratio.lower_is_better))
            by_processor = moved(ratio.processor, before.processor, ratio.lower_is_better)
            notes.append(by_processor and f"processor time {by_processor}")
        processor = NONE if ratio.processor is None else f"{ratio.processor:.2f}"
        shown = "; ".join(note for note in notes if note)
        lines.append(f"{name:{width}} {ratio.value:8.2f}  processor {processor:>6}  {shown}")
    return lines


def measure(
    names: Iterable[str], out: Path, keep: Path | None, one: Callable[[str], dict[str, Ratio]]
) -> tuple[dict[str, Ratio], dict[str, str]]:
    """Runs benchmarks, and writes what there is after each. Returns it, and why which failed."""
    ratios: dict[str, Ratio] = {}
    failed: dict[str, str] = {}
    write(out, ratios)
    for name in names:
        try:
            ratios |= one(name)
        except BenchFailed as error:
            failed[name] = str(error)
            print(f"bench-{name} failed: {error}; the others go on", flush=True)
            continue
        write(out, ratios)
        if keep:
            write(keep, read(keep) | ratios)
    return ratios, failed


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("benches", nargs="*", metavar="BENCH", help=", ".join(BENCHES))
    arguments.add_argument("--keep", action="store_true", help="write docs/bench.tsv, too")
    given = arguments.parse_args()
    if unknown := set(given.benches) - set(BENCHES):
        arguments.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    kept = read(KEPT)
    names = given.benches or list(BENCHES)
    ratios, failed = measure(names, OUT, KEPT if given.keep else None, run)
    print("\n".join(compared(ratios, kept)))
    if failed:
        sys.exit("; ".join(f"bench-{name} failed: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    main()
