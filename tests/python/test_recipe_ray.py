"""examples/ray: Ray Train with one actor a rank, and a second job that goes on where the first one
stopped.
"""

import pytest
from recipe import Recipes, recipes, script  # noqa: F401  (a fixture)

# Ray starts a cluster of its own, which takes minutes on two busy cores, so `make setup` leaves it
# out.
pytest.importorskip(
    "ray", reason="SKIPPED the Ray recipe: .venv/bin/pip install ray==2.60.0 to run it"
)


def test_two_actors_train(recipes, tmp_path):  # noqa: F811
    said = script("ray/train.py", recipes.arguments("ray", steps=3, ranks=2, storage=tmp_path))
    assert "step 2 loss" in said
    recipes.assert_trained("ray", 3)
