"""Runs the simulation of scaling (`server/examples/scaling.rs`) and plots it: docs/scaling.png.

python scripts/scaling.py target/release/examples/scaling
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLOT = Path(__file__).parents[1] / "docs" / "scaling.png"
# Curves: name and what differs from the defaults.
CASES = {
    "16 cores a worker, rows from the workers": ["--direct"],
    "64 cores a worker, rows from the workers": ["--direct", "--cores", "64"],
    "64 cores, rows through the coordinator": ["--cores", "64"],
    "64 cores, references stored": ["--direct", "--cores", "64", "--reference-share", "0"],
}


def course(binary: str, flags: list[str]) -> list[dict]:
    done = subprocess.run([binary, *flags], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    binary = sys.argv[1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, flags in CASES.items():
        cases = course(binary, flags)
        one = cases[0]["seconds_a_step"]
        workers = [case["workers"] for case in cases]
        seconds = [case["seconds_a_step"] for case in cases]
        efficiency = [one / (n * s) for n, s in zip(workers, seconds, strict=True)]
        left.plot(workers, seconds, marker="o", markersize=3, label=name)
        right.plot(workers, efficiency, marker="o", markersize=3)
        print(name)
        for case, share in zip(cases, efficiency, strict=True):
            print(
                f"  {case['workers']:4} workers {case['seconds_a_step']:8.2f} s a step,"
                f" efficiency {share:.2f}, {case['read_bytes_a_step'] / 1e9:.1f} GB read"
            )
    left.set(xscale="log", yscale="log", xlabel="workers", ylabel="seconds a step")
    right.set(xscale="log", xlabel="workers", ylabel="efficiency", ylim=(0, 1.05))
    right.axhline(0.9, color="gray", linewidth=0.8, linestyle=":")
    left.legend(fontsize=7)
    for axes in (left, right):
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 16, 32, 64, 128])
        axes.minorticks_off()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()
