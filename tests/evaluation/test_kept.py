from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sparsejepa.evaluation.classifiers import LogisticProbe
from sparsejepa.evaluation.kept import Labelled, _halving, kept_curve, kept_latents, leading
from sparsejepa.evaluation.linear import Standardized

D, G, P = 12, 5, 2


def parts() -> tuple[Labelled, Labelled]:
    """Four classes in correlated latents of different spread."""
    rng = np.random.default_rng(0)
    centres, mix = rng.normal(size=(4, D)), rng.normal(size=(D, D)) + 2 * np.eye(D)
    found = []
    for n in (400, 300):
        y = rng.integers(0, 4, n)
        x = (centres[y] + rng.normal(size=(n, D))) @ mix * np.logspace(0, 1, D)
        found.append(Labelled(x.astype(np.float32), y))
    return found[0], found[1]


def sparse_map(seed: int = 0, share: float = 0.4) -> Tensor:
    """Every latent feeds one group at least."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(G, P, D, generator=generator)
    keep = torch.rand(G, D, generator=generator) < share
    keep[torch.randint(G, (D,), generator=generator), torch.arange(D)] = True
    return W * keep[:, None]


def plain(train: Labelled, test: Labelled, latents: Any) -> float:
    probe = LogisticProbe().fit(train.x[:, latents], train.y)
    return probe.score(test.x[:, latents], test.y)


@given(seed=st.integers(0, 50), share=st.floats(0, 1), groups=st.integers(1, G))
def test_a_latent_stays_while_a_kept_group_reads_it(seed: int, share: float, groups: int) -> None:
    W = sparse_map(seed, share)
    energy = [sum(float(w) ** 2 for w in W[g].flatten()) for g in range(G)]
    best = sorted(range(G), key=lambda g: -energy[g])[:groups]
    read = [j for j in range(D) if any(float(W[g, p, j]) for g in best for p in range(P))]
    latents, part = kept_latents(W, groups)
    assert latents.tolist() == read
    assert len(part) == groups
    assert sorted(float(w.square().sum()) for w in part) == pytest.approx(
        sorted(energy[g] for g in best)
    )


def test_the_curve_starts_at_the_plain_probe_and_counts_what_is_kept() -> None:
    (train, test), W = parts(), sparse_map()
    found = kept_curve(train, test, W)
    assert found["order"] == "groups"
    curve = found["curve"]
    assert [row["groups"] for row in curve] == [5, 3, 2, 1]
    whole = LogisticProbe().fit(train.x, train.y).score(test.x, test.y)
    first = curve[0]
    assert first["latents"] == D
    assert first["accuracy"] == first["random_latents"] == first["pca"] == whole
    for row in curve:
        latents, part = kept_latents(W, row["groups"])
        assert row["latents"] == len(latents)
        assert row["accuracy"] == plain(train, test, latents)
        assert row["feature_bytes"] == 2 * len(latents)
        assert row["map_flops"] == 2 * np.count_nonzero(part.numpy())
    assert kept_curve(train, test, W) == found


def test_random_latents_are_as_many_and_nested() -> None:
    (train, test), W = parts(), sparse_map()
    rows = kept_curve(train, test, W, random_state=3)["curve"]
    order = np.random.default_rng([3, D]).permutation(D)
    for row in rows:
        chosen = np.sort(order[: row["latents"]])
        probe = LogisticProbe(random_state=3).fit(train.x[:, chosen], train.y)
        assert row["random_latents"] == probe.score(test.x[:, chosen], test.y)


@pytest.mark.parametrize("count", [1, 4, 9, D])
def test_principal_components_are_scikit_learns(count: int) -> None:
    train, test = parts()
    mean, scale = train.x.mean(0), train.x.std(0)
    z, new = ((part.x - mean) / scale for part in (train, test))
    pca = PCA(count).fit(z)
    theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(pca.transform(z), train.y)
    ours = LogisticProbe(0.1, tol=1e-7).fit(leading(Standardized(train.x), count), train.y)
    np.testing.assert_allclose(
        ours.predict_proba(test.x), theirs.predict_proba(pca.transform(new)), atol=2e-3
    )


def test_dense_latents_go_by_variance_and_have_no_map() -> None:
    train, test = parts()
    found = kept_curve(train, test, None)
    assert found["order"] == "variance"
    ranked = np.argsort(-train.x.var(0))
    for row in found["curve"]:
        assert row["groups"] is None and row["map_flops"] is None
        assert row["accuracy"] == plain(train, test, np.sort(ranked[: row["latents"]]))
    assert [row["latents"] for row in found["curve"]] == [12, 9, 6, 4, 3, 2, 1]


def test_a_map_of_zeros_keeps_nothing() -> None:
    train, test = parts()
    W = sparse_map()
    W[0] = 0
    only = torch.zeros_like(W)
    only[0] = W[1]
    row = kept_curve(train, test, only)["curve"][-1]
    assert row["groups"] == 1 and row["latents"] == int((W[1] != 0).any(0).sum())
    empty = kept_curve(train, test, torch.zeros_like(W))["curve"][0]
    assert (empty["latents"], empty["feature_bytes"], empty["map_flops"]) == (0, 0, 0)
    assert empty["accuracy"] is None and empty["pca"] is None and empty["random_latents"] is None


@pytest.mark.parametrize(
    ("most", "least", "counts"),
    [(16, 1, [16, 12, 8, 6, 4, 3, 2, 1]), (1, 1, [1]), (96, 24, [96, 72, 48, 36, 24])],
)
def test_counts_fall_by_halves_and_between(most: int, least: int, counts: list[int]) -> None:
    assert _halving(most, least) == counts
