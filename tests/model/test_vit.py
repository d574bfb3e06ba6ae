"""The encoder against timm, against arithmetic written out by hand, and against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from sparsejepa.errors import UserError
from sparsejepa.model.vit import (
    Attention,
    Block,
    Linear,
    ViT,
    sincos_position_embedding,
)


def small(seed: int = 0, **kwargs) -> ViT:
    """A float64 encoder of 4 x 6 patches (3 x 2 pixels each), with every weight random."""
    torch.manual_seed(seed)
    kwargs = {"img_size": (12, 12), "patch_size": (3, 2), "embed_dim": 16, "depth": 2} | kwargs
    model = ViT(num_heads=kwargs.pop("num_heads", 2), **kwargs).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


def from_timm(reference: Any, **kwargs) -> ViT:
    """Our encoder with the weights of a timm model; strict, apart from timm's classifier."""
    model = ViT(pos_embed="learned", **kwargs).double().eval()
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("head.")}
    model.load_state_dict(weights, strict=True)
    return model


def test_timm_with_class_token():
    torch.manual_seed(0)
    reference: Any = timm.create_model("vit_tiny_patch16_224", pretrained=False).double().eval()
    model = from_timm(reference, img_size=224, patch_size=16, class_token=True)
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        wanted = reference.forward_features(images)
        torch.testing.assert_close(model(images), wanted[:, 1:], rtol=0, atol=1e-10)
        layers = reference.get_intermediate_layers(images, n=4, norm=True)
        for ours, theirs in zip(model.forward_intermediates(images, 4), layers, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_timm_average_pooled_and_not_square():
    torch.manual_seed(1)
    reference = VisionTransformer(
        img_size=(24, 40), patch_size=(8, 4), embed_dim=48, depth=3, num_heads=4, mlp_ratio=3.0,
        class_token=False, global_pool="avg", fc_norm=False,
    ).double().eval()  # fmt: skip
    for parameter in reference.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    model = from_timm(
        reference, img_size=(24, 40), patch_size=(8, 4), embed_dim=48, depth=3, num_heads=4,
        mlp_ratio=3.0,
    )  # fmt: skip
    images = torch.randn(3, 3, 24, 40, dtype=torch.float64)
    index = torch.rand(3, 30).argsort(1)[:, :7]
    with torch.no_grad():
        wanted = reference.forward_features(images)
        torch.testing.assert_close(model(images), wanted, rtol=0, atol=1e-10)
        # Some patches alone: timm's own blocks on their tokens.
        tokens = reference.patch_embed(images) + reference.pos_embed
        seen = tokens.take_along_dim(index[..., None], 1)
        wanted = reference.norm(reference.blocks(seen))
        torch.testing.assert_close(model(images, index), wanted, rtol=0, atol=1e-10)


def test_gradients_reach_every_weight_and_the_given_pixels_only():
    model = small()
    images = torch.randn(1, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    model(images, torch.tensor([[7, 8]])).square().mul(torch.arange(16) + 1.0).sum().backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert images.grad is not None
    touched = torch.zeros(12, 12, dtype=torch.bool)
    touched[3:6, 2:6] = True  # patches 7 and 8: row 1, columns 1 and 2
    assert torch.equal(images.grad[0].abs().sum(0) > 0, touched)


def test_sincos_formula():
    rows, cols, dim = 3, 5, 24
    embedding = sincos_position_embedding((rows, cols), dim)
    assert embedding.shape == (15, 24)
    for n in range(15):
        for i in range(6):
            w = 10000 ** (-i / 6)
            r, c = n // cols, n % cols
            wanted = [math.sin(c * w), math.cos(c * w), math.sin(r * w), math.cos(r * w)]
            assert embedding[n, i::6].tolist() == pytest.approx(wanted, abs=1e-6)


def test_stochastic_depth_skips_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block = Block(8, 2, drop_path=0.4).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    attention = block.attn(block.norm1(x)) / 0.6
    with torch.no_grad():
        outputs = block(x.expand(4000, -1, -1))
        full = x + attention
        cases = torch.cat([
            start + kept * block.mlp(block.norm2(start)) / 0.6
            for start in (x, full) for kept in (0, 1)
        ])  # fmt: skip
    distance = (outputs[:, None] - cases).flatten(2).norm(dim=2)
    assert distance.min(1).values.max() < 1e-10
    share = torch.bincount(distance.argmin(1), minlength=4) / 4000
    for got, wanted in zip(share.tolist(), [0.16, 0.24, 0.24, 0.36], strict=True):
        assert abs(got - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 4000)
    assert torch.equal(block.eval()(x), Block.forward(block, x))


def test_impossible_sizes():
    with pytest.raises(UserError, match="5x5 pixels do not tile images of 32x32"):
        ViT(32, 5)
    with pytest.raises(UserError, match="3x4 pixels do not tile images of 32x16"):
        ViT((32, 16), (3, 4))
    with pytest.raises(UserError, match="5 attention heads do not divide the width 96"):
        ViT(32, 4, 96, 2, 5)
    with pytest.raises(UserError, match="multiple of 4"):
        sincos_position_embedding((4, 4), 30)
    with pytest.raises(UserError, match="7 attention heads"):
        Attention(32, 7)


def test_impossible_inputs():
    model = ViT(8, 4, 16, 2, 2)
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 8, 8\], got \[2, 3, 8, 12\]"):
        model(torch.zeros(2, 3, 8, 12))
    with pytest.raises(ValueError, match=r"got \[3, 8, 8\]"):
        model(images[0])


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_one_pass_linear_layer_against_float64(gelu: bool, shape: tuple[int, ...]) -> None:
    """In bf16 on the CPU: values and all three gradients, and the same values without gradients."""
    torch.manual_seed(0)
    layer = Linear(12, 20)
    rounded = {name: p.detach().bfloat16().double() for name, p in layer.named_parameters()}
    x = torch.randn(shape).bfloat16()
    exact_x = x.double().requires_grad_()
    weight, bias = (rounded[name].requires_grad_() for name in ("weight", "bias"))
    exact = torch.nn.functional.linear(exact_x, weight, bias)
    exact = torch.nn.functional.gelu(exact) if gelu else exact
    exact.square().sum().backward()
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, gelu=gelu)
    assert y.dtype == torch.bfloat16
    y.square().sum().backward()
    pairs = [(y, exact), (x.grad, exact_x.grad), (layer.weight.grad, weight.grad)]
    pairs.append((layer.bias.grad, bias.grad))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pairs.append((layer(x, gelu=gelu), exact))
    for got, wanted in pairs:
        assert got is not None and wanted is not None
        assert (got.double() - wanted).norm() < 6e-3 * wanted.norm()
