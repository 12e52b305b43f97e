"""Writes open_clip's own configurations, and the names and shapes of the tensors of some:
open_clip_names.py OUT NAME...
"""

import json
import sys
from pathlib import Path

import open_clip
import torch


def tensors(name):
    """On the meta device: nothing is allocated, so the largest models are as quick."""
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    return {
        key: list(tensor.shape)
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def main(out, names):
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    (out / "configs.json").write_text(json.dumps(configs))
    (out / "tensors.json").write_text(json.dumps({name: tensors(name) for name in names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
