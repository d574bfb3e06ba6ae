"""Exports are loaded by the programs that they are for and compared with ours, to 1e-5."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

import sparsejepa as sj
from sparsejepa.cli import main
from sparsejepa.encoders.encoder import Encoder, load_activations, load_groups, save_encoder
from sparsejepa.encoders.export import ONNX, OPSET, Export, card, write_export
from sparsejepa.encoders.load import load
from sparsejepa.errors import UserError

from .made import KINDS, MEAN, STD, noise, open_run, small_vit, write_run

CASES = [(None, "square"), ("region", "wide"), ("concept", "square"), ("feature", "token")]
FORMATS = ("timm", "transformers", "hub", "onnx")


def close(found: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found).detach(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_what_is_exported_is_tokens_pooled_and_groups(tmp_path: Path, kind: str | None) -> None:
    run = write_run(tmp_path / "a", kind)
    export, encoder, pixels = open_run(run), load(run), noise((16, 16))
    with torch.no_grad():
        found, tokens = export(pixels), encoder.model(pixels)
    wanted = {"tokens": tokens, "pooled": tokens.mean(1)}
    activations = load_activations(run, encoder.grid_size)
    if activations is not None:
        wanted["groups"], group_map = activations(tokens)
        wanted |= {} if group_map is None else {"group_map": group_map}
        assert not found["groups"][:, 3].any() and found["groups"][:, :3].min() > 0
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        close(found[name], tensor)


# Each format


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_the_lines_of_an_export_give_what_ours_does(
    tmp_path: Path, to: str, kind: str | None, shape: str
) -> None:
    export, out = open_run(write_run(tmp_path / "run", kind, shape)), tmp_path / "out"
    found = write_export(export, to, out)
    assert found["difference"] < 1e-5 and found["files"] == sorted(p.name for p in out.iterdir())
    height, width = export.encoder.img_size
    images = torch.randint(256, (3, height, width, 3), dtype=torch.uint8)
    pixels = export.encoder.pixels(images)
    with torch.no_grad():
        wanted = export(pixels)
    names: dict[str, Any] = {"images": images, "given": pixels}
    own = f"torch.randn(1, 3, {height}, {width})"
    if to == "onnx":
        own, names["given"] = f"np.zeros((5, 3, {height}, {width}), np.float32)", pixels.numpy()
    assert (own in found["use"]) == (to != "hub")
    exec(found["use"].replace(own, "given"), names)
    close(names["tokens"], wanted["tokens"])
    if "pooled" in names:
        close(names["pooled"], wanted["pooled"])
    if kind is not None and to in ("timm", "transformers"):  # each patch's, where there are such
        close(names["groups"], wanted.get("group_map", wanted["groups"]))
    elif kind is not None:
        close(names["groups"], wanted["groups"])
        if "group_map" in wanted:
            close(names["group_map"], wanted["group_map"])
    readme = (out / "README.md").read_text()
    assert str(tmp_path) not in found["use"].replace(str(out), "") and str(tmp_path) not in readme
    assert ("4 groups of kind" in readme) == (kind is not None)
    assert ModelCard(readme).data.to_dict()["library_name"] in (*FORMATS, "sparsejepa")


def test_timm_and_transformers_are_told_how_images_are_prepared(tmp_path: Path) -> None:
    export = open_run(write_run(tmp_path / "run", shape="wide"))
    write_export(export, "timm", tmp_path / "timm")
    about = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'timm'}"))
    assert about["input_size"] == (3, 16, 24) and about["interpolation"] == "bicubic"
    assert (about["crop_mode"], about["crop_pct"]) == ("center", 1)
    assert (tuple(about["mean"]), tuple(about["std"])) == (MEAN, STD)
    found = write_export(export, "transformers", tmp_path / "transformers")
    assert "It squashes: crop images" in found["use"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "transformers")
    images = torch.randint(256, (1, 16, 24, 3), dtype=torch.uint8)
    pixels = processor(images.numpy(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, export.encoder.pixels(images), rtol=1e-4, atol=1e-4)
    again = load(tmp_path / "transformers")
    assert (again.mean, again.std) == (MEAN, STD) and again.img_size == (16, 24)
    assert again.architecture == export.encoder.architecture


def test_the_onnx_file_says_what_it_takes(tmp_path: Path) -> None:
    export = open_run(write_run(tmp_path / "run", "feature", "wide"))
    write_export(export, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / ONNX)
    about = json.loads(session.get_modelmeta().custom_metadata_map["sparsejepa.json"])
    wanted = {"mean": [*MEAN], "std": [*STD], "img_size": [16, 24], "groups": "feature"}
    assert about == wanted
    model = onnx.load(tmp_path / "out" / ONNX)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [OPSET]
    for batch in (1, 17):
        pixels = noise((16, 24), batch)
        close(session.run(["pooled"], {"pixels": pixels.numpy()})[0], export(pixels)["pooled"])
    with pytest.raises(Exception, match="Got: 25 Expected: 24"):
        session.run(None, {"pixels": np.zeros((1, 3, 16, 25), np.float32)})


def test_a_hub_folder_is_the_run_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "feature")
    found = write_export(open_run(run), "hub", tmp_path / "out")
    assert found["files"] == [
        "README.md",
        "config.json",
        "encoder.safetensors",
        "groups.safetensors",
    ]
    assert (
        found["difference"] == 0 and load(tmp_path / "out").fingerprint() == load(run).fingerprint()
    )
    # The group networks, which predict, are there as well: groups can be trained on.
    own, theirs = (load_groups(path, (4, 4)) for path in (tmp_path / "out", run))
    assert own is not None and theirs is not None
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor)


def test_a_photo_gives_the_same_features_everywhere(tmp_path: Path) -> None:
    """Within what other filters than ours and whole pixels of a crop differ by; not if squashed."""
    run = tmp_path / "run"
    run.mkdir()
    vit = small_vit(img_size=64, patch_size=8, embed_dim=96)
    save_encoder(run, vit, mean=MEAN, std=STD)
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((300, 200))
    for split in ("train", "test"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        photo.save(tmp_path / "data" / split / "a" / "1.png")
    data = sj.load_dataset(str(tmp_path / "data"), "train", img_size=(64, 64))
    wanted = torch.as_tensor(sj.embed(load(run), data).x)
    export = open_run(run)

    def apart(pixels: torch.Tensor) -> float:
        with torch.no_grad():
            return float((export(pixels)["pooled"] - wanted).norm() / wanted.norm())

    write_export(export, "timm", tmp_path / "timm")
    about = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'timm'}"))
    prepare: Any = create_transform(**about)
    squash: Any = create_transform(**{**about, "crop_mode": "squash"})
    assert apart(prepare(photo)[None]) < 0.025 < 0.12 < apart(squash(photo)[None])
    write_export(export, "transformers", tmp_path / "transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "transformers")
    assert apart(processor(photo, return_tensors="pt")["pixel_values"]) < 0.025


# What is the same for all


def test_a_timm_model_is_brought_into_our_form(tmp_path: Path) -> None:
    ref = "timm:vit_tiny_patch16_224?untrained"
    encoder, pixels = load(ref), noise((224, 224), 1)
    write_export(Export(ref, encoder), "hub", tmp_path / "out")
    with torch.no_grad():
        close(load(tmp_path / "out").model(pixels), encoder.model(pixels))
    with pytest.raises(UserError, match=r"dinov2.*not the encoder of a plain ViT.*ls1\.gamma"):
        ref = "timm:vit_small_patch14_dinov2?untrained"
        Export(ref, load(ref))


def test_an_export_that_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def other(name: str, **kwargs: Any) -> Any:
        model: Any = create(name, **kwargs)
        if name.startswith("local-dir:"):
            torch.nn.init.normal_(model.norm.weight)
        return model

    export = open_run(write_run(tmp_path / "run"))
    monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(UserError, match="not written, since timm gives other tokens"):
        write_export(export, "timm", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_groups_of_another_folder_travel_along(tmp_path: Path) -> None:
    dense, other = write_run(tmp_path / "dense"), write_run(tmp_path / "other", "feature")
    write_export(Export(str(dense), load(dense), other), "hub", tmp_path / "out")
    own, theirs = (load_groups(path, (4, 4)) for path in (tmp_path / "out", other))
    assert own is not None and theirs is not None and torch.equal(own.W, theirs.W)
    with pytest.raises(UserError, match=r"--groups .*dense: there is no groups.safetensors"):
        Export(str(dense), load(dense), dense)
    wider = Encoder(small_vit(embed_dim=36), name="wider", mean=MEAN, std=STD)
    with pytest.raises(UserError, match="its groups are of another encoder"):
        Export("wider", wider, other)


def test_a_licence_travels_along(tmp_path: Path) -> None:
    encoder = load(write_run(tmp_path / "run"))
    encoder.license = "CC BY-NC 4.0 (if these are the published weights of I-JEPA)"
    for to in ("hub", "transformers"):
        write_export(Export(str(tmp_path / "run"), encoder), to, tmp_path / to)
        found = load(tmp_path / to).license
        assert found is not None and "nc" in found.lower()
        assert "license: cc-by-nc-4.0" in (tmp_path / to / "README.md").read_text()


def test_texts_on_a_card_are_no_markup(tmp_path: Path) -> None:
    export = open_run(write_run(tmp_path / "run"))
    hostile = "a|b`<script>alert(1)</script>\n# [x](javascript:1)\n```\n"
    export.encoder.license = hostile
    text = str(card(export, "hub", hostile))
    assert "<script" not in text and "\n# [" not in text and "\n[x](java" not in text
    assert text.count("\n```") == 2
    assert ModelCard(text).data.to_dict()["library_name"] == "sparsejepa"


# The verb


def test_the_verb_says_how_the_export_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = write_run(tmp_path / "run", "region"), tmp_path / "out"
    assert main(["export", str(run), "--to", "timm", "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown.strip().splitlines()[-1])
    assert found["groups"] == "region" and found["difference"] < 1e-5
    assert "timm.create_model(" in shown and "group_activations.safetensors" in shown
    assert main(["export", str(run), "--to", "timm", "--out", str(out)]) == 2
    assert "exists already; name another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "Missing from sparsejepa export: RUN"),
        (["RUN", "--to", "tim", "--out", "OUT"], "invalid choice 'tim' for argument '--to'"),
        (["RUN", "--to", "timm"], "Missing from sparsejepa export: --out PATH"),
        (["GONE", "--to", "timm", "--out", "OUT"], "no such run directory"),
        (["OPEN", "--to", "timm", "--out", "OUT"], "the run is unfinished; --resume it"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    write_run(tmp_path / "RUN")
    (tmp_path / "OPEN" / "checkpoints").mkdir(parents=True)
    places = {name: str(tmp_path / name) for name in ("RUN", "OPEN", "GONE", "OUT")}
    assert main(["export", *(places.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    ("to", "missing", "extra"),
    [("onnx", "onnxruntime", "onnx"), ("onnx", "onnxscript", "onnx"),
     ("transformers", "transformers", "hub")],
)  # fmt: skip
def test_a_missing_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    to: str, missing: str, extra: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, missing, None)
    run = write_run(tmp_path / "RUN")
    assert main(["export", str(run), "--to", to, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"--to {to} needs {missing}" in error and f"pip install 'sparsejepa[{extra}]'" in error
