"""`python -m examples.study EXPERIMENT`: trains an experiment's arms, seed by seed, and keeps each
curve.

What is kept is not trained again. `python -m examples.study --report` makes the tables and the
figure of docs/study.md.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch

from examples.demo.settings import FULL

from .experiments import EXPERIMENTS, RATES
from .harness import Run
from .world import World


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.study", description=__doc__)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--seeds", default="0", help="comma-separated (default 0)")
    parser.add_argument(
        "--arms", help="some of the experiment's arms, comma-separated (default: all)"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("target/demo-cache"), help="the demo's cache"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("target/study"), help="where the curves go"
    )
    parser.add_argument(
        "--report", action="store_true", help="tables and the figure from the curves"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.report:
        from .report import report

        report(args.out)
        return
    if args.experiment is None:
        raise SystemExit(f"name an experiment: {', '.join(EXPERIMENTS)}; or --report")
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    experiment = EXPERIMENTS[args.experiment]
    world = World.of(args.cache.resolve(), experiment.pool, FULL.reference)
    rates = RATES if args.experiment == "rates" else (experiment.settings.learning_rate,)
    wanted = args.arms.split(",") if args.arms else [arm.name for arm in experiment.arms]
    for seed in (int(seed) for seed in args.seeds.split(",")):
        for rate in rates:
            settings = dataclasses.replace(experiment.settings, learning_rate=rate)
            for arm in experiment.arms:
                if arm.name in wanted:
                    train(args, world, arm, settings, seed)


def train(args: argparse.Namespace, world: World, arm, settings, seed: int) -> None:
    path = args.out / f"{args.experiment}-{arm.name}-{settings.learning_rate:g}-{seed}.json"
    if path.exists():
        return

    def say(point: dict) -> None:
        found = " ".join(f"{split} {100 * point[split][1]:.1f}" for split in ("val", "test"))
        print(
            f"{path.stem} step {point['step']} R@5 {found} wrong {point['wrong']:.2f} repeats "
            f"{point['repeats']:.2f} "
            f"scale {point['scale'][0]:.1f} {point['seconds']:.0f} s",
            flush=True,
        )

    begun = time.monotonic()
    # Arms that select show in half of the steps what they can, and cost three times as much to
    # watch.
    own = settings if arm.policy == "uniform" else settings.shortened(FULL.selecting)
    curve = Run(world, arm, own, seed).run(say)
    about = {
        "experiment": args.experiment,
        "arm": dataclasses.asdict(arm),
        "settings": dataclasses.asdict(settings),
        "pool": dataclasses.asdict(EXPERIMENTS[args.experiment].pool),
        "seed": seed,
        "wall": time.monotonic() - begun,
        "curve": curve,
    }
    path.write_text(json.dumps(about))


if __name__ == "__main__":
    main()
