from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.data.config import resolve_model_data_config

from sparsejepa.cli import main
from sparsejepa.errors import UserError
from sparsejepa.interop import load, load_groups
from sparsejepa.interop.export import MODEL, Exported, open_export, write_export
from sparsejepa.interop.module import SparseJEPAEncoder
from sparsejepa.interop.timm import TimmViT
from sparsejepa.model.encoder import ViT

from .exported import MEAN, STD, assert_same, open_run, pixels_for, write_run

KINDS = (None, "region", "concept", "feature")
CASES = [(kind, "square") for kind in KINDS] + [("region", "wide"), ("feature", "token")]


def export(run: Path, to: str, out: Path) -> tuple[SparseJEPAEncoder, Exported]:
    module = open_run(run)
    return module, write_export(module, to, out)


def used(found: Exported, module: SparseJEPAEncoder) -> dict[str, Any]:
    """Run the lines of Python that an export says, on other pixels than theirs."""
    height, width = module.encoder.img_size
    own = f"torch.randn(1, 3, {height}, {width})"
    assert own in found.use
    names: dict[str, Any] = {"given": pixels_for(module)}
    exec(found.use.replace(own, "given"), names)
    return names


def assert_groups(names: dict[str, Any], module: SparseJEPAEncoder) -> None:
    """Compare what the five lines on the groups give with the module."""
    if module.groups is not None:
        wanted = module(names["given"])
        wanted = wanted.get("group_map", wanted["groups"])
        torch.testing.assert_close(names["groups"], wanted, rtol=1e-5, atol=1e-5)


# timm


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_ours_to_timm_and_back(tmp_path: Path, kind: str | None, shape: str) -> None:
    module, found = export(write_run(tmp_path / "run", kind, shape), "timm", tmp_path / "out")
    wanted, names = module(pixels_for(module)), used(found, module)
    assert_same({k: names[k].detach() for k in ("tokens", "pooled")}, _first_two(wanted))
    assert_groups(names, module)
    assert found.difference is not None and found.difference < 1e-5
    assert bool(found.left_out) == (kind is not None)
    for back in (load(tmp_path / "out"), load(tmp_path / "out" / MODEL)):
        pixels = pixels_for(module)
        torch.testing.assert_close(back.model(pixels), wanted["tokens"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(back.mean), torch.tensor(MEAN))
        torch.testing.assert_close(torch.tensor(back.std), torch.tensor(STD))


def test_timm_reads_the_folder_itself(tmp_path: Path) -> None:
    module, _ = export(write_run(tmp_path / "run", shape="wide"), "timm", tmp_path / "out")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels = pixels_for(module)
    assert_same({"pooled": model(pixels).detach()}, {"pooled": module(pixels)["pooled"]})
    about = resolve_model_data_config(model)
    assert about["input_size"] == (3, 16, 24)
    assert (about["crop_mode"], about["crop_pct"], about["interpolation"]) == (
        "center",
        1,
        "bicubic",
    )
    assert (tuple(about["mean"]), tuple(about["std"])) == (MEAN, STD)


def test_a_timm_model_is_brought_into_our_form(tmp_path: Path) -> None:
    encoder = load("timm:vit_tiny_patch16_224?untrained")
    assert isinstance(encoder.model, TimmViT)
    module = open_export(encoder.name, encoder)
    assert isinstance(module.model, ViT)
    pixels = pixels_for(module, 1)
    torch.testing.assert_close(module.model(pixels), encoder.model(pixels), rtol=1e-5, atol=1e-5)
    write_export(module, "hub", tmp_path / "out")
    again = SparseJEPAEncoder.from_pretrained(tmp_path / "out")
    assert_same(again(pixels), module(pixels))


def test_what_is_no_plain_vit_is_refused_by_its_keys() -> None:
    encoder = load("timm:deit3_small_patch16_224?untrained")
    with pytest.raises(UserError, match=r"deit3.*not the encoder of a plain ViT.*layer scale"):
        open_export(encoder.name, encoder)


# transformers


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_ours_to_transformers_and_back(tmp_path: Path, kind: str | None, shape: str) -> None:
    run, out = write_run(tmp_path / "run", kind, shape), tmp_path / "out"
    module, found = export(run, "transformers", out)
    wanted, names = module(pixels_for(module)), used(found, module)
    assert_same({"tokens": names["tokens"].detach()}, {"tokens": wanted["tokens"]})
    assert_groups(names, module)
    assert type(names["model"]).__name__ == ("ViTModel" if shape == "token" else "IJepaModel")
    assert found.difference is not None and found.difference < 1e-5
    back = load(out)
    pixels = pixels_for(module)
    torch.testing.assert_close(back.model(pixels), wanted["tokens"], rtol=1e-5, atol=1e-5)
    assert (back.mean, back.std) == (MEAN, STD)


def test_transformers_prepares_images_as_we_do(tmp_path: Path) -> None:
    module, _ = export(write_run(tmp_path / "run", shape="wide"), "transformers", tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    images = torch.randint(256, (16, 24, 3), dtype=torch.uint8)
    found = processor(images.numpy(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, module.preprocess(images), rtol=1e-4, atol=1e-4)


# What is the same for all


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_readme_beside_the_weights_names_no_folder_of_this_machine(tmp_path: Path, to: str) -> None:
    export(write_run(tmp_path / "run", "concept"), to, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text and 'g = load_file("out/' in text


def test_an_export_that_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def other(*args: Any, **kwargs: Any) -> Any:
        model: Any = create(*args, **kwargs)
        torch.nn.init.normal_(model.norm.weight)
        return model

    monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(UserError, match="not written, since timm gives other tokens at 1 images"):
        export(write_run(tmp_path / "run"), "timm", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_groups_of_another_folder_travel_along(tmp_path: Path) -> None:
    dense, other = write_run(tmp_path / "dense"), write_run(tmp_path / "other", "feature")
    module = open_export(str(dense), load(dense), other)
    write_export(module, "hub", tmp_path / "out")
    own, theirs = (load_groups(path, (4, 4)) for path in (tmp_path / "out", other))
    assert own is not None and theirs is not None and torch.equal(own.W, theirs.W)
    with pytest.raises(UserError, match=r"--groups .*dense: there is no groups.safetensors"):
        open_export(str(dense), load(dense), dense)


def _first_two(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: found[name] for name in ("tokens", "pooled")}


# The verb


def test_the_verb_says_how_the_export_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = write_run(tmp_path / "run", "region"), tmp_path / "out"
    assert main(["export", str(run), "--to", "timm", "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown.strip().splitlines()[-1])
    assert found["groups"] == "region" and found["difference"] < 1e-5
    assert "timm.create_model(" in shown and "groups: they are in group_activations" in shown
    assert main(["export", str(run), "--to", "timm", "--out", str(out)]) == 2
    assert "exists already; name another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "which encoder? Name a run directory or timm:NAME after the verb"),
        (["RUN"], "--to is needed: timm, transformers, hub, onnx or pt2"),
        (
            ["RUN", "--to", "tim", "--out", "OUT"],
            "--to tim: not one of timm, transformers, hub, onnx, pt2 (did you mean 'timm'?)",
        ),
        (["RUN", "--to", "timm"], "--out is needed: the folder or file to write"),
        (["RUN", "--to", "onnx", "--out", "OUT"], "the name must end in .onnx"),
        (["RUN", "--to", "timm", "--out", "hub:a/b"], "only --to hub uploads"),
        (["RUN", "--to", "hub", "--out", "OUT", "--public"], "only for --out hub:OWNER/NAME"),
        (["RUN", "--to", "timm", "--out", "OUT", "--no-page"], "--no-page: only for --to hub"),
        (["RUN", "--to", "hub", "--out", "hub:a"], "not of the form hub:OWNER/NAME"),
        (["RUN", "--to", "hub", "--out", "hub:a/b"], "the hub cannot be reached"),
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


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    run = write_run(tmp_path / "RUN")
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "a.onnx")]) == 2
    error = capsys.readouterr().err
    assert f"--to onnx needs {missing}" in error and "pip install 'sparsejepa[onnx]'" in error
