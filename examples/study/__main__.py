"""`python -m examples.study`: the queue. Trains what is missing in the results, one arm of one seed
after the other, and appends each as a line. End it at any time: what is there is not trained again.

    python -m examples.study --list             what is in the queue, with minutes, and what is done
    nice python -m examples.study               all that is missing, in the order of the list
    python -m examples.study --minutes 60       begins nothing after an hour
    python -m examples.study main flat --seeds 0
    python -m examples.study --report           the tables and the figure of docs/study.md
"""

import argparse
import time
from pathlib import Path

import torch

from examples.demo.data.packages import DemoError

from .experiments import EXPERIMENTS, Entry, entries
from .harness import Run
from .results import RESULTS, Results
from .world import World


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}"
    )
    parser.add_argument("--seeds", help="comma-separated (default: each experiment's)")
    parser.add_argument("--arms", help="some of the arms, comma-separated (default: all)")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many")
    parser.add_argument(
        "--cache", type=Path, default=Path("target/demo-cache"), help="the demo's cache"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help=f"where the curves go (default {RESULTS})"
    )
    parser.add_argument("--list", action="store_true", help="what there is to do, and is done")
    parser.add_argument("--report", action="store_true", help="tables and the figure")
    parser.add_argument(
        "--figure", type=Path, default=Path("target/study.png"), help="where the figure goes"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; see --help")
    return args


def wanted(args: argparse.Namespace) -> list[Entry]:
    seeds = args.seeds and {int(seed) for seed in args.seeds.split(",")}
    arms = args.arms and set(args.arms.split(","))
    return [
        entry
        for entry in entries(args.experiments or None, sorted(seeds) if seeds else None)
        if not arms or entry.arm.name in arms
    ]


def show(queue: list[Entry], results: Results) -> None:
    """The list, an experiment a line."""
    sums = [0.0, 0.0]
    for name in dict.fromkeys(entry.experiment for entry in queue):
        of = [entry for entry in queue if entry.experiment == name]
        left = [entry for entry in of if entry.key not in results.done]
        minutes = [sum(entry.minutes for entry in part) for part in (of, left)]
        sums = [total + part for total, part in zip(sums, minutes, strict=True)]
        arms = ", ".join(dict.fromkeys(entry.arm.name for entry in of))
        print(
            f"{name:<15} {len(of) - len(left):>3} of {len(of):>2} done, {minutes[1]:>5.1f} of "
            f"{minutes[0]:>5.1f} min left: {EXPERIMENTS[name].about} ({arms})"
        )
    print(f"in all {sums[1]:.0f} of {sums[0]:.0f} minutes left, on one idle core; each pool, and")
    print("each reference that is not in the cache, takes 1 to 4 minutes more, of two cores")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    results, queue = Results(args.results), wanted(args)
    if args.list:
        show(queue, results)
        return
    if args.report:
        from .report import report

        report(results, args.figure)
        return
    torch.set_num_threads(1)
    # As in the demo's ranks: such numbers are many times slower.
    torch.set_flush_denormal(True)
    args.cache.mkdir(parents=True, exist_ok=True)
    begun, world, of_world = time.monotonic(), None, None
    left = [entry for entry in queue if entry.key not in results.done]
    for number, entry in enumerate(left, 1):
        if args.minutes and time.monotonic() - begun > 60 * args.minutes:
            print(f"{len(left) - number + 1} are left for another time")
            return
        # The same key twice in one list: two experiments share an arm.
        if entry.key in results.done:
            continue
        needed = entry.about.world_key
        if needed != of_world:
            world, of_world = entry.about.world(args.cache.resolve()), needed
        print(f"{number} of {len(left)}: {entry.name}, about {entry.minutes:.1f} min", flush=True)
        train(entry, world, results)


def train(entry: Entry, world: World, results: Results) -> None:
    begun = time.monotonic()
    settings = entry.about.of(entry.arm)
    curve = Run(world, entry.arm, settings, entry.seed, entry.about.conditions).run()
    wall = time.monotonic() - begun
    results.append(entry, curve, wall)
    end = " ".join(f"{split} {100 * curve[-1][split][1]:.1f}" for split in ("val", "test"))
    print(f"  R@5 {end} after {curve[-1]['step']} steps in {wall / 60:.1f} min", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (DemoError, KeyboardInterrupt) as error:
        raise SystemExit(f"study: {error or 'stopped'}") from None
