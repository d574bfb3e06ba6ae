"""Shares of the labels, images held out, and fine-tuning in `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from sparsejepa.data.store import ImageSet, Target
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.errors import UserError
from sparsejepa.evaluation import probe as module
from sparsejepa.evaluation.classifiers import KNNProbe, LogisticProbe, RidgeProbe
from sparsejepa.evaluation.features import embed
from sparsejepa.evaluation.finetune import FineTune, Recipe
from sparsejepa.evaluation.probe import (
    check_protocols,
    evaluate,
    labelled_share,
    load_splits,
    split_protocol,
)
from sparsejepa.model.encoder import ViT

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)


def colours(split: str, count: int, seed: int, name: str = "colours") -> ImageSet:
    """Noise with a colour cast; twice as many reds as greens or blues, and labels of chance."""
    rng = np.random.default_rng(seed)
    hue = rng.permutation(np.arange(count) % 4 % 3)
    images = rng.integers(0, 128, (count, 8, 8, 3))
    images[np.arange(count), :, :, hue] += 100
    targets = {
        "hue": Target(hue, ("red", "green", "blue")),
        "noise": Target(rng.integers(0, 2, count), ("x", "y")),
    }
    about = f"{name}{split}{count}"
    return ImageSet(name, split, images.astype(np.uint8), targets, MEAN, STD, fingerprint=about)


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Built-in test data; the list says which splits were loaded."""
    calls: list[str] = []

    def load_dataset(name: str, split: str, **settings: Any) -> ImageSet:
        calls.append(split)
        return colours(split, 240 if split == "train" else 100, split == "test", name)

    monkeypatch.setattr(module, "load_dataset", load_dataset)
    return calls


@pytest.fixture
def short(monkeypatch) -> None:
    """Fine-tuning of a few steps."""
    monkeypatch.setattr(module, "FineTune", QuickTune)


class QuickTune(FineTune):
    def __init__(self, encoder: Encoder, *, random_state: int = 0) -> None:
        recipe = Recipe(passes=1, least_steps=12)
        super().__init__(encoder, random_state=random_state, recipe=recipe)


def make_encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(ViT(8, 4, embed_dim=12, depth=2, num_heads=3), name="a", mean=MEAN, std=STD)


# The grammar


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("logistic", ("logistic", 1.0)),
        ("logistic:1%", ("logistic", 0.01)),
        ("knn:12.5%", ("knn", 0.125)),
        ("finetune:100%", ("finetune", 1.0)),
    ],
)
def test_a_protocol_is_a_name_and_maybe_a_share(text: str, wanted: tuple[str, float]) -> None:
    assert split_protocol(text) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("logistics", "did you mean 'logistic'"),
        ("logistics:1%", "did you mean 'logistic'"),
        ("logistic:", "written logistic:10%"),
        ("logistic:1", "written logistic:10%"),
        ("ridge:0%", "above 0 and at most 100"),
        ("ridge:101%", "above 0 and at most 100"),
        ("knn:-1%", "above 0"),
        ("knn:nan%", "above 0"),
        ("knn:1%:2%", "above 0"),
    ],
)
def test_other_protocols_are_one_clear_line(text: str, words: str) -> None:
    with pytest.raises(UserError, match=f"--protocol {text}: .*{words}") as caught:
        check_protocols(["knn", text])
    assert "\n" not in str(caught.value)


# Shares


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


def test_less_than_one_image_per_class_is_one_of_each() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 50))
    one = labelled_share(labels, 0.01, 0)
    np.testing.assert_array_equal(np.sort(labels[one]), np.arange(100))
    ten = labelled_share(labels, 0.1, 0)
    assert len(ten) == 500 and set(one) <= set(ten)
    counts = np.bincount(labels[ten])
    assert counts.min() >= 4 and counts.max() <= 6
    assert list(one) == list(labelled_share(labels, 0.01, 0))
    assert list(one) != list(labelled_share(labels, 0.01, 1))


def test_a_share_of_the_labels_is_a_probe_on_those_images(loaded: list[str]) -> None:
    encoder = make_encoder()
    names = ("logistic:20%", "ridge:20%", "knn:20%", "logistic:2%", "logistic")
    rows = evaluate(encoder, "colours", protocols=names, targets=["hue"], limit=200)
    train, test = colours("train", 240, 0).subset(200), colours("test", 100, 1)
    y, wanted = train.targets["hue"].values, test.targets["hue"].values
    part = labelled_share(y, 0.2, 0)
    for source, floor in ((encoder, False), (encoder.untrained(0), True)):
        x, new = embed(source, train).x, embed(source, test).x
        probes = (LogisticProbe(), RidgeProbe(), KNNProbe())
        for row, probe in zip(rows, probes, strict=False):
            accuracy = probe.fit(x[part], y[part]).score(new, wanted)
            assert (row.untrained if floor else row.accuracy) == accuracy
            assert row.n_train == len(part) == 40
    few, whole = rows[3], rows[4]
    assert (few.n_train, whole.n_train) == (len(labelled_share(y, 0.02, 0)), 200)
    assert few.protocol == "logistic:2%" and few.pixels is not None


def test_one_label_per_class_is_fitted_at_the_stated_c(loaded: list[str]) -> None:
    encoder = make_encoder()
    (row,) = evaluate(encoder, "colours", protocols=["logistic:1%"], targets=["hue"], floors=False)
    assert row.n_train == 3 and row.settings["C"] == pytest.approx(1 / 3)
    train, test = colours("train", 240, 0), colours("test", 100, 1)
    y = train.targets["hue"].values
    part = labelled_share(y, 0.01, 0)
    x = embed(encoder, train).x[part].astype(float)
    z = (embed(encoder, test).x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=1 / 3, tol=1e-8).fit((x - x.mean(0)) / x.std(0), y[part])
    assert row.accuracy == pytest.approx(theirs.score(z, test.targets["hue"].values), abs=0.02)


# Images held out


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

    rest, aside = colours("train", 240, 0).split_off(60)
    x, new = embed(make_encoder(), rest).x, embed(make_encoder(), aside).x
    probe = LogisticProbe().fit(x, rest.targets["hue"].values)
    assert held.accuracy == probe.score(new, aside.targets["hue"].values)


def test_splits_do_not_share_an_image(loaded: list[str]) -> None:
    rest, aside = load_splits("colours", 50)
    everything = {image.tobytes() for image in colours("train", 240, 0).images}
    fitted, scored = ({image.tobytes() for image in part.images} for part in (rest, aside))
    assert not fitted & scored and fitted | scored == everything
    assert rest.fingerprint != aside.fingerprint
    # A limit takes from what is left, so it never brings an image back.
    assert not {i.tobytes() for i in rest.subset(100).images} & scored


# Fine-tuning as a protocol


def test_finetune_rows_have_an_untrained_floor_and_no_pixels(
    loaded: list[str], short: None
) -> None:
    encoder = make_encoder()
    before = encoder.fingerprint()
    rows = evaluate(encoder, "colours", protocols=["finetune", "finetune:25%"], targets=["hue"])
    train, test = colours("train", 240, 0), colours("test", 100, 1)
    y, wanted = train.targets["hue"].values, test.targets["hue"].values
    assert encoder.fingerprint() == before
    for row, share in zip(rows, (1.0, 0.25), strict=True):
        part = labelled_share(y, share, 0)
        assert row.n_train == len(part)
        assert row.pixels is None and row.pixels_interval is None
        tuned, fresh = (
            QuickTune(e).fit(train, y[part], part) for e in (encoder, encoder.untrained(0))
        )
        assert row.accuracy == tuned.score(test, wanted)
        assert row.untrained == fresh.score(test, wanted)
        assert row.settings["steps"] == 12


def test_finetune_beside_probes_changes_neither(loaded: list[str], short: None) -> None:
    settings: dict[str, Any] = {"targets": ["hue"], "floors": False}
    both = evaluate(make_encoder(), "colours", protocols=["finetune", "knn"], **settings)
    alone = [
        evaluate(make_encoder(), "colours", protocols=[name], **settings)[0]
        for name in ("finetune", "knn")
    ]
    assert [row.accuracy for row in both] == [row.accuracy for row in alone]
