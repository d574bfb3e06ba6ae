"""The plain step does the same thing as ours: same loss, same gradients, same amount of work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsejepa.benchmarks import settings as bench
from sparsejepa.benchmarks.reference import MaskCollator, Reference, ReferenceStep
from sparsejepa.benchmarks.settings import BenchSettings
from sparsejepa.model.jepa import SparseJEPA

SMALL = BenchSettings(
    encoder="nano", img_size=16, batch=6, predictor_dim=32, predictor_depth=2, target_shape=(2, 2),
    context=5,
)  # fmt: skip


def pair(fused: bool = True) -> tuple[SparseJEPA, Reference]:
    """Return our dense model and the reference with its weights, in float64."""
    ours = bench.model(SMALL, bench.config(SMALL)).double()
    plain = Reference(SMALL, fused).double()
    weights = {k: v for k, v in ours.state_dict().items() if not k.startswith("moments.")}
    plain.load_state_dict(weights)
    # Away from the initial point, where the two encoders are the same.
    with torch.no_grad():
        for p in ours.target_encoder.parameters():
            p += 0.05 * torch.randn_like(p)
    plain.target_encoder.load_state_dict(ours.target_encoder.state_dict())
    return ours, plain


@pytest.mark.parametrize("fused", [True, False])
def test_same_loss_and_gradients(fused: bool) -> None:
    ours, plain = pair(fused)
    images = torch.randn(SMALL.batch, 3, 16, 16, dtype=torch.float64)
    masks = ours.sampler.sample(SMALL.batch, seed=0, step=0)
    loss = ours(images, step=0, masks=masks).total
    other = plain(images, [masks.context], list(masks.targets.unbind(1)))
    loss.backward()
    other.backward()
    assert other.item() == pytest.approx(loss.item(), abs=1e-9)
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_collated_masks_have_our_sizes_and_do_not_overlap() -> None:
    seen, targets = MaskCollator((8, 8), (3, 4), 20)(16)
    assert [m.shape for m in seen] == [(16, 20)]
    assert [m.shape for m in targets] == [(16, 12)] * 4
    for image in range(16):
        hidden = {int(i) for mask in targets for i in mask[image]}
        context = seen[0][image].tolist()
        assert len(set(context)) == 20 and not hidden & set(context)
        for mask in targets:  # a whole block, row by row
            first = int(mask[image, 0])
            assert mask[image].tolist() == [first + 8 * r + c for r in range(3) for c in range(4)]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_moves_both_encoders(bf16: bool) -> None:
    step = ReferenceStep(SMALL, bf16=bf16)
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    losses = [step(i) for i in range(3)]
    assert all(loss > 0 for loss in losses)
    for name in (
        "context_encoder.norm.weight",
        "target_encoder.norm.weight",
        "predictor.mask_token",
    ):
        assert not torch.equal(step.model.state_dict()[name], before[name])


def test_larger_target_blocks_leave_room_for_the_context() -> None:
    wide = dataclasses.replace(SMALL, img_size=32, target_shape=(3, 4), context=24)
    seen, _ = MaskCollator(wide.grid, wide.target_shape, wide.context)(4)
    assert seen[0].shape == (4, 24)
