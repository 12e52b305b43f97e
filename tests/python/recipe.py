"""For the tests of the recipes: inputs, a service, and ways to run what is under `examples` as its
readers do.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import superbatch
from cluster import Cluster

from examples.demo import tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SUPER_BATCH_SIZE, SUB_BATCH_SIZE = 64, 16


class Recipes(NamedTuple):
    """A service, and a folder with a pool, a learner and a reference."""

    address: str
    inputs: Path

    def arguments(self, run_id: str, **more) -> list[str]:
        """The command line that all recipes understand."""
        given = {
            "service": self.address,
            "run-id": run_id,
            "pool": (self.inputs / "pool").as_uri(),
            "learner": self.inputs / "learner",
            "reference": self.inputs / "reference",
            "super-batch-size": SUPER_BATCH_SIZE,
            "sub-batch-size": SUB_BATCH_SIZE,
            **more,
        }
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    def run(self, run_id: str) -> superbatch.Record:
        return superbatch.connect(self.address).get_run(run_id)

    def receipts(self, run_id: str, steps: int) -> list[superbatch.Record]:
        """Those of the run's first steps."""
        client = superbatch.connect(self.address)
        fields = client.get_run(run_id).spec
        spec = superbatch.RunSpec(
            run_id=run_id,
            **{
                name: value
                for name, value in fields.items()
                if name in superbatch.RunSpec.__dataclass_fields__
            },
        )
        run = client.open_run(spec, incarnation="reads receipts")
        return [run.receipt(step) for step in range(steps)]

    def choices(self, run_id: str, steps: int) -> list[list[str]]:
        return [[row.id for row in receipt.chosen] for receipt in self.receipts(run_id, steps)]

    def assert_trained(self, run_id: str, steps: int, lag: int = 1, every: int = 1) -> None:
        """All steps were scored with the weights that the lag asks for, and all pushes arrived."""
        for step, receipt in enumerate(self.receipts(run_id, steps)):
            newest = max(step - 1 - lag, -1)
            due = (newest + 1) // every * every - 1
            told = receipt.summary
            assert (told.policy, told.mode, told.learner.step) == ("joint", "normal", due), step
            assert len(receipt.chosen) == SUB_BATCH_SIZE
        assert self.run(run_id).learner.step == steps // every * every - 1


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Iterator[Recipes]:
    folder = tmp_path_factory.mktemp("recipes")
    tiny.write_dataset(folder / "pool", rows=1024)
    tiny.write_siglip(folder / "learner", seed=0)
    tiny.write_siglip(folder / "reference", seed=1)
    with Cluster(folder / "cluster") as cluster:
        yield Recipes(cluster.address, folder)


def module(folder: str, name: str = "train") -> ModuleType:
    """A recipe's file, in this process: what it imports is there already."""
    path = EXAMPLES / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{folder}_{name}", path)
    made = importlib.util.module_from_spec(spec)
    # As for a script, its own folder comes first.
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(made)
    finally:
        sys.path.remove(str(path.parent))
    return made


def script(path: str, arguments: list[str], ranks: int = 1, **environment: str) -> str:
    """Runs a recipe as a script, with several ranks by torchrun. Returns what it printed."""
    ways = []
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        # Else torchrun takes --logs for an abbreviation of an option of its own.
        ways = [*torchrun, "--"]
    done = subprocess.run(
        [sys.executable, *ways, str(EXAMPLES / path), *arguments],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **environment,
        },
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
