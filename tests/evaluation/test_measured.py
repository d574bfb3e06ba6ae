from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sparsejepa.data.catalog import load_dataset
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.errors import UserError
from sparsejepa.evaluation import measured as module
from sparsejepa.evaluation.classifiers import LogisticProbe, Standardized
from sparsejepa.evaluation.disentangle import Points, dci
from sparsejepa.evaluation.features import embed
from sparsejepa.evaluation.information import total_correlation
from sparsejepa.evaluation.measured import (
    MEASURES,
    check_measures,
    kept_curve,
    kept_latents,
    leading,
    measure,
)
from sparsejepa.model.vit import ViT
from sparsejepa.training.monitor import rankme

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
DATA: dict[str, Any] = {"data": "scenes:single", "targets": ["colour"], "limit": 300}


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """A few hundred images."""
    monkeypatch.setattr(module, "FACTOR_IMAGES", (300, 200))
    real = module.load_splits

    def load_splits(name: str, holdout: int, **settings: Any):
        train, test = real(name, holdout, **settings)
        return train, test if holdout else test.subset(250)

    monkeypatch.setattr(module, "load_splits", load_splits)


def make_encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(ViT(32, 8, embed_dim=12, depth=2, num_heads=3), name="a", mean=MEAN, std=STD)


def sparse_map() -> torch.Tensor:
    W = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0))
    return W * (torch.arange(12) % 4 == torch.arange(4)[:, None])[:, None]


def test_information_is_of_the_test_images_with_a_twin_of_the_seed() -> None:
    encoder = make_encoder()
    found = measure(["information"], encoder, None, seed=3, **DATA)["information"]
    test = load_dataset("scenes:single", "test").subset(250)
    for prefix, source in (("", encoder), ("untrained_", encoder.untrained(3))):
        x = embed(source, test).x
        assert found[f"{prefix}rankme"] == rankme(x)
        assert found[f"{prefix}total_correlation"] == total_correlation(x).value
    assert found["n"] == 250 and found["scored_on"] == "test"


def test_information_is_of_the_images_held_out() -> None:
    encoder, data = make_encoder(), load_dataset("scenes:single", "train")
    for count in (120, 10):
        found = measure(["information"], encoder, None, holdout=count, **DATA)["information"]
        assert found["n"] == count and found["scored_on"] == "holdout"
        assert found["rankme"] == rankme(embed(encoder, data.split_off(count)[1]).x)
    assert found["total_correlation"] is None and "10 points are too few" in found["note"]


def test_factors_by_latents_and_by_groups() -> None:
    encoder, W = make_encoder(), sparse_map()
    found = measure(["factors"], encoder, W, **DATA)["factors"]
    assert (found["n_train"], found["n_test"]) == (300, 200)
    parts = [
        load_dataset("scenes:single", "train").subset(300),
        load_dataset("scenes:single", "test").subset(250).subset(200),
    ]
    codes = [embed(encoder, part).x.astype(float) for part in parts]
    mean, std = codes[0].mean(0), codes[0].std(0)
    codes = [(code - mean) / std for code in codes]
    values = [np.stack([t.values for t in part.targets.values()], 1) for part in parts]
    by_latent = dci(Points(codes[0], values[0]), codes[1], values[1])
    for name in ("disentanglement", "completeness", "informativeness"):
        assert found[f"dci_{name}"] == pytest.approx(by_latent[name].value, abs=0.02)
    units = np.repeat(np.arange(4), 3)
    maps = [code @ np.concatenate(W.numpy()).T for code in codes]
    by_group = dci(Points(maps[0], values[0], units), maps[1], values[1])["disentanglement"]
    assert found["groups_dci_disentanglement"] == pytest.approx(by_group.value, abs=0.02)
    assert 0 <= found["mig"] < 0.2
    assert found["untrained_dci_disentanglement"] != found["dci_disentanglement"]
    dense = measure(["factors"], encoder, None, **DATA)["factors"]
    assert dense["groups_dci_disentanglement"] is None
    assert dense["dci_disentanglement"] == found["dci_disentanglement"]


def test_kept_is_on_the_first_target_and_the_limited_images() -> None:
    encoder = make_encoder()
    found = measure(["kept"], encoder, sparse_map(), **DATA)["kept"]
    train = load_dataset("scenes:single", "train").subset(300)
    test = load_dataset("scenes:single", "test").subset(250)
    y, wanted = (part.targets["colour"].values for part in (train, test))
    probe = LogisticProbe().fit(embed(encoder, train).x, y)
    assert found["curve"][0]["accuracy"] == probe.score(embed(encoder, test).x, wanted)
    assert found["target"] == "colour" and (found["n_train"], found["n_test"]) == (300, 250)
    # Disjoint groups of three latents: half of the groups is half of the latents.
    assert [row["latents"] for row in found["curve"]] == [12, 9, 6, 3]


def test_every_measure_is_plain_values_and_unknown_ones_are_refused() -> None:
    found = measure(list(MEASURES), make_encoder(), sparse_map(), **DATA)
    assert list(found) == ["information", "factors", "kept"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert measure([], make_encoder(), None, **DATA) == {}
    with pytest.raises(UserError, match=r"measure 'factor': .*did you mean 'factors'"):
        check_measures(["kept", "factor"])


# --- what is left when only some groups are kept --------------------------------------------------

D, G, P = 12, 5, 2


def parts() -> tuple[Any, Any]:
    """Four classes in correlated latents of different spread."""
    rng = np.random.default_rng(0)
    centres, mix = rng.normal(size=(4, D)), rng.normal(size=(D, D)) + 2 * np.eye(D)
    found = []
    for n in (400, 300):
        y = rng.integers(0, 4, n)
        x = (centres[y] + rng.normal(size=(n, D))) @ mix * np.logspace(0, 1, D)
        found.append((x.astype(np.float32), y))
    return found[0], found[1]


def random_map(seed: int = 0, share: float = 0.4) -> Tensor:
    """Every latent feeds one group at least."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(G, P, D, generator=generator)
    keep = torch.rand(G, D, generator=generator) < share
    keep[torch.randint(G, (D,), generator=generator), torch.arange(D)] = True
    return W * keep[:, None]


def plain(train: Any, test: Any, latents: Any) -> float:
    (x, y), (new, wanted) = train, test
    return LogisticProbe().fit(x[:, latents], y).score(new[:, latents], wanted)


@given(seed=st.integers(0, 50), share=st.floats(0, 1), groups=st.integers(1, G))
def test_a_latent_stays_while_a_kept_group_reads_it(seed: int, share: float, groups: int) -> None:
    W = random_map(seed, share)
    energy = [sum(float(w) ** 2 for w in W[g].flatten()) for g in range(G)]
    best = sorted(range(G), key=lambda g: -energy[g])[:groups]
    read = [j for j in range(D) if any(float(W[g, p, j]) for g in best for p in range(P))]
    assert kept_latents(W, groups).tolist() == read


def test_the_curve_starts_at_the_plain_probe_and_counts_what_is_kept() -> None:
    (train, test), W = parts(), random_map()
    found = kept_curve(train, test, W)
    assert found["order"] == "groups"
    curve = found["curve"]
    assert [row["groups"] for row in curve] == [5, 3, 2, 1]
    first, whole = curve[0], plain(train, test, slice(None))
    assert first["latents"] == D
    assert first["accuracy"] == first["random_latents"] == first["pca"] == whole
    for row in curve:
        latents = kept_latents(W, row["groups"])
        assert row["latents"] == len(latents)
        assert row["accuracy"] == plain(train, test, latents)


@pytest.mark.parametrize("count", [1, 9])
def test_principal_components_are_scikit_learns(count: int) -> None:
    (x, y), (new, _) = parts()
    z, new_z = ((part - x.mean(0)) / x.std(0) for part in (x, new))
    pca = PCA(count).fit(z)
    theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(pca.transform(z), y)
    ours = LogisticProbe(0.1, tol=1e-7).fit(leading(Standardized(x), count), y)
    wanted = theirs.predict_proba(pca.transform(new_z))
    np.testing.assert_allclose(ours.predict_proba(new), wanted, atol=2e-3)


def test_dense_latents_go_by_variance_and_have_no_map() -> None:
    train, test = parts()
    found = kept_curve(train, test, None)
    assert found["order"] == "variance"
    ranked = np.argsort(-train[0].var(0))
    for row in found["curve"]:
        assert row["groups"] is None
        assert row["accuracy"] == plain(train, test, np.sort(ranked[: row["latents"]]))
    assert [row["latents"] for row in found["curve"]] == [12, 9, 6, 4, 3, 2, 1]


def test_a_map_of_zeros_keeps_nothing() -> None:
    empty = kept_curve(*parts(), torch.zeros(G, P, D))["curve"][0]
    assert empty["latents"] == 0
    assert empty["accuracy"] is None and empty["pca"] is None and empty["random_latents"] is None
