"""A step of the large presets: by shape and in full depth, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsejepa.config import Config, preset
from sparsejepa.data.augment import Augment, _scale_and_shift
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.training import build
from sparsejepa.training.build import build_model
from sparsejepa.training.step import TERMS, TrainStep

# As timm has them, with class token, learned positions and a classifier of 1,000 classes.
PUBLISHED = {"vit-b16": 86_567_656, "vit-l16": 304_326_632, "vit-h14": 632_045_800}
BIG = list(PUBLISHED)
ROOT = Path(__file__).resolve().parents[2]


def weightless(config: Config, monkeypatch: pytest.MonkeyPatch) -> SparseJEPA:
    """Build the model of a run with networks that take no memory (on torch's device "meta")."""

    def on_meta(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def built(*args: Any, **options: Any) -> nn.Module:
            with torch.device("meta"):
                return make(*args, **options)

        return built

    for name in ("ViT", "TransformerPredictor"):
        monkeypatch.setattr(build, name, on_meta(getattr(build, name)))
    return build_model(config, (224, 224), 1000).train()


def pretended(model: nn.Module) -> nn.Module:
    """Replace all parameters and buffers by such of a FakeTensorMode; call it inside one."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    return model


def augment() -> Augment:
    return Augment((224, 224), mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize("name", BIG)
def test_encoders_have_the_published_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = weightless(preset(name), monkeypatch).context_encoder
    width, patches = encoder.embed_dim, encoder.num_patches
    more = width + (1 + patches) * width + 1000 * (width + 1)
    own = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert own + more == PUBLISHED[name]


@pytest.mark.parametrize(("name", "again"), [("vit-l16", False), ("vit-h14", True)])
def test_a_whole_step_runs_in_full_depth(
    name: str,
    again: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    settings = {"batch_size": 32, "precision": "fp32", "checkpoint_activations": again}
    config = preset(name).replace(**settings)
    request.addfinalizer(_scale_and_shift.cache_clear)  # of tensors that are none
    _scale_and_shift.cache_clear()
    model = weightless(config, monkeypatch)
    with FakeTensorMode():
        monkeypatch.setattr(SparseJEPA, "to", lambda model, device: model)  # it is there already
        step = TrainStep(config, pretended(model), augment(), 1000)  # type: ignore[arg-type]
        terms = step(torch.empty(32, 224, 224, 3, dtype=torch.uint8), 1)
    assert terms.shape == (len(TERMS),)
