"""One realistic page of an explained model: scenes, sixteen groups, a dead one among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsejepa.data.scenes import COLOURS, Scenes
from sparsejepa.evaluation.stats import Estimate, undefined
from sparsejepa.report.explain import ExplainPage, GroupView, MeasureRow, write_explain_page
from sparsejepa.study.figures import group_map_figure
from sparsejepa.study.page import Picture

GRID, SIDE = (8, 8), 64
COLUMNS = ("lam=0.03", "dense", "untrained", "PCA", "k-means")


def make_activations(images: np.ndarray, groups: int, rng: np.random.Generator) -> np.ndarray:
    """Return activations [m, N, G] of groups that each answer to a colour; the last is dead."""
    m = len(images)
    patches = images.reshape(m, GRID[0], SIDE // GRID[0], GRID[1], SIDE // GRID[1], 3)
    mean = patches.mean((2, 4)).reshape(m, -1, 3)
    wanted = np.vstack([list(COLOURS.values()), rng.uniform(30, 220, (groups, 3))])[:groups]
    distance = np.linalg.norm(mean[:, :, None] - wanted, axis=3)
    values = np.exp(-((distance / 70) ** 2)) + 0.08 * rng.random(distance.shape)
    values /= np.sqrt((values**2).mean((0, 1)))
    values[..., -1] = 0
    return values


def make_view(g: int, activations: np.ndarray, norms: np.ndarray, names: list[str]) -> GroupView:
    a = activations[..., g]
    order = np.argsort(-norms[g])
    strongest = np.argsort(-a.max(1))
    latents = [(int(j), float(norms[g, j])) for j in order[:8] if norms[g, j] > 0]
    view = GroupView(
        index=g,
        name=("red things", "", "wheels")[g] if g < 3 else "",
        dead=not a.any(),
        duplicate_of=3 if g == 4 else None,
        on=float((a > 1).mean()),
        latents=latents,
        num_latents=int((norms[g] > 0).sum()),
        labels=[],
        neighbours=[],
        top_patches=[],
        top_images=[],
        retrieved=[],
        silence=None,
        cell=(),
        monosemanticity=None,
        matched=None,
    )
    if view.dead:
        return view
    images = strongest.tolist()
    return replace(
        view,
        labels=[
            ("colour", names[g % 8], 0.91, 0.56),
            ("shape", "star", 0.62, 0.55),
            ("count", "three", 0.5, 0.55),
        ],
        neighbours=[((g + 1) % 15, 0.41), ((g + 5) % 15, 0.2)],
        top_patches=[(i, int(a[i].argmax()), float(a[i].max())) for i in images[:12]],
        top_images=a.mean(1).argsort()[::-1][:6].tolist(),
        retrieved=[(images[k], images[k + 1 : k + 6]) for k in (0, 7)],
        silence={
            "drop": Estimate(0.031, 0.02, 0.044),
            "chance": 0.004,
            "classes": [("red", 0.12), ("orange", 0.04)],
            "images": images[:6],
        },
        monosemanticity=0.2 + 0.02 * g,
        matched=0.8,
    )


def make_measures() -> list[MeasureRow]:
    rng = np.random.default_rng(1)

    def row(
        section: str, name: str, unit: str, about: str, top: float, skip: str = ""
    ) -> MeasureRow:
        values = {}
        for k, column in enumerate(COLUMNS):
            value = top * (1 - 0.17 * k + 0.05 * rng.random())
            values[column] = Estimate(value, value - 0.06 * top, value + 0.05 * top)
        if skip:
            values[skip] = undefined("k-means has no latents, so there is nothing to disentangle")
        values["PCA"] = Estimate(values["PCA"].value, note="no interval: fitted once")
        return MeasureRow(section, name, about, unit, values)

    return [
        row("Multi-information", "total correlation of latents", "nats",
            "Gaussian copula, exact bias subtracted (METHOD 7); down is better", 31.2, "k-means"),
        row("Multi-information", "total correlation of groups", "nats",
            "between the groups' pooled vectors; down is better", 4.1, "k-means"),
        row("Multi-information", "RankMe", "dimensions",
            "effective rank (Garrido et al. 2023)", 84),
        row("Disentanglement", "MIG, groups", "",
            "Chen et al. 2018; up is better", 0.11, "k-means"),
        row("Disentanglement", "DCI disentanglement, groups", "",
            "Eastwood and Williams 2018, random forest; up is better", 0.34, "k-means"),
        row("Disentanglement", "explicitness", "AUC", "Ridgeway and Mozer 2018", 0.87, "k-means"),
        row("Objects", "FG-ARI", "", "foreground pixels only; up is better", 0.42),
        row("Objects", "mBO", "", "mean best overlap (Pont-Tuset et al. 2017); up is better", 0.37),
        MeasureRow("Objects", "group lift against chance", "",
                   "below zero: worse than chance", {"lam=0.03": Estimate(-0.02, -0.05, 0.01)}),
    ]  # fmt: skip


def make_rows(steps: int = 40) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, x in enumerate(np.linspace(0, 1, steps).tolist()):
        falling = {"loss": 0.5 - 0.2 * x, "prediction": 0.4 - 0.2 * x, "penalty": 170 - 140 * x}
        w = {"density": 1 - 0.89 * x**0.5, "groups_per_latent": 16 - 14.2 * x**0.5}
        rows.append({"step": 30 * i, **falling, **w, "lam": 0.03 * x})
        if i % 5 == 4:
            rows.append({"step": 30 * i, "rankme": 40 + 45 * x**0.5, "knn": 0.1 + 0.1 * x})
    return [*rows, {"step": 1170, "alarm": "one group: nearly all latents feed a single group"}]


def make_page(groups: int = 16, latents: int = 192, count: int = 60) -> ExplainPage:
    rng = np.random.default_rng(0)
    scenes = Scenes(0).render(np.arange(count), SIDE)
    activations = make_activations(scenes.images, groups, rng)
    norms = rng.random((groups, latents)) * (rng.random((groups, latents)) < 0.05)
    norms[rng.integers(0, groups - 1, latents), np.arange(latents)] += 1
    norms[-1] = 0
    norms /= np.maximum(np.linalg.norm(norms, axis=0), 1e-9)
    names = list(COLOURS)
    return ExplainPage(
        title="What lam=0.03-s0 learned on scenes",
        subtitle="tiny encoder, 64 x 64 pixels, 16 concept groups, 1,200 steps",
        verdict="Groups follow colour: 9 of 15 go with one colour beyond chance. They do not "
        "follow objects better than k-means on the same tokens (FG-ARI 0.42 against 0.41).",
        remarks=["One group is dead.", "Intervals: 95 %, bootstrap over 2,000 test images."],
        columns=COLUMNS,
        measures=make_measures(),
        block_norms=norms,
        images=scenes.images,
        image_labels=[f"scene {i}, {n} objects" for i, n in enumerate(scenes.count)],
        activations=activations,
        grid=GRID,
        explorer=list(range(36)),
        groups=[make_view(g, activations, norms, names) for g in range(groups)],
        curves=make_rows(),
        pictures=[Picture("map", group_map_figure(norms), "A figure.", "A heat map.")],
        command="sparsejepa explain runs/lam=0.03-s0 --data scenes",
        environment={"sparsejepa": "0.1", "commit": "75a3fbb"},
        settings="[groups]\nkind = 'concept'\n",
        names_file="runs/lam=0.03-s0/groups.json",
        floors=("untrained", "PCA", "k-means"),
    )


@pytest.fixture(scope="session")
def page() -> ExplainPage:
    return make_page()


@pytest.fixture(scope="session")
def path(page: ExplainPage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_explain_page(tmp_path_factory.mktemp("page") / "report.html", page)
