"""Selection written to be read: dense float64 matrices and no care for speed, from the formulas of
docs/policies.md.
"""

from dataclasses import dataclass

import numpy as np
from superbatch_kernels import Model

CHUNKED = ("joint", "joint_top_k", "k_center")


def world(seed, count=96, dims=(24, 32), scales=(24.0, 20.0), dtype=np.float32):
    """A learner that mixes things up and a reference that does not: two models of `count`
    candidates.
    """
    dice = np.random.default_rng(seed)

    def towers(dim, blur):
        image = dice.standard_normal((count, dim))
        return [
            unit(image).astype(dtype),
            unit(image + blur * dice.standard_normal((count, dim))).astype(dtype),
        ]

    learner, reference = towers(dims[0], 1.5), towers(dims[1], 1.2)
    return Model(*learner, scales[0], -10.0), Model(*reference, scales[1], -12.0)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011) of counters `[4]` and keys `[2]` of 32 bits, each maybe an
    array, in uint64.
    """
    low = np.uint64(0xFFFFFFFF)
    counter, key = [np.uint64(word) for word in counter], [np.uint64(word) for word in key]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        high = np.uint64(32)
        counter = [
            (b >> high) ^ counter[1] ^ key[0],
            b & low,
            (a >> high) ^ counter[3] ^ key[1],
            a & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return counter


def gumbel(seed, generation, step, draws, keys):
    """The seeded noise, `[draws, B]`."""
    halves = lambda value: (value & 0xFFFFFFFF, value >> 32)
    low, high = (
        np.asarray(keys, np.uint64) & np.uint64(0xFFFFFFFF),
        np.asarray(keys, np.uint64) >> np.uint64(32),
    )
    rows = []
    for chunk in range(draws):
        stream = philox([*halves(step), generation, chunk], halves(seed))
        block = philox([low, high, stream[2], stream[3]], stream[:2])
        bits = ((block[1] << np.uint64(32)) | block[0]) >> np.uint64(12)
        rows.append(-np.log(-np.log((bits.astype(np.float64) + 0.5) / 2.0**52)))
    return np.array(rows)


@dataclass
class Draw:
    chunks: list
    scores: np.ndarray
    batch_score: float
    margin: float
    """Smallest gap between the last drawn and the first not drawn."""


class Oracle:
    def __init__(self, learner, reference, loss="sigmoid", criterion="learnability", gain=1.0):
        models = {
            "learnability": [(1, learner), (-1, reference)],
            "hard": [(1, learner)],
            "easy": [(-1, reference)],
        }
        self.models = [(sign, self.logits(model, loss)) for sign, model in models[criterion]]
        self.loss, self.gain, self.images = (
            loss,
            gain if loss == "softmax" else 1.0,
            np.float64(reference.image),
        )

    @staticmethod
    def logits(model, loss):
        cosines = np.float64(model.image) @ np.float64(model.text).T
        return model.scale * cosines + (model.bias if loss == "sigmoid" else 0.0)

    def scores(self, drawn):
        """`[B]`, given what was drawn, with gain."""
        return self.gain * sum(sign * self.losses(logits, drawn) for sign, logits in self.models)

    def losses(self, logits, drawn):
        own = np.diag(logits)
        if self.loss == "sigmoid":
            pairs = np.logaddexp(0, logits)
            return np.logaddexp(0, -own) + pairs[drawn].sum(0) + pairs[:, drawn].sum(1)
        if len(drawn) == 0:
            return -own
        return (
            0.5 * (np.logaddexp.reduce(logits[drawn], 0) + np.logaddexp.reduce(logits[:, drawn], 1))
            - own
        )

    def batch_score(self, chosen):
        total = 0.0
        for sign, logits in self.models:
            inner = logits[np.ix_(chosen, chosen)]
            if self.loss == "sigmoid":
                off = ~np.eye(len(chosen), dtype=bool)
                total += sign * (
                    np.logaddexp(0, -np.diag(inner)).sum() + np.logaddexp(0, inner[off]).sum()
                )
            else:
                total += sign * self.losses(inner, np.arange(len(chosen))).sum()
        return total / len(chosen)

    def draw(
        self, policy, b, noise, n_chunks=16, temperature=1.0, pressure=100.0, priority_exponent=0.6
    ):
        parts = min(n_chunks, b) if policy in CHUNKED else 1
        sizes = [b // parts + (k < b % parts) for k in range(parts)]
        own, drawn, scores, margin = self.scores([]), [], [], np.inf
        for k, size in enumerate(sizes):
            if policy == "uniform":
                given = np.zeros(len(own))
            elif policy == "k_center":
                given = (
                    1 - (self.images @ self.images[drawn].T).max(1) if drawn else np.zeros(len(own))
                )
            else:
                given = self.scores(drawn) if policy in CHUNKED else own
            rank = np.argsort(np.argsort(-own, kind="stable"), kind="stable")
            logits = {
                "independent": given / temperature,
                "rank": -np.log(pressure) * rank / (len(own) - 1),
                "proportional": priority_exponent * np.log(np.maximum(own, 0) + 1e-6),
            }.get(policy, given)
            greedy = policy in ("joint_top_k", "top_k") or policy == "k_center" and k > 0
            perturbed = logits + (0 if greedy else noise[k])
            perturbed[drawn] = -np.inf
            order = np.argsort(-perturbed, kind="stable")
            if len(drawn) + size < len(own):
                margin = min(margin, perturbed[order[size - 1]] - perturbed[order[size]])
            drawn += order[:size].tolist()
            scores += given[order[:size]].tolist()
        chunks = [sorted(chunk) for chunk in np.split(drawn, np.cumsum(sizes)[:-1])]
        return Draw(chunks, np.array(scores), self.batch_score(drawn), margin)


def chunks_of(selection):
    """What each chunk drew: inside a chunk, scores within rounding may change places."""
    return [
        sorted(chunk) for chunk in np.split(selection.indices, np.cumsum(selection.chunks)[:-1])
    ]
