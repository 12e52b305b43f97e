"""`open_clip_train`, unchanged, on chosen batches. Its own arguments go after these:

    python examples/open_clip/train.py --reference models/reference --super-batch-size 5120 \\
        --model local-dir:models/learner --siglip --train-data file:///data/pool \\
        --train-num-samples 1000000 --batch-size 1024 --epochs 10 --name first
    torchrun --nproc-per-node 8 -- examples/open_clip/train.py ... --resume latest

--model names an open_clip folder, whose weights training starts from; --batch-size is one rank's
part of the sub-batch, --name is the run's id, and an epoch is --train-num-samples examples that
were chosen.
"""

import argparse
import sys

import open_clip_train.main
import torch
from open_clip_train.train import train_one_epoch
from superbatch_data import Selected
from torch.nn.parallel import DistributedDataParallel


class CpuParallel(DistributedDataParallel):
    """open_clip names each rank's device, which torch refuses where that is a CPU."""

    def __init__(self, module: torch.nn.Module, device_ids: object = None, **options) -> None:
        super().__init__(module, **options)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--service", default="http://127.0.0.1:50051")
    parser.add_argument(
        "--reference", required=True, help="the frozen model: an open_clip or transformers folder"
    )
    parser.add_argument(
        "--super-batch-size", type=int, required=True, help="candidates of a step, over all ranks"
    )
    parser.add_argument("--n-chunks", type=int, default=16)
    ours, theirs = parser.parse_known_args(argv)
    for needed in ("--model", "--train-data", "--train-num-samples", "--name"):
        if not any(given.split("=")[0] == needed for given in theirs):
            parser.error(f"{needed} is needed too")
    selected = Selected(ours.service, ours.reference, ours.super_batch_size, ours.n_chunks)

    def pushing(model, data, *rest, **named):
        selected.push_from(model, data)
        return train_one_epoch(model, data, *rest, **named)

    if "cpu" in theirs or "--device=cpu" in theirs:
        torch.nn.parallel.DistributedDataParallel = CpuParallel
    open_clip_train.main.get_data = selected.get_data
    open_clip_train.main.train_one_epoch = pushing
    open_clip_train.main.main(theirs)
    if selected.pushes is not None:
        selected.pushes.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
