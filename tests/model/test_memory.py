"""Bytes from sizes: against what the autograd graph really keeps, and how they are shared out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsejepa.config import preset
from sparsejepa.model.costs import Sizes, parameters
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.model.masks import Masks
from sparsejepa.model.memory import memory, peak_memory
from sparsejepa.training.build import build_model

SIZES = Sizes(
    64, (14, 14), 16, 74, 4, 36, 384, 12, predictor_dim=384, predictor_depth=6, groups="region",
    group_dim=24, kl=True, heads=6,
)  # fmt: skip


class Fused(torch.autograd.Function):
    """Attention that keeps what the fused kernel of a GPU keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        images, heads, tokens, width = q.shape
        out = q.new_empty(images, tokens, heads, width).transpose(1, 2)  # as the kernel writes it
        ctx.save_for_backward(q, k, v, out)
        return out


def kept_on_a_gpu(model: SparseJEPA, masks: Masks, size: int) -> int:
    """Return the bytes that the graph of the losses keeps under bf16 autocast on a GPU.

    Tensors are fake: they have a device, a type and a size, so no GPU is needed.
    """
    kept: dict[int, tuple[int, Tensor]] = {}
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fake = torch.empty(p.shape, device="cuda")
                    module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
        own = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), x)
            return x

        images = torch.empty(len(masks.context), 3, size, size, device="cuda")
        index = Masks(*(torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in masks))
        # `torch.autocast` itself refuses where there is no GPU.
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                losses = model(images, step=1, masks=index)
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)
    assert losses.total.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("groups", ["none", "region"])
def test_what_a_gpu_keeps_for_the_backward_pass(
    groups: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = 4
    config = preset("vit-b16").replace(encoder="small", batch_size=batch, groups=groups)
    model = build_model(config, (224, 224), 1000).train()
    masks = model.sampler.sample(batch, seed=0, step=1)
    sizes = Sizes.of(config, (14, 14), masks.context.shape[1], *masks.targets.shape[1:])

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: None = None) -> Tensor:
        return Fused.apply(q, k, v)  # type: ignore[return-value]

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    need = memory(sizes, 2)
    targets = 4 * batch * 196 * 384  # they are gone when the losses are there
    predicted = need.activations + need.copies - targets
    assert kept_on_a_gpu(model, masks, 224) == pytest.approx(predicted, rel=0.03)


def test_memory_shrinks_with_accumulate_processes_and_checkpoints() -> None:
    one = memory(SIZES)
    assert one.gathered == 0 and not one.together
    assert one.state == pytest.approx(16 * sum(parameters(SIZES).values()), rel=0.1)
    halves = memory(SIZES, accumulate=2)
    assert halves.activations == pytest.approx(one.activations / 2)
    assert halves.state == one.state and halves.together
    two = memory(SIZES, processes=2)
    assert two.activations == halves.activations and two.state == one.state
    again = memory(SIZES, checkpointed=("context",))
    both = memory(SIZES, checkpointed=("context", "predictor"))
    assert both.activations < again.activations < one.activations
    assert peak_memory(SIZES, 4) > peak_memory(SIZES, 2)


def test_shares_are_of_all_but_the_group_map() -> None:
    encoder, predictor, groups, w = parameters(SIZES).values()
    for processes in (2, 8):
        share = memory(SIZES, processes=processes, sharded=True)
        own = (encoder + predictor) / processes + groups
        assert share.weights == share.gradients == pytest.approx(4 * (own + w))
        assert share.moments == pytest.approx(8 * own)
        assert share.target == pytest.approx(4 * encoder / processes)
        assert share.gathered > 0
    parts = memory(SIZES, processes=8, sharded=True, accumulate=4)
    assert parts.gradients == 4 * (encoder + predictor + groups + w)
    dense = replace(SIZES, groups="none", kl=False)
    assert memory(dense, processes=4, sharded=True).weights == encoder + predictor
