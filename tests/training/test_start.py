"""Runs that start from an encoder: --init."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from sparsejepa.config import Config
from sparsejepa.encoders.encoder import Encoder, save_encoder, vit_arguments
from sparsejepa.errors import UserError
from sparsejepa.model.vit import ViT
from sparsejepa.study import pretrain
from sparsejepa.training import loop
from sparsejepa.training.build import build_model, find_start

from .tiny import config_of

MEAN, STD = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)


def encoder_in(folder: Path, seed: int = 0, **changes: Any) -> ViT:
    """Write a run directory's encoder for images of 16x16 pixels; return it."""
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    vit = ViT(**{**sizes, **changes})
    folder.mkdir(parents=True)
    save_encoder(folder, vit, mean=MEAN, std=STD)
    return vit


OTHERS = {
    "ours": {},
    "learned": {"class_token": True, "pos_embed": "learned", "mlp_ratio": 2.5},
    "eps": {"norm_eps": 1e-5},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_both_encoders_start_from_the_weights(folder: Path, tmp_path: Path, kind: str) -> None:
    vit = encoder_in(tmp_path / "a", **OTHERS[kind])
    config = config_of(folder, init=str(tmp_path / "a"))
    start = find_start(config)
    assert start is not None
    config = start.settings(config)
    assert config.encoder_shape == (24, 2, 3) and config.model.patch_size == 4
    model = build_model(config, (16, 16), 4, start)
    for encoder in (model.context_encoder, model.target_encoder):
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, vit.state_dict()[name]), name
    assert model.context_encoder.pos_embed.requires_grad == (kind == "learned")
    decayed, rest = ({id(p) for p in part} for part in model.network_parameters())
    if kind == "learned":
        places = {id(model.context_encoder.pos_embed), id(model.context_encoder.cls_token)}
        assert places <= rest and not places & decayed


@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_goes_on_and_its_encoder_loads(folder: Path, tmp_path: Path, kind: str) -> None:
    vit = encoder_in(tmp_path / "a", **OTHERS[kind])
    run = pretrain(config_of(folder, init=str(tmp_path / "a")), out=tmp_path / "run")
    encoder = run.encoder()
    assert (encoder.mean, encoder.std) == (MEAN, STD), "the pixels are those that it knows"
    before = Encoder(vit, name="a", mean=MEAN, std=STD)
    assert encoder.architecture == before.architecture
    assert encoder.fingerprint() != before.fingerprint()
    assert run.config.model.encoder == "24,2,3"
    assert loop.read_config(run.path).model.encoder == "24,2,3"
    given = config_of(folder, init=str(tmp_path / "a"))
    again = pretrain(given, out=tmp_path / "run", resume=True)
    assert again.config == run.config, "a finished run is read, with the settings that it had"


def test_a_run_goes_on_with_the_encoder_that_it_began_with_alone(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, init=str(tmp_path / "a"), checkpoint_every=2)
    encoder_in(tmp_path / "a")
    whole = pretrain(config, out=tmp_path / "run")
    (whole.path / "summary.json").unlink()
    shutil.rmtree(sorted((whole.path / "checkpoints").iterdir())[-1])  # that of step 4
    again = pretrain(config, out=whole.path, resume=True)
    assert again.summary["final"]["loss"] == whole.summary["final"]["loss"]
    with pytest.raises(UserError, match="--init None"):
        pretrain(config.replace(init=None), out=whole.path, resume=True)
    (whole.path / "summary.json").unlink()
    shutil.rmtree(tmp_path / "a")
    encoder_in(tmp_path / "a", seed=1)
    with pytest.raises(UserError, match=r"--init .*: the encoder is not what .*run began with"):
        pretrain(config, out=whole.path, resume=True)


@pytest.mark.parametrize("learned", [True, False])
def test_positions_on_another_grid(tmp_path: Path, learned: bool) -> None:
    changes = OTHERS["learned"] if learned else {"class_token": True}
    vit = encoder_in(tmp_path / "a", **changes)
    start = find_start(Config().replace(init=str(tmp_path / "a")))
    assert start is not None
    larger = start.encoder((24, 32), 0.0)
    expected = ViT(**{**vit_arguments(vit), "img_size": (24, 32)}).pos_embed
    if learned:
        expected = resample_abs_pos_embed(vit.pos_embed, [6, 8], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(larger.pos_embed.detach(), expected.detach())
    others = {name: t for name, t in larger.state_dict().items() if name != "pos_embed"}
    assert all(torch.equal(t, vit.state_dict()[name]) for name, t in others.items())


def test_a_model_of_timm_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    config = config_of(
        folder, init="timm:vit_tiny_patch16_224?untrained", img_size=64, upscale=True, steps=1
    )
    run = pretrain(config, out=tmp_path / "run")
    encoder = run.encoder()
    assert encoder.architecture["class_token"] and encoder.architecture["pos_embed"] == "learned"
    assert encoder.img_size == (64, 64) and encoder.mean == (0.5, 0.5, 0.5)


def test_the_licence_goes_along(folder: Path, tmp_path: Path) -> None:
    encoder_in(tmp_path / "a")
    (tmp_path / "a/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    first = pretrain(config_of(folder, init=str(tmp_path / "a"), steps=1), out=tmp_path / "b")
    assert first.encoder().license == "cc-by-nc-4.0"
    again = pretrain(config_of(folder, init=str(first.path), steps=1), out=tmp_path / "c")
    assert again.encoder().license == "cc-by-nc-4.0"
    fresh = pretrain(config_of(folder, steps=1), out=tmp_path / "d")
    assert fresh.encoder().license is None
    assert "license" not in json.loads((fresh.path / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "96,6,3"}, "--encoder 96,6,3: --init .* has 24,2,3; leave"),
        ({"num_groups": 30}, "--num-groups 30 is more than the 24 latents of --init"),
        ({"init": "timm:vit_tny_patch16_224"}, "--init timm:.*did you mean"),
        ({"init": "timm:vit_small_patch14_dinov2?untrained"}, r"--init timm:.*ls1\.gamma"),
        ({"init": "nowhere"}, "--init nowhere: no such run directory"),
    ],
)
def test_what_cannot_be_gone_on_with(
    folder: Path, tmp_path: Path, changes: dict, words: str
) -> None:
    encoder_in(tmp_path / "a")
    config = config_of(folder, init=str(tmp_path / "a")).replace(**changes)
    with pytest.raises(UserError, match=words) as caught:
        pretrain(config, out=tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_patches_must_be_square_and_tile_the_images(folder: Path, tmp_path: Path) -> None:
    encoder_in(tmp_path / "a", img_size=(16, 32), patch_size=(4, 8))
    with pytest.raises(UserError, match="its patches are 4x8 pixels"):
        pretrain(config_of(folder, init=str(tmp_path / "a")), out=tmp_path / "run")
    encoder_in(tmp_path / "b", img_size=15, patch_size=5)
    with pytest.raises(UserError, match="--patch-size 5 does not divide the image"):
        pretrain(config_of(folder, init=str(tmp_path / "b")), out=tmp_path / "run")


def test_sizes_of_ones_own(folder: Path, tmp_path: Path) -> None:
    run = pretrain(config_of(folder, encoder=(36, 2, 3), steps=1), out=tmp_path / "run")
    architecture = run.encoder().architecture
    assert (architecture["embed_dim"], architecture["depth"]) == (36, 2)
    with pytest.raises(UserError, match="40 is more than the 36 latents of --encoder 36,2,3"):
        config_of(folder, encoder=(36, 2, 3), num_groups=40).check()
