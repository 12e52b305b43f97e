"""`make chaos`: KILLS, SECONDS and SEED of the environment say how much of what."""

import os
import random
import sys
import tempfile
from pathlib import Path

from .verdict import run


def number(name: str, kind):
    text = os.environ.get(name)
    return kind(text) if text else None


def main() -> int:
    kills, seconds, seed = number("KILLS", int), number("SECONDS", float), number("SEED", int)
    if kills is None and seconds is None:
        kills = 200
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    folder = os.environ.get("CHAOS_OUT") or tempfile.mkdtemp(prefix="superbatch-chaos-")
    verdict = run(Path(folder), seed, kills, seconds)
    print(verdict)
    return 0 if verdict.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
