from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparsejepa import files
from sparsejepa.errors import UserError
from sparsejepa.interop import Encoder, hub, load, save_encoder, vit_arguments
from sparsejepa.model.encoder import ViT

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def small_vit(seed: int = 0, **changes) -> ViT:
    torch.manual_seed(seed)
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
    return ViT(**{**arguments, **changes})  # type: ignore[arg-type]


def make_encoder(seed: int = 0, **changes) -> Encoder:
    return Encoder(small_vit(seed, **changes), name="small", mean=MEAN, std=STD)


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (count, height, width, 3)
    return torch.randint(256, size, generator=generator, dtype=torch.uint8)


def saved(path: Path, **changes) -> ViT:
    vit = small_vit(**changes)
    save_encoder(path, vit, mean=MEAN, std=STD, extra={"data": "scenes", "seed": 3})
    return vit


# Run directories


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"img_size": (16, 24), "patch_size": (4, 8), "drop_path": 0.3},
        {"class_token": True, "pos_embed": "learned", "mlp_ratio": 2.5},
    ],
)
def test_a_saved_encoder_loads_as_it_was(tmp_path: Path, changes: dict) -> None:
    vit = saved(tmp_path, **changes).eval()
    encoder = load(tmp_path)
    images = random_images(3, *vit.img_size)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(encoder.tokens(images), vit(pixels), rtol=1e-4, atol=1e-5)
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, vit.state_dict()[name])
    assert (encoder.mean, encoder.std) == (MEAN, STD)
    assert encoder.img_size == vit.img_size and encoder.grid_size == vit.grid_size
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 1 and config["kind"] == "vit" and config["data"] == "scenes"
    assert config["img_size"] == list(vit.img_size)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "encoder.safetensors"]


@settings(max_examples=200, deadline=None)
@given(dim=st.integers(1, 400), hidden=st.integers(1, 2000))
def test_the_mlp_ratio_survives_rounding(dim: int, hidden: int) -> None:
    vit = small_vit(embed_dim=4, num_heads=1, depth=1)
    vit.embed_dim = dim
    vit.blocks[0].mlp.fc1.out_features = hidden  # type: ignore[union-attr]
    assert int(dim * vit_arguments(vit)["mlp_ratio"]) == hidden


def test_the_file_is_timms(tmp_path: Path) -> None:
    import timm

    vit = saved(tmp_path).eval()
    theirs = timm.models.VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=4,
        num_heads=3,
        num_classes=0,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    ).eval()
    theirs.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(theirs.forward_features(pixels), vit(pixels), atol=1e-5, rtol=1e-4)


def test_saving_leaves_the_old_file_whole_when_the_disk_is_full(
    tmp_path: Path, monkeypatch
) -> None:
    before = saved(tmp_path).state_dict()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError):
        save_encoder(tmp_path, small_vit(5), mean=MEAN, std=STD)
    monkeypatch.undo()
    after = load(tmp_path).model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(list(tmp_path.iterdir())) == 2


def broken_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_errors_of_a_run_directory_are_one_line_that_names_it(tmp_path: Path) -> None:
    def refused(*words: str) -> None:
        with pytest.raises(UserError) as caught:
            load(run)
        text = str(caught.value)
        assert "\n" not in text
        for word in (str(run), *words):
            assert word in text

    good = tmp_path / "good"
    good.mkdir()
    saved(good)

    def fresh(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    run = tmp_path / "nowhere"
    refused("no such run directory", "timm:NAME")
    run = tmp_path / "file"
    run.write_text("")
    refused("is a file")
    run = tmp_path / "empty"
    run.mkdir()
    refused("not a run directory", "config.json")
    run = fresh("unfinished")
    (run / "encoder.safetensors").unlink()
    (run / "checkpoints").mkdir()
    refused("unfinished", "--resume")
    run = fresh("no_weights")
    (run / "encoder.safetensors").unlink()
    refused("encoder.safetensors is missing")
    run = fresh("cut")
    weights = run / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("encoder.safetensors", "damaged")
    run = fresh("noise")
    (run / "encoder.safetensors").write_bytes(b"\xff" * 64)
    refused("encoder.safetensors", "damaged")
    run = fresh("no_json")
    (run / "config.json").write_text("{")
    refused("config.json")
    run = fresh("list")
    (run / "config.json").write_text("[]")
    refused("config.json")
    run = fresh("newer")
    broken_config(run, format=2, sparsejepa="9.9")
    refused("format 2", "9.9")
    run = fresh("other_arch")
    broken_config(run, arch={**vit_arguments(small_vit()), "embed_dim": 48})
    refused("does not fit")
    run = fresh("bad_arch")
    broken_config(run, arch={"unknown": 1})
    refused("damaged")


# Tokens


def test_images_of_another_size_are_resized_whole() -> None:
    encoder = make_encoder()
    images = random_images(2, 40, 24)
    planes = images.permute(0, 3, 1, 2).float() / 255
    planes = F.interpolate(planes, (16, 16), mode="bilinear", antialias=True)
    pixels = (planes - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    wanted = encoder.model(pixels)
    torch.testing.assert_close(encoder.tokens(images), wanted, atol=1e-4, rtol=1e-4)
    # The left and the right edge both count: nothing is cropped away.
    for column in (0, -1):
        changed = images.clone()
        changed[:, :, column] = 255 - changed[:, :, column]
        assert not torch.allclose(encoder.tokens(changed), wanted, atol=1e-3)


def test_tokens_can_feed_something_that_is_trained() -> None:
    tokens = make_encoder().tokens(random_images(2, 16, 16))
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    weight = torch.ones(24, requires_grad=True)
    (tokens * weight).sum().backward()
    assert weight.grad is not None


def test_bf16_is_close_and_still_gives_float32() -> None:
    vit, images = small_vit(), random_images(4, 16, 16)
    exact = Encoder(vit, name="a", mean=MEAN, std=STD).tokens(images)
    rough = Encoder(vit, name="a", mean=MEAN, std=STD, precision="bf16").tokens(images)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.1


def test_layers_end_in_the_tokens() -> None:
    encoder, images = make_encoder(class_token=True), random_images(2, 16, 16)
    layers = encoder.layers(images, 4)
    assert [x.shape for x in layers] == [(2, 16, 24)] * 4
    torch.testing.assert_close(layers[-1], encoder.tokens(images))
    with pytest.raises(UserError, match="4 blocks"):
        encoder.layers(images, 5)


def test_untrained_is_the_same_architecture_with_weights_that_depend_on_the_seed_only() -> None:
    encoder = make_encoder(drop_path=0.2)
    state = torch.random.get_rng_state()
    first, again, other = encoder.untrained(1), encoder.untrained(1), encoder.untrained(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.architecture == encoder.architecture
    assert first.fingerprint() == again.fingerprint()
    prints = {encoder.fingerprint(), first.fingerprint(), other.fingerprint()}
    assert len(prints) == 3
    assert (first.mean, first.img_size) == (encoder.mean, encoder.img_size)


def test_the_fingerprint_sees_a_single_weight() -> None:
    encoder, twin = make_encoder(), make_encoder()
    assert encoder.fingerprint() == twin.fingerprint()
    with torch.no_grad():
        twin.model.get_parameter("blocks.2.mlp.fc1.weight")[3, 4] += 1e-3
    assert encoder.fingerprint() != twin.fingerprint()


# timm

NAME = "vit_tiny_patch16_224"


def test_a_timm_model_gives_its_patch_tokens() -> None:
    encoder = load(f"timm:{NAME}?untrained")
    assert encoder.img_size == (224, 224) and encoder.grid_size == (14, 14)
    assert encoder.mean == (0.5, 0.5, 0.5)  # of these weights, not the usual ImageNet ones
    images = random_images(1, 224, 224)
    vit: Any = encoder.model.vit
    with torch.no_grad():
        wanted = vit.forward_features(images.permute(0, 3, 1, 2).float() / 127.5 - 1)[:, 1:]
    tokens = encoder.tokens(images)
    torch.testing.assert_close(tokens, wanted, atol=1e-4, rtol=1e-4)
    layers = encoder.layers(images, 4)
    assert len(layers) == 4
    torch.testing.assert_close(layers[-1], tokens, atol=1e-4, rtol=1e-4)
    assert encoder.untrained(0).fingerprint() == encoder.fingerprint()
    assert encoder.untrained(1).fingerprint() != encoder.fingerprint()


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("timm:vit_tny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
        (
            "timm:vit_tiny_patch16_224.augreg_in21",
            "did you mean 'vit_tiny_patch16_224.augreg_in21k",
        ),
        ("timm:resnet18?untrained", "not a vision transformer"),
        ("timm:resnet18", "not a vision transformer"),  # not first that its weights are lacking
        ("timm:vit_gibtsnicht", "no such model (did you mean 'vit_"),
        ("timm:vit_tiny_patch16_224?random", "only '?untrained' is"),
    ],
)
def test_timm_names_that_are_none(ref: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(ref)
    assert words in str(caught.value) and "timm:" in str(caught.value)


def test_timm_weights_come_from_the_cache_or_the_error_says_how(
    tmp_path: Path, monkeypatch
) -> None:
    import timm
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(UserError) as caught:
        load(f"timm:{NAME}")
    for word in (NAME, "connect to the internet", "HF_HUB_CACHE", "?untrained"):
        assert word in str(caught.value)

    about: Any = timm.models.get_pretrained_cfg(NAME)
    repo = tmp_path / f"models--{about.hf_hub_id.replace('/', '--')}"
    (repo / "snapshots/abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    weights = timm.create_model(NAME, pretrained=False).state_dict()
    weights["norm.bias"] += 7
    save_file(weights, repo / "snapshots/abc/model.safetensors")
    loaded = load(f"timm:{NAME}")
    assert torch.equal(loaded.model.get_parameter("vit.norm.bias"), weights["norm.bias"])
    assert loaded.license == about.license

    def broken(*args, **kwargs):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(UserError, match=r"RuntimeError: no luck\)"):
        load(f"timm:{NAME}")


# Sizes in a file


@pytest.mark.parametrize(
    "changes",
    [{"depth": 10**9}, {"img_size": [10**7, 10**7]}, {"embed_dim": 10**9}, {"mlp_ratio": 1e12},
     {"depth": 0}, {"num_heads": 0}, {"patch_size": [0, 0]}, {"patch_size": [-4, -4]},
     {"img_size": []}, {"embed_dim": "24"}, {"unknown": 1}, {"in_chans": 10**9}],
)  # fmt: skip
def test_sizes_in_a_run_take_no_memory(tmp_path: Path, changes: dict) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["arch"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json"):
        load(tmp_path)
