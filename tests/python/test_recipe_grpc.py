"""examples/grpc: a client that knows the .proto files and nothing else of ours."""

import subprocess
import sys

from recipe import EXAMPLES, SUB_BATCH_SIZE, Recipes, recipes  # noqa: F401  (a fixture)


def client(arguments: list[str], code: int = 0) -> subprocess.CompletedProcess:
    # In a process of its own: it makes a package `superbatch.v1`, and the Python client is named
    # superbatch too.
    done = subprocess.run(
        [sys.executable, "-E", str(EXAMPLES / "grpc/client.py"), *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done


def test_it_selects_pushes_and_goes_on(recipes, tmp_path):  # noqa: F811
    for start, steps in ((0, 2), (2, 4)):
        resume = {"start-step": start, "steps": steps, "stubs": tmp_path / "stubs"}
        said = client(recipes.arguments("grpc", **resume)).stdout
        assert said.splitlines()[-1].startswith(f"step {steps - 1}: {SUB_BATCH_SIZE} rows")
    recipes.assert_trained("grpc", 4)


def test_it_tells_the_reason_of_an_error(recipes, tmp_path):  # noqa: F811
    wrong = recipes.arguments("grpc-wrong", stubs=tmp_path / "stubs") + ["--sub-batch-size", "65"]
    assert client(wrong, code=1).stderr.startswith("RUN_SPEC_IMPOSSIBLE: ")
