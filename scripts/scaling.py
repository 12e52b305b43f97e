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
# Curves: name, and what differs from the defaults. Curves lie on each other for a few workers: the
# lines and marks tell them apart.
CASES = {
    "64 cores a worker, rows from the workers": ["--direct", "--cores", "64"],
    "16 cores a worker, rows from the workers": ["--direct"],
    "64 cores, references stored": ["--direct", "--cores", "64", "--reference-share", "0"],
    "64 cores, rows through the coordinator": ["--cores", "64"],
}
LOOKS = (
    {"color": "#1668b8", "marker": "o", "linewidth": 3.5, "alpha": 0.75},
    {"color": "#d98300", "marker": "s", "linestyle": "--"},
    {"color": "#8a5fbf", "marker": "^", "linestyle": "-."},
    {"color": "#2f9e44", "marker": "v"},
)
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# A share of the ideal that is still called good.
GOOD = 0.9


def course(binary: str, flags: list[str]) -> list[dict]:
    done = subprocess.run([binary, *flags], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def simulated(binary: str) -> dict[str, list[dict]]:
    """The courses of all cases, told on the way."""
    found = {}
    for name, flags in CASES.items():
        found[name] = course(binary, flags)
        print(name)
        for case, share in zip(found[name], efficiency(found[name]), strict=True):
            print(
                f"  {case['workers']:4} workers {case['seconds_a_step']:8.2f} s a step,"
                f" efficiency {share:.2f}, {case['read_bytes_a_step'] / 1e9:.1f} GB read"
            )
    return found


def efficiency(cases: list[dict]) -> list[float]:
    """The time of one worker, divided by workers times their time."""
    one = cases[0]["seconds_a_step"]
    return [one / (case["workers"] * case["seconds_a_step"]) for case in cases]


def draw(found: dict[str, list[dict]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for (name, cases), look in zip(found.items(), LOOKS, strict=True):
        workers = [case["workers"] for case in cases]
        seconds = [case["seconds_a_step"] for case in cases]
        left.plot(workers, seconds, markersize=5, label=name, **look)
        right.plot(workers, efficiency(cases), markersize=5, **look)
    left.set(title="Seconds a step", xlabel="workers", xscale="log", yscale="log")
    right.set(
        title="Efficiency: one worker's time / (workers × their time)",
        xlabel="workers",
        xscale="log",
        ylim=(0, 1.05),
    )
    right.axhline(GOOD, color="0.4", linewidth=1, linestyle=":")
    right.annotate(
        f"{GOOD}: a tenth is lost",
        (1, GOOD),
        xytext=(0, -5),
        textcoords="offset points",
        va="top",
        fontsize=10,
        color="0.35",
    )
    bound = found["64 cores, rows through the coordinator"][-1]
    left.annotate(
        f"{bound['seconds_a_step']:.0f} s: the coordinator's network",
        (bound["workers"], bound["seconds_a_step"]),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=10,
        color=LOOKS[3]["color"],
    )
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
    low, high = left.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    left.set_yticks(shown, [f"{tick:g}" for tick in shown])
    for axes in (left, right):
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 16, 32, 64, 128])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("A simulation of one step, on a virtual clock", fontsize=13, x=0.01, ha="left")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    found = simulated(sys.argv[1])
    with plt.rc_context(STYLE):
        draw(found, PLOT)


if __name__ == "__main__":
    main()
