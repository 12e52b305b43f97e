"""examples/transformers: Hugging Face's Trainer, its checkpoints and accumulation, and loops that
look one batch ahead.
"""

from collections.abc import Iterator

import pytest
from recipe import EXAMPLES, module, recipes, script  # noqa: F401  (a fixture)
from superbatch.torch import Pushes, SelectedBatches


def test_a_resumed_trainer_chooses_what_an_uninterrupted_one_does(recipes, tmp_path):  # noqa: F811
    train = module("transformers")
    schedule = {"epochs": 3, "epoch-steps": 2, "save-every": 3}
    train.main(recipes.arguments("hf-whole", output=tmp_path / "whole", **schedule))
    recipes.assert_trained("hf-whole", 6)

    given = recipes.arguments("hf", output=tmp_path / "parts", **schedule)
    whole = train.SelectedTrainer
    train.SelectedTrainer = ending_at(4, whole)
    with pytest.raises(Ended):
        train.main(given)
    # The newest checkpoint is from the middle of the second epoch, and a step behind.
    checkpoints = [path.name for path in (tmp_path / "parts").glob("checkpoint-*")]
    assert checkpoints == ["checkpoint-3"]
    train.SelectedTrainer = whole
    train.main(given)
    recipes.assert_trained("hf", 6)
    assert recipes.choices("hf", 6) == recipes.choices("hf-whole", 6)


class Ended(Exception):
    pass


def ending_at(step: int, trainer: type) -> type:
    """The trainer, which ends with an error before its update of that step, as in a crash."""

    class Ending(trainer):
        def training_step(self, *arguments, **named):
            if self.state.global_step == step:
                raise Ended
            return super().training_step(*arguments, **named)

    return Ending


def test_accumulated_steps_make_one_update(recipes, tmp_path):  # noqa: F811
    module("transformers").main(
        recipes.arguments(
            "accumulated", epochs=1, accumulate=2, output=tmp_path, **{"epoch-steps": 4}
        )
    )
    recipes.assert_trained("accumulated", 4, every=2)


def test_two_ranks_train(recipes, tmp_path):  # noqa: F811
    script(
        "transformers/train.py",
        recipes.arguments("hf-ranks", epochs=1, output=tmp_path, **{"epoch-steps": 3}),
        ranks=2,
    )
    recipes.assert_trained("hf-ranks", 3)
    # Each process knows that it is not the only one.
    saved = sorted(path.name for path in (tmp_path / "checkpoint-3").glob("rng_state*"))
    assert saved == ["rng_state_0.pth", "rng_state_1.pth"]


def test_processes_that_know_of_no_other_are_refused(recipes, tmp_path):  # noqa: F811
    recipe = tmp_path / "one.py"
    recipe.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(EXAMPLES / 'transformers')!r})\n"
        "import train\n"
        # As on a machine whose recipe does not say use_cpu.
        "torch.accelerator.is_available = lambda: True\n"
        "train.main()\n"
    )
    arguments = recipes.arguments("only", epochs=1, output=tmp_path / "out", **{"epoch-steps": 3})
    with pytest.raises(AssertionError, match="knows of one process, and there are 2"):
        script(str(recipe), arguments, ranks=2)


def test_a_loader_that_accelerate_prepared_looks_one_batch_ahead(recipes, tmp_path):  # noqa: F811
    """As `Trainer` has it by default. On one process the slices stay whole."""
    train = module("transformers")

    class PreparedTrainer(train.SelectedTrainer):
        def get_train_dataloader(self):
            return self.accelerator.prepare(super().get_train_dataloader())

    train.SelectedTrainer = PreparedTrainer
    arguments = recipes.arguments("prepared", epochs=2, output=tmp_path, **{"epoch-steps": 5})
    train.main(arguments)
    recipes.assert_trained("prepared", 10)


def test_a_loop_that_looks_one_batch_ahead(recipes):  # noqa: F811
    train = module("pytorch")
    args = train.arguments(recipes.arguments("ahead"))
    dataset = SelectedBatches(
        recipes.address,
        train.run_spec(args),
        rank=0,
        world_size=1,
        start_step=0,
        end_step=9,
        transform=train.transform(args.learner),
    )
    learner = train.Learner(args.learner)
    pushes = Pushes(dataset.open_run(), learner, prefix="model.", rank=0)
    pushes.before(0)
    for step, _ in enumerate(held_back(dataset.loader())):
        pushes.after(step)
    pushes.flush()
    recipes.assert_trained("ahead", 9)


def held_back(items) -> Iterator:
    """Each item once the one after it is there, as prefetchers to a device do."""
    items = iter(items)
    held = next(items)
    for item in items:
        yield held
        held = item
    yield held
