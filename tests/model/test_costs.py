"""Costs from sizes against torch's own counter on the real model, and against known figures."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsejepa.config import Config, preset
from sparsejepa.model.costs import Sizes, costs, parameters, products, total
from sparsejepa.model.masks import Masks
from sparsejepa.model.memory import peak_memory
from sparsejepa.training.build import build_model

BATCH, GRID = 4, (4, 4)


def tiny(**changes) -> Config:
    """Nano on 4 x 4 patches of 4 pixels, target blocks of 2 x 2, 5 context patches, 12 groups."""
    settings = {
        "batch_size": BATCH,
        "target_scale": (0.25, 0.25),
        "target_aspect_ratio": (1.0, 1.0),
        "context_counts": (5,),
        "num_groups": 12,
    }
    return preset("nano").replace(**settings | changes)


def counted(config: Config) -> tuple[Masks, int, int]:
    """Return the masks of a step, and the operations that torch counts forward and backward."""
    side = max(16, 4 * config.model.patch_size)
    model = build_model(config, (side, side), 10)
    masks = model.sampler.sample(BATCH, seed=0, step=0)
    images = torch.randn(BATCH, 3, side, side)
    # The fused kernel would not be counted, nor its second look at the logits be missed.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = model(images, step=0, masks=masks)
        forward = counter.get_total_flops()
        losses.total.backward()
    return masks, forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("groups", ["none", "region", "concept", "feature"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("predictor", ["mlp", "blocks", "packed", "union"])
def test_operations_are_those_that_torch_counts(groups: str, beta: float, predictor: str) -> None:
    kind = {"predictor": "mlp"} if predictor == "mlp" else {"predictor_pass": predictor}
    config = tiny(groups=groups, beta=beta, **kind)
    masks, forward, backward = counted(config)
    parts = costs(Sizes.of(config, GRID, 5, *masks.targets.shape[1:]))
    ours = sum(parts[name].flops for name in ("target", "context", "predictor", "groups"))
    assert (ours, parts["backward"].flops) == (forward, backward)


@pytest.mark.parametrize("groups", ["none", "region", "concept"])
@pytest.mark.parametrize("predictor", ["mlp", "transformer"])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_operations_and_parameters_of_other_stems_and_pixels(
    groups: str, predictor: str, patch: int
) -> None:
    config = tiny(
        groups=groups, predictor=predictor, stem="hierarchical", predict="pixels",
        patch_size=patch, beta=0.0,
    )  # fmt: skip
    masks, forward, backward = counted(config)
    grid = (16 // patch, 16 // patch) if patch < 8 else (4, 4)
    sizes = Sizes.of(config, grid, 5, *masks.targets.shape[1:])
    parts = costs(sizes)
    ours = sum(parts[name].flops for name in ("target", "context", "predictor", "groups"))
    assert (ours, parts["backward"].flops) == (forward, backward)
    assert parts["target"].flops == 0
    model = build_model(config, (grid[0] * patch, grid[1] * patch), 10)
    found = parameters(sizes)
    assert found["encoder"] == count(model.context_encoder)
    assert found["predictor"] == count(model.predictor)
    assert found["groups"] == (count(model.groups) - found["W"] if model.groups else 0)


@pytest.mark.parametrize("groups", ["none", "region", "concept", "feature"])
@pytest.mark.parametrize("predictor", ["mlp", "transformer"])
def test_parameters_are_the_models(groups: str, predictor: str) -> None:
    config = tiny(groups=groups, predictor=predictor)
    model = build_model(config, (16, 16), 10)
    matrices, rest = model.network_parameters()
    found = parameters(Sizes.of(config, GRID, 5, 4, 4))
    assert found["encoder"] == count(model.context_encoder)
    assert found["predictor"] == count(model.predictor)
    assert found["W"] == (model.groups.W.numel() if model.groups else 0)
    assert sum(found.values()) - found["W"] == sum(p.numel() for p in [*matrices, *rest])


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(("context", "gflop", "megabytes"), [(12, 1.47, 28), (24, 2.05, 39)])
def test_vit_tiny_costs_what_was_worked_out_before(
    context: int, gflop: float, megabytes: float
) -> None:
    sizes = Sizes(128, (8, 8), 4, context, 4, 12, 192, 12, predictor_dim=96, predictor_depth=6)
    whole = total(costs(sizes))
    assert whole.flops / 128 / 1e9 == pytest.approx(gflop, rel=0.04)
    assert whole.bytes / 128 / 1e6 == pytest.approx(megabytes, rel=0.15)


def test_products_are_the_steps_linear_layers() -> None:
    sizes = Sizes(2, (8, 8), 4, 20, 4, 12, 192, 12, predictor_dim=96, predictor_depth=6)
    listed = products(sizes)
    shapes = {(p.name, p.kind): (p.m, p.k, p.n, p.count) for p in listed}
    assert shapes["target fc1", "forward"] == (128, 192, 768, 12)
    assert shapes["context fc1", "input gradient"] == (40, 768, 192, 12)
    assert shapes["predictor qkv", "weight gradient"] == (288, 2 * 4 * 32, 96, 6)
    assert ("target fc1", "weight gradient") not in shapes
    assert ("context patches", "input gradient") not in shapes
    # What is left of the step is attention: 4 operations forward and 8 backward per pair and width.
    attention = 2 * (64**2 * 192 * 12 + 3 * 20**2 * 192 * 12 + 3 * 4 * 32**2 * 96 * 5) * 4
    attention += 2 * 3 * 4 * 12 * 32 * 96 * 4  # the predictor's last block: 12 queries
    whole = sum(cost.flops for part, cost in costs(sizes).items() if part != "augmentation")
    assert sum(p.flops for p in listed) + attention == whole


def test_traffic_and_memory_grow_with_the_batch_and_the_type() -> None:
    small, large = (
        Sizes(batch, (8, 8), 4, 20, 4, 12, 192, 12, groups="region", kl=True) for batch in (64, 128)
    )
    for part, cost in costs(large).items():
        assert cost.bytes <= 2 * costs(small)[part].bytes
        fixed = part in ("optimiser", "prox + EMA")
        assert cost.bytes == pytest.approx((1 if fixed else 2) * costs(small)[part].bytes, rel=0.07)
    assert costs(large, 4)["backward"].bytes == 2 * costs(large)["backward"].bytes
    assert 1.6 < peak_memory(large) / peak_memory(small) < 2
