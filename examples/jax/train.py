"""A JAX trainer on chosen batches: flax, optax, and weights pushed as NumPy arrays, no torch.

    python examples/jax/train.py --pool file:///data/pool --learner models/learner \\
        --reference models/reference
"""

import argparse
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy
import optax
import superbatch
from PIL import Image
from safetensors.numpy import load_file
from siglip import Siglip, params_of, state_dict
from tokenizers import Tokenizer


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--service", default="http://127.0.0.1:50051")
    parser.add_argument("--run-id", default="jax", help="the run's id")
    parser.add_argument("--pool", required=True, help="URI of the candidates")
    parser.add_argument(
        "--learner",
        type=Path,
        required=True,
        help="a SigLIP folder of transformers, with initial weights",
    )
    parser.add_argument(
        "--reference", type=Path, required=True, help="a folder with the frozen model"
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--super-batch-size", type=int, default=640)
    parser.add_argument("--sub-batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(argv)


def run_spec(args: argparse.Namespace) -> superbatch.RunSpec:
    return superbatch.RunSpec(
        run_id=args.run_id,
        sources=[args.pool],
        learner=superbatch.Learner(model_uri=args.learner.absolute(), first_push=True),
        reference=args.reference.absolute(),
        phases=[
            superbatch.Phase(
                policy="joint",
                super_batch_size=args.super_batch_size,
                sub_batch_size=args.sub_batch_size,
                n_chunks=4,
            )
        ],
    )


def part(config: dict, name: str) -> dict:
    """A tower's part of config.json, without what is not a plain value: flax hashes it."""
    defaults = {"layer_norm_eps": 1e-6, "projection_size": config[f"{name}_config"]["hidden_size"]}
    told = {**defaults, **config[f"{name}_config"]}
    return flax.core.freeze(
        {key: value for key, value in told.items() if isinstance(value, (int, float))}
    )


def loss_of(model: Siglip, params, images, ids):
    """The sigmoid loss over all pairs (Zhai et al. 2023)."""
    image, text, scale, bias = model.apply({"params": params}, images, ids)
    signs = 2 * jnp.eye(len(images)) - 1
    return -jax.nn.log_sigmoid(signs * (scale * image @ text.T + bias)).sum() / len(images)


class Decode:
    """Bytes and captions to arrays, by a pool of threads."""

    def __init__(self, folder: Path, side: int):
        self.side, self.pool = side, ThreadPoolExecutor(4)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def image(self, data: bytes) -> numpy.ndarray:
        picture = (
            Image.open(io.BytesIO(data))
            .convert("RGB")
            .resize((self.side, self.side), Image.Resampling.BILINEAR)
        )
        return numpy.asarray(picture, numpy.float32) / 127.5 - 1

    def __call__(self, batch: superbatch.Batch):
        images = numpy.stack(list(self.pool.map(self.image, batch["image"].to_pylist())))
        return images, numpy.array(
            [found.ids for found in self.tokenizer.encode_batch(batch["caption"].to_pylist())]
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    config = json.loads((args.learner / "config.json").read_text())
    text, vision = part(config, "text"), part(config, "vision")
    model, side = Siglip(text, vision), vision["image_size"]
    blank = (
        jnp.zeros((1, side, side, 3)),
        jnp.zeros((1, text["max_position_embeddings"]), jnp.int32),
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), *blank)["params"]
    params = params_of(load_file(args.learner / "model.safetensors"), shapes)
    optimizer = optax.adamw(args.lr, b2=0.95)
    state = {"params": params, "moments": optimizer.init(params)}

    @jax.jit
    def update(state, images, ids):
        loss, gradient = jax.value_and_grad(lambda params: loss_of(model, params, images, ids))(
            state["params"]
        )
        change, moments = optimizer.update(gradient, state["moments"], state["params"])
        return {"params": optax.apply_updates(state["params"], change), "moments": moments}, loss

    found = max(args.checkpoints.glob("*.msgpack"), default=None)
    start_step = 0 if found is None else int(found.stem) + 1
    if found is not None:
        state = flax.serialization.from_bytes(state, found.read_bytes())
    args.checkpoints.mkdir(parents=True, exist_ok=True)

    rank, world_size = jax.process_index(), jax.process_count()
    decode = Decode(args.learner, side)
    with superbatch.connect(args.service).open_run(run_spec(args)) as run:
        # The initial weights, or once more the checkpoint's: as each push that was on its way when
        # the trainer ended.
        for step in sorted({*run.missing_pushes(start_step), start_step - 1}):
            run.push_weights(state_dict(state["params"]), step=step, rank=rank)
        for batch in run.batches(
            rank=rank, world_size=world_size, start_step=start_step, end_step=args.steps
        ):
            state, loss = update(state, *decode(batch))
            run.push_weights(state_dict(state["params"]), step=batch.step, rank=rank)
            print(f"step {batch.step} loss {loss:.4f}", flush=True)
            if (batch.step + 1) % args.save_every == 0 or batch.step + 1 == args.steps:
                unfinished = args.checkpoints / "unfinished"
                unfinished.write_bytes(flax.serialization.to_bytes(state))
                unfinished.rename(args.checkpoints / f"{batch.step:08d}.msgpack")


if __name__ == "__main__":
    main()
