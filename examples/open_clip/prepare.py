"""Writes a folder of a model, for the service and for `open_clip_train` (local-dir:FOLDER).

python examples/open_clip/prepare.py ViT-B-32 models/learner --siglip
python examples/open_clip/prepare.py ViT-B-32 models/reference --pretrained laion2b_s34b_b79k
"""

import argparse
import math
from pathlib import Path

import open_clip
from superbatch.open_clip import export


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
        config |= {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    scale = {name: value for name, value in config.items() if name.startswith("init_logit")}
    model = open_clip.create_model(args.model, pretrained=args.pretrained, **scale)
    export(model, args.folder, args.model, model_cfg=config)


if __name__ == "__main__":
    main()
