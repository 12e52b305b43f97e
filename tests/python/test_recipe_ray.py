"""examples/ray: Ray Train with one actor a rank, and a second job that goes on where the first one
stopped.
"""

import pytest
from recipe import Recipes, recipes, script  # noqa: F401  (a fixture)

# Ray has wheels for Python 3.11 to 3.13, of 80 MB, and starts a cluster of its own, which takes
# minutes on two busy cores: `make setup` leaves it out. Without `default` its agent does not start
# beside opentelemetry-proto.
pytest.importorskip(
    "ray",
    reason="SKIPPED the Ray recipe: .venv/bin/pip install -r requirements.txt "
    "'ray[default,train]==2.60.0' to run it",
)


def test_two_actors_train_and_a_second_job_goes_on(recipes, tmp_path):  # noqa: F811
    for start, steps in ((0, 3), (3, 5)):
        given = recipes.arguments("ray", steps=steps, ranks=2, storage=tmp_path)
        said = script("ray/train.py", given)
        assert f"begins at step {start}\n" in said and f"step {steps - 1} loss" in said
        recipes.assert_trained("ray", steps)
