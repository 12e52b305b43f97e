"""Runs the benchmarks, and writes one table of their ratios: `make bench`.

Every benchmark prints lines `ratio<TAB>name<TAB>value`: our speed as a multiple of a peer's, or of
what the machine can do, both measured in that run. Times differ from machine to machine, and ratios
much less; so the table is compared with the one that is kept in docs/bench.tsv, and what moved by
more than a tenth is shown. Nothing fails by it.

    python scripts/bench.py                    all
    python scripts/bench.py kernels images     some
    python scripts/bench.py --keep             writes docs/bench.tsv, too
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs/bench.tsv"
OUT = ROOT / "target/bench.tsv"
BENCHES = ("kernels", "images", "step", "open", "service", "tars", "embed")
#: Of some: torch.compile takes minutes, and a table of all should not wait for it.
ARGUMENTS = {"embed": ["ARGS=--eager-only"]}
MOVED = 0.1


def run(name: str) -> dict[str, float]:
    """The ratios that `make bench-NAME` prints. Its output is shown as it comes."""
    print(f"== make bench-{name}", flush=True)
    command = ["make", "--no-print-directory", f"bench-{name}", *ARGUMENTS.get(name, [])]
    ratios = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        for line in bench.stdout:
            if line.startswith("ratio\t"):
                _, of, value = line.rstrip("\n").split("\t")
                ratios[of] = float(value)
            else:
                print(line, end="", flush=True)
    if bench.returncode or not ratios:
        sys.exit(f"make bench-{name} failed, or printed no ratio")
    return ratios


def read(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    rows = (line.split("\t") for line in path.read_text().splitlines()[1:])
    return {of: float(value) for of, value in rows}


def write(path: Path, ratios: dict[str, float]) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = "".join(f"{of}\t{value:.3f}\n" for of, value in sorted(ratios.items()))
    path.write_text("ratio\tvalue\n" + rows)


def compare(ratios: dict[str, float], kept: dict[str, float]) -> None:
    width = max(map(len, ratios))
    for of, value in sorted(ratios.items()):
        before = kept.get(of)
        note = "new" if before is None else f"{before:8.2f}"
        if before is not None and abs(value / before - 1) > MOVED:
            note += f"  {'faster' if value > before else 'SLOWER'} by {abs(value / before - 1):.0%}"
        print(f"{of:{width}} {value:8.2f}  kept: {note}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("benches", nargs="*", metavar="BENCH", help=", ".join(BENCHES))
    arguments.add_argument("--keep", action="store_true", help="write docs/bench.tsv, too")
    given = arguments.parse_args()
    if unknown := set(given.benches) - set(BENCHES):
        arguments.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    kept, ratios = read(KEPT), {}
    for name in given.benches or BENCHES:
        ratios |= run(name)
    write(OUT, ratios)
    if given.keep:
        write(KEPT, kept | ratios)
    compare(ratios, kept)


if __name__ == "__main__":
    main()
