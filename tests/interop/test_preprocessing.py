"""From a photo that is not square to features: the same by every way that there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from transformers import AutoImageProcessor

import sparsejepa as sj
from sparsejepa.errors import UserError
from sparsejepa.interop import graphs, load, save_encoder
from sparsejepa.interop.export import write_export
from sparsejepa.interop.images import RULE, at_size
from sparsejepa.interop.module import SparseJEPAEncoder

from .exported import MEAN, STD, open_run, write_run

SIZE = (64, 64)
EXACT, FILTER, JPEG, SHIFT, SQUASHED = 1e-5, 0.025, 0.035, 0.08, 0.12
"""Share of the features' length that they may differ by: bicubic for Hamming, both and a JPEG that
is not decoded smaller, both and half a pixel; and what squashing differs by at least."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SparseJEPAEncoder:
    path = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    vit = sj.ViT(img_size=SIZE, patch_size=8, embed_dim=96, depth=2, num_heads=3)
    with torch.no_grad():  # as trained: no tensor keeps its first value
        for parameter in vit.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_encoder(path, vit, mean=MEAN, std=STD)
    return open_run(path)


@pytest.fixture(scope="module")
def exported(model: SparseJEPAEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in every format."""
    path = tmp_path_factory.mktemp("exported")
    names = {"timm": "timm", "transformers": "transformers", "onnx": "a.onnx", "pt2": "a.pt2"}
    for to, name in {**names, "hub": "hub"}.items():
        write_export(model, to, path / name)
    return path


def write_photo(path: Path, size: tuple[int, int]) -> Path:
    """Write a photo of (width, height) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(load_sample_image("china.jpg")).resize(size, Image.Resampling.BICUBIC)
    image.save(path, quality=92)  # of a JPEG
    return path


def features(model: SparseJEPAEncoder, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixels)["pooled"]


def apart(found: Any, wanted: Any) -> float:
    """Return the difference of features as a share of their length."""
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("name", "size", "near"),
    [
        ("wide.png", (300, 200), FILTER),
        ("high.png", (200, 300), FILTER),
        ("wide.jpg", (300, 200), JPEG),
        ("odd.jpg", (640, 427), SHIFT),  # 95.93 pixels wide at a height of 64
        ("small.png", (60, 40), EXACT),
    ],
)
def test_a_photo_gives_the_same_features_everywhere(
    tmp_path: Path,
    model: SparseJEPAEncoder,
    exported: Path,
    name: str,
    size: tuple[int, int],
    near: float,
) -> None:
    file = write_photo(tmp_path / "data" / "train" / "a" / name, size)
    write_photo(tmp_path / "data" / "test" / "a" / name, size)
    data = sj.load_dataset(str(tmp_path / "data"), "train", img_size=SIZE, upscale=True)
    wanted = sj.embed(model.encoder, data).x
    pixels = model.preprocess(file)
    assert apart(features(model, pixels), wanted) < EXACT

    photo = Image.open(file).convert("RGB")
    own = JPEG if name.endswith("jpg") else EXACT
    for given in (photo, np.array(photo), torch.from_numpy(np.array(photo))[None]):
        assert apart(features(model, model.preprocess(given)), wanted) < own

    theirs: Any = timm.create_model(f"local-dir:{exported / 'timm'}", pretrained=True).eval()
    about = resolve_model_data_config(theirs)
    transform: Any = create_transform(**about)
    squash: Any = create_transform(**{**about, "crop_mode": "squash"})
    with torch.no_grad():
        found, squashed = (theirs(prepare(photo)[None]) for prepare in (transform, squash))
    assert apart(found, wanted) < near and apart(squashed, wanted) > SQUASHED

    processor = AutoImageProcessor.from_pretrained(exported / "transformers")
    found = features(model, processor(photo, return_tensors="pt")["pixel_values"])
    assert apart(found, wanted) < max(near, 1e-3)  # torch's filters round otherwise

    session = onnxruntime.InferenceSession(exported / "a.onnx")
    assert apart(session.run(["pooled"], {"pixels": pixels.numpy()})[0], wanted) < EXACT
    program = torch.export.load(exported / "a.pt2").module()
    assert apart(program(pixels)["pooled"].detach(), wanted) < EXACT


def test_every_format_states_the_rule(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported / "a.onnx")
    told = json.loads(session.get_modelmeta().custom_metadata_map[graphs.ABOUT])
    extra = {graphs.ABOUT: ""}
    torch.export.load(exported / "a.pt2", extra_files=extra)
    hub = json.loads((exported / "hub" / "config.json").read_text())
    for about in (told, json.loads(extra[graphs.ABOUT]), hub):
        assert about["preprocessing"] == RULE
    for name in ("timm", "transformers"):
        assert "cropped around its centre" in (exported / name / "README.md").read_text()


def test_batches_files_and_lists_become_one_batch(tmp_path: Path) -> None:
    file = write_photo(tmp_path / "a.png", (50, 20))
    photo = np.array(Image.open(file))
    one = at_size(file, (16, 16))
    assert one.shape == (1, 16, 16, 3)
    assert torch.equal(
        at_size([str(file), photo, photo[None]], (16, 16)), one.expand(3, -1, -1, -1)
    )
    turned = Image.open(file).rotate(90, expand=True)
    turned.getexif()[0x0112] = 6  # as a camera that was held upright writes it
    assert torch.equal(at_size(turned, (16, 16)), one)
    ready = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    assert at_size(ready, (16, 16)) is ready


@pytest.mark.parametrize(
    ("images", "line"),
    [
        ([], "images of type list: give uint8"),
        (None, "images of type NoneType: give uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), "nothing to see"),
        (np.zeros((8, 8, 4), np.uint8), r"images of torch.uint8 \[8, 8, 4\]: give uint8"),
        ("gone.jpg", r"gone.jpg: cannot be read \(No such file"),
        (Image.new("F", (8, 8)), "a PIL image of mode F: floating-point pixels"),
    ],
)
def test_what_is_no_image_is_named(images: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        at_size(images, (16, 16))


def test_of_other_shapes_transformers_can_only_squash_and_it_is_said(tmp_path: Path) -> None:
    module = open_run(write_run(tmp_path / "run", shape="wide"))
    found = write_export(module, "transformers", tmp_path / "out")
    assert "it squashes images to 16 x 24 pixels: crop them" in found.left_out
    assert found.left_out in (tmp_path / "out" / "README.md").read_text()
    again = load(tmp_path / "out")
    assert again.img_size == (16, 24)
