"""One view per group: what feeds it, what excites it, what it goes with, what it is good for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from sparsejepa.data.store import ImageSet
from sparsejepa.encoders.encoder import Encoder, load_groups
from sparsejepa.encoders.load import load
from sparsejepa.errors import UserError
from sparsejepa.evaluation.classifiers import LogisticProbe
from sparsejepa.evaluation.features import pixel_features
from sparsejepa.evaluation.stats import Estimate, from_draws
from sparsejepa.explain import concepts
from sparsejepa.explain.columns import DIRECTIONS, RUN, SHUFFLED, Column
from sparsejepa.explain.objects import patch_labels
from sparsejepa.explain.readout import evenly, read, read_train
from sparsejepa.explain.subject import Subject
from sparsejepa.report.explain import GroupView, MeasureRow
from sparsejepa.training.loop import read_config

EXPLORED = 36
"""Images of the explorer."""
SHOWN = 320
"""Images of the gallery, about: the more groups there are, the fewer each shows."""
MATCHED_IMAGES, SCALED_IMAGES = 500, 1_000
"""Images over which groups of two seeds are matched, and those that give their units."""
SIBLINGS, PERMUTED = 4, 5
LATENTS, LABELS, NEIGHBOURS, CLASSES = 12, 5, 3, 6
"""What a view lists at most."""

Labels = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Stability:
    """Groups matched to those of the same settings under other seeds."""

    correlations: np.ndarray
    """[G], the mean over the other runs; 0 where a group has no partner."""
    chance: float
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """The views of all groups, the images that they refer to, and rows for the tables."""

    views: list[GroupView]
    images: np.ndarray
    image_labels: list[str]
    activations: np.ndarray
    explorer: list[int]
    rows: list[MeasureRow]


def patch_maps(subject: Subject, column: Column) -> np.ndarray:
    """Return the activations of test images that maps show, [n, N, G]; of regions [n, 1, G].

    A region group reads the pooled latents and predicts a fixed cell: it has no map of patches.
    """
    if subject.kind == "region":
        return column.test.pooled_activations[:, None]
    return column.test.activations


def gallery(
    subject: Subject,
    column: Column,
    test: ImageSet,
    labels: Labels,
    *,
    names: Mapping[int, str],
    stability: Stability | None = None,
) -> Gallery:
    """Look at every group of a run.

    Args:
        column: the run's readout.
        labels: train [n] and test [n'] values by target; the first one is probed for the effect of
            silencing a group.
        names: a person's, by group.
    """
    G = len(subject.W)
    activations = patch_maps(subject, column)
    statistics = concepts.group_statistics(activations)
    units = np.where(statistics.dead, 1, statistics.rms).astype(activations.dtype)
    scaled = activations / units
    scaled[:, :, statistics.dead] = 0
    regions = subject.kind == "region"
    means = scaled.mean(1, dtype=np.float32)  # [n, G]
    rng = np.random.default_rng(0)
    sample = rng.choice(len(scaled), min(len(scaled), 1_000), replace=False)
    points = scaled[np.sort(sample)].reshape(-1, G).astype(np.float32)
    near, alike = concepts.nearest_groups(points, NEIGHBOURS)
    repeats = concepts.duplicate_groups(points)
    pixels = pixel_features(test).x
    purity = concepts.monosemanticity(means, pixels - pixels.mean(0))
    associated = _associations(means, test, labels)
    if test.masks is not None and not regions:
        found = _objects(scaled[column.test.kept], test.masks[column.test.kept], column.grid)
        associated = [[*mine, *more] for mine, more in zip(found, associated, strict=True)]
    silenced = _silence(subject, column, test, labels)
    cells = subject.cells()
    each = int(np.clip(SHOWN // (4 * G), 3, 8))
    store = _Store()
    explorer = store(evenly(len(test), EXPLORED))
    views = []
    for g in range(G):
        norms = subject.norms[g]
        fed = np.flatnonzero(norms)
        strongest = fed[np.argsort(-norms[fed], kind="stable")][:LATENTS]
        best = scaled[:, :, g].max(1)
        patches = np.argsort(-best.astype(np.float32), kind="stable")[:each]
        whole = np.argsort(-means[:, g], kind="stable")[:each]
        query = int(whole[0])
        found, _ = concepts.retrieve(
            column.test.vectors[[query]], column.test.vectors, g, each, exclude=np.array([query])
        )
        dead = bool(statistics.dead[g])
        views.append(
            GroupView(
                index=g,
                name=names.get(g, ""),
                dead=dead,
                duplicate_of=None if dead else repeats[g],
                on=float(statistics.on[g]),
                latents=[(int(j), float(norms[j])) for j in strongest],
                num_latents=len(fed),
                labels=[] if dead else associated[g],
                neighbours=[
                    (int(h), float(c)) for h, c in zip(near[g], alike[g], strict=True) if not dead
                ],
                top_patches=[
                    (i, int(scaled[n, :, g].argmax()), float(best[n]))
                    for i, n in zip(
                        store([] if dead or regions else patches), patches, strict=False
                    )
                ],
                top_images=store([] if dead else whole),
                retrieved=[] if dead else [(store([query])[0], store(found[0]))],
                silence=None
                if silenced is None or dead
                else _told(silenced[g], test, labels, store),
                cell=cells[g],
                monosemanticity=purity[g],
                matched=None if stability is None else float(stability.correlations[g]),
            )
        )
    order = np.array(list(store.order))
    rows = []
    if silenced is not None:
        drops = np.mean([s.draws for s in silenced], axis=0)
        drop = float(np.mean([s.drop.value or 0.0 for s in silenced]))
        target = next(iter(labels))
        rows.append(
            MeasureRow(
                "Groups and factors", SILENCED,
                f"share of {target} labels that a linear probe no longer gets when what one group "
                "reads is projected out, mean over groups; random directions: of equal rank",
                "",
                {
                    RUN: from_draws(drop, drops),
                    DIRECTIONS: Estimate(float(np.mean([s.chance for s in silenced]))),
                },
            )
        )  # fmt: skip
    if stability is not None:
        rows.append(
            MeasureRow(
                "Stability", "match with other seeds",
                "mean correlation of activations with those of the groups of "
                f"{', '.join(stability.runs)}, matched one to one (regions by their cell); "
                "shuffled: other images, same places",
                "",
                {
                    RUN: Estimate(float(stability.correlations.mean())),
                    SHUFFLED: Estimate(stability.chance),
                },
            )
        )  # fmt: skip
    return Gallery(
        views,
        np.asarray(test.images[order]),
        [_label(test, i) for i in order],
        scaled[order].astype(np.float32),
        explorer,
        rows,
    )


SILENCED = "accuracy lost by silencing a group"


def sibling_stability(subject: Subject, train: ImageSet, test: ImageSet) -> Stability | None:
    """Match groups with those of runs beside this one that differ in the seed alone.

    None for fitted groups and where there are no such runs.
    """
    if subject.groups is None or subject.config is None:
        return None
    run_dir, encoder = Path(subject.ref).resolve(), subject.encoder
    wanted = subject.config.replace(seed=0, device="cpu", threads=None).flat()
    fit, part = train.subset(SCALED_IMAGES), test.subset(MATCHED_IMAGES)

    regions = subject.kind == "region"

    def points(encoder: Encoder, W: Tensor) -> np.ndarray:
        readout = read(encoder, part, W, read_train(encoder, fit)[0])
        activations = readout.pooled_activations if regions else readout.activations
        return activations.reshape(-1, activations.shape[-1]).astype(np.float32)

    own = points(encoder, subject.W)
    found = []
    for folder in sorted(run_dir.parent.iterdir()):
        if folder == run_dir or not (folder / "config.toml").is_file():
            continue
        try:
            config = read_config(folder)
            if config.replace(seed=0, device="cpu", threads=None).flat() != wanted:
                continue
            other = load(folder, encoder.device, encoder.precision)
            groups = load_groups(folder, other.grid_size)
        except UserError:  # an unfinished or foreign neighbour is none of this run's business
            continue
        if groups is None or len(found) == SIBLINGS:
            continue
        theirs = points(other, groups.W.detach())
        patches = len(own) // len(part)
        matched = concepts.match_groups(own, theirs, block=patches, permutations=20)
        if regions:  # a cell is the same cell under every seed: nothing is to be matched
            G = np.arange(len(subject.W))
            own_pairs = {"pairs": np.stack([G, G], 1), "correlations": matched.matrix.diagonal()}
            matched = replace(matched, **own_pairs, chance=0.0)
        found.append((folder.name, matched))
    if not found:
        return None
    total = np.zeros(len(subject.W))
    for _, matched in found:
        total[matched.pairs[:, 0]] += matched.correlations
    return Stability(
        total / len(found),
        float(np.mean([m.chance for _, m in found])),
        tuple(name for name, _ in found),
    )


class _Store:
    """Test images that the page refers to get a place on it when they are first met."""

    def __init__(self) -> None:
        self.order: dict[int, int] = {}

    def __call__(self, images: Sequence[int] | np.ndarray) -> list[int]:
        return [self.order.setdefault(int(i), len(self.order)) for i in images]


def _associations(
    means: np.ndarray, test: ImageSet, labels: Labels
) -> list[list[tuple[str, str, float, float]]]:
    """Return each group's labels over all targets, those furthest above chance first."""
    result: list[list[tuple[str, str, float, float]]] = [[] for _ in means.T]
    for target, (_, values) in labels.items():
        found = concepts.associations(means, values, test.targets[target].names, top=LABELS)
        for listed, mine in zip(found, result, strict=True):
            mine += [(target, a.name, a.value, a.chance) for a in listed if a.exceeds]
    return [sorted(m, key=lambda a: (a[3] - a[2]) / max(a[3] - 0.5, 1e-9))[:LABELS] for m in result]


def _objects(
    scaled: np.ndarray, masks: np.ndarray, grid: tuple[int, int]
) -> list[list[tuple[str, str, float, float]]]:
    """Return whether each group goes with patches of objects or of the background, as AUC.

    Chance is the largest over groups when the masks of other images are put in the place of an
    image's own: what knowing the usual places of objects is worth.
    """
    owner = (patch_labels(masks, grid) > 0).astype(np.int64)
    points = scaled.reshape(-1, scaled.shape[2]).astype(np.float32)
    names = ("background", "object")
    rng = np.random.default_rng(0)

    def auc(owner: np.ndarray) -> list[dict[str, float]]:
        found = concepts.associations(points, owner.ravel(), names, permutations=0, top=None)
        return [{a.name: a.value for a in listed} for listed in found]

    others = [auc(rng.permutation(owner)) for _ in range(PERMUTED)]
    chance = max((v for draw in others for group in draw for v in group.values()), default=0.5)
    return [
        [("patch of", name, value, chance) for name, value in group.items() if value > chance]
        for group in auc(owner)
    ]


def _silence(
    subject: Subject, column: Column, test: ImageSet, labels: Labels
) -> list[concepts.SilenceEffect] | None:
    if not labels:
        return None
    train_labels, test_labels = next(iter(labels.values()))
    try:
        probe = LogisticProbe().fit(column.train.z, train_labels)
    except UserError:  # too few images of some class to choose the penalty on
        return None
    return concepts.silence_effects(probe, column.test.z, test_labels, subject.W.numpy())


def _told(
    effect: concepts.SilenceEffect, test: ImageSet, labels: Labels, store: _Store
) -> dict[str, object]:
    names = test.targets[next(iter(labels))].names
    return {
        "drop": effect.drop,
        "chance": effect.chance,
        # The worst of many classes is bad by chance: random directions say how bad.
        "classes": [
            (names[int(k)], drop)
            for k, drop in effect.classes[:CLASSES]
            if drop > effect.class_chance
        ],
        "images": store(effect.images[:4]),
    }


def _label(test: ImageSet, image: int) -> str:
    """Return the file and the labels of an image, as the page shows them."""
    parts = [test.files[image]] if test.files else [f"test image {image}"]
    parts += [f"{k} {t.names[int(t.values[image])]}" for k, t in list(test.targets.items())[:4]]
    return ", ".join(parts)
