"""Planted groups: which latents feed which group is known, and training has to find it.

Tokens are fixed, so the encoder cannot adapt, and a quarter of the (group, latent) pairs carry the
signal, 36 % of the variance of the targets. All else is the training step: masks, group map, loss,
density controller, momentum, prox, freeze.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sparsejepa.config import Config, LossConfig
from sparsejepa.explain.posthoc import PostHocGroups
from sparsejepa.model.groups import GroupMap, largest, partition_cells, prox_sphere
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.model.masks import MaskSampler
from sparsejepa.training.schedule import Schedule

GRID, N, D, G, P, IMAGES = (8, 8), 64, 32, 8, 4, 3000


def planted(kind: str, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return the true pattern [G, D], tokens and targets [n, N, D]."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    pattern = torch.rand(G, D, generator=draw).argsort(0) < G // 4
    z = normal(IMAGES, D)  # of an image; its tokens are that and a little noise
    u = torch.einsum("gpd,nd->ngp", normal(G, P, D) * pattern[:, None], z)
    u = u / u.std()
    if kind == "region":
        u = u[:, partition_cells(GRID, G)]  # [n, N, P], of the patch's own cell
        signal = torch.einsum("kdp,nkp->nkd", normal(N, D, P), u)
    else:
        signal = torch.einsum("kgdp,ngp->nkgd", normal(N, G, D // G, P), u).flatten(2)
    targets = 0.6 * signal / signal.std() + 0.8 * normal(IMAGES, N, D)
    return pattern, z[:, None] + 0.3 * normal(IMAGES, N, D), targets


class Frozen(nn.Module):
    """An encoder whose tokens are given: image i is a picture full of the number i."""

    embed_dim = D

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens: Tensor
        self.register_buffer("tokens", tokens, persistent=False)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, index: Tensor | None = None, kept: None = None) -> Tensor:
        tokens = self.tokens[images[:, 0, 0, 0].long()]
        if index is None:
            return tokens
        return tokens.gather(1, index[..., None].expand(-1, -1, D))

    def draw_kept(self, batch: int) -> None:
        return None


class Nothing(nn.Module):
    """A predictor that predicts 0."""

    def forward(self, context: Tensor, context_index: Tensor, targets: Tensor) -> Tensor:
        return context.new_zeros(*targets.shape, D)


def jaccard(found: Tensor, true: Tensor) -> float:
    return float((found & true).sum() / (found | true).sum())


def learned(
    kind: str,
    *,
    seed: int = 0,
    weight: float = 0.1,
    loss: str = "smooth_l1",
    noise: float = 0.0,
    steps: int = 600,
    batch: int = 32,
    density: float | None = 0.25,
    sgd: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the pattern that training finds and the true one.

    `noise`: that of W's gradient, in units of the gradient at the start. `sgd`: W takes plain
    gradient steps whose rates sum to 60, as it once did.
    """
    pattern, tokens, targets = planted(kind)
    config = Config().replace(groups=kind, density=density, lam=0.01, steps=steps)
    torch.manual_seed(seed)
    groups = GroupMap(kind, D, GRID, G, P, hidden=32)  # type: ignore[arg-type]
    model = SparseJEPA(
        Frozen(tokens),  # type: ignore[arg-type]
        Nothing(),
        MaskSampler(GRID, merge=True),
        groups,
        rates=Schedule(config, steps),
        loss=LossConfig(loss=loss, group_weight=weight, beta=0.0),  # type: ignore[arg-type]
        total_steps=steps,
        steer_density=density is not None,
    )
    model.target_encoder = Frozen(targets)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(groups.networks.parameters(), betas=(0.9, 0.98))
    draw, size = torch.Generator().manual_seed(seed), None
    for step in range(steps):
        images = torch.randint(IMAGES, (batch, 1, 1, 1), generator=draw).float()
        model(images.expand(-1, 3, -1, -1), step=step).total.backward()
        W = groups.W
        assert W.grad is not None
        size = size or float(W.grad.square().sum(1).mean().sqrt())
        W.grad += noise * size / math.sqrt(P) * torch.randn(W.shape, generator=draw)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 50, 2.5 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
        if sgd:
            with torch.no_grad():
                W.copy_(prox_sphere(W - 60 / steps * W.grad, 60 / steps * 0.01))
            W.grad = None
        else:
            model.after_step(step)
    if sgd:  # whatever the density, a quarter
        return largest(groups.block_norms(), 0.25), pattern
    return groups.block_norms() > 0, pattern


def test_planted_groups_are_found() -> None:
    found, true = learned("region")
    assert found.float().mean() == 0.25
    assert jaccard(found, true) >= 0.9


def test_a_fixed_lambda_finds_them_too_and_some_more() -> None:
    found, true = learned("region", density=None)
    assert (found & true).sum() > 0.95 * true.sum()
    assert 0.25 <= found.float().mean() < 0.6  # 4 to 10 of 16 groups per latent


def test_plain_gradient_steps_find_nothing() -> None:
    """The null: the blocks that they leave are those that happened to start largest."""
    found, true = learned("region", steps=300, sgd=True)
    assert jaccard(found, true) < 0.25  # by chance 1/7


def test_post_hoc_groups_find_which_cells_show_a_latent() -> None:
    """A token shows a latent of its image only in a quarter of the cells; elsewhere it is noise."""
    draw = torch.Generator().manual_seed(2)
    shown = torch.rand(G, D, generator=draw).argsort(0) < G // 4
    z = torch.randn(1500, 1, D, generator=draw) * shown[partition_cells(GRID, G)]
    tokens = z + torch.randn(1500, N, D, generator=draw)
    fits = [
        PostHocGroups(
            G, D // 4, kind="region", density=0.25, steps=300, batch_size=32, random_state=seed
        ).fit(tokens)
        for seed in (0, 1)
    ]
    for fit in fits:
        assert jaccard(torch.as_tensor(fit.block_norms_ > 0), shown) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seed", "weight", "loss", "noise"),
    [
        ("region", 0, 1.0, "l2", 0.0),
        ("region", 1, 0.1, "smooth_l1", 10.0),
        ("region", 0, 1.0, "l2", 10.0),
        ("feature", 0, 0.1, "smooth_l1", 0.0),
        ("feature", 1, 1.0, "l2", 10.0),
        ("feature", 0, 0.1, "smooth_l1", 10.0),
    ],
)
def test_whatever_the_weight_the_loss_and_the_noise(
    kind: str, seed: int, weight: float, loss: str, noise: float
) -> None:
    steps = 800 if not noise else 1500 if kind == "region" else 6000
    found, true = learned(kind, seed=seed, weight=weight, loss=loss, noise=noise, steps=steps)
    assert jaccard(found, true) >= 0.9
