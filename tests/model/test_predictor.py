"""The predictors against block-by-block passes, hand-written arithmetic and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsejepa.errors import UserError
from sparsejepa.model.predictor import MLPPredictor, TransformerPredictor
from sparsejepa.model.vit import sincos_position_embedding

GRID, D = (4, 6), 20


def batch(seed: int = 0, images: int = 2, context: int = 5, blocks: int = 3, patches: int = 4):
    """Context tokens, their patches and target blocks that hide no context patch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(images, 24, generator=generator).argsort(1)
    tokens = torch.randn(images, context, D, dtype=torch.float64, generator=generator)
    hidden = order[:, context : context + blocks * patches].unflatten(1, (blocks, patches))
    return tokens, order[:, :context], hidden


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter sizeable random values, so that nothing is near zero by accident."""
    torch.manual_seed(0)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return model


def transformer() -> Any:
    return randomise(TransformerPredictor(D, GRID, dim=64, depth=2))


def mlp() -> Any:
    return randomise(MLPPredictor(D, GRID, dim=16, depth=2))


both = pytest.mark.parametrize("make", [transformer, mlp])


def test_transformer_by_hand():
    """Its own blocks (tested elsewhere) on a token list assembled from the definition."""
    model, (context, context_index, targets) = transformer(), batch()
    positions = sincos_position_embedding(GRID, 64).double()
    wanted = torch.empty(2, 3, 4, D, dtype=torch.float64)
    for b in range(2):
        seen = [
            model.embed.weight @ token + model.embed.bias + positions[n]
            for token, n in zip(context[b], context_index[b], strict=True)
        ]
        for m in range(3):
            hidden = [model.mask_token + positions[n] for n in targets[b, m]]
            tokens = torch.stack(seen + hidden)[None]
            for block in model.blocks:
                tokens = block(tokens)
            for k in range(4):
                last = F.layer_norm(
                    tokens[0, 5 + k], (64,), model.norm.weight, model.norm.bias, 1e-6
                )
                wanted[b, m, k] = model.proj.weight @ last + model.proj.bias
    got = model(context, context_index, targets)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_mlp_is_the_mlp_of_the_mean_context_beside_the_position():
    model, (context, context_index, targets) = mlp(), batch()
    positions = sincos_position_embedding(GRID, 16).double()
    first = torch.cat([model.embed.weight, model.embed_position.weight], dim=1)
    for b in range(2):
        for m in range(3):
            for k in range(4):
                x = torch.cat([context[b].sum(0) / 5, positions[targets[b, m, k]]])
                x = F.gelu(first @ x + model.embed.bias)
                x = F.gelu(model.hidden[0].weight @ x + model.hidden[0].bias)
                wanted = model.proj.weight @ x + model.proj.bias
                got = model(context, context_index, targets)[b, m, k]
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [TransformerPredictor, MLPPredictor])
def test_impossible_width(kind):
    with pytest.raises(UserError, match="multiple of 4"):
        kind(D, GRID, dim=18)
