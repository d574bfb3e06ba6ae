"""What is predicted: embeddings and pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsejepa.config import preset
from sparsejepa.model.jepa import SparseJEPA, make_targets
from sparsejepa.model.vit import ViT
from sparsejepa.training.build import build_model


def model_of(**settings: object) -> SparseJEPA:
    config = preset("nano").replace(patch_size=8, num_groups=4, **settings)
    return build_model(config, (32, 40), 100)


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 32, 40, generator=torch.Generator().manual_seed(0))


def standardised(x: Tensor, eps: float) -> Tensor:
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (variance + eps).sqrt()


@pytest.fixture
def encoder() -> ViT:
    torch.manual_seed(0)
    vit = ViT((32, 40), 8, 24, 4, 3).double().eval()
    with torch.no_grad():
        for p in vit.norm.parameters():
            p.copy_(torch.randn_like(p) + 1)
    return vit


def test_targets_are_the_tokens_normalised(encoder: ViT) -> None:
    x = images().double()
    got = make_targets(encoder, x)
    torch.testing.assert_close(got, standardised(encoder(x), 1e-5), rtol=1e-9, atol=1e-9)
    assert not got.requires_grad


def test_pixel_targets_are_the_unfolded_image_standardised_by_hand(encoder: ViT) -> None:
    x = images().double()
    x[0, :, :8, :8] = 0.7  # a flat patch is 0, not a division by 0
    got = make_targets(encoder, x, predict="pixels")
    patches = F.unfold(x, 8, stride=8).transpose(1, 2)  # [B, N, 3 p^2], colours outermost
    spread = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(got, (patches - patches.mean(-1, keepdim=True)) / spread)
    assert got[0, 0].abs().max() < 1e-9


@pytest.mark.parametrize("groups", ["none", "region", "concept"])
@pytest.mark.parametrize("predictor", ["transformer", "mlp"])
def test_pixels_never_touch_the_target_encoder_that_still_follows(
    groups: str, predictor: str
) -> None:
    model = model_of(predict="pixels", groups=groups, predictor=predictor, drop_path=0.1)
    assert model.predictor is not None
    plain = model_of(groups=groups, predictor=predictor, drop_path=0.1)
    pairs = zip(model.context_encoder.parameters(), plain.context_encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # the same start as every arm
    with torch.no_grad():
        model.predictor.get_parameter("proj.weight").zero_()
        for p in model.target_encoder.parameters():
            p.fill_(torch.nan)
    masks = model.sampler.sample(3, seed=0, step=0)
    losses = model.train()(images(), step=0, masks=masks)
    patches = F.unfold(images(), 8, stride=8).transpose(1, 2)
    spread = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    patches = (patches - patches.mean(-1, keepdim=True)) / spread
    wanted = torch.stack([p[i] for p, i in zip(patches, masks.targets.flatten(1), strict=True)])
    expected = F.smooth_l1_loss(torch.zeros_like(wanted), wanted)  # the bias starts at 0
    if predictor == "mlp":
        bias = model.predictor.get_parameter("proj.bias")
        expected = F.smooth_l1_loss(bias.expand_as(wanted), wanted)
    torch.testing.assert_close(losses.prediction, expected)
    losses.total.backward()
    assert all(p.grad is not None for p in model.context_encoder.blocks.parameters())
    assert (losses.group > 0) == (groups != "none")
    assert not model.target_encoder.training  # it is what is evaluated, without stochastic depth
    fresh = model_of(predict="pixels", groups="none")
    with torch.no_grad():
        fresh.context_encoder.norm.weight.fill_(3.0)
    fresh.after_step(0)
    assert 1 < float(fresh.target_encoder.norm.weight[0].detach()) < 3
