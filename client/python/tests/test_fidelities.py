"""Two fidelities in one step by larger patches, fewer patches and fewer layers: with models of
transformers, open_clip and timm, compiled, and under DDP.
"""

import copy
from pathlib import Path

import pytest
import superbatch.torch
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import PatchDropout
from superbatch import Approximation
from superbatch.torch import TwoFidelities, TwoResolutions, two_fidelities, two_resolutions
from superbatch.torch.fidelities import embedded
from superbatch.torch.patches import shrunk
from superbatch.torch.resolutions import tensor_of
from superbatch.torch.towers import drawn
from superbatch.torch.ways import way_of
from timm.layers import resample_patch_embed
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from transformers import (
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

SIDE, PATCH, LAYERS = 32, 8, 2
WAYS = [
    Approximation(patch=16),
    Approximation(patch_dropout=0.5),
    Approximation(layers=1),
]
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
}
VISION = {**TOWER, "image_size": SIDE, "patch_size": PATCH}
TEXT = {**TOWER, "vocab_size": 50, "max_position_embeddings": 6}


def perturbed(kind: type, *given, **named) -> torch.nn.Module:
    """The same model at each call. No tensor stays at a value (zero, one) that would hide that it
    is not used.
    """
    torch.manual_seed(0)
    model = kind(*given, **named)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def siglip() -> torch.nn.Module:
    return perturbed(SiglipModel, SiglipConfig(vision_config=VISION, text_config=TEXT))


def clip() -> torch.nn.Module:
    text = {**TEXT, "eos_token_id": 49}
    return perturbed(CLIPModel, CLIPConfig(vision_config=VISION, text_config=text))


def open_clip(**changes) -> torch.nn.Module:
    vision = {"image_size": SIDE, "layers": LAYERS, "width": 16, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    vision |= {"patch_size": PATCH, **changes}
    return perturbed(CLIP, embed_dim=12, vision_cfg=vision, text_cfg=text)


def timm() -> torch.nn.Module:
    """A trunk with a class token; its patches are of 16 pixels, its layers twelve."""
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}
    text = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return perturbed(CustomTextCLIP, embed_dim=12, vision_cfg=vision, text_cfg=text)


SMALL = [siglip, clip, open_clip]


def batch(rows: int = 3, side: int = SIDE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 49, (2 * rows, 6), generator=generator)
    ids[:, -1] = 49
    full, low = (torch.randn(rows, 3, side, side, generator=generator) for _ in range(2))
    return full, low, ids


def own(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "get_image_features"):
        return tensor_of(model.get_image_features(pixels))
    return model.encode_image(pixels)


def field(low: Approximation) -> str:
    return next(name for name, value in vars(low).items() if value is not None)


@pytest.mark.parametrize("low", WAYS, ids=field)
@pytest.mark.parametrize("make", [*SMALL, timm])
def test_full_rows_and_the_state_dict_stay_what_they_are(make, low):
    model = make()
    side = 224 if make is timm else SIDE
    low = Approximation(patch=32) if make is timm and low.patch else low
    full, small, ids = batch(2, side)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = own(model, full)
    two = TwoFidelities(model, low)
    images, texts, scale, _ = two(full, small, ids)
    torch.testing.assert_close(images[:2], wanted)
    assert images.shape == (4, wanted.shape[1]) and texts.shape == images.shape
    apart = (F.normalize(images[2:], dim=-1) * F.normalize(own(model, small), dim=-1)).sum(1)
    assert (apart < 0.9999).all(), "low rows are another thing than full ones"
    torch.testing.assert_close(scale, model.logit_scale.exp())
    torch.testing.assert_close(own(model, full), wanted)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [name for name, _ in two.named_parameters()] == [
        f"model.{name}" for name, _ in model.named_parameters()
    ]
    assert two_fidelities(model, (full, small[:0]), low).shape == wanted.shape


@pytest.mark.parametrize("is_training", [False, True])
def test_low_rows_alone_are_what_they_are_beside_full_ones(is_training):
    model, (full, small, _) = siglip().train(is_training), batch()
    for low in WAYS:
        torch.manual_seed(7)
        both = two_fidelities(model, (full, small), low)
        torch.manual_seed(7)
        torch.testing.assert_close(two_fidelities(model, (full[:0], small), low), both[3:])


def test_larger_patches_train_the_kernel_through_the_resizing():
    """The same embeddings and gradients as a tower of larger patches whose kernel and grid are
    resized in its graph.
    """
    model, (_, pixels, _) = siglip(), batch()
    tensors = dict(model.vision_model.named_parameters())
    kernel, grid = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
    square = tensors[grid].mT.reshape(1, 16, SIDE // PATCH, SIDE // PATCH)
    square = F.interpolate(square, (2, 2), mode="bicubic", align_corners=False)
    resized = {
        kernel: resample_patch_embed(
            tensors[kernel], [16, 16], interpolation="bilinear", antialias=False
        ),
        grid: square.reshape(16, 4).mT,
    }
    config = SiglipConfig(vision_config={**VISION, "patch_size": 16}, text_config=TEXT)
    other = SiglipModel(config).vision_model
    plain = functional_call(other, {**tensors, **resized}, (pixels,)).pooler_output
    found = two_fidelities(model, (pixels[:0], pixels), WAYS[0])
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * weights).sum(), list(tensors.values()))
    gradients = torch.autograd.grad((found * weights).sum(), list(tensors.values()))
    for name, ours, theirs in zip(tensors, gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda m: f"{name}: {m}")
    assert gradients[list(tensors).index(kernel)].abs().sum() > 0


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("kernel_filter", ["bilinear", "bicubic"])
def test_a_shrunk_patch_gives_what_a_resized_kernel_gives(kernel_filter, antialias):
    torch.manual_seed(4)
    kernel, pixels = torch.randn(5, 3, 14, 14), torch.randn(2, 3, 84, 84)
    for patch in (21, 28, 84):
        how = {"interpolation": kernel_filter, "antialias": antialias}
        wanted = F.conv2d(pixels, resample_patch_embed(kernel, [patch] * 2, **how), stride=patch)
        small = shrunk(pixels, 14, patch, (kernel_filter, antialias))
        found = F.conv2d(small, kernel, stride=14)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        halved = shrunk(pixels.bfloat16(), 14, patch, (kernel_filter, antialias))
        assert halved.dtype == torch.bfloat16 and (halved - small).abs().max() < 0.1


def test_a_models_own_filter_resizes_its_kernel():
    """What `resize.json` says, and what timm takes if nothing is said."""
    model, (_, pixels, _) = timm(), batch(2, 224)
    given = Approximation(patch=32)
    plain, same, other = (
        two_fidelities(model, (pixels[:0], pixels), given, **how)
        for how in (
            {},
            {"kernel_filter": "bicubic", "kernel_antialias": True},
            {"kernel_filter": "bilinear", "kernel_antialias": False},
        )
    )
    torch.testing.assert_close(plain, same)
    assert (plain - other).abs().max() > 1e-4


@pytest.mark.parametrize("make", [*SMALL, timm])
def test_all_patches_in_any_order_are_the_full_image(make):
    model, side = make(), 224 if make is timm else SIDE
    _, pixels, _ = batch(2, side)
    way = way_of(model, Approximation(patch_dropout=0.5))
    patches = (way.shape.image // way.shape.patch) ** 2
    places = torch.rand(2, patches).argsort(dim=1)
    found = embedded(model, (pixels[:0], pixels), way, places)
    torch.testing.assert_close(found, own(model, pixels), rtol=1e-4, atol=1e-4)


def test_patches_are_left_out_as_open_clip_does_it():
    model, (_, pixels, _) = open_clip(), batch()
    theirs = copy.deepcopy(model)
    theirs.visual.patch_dropout = PatchDropout(0.75).train()
    torch.manual_seed(3)
    wanted = theirs.encode_image(pixels)
    torch.manual_seed(3)
    places = torch.randn(3, 16).topk(4, dim=-1).indices
    way = way_of(model, Approximation(patch_dropout=0.75))
    torch.testing.assert_close(embedded(model, (pixels[:0], pixels), way, places), wanted)


def test_each_row_and_each_step_draws_its_own_patches():
    of = lambda rows, share=0.5: drawn(rows, 16, share, torch.device("cpu"))
    torch.manual_seed(5)
    first, second = of(4000), of(4000)
    assert first.shape == (4000, 8) and not torch.equal(first, second)
    assert all(len(set(row)) == 8 for row in first[:50].tolist())
    # 2,000 expected, with a standard deviation of 32.
    counts = first.flatten().bincount(minlength=16)
    assert 1800 < counts.min() and counts.max() < 2200
    torch.manual_seed(5)
    assert torch.equal(of(4000), first), "by torch's generator"
    assert drawn(1, 49, 0.5, torch.device("cpu")).shape == (1, 24) and of(1, 0.99).shape == (1, 1)


@pytest.mark.parametrize("make", [*SMALL, timm])
def test_the_first_layers_are_those_of_a_model_that_has_no_more(make):
    model, side = make(), 224 if make is timm else SIDE
    _, pixels, _ = batch(2, side)
    cut = copy.deepcopy(model)
    if hasattr(model, "vision_model"):
        del cut.vision_model.encoder.layers[1:]
    else:
        del (cut.visual.trunk.blocks if make is timm else cut.visual.transformer.resblocks)[1:]
    found = two_fidelities(model, (pixels[:0], pixels), Approximation(layers=1))
    torch.testing.assert_close(found, own(cut, pixels))


@pytest.mark.parametrize(
    ("make", "low"),
    [*((siglip, low) for low in WAYS), (clip, WAYS[2]), (open_clip, WAYS[1]), (open_clip, WAYS[2])],
    ids=lambda given: getattr(given, "__name__", None) or field(given),
)
def test_checkpointed_and_compiled_it_is_the_same(make, low):
    model, (full, small, ids) = TwoFidelities(make(), low), batch()

    def gradients(forward) -> list[torch.Tensor]:
        torch.manual_seed(2)
        images, texts, scale, _ = forward(full, small, ids)
        cosines = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        return torch.autograd.grad((cosines * scale).square().sum(), used)

    used = [p for name, p in model.named_parameters() if not name.endswith("logit_bias")]
    wanted = gradients(model)
    # The graphs are captured as for any backend; code is not generated, which would need a
    # compiler. Shapes of other tests' models are forgotten, or these would be taken for dynamic.
    torch.compiler.reset()
    compiled = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    if make is open_clip:
        model.model.set_grad_checkpointing()
    else:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(model.train())
    for theirs in (compiled, checkpointed):
        for ours, other in zip(wanted, theirs, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-4)


def loss_of(model, rank: int, parts) -> torch.Tensor:
    """Of one of two ranks, which draws its patches by its own seed."""
    full, small, ids = parts
    each = slice(2 * rank, 2 * rank + 2)
    torch.manual_seed(rank)
    texts = torch.cat([ids[:4][each], ids[4:][each]])
    images, texts, scale, bias = model(full[each], small[each], texts)
    return (images * texts[-len(images) :]).sum() * scale + bias.sum()


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    towers = (model.model.vision_model, model.model.text_model)
    for layer in (layer for tower in towers for layer in tower.encoder.layers):
        fully_shard(layer)
    return fully_shard(model)


def of_one_rank(rank: int, world: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world
    )
    found = {}
    for low in WAYS:
        ddp = torch.nn.parallel.DistributedDataParallel(TwoFidelities(siglip(), low))
        loss_of(ddp, rank, batch(4)).backward()
        found["ddp", field(low)] = {name: p.grad for name, p in ddp.module.named_parameters()}
        fsdp = sharded(TwoFidelities(siglip(), low))
        loss_of(fsdp, rank, batch(4)).backward()
        found["fsdp", field(low)] = {
            name: p.grad.full_tensor() for name, p in fsdp.named_parameters()
        }
    # In a step of low rows alone, later layers have no gradient. The second step would fail.
    whole = TwoFidelities(siglip(), Approximation(layers=1))
    ddp = torch.nn.parallel.DistributedDataParallel(whole, find_unused_parameters=True)
    full, low_rows, ids = batch(4)
    for _ in range(2):
        loss_of(ddp, rank, (full[:0], low_rows, ids)).backward()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


def test_ranks_of_ddp_and_fsdp_get_the_gradient_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(of_one_rank, (2, tmp_path), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    for low in WAYS:
        model = TwoFidelities(siglip(), low)
        (sum(loss_of(model, rank, batch(4)) for rank in range(2)) / 2).backward()
        for wrapper in ("ddp", "fsdp"):
            for name, parameter in model.named_parameters():
                gradient = found[wrapper, field(low)][name]
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_resolution_is_one_of_the_ways():
    model, (full, _, ids) = siglip(), batch()
    small = torch.randn(3, 3, 16, 16)
    wanted = two_resolutions(model, (full, small))
    low = Approximation(resolution=16)
    torch.testing.assert_close(two_fidelities(model, (full, small), low), wanted)
    for two in (TwoFidelities(model, low), TwoResolutions(model)):
        torch.testing.assert_close(two(full, small, ids)[0], wanted)
    with pytest.raises(superbatch.Error, match="to be of 24"):
        two_fidelities(model, (full, small), Approximation(resolution=24))
    assert two_fidelities(lambda x: x.mean((1, 2, 3))[:, None], (full, small), low).shape == (6, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch": 12}, "a divisor of 32 above 8"),
        ({"patch": 8}, "a divisor of 32 above 8"),
        ({"patch": 0}, "at least 1"),
        ({"layers": 2}, "has 2 layers"),
        ({"patch_dropout": 1.0}, "above 0 and below 1"),
        ({"patch_dropout": "half"}, "above 0 and below 1"),
        ({"patch": 16, "layers": 1}, "patch and layers; give one of"),
        ({}, "nothing; give one of"),
    ],
)
@pytest.mark.parametrize("make", SMALL)
def test_what_a_model_cannot_be_run_at_is_refused(make, changes, said):
    with pytest.raises(superbatch.InvalidArgument, match=said) as caught:
        TwoFidelities(make(), Approximation(**changes))
    assert caught.value.metadata["field"].startswith("approximation")


def naflex() -> torch.nn.Module:
    vision = {**TOWER, "num_patches": 16, "patch_size": PATCH}
    return Siglip2Model(Siglip2Config(vision_config=vision, text_config=TEXT))


def resnet() -> torch.nn.Module:
    return open_clip(layers=[1, 1, 1, 1], width=8)


@pytest.mark.parametrize("low", WAYS, ids=field)
def test_models_without_a_vit_that_is_known_are_refused(low):
    for model in (naflex(), resnet(), torch.nn.Linear(2, 2), lambda pixels: pixels):
        with pytest.raises(superbatch.Error, match="reaches into the image tower") as caught:
            two_fidelities(model, batch()[:2], low)
        assert caught.value.metadata["field"] == "model_call"


def test_rows_that_cannot_be_meant_are_refused():
    full, small, _ = batch()
    for low in WAYS:
        with pytest.raises(superbatch.Error, match="low rows are images of 16 pixels"):
            two_fidelities(siglip(), (full, small[..., :16, :16]), low)
    with pytest.raises(superbatch.Error, match="set its own patch dropout to 0"):
        TwoFidelities(open_clip(patch_dropout=0.5), WAYS[1])
    with pytest.raises(superbatch.Error, match="Approximation"):
        TwoFidelities(siglip(), 16)
    with pytest.raises(superbatch.Error, match='"bilinear" or "bicubic"'):
        TwoFidelities(siglip(), WAYS[0], kernel_filter="lanczos")
