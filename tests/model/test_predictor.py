"""The predictors against block-by-block passes, hand-written arithmetic and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
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
    return randomise(TransformerPredictor(D, GRID, dim=16, depth=2, num_heads=2))


def mlp() -> Any:
    return randomise(MLPPredictor(D, GRID, dim=16, depth=2))


both = pytest.mark.parametrize("make", [transformer, mlp])


@both
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), images=st.integers(1, 3), blocks=st.integers(1, 4))
def test_one_pass_equals_one_pass_per_image_and_block(make, seed: int, images: int, blocks: int):
    model, (context, context_index, targets) = make(), batch(seed, images, blocks=blocks)
    together = model(context, context_index, targets)
    for b in range(images):
        for m in range(blocks):
            one = slice(b, b + 1)
            alone = model(context[one], context_index[one], targets[one, m : m + 1])
            torch.testing.assert_close(together[b, m], alone[0, 0], rtol=0, atol=1e-10)


def test_only_the_transformer_depends_on_the_contexts_positions():
    context, context_index, targets = batch()
    swapped = context_index[:, [1, 0, 2, 3, 4]]
    model = transformer()
    moved = model(context, swapped, targets) - model(context, context_index, targets)
    assert moved.abs().max() > 1e-3
    pooled = mlp()
    assert torch.equal(pooled(context, swapped, targets), pooled(context, context_index, targets))


def test_transformer_by_hand():
    """Its own blocks (tested elsewhere) on a token list assembled from the definition."""
    model, (context, context_index, targets) = transformer(), batch()
    positions = sincos_position_embedding(GRID, 16).double()
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
                    tokens[0, 5 + k], (16,), model.norm.weight, model.norm.bias, 1e-6
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


@both
def test_gradients_reach_every_weight_and_the_context(make):
    model, (context, context_index, targets) = make(), batch()
    context.requires_grad_()
    output = model(context, context_index, targets)
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert context.grad is not None and (context.grad.norm(dim=2) > 0).all()


@pytest.mark.parametrize(("dim", "heads"), [(128, 4), (64, 2), (192, 6), (36, 1), (100, 2), (4, 1)])
def test_default_heads_divide_the_width(dim: int, heads: int):
    model: Any = TransformerPredictor(D, GRID, dim, depth=1)
    assert model.blocks[0].attn.num_heads == heads


@pytest.mark.parametrize("kind", [TransformerPredictor, MLPPredictor])
def test_impossible_width(kind):
    with pytest.raises(UserError, match="multiple of 4"):
        kind(D, GRID, dim=18)


def test_explicit_attention_equals_the_fused_kernel() -> None:
    """On the CPU bf16 takes the explicit form; in bf16 both agree within its rounding."""
    model = transformer()
    exact = model(*batch())
    rounded = model.bfloat16()(batch()[0].bfloat16(), *batch()[1:])
    assert torch.cosine_similarity(exact.flatten(), rounded.double().flatten(), dim=0) > 0.999
