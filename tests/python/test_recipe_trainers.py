"""examples/accelerate, lightning, jax and kernels."""

import jax
from recipe import SUB_BATCH_SIZE, Recipes, module, recipes, script  # noqa: F401  (a fixture)


def test_accelerate_trains_and_resumes(recipes, tmp_path):  # noqa: F811
    train = module("accelerate")
    for steps in (2, 4):
        train.main(recipes.arguments("accelerate", steps=steps, checkpoints=tmp_path))
    recipes.assert_trained("accelerate", 4)


def test_accelerate_on_two_ranks(recipes, tmp_path):  # noqa: F811
    script(
        "accelerate/train.py",
        recipes.arguments("accelerate-ranks", steps=3, checkpoints=tmp_path),
        ranks=2,
    )
    recipes.assert_trained("accelerate-ranks", 3)
    # Each process knows that it is not the only one.
    saved = sorted(path.name for path in tmp_path.glob("step-00000002/random_states*"))
    assert saved == ["random_states_0.pkl", "random_states_1.pkl"]


def test_lightning_trains_and_resumes(recipes, tmp_path):  # noqa: F811
    train = module("lightning")
    for steps in (2, 4):
        train.main(
            recipes.arguments(
                "lightning",
                steps=steps,
                checkpoints=tmp_path,
                **{"save-every": 2, "epoch-steps": 3},
            )
        )
    recipes.assert_trained("lightning", 4)


def test_lightning_that_looks_a_batch_ahead(recipes, tmp_path):  # noqa: F811
    """Without an epoch's length, it holds one batch more than it trains on."""
    module("lightning").main(recipes.arguments("lightning-ahead", steps=5, checkpoints=tmp_path))
    recipes.assert_trained("lightning-ahead", 5)


def test_jax_trains_and_resumes(recipes, tmp_path):  # noqa: F811
    train = module("jax")
    for steps in (2, 4):
        train.main(recipes.arguments("jax", steps=steps, checkpoints=tmp_path))
    recipes.assert_trained("jax", 4)


def test_flax_sees_what_torch_sees(recipes):  # noqa: F811
    """The same weights give the same embeddings, so that what is pushed is what is trained."""
    import json

    import numpy
    import torch
    from safetensors.numpy import load_file
    from transformers import SiglipModel

    train, folder = module("jax"), recipes.inputs / "learner"
    config = json.loads((folder / "config.json").read_text())
    model = train.Siglip(train.part(config, "text"), train.part(config, "vision"))
    weights, generator = load_file(folder / "model.safetensors"), numpy.random.default_rng(0)
    side, length = (
        config["vision_config"]["image_size"],
        config["text_config"]["max_position_embeddings"],
    )
    images = generator.standard_normal((4, side, side, 3), numpy.float32)
    ids = generator.integers(0, 50, (4, length))
    params = train.params_of(
        weights, jax.eval_shape(model.init, jax.random.key(0), images, ids)["params"]
    )
    assert {name: array.tobytes() for name, array in train.state_dict(params).items()} == {
        name: array.tobytes() for name, array in weights.items()
    }
    with torch.no_grad():
        out = SiglipModel.from_pretrained(folder)(
            pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2),
            input_ids=torch.from_numpy(ids),
        )
    image, text, scale, bias = model.apply({"params": params}, images, ids)
    for ours, theirs in ((image, out.image_embeds), (text, out.text_embeds)):
        numpy.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    numpy.testing.assert_allclose(
        scale * image @ text.T + bias, out.logits_per_image.numpy(), atol=1e-4
    )


def test_selection_without_a_service(recipes, capsys):  # noqa: F811
    sizes = ["--super-batch-size", "64", "--sub-batch-size", str(SUB_BATCH_SIZE), "--steps", "3"]
    folders = [
        word
        for name in ("pool", "learner", "reference")
        for word in (f"--{name}", str(recipes.inputs / name))
    ]
    module("kernels").main([*folders, *sizes])
    assert [line.split(" loss")[0] for line in capsys.readouterr().out.splitlines()] == [
        "step 0",
        "step 1",
        "step 2",
    ]
