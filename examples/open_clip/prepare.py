"""Writes a folder of a model, for the service and for `open_clip_train` (local-dir:FOLDER).

    python examples/open_clip/prepare.py ViT-B-32 models/learner
    python examples/open_clip/prepare.py ViT-B-32 models/reference --pretrained laion2b_s34b_b79k

Config, weights, and the tokenizer as `tokenizer.json`, which folders on the hub have already.
"""

import argparse
import json
from pathlib import Path

import numpy
import open_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_tokenizer(own: SimpleTokenizer, length: int) -> Tokenizer:
    """open_clip's byte-pair encoding, which it has as a text file of its own."""
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.get)
    begin, end = "<start_of_text>", "<end_of_text>"
    made = Tokenizer(
        models.BPE(
            own.encoder,
            merges,
            unk_token=end,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ids = [(token, own.encoder[token]) for token in (begin, end)]
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=ids
    )
    made.add_special_tokens([AddedToken(token, special=True) for token in (begin, end)])
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=0, pad_token="!")
    return made


def write_folder(model: open_clip.CLIP, config: dict, tokenizer, folder: Path) -> Path:
    """config: the architecture, as open_clip's own files under `model_configs` have it."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"mean": model.visual.image_mean, "std": model.visual.image_std}
    about |= getattr(model.visual, "preprocess_cfg", {})
    text = json.dumps({"model_cfg": config, "preprocess_cfg": about}, indent=2)
    (folder / "open_clip_config.json").write_text(text)
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.save_pretrained(str(folder))
    else:
        length = config["text_cfg"]["context_length"]
        clip_tokenizer(tokenizer, length).save(str(folder / "tokenizer.json"))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an architecture that open_clip knows")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pretrained", help="weights that open_clip knows; without, random ones")
    parser.add_argument(
        "--siglip", action="store_true", help="scale and bias as open_clip_train --siglip has them"
    )
    args = parser.parse_args(argv)
    config = dict(open_clip.get_model_config(args.model))
    if args.siglip:
        config |= {"init_logit_scale": float(numpy.log(10)), "init_logit_bias": -10.0}
    scale = {name: value for name, value in config.items() if name.startswith("init_logit")}
    model = open_clip.create_model(args.model, pretrained=args.pretrained, **scale)
    write_folder(model, config, open_clip.get_tokenizer(args.model), args.folder)


if __name__ == "__main__":
    main()
