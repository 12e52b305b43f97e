"""What came out, drawn: curves of accuracy against four prices, and contact sheets of chosen and
rejected pictures.
"""

import io
import random
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy
from PIL import Image

from .data.captions import MISMATCHED
from .report import ArmResult, Pool, spread
from .settings import ARMS

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

COLOURS = {arm.name: arm.colour for arm in ARMS.values()}
# Where colours are hard to tell apart, and where curves lie on each other, the lines still differ.
DASHES = {"flexi": (5, 1.5), "independent": (2, 1.2), "filtered": (7, 1.5, 1.5, 1.5)}
# By key in results.json: title, label and unit of the axis.
PRICES = {
    "steps": ("step", "steps", 1),
    "scanned": ("example scanned", "thousand examples scanned", 1e3),
    "flops": ("FLOP", "TFLOP of service and trainer", 1e12),
    "seconds": ("second", "seconds, all on the same cores", 1),
}
NEEDED = {"steps": "steps", "flops": "FLOP", "seconds": "seconds"}
WRONG, RIGHT, FAINT = "#c5221f", "#202124", "#5f6368"
COLUMNS, ROWS = 8, 4
TITLE = "One model, one trainer, one pool: only who chooses the batch differs"
# Uniform has fallen if it is so many points below where it began.
FALLEN = 1.0
STYLE = {
    "font.size": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "legend.frameon": False,
}


def draw_curves(results: dict, path: Path, note: str) -> None:
    """Six panels: accuracy by step, by example scanned, by FLOP and by second; mismatched captions;
    what was needed.
    """
    seeds = results["seeds"]
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(2, 3, figsize=(15, 10.4))
        accuracy = [panels[0, 0], panels[0, 1], panels[1, 0], panels[1, 1]]
        for panel, price in zip(accuracy, PRICES, strict=True):
            draw_accuracy(panel, seeds, price, results.get("split", "test"))
        explain_fall(accuracy[0], seeds)
        draw_mismatched(panels[0, 2], results)
        draw_needed(panels[1, 2], seeds)
        figure.suptitle(TITLE, fontsize=20, x=0.012, ha="left")
        # Of all panels: within one there is no room that the curves leave free.
        lines = {line.get_label(): line for line in accuracy[0].get_lines()}
        named = [name for name in COLOURS if name in lines]
        figure.legend(
            [lines[name] for name in named], named, loc="lower center", ncols=5, fontsize=16
        )
        drawn = (
            f"Mean of {len(seeds)} seeds. Shaded: from the lowest to the highest seed. Thin lines: "
            "95 % interval of the mean.  "
            if len(seeds) > 1
            else ""
        )
        figure.text(0.5, 0.052, drawn + note, ha="center", fontsize=10, color=FAINT)
        figure.tight_layout(rect=(0, 0.07, 1, 0.99), h_pad=1.5, w_pad=1.5)
        save(figure, path)


def save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def styled(policy: str) -> dict:
    given = {"color": COLOURS[policy], "linewidth": 2.6}
    return given | ({"dashes": DASHES[policy]} if policy in DASHES else {})


def name_line(panel: Axes, height: float, name: str) -> None:
    """Writes what a horizontal line is above its right end."""
    panel.annotate(
        name,
        (panel.get_xlim()[1], height),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=12,
        color=FAINT,
    )


def draw_accuracy(panel: Axes, seeds: Sequence[dict], price: str, split: str) -> None:
    """The mean over seeds, and between the lowest and the highest one a shade."""
    title, label, unit = PRICES[price]
    for policy, colour in COLOURS.items():
        curves = [seed["arms"][policy] for seed in seeds if policy in seed["arms"]]
        if not curves:
            continue
        across = numpy.mean([curve[price] for curve in curves], axis=0) / unit
        ups = 100 * numpy.array([curve["accuracy"] for curve in curves])
        if len(curves) > 1:
            low, high = ups.min(axis=0), ups.max(axis=0)
            panel.fill_between(across, low, high, color=colour, alpha=0.13, linewidth=0)
        up = ups.mean(axis=0)
        panel.plot(across, up, label=policy, **styled(policy))
        panel.plot(across[-1:], up[-1:], "o", color=colour, markersize=6)
    goal = 100 * numpy.mean([seed["arms"]["uniform"]["accuracy"][-1] for seed in seeds])
    panel.axhline(goal, color=COLOURS["uniform"], linewidth=1.2, linestyle=":")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    name_line(panel, goal, "where uniform ends")
    judged = "held-out vendor" if split == "test" else f"names of {split}"
    panel.set(title=f"Accuracy by {title}", xlabel=label, ylabel=f"R@5, {judged} (%)")
    panel.grid(alpha=0.2)


def explain_fall(panel: Axes, seeds: Sequence[dict]) -> None:
    """Says why uniform's curve begins downwards, if it does."""
    curves = [seed["arms"]["uniform"] for seed in seeds]
    up = 100 * numpy.mean([curve["accuracy"] for curve in curves], axis=0)
    lowest = int(up.argmin())
    if up[lowest] < up[0] - FALLEN:
        panel.annotate(
            "all begin at the same weights;\nwrong captions set uniform back",
            (curves[0]["steps"][lowest], up[lowest]),
            xytext=(34, -4),
            textcoords="offset points",
            va="center",
            fontsize=11,
            color=FAINT,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8},
        )


def draw_mismatched(panel: Axes, results: dict) -> None:
    for policy in COLOURS:
        shares = [
            seed["arms"][policy]["mismatched_by_step"]
            for seed in results["seeds"]
            if policy in seed["arms"]
        ]
        if not shares:
            continue
        mean = 100 * numpy.mean([share["share"] for share in shares], axis=0)
        panel.plot(shares[0]["steps"], mean, **styled(policy))
    whole = 100 * results["mismatched_share_of_pool"]
    panel.axhline(whole, color=FAINT, linewidth=1.2, linestyle=":")
    panel.set_xlim(left=0)
    panel.set_ylim(0, 75)
    name_line(panel, whole, f"in the pool: {whole:.0f} %")
    panel.set(title="Wrong captions trained on", xlabel="steps", ylabel="share of the batch (%)")
    panel.grid(alpha=0.2)


def draw_needed(panel: Axes, seeds: Sequence[dict]) -> None:
    """Bars: how many times less than uniform an arm needed to come to uniform's end; the mean over
    seeds, as in the table, and its 95 % interval.
    """
    arms = [policy for policy in COLOURS if policy != "uniform" and policy in seeds[0]["speedup"]]
    height, widest = 0.8 / max(1, len(arms)), 1.0
    for row, policy in enumerate(arms):
        times = [seed["speedup"][policy] for seed in seeds if policy in seed["speedup"]]
        for place, price in enumerate(NEEDED):
            y = place + (row - (len(arms) - 1) / 2) * height
            reached = all(one[price] for one in times)
            mean, half = spread([one[price] for one in times]) if reached else (0.0, None)
            widest = max(widest, mean + (half or 0))
            panel.barh(y, mean, height * 0.88, color=COLOURS[policy])
            if half:
                panel.plot([max(0, mean - half), mean + half], [y, y], color=RIGHT, linewidth=1)
            panel.annotate(
                f"{mean:.1f}" if reached else "never got there",
                (mean + (half or 0), y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=12,
                color=RIGHT,
            )
    panel.axvline(1, color=FAINT, linewidth=1.2, linestyle=":")
    panel.set_yticks(range(len(NEEDED)), NEEDED.values())
    panel.set_xlim(0, widest * 1.18)
    panel.invert_yaxis()
    panel.set(title="To where uniform ends", xlabel="times fewer than uniform")


def draw_sheets(arm: ArmResult, pool: Pool, out: Path, credits: str) -> list[Path]:
    """What the arm chose in its last quarter, and rows of the pool that it never chose. Wrong
    captions in red.
    """
    rng = random.Random(arm.seed)
    quarter = max(1, len(arm.chosen) // 4)
    late = sorted({row for step in arm.chosen[-quarter:] for row in step})
    never = sorted(pool.rows.keys() - {row for step in arm.chosen for row in step})
    chosen_path, never_path = out / "chosen.png", out / "never-chosen.png"
    draw_sheet(
        late, pool, rng, f"Chosen by {arm.policy} in its last {quarter} steps", chosen_path, credits
    )
    draw_sheet(
        never,
        pool,
        rng,
        f"Never chosen by {arm.policy} in {len(arm.chosen)} steps",
        never_path,
        credits,
    )
    return [chosen_path, never_path]


def draw_sheet(
    ids: Sequence[str], pool: Pool, rng: random.Random, title: str, path: Path, credits: str
) -> None:
    """A sample of these rows, each with its caption under it."""
    with pyplot.rc_context(STYLE):
        figure, cells = pyplot.subplots(ROWS, COLUMNS, figsize=(13.5, 9))
        for cell in cells.flat:
            cell.axis("off")
        for cell, row in zip(
            cells.flat, rng.sample(ids, min(ROWS * COLUMNS, len(ids))), strict=False
        ):
            draw_cell(cell, pool.rows[row])
        wrong = f"{pool.mismatched_share(ids):.0%} carry another picture's caption or junk (red)"
        figure.text(0.012, 0.965, title, fontsize=15, fontweight="bold")
        figure.text(
            0.012,
            0.938,
            f"{len(ids):,} rows, of which {wrong}. A sample:",
            fontsize=10.5,
            color=FAINT,
        )
        figure.text(0.5, 0.008, credits, ha="center", fontsize=7.5, color=FAINT)
        figure.subplots_adjust(
            left=0.012, right=0.988, top=0.92, bottom=0.065, wspace=0.12, hspace=0.34
        )
        save(figure, path)


def draw_cell(cell: Axes, row: dict) -> None:
    wrong = row["kind"] in MISMATCHED
    cell.imshow(Image.open(io.BytesIO(row["png"])), interpolation="lanczos")
    caption = textwrap.fill(row["caption"], 23, max_lines=3, placeholder=" …").replace("$", r"\$")
    cell.text(
        0.5,
        -0.03,
        caption,
        transform=cell.transAxes,
        ha="center",
        va="top",
        fontsize=8,
        linespacing=1.15,
        color=WRONG if wrong else RIGHT,
    )
    if wrong:
        cell.add_patch(
            pyplot.Rectangle(
                (0, 0), 1, 1, transform=cell.transAxes, fill=False, edgecolor=WRONG, linewidth=1.6
            )
        )
