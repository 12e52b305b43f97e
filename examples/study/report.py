"""Tables and the figure of docs/study.md, from the curves that are kept."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy

from examples.demo.evaluate import GALLERY
from examples.demo.report import spread
from examples.demo.settings import ARMS

from .experiments import EXPERIMENTS
from .results import Curve, Results

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

COLOURS = {name: arm.colour for name, arm in ARMS.items()} | {"filtered": "#8a5fbf"}
# Where the colours of two arms are hard to tell apart, the lines are not.
DASHES = {"flexi": (5, 1.5), "independent": (2, 1.2), "filtered": (7, 1.5, 1.5, 1.5)}
SPLITS = {"val": "val", "test": "held-out vendor"}
# What the figure shows, and what its panels are called.
PANELS = {
    "main": "A long tail (Zipf 1.0): the demo's pool",
    "zipf-1.3": "A longer tail (Zipf 1.3)",
    "flat": "No tail: every concept alike",
}
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}

# Arm to seed to curve.
Curves = dict[str, dict[int, Curve]]


def reached(curve: Curve, goal: float, split: str = "test") -> dict[str, float] | None:
    """What the curve had cost where it first came to the goal, on the straight line between
    evaluations.
    """
    for i, point in enumerate(curve):
        high = point[split][1]
        if high >= goal:
            before = curve[max(0, i - 1)]
            rise = high - before[split][1]
            share = (goal - before[split][1]) / rise if rise > 0 else 0.0
            return {
                axis: before[axis] + share * (point[axis] - before[axis])
                for axis in ("step", "flops", "seconds")
            }
    return None


def said(values: Sequence[float], unit: str = "") -> str:
    mean, half = spread(values)
    return f"{mean:.1f}{unit}" if half is None else f"{mean:.1f} ± {half:.1f}{unit}"


def mean(seeds: dict[int, Curve], name: str) -> float:
    """Over the evaluations of all seeds, but the first, before which there was no batch."""
    return float(numpy.mean([point[name] for curve in seeds.values() for point in curve[1:]]))


COLUMNS = (
    "arm",
    "seeds",
    "R@5, val",
    "R@5, test",
    "wrong",
    "repeats",
    "false negatives",
    "own",
    "pairs",
    "fewer steps",
    "fewer FLOPs",
    "fewer seconds",
)


def rows(arms: Curves, uniform: dict[int, Curve] | None = None) -> list[str]:
    """A Markdown table of an experiment's arms, means over seeds with the 95 % interval of the
    mean. `uniform` are the curves to compare with, by default the experiment's own.
    """
    uniform = uniform or arms.get("uniform", {})
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, seeds in arms.items():
        ends = [curve[-1] for curve in seeds.values()]
        cells = [
            name,
            str(len(ends)),
            *(said([100 * end[split][1] for end in ends], " %") for split in SPLITS),
            *(f"{100 * mean(seeds, share):.0f} %" for share in ("wrong", "repeats")),
            *(f"{mean(seeds, term):.2f}" for term in ("false", "own", "pairs")),
            *(["", "", ""] if name == "uniform" else against_uniform(seeds, uniform)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def against_uniform(seeds: dict[int, Curve], uniform: dict[int, Curve]) -> list[str]:
    """How many times less than uniform the arm needed to come to uniform's end on the test set."""
    times = defaultdict(list)
    for seed, curve in seeds.items():
        if seed not in uniform:
            return ["uniform is missing", "", ""]
        goal = uniform[seed][-1]["test"][1]
        own, cost = reached(uniform[seed], goal), reached(curve, goal)
        if cost is None:
            return ["not reached", "", ""]
        # All arms of a seed begin alike: where one begins at uniform's end, so does uniform.
        if not own["step"] or not cost["step"]:
            return ["no end to reach", "", ""]
        for axis in cost:
            times[axis].append(own[axis] / cost[axis])
    return [said(times[axis]) for axis in ("step", "flops", "seconds")]


def counted(arms: Curves) -> str:
    """How many seeds stand behind the panel's lines."""
    counts = {name: len(seeds) for name, seeds in arms.items()}
    most = max(counts.values())
    others = [f"{name} {count}" for name, count in counts.items() if count != most]
    each = f"{most} seed{'s' if most > 1 else ''} of each arm"
    return f"{each}, but {', '.join(others)}" if others else each


def draw(found: dict[str, Curves], path: Path) -> None:
    """The test curves by step, one panel a pool."""
    shown = {name: found[name] for name in PANELS if found.get(name)}
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, max(1, len(shown)), figsize=(4.4 * max(1, len(shown)) + 0.4, 4.6), sharey=True
        )
        names: dict[str, object] = {}
        for panel, (experiment, arms) in zip(numpy.ravel(panels), shown.items(), strict=False):
            names |= draw_panel(panel, experiment, arms)
        first = numpy.ravel(panels)[0]
        first.set_ylabel(f"R@5 among {GALLERY} names,\nheld-out vendor (%)")
        first.set_ylim(bottom=0)
        # Below the panels: beside the curves there is no room that all of them leave free.
        figure.legend(names.values(), names.keys(), loc="lower center", ncols=5, frameon=False)
        figure.text(
            0.5,
            0.075,
            "Lines: mean over seeds. Shaded: from the lowest to the highest seed. "
            "Dotted: where uniform ends.",
            ha="center",
            fontsize=9.5,
            color="#5f6368",
        )
        figure.tight_layout(rect=(0, 0.11, 1, 1))
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def draw_panel(panel: Axes, experiment: str, arms: Curves) -> dict[str, object]:
    """Returns the lines by arm, for the legend."""
    lines = {}
    for name, seeds in arms.items():
        curves, colour = list(seeds.values()), COLOURS.get(name, "#000000")
        length = min(len(curve) for curve in curves)
        ups = 100 * numpy.array(
            [[point["test"][1] for point in curve[:length]] for curve in curves]
        )
        steps = [point["step"] for point in curves[0][:length]]
        (lines[name],) = panel.plot(steps, ups.mean(axis=0), color=colour, linewidth=2)
        if name in DASHES:
            lines[name].set_dashes(DASHES[name])
        if len(curves) > 1:
            low, high = ups.min(axis=0), ups.max(axis=0)
            panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    if "uniform" in arms:
        goal = 100 * numpy.mean([curve[-1]["test"][1] for curve in arms["uniform"].values()])
        panel.axhline(goal, color=COLOURS["uniform"], linewidth=1, linestyle=":")
    panel.set_title(f"{PANELS[experiment]}\n{counted(arms)}", fontsize=11, loc="left")
    panel.set_xlabel("steps")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.2)
    return lines


def report(results: Results, figure: Path) -> None:
    found = results.by_experiment()
    for experiment, arms in found.items():
        uniform = found.get(EXPERIMENTS[experiment].baseline, {}).get("uniform")
        print(f"### {experiment}: {EXPERIMENTS[experiment].about}\n")
        print("\n".join(rows(arms, uniform)), end="\n\n")
    if found:
        draw(found, figure)
        print(f"drawn: {figure}")
