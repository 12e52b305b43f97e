"""Two resolutions in one step: with transformers and open_clip models, compiled, and under DDP."""

import copy

import open_clip
import pyarrow
import pytest
import superbatch.torch
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from superbatch import Batch
from superbatch.torch import TwoResolutions, by_fidelity, two_resolutions
from transformers import SiglipConfig, SiglipModel

FULL, LOW = 32, 16


def siglip() -> torch.nn.Module:
    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    return SiglipModel(
        SiglipConfig(
            vision_config={**tower, "image_size": FULL, "patch_size": 8},
            text_config={**tower, "vocab_size": 50, "max_position_embeddings": 6},
        )
    ).eval()


def clip() -> torch.nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": FULL, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text).eval()


def batch(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (2 * rows, 6), generator=generator)
    full, low = (torch.randn(rows, 3, side, side, generator=generator) for side in (FULL, LOW))
    return full, low, ids


def test_the_rows_of_a_batch_are_told_apart_in_their_order():
    names = ["approximate", "full", "approximate", "full"]
    record_batch = pyarrow.RecordBatch.from_pydict(
        {"caption": list("abcd"), "_superbatch_fidelity": names}
    )
    full, low = by_fidelity(Batch(record_batch, {}, 7, 1, 2))
    assert full["caption"].to_pylist() == ["b", "d"] and low["caption"].to_pylist() == ["a", "c"]
    assert (full.step, low.rank, low.world_size) == (7, 1, 2)


@pytest.mark.parametrize("make", [siglip, clip])
def test_both_sizes_are_embedded_in_one_go(make):
    model, (full, low, _) = make(), batch()
    own = model.get_image_features if hasattr(model, "get_image_features") else model.encode_image
    found = two_resolutions(model, (full, low))
    assert found.shape[0] == 6
    torch.testing.assert_close(found[:3], own(full))
    torch.testing.assert_close(two_resolutions(model, (full[:0], low)), found[3:])
    # An embedding at the low size is not that of the same image at the full one, and is no noise
    # either.
    flat = torch.ones(1, 3, FULL, FULL) * torch.linspace(-1, 1, FULL)
    large, small = (
        F.normalize(x, dim=-1)
        for x in two_resolutions(
            model, (flat, F.interpolate(flat, size=(LOW, LOW), mode="area"))
        ).split(1)
    )
    assert 0.5 < (large * small).sum() < 1.0


def test_a_tower_of_timm_takes_two_sizes_as_dynamic_img_size_does():
    config = copy.deepcopy(open_clip.get_model_config("ViT-B-16-SigLIP"))
    config["text_cfg"] |= {
        "layers": 1,
        "width": 64,
        "heads": 2,
        "vocab_size": 50,
        "context_length": 6,
    }
    torch.manual_seed(0)
    model = CustomTextCLIP(
        **{key: value for key, value in config.items() if key != "custom_text"}
    ).eval()
    names = list(model.state_dict())
    full, low = torch.randn(1, 3, 224, 224), torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        own = model.encode_image(full)
        found = two_resolutions(model, (full, low))
    torch.testing.assert_close(found[:1], own)
    assert found.shape == (2, 768) and list(model.state_dict()) == names


def test_gradients_of_one_loss_reach_all_through_both_sizes():
    model, (full, low, ids) = TwoResolutions(siglip()), batch()
    images, texts, scale, bias = model(full, low, ids)
    (
        F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * scale + bias
    ).sigmoid().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    half = siglip()
    two_resolutions(half, (full[:0], low)).sum().backward()
    assert half.vision_model.embeddings.position_embedding.weight.grad.abs().sum() > 0, (
        "the grid is trained at the low size, too"
    )


@pytest.mark.parametrize("make", [siglip, clip])
def test_compiled_it_is_the_same(make):
    model, (full, low, ids) = TwoResolutions(make()), batch()
    wanted = model(full, low, ids)
    # The graphs are captured as for any backend; code is not generated, which would need a
    # compiler. Shapes of other tests' models are forgotten, or these would be taken for dynamic.
    torch.compiler.reset()
    found = torch.compile(model, backend="aot_eager")(full, low, ids)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])


def of_one_rank(rank: int, world: int, store: str, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    model = torch.nn.parallel.DistributedDataParallel(TwoResolutions(siglip()))
    full, low, ids = batch(4)
    each = slice(2 * rank, 2 * rank + 2)
    images, texts, scale, bias = model(
        full[each], low[each], torch.cat([ids[:4][each], ids[4:][each]])
    )
    ((images * texts).sum() * scale + bias.sum()).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.module.named_parameters()}, out)
    torch.distributed.destroy_process_group()


def test_ranks_of_ddp_get_the_gradient_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(
        of_one_rank, (2, str(tmp_path / "store"), str(tmp_path / "grads")), nprocs=2
    )
    found = torch.load(tmp_path / "grads")
    model, (full, low, ids) = TwoResolutions(siglip()), batch(4)
    images, texts, scale, bias = model(full, low, ids)
    ((images * texts).sum() / 2 * scale + bias.sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_what_takes_one_size_is_refused():
    with pytest.raises(superbatch.Error, match="neither of transformers nor of open_clip"):
        two_resolutions(torch.nn.Linear(2, 2), (torch.zeros(1, 2), torch.zeros(1, 2)))
    assert two_resolutions(lambda pixels: pixels.mean((1, 2, 3))[:, None], batch()[:2]).shape == (
        6,
        1,
    )
