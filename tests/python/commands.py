"""The commands, run as people and scripts run them."""

import subprocess
from pathlib import Path

from cluster import BINARY, DEADLINE_SECONDS

GOLDEN = Path(__file__).parents[2] / "scoring-kernels" / "tests" / "golden"


CASE = GOLDEN / "joint-sigmoid-learnability-B64-b16-N4.safetensors"


# How clap ends for a command line that it cannot parse.
USAGE = 2


def run(*arguments, **settings) -> subprocess.CompletedProcess:
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.run(
        [BINARY, *map(str, arguments)], text=True, timeout=DEADLINE_SECONDS, **settings
    )


def prints(*arguments) -> str:
    ended = run(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def fails(*arguments, code: int = 1) -> str:
    """The one line of an error. Nothing of it, and no half of a result, goes to standard output."""
    ended = run(*arguments)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert "panicked" not in ended.stderr
    if code == USAGE:
        return ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("superbatch: ")]
    assert len(said) == 1, ended.stderr
    return said[0]
