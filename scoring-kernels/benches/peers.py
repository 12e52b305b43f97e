"""The peers that joint selection is measured against, asked line by line by benches/peers.rs.

    peers.py serve FILE THREADS    answers `printed`, `blas`, `sigmoid`, `softmax`, `gemm` with:
    seconds, processor
                                   seconds, then the draw in order
    peers.py plot FILE PICTURE     draws the growth that benches/peers.rs wrote

FILE holds `learner_img`, `learner_txt`, `reference_img`, `reference_txt` (float32, [B, d]), `noise`
([n_chunks, B]) and, as metadata, both models' scale and bias and the sub-batch size `b`.
"""

import os
import sys
import time


def chunk_sizes(b, n_chunks):
    return [b // n_chunks + (k < b % n_chunks) for k in range(n_chunks)]


def dense_numpy(world, printed):
    """Algorithm 1 of arXiv 2406.17711: both B x B matrices of pair losses in float32, then chunk
    after chunk.

    `printed` multiplies the whole matrix by a mask and sums, as the paper prints it; otherwise
    BLAS's matrix-vector product does the same.
    """
    import numpy as np

    def pair_losses(image, text, scale, bias):
        logits = image.numpy() @ text.numpy().T
        logits *= np.float32(scale)
        logits += np.float32(bias)
        losses = np.logaddexp(np.float32(0), logits)
        np.fill_diagonal(losses, np.logaddexp(np.float32(0), -np.diag(logits)))
        return losses

    learner, reference = world["models"]
    scores = pair_losses(*learner) - pair_losses(*reference)
    noise, drawn = world["noise"].numpy(), np.zeros(len(scores), np.float32)
    chosen = []
    for k, size in enumerate(chunk_sizes(world["b"], len(noise))):
        if printed:
            pairs = (scores * drawn[:, None]).sum(0) + (scores * drawn[None, :]).sum(1)
        else:
            pairs = drawn @ scores + scores @ drawn
        logits = np.diag(scores) + pairs - 1e8 * drawn
        index = np.argsort(-(logits + noise[k]), kind="stable")[:size]
        drawn[index] = 1
        chosen += index.tolist()
    return chosen


def matrix_free_torch(world, loss):
    """After each chunk only its rows and columns: a product, a reduction in place, a sum."""
    import torch

    models, noise = world["models"], world["noise"]
    own = []
    for image, text, scale, bias in models:
        logits = scale * (image * text).sum(1) + bias
        own.append(torch.nn.functional.softplus(-logits) if loss == "sigmoid" else -logits)
    score, pairs, logs = own[0] - own[1], 0, [None] * 4
    left = torch.ones(len(score), dtype=torch.bool)
    chosen, index = [], torch.empty(0, dtype=torch.long)
    for k, size in enumerate(chunk_sizes(world["b"], len(noise))):
        if chosen:
            slot = 0
            for sign, (image, text, scale, bias) in zip((1, -1), models):
                for ours, theirs in ((image, text), (text, image)):
                    logits = torch.addmm(torch.tensor(bias), ours, theirs[index].T, alpha=scale)
                    if loss == "sigmoid":
                        pairs = pairs + sign * torch.nn.functional.softplus(logits).sum(1)
                    else:
                        new = logits.logsumexp(1)
                        logs[slot] = new if logs[slot] is None else torch.logaddexp(logs[slot], new)
                    slot += 1
            if loss == "softmax":
                pairs = 0.5 * (logs[0] + logs[1] - logs[2] - logs[3])
        perturbed = (score + pairs + noise[k]).masked_fill(~left, -torch.inf)
        index = perturbed.topk(size).indices
        left[index] = False
        chosen += index.tolist()
    return chosen


def measured(work):
    """(seconds, processor seconds, result)"""
    wall, busy = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - busy, result


def gemm_times(n=2048):
    """Seconds and processor seconds per 10^12 operations of a square float32 product, by the better
    of both peers' BLAS.
    """
    import torch

    a = torch.randn(n, n)
    times = []
    for product in (lambda: a @ a, lambda: a.numpy() @ a.numpy()):
        product()
        times += [measured(product)[:2] for _ in range(3)]
    return [min(column) * 1e12 / (2 * n**3) for column in zip(*times)]


def serve(path, threads):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = threads
    import torch
    from safetensors import safe_open

    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    with safe_open(path, "pt") as file:
        words = file.metadata()
        model = lambda name: (
            file.get_tensor(f"{name}_img"),
            file.get_tensor(f"{name}_txt"),
            float(words[f"{name}_scale"]),
            float(words[f"{name}_bias"]),
        )
        world = {
            "models": [model("learner"), model("reference")],
            "noise": file.get_tensor("noise"),
            "b": int(words["b"]),
        }
    print("ready", flush=True)
    for line in sys.stdin:
        question = line.strip()
        if question == "gemm":
            print(*gemm_times(), flush=True)
            continue
        if question in ("printed", "blas"):
            wall, busy, chosen = measured(lambda: dense_numpy(world, question == "printed"))
        else:
            wall, busy, chosen = measured(lambda: matrix_free_torch(world, question))
        print(wall, busy, *chosen, flush=True)


def plot(path, picture):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [line.split() for line in open(path) if not line.startswith("#")]
    count, sub_batch, seconds, mebibytes = (list(map(float, column)) for column in zip(*rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    pairs = [n * b for n, b in zip(count, sub_batch)]
    left.loglog(count, seconds, "o-", label="measured")
    left.loglog(count, [seconds[-1] * p / pairs[-1] for p in pairs], "k:", label="∝ B·b")
    left.set(xlabel="super-batch size B", ylabel="processor seconds", title="Time")
    right.loglog(count, mebibytes, "o-", label="measured")
    right.loglog(count, [mebibytes[-1] * n / count[-1] for n in count], "k:", label="∝ B")
    right.set(xlabel="super-batch size B", ylabel="MiB above the inputs", title="Memory")
    for axes in (left, right):
        axes.set_xticks(count, [f"{n / 1024:.0f}k" for n in count])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    {"serve": serve, "plot": plot}[sys.argv[1]](*sys.argv[2:])
