"""examples/open_clip: the released trainer, with one and two ranks, by epochs, and resumed."""

import os
from pathlib import Path

import open_clip
import pytest
import torch
from commands import run
from recipe import SUB_BATCH_SIZE, SUPER_BATCH_SIZE, Recipes, module, recipes, script  # noqa: F401
from superbatch.open_clip import built_in, export

EPOCH_STEPS = 2
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_folder(folder: Path, seed: int, siglip: bool) -> Path:
    """An open_clip folder with random weights."""
    config = {**CONFIG, "init_logit_bias": -5.0} if siglip else CONFIG
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    return export(model, folder, model_cfg=config, preprocess_cfg=about, tokenizer=tokenizer)


def test_the_tokenizer_that_is_written_is_open_clips_own():
    own = open_clip.SimpleTokenizer()
    written = built_in(own)
    # As the service cuts and pads.
    written.enable_truncation(own.context_length)
    written.enable_padding(length=own.context_length, pad_id=0)
    captions = [
        "a photo of a cat",
        "  Two   DOGS, running!  it's 2024\n",
        "Überraschung: naïve café – 日本語 🙂",
        "don't you'll we've I'm he'd they're",
        "x" * 400,
        "",
        "a very long caption " * 30,
    ]
    assert [found.ids for found in written.encode_batch(captions)] == own(captions).tolist()


def test_doctor_reads_a_folder_as_a_worker_does(tmp_path):
    folder = write_folder(tmp_path / "model", 0, siglip=True)
    asked = ("doctor", "--state", (tmp_path / "state").as_uri(), "--model", folder.as_uri())
    anywhere = {
        f"SUPERBATCH_{name}": "127.0.0.1:0" for name in ("LISTEN", "METRICS_LISTEN", "PAGE_LISTEN")
    }
    ended = run(*asked, env={**os.environ, **anywhere})
    assert ended.returncode == 0, ended.stderr
    assert (
        f"ok    model {folder.as_uri()}: its files can be read, and it has weights" in ended.stdout
    )
    (folder / "tokenizer.json").unlink()
    ended = run(*asked, env={**os.environ, **anywhere})
    assert ended.returncode == 1 and "tokenizer.json" in ended.stderr
    assert "docs/errors.md#invalid_argument" in ended.stderr


@pytest.fixture(scope="module", params=["sigmoid", "softmax"])
def folders(request, tmp_path_factory) -> tuple[str, Path]:
    folder, siglip = tmp_path_factory.mktemp(request.param), request.param == "sigmoid"
    write_folder(folder / "learner", 0, siglip)
    write_folder(folder / "reference", 1, siglip)
    return request.param, folder


def arguments(recipes: Recipes, folders, name: str, logs: Path, ranks: int = 1, **more):
    loss, folder = folders
    given = {
        "service": recipes.address,
        "reference": folder / "reference",
        "super-batch-size": SUPER_BATCH_SIZE,
        "n-chunks": 4,
        "model": f"local-dir:{folder / 'learner'}",
        "train-data": (recipes.inputs / "pool").as_uri(),
        "train-num-samples": EPOCH_STEPS * SUB_BATCH_SIZE,
        "batch-size": SUB_BATCH_SIZE // ranks,
        "name": name,
        "logs": logs,
        "warmup": 1,
        "lr": 1e-3,
        "workers": 0,
        "precision": "fp32",
        "device": "cpu",
        "log-every-n-steps": 1,
        **more,
    }
    flags = ["--siglip"] if loss == "sigmoid" else []
    return [word for key, value in given.items() for word in (f"--{key}", str(value))] + flags


def test_it_trains_by_epochs_and_resumes(recipes, folders, tmp_path):  # noqa: F811
    name = f"open-clip-{folders[0]}"
    train = module("open_clip")
    for epochs, resume in ((1, {}), (2, {"resume": "latest"})):
        train.main(arguments(recipes, folders, name, tmp_path, epochs=epochs, **resume))
        recipes.assert_trained(name, epochs * EPOCH_STEPS)
    log = (tmp_path / name / "out.log").read_text()
    done = EPOCH_STEPS * SUB_BATCH_SIZE
    assert f"Train Epoch: 0 [{done}/{done} (100%)]" in log
    assert f"Train Epoch: 1 [{done}/{done} (100%)]" in log


def test_two_ranks_train_and_resume(recipes, folders, tmp_path):  # noqa: F811
    name = f"open-clip-ranks-{folders[0]}"
    for epochs, resume in ((1, {}), (2, {"resume": "latest"})):
        given = arguments(
            recipes, folders, name, tmp_path, ranks=2, epochs=epochs, workers=1, **resume
        )
        script("open_clip/train.py", given, ranks=2)
        recipes.assert_trained(name, epochs * EPOCH_STEPS)
