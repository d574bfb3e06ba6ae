"""The probes' contest: hard enough features, and the same minimum for both sides."""

from __future__ import annotations

import numpy as np
import pytest

from sparsejepa.benchmarks.probes import features, objective, section
from sparsejepa.benchmarks.settings import BenchSettings
from sparsejepa.evaluation.classifiers import LogisticProbe


def test_both_sides_reach_the_same_objective() -> None:
    result = section(BenchSettings(rounds=1, threads=2, quick=True))
    rows = {row["name"]: row for row in result.rows}
    ours = rows["logistic, ours, one C"]
    theirs, _ = (row for name, row in rows.items() if "scikit-learn" in name)
    assert ours["x_ours_one_C"] == 1
    for row in (ours, theirs):
        assert 0 <= row["objective_above_least"] < 1e-3
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.01)
    assert 0.2 < ours["accuracy"] < 0.8
    assert {"ridge, ours", "rankme"} <= set(rows) and "pause" not in rows


def test_features_have_a_decaying_spectrum() -> None:
    x, labels = features(4_000, 32, 10)
    assert x.shape == (4_000, 32) and x.dtype == np.float32 and set(labels) == set(range(10))
    variance = np.linalg.eigvalsh(np.cov(x.T))
    assert 300 < variance[-1] / variance[0] < 3_000


def test_objective_is_least_at_the_fit() -> None:
    x, labels = features(500, 8, 4)
    z = (x - x.mean(0)) / x.std(0)
    probe = LogisticProbe(0.1, tol=1e-6).fit(z, labels)
    least = objective(probe, z, labels, 0.1)
    probe.coef_ = probe.coef_ + 0.05
    probe.coef_[0] += 0.1
    assert objective(probe, z, labels, 0.1) > least
