"""README.md: its Python, as it is written, against a real service."""

import re
from pathlib import Path
from textwrap import dedent

import pytest
from recipe import SUB_BATCH_SIZE, SUPER_BATCH_SIZE, Recipes, recipes  # noqa: F401  (a fixture)
from transformers import SiglipModel

README = Path(__file__).parents[2] / "README.md"
STEPS = 3


class Enough(Exception):
    """The loop of the page has no end."""


def block() -> str:
    """The indented block under the page's heading."""
    text = README.read_text().split("\n## From Python\n")[1].split("\n## ")[0]
    (found,) = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    return dedent(found)


def test_its_python_trains_against_a_real_service(recipes: Recipes):  # noqa: F811
    code, places = (
        block(),
        {
            "http://127.0.0.1:50051": recipes.address,
            "file:///data/pool": (recipes.inputs / "pool").as_uri(),
            "file:///models/reference": (recipes.inputs / "reference").as_uri(),
            "file:///models/learner": (recipes.inputs / "learner").as_uri(),
            "super_batch_size=5120": f"super_batch_size={SUPER_BATCH_SIZE}",
            "sub_batch_size=1024": f"sub_batch_size={SUB_BATCH_SIZE}",
            'run_id="first"': 'run_id="readme"',
        },
    )
    for written, here in places.items():
        assert code.count(written) == 1, written
        code = code.replace(written, here)
    served = []

    def train_step(images, captions):
        served.append((images.to_pylist(), captions.to_pylist()))
        if len(served) > STEPS:
            raise Enough

    model = SiglipModel.from_pretrained(recipes.inputs / "learner")
    given = {"model": model, "rank": 0, "world_size": 1, "train_step": train_step}
    with pytest.raises(Enough):
        exec(compile(code, str(README), "exec"), given)
    run = given["run"]
    run.flush()
    assert [len(images) for images, _ in served] == [SUB_BATCH_SIZE] * (STEPS + 1)
    assert served[0][0][0].startswith(b"\x89PNG") and all(map(isinstance, served[0][1], [str] * 16))
    for step in range(STEPS):
        told = run.receipt(step).summary
        assert (told.policy, told.mode, told.learner.step) == ("joint", "normal", max(step - 2, -1))
    assert run.verify_weights(model.state_dict()).equal
