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
from .evaluate import GALLERY
from .report import ArmResult, Pool
from .settings import ARMS

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

COLOURS = {arm.name: arm.colour for arm in ARMS.values()}
# By key in results.json: title, label and unit of the axis.
PRICES = {
    "steps": ("step", "steps", 1),
    "scanned": ("example scanned", "thousand examples scanned", 1e3),
    "flops": ("FLOP", "TFLOP of service and trainer", 1e12),
    "seconds": ("second", "seconds, service and trainer on the same cores", 1),
}
NEEDED = {"steps": "steps", "flops": "FLOP", "seconds": "seconds"}
WRONG, RIGHT, FAINT = "#c5221f", "#202124", "#5f6368"
COLUMNS, ROWS = 8, 4
TITLE = "One model, one trainer, one pool: only who chooses the batch differs"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "legend.frameon": False,
}


def draw_curves(results: dict, path: Path, note: str) -> None:
    """Six panels: accuracy by step, by example scanned, by FLOP and by second; mismatched captions;
    what was needed.
    """
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(2, 3, figsize=(15, 8.6))
        accuracy = [panels[0, 0], panels[0, 1], panels[1, 0], panels[1, 1]]
        for panel, price in zip(accuracy, PRICES, strict=True):
            draw_accuracy(panel, results["seeds"], price)
        accuracy[0].legend(loc="lower right")
        draw_mismatched(panels[0, 2], results)
        draw_needed(panels[1, 2], results["seeds"])
        figure.suptitle(TITLE, fontsize=15, x=0.012, ha="left")
        figure.text(0.5, 0.006, note, ha="center", fontsize=7.5, color=FAINT)
        figure.tight_layout(rect=(0, 0.02, 1, 0.99), h_pad=2, w_pad=2)
        save(figure, path)


def save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_accuracy(panel: Axes, seeds: Sequence[dict], price: str) -> None:
    """One thin line a seed, and the mean in bold."""
    title, label, unit = PRICES[price]
    for policy, colour in COLOURS.items():
        curves = [seed["arms"][policy] for seed in seeds if policy in seed["arms"]]
        if not curves:
            continue
        for curve in curves if len(curves) > 1 else []:
            panel.plot(
                numpy.divide(curve[price], unit),
                numpy.multiply(curve["accuracy"], 100),
                color=colour,
                alpha=0.35,
                linewidth=1,
            )
        across = numpy.mean([curve[price] for curve in curves], axis=0) / unit
        up = 100 * numpy.mean([curve["accuracy"] for curve in curves], axis=0)
        named = policy if len(curves) == 1 else f"{policy}, mean of {len(curves)}"
        panel.plot(across, up, color=colour, linewidth=2.2, label=named)
        panel.plot(across[-1:], up[-1:], "o", color=colour, markersize=5)
    goal = 100 * numpy.mean([seed["arms"]["uniform"]["accuracy"][-1] for seed in seeds])
    panel.axhline(goal, color=COLOURS["uniform"], linewidth=1, linestyle=":")
    panel.set(
        title=f"Accuracy by {title}",
        xlabel=label,
        ylabel=f"R@5 among {GALLERY} names, held-out vendor (%)",
    )
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.2)


def draw_mismatched(panel: Axes, results: dict) -> None:
    for policy, colour in COLOURS.items():
        shares = [
            seed["arms"][policy]["mismatched_by_step"]
            for seed in results["seeds"]
            if policy in seed["arms"]
        ]
        if not shares:
            continue
        mean = 100 * numpy.mean([share["share"] for share in shares], axis=0)
        panel.plot(shares[0]["steps"], mean, color=colour, linewidth=2.2)
    whole = 100 * results["mismatched_share_of_pool"]
    panel.axhline(
        whole, color=FAINT, linewidth=1, linestyle=":", label=f"in the pool: {whole:.0f} %"
    )
    panel.legend(loc="upper right")
    panel.set(
        title="Mismatched captions trained on", xlabel="steps", ylabel="share of the sub-batch (%)"
    )
    panel.set_xlim(left=0)
    panel.set_ylim(0, 75)
    panel.grid(alpha=0.2)


def draw_needed(panel: Axes, seeds: Sequence[dict]) -> None:
    """Bars: what each arm needed to reach uniform's final accuracy, as a share of uniform's; the
    mean over seeds.
    """
    height = 0.78 / len(COLOURS)
    widest = 1.0
    for row, (policy, colour) in enumerate(COLOURS.items()):
        times = [seed["speedup"][policy] for seed in seeds if policy in seed["speedup"]]
        for place, price in enumerate(NEEDED):
            y = place + (row - (len(COLOURS) - 1) / 2) * height
            reached = bool(times) and all(one[price] for one in times)
            share = float(numpy.mean([1 / one[price] for one in times])) if reached else 0.0
            widest = max(widest, share)
            panel.barh(y, share, height * 0.9, color=colour)
            panel.annotate(
                f"{share:.2f}" if reached else "never got there",
                (share, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=colour,
            )
    panel.axvline(1, color=FAINT, linewidth=1, linestyle=":")
    panel.set_yticks(range(len(NEEDED)), NEEDED.values())
    panel.set_xlim(0, widest * 1.15)
    panel.invert_yaxis()
    panel.set(
        title="Needed to reach uniform's final accuracy", xlabel="uniform = 1; shorter is better"
    )


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
