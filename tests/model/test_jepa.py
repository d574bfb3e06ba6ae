"""The whole model: where gradients go, what the EMA does, what the arms share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsejepa.config import Config, preset
from sparsejepa.model.jepa import SparseJEPA, make_targets
from sparsejepa.model.vit import ViT
from sparsejepa.training.build import build_model


def small(**settings: object) -> Config:
    return preset("nano").replace(**{"num_groups": 8, "lam": 0.01, **settings})


def images(n: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def model_of(config: Config, total: int = 100) -> SparseJEPA:
    return build_model(config, (32, 32), total)


@pytest.mark.parametrize("groups", ["region", "concept", "feature"])
@pytest.mark.parametrize("kl", ["aggregate", "posterior"])
def test_gradients_reach_context_encoder_predictor_and_w_never_the_target(
    groups: str, kl: str
) -> None:
    model = model_of(small(groups=groups, kl=kl))
    model(images(), step=0).total.backward()
    for name, p in model.named_parameters():
        if name.startswith("target_encoder"):
            assert p.grad is None, name
            assert not p.requires_grad
        elif p.requires_grad:
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_each_term_alone_reaches_the_parts_that_it_should() -> None:
    model = model_of(small())

    def reached(term: str) -> set[str]:
        model.zero_grad()
        getattr(model(images(), step=0), term).backward()
        return {
            name.split(".")[0] + (".W" if name == "groups.W" else "")
            for name, p in model.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0
        }

    assert reached("prediction") == {"context_encoder", "predictor"}
    assert reached("group") == {"context_encoder", "groups", "groups.W"}
    assert reached("kl") == {"context_encoder"}
    assert reached("penalty") == {"groups.W"}


def test_total_is_the_weighted_sum_without_the_penalty() -> None:
    model = model_of(small(group_weight=0.3, beta=0.2))
    got = model(images(), step=3)
    kl = got.kl_marginal + got.kl_correlation
    torch.testing.assert_close(got.kl, kl)
    expected = got.prediction + 0.3 * got.group + 0.2 * kl
    torch.testing.assert_close(got.total, expected)


def test_total_of_the_paper_preset_has_posterior_kl_and_ridge() -> None:
    model = model_of(small(w_form="plain", kl="posterior", beta=0.2, loss="l2"))
    got = model(images(), step=3)
    assert model.groups is not None
    expected = got.prediction + 0.1 * got.group + 0.2 * got.kl
    torch.testing.assert_close(got.total, expected + 1e-3 * model.groups.ridge())
    model.eval()  # BatchNorm rests, so that only the posterior's noise can differ
    masks = model.sampler.sample(6, seed=0, step=0)
    first, again, other = (model(images(), step=s, masks=masks).group.item() for s in (3, 3, 4))
    assert first == again != other


def test_debias_keeps_the_zero_pattern_and_stops_the_shrinkage() -> None:
    model = model_of(small(lam=0.01, debias=0.5), total=10)
    assert model.groups is not None
    patterns = []
    for step in range(10):
        model(images(), step=step).total.backward()
        model.after_step(step)
        patterns.append(model.groups.block_norms() > 0)
    assert 1 / 8 < patterns[4].float().mean() < 0.9
    assert all(torch.equal(pattern, patterns[4]) for pattern in patterns[5:])
    assert not torch.equal(patterns[3], patterns[4])


@pytest.mark.parametrize("debias", [0.0, 0.2])
def test_the_density_is_exact_once_it_is_frozen(debias: float) -> None:
    model = model_of(small(density=0.3, debias=debias), total=30)
    assert model.groups is not None
    for step in range(30):
        model(images(), step=step).total.backward()
        model.after_step(step)
    kept = model.groups.block_norms() > 0
    assert int(kept.sum()) == round(0.3 * kept.numel()) and kept.any(0).all()


def test_groups_as_the_predictor_are_the_only_way_to_the_targets() -> None:
    model = model_of(small(predictor="groups", group_weight=0.3, beta=0.0))
    assert model.predictor is None and model.groups is not None
    got = model(images(), step=0)
    assert torch.equal(got.prediction, got.group) and torch.equal(got.total, got.group)
    with torch.no_grad():
        model.groups.W.zero_()
    model(images(), step=0).total.backward()  # nothing gets past a W of zeros
    reached = [p.grad for p in model.context_encoder.parameters() if p.grad is not None]
    assert all(grad.abs().max() == 0 for grad in reached)


def test_ema_follows_its_closed_form() -> None:
    model = model_of(small(groups="none", ema=0.8, ema_final=0.8))
    start = [p.clone() for p in model.target_encoder.parameters()]
    moved = [torch.randn_like(p) for p in start]
    with torch.no_grad():
        for p, value in zip(model.context_encoder.parameters(), moved, strict=True):
            p.copy_(value)
    for step in range(5):
        model.after_step(step)
    for p, a, b in zip(model.target_encoder.parameters(), start, moved, strict=True):
        torch.testing.assert_close(p.data, 0.8**5 * a + (1 - 0.8**5) * b)


def test_arms_with_one_seed_share_weights_and_masks() -> None:
    dense, sparse = model_of(small(groups="none")), model_of(small(lam=0.5))
    for part in ("context_encoder", "predictor"):
        pairs = zip(
            getattr(dense, part).parameters(), getattr(sparse, part).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    dense.loss = sparse.loss
    a, b = dense(images(), step=7), sparse(images(), step=7)
    assert torch.equal(a.prediction, b.prediction)
    other = model_of(small(groups="none", seed=1))
    stem = "context_encoder.patch_embed.proj.weight"
    assert not torch.equal(other.get_parameter(stem), dense.get_parameter(stem))


ENCODER = {"patch_embed.proj", *(f"blocks.{i}.{part}" for i in range(6) for part in (
    "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))}  # fmt: skip
PREDICTORS = {
    "transformer": {"embed", "proj", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1",
                    "blocks.0.mlp.fc2"},
    "mlp": {"embed", "embed_position", "proj"},
}  # fmt: skip
NETWORKS = {"none": "", "region": "AB", "concept": "AEMB", "feature": "AEMB"}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_only_matrices_decay(kind: str, predictor: str) -> None:
    """Not the biases that groups have one row each of, nor tokens and positions."""
    settings = {"predictor": predictor, "predictor_depth": 1, "kl": "posterior", "groups": kind}
    model = model_of(small(**settings))
    with torch.no_grad():  # as an encoder has them that a run goes on from
        model.context_encoder.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 96))
        model.context_encoder.pos_embed.requires_grad_(True)
    decays, rest = model.network_parameters()
    named = {id(p): name for name, p in model.named_parameters()}
    wanted = {f"context_encoder.{name}.weight" for name in ENCODER}
    wanted |= {f"predictor.{name}.weight" for name in PREDICTORS[predictor]}
    wanted |= {f"groups.networks.{letter}" for letter in NETWORKS[kind]}
    wanted |= {"log_variance.weight"} if kind != "none" else set()
    assert {named[id(p)] for p in decays} == wanted
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(named[id(p)] for p in decays + rest) == sorted(trained - {"groups.W"})


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
    x = torch.randn(3, 3, 32, 40, dtype=torch.float64)
    got = make_targets(encoder, x)
    torch.testing.assert_close(got, standardised(encoder(x), 1e-5), rtol=1e-9, atol=1e-9)
    assert not got.requires_grad


def test_pixel_targets_are_the_unfolded_image_standardised_by_hand(encoder: ViT) -> None:
    x = torch.randn(3, 3, 32, 40, dtype=torch.float64)
    x[0, :, :8, :8] = 0.7  # a flat patch is 0, not a division by 0
    got = make_targets(encoder, x, predict="pixels")
    patches = F.unfold(x, 8, stride=8).transpose(1, 2)  # [B, N, 3 p^2], colours outermost
    spread = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(got, (patches - patches.mean(-1, keepdim=True)) / spread)
    assert got[0, 0].abs().max() < 1e-9


@pytest.mark.parametrize("groups", ["none", "region", "concept"])
def test_pixels_never_touch_the_target_encoder(groups: str) -> None:
    model = model_of(small(predict="pixels", groups=groups))
    with torch.no_grad():
        for p in model.target_encoder.parameters():
            p.fill_(torch.nan)
    losses = model(images(), step=0)
    losses.total.backward()
    assert losses.prediction.isfinite() and (losses.group > 0) == (groups != "none")
    assert all(p.grad is not None for p in model.context_encoder.blocks.parameters())
