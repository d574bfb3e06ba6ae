"""A small folder of images with factors and masks, tiny runs on it, and a page made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsejepa.config import preset
from sparsejepa.data.scenes import COLOURS, Scenes
from sparsejepa.evaluation.stats import Estimate, undefined
from sparsejepa.explain.concepts import Card, Gallery
from sparsejepa.explain.measures import Row
from sparsejepa.explain.page import ExplainPage, write_explain_page
from sparsejepa.explain.readout import KMEANS, PCA, RUN, UNTRAINED
from sparsejepa.study import pretrain

COUNTS = {"train": 120, "test": 60}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, masks/ and factors.csv: 120 + 60 scenes of 3 to 10 objects, 32 x 32 pixels."""
    root = tmp_path_factory.mktemp("explained")
    scenes = Scenes().render(np.arange(sum(COUNTS.values())))
    rows = ["file,count,shape,split"]
    for name in ("images", "masks"):
        (root / name).mkdir()
    for i, (image, mask) in enumerate(zip(scenes.images, scenes.masks, strict=True)):
        # A name that would be a tag if the page did not escape it.
        name = f"<b>{i:03}.png"
        Image.fromarray(image).save(root / "images" / name)
        Image.fromarray(mask).save(root / "masks" / name)
        split = "train" if i < COUNTS["train"] else "test"
        rows.append(f"{name},{scenes.factors[i, 0]},{scenes.factors[i, 1]},{split}")
    (root / "factors.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of a few steps: concept groups with two seeds, regions, and dense."""
    out = tmp_path_factory.mktemp("runs")
    settings = preset("nano").replace(
        data=str(folder), steps=6, warmup=0.2, batch_size=32, predictor_depth=1, device="cpu",
        threads=1, patch_size=8, num_groups=6,
    )  # fmt: skip
    arms = {
        "concept": {"groups": "concept", "lam": 0.5},
        "concept-s1": {"groups": "concept", "lam": 0.5, "seed": 1},
        "region": {"groups": "region"},
        "dense": {"groups": "none"},
    }
    for name, arm in arms.items():
        pretrain(settings.replace(**arm), out=out / name)
    return {name: out / name for name in arms}


GRID, SIDE = (8, 8), 64
COLUMNS = (RUN, UNTRAINED, PCA, KMEANS)


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


def make_card(g: int, activations: np.ndarray, norms: np.ndarray) -> Card:
    a = activations[..., g]
    dead = not a.any()
    strongest = np.argsort(-a.max(1)).tolist()
    order = [int(j) for j in np.argsort(-norms[g])[:8] if norms[g, j] > 0]
    return Card(
        index=g,
        dead=dead,
        on=float((a > 1).mean()),
        latents=[(j, float(norms[g, j])) for j in order],
        num_latents=int((norms[g] > 0).sum()),
        labels=[] if dead else [("colour", list(COLOURS)[g % 8], 0.91, 0.56)],
        top_patches=[]
        if dead
        else [(i, int(a[i].argmax()), float(a[i].max())) for i in strongest[:6]],
        top_images=[] if dead else a.mean(1).argsort()[::-1][:6].tolist(),
        drop=None if dead else Estimate(0.031, 0.02, 0.044),
        drop_chance=None if dead else 0.004,
        cell=(),
    )


def make_measures() -> list[Row]:
    rng = np.random.default_rng(1)

    def row(section: str, name: str, unit: str, top: float) -> Row:
        values = {}
        for k, column in enumerate(COLUMNS):
            value = top * (1 - 0.17 * k + 0.05 * rng.random())
            values[column] = Estimate(value, value - 0.06 * top, value + 0.05 * top)
        values[KMEANS] = undefined("k-means has no latents, so there is nothing to disentangle")
        values[PCA] = Estimate(values[PCA].value, note="no interval: fitted once")
        return Row(section, name, "up is better", unit, values)

    return [
        row("Information", "total correlation of latents", "nats", 31.2),
        row("Information", "RankMe", "dimensions", 84),
        row("Disentanglement", "MIG", "", 0.11),
        Row("Objects", "group lift against chance", "below zero: worse than chance", "",
            {RUN: Estimate(-0.02, -0.05, 0.01)}),
    ]  # fmt: skip


def make_page(groups: int = 16, latents: int = 192, count: int = 60) -> ExplainPage:
    """One realistic page of an explained model: scenes, sixteen groups, a dead one among them."""
    rng = np.random.default_rng(0)
    scenes = Scenes(0).render(np.arange(count), SIDE)
    activations = make_activations(scenes.images, groups, rng)
    norms = rng.random((groups, latents)) * (rng.random((groups, latents)) < 0.05)
    norms[rng.integers(0, groups - 1, latents), np.arange(latents)] += 1
    norms[-1] = 0
    norms /= np.maximum(np.linalg.norm(norms, axis=0), 1e-9)
    return ExplainPage(
        title="What lam=0.03-s0 has learned",
        subtitle="tiny encoder, 64 x 64 pixels, 16 concept groups, 1,200 steps",
        verdict="Groups follow colour. They do not follow objects better than k-means.",
        remarks=["One group is dead.", "Intervals: 95 %, bootstrap over 2,000 test images."],
        rows=make_measures(),
        block_norms=norms,
        images=dict(enumerate(scenes.images)),
        image_labels={i: f"scene {i}, {n} objects" for i, n in enumerate(scenes.count)},
        grid=GRID,
        gallery=Gallery(
            cards=[make_card(g, activations, norms) for g in range(groups)],
            explorer=list(range(36)),
            shown=list(range(count)),
            activations=activations,
        ),
        command="sparsejepa explain runs/lam=0.03-s0 --data scenes",
        about={"sparsejepa": "0.1", "commit": "75a3fbb"},
        settings="[groups]\nkind = 'concept'\n",
    )


@pytest.fixture(scope="session")
def page() -> ExplainPage:
    return make_page()


@pytest.fixture(scope="session")
def path(page: ExplainPage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_explain_page(tmp_path_factory.mktemp("page") / "report.html", page)
