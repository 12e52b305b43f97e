"""`make demo`: data, reference, then one training run through Superbatch for each arm and seed,
then what came out.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .settings import Preset

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CREDITS = (
    "Drawings, not photographs: OpenMoji (CC-BY-SA-4.0), Fluent Emoji (MIT), "
    "Noto (Apache-2.0), Twemoji (CC-BY-4.0)"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("DEMO_OUT") or "target/demo"),
        help="where results go (DEMO_OUT; default target/demo)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("DEMO_CACHE") or "target/demo-cache"),
        help="downloads, data and the reference, kept between runs (DEMO_CACHE; default "
        "target/demo-cache)",
    )
    parser.add_argument(
        "--seeds",
        default=os.environ.get("SEEDS"),
        help="comma-separated (SEEDS; default 0,1,2; with --quick 0)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        default=os.environ.get("QUICK", "") not in ("", "0"),
        help="one seed, a reference of 750 steps in place of 1,500, 400 steps of uniform in place "
        "of 600 and 100 of each other arm in place of 300 (QUICK=1)",
    )
    parser.add_argument(
        "--flat",
        action="store_true",
        default=os.environ.get("POOL", "") == "flat",
        help="a pool in which every concept has the same share, instead of the long tail "
        "(POOL=flat)",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        default=os.environ.get("VALIDATE", "") not in ("", "0"),
        help="judge on the names of `val`, to choose settings by, and not on those of `test` "
        "(VALIDATE=1)",
    )
    parser.add_argument("--steps", type=int, help="steps of each arm, instead of the preset's")
    parser.add_argument("--data-only", action="store_true", help="build the data set and stop")
    parser.add_argument(
        "--redraw", action="store_true", help="draw demo.png again from results.json, and stop"
    )
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from .data.packages import DemoError

    try:
        run_demo(args)
    except DemoError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopped", file=sys.stderr)
        return 130
    return 0


def run_demo(args: argparse.Namespace) -> None:
    import dataclasses

    from . import settings as presets
    from .data.build import build_dataset

    begun = time.monotonic()
    cache, out = args.cache.resolve(), args.out.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    if args.redraw:
        from .pictures import draw_curves

        draw_curves(json.loads((out / "results.json").read_text()), out / "demo.png", CREDITS)
        return
    preset = presets.QUICK if args.quick else presets.FULL
    pool = dataclasses.replace(preset.pool, zipf=0.0 if args.flat else preset.pool.zipf)
    arms = dataclasses.replace(preset.arms, steps=args.steps or preset.arms.steps)
    seeds = tuple(int(seed) for seed in args.seeds.split(",")) if args.seeds else preset.seeds
    preset = dataclasses.replace(
        preset, pool=pool, arms=arms, seeds=seeds, split="val" if args.validate else "test"
    )
    dataset = build_dataset(cache, pool, os.cpu_count() or 1)
    if args.data_only:
        print(f"data: {dataset}")
        return
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(dataset / "CREDITS.txt", out / "CREDITS.txt")
    results = train(preset, cache, dataset, out)
    report(results, dataset, out, preset.split)
    print(f"\nin {(time.monotonic() - begun) / 60:.1f} minutes; everything is in {out}")


def train(preset: "Preset", cache: Path, dataset: Path, out: Path) -> list:
    """The reference, then every arm of every seed, each with a server and a state of its own."""
    from .reference import clip_score_of_best, train_reference
    from .report import read_arm
    from .service import Arm, run_arm, serve
    from .settings import ARMS
    from .train import KEPT

    reference = train_reference(cache, dataset, preset.reference)
    print(
        "while an arm trains: its batches, and why they were chosen, are at "
        "http://127.0.0.1:9465 (docs/page.md)",
        flush=True,
    )
    results = []
    for seed in preset.seeds:
        for selection in ARMS.values():
            folder = out / f"{selection.name}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            best, pool = selection.best, dataset / "pool"
            arm = Arm(
                selection,
                seed,
                preset.of(selection),
                dataset,
                reference,
                reference,
                folder,
                reference / KEPT,
                clip_score_of_best(reference, pool, best) if best else None,
                preset.split,
            )
            with serve(folder) as address:
                run_arm(arm, address)
            # Its state stays, for `superbatch receipts`, and with the newest weights for
            # `superbatch replay`.
            results.append(read_arm(selection.name, seed, folder))
    return results


def report(results: list, dataset: Path, out: Path, split: str) -> None:
    from .pictures import draw_curves, draw_sheets
    from .report import Pool, table, write_results

    pool = Pool(dataset / "pool")
    written = write_results(results, pool, out, split)
    text = table(written)
    (out / "table.txt").write_text(text + "\n")
    print("\n" + text + "\n")
    draw_curves(written, out / "demo.png", CREDITS)
    joint = next(result for result in results if result.policy == "joint")
    sheets = draw_sheets(joint, pool, out, CREDITS)
    about = json.loads((dataset / "dataset.json").read_text())["rows"]
    print(
        f"pool of {about['pool']} rows, evaluated on pictures by a vendor that neither pool nor "
        f"clean set has, on the names of `{split}`"
    )
    for path in (out / "results.json", out / "demo.png", *sheets):
        print(f"  {path}")
    joint_state = (out / f"joint-{joint.seed}" / "state").as_uri()
    print(f"every step of it: superbatch page --state {joint_state}")
    last = joint.points[-1].step - 1
    asked = f"demo-joint-{joint.seed} --step {last}"
    print(f"why a batch was chosen: superbatch receipts {asked} --state {joint_state}")
    print(
        f"and by another policy: superbatch replay {asked} --policy independent --state "
        f"{joint_state}"
    )


if __name__ == "__main__":
    sys.exit(main())
