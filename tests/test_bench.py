"""The benchmarks run and print their tables; what they compare is the same; no time is asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import Reference, ReferenceStep, Sizes
from step import PARTS, operations, products, run_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.training.build import build_model

ROOT = Path(__file__).parents[1]
SMALL = Sizes(encoder="nano", img_size=16, batch_size=6, predictor_dim=32, predictor_depth=2,
              target_shape=(2, 2), context=5)  # fmt: skip
TINY = "--encoder nano --img-size 16 --batch-size 4 --predictor-dim 32 --predictor-depth 1 "


def said(script: str, flags: str) -> str:
    words = [sys.executable, str(ROOT / "bench" / script), *flags.split(), "--rounds", "1"]
    done = subprocess.run([*words, "--threads", "1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout.splitlines()[0]
    return done.stdout


def test_step_by_step() -> None:
    found = said("step.py", TINY + "--target-shape 2 2 --context 5 --device cpu")
    names = ["reference, fp32", "ours, dense, fp32", "its products alone", *PARTS, "whole step"]
    names += [f"ours, {groups} groups" for groups in ("region", "concept", "feature")]
    assert all(f"\n{name}" in found for name in names), found


def test_data() -> None:
    sizes = "--height 40 --width 48 --img-size 16 --files 12 --batch-size 4 --images 24"
    found = said("data.py", f"{sizes} --workers 1")
    assert "\nours" in found and "\ntorchvision" in found


def test_sizes_that_do_not_fit_are_one_line() -> None:
    words = [sys.executable, str(ROOT / "bench" / "step.py"), "--patch-size", "5"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "--patch-size 5" in done.stderr
    assert done.stderr.count("\n") == 1


def our_model(**changes: object) -> SparseJEPA:
    return build_model(run_config(SMALL, **changes), (16, 16), 1000)


@pytest.mark.parametrize("fused", [True, False])
def test_the_reference_has_our_loss_and_gradients(fused: bool) -> None:
    ours, plain = our_model().double(), Reference(SMALL, fused).double()
    weights = {k: v for k, v in ours.state_dict().items() if not k.startswith("moments.")}
    plain.load_state_dict(weights)
    # Away from the initial point, where the two encoders are the same.
    with torch.no_grad():
        for p in ours.target_encoder.parameters():
            p += 0.05 * torch.randn_like(p)
    plain.target_encoder.load_state_dict(ours.target_encoder.state_dict())
    images = torch.randn(SMALL.batch_size, 3, 16, 16, dtype=torch.float64)
    masks = ours.sampler.sample(SMALL.batch_size, seed=0, step=0)
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


@pytest.mark.parametrize("bf16", [False, True])
def test_a_reference_step_moves_both_encoders(bf16: bool) -> None:
    step = ReferenceStep(SMALL, "cpu", bf16=bf16)
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    assert all(step(i) > 0 for i in range(3))
    for name in ("context_encoder.norm.weight", "target_encoder.norm.weight",
                 "predictor.mask_token"):  # fmt: skip
        assert not torch.equal(step.model.state_dict()[name], before[name])


def test_operations_are_those_that_torch_counts() -> None:
    model = our_model()
    masks = model.sampler.sample(SMALL.batch_size, seed=0, step=0)
    assert (masks.context.shape[1:], masks.targets.shape[1:]) == ((5,), (4, 4))
    images = torch.randn(SMALL.batch_size, 3, 16, 16)
    # The fused kernel would not be counted, nor its second look at the logits be missed.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = model(images, step=0, masks=masks)
        forward = counter.get_total_flops()
        losses.total.backward()
    ours = operations(SMALL)
    assert sum(ours.values()) - ours["backward"] == forward
    assert ours["backward"] == counter.get_total_flops() - forward
    # What is left of a step is attention.
    assert 0.8 < sum(p.operations for p in products(SMALL)) / sum(ours.values()) < 1
