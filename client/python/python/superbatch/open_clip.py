"""Folders of open_clip models for the service: `export(model, folder, ...)`; `python -m
superbatch.open_clip FOLDER NAME` writes the tokenizer of a folder that has none.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

from ._errors import invalid

#: What open_clip's built-in tokenizer splits a caption by.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def export(
    model: Any,
    folder: str | os.PathLike,
    model_name: str | None = None,
    *,
    model_cfg: dict[str, Any] | None = None,
    preprocess_cfg: dict[str, Any] | None = None,
    tokenizer: Any = None,
    weights: bool = True,
) -> Path:
    """Writes the folder that a run's `model_uri` names, from a model of open_clip.

    model_name: as `open_clip.create_model` takes it, such as "ViT-B-16"; or give `model_cfg`, the
    dict of such a name.
    preprocess_cfg: mean, std, interpolation and resize_mode of the images; by default the model's
    `visual.preprocess_cfg`.
    tokenizer: by default `open_clip.get_tokenizer(model_name)`.
    weights: whether to save `model.state_dict()`, too. A learner whose weights are pushed first
    needs none.
    """
    import open_clip

    config = model_cfg if model_cfg is not None else open_clip.get_model_config(model_name or "")
    if config is None:
        raise invalid("model_name", f"open_clip knows no model {model_name!r}; give its model_cfg")
    config = copy.deepcopy(config)
    size = model.visual.image_size
    config.setdefault("vision_cfg", {})["image_size"] = (
        size[0] if isinstance(size, (tuple, list)) else size
    )
    # `force_quick_gelu` makes another model of a name's configuration.
    is_quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    if is_quick != config.get("quick_gelu", False):
        config["quick_gelu"] = is_quick
    preprocess = dict(preprocess_cfg or getattr(model.visual, "preprocess_cfg", {}))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2))
    write_tokenizer(
        folder, tokenizer if tokenizer is not None else open_clip.get_tokenizer(model_name)
    )
    if weights:
        from safetensors.torch import save_file

        state = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in model.state_dict().items()
        }
        save_file(state, folder / "open_clip_model.safetensors")
    return folder


def write_tokenizer(folder: str | os.PathLike, tokenizer: Any) -> Path:
    """Writes `tokenizer.json` of one of open_clip's tokenizers."""
    folder = Path(folder)
    if hasattr(tokenizer, "bpe_ranks"):
        built_in(tokenizer).save(str(folder / "tokenizer.json"))
    else:
        getattr(tokenizer, "tokenizer", tokenizer).save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        message = (
            "it writes no tokenizer.json; give a fast tokenizer of transformers, or save one "
            "beside the model"
        )
        raise invalid("tokenizer", message)
    return folder / "tokenizer.json"


def built_in(tokenizer: Any) -> Any:
    """open_clip's `SimpleTokenizer` (CLIP's byte pairs) as one of the library tokenizers."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    first, last = tokenizer.decoder[start], tokenizer.decoder[end]
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    made = Tokenizer(
        models.BPE(tokenizer.encoder, merges, unk_token=last, end_of_word_suffix="</w>")
    )
    # The service cleans captions before it tokenizes them. What cleans alike here is for others who
    # read the file.
    straight = [
        normalizers.Replace(Regex(curled), to)
        for curled, to in (("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"'))
    ]
    made.normalizer = normalizers.Sequence(
        [
            *straight,
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.post_processor = processors.RobertaProcessing(
        sep=(last, end), cls=(first, start), trim_offsets=False, add_prefix_space=False
    )
    return made


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(
            "usage: python -m superbatch.open_clip FOLDER MODEL_NAME  (writes "
            "FOLDER/tokenizer.json)",
            file=sys.stderr,
        )
        return 2
    import open_clip

    print(write_tokenizer(arguments[0], open_clip.get_tokenizer(arguments[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
