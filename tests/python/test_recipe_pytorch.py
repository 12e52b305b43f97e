"""examples/pytorch: one process and several, DDP and FSDP 2, resume with the same and with other
ranks.
"""

import pytest
from recipe import Recipes, module, recipes, script  # noqa: F401  (a fixture)


def test_a_resumed_trainer_chooses_what_an_uninterrupted_one_does(recipes, tmp_path, capsys):
    train = module("pytorch")
    train.main(recipes.arguments("plain", steps=4, checkpoints=tmp_path / "whole"))
    recipes.assert_trained("plain", 4)
    for steps in (2, 4):
        train.main(
            recipes.arguments(
                "resumed", steps=steps, checkpoints=tmp_path / "parts", **{"save-every": 2}
            )
        )
    recipes.assert_trained("resumed", 4)
    assert recipes.choices("resumed", 4) == recipes.choices("plain", 4)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert printed[:4] == printed[4:]


def test_workers_decode_beside_the_trainer(recipes, tmp_path):  # noqa: F811
    module("pytorch").main(recipes.arguments("workers", steps=3, workers=2, checkpoints=tmp_path))
    recipes.assert_trained("workers", 3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_and_one_goes_on(recipes, tmp_path, parallel):  # noqa: F811
    script(
        "pytorch/train.py",
        recipes.arguments(parallel, steps=3, parallel=parallel, checkpoints=tmp_path),
        ranks=2,
    )
    recipes.assert_trained(parallel, 3)
    module("pytorch").main(recipes.arguments(parallel, steps=4, checkpoints=tmp_path))
    recipes.assert_trained(parallel, 4)
