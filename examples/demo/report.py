"""What came out: results.json and the table. The pictures of it are drawn in `pictures.py`."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet

from .data.captions import MISMATCHED
from .settings import ARMS
from .train import Point, read_curve

# How many stretches an arm is cut into to say what share of mismatched captions it trained on, and
# when.
STRETCHES = 20
# The file of an arm's probes.
PROBES = "probes.json"


@dataclass(frozen=True)
class ArmResult:
    """One arm of one seed: its curve, and the ids of each step's sub-batch."""

    policy: str
    seed: int
    points: list[Point]
    chosen: list[list[str]]
    # What the fidelity probes of an arm that scores small pictures found.
    probes: list[dict] = field(default_factory=list)

    def series(self) -> dict[str, list]:
        return {
            "steps": [point.step for point in self.points],
            "accuracy": [point.accuracy for point in self.points],
            "scanned": [point.scanned for point in self.points],
            "flops": [point.flops for point in self.points],
            "seconds": [point.seconds for point in self.points],
            "seed": self.seed,
            "recall_at_1": [point.recall_at_1 for point in self.points],
            "probes": self.probes,
        }

    def stretches(self) -> list[tuple[int, list[str]]]:
        """(step at the middle, ids chosen) of equal stretches of the arm."""
        size = max(1, len(self.chosen) // STRETCHES)
        return [
            (start + size // 2, sum(self.chosen[start : start + size], []))
            for start in range(0, len(self.chosen) - size + 1, size)
        ]

    def cost_to_reach(self, accuracy: float) -> dict[str, float] | None:
        """Steps, FLOPs and seconds at which the curve first gets there, between evaluations by the
        straight line.
        """
        series = self.series()
        for i, reached in enumerate(series["accuracy"]):
            if reached >= accuracy:
                before = max(0, i - 1)
                rise = reached - series["accuracy"][before]
                share = (accuracy - series["accuracy"][before]) / rise if rise else 0.0
                return {
                    axis: between(series[axis][before], series[axis][i], share)
                    for axis in ("steps", "flops", "seconds")
                }
        return None


def between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def read_arm(policy: str, seed: int, folder: Path) -> ArmResult:
    ranks = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("ids-*.jsonl"))
    ]
    chosen = [[row for rank in step for row in rank] for step in zip(*ranks, strict=True)]
    probes = folder / PROBES
    found = json.loads(probes.read_text()) if probes.exists() else []
    return ArmResult(policy, seed, read_curve(folder), chosen, found)


class Pool:
    """What the demo knows of the pool's rows, by the id that a receipt gives them:
    `<shard>#<row>`.
    """

    def __init__(self, folder: Path):
        self.rows: dict[str, dict] = {}
        for shard in sorted(folder.glob("*.parquet")):
            table = pyarrow.parquet.read_table(shard, columns=["png", "caption", "kind"])
            self.rows |= {f"{shard.name}#{i}": row for i, row in enumerate(table.to_pylist())}

    def mismatched_share(self, ids: Sequence[str]) -> float:
        return sum(self.rows[row]["kind"] in MISMATCHED for row in ids) / max(1, len(ids))


def speedups(arms: dict[str, ArmResult]) -> tuple[dict, dict]:
    """(what each arm needed to reach uniform's final accuracy, how many times less than uniform);
    None: never got there.

    Every arm is taken at the first time that it got there, uniform too: its end may lie below what
    it had before.
    """
    goal = arms["uniform"].points[-1].accuracy
    need = {policy: arm.cost_to_reach(goal) for policy, arm in arms.items()}
    own = need["uniform"]
    times = {
        policy: {axis: own[axis] / cost[axis] if cost and cost[axis] else None for axis in own}
        for policy, cost in need.items()
    }
    return need, times


def mismatched(arm: ArmResult, pool: Pool) -> dict:
    """The share of mismatched captions among all that the arm trained on, and by stretch of the
    run.
    """
    stretches = arm.stretches()
    return {
        "mismatched_share": pool.mismatched_share(sum(arm.chosen, [])),
        "mismatched_by_step": {
            "steps": [step for step, _ in stretches],
            "share": [pool.mismatched_share(ids) for _, ids in stretches],
        },
    }


def write_results(results: Sequence[ArmResult], pool: Pool, out: Path, split: str = "test") -> dict:
    """results.json: `arms` and `speedup` of the first seed, and all seeds under `seeds`."""
    by_seed = []
    for seed in dict.fromkeys(result.seed for result in results):
        arms = {result.policy: result for result in results if result.seed == seed}
        need, times = speedups(arms)
        series = {policy: {**arm.series(), **mismatched(arm, pool)} for policy, arm in arms.items()}
        by_seed.append(
            {"seed": seed, "arms": series, "speedup": times, "needed_for_uniform_final": need}
        )
    first = {key: by_seed[0][key] for key in ("arms", "speedup", "needed_for_uniform_final")}
    whole = {
        **first,
        "split": split,
        "mismatched_share_of_pool": pool.mismatched_share(list(pool.rows)),
        "seeds": by_seed,
    }
    (out / "results.json").write_text(json.dumps(whole, indent=1))
    return whole


# Student's t for a 95 % interval of a mean, by the number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


def student(count: int) -> float:
    """Of more seeds than the table has, by the expansion around the normal distribution's 1.96
    (Abramowitz and Stegun 1964, 26.7.5): right to three digits.
    """
    free = count - 1
    return STUDENT.get(count) or 1.96 + 2.372 / free + 2.823 / free**2 + 2.556 / free**3


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half of its 95 % confidence interval, None of one value)."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, None
    return mean, student(count) * statistics.stdev(values) / count**0.5


def over_seeds(results: dict) -> list[str]:
    """Each arm's mean over seeds, with its interval; nothing if there is one seed."""
    seeds, lines = results["seeds"], []
    if len(seeds) < 2:
        return lines
    lines.append(f"mean of {len(seeds)} seeds, with the 95 % interval of the mean:")
    for name in seeds[0]["arms"]:
        mean, half = spread([100 * seed["arms"][name]["accuracy"][-1] for seed in seeds])
        said = f"{name:<12} ended at R@5 {mean:.1f} % (+- {half:.1f})"
        times = [seed["speedup"][name] for seed in seeds]
        if name != "uniform" and all(time["steps"] for time in times):
            parts = []
            for axis, word in WORDS:
                mean, half = spread([time[axis] for time in times])
                parts.append(f"{mean:.1f} (+- {half:.1f}) times fewer {word}")
            said += f"; to uniform's end {', '.join(parts)}"
        lines.append(said)
    return [*lines, ""]


WORDS = (("steps", "steps"), ("flops", "FLOPs"), ("seconds", "seconds"))
HEADER = (
    f"{'arm':<12} {'R@5':>7} {'R@1':>7} {'mismatched':>11} {'scanned':>9} {'TFLOP':>8} "
    f"{'seconds':>8}"
    f"  | to uniform's end: {'steps':>6} {'TFLOP':>8} {'seconds':>8}"
)


def table(results: dict) -> str:
    """The table that the demo prints, and what it says in words, whichever way it came out."""
    lines = []
    for seed in results["seeds"]:
        arms, need = seed["arms"], seed["needed_for_uniform_final"]
        goal = arms["uniform"]["accuracy"][-1]
        lines += [
            f"seed {seed['seed']}: image-to-text recall on the held-out vendor, names of "
            f"`{results['split']}`; uniform ended at R@5 = {goal:.1%}",
            HEADER,
        ]
        lines += [row(policy, arms[policy], need[policy]) for policy in ARMS if policy in arms]
        lines += [
            "",
            *(sentence(policy, seed) for policy in ARMS if policy != "uniform" and policy in arms),
            *(probed(policy, arm["probes"]) for policy, arm in arms.items() if arm["probes"]),
            "",
        ]
    lines += over_seeds(results)
    lines.append(
        "mismatched: rows trained on whose caption is another picture's or junk. In the pool they "
        "are "
        f"{results['mismatched_share_of_pool']:.0%}; only the demo knows which, never the selector."
    )
    return "\n".join(lines)


def row(policy: str, arm: dict, need: dict | None) -> str:
    reached = (
        f"{need['steps']:>24.0f} {need['flops'] / 1e12:>8.2f} {need['seconds']:>8.0f}"
        if need
        else f"{'not reached':>24}"
    )
    return (
        f"{policy:<12} {arm['accuracy'][-1]:>7.1%} {arm['recall_at_1'][-1]:>7.1%} "
        f"{arm['mismatched_share']:>11.0%} "
        f"{arm['scanned'][-1]:>9} {arm['flops'][-1] / 1e12:>8.2f} {arm['seconds'][-1]:>8.0f}  | "
        f"{reached}"
    )


def sentence(policy: str, seed: dict) -> str:
    times = seed["speedup"][policy]
    if not seed["needed_for_uniform_final"]["uniform"]["steps"]:
        return f"{policy}: uniform ended no better than it began, so there is no end to reach."
    if times["steps"] is None:
        what = "The filter" if policy == "filtered" else "Selection"
        return f"{policy}: did not reach uniform's final accuracy. {what} lost here."
    said = [f"{against_uniform(times[axis])} {word}" for axis, word in WORDS]
    return f"{policy}: reached uniform's final accuracy with {', '.join(said)}."


def probed(policy: str, probes: Sequence[dict]) -> str:
    """What small pictures cost in choice, over the arm's probes."""
    mean = {name: statistics.fmean(probe[name] for probe in probes) for name in probes[0]}
    gain = mean["score_full"] - mean["score_uniform"]
    kept = (mean["score_approximate"] - mean["score_uniform"]) / gain if gain > 0 else 0.0
    return (
        f"{policy}: of {len(probes)} probes, rank correlation of small and full pictures' scores "
        f"{mean['rank_correlation']:.2f}, {mean['overlap']:.0%} of the draw the same, {kept:.0%} "
        "of the gain kept."
    )


def against_uniform(times: float) -> str:
    return f"{times:.1f} times fewer" if times >= 1 else f"{1 / times:.1f} times MORE"
