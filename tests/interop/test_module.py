from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import sparsejepa as sj
from sparsejepa.errors import UserError
from sparsejepa.files import load_tensors, save_tensors
from sparsejepa.interop import load, load_groups, save_groups
from sparsejepa.interop.module import (
    GroupActivations,
    SparseJEPAEncoder,
    load_activations,
    measure_rms,
    measure_seen,
)
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.masks import MaskSampler

from .exported import MEAN, STD, assert_same, open_run, pixels_for, write_run

KINDS = ("region", "concept", "feature")


def random_map(kind: str, seed: int = 0) -> GroupMap:
    torch.manual_seed(seed)
    groups = GroupMap(kind, 24, (4, 4), 4, 5, hidden=8)  # type: ignore[arg-type]
    groups.norm.running_mean = torch.randn(24)
    groups.norm.running_var = torch.rand(24) + 0.5
    return groups.eval()


def uint8(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_the_map(kind: str) -> None:
    groups, tokens = random_map(kind), torch.randn(3, 16, 24)
    rms = torch.tensor([0.5, 1.0, 2.0, 4.0])
    pooled, patches = GroupActivations.from_map(groups, rms)(tokens)
    if kind == "region":
        assert patches is None
        expected = groups.group_activations(tokens.mean(1, keepdim=True))[:, 0] / rms
    else:
        assert patches is not None
        torch.testing.assert_close(patches, groups.group_activations(tokens) / rms)
        expected = patches.mean(1)
    torch.testing.assert_close(pooled, expected)


def test_a_dead_group_is_not_excited_and_without_units_they_stay_as_they_are() -> None:
    groups, tokens = random_map("concept"), torch.randn(2, 16, 24)
    dead = GroupActivations.from_map(groups, torch.tensor([1.0, 0.0, 1.0, 1.0]))(tokens)[1]
    assert dead is not None and dead.isfinite().all() and not dead[..., 1].any()
    plain = GroupActivations.from_map(groups)(tokens)[1]
    torch.testing.assert_close(plain, groups.group_activations(tokens))


def test_activations_share_nothing_with_the_map() -> None:
    groups = random_map("concept")
    activations = GroupActivations.from_map(groups)
    before = activations.W.clone()
    with torch.no_grad():
        groups.W.zero_()
    assert torch.equal(activations.W, before)
    assert not list(activations.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_what_groups_see(tmp_path: Path, kind: Any) -> None:
    encoder, images = load(write_run(tmp_path / "a")), uint8(20, 16, 16, 3)
    sampler, model = MaskSampler((4, 4), num_targets=2), cast("Any", encoder.model)
    with torch.no_grad():
        contexts = [
            model(encoder.pixels(part), sampler.sample(len(part), seed=0, step=step).context)
            for step, part in enumerate(images.split(8))
        ]
    for tokens, masks in ((contexts, sampler), ([encoder.tokens(images)], None)):
        z = torch.cat([x.mean(1) if kind == "region" else x.flatten(0, 1) for x in tokens])
        expected = torch.stack([z.mean(0), z.var(0, correction=0)])
        torch.testing.assert_close(measure_seen(encoder, kind, images.split(8), masks), expected)
    with pytest.raises(ValueError, match="no images"):
        measure_seen(encoder, kind, [])


@pytest.mark.parametrize("kind", KINDS)
def test_units_make_the_mean_square_of_activations_one(tmp_path: Path, kind: str) -> None:
    encoder, groups = load(write_run(tmp_path / "a")), random_map(kind)
    images = uint8(20, 16, 16, 3)
    rms = measure_rms(encoder, groups, images.split(8))
    pooled, patches = GroupActivations.from_map(groups, rms)(encoder.tokens(images))
    seen = pooled if patches is None else patches.flatten(0, 1)
    torch.testing.assert_close(seen.square().mean(0), torch.ones(4), rtol=1e-4, atol=1e-4)
    assert torch.equal(rms, measure_rms(encoder, groups, images.split(8)))
    torch.testing.assert_close(rms, measure_rms(encoder, groups, images.split(3)))
    with pytest.raises(ValueError, match="no images"):
        measure_rms(encoder, groups, [])


def test_units_are_kept_with_the_groups(tmp_path: Path) -> None:
    groups, rms, seen = random_map("feature"), torch.rand(4) + 0.5, torch.rand(2, 24) + 0.5
    groups.norm.eps = 0.0
    save_groups(tmp_path, groups, rms, seen)
    found = load_activations(tmp_path, (4, 4))
    wanted = GroupActivations.from_map(groups, rms, seen)
    assert found is not None and found.kind == "feature"
    assert all(map(torch.equal, found.state_dict().values(), wanted.state_dict().values()))
    again = load_groups(tmp_path, (4, 4))
    assert again is not None and again.norm.eps == 0.0
    assert load_activations(tmp_path / "none", (4, 4)) is None


def test_groups_of_the_first_version_have_no_units(tmp_path: Path) -> None:
    groups = random_map("concept")
    about = {"kind": "concept", "num_groups": 4, "sphere": True}
    save_tensors(tmp_path / "groups.safetensors", groups.state_dict(), about)
    found = load_activations(tmp_path, (4, 4))
    assert found is not None and torch.equal(found.rms, torch.ones(4))


def test_units_of_other_groups_are_refused(tmp_path: Path) -> None:
    save_groups(tmp_path, random_map("concept"), torch.ones(4))
    tensors, about = load_tensors(tmp_path / "groups.safetensors")
    save_tensors(tmp_path / "groups.safetensors", tensors | {"rms": torch.ones(3)}, about)
    with pytest.raises(UserError, match=r"groups.safetensors: .*rms"):
        load_activations(tmp_path, (4, 4))


# The module


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_module_gives_tokens_pooled_and_groups(tmp_path: Path, kind: str | None) -> None:
    module = open_run(write_run(tmp_path / "a", kind))
    pixels = pixels_for(module)
    found = module(pixels)
    names = ["tokens", "pooled", *(["groups"] if kind else [])]
    assert list(found) == names + (["group_map"] if kind in ("concept", "feature") else [])
    torch.testing.assert_close(found["tokens"], module.model(pixels))
    torch.testing.assert_close(found["pooled"], found["tokens"].mean(1))
    assert module.kind == kind and not module.training
    if kind:
        assert found["groups"].shape == (3, 4) and not found["groups"][:, 3].any()
        assert found["groups"][:, :3].min() > 0


def test_images_of_all_forms_are_preprocessed_alike(tmp_path: Path) -> None:
    module = open_run(write_run(tmp_path / "a", shape="wide"))
    images = uint8(2, 40, 50, 3)
    wanted = module.preprocess(images)
    assert wanted.shape == (2, 3, 16, 24)
    ready = uint8(2, 16, 24, 3)
    assert torch.equal(module.preprocess(ready), module.encoder.pixels(ready))
    one = Image.fromarray(images[0].numpy())
    for given in (images, images.numpy(), [one, images[1]], [*images.numpy()]):
        assert torch.equal(module.preprocess(given), wanted)
    gray = module.preprocess(one.convert("L"))
    assert gray.shape == (1, 3, 16, 24)
    black = module.preprocess(np.zeros((16, 24, 3), np.uint8))
    expected = -torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(black[0, :, 0, 0], expected, rtol=1e-4, atol=1e-4)


def test_pixels_of_another_size_or_kind_are_refused_in_one_line(tmp_path: Path) -> None:
    module = open_run(write_run(tmp_path / "a"))
    with pytest.raises(UserError, match=r"\[1, 3, 8, 8\].*\[B, 3, 16, 16\]; preprocess"):
        module(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"give uint8 \[B, H, W, 3\], PIL"):
        module.preprocess(torch.zeros(1, 16, 16, 3))


def test_groups_of_another_encoder_are_refused(tmp_path: Path) -> None:
    encoder = load(write_run(tmp_path / "a"))
    with pytest.raises(UserError, match=r"groups of 8 latents do not fit .* which has 24"):
        SparseJEPAEncoder(encoder, GroupMap("concept", 8, (4, 4), 2, 2))


def test_a_module_is_copied_whole(tmp_path: Path) -> None:
    module = open_run(write_run(tmp_path / "a", "concept"))
    twin = copy.deepcopy(module)
    assert twin.encoder.model is twin.model and twin.model is not module.model
    assert_same(twin(pixels_for(module)), module(pixels_for(module)))


def test_the_package_exports_the_module() -> None:
    assert sj.SparseJEPAEncoder is SparseJEPAEncoder
