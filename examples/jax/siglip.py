"""SigLIP in flax, with the names and layouts of `transformers`, which the service knows."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy
from flax.traverse_util import flatten_dict, unflatten_dict


class Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        q, k, v = (nn.Dense(width, name=f"{part}_proj")(x) for part in "qkv")
        return nn.Dense(width, name="out_proj")(attend(q, k, v, self.heads))


def attend(q, k, v, heads):
    """(rows, tokens, width) each; q may have another number of tokens."""
    q, k, v = (t.reshape(*t.shape[:2], heads, -1) for t in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="fc2")(
            jax.nn.gelu(nn.Dense(self.hidden, name="fc1")(x), approximate=True)
        )


class Layer(nn.Module):
    heads: int
    hidden: int
    epsilon: float

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.heads, name="self_attn")(
            nn.LayerNorm(self.epsilon, name="layer_norm1")(x)
        )
        return x + Mlp(self.hidden, name="mlp")(nn.LayerNorm(self.epsilon, name="layer_norm2")(x))


class Encoder(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, x):
        about = self.config
        for index in range(about["num_hidden_layers"]):
            x = Layer(
                about["num_attention_heads"],
                about["intermediate_size"],
                about["layer_norm_eps"],
                name=f"layers_{index}",
            )(x)
        return x


class TextEmbeddings(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, ids):
        about = self.config
        position = nn.Embed(
            about["max_position_embeddings"], about["hidden_size"], name="position_embedding"
        )
        token = nn.Embed(about["vocab_size"], about["hidden_size"], name="token_embedding")
        return token(ids) + position(jnp.arange(ids.shape[1]))


class Text(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, ids):
        about = self.config
        x = Encoder(about, name="encoder")(TextEmbeddings(about, name="embeddings")(ids))
        x = nn.LayerNorm(about["layer_norm_eps"], name="final_layer_norm")(x)
        return nn.Dense(about["projection_size"], name="head")(x[:, -1])


class ImageEmbeddings(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, images):
        about = self.config
        patch, width = (about["patch_size"],) * 2, about["hidden_size"]
        x = nn.Conv(width, patch, patch, padding="VALID", name="patch_embedding")(images)
        x = x.reshape(len(images), -1, width)
        return x + nn.Embed(x.shape[1], width, name="position_embedding")(jnp.arange(x.shape[1]))


class ProbeAttention(nn.Module):
    """Keeps its three projections in one matrix, as torch's MultiheadAttention does."""

    heads: int

    @nn.compact
    def __call__(self, probe, x):
        width = x.shape[-1]
        weight = self.param("in_proj_weight", nn.initializers.xavier_uniform(), (3 * width, width))
        bias = self.param("in_proj_bias", nn.initializers.zeros, (3 * width,))
        (wq, wk, wv), (bq, bk, bv) = jnp.split(weight, 3), jnp.split(bias, 3)
        mixed = attend(probe @ wq.T + bq, x @ wk.T + bk, x @ wv.T + bv, self.heads)
        return nn.Dense(width, name="out_proj")(mixed)


class Head(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, x):
        about = self.config
        probe = self.param("probe", nn.initializers.normal(), (1, 1, x.shape[-1]))
        probe = jnp.broadcast_to(probe, (len(x), 1, x.shape[-1]))
        x = ProbeAttention(about["num_attention_heads"], name="attention")(probe, x)
        return (
            x
            + Mlp(about["intermediate_size"], name="mlp")(
                nn.LayerNorm(about["layer_norm_eps"], name="layernorm")(x)
            )
        )[:, 0]


class Vision(nn.Module):
    config: dict

    @nn.compact
    def __call__(self, images):
        about = self.config
        x = Encoder(about, name="encoder")(ImageEmbeddings(about, name="embeddings")(images))
        return Head(about, name="head")(
            nn.LayerNorm(about["layer_norm_eps"], name="post_layernorm")(x)
        )


class Siglip(nn.Module):
    """text, vision: the two parts of config.json, with the defaults of `transformers` filled in."""

    text: dict
    vision: dict

    @nn.compact
    def __call__(self, images, ids):
        """Images (n, height, width, 3) and ids (n, length) to embeddings of length 1, and the
        logits' scale and bias.
        """
        scale = self.param("logit_scale", nn.initializers.zeros, (1,))
        bias = self.param("logit_bias", nn.initializers.zeros, (1,))
        image, text = (
            Vision(self.vision, name="vision_model")(images),
            Text(self.text, name="text_model")(ids),
        )
        unit = [side / jnp.linalg.norm(side, axis=-1, keepdims=True) for side in (image, text)]
        return *unit, jnp.exp(scale), bias


# flax's name of a weight, torch's, and the order of axes that takes one to the other.
KINDS = {
    ("kernel", 2): ("weight", (1, 0)),
    ("kernel", 4): ("weight", (3, 2, 0, 1)),
    ("scale", 1): ("weight", None),
    ("embedding", 2): ("weight", None),
}


def _renamed(path: tuple[str, ...], leaf) -> tuple[str, tuple[int, ...] | None]:
    last, axes = KINDS.get((path[-1], leaf.ndim), (path[-1], None))
    return re.sub(r"layers_(\d+)", r"layers.\1", ".".join((*path[:-1], last))), axes


def state_dict(params) -> dict[str, numpy.ndarray]:
    """Weights as the service wants them: the names and layouts of `transformers`."""
    out = {}
    for path, leaf in flatten_dict(params).items():
        name, axes = _renamed(path, leaf)
        out[name] = numpy.asarray(leaf if axes is None else leaf.transpose(axes))
    return out


def params_of(state: dict[str, numpy.ndarray], like):
    """The other way round. like: parameters of the same shape, or what `jax.eval_shape` says of
    them.
    """
    out = {}
    for path, leaf in flatten_dict(like).items():
        name, axes = _renamed(path, leaf)
        out[path] = jnp.asarray(
            state[name] if axes is None else state[name].transpose(numpy.argsort(axes))
        )
    return unflatten_dict(out)
