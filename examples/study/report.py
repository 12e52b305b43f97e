"""Tables and the figure of docs/study.md, from the curves that are kept."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy

from examples.demo.evaluate import GALLERY
from examples.demo.report import spread
from examples.demo.settings import ARMS

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLOURS = {name: arm.colour for name, arm in ARMS.items()} | {
    "filtered": "#8a5fbf",
    "flexi": "#1b8a5a",
}
SPLITS = {"val": "val", "test": "held-out vendor"}


def read(out: Path) -> dict[tuple[str, float], dict[str, dict[int, list[dict]]]]:
    """(experiment, learning rate) to arm to seed to curve."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for path in sorted(out.glob("*.json")):
        about = json.loads(path.read_text())
        found[about["experiment"], about["settings"]["learning_rate"]][about["arm"]["name"]][
            about["seed"]
        ] = about["curve"]
    return found


def reached(curve: Sequence[dict], goal: float, split: str = "test") -> dict[str, float] | None:
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


def rows(arms: dict[str, dict[int, list[dict]]]) -> list[str]:
    """A Markdown table of an experiment's arms, means over seeds with the 95 % interval of the
    mean.
    """
    lines = [
        "| arm | seeds | R@5, val | R@5, test | wrong | repeats | fewer steps | fewer FLOPs | "
        "fewer seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in arms.items():
        ends = [curve[-1] for curve in seeds.values()]
        cells = [
            name,
            str(len(ends)),
            *(said([100 * end[split][1] for end in ends], " %") for split in SPLITS),
        ]
        cells += [
            f"{100 * numpy.mean([p['wrong'] for c in seeds.values() for p in c[1:]]):.0f} %",
            f"{100 * numpy.mean([p['repeats'] for c in seeds.values() for p in c[1:]]):.0f} %",
        ]
        lines.append("| " + " | ".join([*cells, *against_uniform(arms, name)]) + " |")
    return lines


def against_uniform(arms: dict, name: str) -> list[str]:
    """How many times less than uniform the arm needed to come to uniform's end on the test set."""
    if name == "uniform" or "uniform" not in arms:
        return ["", "", ""]
    times = defaultdict(list)
    for seed, curve in arms[name].items():
        uniform = arms["uniform"].get(seed)
        own = uniform and reached(uniform, uniform[-1]["test"][1])
        cost = own and reached(curve, uniform[-1]["test"][1])
        if not cost or not cost["step"]:
            return ["not reached" if own else "", "", ""]
        for axis in cost:
            times[axis].append(own[axis] / cost[axis])
    return [said(times[axis]) for axis in ("step", "flops", "seconds")]


def draw(found: dict, path: Path) -> None:
    """One panel an experiment with an arm `uniform`: the test curves by step."""
    shown = {
        key: arms
        for key, arms in found.items()
        if "uniform" in arms and key[0] in ("main", "flat", "zipf-1.3")
    }
    figure, panels = pyplot.subplots(
        1, max(1, len(shown)), figsize=(5 * max(1, len(shown)), 4), sharey=True, squeeze=False
    )
    for panel, ((experiment, _), arms) in zip(panels[0], shown.items(), strict=False):
        for name, seeds in arms.items():
            curves = list(seeds.values())
            length = min(len(curve) for curve in curves)
            ups = 100 * numpy.array(
                [[point["test"][1] for point in curve[:length]] for curve in curves]
            )
            steps = [point["step"] for point in curves[0][:length]]
            panel.plot(steps, ups.mean(axis=0), color=COLOURS.get(name, "#000000"), label=name)
            panel.fill_between(
                steps,
                ups.min(axis=0),
                ups.max(axis=0),
                color=COLOURS.get(name, "#000000"),
                alpha=0.15,
            )
        panel.set(
            title=f"{experiment}, {max(len(seeds) for seeds in arms.values())} seeds",
            xlabel="steps",
        )
        panel.grid(alpha=0.2)
        panel.legend(frameon=False)
    panels[0, 0].set_ylabel(f"R@5 among {GALLERY} names, held-out vendor (%)")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def report(out: Path) -> None:
    found = read(out)
    for (experiment, rate), arms in found.items():
        print(f"### {experiment}, learning rate {rate:g}\n")
        print("\n".join(rows(arms)), end="\n\n")
    draw(found, out / "study.png")
