"""What joint selection on a CUDA device is measured against, asked by benches/device.rs.

    device.py gemm                                      seconds per 10^12 operations of an f16
    product with f32 sums device.py selection LOSS B SUB_BATCH DIM N_CHUNKS   seconds of matrix-free
    selection, then of its compiled form

The embeddings are random and lie in the device's memory: what is drawn does not change the time.
"""

import sys
import time

import torch

torch.set_grad_enabled(False)


def seconds(work, rounds):
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)


def gemm(n=8192):
    a = torch.randn(n, n, device="cuda", dtype=torch.float16)
    product = lambda: torch.mm(a, a.T, out_dtype=torch.float32)
    product()
    return seconds(product, 10) * 1e12 / (2 * n**3)


def softplus_sums(ours, theirs, scale, bias):
    logits = torch.mm(ours, theirs.T, out_dtype=torch.float32)
    return torch.nn.functional.softplus(scale * logits + bias).sum(1)


def log_sums(ours, theirs, scale, bias):
    return (scale * torch.mm(ours, theirs.T, out_dtype=torch.float32)).logsumexp(1)


def matrix_free(models, reduce, loss, chunks):
    """After each chunk only its rows and columns: a product, a reduction, a sum."""
    count = len(models[0][0])
    own = [scale * (image.float() * text.float()).sum(1) for image, text, scale, _ in models]
    score, pairs, logs = own[0] - own[1], 0, [None] * 4
    left = torch.ones(count, dtype=torch.bool, device="cuda")
    index = None
    for size in chunks:
        if index is not None:
            slot = 0
            for sign, (image, text, scale, bias) in zip((1, -1), models):
                for ours, theirs in ((image, text), (text, image)):
                    terms = reduce(ours, theirs[index], scale, bias)
                    if loss == "sigmoid":
                        pairs = pairs + sign * terms
                    else:
                        logs[slot] = (
                            terms if logs[slot] is None else torch.logaddexp(logs[slot], terms)
                        )
                    slot += 1
            if loss == "softmax":
                pairs = 0.5 * (logs[0] + logs[1] - logs[2] - logs[3])
        noise = -torch.log(-torch.log(torch.rand(count, device="cuda").clamp(1e-30, 1 - 1e-7)))
        index = (score + pairs + noise).masked_fill(~left, -torch.inf).topk(size).indices
        left[index] = False


def selection(loss, count, sub_batch, dim, n_chunks):
    unit = lambda: torch.nn.functional.normalize(
        torch.randn(count, dim, device="cuda"), dim=1
    ).half()
    models = [(unit(), unit(), scale, -10.0) for scale in (24.0, 30.0)]
    chunks = [sub_batch // n_chunks + (k < sub_batch % n_chunks) for k in range(n_chunks)]
    reduce = softplus_sums if loss == "sigmoid" else log_sums
    for form in (reduce, torch.compile(reduce)):
        work = lambda: matrix_free(models, form, loss, chunks)
        work()
        yield seconds(work, 3)


if __name__ == "__main__":
    if sys.argv[1] == "gemm":
        print(gemm())
    else:
        print(*selection(sys.argv[2], *map(int, sys.argv[3:])))
