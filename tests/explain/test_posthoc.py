"""Groups of frozen tokens: planted groups are found, and scores are what their formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV

from sparsejepa.encoders.encoder import load_activations
from sparsejepa.errors import UserError
from sparsejepa.explain.posthoc import PostHocGroups

BLOCKS = np.arange(12) // 3


def planted(n: int, seed: int, *, factors: int = 4) -> np.ndarray:
    """Tokens of 4x4 patches and 12 latents: each block of three follows its own image factors."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(factors, 3, 12 // factors))
    common = np.einsum("nfk,fkd->nfd", rng.normal(size=(n, factors, 3)), mix).reshape(n, 1, 12)
    place = np.random.default_rng(98).normal(size=(16, 12))
    tokens = common + 0.3 * rng.normal(size=(n, 16, 12)) + place
    return (tokens * np.logspace(-2, 2, 12) + 7).astype(np.float32)


TRAIN, TEST = planted(400, 0), planted(150, 1)
QUICK: dict[str, Any] = {"num_groups": 4, "steps": 100, "batch_size": 32}


@pytest.fixture(scope="module")
def fitted() -> PostHocGroups:
    return PostHocGroups(kind="feature", density=0.25, **QUICK).fit(TRAIN)


def test_planted_groups_are_found_and_beat_random_patterns(fitted: PostHocGroups):
    # Group g predicts latents 3g to 3g + 2: it needs these and no others.
    np.testing.assert_array_equal(fitted.block_norms_ > 0, np.arange(4)[:, None] == BLOCKS)
    assert fitted.density_ == 0.25
    scores = fitted.random_pattern_scores(TRAIN, TEST, repeats=2)
    assert scores["learned"] == fitted.score(TEST) > 0.7
    assert len(scores["random"]) == 2 and max(scores["random"]) < scores["learned"] - 0.2
    assert scores["unpenalised"] == pytest.approx(scores["learned"], abs=0.1)


def test_attributes_belong_together(fitted: PostHocGroups):
    assert fitted.W_.shape == (4, 3, 12)
    np.testing.assert_allclose(fitted.block_norms_, np.linalg.norm(fitted.W_, axis=1))
    np.testing.assert_allclose(np.square(fitted.block_norms_).sum(0), 1, rtol=1e-5)
    np.testing.assert_allclose(fitted.mean_, TRAIN.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(fitted.scale_, TRAIN.std((0, 1)), rtol=1e-4)
    assert fitted.loss_curve_.shape == (100,)
    assert fitted.loss_curve_[-10:].mean() < 0.4 < 0.9 < fitted.loss_curve_[0]
    assert not fitted.map_.training


def test_activations_are_those_of_w_on_standardised_tokens(fitted: PostHocGroups):
    z = (TEST - fitted.mean_) / fitted.scale_
    norms = np.linalg.norm(np.einsum("gpd,btd->btgp", fitted.W_, z), axis=-1)
    got = fitted.transform(TEST)
    assert got.shape == (150, 16, 4) and got.dtype == np.float32
    np.testing.assert_allclose(got, norms / fitted.rms_, rtol=1e-3)
    np.testing.assert_allclose(np.square(fitted.transform(TRAIN)).mean((0, 1)), 1, rtol=1e-4)
    by_map = fitted.map_.group_activations(torch.as_tensor(TEST)).numpy()
    np.testing.assert_allclose(by_map, norms, rtol=1e-3)


def test_score_is_r2_around_the_mean_token_of_each_place(fitted: PostHocGroups):
    place = TRAIN.mean(0)
    deviation = (TRAIN - place).std((0, 1))
    error = total = 0.0
    parts = torch.arange(150).repeat(14).split(32)
    for index, masks in fitted._batches(torch.as_tensor(TEST), parts, "posthoc-score"):
        for i, seen, hidden in zip(index, masks.context, masks.targets[:, 0], strict=True):
            assert not set(seen.tolist()) & set(hidden.tolist())
            context = torch.as_tensor(TEST[i][seen])[None]
            predicted = fitted.map_(context, seen[None], hidden[None])[0].numpy()
            target = ((TEST[i] - place) / deviation)[hidden]
            error += np.square(predicted - target).sum()
            total += np.square(target).sum()
        if total > 2e4:  # a part tells
            break
    assert fitted.score(TEST) == pytest.approx(1 - error / total, abs=0.03)


def test_a_map_that_predicts_nothing_scores_zero(fitted: PostHocGroups):
    other = PostHocGroups(**QUICK, lam=0).set_params(steps=1).fit(TRAIN)
    with torch.no_grad():
        other.map_.networks.B.zero_()
        other.map_.networks.c.zero_()
    assert other.score(TEST) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="not defined"):
        other._patch_mean = torch.as_tensor(TEST[0])
        other.score(np.repeat(TEST[:1], 4, 0))


def test_the_state_of_global_generators_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    PostHocGroups(4, steps=2).fit(TRAIN[:32])
    assert torch.equal(torch.rand(3), expected)


def test_a_stronger_penalty_leaves_fewer_blocks():
    densities = [PostHocGroups(lam=lam, **QUICK).fit(TRAIN).density_ for lam in (0, 0.01, 1.0)]
    assert densities[0] == 1 > densities[1] > densities[2] == 0.25


def test_constant_latents_and_dead_groups_do_no_harm():
    tokens = TRAIN[:64].copy()
    tokens[..., 5] = 0.1
    found = PostHocGroups(kind="feature", **QUICK).fit(tokens)
    assert found.scale_[5] == 1 and np.isfinite(found.transform(tokens)).all()
    assert np.isfinite(found.score(tokens))
    pattern = torch.zeros(4, 12, dtype=torch.bool)
    pattern[:3] = True
    dead = PostHocGroups(lam=0, **QUICK)._fit(tokens, pattern)
    assert dead.rms_[3] == 0 and (dead.transform(tokens)[..., 3] == 0).all()
    np.testing.assert_array_equal(dead.block_norms_ > 0, pattern.numpy())


def test_grids_that_are_not_square_need_their_size():
    tokens = TRAIN[:64, :12]
    with pytest.raises(ValueError, match="12 patches are no grid of 3x3; give grid_size"):
        PostHocGroups(4).fit(tokens)
    found = PostHocGroups(4, steps=3, grid_size=(3, 4)).fit(torch.as_tensor(tokens).double())
    assert found.transform(tokens).shape == (64, 12, 4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_groups": 13}, "num_groups 13: 12 latents allow 1 to 12"),
        ({"num_groups": 5, "kind": "feature"}, "does not divide"),
        ({"density": 0.2}, "density lie between 1/4 .each latent keeps at least one"),
        ({"lam": -1.0}, "lam must not be negative"),
        ({"steps": 0}, "at least 1"),
        ({"kind": "other"}, "kind 'other' is not one of"),
    ],
)
def test_wrong_arguments_are_named(params: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as raised:
        PostHocGroups(**{"num_groups": 4, **params}).fit(TRAIN[:32])
    assert "\n" not in str(raised.value)


def test_wrong_tokens_are_named(fitted: PostHocGroups):
    bad = TRAIN[:32].copy()
    bad[3, 4, 5] = np.nan
    for tokens, error, message in [
        (bad, UserError, "NaN or infinity"),
        (TRAIN[:8], UserError, "8 images are too few"),
        (np.repeat(TRAIN[:1], 32, 0), UserError, "the same for every image"),
        (TRAIN[:, 0], ValueError, r"must be \[n, N, D\]"),
        (TRAIN[:32, :4], UserError, "2x2 patches are too few"),
    ]:
        with pytest.raises(error, match=message):
            PostHocGroups(4).fit(tokens)
    with pytest.raises(ValueError, match="the fit had"):
        fitted.transform(TRAIN[..., :6])
    with pytest.raises(ValueError, match="call fit first"):
        PostHocGroups().score(TEST)


@pytest.mark.parametrize("kind", ["region", "concept", "feature"])
def test_saved_groups_give_the_same_activations(kind: Any, tmp_path: Path) -> None:
    train, test = TRAIN[:40].copy(), TEST[:20].copy()
    train[..., 3] = test[..., 3] = 0.25  # a constant latent
    fit = PostHocGroups(4, kind=kind, steps=3, density=0.75).fit(train)
    fit.save(tmp_path / "made")
    exported = load_activations(tmp_path / "made", (4, 4))
    assert exported is not None
    pooled, patches = exported(torch.from_numpy(test))
    if patches is None:  # region groups read the mean token
        pooled_train = exported(torch.from_numpy(train))[0]
        assert kind == "region" and pooled.shape == (20, 4)
        alive = fit.block_norms_.any(1)
        np.testing.assert_allclose(pooled_train.square().mean(0).sqrt(), alive, rtol=1e-4)
    else:
        np.testing.assert_allclose(patches, fit.transform(test), rtol=1e-4, atol=1e-5)


def test_a_search_can_set_the_number_of_groups() -> None:
    search = GridSearchCV(PostHocGroups(steps=3), {"num_groups": [2, 4]}, cv=2).fit(TRAIN[:40])
    assert search.best_estimator_.transform(TEST).shape[2] in (2, 4)
