"""`evaluate`: floors beside every number, protocols, shares of the labels, images held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from sparsejepa.data.images import ImageSet, Target
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.errors import UserError
from sparsejepa.evaluation import probe as module
from sparsejepa.evaluation.classifiers import KNNProbe, LogisticProbe
from sparsejepa.evaluation.features import embed
from sparsejepa.evaluation.probe import check_protocols, evaluate, labelled_share, split_protocol
from sparsejepa.evaluation.stats import wilson_interval
from sparsejepa.model.vit import ViT

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


def colour_set(split: str, count: int, seed: int, name: str = "colours") -> ImageSet:
    """Noise with a colour cast (easy), a target of pure chance, and one that is constant."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 128, (count, 8, 8, 3))
    hue = rng.permutation(np.r_[np.arange(count // 2) * 0, np.arange(count - count // 2) % 2 + 1])
    images[np.arange(count), :, :, hue] += 100
    targets = {
        "hue": Target(hue, ("red", "green", "blue")),
        "noise": Target(rng.integers(0, 2, count), ("x", "y")),
        "same": Target(np.zeros(count, np.int64), ("only",)),
    }
    about = f"{name}{split}{count}"
    return ImageSet(name, split, images.astype(np.uint8), targets, MEAN, STD, fingerprint=about)


def make_encoder(seed: int = 0, name: str = "a", width: int = 12) -> Encoder:
    torch.manual_seed(seed)
    vit = ViT(8, 4, embed_dim=width, depth=2, num_heads=3)
    return Encoder(vit, name=name, mean=MEAN, std=STD)


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """Built-in test data; the list collects what was embedded."""
    calls: list[str] = []

    def load_dataset(name: str, split: str, **settings: Any) -> ImageSet:
        if name == "bare":
            bare = colour_set(split, 10, 0, name)
            return ImageSet(name, split, bare.images, {}, bare.mean, bare.std)
        return colour_set(split, 240 if split == "train" else 100, split == "test", name)

    def counted(encoder: Encoder, images: ImageSet, **settings):
        calls.append(f"{encoder.name}/{images.split}")
        return real(encoder, images, **settings)

    def pixels(images: ImageSet):
        calls.append(f"pixels/{images.split}")
        return real_pixels(images)

    real, real_pixels = module.embed, module.pixel_features
    monkeypatch.setattr(module, "load_dataset", load_dataset)
    monkeypatch.setattr(module, "embed", counted)
    monkeypatch.setattr(module, "pixel_features", pixels)
    return calls


def test_evaluate_puts_both_floors_beside_every_number(embedded: list[str]) -> None:
    encoders = [make_encoder(0, "a"), make_encoder(1, "b"), make_encoder(0, "wide", width=24)]
    rows = evaluate(encoders, ["colours"], protocols=("logistic", "knn"))
    assert [(r.encoder, r.target, r.protocol) for r in rows] == [
        (e, t, p)
        for e in ("a", "b", "wide")
        for t in ("hue", "noise")  # the constant target is no task
        for p in ("logistic", "knn")
    ]
    # One untrained floor per architecture, one pixel floor in all.
    assert embedded == [
        f"{name}/{split}"
        for name in ("pixels", "a", "a (untrained)", "b", "wide", "wide (untrained)")
        for split in ("train", "test")
    ]
    by = {(r.encoder, r.target, r.protocol): r for r in rows}
    test = colour_set("test", 100, 1)
    for row in rows:
        assert row.data == "colours" and (row.n_train, row.n_test) == (240, 100)
        counts = np.bincount(test.targets[row.target].values)
        assert row.chance == counts.max() / 100
        assert row.interval == wilson_interval(row.accuracy, 100)
        assert row.pixels_interval == wilson_interval(row.pixels, 100)  # type: ignore[arg-type]
        assert row.untrained_interval == wilson_interval(row.untrained, 100)  # type: ignore[arg-type]
        other = by["b", row.target, row.protocol]
        assert row.pixels == other.pixels
        if row.encoder != "wide":
            assert row.untrained == other.untrained
        json.dumps(row.to_dict(), allow_nan=False)
    hue = by["a", "hue", "logistic"]
    assert hue.accuracy > 0.95 and hue.pixels is not None and hue.pixels > 0.9
    assert hue.settings["C"] > 0 and hue.settings["pool"] == "mean"
    noise = by["a", "noise", "logistic"]
    assert abs(noise.accuracy - 0.5) < 0.2


def test_an_untrained_row_equals_probing_the_untrained_encoder(embedded: list[str]) -> None:
    encoder = make_encoder(5)
    (row,) = evaluate(encoder, "colours", targets=["hue"], seed=3)
    (fresh,) = evaluate(encoder.untrained(3), "colours", targets=["hue"], seed=3, floors=False)
    assert fresh.accuracy == row.untrained
    assert fresh.untrained is None and fresh.pixels_interval is None


def test_kept_floors_are_used_again_for_equal_settings_only(
    embedded: list[str], tmp_path: Path
) -> None:
    def again(**settings) -> list[str]:
        embedded.clear()
        rows = evaluate(make_encoder(), "colours", targets=["hue"], cache_dir=tmp_path, **settings)
        found.append((rows[0].untrained, rows[0].pixels))
        return [call for call in embedded if call.endswith("train")]

    found: list[tuple] = []
    everything = ["pixels/train", "a/train", "a (untrained)/train"]
    assert again() == everything
    assert again() == ["a/train"]
    assert found[0] == found[1]
    assert again(seed=1) == everything
    assert again(limit=100) == everything
    for file in tmp_path.iterdir():
        file.write_text("[[")
    with pytest.raises(UserError, match=r"\.json: damaged"):
        again()


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"data": "bare"}, r"bare: has no labels; add class folders or a factors\.csv"),
        ({"protocols": ["logistics"]}, "--protocol logistics.*did you mean 'logistic'"),
        ({"targets": ["hues"]}, "no target 'hues'.*did you mean 'hue'"),
        ({"targets": ["same"]}, "colours, target 'same': the labels name one class only"),
        ({"refs": "nowhere"}, "nowhere: no such run directory"),
    ],
)
def test_bad_requests(embedded: list[str], settings_: dict, words: str) -> None:
    request = {"refs": make_encoder(), "data": "colours", **settings_}
    with pytest.raises(UserError, match=words):
        evaluate(**request)


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Built-in test data; the list says which splits were loaded."""
    calls: list[str] = []

    def load_dataset(name: str, split: str, **settings: Any) -> ImageSet:
        calls.append(split)
        return colour_set(split, 240 if split == "train" else 100, split == "test", name)

    monkeypatch.setattr(module, "load_dataset", load_dataset)
    return calls


def test_a_protocol_is_a_name_and_maybe_a_share() -> None:
    assert split_protocol("logistic") == ("logistic", 1.0)
    assert split_protocol("knn:12.5%") == ("knn", 0.125)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("logistics", "did you mean 'logistic'"),
        ("logistic:1", "written logistic:10%"),
        ("knn:0%", "above 0 and at most 100"),
        ("knn:101%", "above 0 and at most 100"),
        ("knn:nan%", "above 0"),
        ("knn:1%:2%", "above 0"),
    ],
)
def test_other_protocols_are_one_clear_line(text: str, words: str) -> None:
    with pytest.raises(UserError, match=f"--protocol {text}: .*{words}") as caught:
        check_protocols(["knn", text])
    assert "\n" not in str(caught.value)


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    shares=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    seed=st.integers(0, 9),
)
def test_a_share_is_stratified_and_nested(
    counts: list[int], shares: tuple[float, float], seed: int
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    small, large = (labelled_share(labels, share, seed) for share in sorted(shares))
    assert set(small) <= set(large)
    for rows, share in ((small, min(shares)), (large, max(shares))):
        assert (np.diff(rows) > 0).all()
        taken = np.bincount(labels[rows], minlength=len(counts))
        assert (taken >= 1).all()
        wanted = round(share * len(labels))
        assert wanted <= len(rows) <= wanted + len(counts)
        # The share that was reached, with rounding over all classes, is every class's own.
        off = taken - share * np.array(counts)
        assert (abs(off) < 2 + 0.5 * np.array(counts) / len(labels)).all()
    np.testing.assert_array_equal(labelled_share(labels, shares[0], seed)[:0], [])
    assert len(labelled_share(labels, 1.0, seed)) == len(labels)


def test_a_share_of_the_labels_is_a_probe_on_those_images(loaded: list[str]) -> None:
    encoder = make_encoder()
    names = ("logistic:20%", "knn:20%", "logistic:2%", "logistic")
    rows = evaluate(encoder, "colours", protocols=names, targets=["hue"], limit=200)
    train, test = colour_set("train", 240, 0).subset(200), colour_set("test", 100, 1)
    y, wanted = train.targets["hue"].values, test.targets["hue"].values
    part = labelled_share(y, 0.2, 0)
    for source, floor in ((encoder, False), (encoder.untrained(0), True)):
        x, new = embed(source, train).x, embed(source, test).x
        probes = (LogisticProbe(), KNNProbe())
        for row, probe in zip(rows, probes, strict=False):
            accuracy = probe.fit(x[part], y[part]).score(new, wanted)
            assert (row.untrained if floor else row.accuracy) == accuracy
            assert row.n_train == len(part) == 40
    few, whole = rows[2:4]
    assert (few.n_train, whole.n_train) == (len(labelled_share(y, 0.02, 0)), 200)
    assert few.protocol == "logistic:2%" and few.pixels is not None


def test_one_label_per_class_is_fitted_at_the_stated_c(loaded: list[str]) -> None:
    encoder = make_encoder()
    (row,) = evaluate(encoder, "colours", protocols=["logistic:1%"], targets=["hue"], floors=False)
    assert row.n_train == 3 and row.settings["C"] == pytest.approx(1 / 3)
    train, test = colour_set("train", 240, 0), colour_set("test", 100, 1)
    y = train.targets["hue"].values
    part = labelled_share(y, 0.01, 0)
    x = embed(encoder, train).x[part].astype(float)
    z = (embed(encoder, test).x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=1 / 3, tol=1e-8).fit((x - x.mean(0)) / x.std(0), y[part])
    assert row.accuracy == pytest.approx(theirs.score(z, test.targets["hue"].values), abs=0.02)


def test_held_out_images_are_scored_on_and_test_is_never_loaded(
    loaded: list[str], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"targets": ["hue"], "cache_dir": tmp_path}
    (held,) = evaluate(make_encoder(), "colours", holdout=60, **settings)
    assert loaded == ["train"]
    assert (held.n_train, held.n_test) == (180, 60)
    assert held.settings["scored_on"] == "holdout"
    floors = set(tmp_path.iterdir())
    (plain,) = evaluate(make_encoder(), "colours", **settings)
    assert plain.settings["scored_on"] == "test" and loaded == ["train", "train", "test"]
    assert len(set(tmp_path.iterdir()) - floors) == len(floors) == 2  # kept apart

    rest, aside = colour_set("train", 240, 0).split_off(60)
    x, new = embed(make_encoder(), rest).x, embed(make_encoder(), aside).x
    probe = LogisticProbe().fit(x, rest.targets["hue"].values)
    assert held.accuracy == probe.score(new, aside.targets["hue"].values)
