"""What is said to be a scikit-learn estimator is one: its own checks, pipelines and searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sparsejepa.encoders.encoder import load_activations
from sparsejepa.errors import UserError
from sparsejepa.evaluation import posthoc
from sparsejepa.evaluation.posthoc import PostHocGroups
from sparsejepa.evaluation.probe import KNNProbe, LogisticProbe, RidgeProbe


@parametrize_with_checks([LogisticProbe(), LogisticProbe(C=1.0), RidgeProbe(), KNNProbe()])
def test_probes_pass_scikit_learns_checks(estimator, check) -> None:
    check(estimator)


class Rows(PostHocGroups):
    """`PostHocGroups` on any table: a row, in weights of their own, is the token of each patch.

    The checks bring tables of 1 to 20 columns and could not be cut into patches otherwise.
    """

    def _patches(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, None] * np.linspace(1, 2, 16)[:, None]


@parametrize_with_checks([Rows(num_groups=1, lam=0, steps=2)])
def test_groups_pass_scikit_learns_checks(estimator, check, monkeypatch) -> None:
    # The checks bring as few as five rows, fewer than groups are fitted to in earnest.
    monkeypatch.setattr(posthoc, "LEAST_IMAGES", 2)
    check(estimator)


def tokens(n: int, seed: int = 0) -> np.ndarray:
    """Tokens of 3x4 patches and 8 latents with a common part per image."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 1, 2)) @ np.random.default_rng(9).normal(size=(2, 8))
    return (common + 0.3 * rng.normal(size=(n, 12, 8))).astype(np.float32)


def test_searches_choose_what_is_told_and_leave_a_probe_that_predicts() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 6)).astype(np.float32), np.arange(120) % 3
    x[np.arange(120), y] += 4
    for probe, grid in (
        (LogisticProbe(), {"probe__C": [1e-3, 1.0]}),
        (RidgeProbe(), {"probe__alpha": [0.1, 10.0]}),
        (KNNProbe(), {"probe__k": [1, 5]}),
    ):
        model = Pipeline([("scale", StandardScaler()), ("probe", probe)])
        search = GridSearchCV(model, grid, cv=3).fit(x, np.array(["a", "b", "c"])[y])
        assert search.best_score_ > 0.8 and set(search.predict(x[:9])) <= {"a", "b", "c"}
        twin: Any = clone(probe.set_params(device="cpu"))
        assert type(twin) is type(probe) and twin.get_params() == probe.get_params()
        assert not hasattr(twin, "classes_")


def test_two_classes_have_one_score_and_more_have_one_each() -> None:
    x = np.random.default_rng(0).normal(size=(60, 4))
    y = (x[:, 0] > 0).astype(int)
    probe = LogisticProbe(1.0).fit(x, y)
    odds = np.log(probe.predict_proba(x)[:, 1] / probe.predict_proba(x)[:, 0])
    np.testing.assert_allclose(probe.decision_function(x), odds, rtol=1e-6)
    np.testing.assert_allclose(np.exp(probe.predict_log_proba(x)), probe.predict_proba(x))
    assert LogisticProbe(1.0).fit(x, np.arange(60) % 3).decision_function(x).shape == (60, 3)
    weights = np.arange(60)
    hits = probe.predict(x) == y
    assert probe.score(x, y, weights) == np.average(hits, weights=weights)


def test_a_table_of_patches_side_by_side_is_the_same_fit() -> None:
    train, test = tokens(40), tokens(20, 1)
    made: dict[str, Any] = {"num_groups": 4, "steps": 3, "grid_size": (3, 4)}
    whole, table = PostHocGroups(**made).fit(train), PostHocGroups(**made)
    table.fit(train.reshape(40, -1))
    np.testing.assert_array_equal(table.W_, whole.W_)
    assert (whole.n_features_in_, table.n_features_in_) == (8, 96)
    found = table.transform(test.reshape(20, -1))
    assert found.shape == (20, 48)
    np.testing.assert_array_equal(found.reshape(20, 12, 4), whole.transform(test))
    np.testing.assert_array_equal(table.transform(test), whole.transform(test))
    assert list(table.get_feature_names_out()) == [
        f"patch{p}_group{g}" for p in range(12) for g in range(4)
    ]
    for grid in (None, (5, 5)):
        with pytest.raises(ValueError, match=r"a table .* needs grid_size"):
            PostHocGroups(4, grid_size=grid).fit(train.reshape(40, -1))
    with pytest.raises(ValueError, match="95 features, but PostHocGroups is expecting 96"):
        table.transform(test.reshape(20, -1)[:, 1:])
    search = GridSearchCV(PostHocGroups(**made), {"num_groups": [2, 4]}, cv=2).fit(train)
    assert search.best_params_["num_groups"] in (2, 4)


@pytest.mark.parametrize("kind", ["region", "concept", "feature"])
def test_saved_groups_are_the_same_again(kind: Any, tmp_path: Path) -> None:
    train, test = tokens(40), tokens(20, 1)
    train[..., 3] = test[..., 3] = 0.25  # a constant latent
    count: Any = np.int64(4)  # as a search over np.arange sets it
    fit = PostHocGroups(count, kind=kind, steps=3, grid_size=(3, 4), density=0.75).fit(train)
    fit.save(tmp_path / "made")
    again = PostHocGroups.load(tmp_path / "made")
    assert again.get_params() == fit.get_params() and again.density_ == fit.density_
    np.testing.assert_array_equal(again.transform(test), fit.transform(test))
    assert again.score(test) == fit.score(test)
    # The exported activations: per patch those of transform; region groups read the mean token.
    exported = load_activations(tmp_path / "made", (3, 4))
    assert exported is not None
    pooled, patches = exported(torch.from_numpy(test))
    if patches is None:
        pooled_train = exported(torch.from_numpy(train))[0]
        assert kind == "region" and pooled.shape == (20, 4)
        alive = fit.block_norms_.any(1)
        np.testing.assert_allclose(pooled_train.square().mean(0).sqrt(), alive, rtol=1e-4)
    else:
        np.testing.assert_allclose(patches, fit.transform(test), rtol=1e-4, atol=1e-5)


def test_damaged_fits_are_named(tmp_path: Path) -> None:
    fit = PostHocGroups(4, steps=2, grid_size=(3, 4)).fit(tokens(20))
    PostHocGroups(2, steps=2, grid_size=(3, 4)).fit(tokens(20)).save(tmp_path / "other")

    def about(**changes: Any) -> str:
        return json.dumps({**json.loads((tmp_path / "posthoc.json").read_text()), **changes})

    with pytest.raises(UserError, match=r"posthoc\.json: no such file"):
        PostHocGroups.load(tmp_path)
    for damage in (
        lambda: "{",
        lambda: "[]",
        lambda: about(grid_size=[10**6, 10**6]),
        lambda: about(params={"num_groups": 4, "nonsense": 1}),
        lambda: about(params={"num_groups": 3}),
        lambda: about(params={"num_groups": 4, "context": [0.9, 0.95]}),
        lambda: (tmp_path / "other" / "posthoc.json").read_text(),
    ):
        fit.save(tmp_path)
        (tmp_path / "posthoc.json").write_text(damage())
        with pytest.raises(UserError, match=r"posthoc\.json: damaged") as raised:
            PostHocGroups.load(tmp_path)
        assert "\n" not in str(raised.value)
    fit.save(tmp_path)
    (tmp_path / "other" / "groups.safetensors").replace(tmp_path / "groups.safetensors")
    with pytest.raises(UserError, match=r"groups\.safetensors is missing or that of another fit"):
        PostHocGroups.load(tmp_path)
