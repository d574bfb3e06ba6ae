"""A frozen encoder in scikit-learn pipelines: images of any form in, the right features out."""

from __future__ import annotations

import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

import sparsejepa
from sparsejepa.errors import UserError
from sparsejepa.evaluation.pipeline import SparseJEPAFeatures
from sparsejepa.evaluation.posthoc import PostHocGroups
from sparsejepa.evaluation.probe import KNNProbe, LogisticProbe, RidgeProbe
from sparsejepa.interop import Encoder
from sparsejepa.interop.module import GroupActivations, SparseJEPAEncoder
from sparsejepa.model.groups import GroupMap

MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)


def made(count: int = 24, side: int = 16) -> np.ndarray:
    """Noisy images of two classes, red and blue in turn."""
    images = np.random.default_rng(0).integers(0, 100, (count, side, side, 3))
    images[::2, ..., 0] += 120
    images[1::2, ..., 2] += 120
    return images.astype(np.uint8)


LABELS = np.arange(24) % 2


def test_every_output_is_the_encoders_own(run: Path, encoder: Encoder) -> None:
    images = made()
    tokens = encoder.tokens(torch.from_numpy(images))
    layers = [x.mean(1) for x in encoder.layers(torch.from_numpy(images), 4)]
    activations = GroupActivations.from_map(_groups(run), torch.arange(6) + 0.5)(tokens)[0].detach()
    for output, wanted in {
        "pooled": tokens.mean(1),
        "concat4": torch.cat(layers, 1),
        "groups": activations,
        "tokens": tokens,
    }.items():
        step = SparseJEPAFeatures(run, output, batch_size=7)  # type: ignore[arg-type]
        found = step.fit_transform(images)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert found.dtype == np.float32
        if output != "tokens":
            assert len(step.get_feature_names_out()) == found.shape[1]


def _groups(run: Path) -> GroupMap:
    groups = sparsejepa.interop.load_groups(run, (4, 4))
    assert groups is not None
    return groups


def test_arrays_files_and_pictures_are_the_same_images(encoder: Encoder, tmp_path: Path) -> None:
    images, step = made(), SparseJEPAFeatures(encoder, batch_size=5)
    pictures = [Image.fromarray(image) for image in images]
    files = [tmp_path / f"{i}.png" for i in range(len(images))]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    wanted = step.transform(images)
    for given in (torch.from_numpy(images), files, [str(f) for f in files], pictures):
        np.testing.assert_allclose(step.transform(given), wanted, atol=1e-5)
    np.testing.assert_allclose(step.transform(np.array([str(f) for f in files])), wanted, atol=1e-5)
    column = np.array([[str(f)] for f in files])
    for given in (column, list(images), [torch.from_numpy(i) for i in images]):
        np.testing.assert_allclose(step.transform(given), wanted, atol=1e-5)
    # Arrays of several sizes are resized whole, each as it would be by itself.
    wide = np.repeat(images[:2], 2, axis=2)
    found = step.transform([images[0], *wide, files[1]])
    np.testing.assert_allclose(found[1:3], step.transform(wide), atol=1e-5)
    np.testing.assert_allclose(found[[0, 3]], wanted[:2], atol=1e-5)
    # Other sizes and modes are brought to the encoder's: grey, transparent, upright by EXIF.
    grey = Image.fromarray(images[0, ..., 0]).resize((40, 30))
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    found = step.transform([grey, clear, Image.new("RGB", (16, 16), "white")])
    assert found.shape == (3, 24)
    np.testing.assert_allclose(found[1], found[2], atol=1e-5)


def test_the_module_for_inference_is_taken_with_its_groups(run: Path, encoder: Encoder) -> None:
    module = SparseJEPAEncoder(encoder, _groups(run), torch.arange(6) + 0.5)
    for output in ("pooled", "groups"):
        step = SparseJEPAFeatures(module, output)
        found, named = step.transform(made()), SparseJEPAFeatures(run, output)
        np.testing.assert_allclose(found, named.transform(made()), atol=1e-5)
        twin: Any = clone(step)
        assert twin.encoder is module
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(step)).transform(made()), found)


def test_parameters_are_called_as_scikit_learns(encoder: Encoder) -> None:
    for kind in (SparseJEPAFeatures, PostHocGroups, RidgeProbe, KNNProbe, LogisticProbe):
        for name in ("fit", "transform", "score", "decision_function", "predict_proba"):
            if hasattr(kind, name):
                assert list(inspect.signature(getattr(kind, name)).parameters)[1] == "X"
    assert SparseJEPAFeatures(encoder).fit_transform(X=made(2)).shape == (2, 24)


def test_pipelines_and_searches(encoder: Encoder) -> None:
    images = made()
    model = make_pipeline(SparseJEPAFeatures(encoder), RidgeProbe())
    assert model.fit(images, LABELS).score(images, LABELS) == 1
    assert cross_val_score(model, images, LABELS, cv=3).mean() == 1
    grid = {"sparsejepafeatures__output": ["pooled", "concat4"], "knnprobe__k": [1, 3]}
    search = GridSearchCV(make_pipeline(SparseJEPAFeatures(encoder), KNNProbe()), grid, cv=3)
    assert search.fit(images, LABELS).best_score_ == 1
    # Groups fitted to the tokens on the way.
    groups = PostHocGroups(4, steps=2)
    activations = make_pipeline(SparseJEPAFeatures(encoder, "tokens"), groups).fit_transform(images)
    assert activations.shape == (24, 16, 4)


def test_clones_and_pickles_do_not_copy_the_weights(run: Path, encoder: Encoder) -> None:
    images = made(4)
    given, named = SparseJEPAFeatures(encoder), SparseJEPAFeatures(str(run), "groups")
    wanted = [step.fit(images).transform(images) for step in (given, named)]
    twin: Any = clone(given)
    assert twin is not given and twin.encoder is encoder
    other: Any = clone(named)
    assert other.set_params(output="pooled").output == "pooled" and named.output == "groups"
    weights = sum(p.numel() * p.element_size() for p in encoder.model.parameters())
    one, reference = pickle.dumps(given), pickle.dumps(named)
    assert weights < len(one) < 1.5 * weights and len(reference) < 2000
    for pickled, x in zip((one, reference), wanted, strict=True):
        np.testing.assert_array_equal(pickle.loads(pickled).transform(images), x)


def test_columns_have_names(run: Path) -> None:
    pandas = pytest.importorskip("pandas")
    step = SparseJEPAFeatures(run, "groups").set_output(transform="pandas")
    twin: Any = clone(step)
    step.set_output(transform="default")
    table = twin.fit_transform(made(3))
    assert isinstance(table, pandas.DataFrame) and list(table) == [f"group{g}" for g in range(6)]
    assert isinstance(step.transform(made(3)), np.ndarray)


def test_files_may_be_a_tables_column(encoder: Encoder, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    for image, file in zip(made(4), files, strict=True):
        Image.fromarray(image).save(file)
    step, table = SparseJEPAFeatures(encoder), pandas.DataFrame({"file": files, "class": "red"})
    for given in (table[["file"]], table["file"], table["file"].iloc[::-1].iloc[::-1]):
        np.testing.assert_allclose(step.transform(given), step.transform(made(4)), atol=1e-5)
    with pytest.raises(UserError, match=r"images of object \[4, 2\]: give uint8"):
        step.transform(table)


def test_mistakes_are_one_line(run: Path, encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG no more")
    whole = io.BytesIO()
    Image.fromarray(made(1, 64)[0]).save(whole, "PNG")
    torn = Image.open(io.BytesIO(whole.getvalue()[:4000]))
    bare = Encoder(encoder.model, name="bare", mean=MEAN, std=STD)
    for arguments, images, words in [
        ({"output": "pooling"}, made(2), "did you mean 'pooled'"),
        ({"batch_size": 0}, made(2), "batch_size 0"),
        ({}, [], "list of files"),
        ({}, "photo.png", "list of files"),
        ({}, made(2)[0], r"uint8 \[n, H, W, 3\]"),
        ({}, made(2) / 255, "float64"),
        ({}, [3.5], "images of type float: give uint8"),
        ({}, [Image.new("F", (16, 16))], "mode F"),
        ({}, [torn], "a PIL image of mode RGB: image file is truncated; leave it out"),
        ({}, Image.new("RGB", (16, 16)), "list of files"),
        ({}, np.array([["x.png", "y.png"]], object), r"images of object \[1, 2\]: give uint8"),
        ({}, list(made(2) / 255), r"float64 \[16, 16, 3\]: give uint8 \[H, W, 3\]"),
        ({}, [tmp_path / "torn.png"], r"torn\.png: cannot be read"),
        ({}, [tmp_path / "none.png"], r"none\.png: cannot be read"),
        ({"encoder": bare, "output": "groups"}, made(2), "bare: has no groups of its own"),
        ({"output": "groups", "groups": tmp_path}, made(2), r"no groups\.safetensors there"),
        ({"encoder": tmp_path}, made(2), "not a run directory"),
    ]:
        with pytest.raises(UserError, match=words) as raised:
            SparseJEPAFeatures(**{"encoder": run, **arguments}).fit(images).transform(images)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="no columns"):
        SparseJEPAFeatures(run, "tokens").get_feature_names_out()
    broken = sparsejepa.load(run)
    with torch.no_grad():
        broken.model.get_parameter("norm.bias")[0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        SparseJEPAFeatures(broken).transform(made(2))
