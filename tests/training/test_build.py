"""The images that a run trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import sparsejepa
from sparsejepa.data.catalog import load_images
from sparsejepa.data.images import ImageSet
from sparsejepa.encoders.encoder import load_activations, load_groups
from sparsejepa.encoders.load import load
from sparsejepa.errors import UserError
from sparsejepa.study import pretrain
from sparsejepa.training.build import build_model, build_sampler
from sparsejepa.training.loop import plan

from .tiny import config_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 images of 16x16 pixels in train and 5 in test."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


@pytest.mark.parametrize("corruption", ["noise", "shuffle"])
def test_corruption_replaces_what_would_have_been_trained_on(folder: Path, corruption: str) -> None:
    settings: dict[str, Any] = {"holdout": 6, "limit": 20}
    true = load_images(config_of(folder, **settings))
    settings["corruption"] = corruption
    made, again = (load_images(config_of(folder, seed=s, **settings)) for s in (0, 1))
    assert isinstance(true, ImageSet)
    assert isinstance(made, ImageSet) and isinstance(again, ImageSet)
    assert len(made) == 20 and made.files == true.files
    assert made.targets["class"].values.tolist() == true.targets["class"].values.tolist()
    assert (made.images != true.images).any((1, 2, 3)).all()
    assert (made.images == again.images).all(), "the same images for every seed of a run"
    if corruption == "shuffle":
        assert (np.sort(made.images, axis=None) == np.sort(true.images, axis=None)).all()


def test_masks_are_those_of_training_wherever_they_are_drawn(folder: Path) -> None:
    config = config_of(folder, predictor_pass="union", img_size=(32,), upscale=True)
    trained = build_model(config, (32, 32), 4).sampler
    ours = build_sampler(config, (8, 8)).sample(5, seed=0, step=1)
    assert all(map(torch.equal, ours, trained.sample(5, seed=0, step=1)))
    assert trained.union is not None and ours.targets.shape[1] == 1
    planned = plan(config, load_images, timed_steps=1)
    assert planned["merged_targets"] == sorted(set(trained.union.values()))
    root = Path(sparsejepa.__file__).parent
    text = {p.name: p.read_text().replace("class MaskSampler", "") for p in root.rglob("*.py")}
    # Groups that are fitted to frozen tokens have masks of their own.
    assert {n for n, t in text.items() if "MaskSampler(" in t} == {"build.py", "posthoc.py"}


@pytest.mark.parametrize("kind", ["region", "concept"])
def test_groups_are_kept_with_statistics_of_the_encoder_that_is_kept(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    """In training they are the context encoder's, which moves away from the kept one here."""
    config = config_of(folder, groups=kind, lr=0.02, ema=0.9999, ema_final=0.9999,
                       img_size=(32,), upscale=True)  # fmt: skip
    out = tmp_path / "run"
    pretrain(config, out=out)
    encoder, images = load(out), load_images(config)
    groups = load_groups(out, encoder.grid_size)
    assert groups is not None and isinstance(images, ImageSet)
    model: Any = encoder.model

    def largest(z: Tensor) -> float:
        """The power of the mean of W^(g) z over that of W^(g) z, the largest of all groups."""
        u = torch.einsum("gpd,nd->ngp", groups.W, z)
        return float((u.mean(0).square().sum(-1) / u.square().sum(-1).mean(0)).max())

    pixels = encoder.pixels(torch.from_numpy(images.images.copy()))

    def offset() -> float:
        """That of contexts, which the groups predict from."""
        z = []
        with torch.no_grad():
            for step in range(8):
                masks = build_sampler(config, (8, 8)).sample(len(pixels), seed=5, step=step)
                tokens = model(pixels, masks.context)
                z.append(tokens.mean(1) if kind == "region" else tokens.flatten(0, 1))
        return largest(groups.norm(torch.cat(z)))

    assert offset() < 0.03
    activations = load_activations(out, encoder.grid_size)  # of whole images, as they are exported
    assert activations is not None
    tokens = model(pixels).detach()
    whole = tokens.mean(1) if kind == "region" else tokens.flatten(0, 1)
    assert largest((whole - activations.mean) * activations.scale) < 0.001
    (checkpoint,) = (out / "checkpoints").glob("*4*/")
    trained = load_file(next(checkpoint.glob("*.safetensors")))
    assert groups.norm.running_mean is not None and groups.norm.running_var is not None
    groups.norm.running_mean.copy_(trained["model.groups.norm.running_mean"])
    groups.norm.running_var.copy_(trained["model.groups.norm.running_var"])
    assert offset() > 0.1


def test_shuffled_patches_must_fit_the_image(folder: Path) -> None:
    with pytest.raises(UserError, match="--patch-size 5 does not divide the image"):
        load_images(config_of(folder, corruption="shuffle", patch_size=5))
