"""The probes on synthetic features, beside scikit-learn's logistic regression at equal objective.

    python bench/probe.py

The features have what makes fits slow in practice: a spectrum over three decades, and classes that
overlap.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timing import Contender, interleave, ratios, script, show, spread

from sparsejepa.environment import resolve_device
from sparsejepa.evaluation.classifiers import LogisticProbe

LAMBDA = 1e-4  # penalty of the fits at one value of C = 1 / (rows * lambda)
VALUES = 20  # of C to choose from, between lambda = 1 and 1e-7
SEPARATION = 0.2  # of class means, in standard deviations of a class: accuracies of about a half
OURS, LEARN = "logistic, ours, one C", "logistic, scikit-learn, one C"


@dataclass(frozen=True)
class Settings:
    """Time fits of probes, ours and scikit-learn's, in turn."""

    rows: int = 50_000
    width: int = 192
    classes: int = 100
    rounds: int = 3
    """Numbers per contender: medians and quartiles are over these."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; scikit-learn is always on the CPU."""
    threads: int | None = None
    """CPU threads of torch; its own choice if not given."""


def main(settings: Settings) -> None:
    """Print the table."""
    n, device = settings.rows, resolve_device(settings.device)
    x, y = features(n + n // 5, settings.width, settings.classes)
    test_x, test_y, x, y = x[n:], y[n:], x[:n], y[:n]
    here = torch.from_numpy(x).to(device)  # where an encoder leaves them
    scaler = StandardScaler().fit(x)
    z, one = np.asarray(scaler.transform(x)), 1 / (n * LAMBDA)
    many = (10 ** np.linspace(0, 7, VALUES) / n).tolist()
    probes: dict[str, tuple[Any, Any]] = {
        OURS: (LogisticProbe(one, device=device), here),
        f"logistic, ours, search over {VALUES} C": (LogisticProbe(many, device=device), here),
        LEARN: (LogisticRegression(C=one, max_iter=1000), z),
    }
    contenders: dict[str, Contender] = {
        name: lambda _, probe=probe, given=given: probe.fit(given, y)
        for name, (probe, given) in probes.items()
    }
    contenders["pause"] = lambda _: time.sleep(0.3)  # scikit-learn's threads go on spinning
    seconds = interleave(contenders, settings.rounds, device, min_seconds=0.0)
    objectives = {name: objective(probes[name][0], z, y, one) for name in (OURS, LEARN)}
    rows = []
    for name, (probe, _) in probes.items():
        asked = scaler.transform(test_x) if name == LEARN else test_x
        row = {"probe": name, "s": spread(seconds[name])}
        row["x ours at one C"] = ratios(seconds[name], seconds[OURS])
        row["accuracy"] = f"{np.mean(probe.predict(asked) == test_y):.3f}"
        if name in objectives:
            above = objectives[name] / min(objectives.values()) - 1
            row["objective above the lower"] = f"{above:.1e}"
        rows.append(row)
    show(f"Probes of {n:,} x {settings.width} features, {settings.classes} classes", rows)


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
    return (axes * np.logspace(0, -1.5, width) @ turn).astype(np.float32), labels


def objective(model: Any, z: np.ndarray, labels: np.ndarray, C: float) -> float:
    """Return 1/2 ||W||^2 + C * sum of cross entropies at a fit to standardised features z."""
    weights, bias = (torch.as_tensor(a).double().cpu() for a in (model.coef_, model.intercept_))
    scores = torch.from_numpy(z).double() @ weights.T + bias
    loss = F.cross_entropy(scores, torch.from_numpy(labels), reduction="sum")
    return float(weights.square().sum() / 2 + C * loss)


if __name__ == "__main__":
    script(main, Settings)
