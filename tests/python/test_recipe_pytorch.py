"""examples/pytorch: one process and several, DDP and FSDP 2, resume with the same and with other
ranks.
"""

from collections.abc import Callable

import pytest
import superbatch
import torch
from recipe import Recipes, module, recipes, script  # noqa: F401  (a fixture)
from superbatch.torch import Pushes
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


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
def test_two_ranks_train_and_one_and_two_go_on(recipes, tmp_path, parallel):  # noqa: F811
    script(
        "pytorch/train.py",
        recipes.arguments(parallel, steps=3, parallel=parallel, checkpoints=tmp_path),
        ranks=2,
    )
    recipes.assert_trained(parallel, 3)
    module("pytorch").main(recipes.arguments(parallel, steps=4, checkpoints=tmp_path))
    recipes.assert_trained(parallel, 4)
    script(
        "pytorch/train.py",
        recipes.arguments(parallel, steps=6, parallel=parallel, checkpoints=tmp_path),
        ranks=2,
    )
    recipes.assert_trained(parallel, 6)


Average = tuple[torch.nn.Module, Callable[[], None]]


def of_torch(model: torch.nn.Module) -> Average:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return average, lambda: average.update_parameters(model)


def of_timm(model: torch.nn.Module) -> Average:
    average = ModelEmaV3(model, decay=0.5)
    return average, lambda: average.update(model)


@pytest.mark.parametrize("averaged", [of_torch, of_timm])
def test_a_moving_average_is_pushed_in_place_of_the_model(recipes, averaged):  # noqa: F811
    train, name, steps = module("pytorch"), averaged.__name__.replace("_", "-"), 3
    args = train.arguments(recipes.arguments(name))
    learner, transform = train.Learner(args.learner), train.transform(args.learner)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    average, update = averaged(learner)
    run = superbatch.connect(recipes.address).open_run(train.run_spec(args))
    pushes = Pushes(run, average, prefix="model.", rank=0)
    pushes.before(0)
    for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=steps):
        optimizer.zero_grad()
        learner(*transform(batch)).backward()
        optimizer.step()
        update()
        pushes.after(batch.step)
    pushes.flush()
    recipes.assert_trained(name, steps)
    assert run.verify_weights(average.module.model.state_dict()).equal
    assert not run.verify_weights(learner.model.state_dict()).equal
