"""A step of the large presets: all of them by shape and in full depth, ViT-B/16 for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("vit-l16", False),
        ("vit-h14", True),
        pytest.param("vit-b16", True, marks=pytest.mark.slow),
        pytest.param("vit-h14", False, marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.slow
def test_a_step_of_vit_b16_fits_two_cores() -> None:
    config = preset("vit-b16").replace(batch_size=4)
    model = build_model(config, (224, 224), 1000).train()
    step = TrainStep(config, model, augment(), 1000)
    pixels = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8)
    before = [p.detach().clone() for p in model.parameters()]
    terms = step(pixels, 500)  # learning rate and EMA are under way
    assert terms.isfinite().all()
    after = list(model.parameters())
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    fixed = sum(not p.requires_grad for p in model.context_encoder.parameters())
    assert moved == len(after) - 2 * fixed  # the positions of both encoders stay


# One of two processes: a step of a preset at full width and reduced depth, in shares.
SHARED = """
import dataclasses, json, sys
import torch
from sparsejepa.config import Config, preset
from sparsejepa.data.augment import Augment
from sparsejepa.distributed import World, joined
from sparsejepa.distributed import local
from sparsejepa.training.build import build_model
from sparsejepa.training.step import TrainStep

class Shallow(Config):
    @property
    def encoder_shape(self):
        width, _, heads = super().encoder_shape
        return width, 2, heads

torch.set_num_threads(1)
config = preset(sys.argv[1]).replace(batch_size=4, predictor_depth=2, precision="fp32")
config = Shallow(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Config)})
world = World.from_environment()
with joined(world):
    model = build_model(config, (224, 224), 1000).train()
    encoder = list(model.context_encoder.parameters())
    whole = sum(p.numel() for p in encoder)
    augment = Augment((224, 224), mean=(0.5,) * 3, std=(0.25,) * 3)
    step = TrainStep(config, model, augment, 1000, world=world, device=torch.device("cpu"))
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8, generator=drawn)
    terms = step(pixels[step.rows(torch.arange(4))], 500)
    own = sum(local(p).numel() for p in model.context_encoder.parameters())
    norms = sum(float(local(p).double().square().sum()) for p in model.context_encoder.parameters())
    found = {"rank": world.rank, "share": own / whole, "terms": terms.tolist(), "norms": norms}
    with open(f"{sys.argv[2]}/{world.rank}.json", "w") as file:
        json.dump(found, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-l16", "vit-h14"])
def test_a_step_in_shares_on_two_processes(name: str, tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(SHARED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

    def take(processes: int) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, *launcher, str(processes), str(script), name, str(tmp_path)],
            capture_output=True, text=True, timeout=280,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]

    one, two = take(1), take(2)
    assert one[0]["share"] == 1
    assert all(found["share"] == pytest.approx(0.5, abs=0.01) for found in two)
    # Losses are of each process's rows; the norm of the gradient, last, is of all.
    assert two[0]["terms"][-1] == pytest.approx(two[1]["terms"][-1])
    assert two[0]["terms"][-1] == pytest.approx(one[0]["terms"][-1], rel=1e-3)
    mean = (two[0]["terms"][0] + two[1]["terms"][0]) / 2
    assert mean == pytest.approx(one[0]["terms"][0], rel=1e-3)
    assert sum(found["norms"] for found in two) == pytest.approx(one[0]["norms"], rel=1e-3)
