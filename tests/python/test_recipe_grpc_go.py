"""examples/grpc/go: a client in Go, generated and built from the .proto files alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recipe import EXAMPLES, SUB_BATCH_SIZE, Recipes, recipes  # noqa: F401  (a fixture)

GO = shutil.which("go")
# What the machine's own settings may say otherwise.
SETTINGS = {"GOFLAGS": "-buildvcs=false", "GOWORK": "off"}


def built(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **SETTINGS, **environment},
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Path:
    """The program, built as its page says; the first time it takes some minutes of one core."""
    if GO is None:
        pytest.skip("SKIPPED the Go client: Go 1.26 is not here (https://go.dev)")
    folder = tmp_path_factory.mktemp("go") / "go"
    given = shutil.ignore_patterns("bin", "client", "superbatchv1")
    shutil.copytree(EXAMPLES / "grpc" / "go", folder, ignore=given)
    fetched = built(folder, GO, "mod", "download")
    if fetched.returncode != 0:
        # A machine with Go and without its module proxy can still test the rest.
        pytest.skip(f"SKIPPED the Go client: no modules: {fetched.stderr[-500:]}")
    # protoc itself, as grpcio-tools brings it.
    protoc = folder.parent / "protoc"
    protoc.write_text(f'#!/bin/sh\nexec {sys.executable} -m grpc_tools.protoc "$@"\n')
    protoc.chmod(0o755)
    environment = {
        "PATH": f"{protoc.parent}:{Path(GO).parent}:{os.environ['PATH']}",
        "PROTO": str(EXAMPLES.parent / "proto"),
    }
    for command in (["generate"], ["vet", "./..."], ["build", "-o", "client", "."]):
        done = built(folder, GO, *command, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "client"


def given(recipes: Recipes, run_id: str, **more) -> list[str]:
    """Those of the arguments of all recipes that it has; it pushes nothing."""
    words = recipes.arguments(run_id, **more)
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for name, value in pairs if name != "--learner" for word in (name, value)]


def test_it_selects_and_goes_on(recipes: Recipes, client: Path):  # noqa: F811
    told = {}
    for start, steps in ((0, 2), (1, 4)):
        done = built(
            client.parent, str(client), *given(recipes, "go", **{"start-step": start}, steps=steps)
        )
        assert done.returncode == 0, done.stderr
        first, *lines = done.stdout.splitlines()
        assert first.startswith("1024 rows; ")
        for line in lines:
            step, rest = line.split(": ", 1)
            # A step that is asked for again is the same.
            assert told.setdefault(step, rest) == rest
    receipts = recipes.receipts("go", 4)
    for step, receipt in enumerate(receipts):
        said = re.fullmatch(
            rf"{SUB_BATCH_SIZE} rows, (\d+) bytes of images, batch score (\S+); "
            r"the first is (\S+): a \w+ \w+",
            told[f"step {step}"],
        )
        assert int(said[1]) > 100 * SUB_BATCH_SIZE
        assert float(said[2]) == pytest.approx(receipt.summary.batch_score, abs=6e-4)
        assert said[3] in {row.id for row in receipt.chosen}
        assert (receipt.summary.policy, receipt.summary.criterion) == ("joint", "easy")
        assert receipt.summary.learner is None


def test_it_tells_the_reason_of_an_error(recipes: Recipes, client: Path):  # noqa: F811
    wrong = given(recipes, "go-wrong", steps=1)
    wrong[wrong.index("--sub-batch-size") + 1] = "65"
    done = built(client.parent, str(client), *wrong)
    assert done.returncode == 1 and done.stderr.startswith("RUN_SPEC_IMPOSSIBLE: ")


def test_it_is_formatted():
    if GO is None:
        pytest.skip("SKIPPED the Go client: Go 1.26 is not here (https://go.dev)")
    done = built(EXAMPLES / "grpc" / "go", "gofmt", "-l", "main.go")
    assert (done.returncode, done.stdout) == (0, "")
