from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsejepa.cli import main
from sparsejepa.errors import UserError
from sparsejepa.files import save_tensors
from sparsejepa.interop import IMAGENET, load
from sparsejepa.interop.names import choose_part
from sparsejepa.interop.timm import TimmViT, plain_vit
from sparsejepa.model.encoder import ViT

SIZES = {"img_size": (24, 24), "patch_size": (8, 8), "embed_dim": 192, "depth": 2, "num_heads": 3}
LEARNED = {"class_token": True, "pos_embed": "learned"}


def small_vit(seed: int = 0, **changes) -> ViT:
    torch.manual_seed(seed)
    return ViT(**{**SIZES, **changes}).eval()  # type: ignore[arg-type]


def prefixed(state: dict[str, Tensor], before: str) -> dict[str, Tensor]:
    return {before + name: tensor for name, tensor in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def ijepa(path: Path, vit: ViT, **changes) -> Path:
    """Write a checkpoint as I-JEPA does: several models of DistributedDataParallel and the rest."""
    state = prefixed(vit.state_dict(), "module.")
    parts = {
        "encoder": zeros(state), "predictor": {"module.x": torch.ones(3)}, "target_encoder": state,
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "scaler": None, "epoch": 300, "loss": 0.2, "batch_size": 128, "world_size": 16, "lr": 1e-3,
    }  # fmt: skip
    torch.save({**parts, **changes}, path)
    return path


# What other programs write


@pytest.mark.parametrize("changes", [{}, LEARNED])
def test_ijepas_target_encoder_is_loaded(tmp_path: Path, changes: dict) -> None:
    vit = small_vit(**changes)
    encoder = load(ijepa(tmp_path / "IN1K-vit.h.14-300e.pth.tar", vit))
    images = torch.randint(256, (3, 24, 24, 3), dtype=torch.uint8)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    expected = vit((pixels - mean) / std)
    torch.testing.assert_close(encoder.tokens(images), expected, rtol=1e-4, atol=1e-5)
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, vit.state_dict()[name])
    assert encoder.architecture["num_heads"] == 3 and encoder.depth == 2
    assert encoder.architecture["pos_embed"] == changes.get("pos_embed", "sincos")
    assert encoder.untrained().fingerprint() != encoder.fingerprint()
    # What pretraining saved in half precision is computed in full.
    half = {name: tensor.bfloat16() for name, tensor in vit.state_dict().items()}
    torch.save({"model": {**half, "head.weight": torch.ones(2)}}, tmp_path / "half.pth")
    again = load(tmp_path / "half.pth")
    assert all(torch.equal(t, half[n].float()) for n, t in again.model.state_dict().items())
    assert again.architecture == encoder.architecture


def others(state: dict[str, Tensor]) -> dict[str, tuple[dict, str, int]]:
    """Files as other programs write them, the encoder's part, and how many tensors it leaves out.

    I-JEPA's is above; those of transformers are in test_transformers.py.
    """
    n, moco_part = len(state), "state_dict.module.base_encoder."
    head = {"head.weight": torch.ones(7, 192), "head.bias": torch.ones(7)}
    decoder = {"mask_token": torch.ones(1, 1, 192), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    dino = prefixed(state, "backbone.") | {"head.mlp.0.weight": torch.ones(4, 192)}
    moco = prefixed({**state, "head.0.weight": torch.ones(4, 192)}, "module.base_encoder.")
    moco |= prefixed(zeros(state), "module.momentum_encoder.")
    return {
        "timm": ({**state, **head}, "", 2),
        "deit": ({"model": {**state, **head}}, "model.", 2),
        "mae": ({"model": {**state, **decoder}}, "model.", 2),
        "dino": (
            {
                "student": prefixed(zeros(dino), "module."),
                "teacher": dino,
                "epoch": 3,
                "args": argparse.Namespace(arch="vit_tiny", lr=5e-4, out=argparse.Namespace()),
            },
            "teacher.backbone.",
            n + 2,
        ),
        "moco": (
            {"arch": "vit_small", "state_dict": moco},
            moco_part,
            n + 1,
        ),
        "solo": ({"state_dict": prefixed(state, "backbone.")}, "state_dict.backbone.", 0),
        "compiled": (prefixed(state, "_orig_mod."), "_orig_mod.", 0),
    }


@pytest.mark.parametrize("kind", others({}))
def test_files_of_other_programs(kind: str, tmp_path: Path) -> None:
    vit = small_vit(**LEARNED)
    content, part, ignored = others(vit.state_dict())[kind]
    torch.save(content, tmp_path / "x.pth")
    encoder = load(tmp_path / "x.pth")
    assert all(torch.equal(t, vit.state_dict()[n]) for n, t in encoder.model.state_dict().items())
    report = encoder.report
    assert report is not None and report.part == part and not report.missing and not report.renamed
    assert len(report.matched) == len(vit.state_dict()) and len(report.ignored) == ignored


def test_a_file_in_torchs_old_format(tmp_path: Path) -> None:
    vit, path = small_vit(), tmp_path / "x.pth"
    torch.save({"model": vit.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load(path).model.get_parameter("norm.bias"), vit.norm.bias)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"x\.pth: not a checkpoint of weights \(damaged, or not"):
        load(path)
    torch.save({"model": Path("x")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"more than weights.*save its state_dict alone"):
        load(path)


def test_moco_v3s_small_model_has_twelve_heads(tmp_path: Path) -> None:
    state = small_vit(embed_dim=384, num_heads=6).state_dict()
    torch.save({"state_dict": prefixed(state, "module.base_encoder.")}, tmp_path / "moco.pth")
    assert load(tmp_path / "moco.pth").architecture["num_heads"] == 12
    torch.save(state, tmp_path / "other.pth")
    assert load(tmp_path / "other.pth").architecture["num_heads"] == 6


def test_the_better_of_several_models_is_taken() -> None:
    first = "patch_embed.proj.weight"
    for worse, better in (
        ("encoder.", "target_encoder."),
        ("student.backbone.", "teacher.backbone."),
        ("model.", "model_ema."),
        ("module.momentum_encoder.", "module.base_encoder."),
        ("net.", ""),
    ):
        assert choose_part([worse + first, better + first]) == better
    assert choose_part(["conv1.weight", "xpatch_embed.proj.weight"]) is None


def test_biases_that_a_model_lacks_are_zero(tmp_path: Path) -> None:
    vit = small_vit()
    names = [name for name in vit.state_dict() if name.endswith("qkv.bias")]
    state = {name: t for name, t in vit.state_dict().items() if name not in names}
    save_file(state, tmp_path / "x.safetensors")
    encoder = load(tmp_path / "x.safetensors")
    assert encoder.report is not None and list(encoder.report.missing) == names
    assert not any(encoder.model.get_parameter(name).any() for name in names)


def test_a_safetensors_file_says_what_its_tensors_do_not(tmp_path: Path) -> None:
    sizes = {"img_size": (16, 48), "embed_dim": 24, "num_heads": 4, "norm_eps": 1e-5}
    vit, path = small_vit(**sizes), tmp_path / "x.safetensors"
    told = {"num_heads": 4, "img_size": [16, 48], "norm_eps": 1e-5, "mean": [0.1, 0.2, 0.3]}
    told |= {"license": "mit"}
    save_tensors(path, dict(vit.state_dict()), told)
    encoder, pixels = load(path), torch.randn(2, 3, 16, 48)
    torch.testing.assert_close(encoder.model(pixels), vit(pixels))
    assert encoder.mean == (0.1, 0.2, 0.3) and encoder.std == IMAGENET[1]
    assert encoder.license == "mit"
    save_tensors(path, dict(vit.state_dict()), {**told, "license": 5})
    assert load(path).license is None
    for wrong in ({"mean": "grey"}, {"std": [0, 1, 1]}, {"std": [1, 1, float("inf")]}):
        save_tensors(path, dict(vit.state_dict()), {**told, **wrong})
        with pytest.raises(UserError, match="what it says of itself is no number"):
            load(path)


# What is no plain ViT


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    vit, path = small_vit(), tmp_path / "x.pth.tar"
    state = vit.state_dict()

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("no such file")
    path.write_bytes(b"no archive")
    refused("damaged, or not")
    torch.save([1, 2], path)
    refused("lacks patch_embed.proj.weight and has no tensors at all")
    torch.save({"conv1.weight": torch.ones(64, 3, 7, 7), "bn1.bias": torch.ones(64)}, path)
    refused(r"no vision transformer in it.*has conv1.weight \[64, 3, 7, 7\], bn1.bias \[64\]")
    ijepa(path, vit, target_encoder={k: v for k, v in state.items() if k != "pos_embed"})
    refused("lacks pos_embed")
    ijepa(path, vit, target_encoder={k: v for k, v in state.items() if k != "norm.bias"})
    refused(r"lacks norm\.bias \[192\]")
    ijepa(path, vit, target_encoder={**state, "pos_embed": torch.zeros(1, 8, 192)})
    refused("8 patches, no square")
    ijepa(path, vit, target_encoder={**state, "blocks.1.mlp.fc2.weight": torch.ones(192, 9)})
    refused(r"blocks.1.mlp.fc2.weight is \[192, 9\], not \[192, 768\]")
    ijepa(path, small_vit(embed_dim=24))
    refused("width 24; known widths are 96, 192, 384")
    ijepa(path, vit, target_encoder={**state, "norm.bias": torch.ones(192).to_sparse()})
    refused("norm.bias is sparse")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("damaged, or not")
    path = tmp_path / "x.safetensors"
    refused("no such file")
    path.write_bytes(b"no archive")
    refused("damaged, or no safetensors")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("blocks.0.ls1.gamma", "layer scale"),
        ("blocks.0.gamma_1", "layer scale"),
        ("reg_token", "register tokens"),
        ("dist_token", "a distillation token"),
        ("blocks.0.attn.q_norm.weight", "normalised queries and keys"),
        ("blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("blocks.0.mlp.w12.weight", "a gated MLP"),
        ("norm_pre.weight", "a norm before the blocks"),
        ("patch_embed.backbone.conv1.weight", "another stem"),
    ],
)
def test_what_a_plain_vit_has_not_is_named(name: str, what: str, tmp_path: Path) -> None:
    save_file({**small_vit().state_dict(), name: torch.ones(192)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=what) as caught:
        load(tmp_path / "x.safetensors")
    assert f"has {name} [192]" in str(caught.value)


def test_sizes_in_a_checkpoint_take_no_memory(tmp_path: Path) -> None:
    state = small_vit().state_dict()
    # A million by a million patches: one number in the file, seen through strides of zero.
    state["pos_embed"] = torch.zeros(1).as_strided((1, 10**12, 192), (0, 0, 0))
    torch.save({"target_encoder": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="larger than what the file holds"):
        load(tmp_path / "x.pth")


# timm's models as ours


def test_a_plain_timm_model_becomes_ours() -> None:
    model = TimmViT("vit_tiny_patch16_224", pretrained=False)
    vit, pixels = plain_vit(model).eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(vit(pixels), model.eval()(pixels), rtol=1e-5, atol=1e-5)
    assert vit.positions == "learned" and vit.num_prefix_tokens == 1


def test_a_model_that_becomes_ours_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TimmViT("vit_tiny_patch16_224", pretrained=False, settings={"depth": 1})
    monkeypatch.setattr(TimmViT, "_apply", lambda *_: pytest.fail("the caller's model is moved"))
    assert plain_vit(model).depth == 1


def test_a_gelu_that_only_comes_near_is_no_plain_model() -> None:
    """Its tokens of untrained weights differ by less than those of another order of sums."""
    settings = {"depth": 1, "act_layer": "gelu_tanh"}
    with pytest.raises(UserError, match="another activation"):
        plain_vit(TimmViT("vit_tiny_patch16_224", pretrained=False, settings=settings))
    settings["act_layer"] = "gelu"  # timm's own class of the exact one
    assert plain_vit(TimmViT("vit_tiny_patch16_224", pretrained=False, settings=settings))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vit_tiny_patch16_dinov3_qkvb", "."),
        ("deit_tiny_distilled_patch16_224", "a distillation token"),
        ("vit_small_patch14_dinov2", "layer scale"),
        ("vit_small_patch16_224?quick", "its tokens are not"),
    ],
)
def test_other_timm_models_do_not(name: str, what: str) -> None:
    name, _, quick = name.partition("?")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = TimmViT(name, pretrained=False)
    if quick:  # as in CLIP's models: no tensor tells
        for block in model.vit.blocks:
            block.mlp.act = torch.nn.ReLU()
            block.mlp.fc1.weight.data *= 30
    with pytest.raises(UserError, match=what) as caught:
        plain_vit(model)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# What is said of it


def test_info_shows_architecture_licence_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = ijepa(tmp_path / "x.pth.tar", small_vit())
    with caplog.at_level(logging.WARNING):
        assert main(["info", str(path)]) == 0
        load(path)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{path}: weights under CC BY-NC 4.0") and "no commercial use" in said
    shown = capsys.readouterr().out
    for word in ("192", "CC BY-NC 4.0", "target_encoder.module.", "another part of the file"):
        assert word in shown
    report = load(path).report
    assert report is not None
    assert {"part", "matched", "renamed", "ignored", "missing"} == set(dataclasses.asdict(report))
    assert report.facts()["matched"] == len(small_vit().state_dict())
