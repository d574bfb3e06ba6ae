"""The probes on synthetic features, beside scikit-learn's logistic regression at equal objective.

The features have what makes fits slow in practice: a spectrum that decays over three decades, and
classes that overlap.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from sparsejepa.benchmarks.settings import BenchSettings, Section
from sparsejepa.benchmarks.timing import Contender, entries, interleave, ratios
from sparsejepa.evaluation.classifiers import KNNProbe, LinearProbe, LogisticProbe, RidgeProbe
from sparsejepa.evaluation.information import rankme
from sparsejepa.evaluation.linear import LogisticDescent, Standardized

ROWS, WIDTH, CLASSES, QUERIES = 50_000, 192, 100, 10_000
LAMBDA = 1e-4
"""Penalty of the fits at one value of C = 1 / (rows * lambda)."""
VALUES = 20
"""Values of C to choose from, between lambda = 1 and 1e-7."""
SEPARATION = 0.2
"""Of class means, in standard deviations of a class: test accuracies of about a half."""
LEARN = "logistic, scikit-learn lbfgs, one C"
PAUSE = 0.3
"""Seconds of rest after scikit-learn, whose BLAS threads go on spinning for a while."""


def section(settings: BenchSettings) -> Section:
    """Time fits of our probes and scikit-learn's, in turn, and compare their objectives."""
    n, width, classes, queries = (
        (2_000, 32, 10, 500) if settings.quick else (ROWS, WIDTH, CLASSES, QUERIES)
    )
    x, y = features(n + queries, width, classes)
    test_x, test_y, x, y = x[n:], y[n:], x[:n], y[:n]
    here = torch.from_numpy(x).to(settings.device)  # where an encoder leaves them
    scaler = StandardScaler().fit(x)
    z = np.asarray(scaler.transform(x))
    one, many = 1 / (n * LAMBDA), (10 ** np.linspace(0, 7, VALUES) / n).tolist()
    fitted: dict[str, Any] = {}

    def fit(name: str, probe: LinearProbe) -> Contender:
        def call(number: int) -> None:
            fitted[name] = probe.fit(here, y)

        return call

    def usual(name: str, threads: int) -> Contender:
        def call(number: int) -> None:
            with threadpool_limits(threads, user_api="blas"):
                fitted[name] = LogisticRegression(C=one, max_iter=1000).fit(z, y)

        return call

    def nearest(number: int) -> None:
        KNNProbe(device=settings.device).fit(here, y).predict(test_x)

    def whole_path(number: int) -> None:
        space = Standardized(here, settings.device)
        labels = torch.from_numpy(y).to(here.device)
        descent = LogisticDescent(space.variance)
        descent.place(space.rotated, labels, space.rotated.new_zeros(width + 1, classes))
        for C in many:
            descent.minimise(C, tol=LogisticProbe().tol, max_iter=500)

    # More threads are not always faster for it: its BLAS's threads and its own get into each
    # other's way.
    learn = {f"{LEARN}, {k} BLAS threads": k for k in sorted({1, settings.threads})}
    ours, path = "logistic, ours, one C", f"logistic, ours, search over {VALUES} C"
    ridge, pause = "ridge, ours", "pause"
    contenders: dict[str, Contender] = {
        ours: fit(ours, LogisticProbe(one, device=settings.device)),
        path: fit(path, LogisticProbe(many, device=settings.device)),
        f"logistic, ours, {VALUES} fits in full, each from the one before": whole_path,
        ridge: fit(ridge, RidgeProbe(device=settings.device)),
        f"nearest neighbours of {queries:,}": nearest,
        "rankme": lambda number: rankme(here),
        **{name: usual(name, threads) for name, threads in learn.items()},
        pause: lambda number: time.sleep(PAUSE),
    }
    timings = interleave(
        contenders, rounds=settings.rounds, device=settings.device, warmup=1, min_seconds=0.0
    )
    del timings[pause]
    result = Section("probe", f"Probes of {n:,} x {width} features, {classes} classes")
    objectives = {name: objective(fitted[name], z, y, one) for name in (ours, *learn)}
    for name, timing in timings.items():
        # How many times as long as our fit at one value of C.
        row = timing.row(**entries("x_ours_one_C", ratios(timing, timings[ours])))
        if name in fitted:
            x_as_fitted = scaler.transform(test_x) if name in learn else test_x
            row["accuracy"] = float(np.mean(fitted[name].predict(x_as_fitted) == test_y))
        row["objective_above_least"] = None
        if name in objectives:
            row["objective_above_least"] = objectives[name] / min(objectives.values()) - 1
        result.rows.append(row)
    chosen = fitted[path]
    assert isinstance(chosen, LogisticProbe)
    result.notes.append(
        f"one C: lambda = {LAMBDA:g}; of {VALUES} from 1 to 1e-7 the search chose "
        f"{1 / (n * chosen.C_):.1g}. It ends when two values in a row fall below the best"
    )
    return result


def features(rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features [rows, width] float32 and labels [rows].

    Axes carry from 1 down to 1/1000 of the variance and are turned at random, the classes are
    normal with means SEPARATION standard deviations from the middle along every axis.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=rows)
    means = SEPARATION * rng.standard_normal((classes, width))
    axes = means[labels] + rng.standard_normal((rows, width))
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
    x = axes * np.logspace(0, -1.5, width) @ turn
    return x.astype(np.float32), labels


def objective(model: Any, z: np.ndarray, labels: np.ndarray, C: float) -> float:
    """Return 1/2 ||W||^2 + C * sum of cross entropies at a fit to standardised features z."""
    weights, bias = (torch.as_tensor(a).double().cpu() for a in (model.coef_, model.intercept_))
    scores = torch.from_numpy(z).double() @ weights.T + bias
    loss = F.cross_entropy(scores, torch.from_numpy(labels), reduction="sum")
    return float(weights.square().sum() / 2 + C * loss)
