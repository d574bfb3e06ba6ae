"""The frozen encoder, its run directory, and the activations of its groups."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sparsejepa.encoders.encoder import (
    Encoder,
    GroupActivations,
    group_rms,
    load_activations,
    load_groups,
    measure_seen,
    save_encoder,
    save_groups,
    vit_arguments,
)
from sparsejepa.encoders.load import load
from sparsejepa.errors import UserError
from sparsejepa.files import load_tensors, save_tensors
from sparsejepa.model.masks import MaskSampler

from .made import KINDS, MEAN, SHAPES, STD, random_map, small_vit, uint8, write_run


def make_encoder(seed: int = 0, **changes: Any) -> Encoder:
    return Encoder(small_vit(seed, **changes), name="small", mean=MEAN, std=STD)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Bring uint8 images [B, H, W, 3] to pixels by the definition."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# Run directories


@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_encoder_loads_as_it_was(tmp_path: Path, shape: str) -> None:
    vit = small_vit(**SHAPES[shape], drop_path=0.3)
    save_encoder(tmp_path, vit, mean=MEAN, std=STD, extra={"data": "scenes", "license": "mit"})
    encoder, images = load(tmp_path), uint8(3, *vit.img_size, 3)
    wanted = vit(normalised(images))
    torch.testing.assert_close(encoder.tokens(images), wanted, rtol=1e-4, atol=1e-5)
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, vit.state_dict()[name])
    assert (encoder.mean, encoder.std, encoder.license) == (MEAN, STD, "mit")
    assert encoder.img_size == vit.img_size and encoder.grid_size == vit.grid_size
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 1 and config["kind"] == "vit" and config["data"] == "scenes"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "encoder.safetensors"]
    assert load(tmp_path / "encoder.safetensors").fingerprint() == encoder.fingerprint()


@settings(max_examples=200, deadline=None)
@given(dim=st.integers(1, 400), hidden=st.integers(1, 2000))
def test_the_mlp_ratio_survives_rounding(dim: int, hidden: int) -> None:
    vit = small_vit(embed_dim=4, num_heads=1, depth=1)
    vit.embed_dim = dim
    vit.blocks[0].mlp.fc1.out_features = hidden  # type: ignore[union-attr]
    assert int(dim * vit_arguments(vit)["mlp_ratio"]) == hidden


def test_the_file_is_timms(tmp_path: Path) -> None:
    write_run(tmp_path)
    theirs: Any = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0,
        class_token=False, global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip
    theirs.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    pixels = torch.randn(2, 3, 16, 16)
    wanted = load(tmp_path).model(pixels)
    torch.testing.assert_close(theirs.forward_features(pixels), wanted, atol=1e-5, rtol=1e-4)


def change(run: Path, **changes: Any) -> None:
    """Change entries of config.json, those of its ``arch`` there."""
    config = json.loads((run / "config.json").read_text())
    (config["arch"] if config["arch"].keys() >= changes.keys() else config).update(changes)
    (run / "config.json").write_text(json.dumps(config))


def _unfinished(run: Path) -> None:
    (run / "encoder.safetensors").unlink()
    (run / "checkpoints").mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "no such run directory"),
        (lambda run: (run / "config.json").unlink(), "not a run directory (config.json"),
        (_unfinished, "the run is unfinished; --resume it"),
        (lambda run: (run / "encoder.safetensors").write_bytes(b"x"), "encoder.safetensors: "),
        (lambda run: (run / "config.json").write_text("{"), "config.json: damaged"),
        (lambda run: change(run, format=2), "config.json: not an encoder's, or of another version"),
        (lambda run: change(run, embed_dim=48), "does not fit encoder.safetensors"),
        (lambda run: change(run, std=[0, 1, 1]), "above 0"),
        # Sizes that take no memory.
        (lambda run: change(run, depth=10**9), "config.json: damaged"),
        (lambda run: change(run, img_size=[10**7, 10**7]), "config.json: damaged"),
        (lambda run: change(run, embed_dim=10**9), "config.json: damaged"),
        (lambda run: change(run, mlp_ratio=1e12), "config.json: damaged"),
        (lambda run: change(run, patch_size=[0, 0]), "config.json: damaged"),
    ],
)
def test_errors_of_a_run_directory_are_one_line_that_names_it(
    tmp_path: Path, damage: Any, words: str
) -> None:
    run = write_run(tmp_path / "run")
    damage(run)
    with pytest.raises(UserError) as caught:
        load(run)
    text = str(caught.value)
    assert str(run) in text and words in text and "\n" not in text


# Tokens


def test_images_of_another_size_are_resized_whole() -> None:
    encoder, images = make_encoder(), uint8(2, 40, 24, 3)
    planes = images.permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, (16, 16), mode="bilinear", antialias=True)
    wanted = encoder.model(normalised(planes.permute(0, 2, 3, 1)))
    torch.testing.assert_close(encoder.tokens(images), wanted, atol=1e-4, rtol=1e-4)
    # The left and the right edge both count: nothing is cropped away.
    for column in (0, -1):
        changed = images.clone()
        changed[:, :, column] = 255 - changed[:, :, column]
        assert not torch.allclose(encoder.tokens(changed), wanted, atol=1e-3)


def test_tokens_are_float32_and_can_feed_something_that_is_trained() -> None:
    vit, images = small_vit(), uint8(4, 16, 16, 3)
    exact = Encoder(vit, name="a", mean=MEAN, std=STD).tokens(images)
    rough = Encoder(vit, name="a", mean=MEAN, std=STD, precision="bf16").tokens(images)
    assert rough.dtype == torch.float32 and (rough - exact).abs().max() < 0.1
    weight = torch.ones(24, requires_grad=True)
    (exact * weight).sum().backward()
    assert weight.grad is not None and not exact.requires_grad


def test_layers_end_in_the_tokens() -> None:
    encoder, images = make_encoder(class_token=True), uint8(2, 16, 16, 3)
    layers = encoder.layers(images, 2)
    assert [x.shape for x in layers] == [(2, 16, 24)] * 2
    torch.testing.assert_close(layers[-1], encoder.tokens(images))
    with pytest.raises(UserError, match="2 blocks"):
        encoder.layers(images, 3)


def test_untrained_is_the_same_architecture_with_weights_that_depend_on_the_seed_only() -> None:
    encoder, twin = make_encoder(drop_path=0.2), make_encoder(drop_path=0.2)
    state = torch.random.get_rng_state()
    first, again, other = encoder.untrained(1), encoder.untrained(1), encoder.untrained(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.architecture == encoder.architecture
    assert (
        first.fingerprint() == again.fingerprint() and encoder.fingerprint() == twin.fingerprint()
    )
    with torch.no_grad():
        twin.model.get_parameter("blocks.1.mlp.fc1.weight")[3, 4] += 1e-3
    assert len({e.fingerprint() for e in (encoder, twin, first, other)}) == 4


# Groups


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_the_map(kind: str) -> None:
    groups, tokens = random_map(kind), torch.randn(3, 16, 24)
    rms = torch.tensor([0.5, 1.0, 2.0, 0.0])
    activations = GroupActivations(groups, rms)
    pooled, patches = activations(tokens)
    z = tokens.mean(1, keepdim=True) if kind == "region" else tokens
    expected = groups.group_activations(z)[..., :3] / rms[:3]
    assert (patches is None) == (kind == "region")
    torch.testing.assert_close(pooled[:, :3], expected.mean(1))
    if patches is not None:
        torch.testing.assert_close(patches[..., :3], expected)
    assert not pooled[:, 3].any()  # a dead group is not excited
    with torch.no_grad():
        groups.W.zero_()  # nothing is shared
    assert activations.W.any() and not list(activations.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_what_groups_see(kind: Any) -> None:
    encoder, images = make_encoder(), uint8(20, 16, 16, 3)
    sampler, model = MaskSampler((4, 4), num_targets=2), cast("Any", encoder.model)
    with torch.no_grad():
        contexts = [
            model(encoder.pixels(part), sampler.sample(len(part), seed=0, step=step).context)
            for step, part in enumerate(images.split(8))
        ]
    for tokens, masks in ((contexts, sampler), ([encoder.tokens(images)], None)):
        z = torch.cat([x.mean(1) if kind == "region" else x.flatten(0, 1) for x in tokens])
        mean, covariance = measure_seen(encoder, kind, images.split(8), masks)
        torch.testing.assert_close(mean.float(), z.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(covariance.float(), z.T.cov(correction=0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no images"):
        measure_seen(encoder, kind, [])


@pytest.mark.parametrize("kind", KINDS)
def test_units_make_the_mean_square_of_activations_one(kind: Any) -> None:
    encoder, groups, images = make_encoder(), random_map(kind), uint8(20, 16, 16, 3)
    mean, covariance = measure_seen(encoder, kind, images.split(8))
    seen, rms = torch.stack([mean, covariance.diagonal()]).float(), group_rms(groups, covariance)
    pooled, patches = GroupActivations(groups, rms, seen)(encoder.tokens(images))
    found = pooled if patches is None else patches.flatten(0, 1)
    torch.testing.assert_close(found.square().mean(0), torch.ones(4), rtol=1e-4, atol=1e-4)


def test_units_are_kept_with_the_groups(tmp_path: Path) -> None:
    groups, rms, seen = random_map("feature"), torch.rand(4) + 0.5, torch.rand(2, 24) + 0.5
    groups.norm.eps = 0.0
    save_groups(tmp_path, groups, rms, seen)
    found = load_activations(tmp_path, (4, 4))
    wanted = GroupActivations(groups, rms, seen)
    assert found is not None and found.kind == "feature"
    assert all(map(torch.equal, found.state_dict().values(), wanted.state_dict().values()))
    again = load_groups(tmp_path, (4, 4))
    assert again is not None and again.norm.eps == 0.0
    assert load_activations(tmp_path / "none", (4, 4)) is None


@pytest.mark.parametrize(
    "changes", [{"rms": torch.ones(3)}, {"seen": torch.ones(2, 7)}, {"W": torch.ones(4, 5, 7)}]
)
def test_groups_that_do_not_fit_are_refused_by_their_file(tmp_path: Path, changes: dict) -> None:
    save_groups(tmp_path, random_map("concept"), torch.ones(4))
    tensors, about = load_tensors(tmp_path / "groups.safetensors")
    save_tensors(tmp_path / "groups.safetensors", tensors | changes, about)
    with pytest.raises(UserError, match=r"groups.safetensors: "):
        load_activations(tmp_path, (4, 4))
