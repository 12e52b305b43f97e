"""What came out: results.json, the table, the picture of four panels, and the contact sheets."""

import io
import json
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy
import pyarrow.parquet
from PIL import Image

from .data.captions import MISMATCHED
from .settings import ARMS
from .train import Point, read_curve

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLOURS = {"uniform": "#7a7a7a", "independent": "#d98300", "joint": "#1668b8"}
AXES = {"steps": "steps", "scanned": "examples scanned", "flops": "FLOP (service + trainer)", "seconds": "seconds"}
PICTURES_A_SHEET = 40


@dataclass(frozen=True)
class ArmResult:
    """One arm of one seed: its curve, and the ids of each step's sub-batch."""

    policy: str
    seed: int
    points: list[Point]
    chosen: list[list[str]]

    def series(self) -> dict[str, list]:
        return {
            "steps": [point.step for point in self.points], "accuracy": [point.accuracy for point in self.points],
            "scanned": [point.scanned for point in self.points], "flops": [point.flops for point in self.points],
            "seconds": [point.seconds for point in self.points], "seed": self.seed,
            "recall_at_1": [point.recall_at_1 for point in self.points],
        }

    def cost_to_reach(self, accuracy: float) -> dict[str, float] | None:
        """Steps, FLOPs and seconds at which the curve first gets there, between evaluations by the straight line."""
        series = self.series()
        curve = [0.0, *series["accuracy"]]
        for i, reached in enumerate(series["accuracy"]):
            if reached >= accuracy:
                share = 1.0 if reached == curve[i] else (accuracy - curve[i]) / (reached - curve[i])
                return {axis: between([0.0, *series[axis]][i], series[axis][i], share)
                        for axis in ("steps", "flops", "seconds")}
        return None


def between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def read_arm(policy: str, seed: int, folder: Path) -> ArmResult:
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("ids-*.jsonl"))]
    chosen = [[row for rank in step for row in rank] for step in zip(*ranks, strict=True)]
    return ArmResult(policy, seed, read_curve(folder), chosen)


class Pool:
    """What the demo knows of the pool's rows, by the id that a receipt gives them: `<shard>#<row>`."""

    def __init__(self, folder: Path):
        self.rows: dict[str, dict] = {}
        for shard in sorted(folder.glob("*.parquet")):
            table = pyarrow.parquet.read_table(shard, columns=["png", "caption", "kind"])
            self.rows |= {f"{shard.name}#{i}": row for i, row in enumerate(table.to_pylist())}

    def mismatched_share(self, ids: Sequence[str]) -> float:
        return sum(self.rows[row]["kind"] in MISMATCHED for row in ids) / max(1, len(ids))


def speedups(arms: dict[str, ArmResult]) -> tuple[dict, dict]:
    """(what each arm needed to reach uniform's final accuracy, how many times less than uniform); None: never got there."""
    goal = arms["uniform"].points[-1].accuracy
    need = {policy: arm.cost_to_reach(goal) for policy, arm in arms.items()}
    last = arms["uniform"].points[-1]
    whole = {"steps": last.step, "flops": last.flops, "seconds": last.seconds}
    times = {policy: {axis: whole[axis] / cost[axis] if cost and cost[axis] else None for axis in whole}
             for policy, cost in need.items()}
    return need, times


def write_results(results: Sequence[ArmResult], pool: Pool, out: Path) -> dict:
    """results.json: `arms` and `speedup` of the first seed, and all seeds under `seeds`."""
    by_seed = []
    for seed in dict.fromkeys(result.seed for result in results):
        arms = {result.policy: result for result in results if result.seed == seed}
        need, times = speedups(arms)
        series = {policy: {**arm.series(), "mismatched_share": pool.mismatched_share(sum(arm.chosen, []))}
                  for policy, arm in arms.items()}
        by_seed.append({"seed": seed, "arms": series, "speedup": times, "needed_for_uniform_final": need})
    whole = {**{key: by_seed[0][key] for key in ("arms", "speedup", "needed_for_uniform_final")}, "seeds": by_seed}
    (out / "results.json").write_text(json.dumps(whole, indent=1))
    return whole


HEADER = (f"{'arm':<12} {'R@5':>7} {'R@1':>7} {'mismatched':>11} {'scanned':>9} {'TFLOP':>8} {'seconds':>8}"
          f"  | to uniform's end: {'steps':>6} {'TFLOP':>8} {'seconds':>8}")


def table(results: dict, pool_share: float) -> str:
    """The table that the demo prints, and what it says in words, whichever way it came out."""
    lines = []
    for seed in results["seeds"]:
        arms, need = seed["arms"], seed["needed_for_uniform_final"]
        goal = arms["uniform"]["accuracy"][-1]
        lines += [f"seed {seed['seed']}: image-to-text recall on the held-out vendor; uniform ended at R@5 = {goal:.1%}", HEADER]
        lines += [row(policy, arms[policy], need[policy]) for policy in ARMS if policy in arms]
        lines += ["", *(sentence(policy, seed) for policy in ARMS if policy != "uniform" and policy in arms), ""]
    lines.append(f"mismatched: rows trained on whose caption is another picture's or junk. In the pool they are {pool_share:.0%}; "
                 "only the demo knows which, never the selector.")
    return "\n".join(lines)


def row(policy: str, arm: dict, need: dict | None) -> str:
    reached = (f"{need['steps']:>24.0f} {need['flops'] / 1e12:>8.2f} {need['seconds']:>8.0f}" if need
               else f"{'not reached':>24}")
    return (f"{policy:<12} {arm['accuracy'][-1]:>7.1%} {arm['recall_at_1'][-1]:>7.1%} {arm['mismatched_share']:>11.0%} "
            f"{arm['scanned'][-1]:>9} {arm['flops'][-1] / 1e12:>8.2f} {arm['seconds'][-1]:>8.0f}  | {reached}")


def sentence(policy: str, seed: dict) -> str:
    times = seed["speedup"][policy]
    if times["steps"] is None:
        return f"{policy}: did not reach uniform's final accuracy. Selection lost here."
    said = [f"{against_uniform(times['steps'])} steps", f"{against_uniform(times['flops'])} FLOPs", f"{against_uniform(times['seconds'])} seconds"]
    return f"{policy}: reached uniform's final accuracy with {', '.join(said)}."


def against_uniform(times: float) -> str:
    return f"{times:.1f} times fewer" if times >= 1 else f"{1 / times:.1f} times MORE"


def draw_curves(results: dict, path: Path, note: str) -> None:
    """Accuracy by step, by example scanned, by FLOP and by second: one thin line a seed, the mean in bold where there are several."""
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), sharey=True)
    for panel, (axis, label) in zip(panels.flat, AXES.items(), strict=True):
        for policy, colour in COLOURS.items():
            curves = [seed["arms"][policy] for seed in results["seeds"] if policy in seed["arms"]]
            several = len(curves) > 1
            for curve in curves:
                panel.plot(curve[axis], numpy.multiply(curve["accuracy"], 100), color=colour, alpha=0.35 if several else 1,
                           linewidth=1 if several else 2, label=None if several else policy)
            if several:
                panel.plot(numpy.mean([curve[axis] for curve in curves], axis=0),
                           100 * numpy.mean([curve["accuracy"] for curve in curves], axis=0), color=colour, linewidth=2.2,
                           label=f"{policy} (mean of {len(curves)})")
        goal = 100 * numpy.mean([seed["arms"]["uniform"]["accuracy"][-1] for seed in results["seeds"]])
        panel.axhline(goal, color=COLOURS["uniform"], linewidth=0.8, linestyle=":")
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
    for panel in panels[:, 0]:
        panel.set_ylabel("image-to-text R@5, held-out vendor (%)")
    panels[0, 0].legend()
    figure.suptitle("The same model, trainer and data: only who chooses the batch differs")
    figure.text(0.5, 0.005, note, ha="center", fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_sheets(arm: ArmResult, pool: Pool, out: Path, credits: str) -> list[Path]:
    """What the arm chose in its last quarter, and rows of the pool that it never chose. Wrong captions in red."""
    rng = random.Random(arm.seed)
    late = sorted({row for step in arm.chosen[len(arm.chosen) * 3 // 4:] for row in step})
    never = sorted(pool.rows.keys() - {row for step in arm.chosen for row in step})
    chosen_path, never_path = out / "chosen.png", out / "never-chosen.png"
    draw_sheet([pool.rows[row] for row in sample(late, rng)], f"Chosen by {arm.policy} in its last {len(arm.chosen) // 4} steps",
               chosen_path, credits)
    draw_sheet([pool.rows[row] for row in sample(never, rng)], f"Never chosen by {arm.policy} in {len(arm.chosen)} steps",
               never_path, credits)
    return [chosen_path, never_path]


def sample(rows: list[str], rng: random.Random) -> list[str]:
    return rng.sample(rows, min(PICTURES_A_SHEET, len(rows)))


def draw_sheet(rows: Sequence[dict], title: str, path: Path, credits: str) -> None:
    wrong = sum(row["kind"] in MISMATCHED for row in rows) / max(1, len(rows))
    figure, cells = pyplot.subplots(5, 8, figsize=(12.5, 9.2))
    for cell in cells.flat:
        cell.axis("off")
    for cell, row in zip(cells.flat, rows, strict=False):
        cell.imshow(Image.open(io.BytesIO(row["png"])))
        caption = textwrap.fill(row["caption"], 24, max_lines=2, placeholder="…").replace("$", r"\$")
        cell.set_title(caption, fontsize=7, color="#b3261e" if row["kind"] in MISMATCHED else "#111111")
    figure.suptitle(f"{title}: {wrong:.0%} of these captions belong to another picture or are junk (red)")
    figure.text(0.5, 0.005, credits, ha="center", fontsize=6, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
