"""One card per group: what feeds it, what excites it, what it goes with, what it is good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsejepa.evaluation.stats import Estimate
from sparsejepa.explain import concepts
from sparsejepa.explain.measures import Reading
from sparsejepa.explain.readout import evenly

EXPLORED = 36
"""Images that are shown with the groups of their patches."""
SHOWN = 320
"""Images of all cards, about: the more groups there are, the fewer each shows."""
LATENTS, LABELS = 12, 5
"""What a card lists at most."""


@dataclass(frozen=True)
class Card:
    """What is shown of one group. Images are indices of the test images."""

    index: int
    dead: bool
    duplicate_of: int | None
    on: float
    """Share of patches at which it is above its root mean square."""
    latents: Sequence[tuple[int, float]]
    """(latent, ||W_gj||), strongest first; `num_latents` counts all that are not zero."""
    num_latents: int
    labels: Sequence[tuple[str, str, float, float]]
    """(target, label, AUC, its chance level), those furthest above chance first."""
    top_patches: Sequence[tuple[int, int, float]]
    """(image, patch, activation over rms), strongest first; none of regions."""
    top_images: Sequence[int]
    drop: Estimate | None
    """Share of labels that a probe no longer gets without it; None: not measured."""
    drop_chance: float | None
    """The same for random directions of equal rank."""
    cell: Sequence[int]
    """The patches that a region group predicts, else empty."""
    monosemanticity: float | None


@dataclass(frozen=True)
class Gallery:
    """The cards of all groups and the images that they refer to."""

    cards: list[Card]
    explorer: list[int]
    """Test images whose patches are coloured by group."""
    shown: list[int]
    """All test images that the page needs, ascending."""
    activations: np.ndarray
    """[m, N, G] of those images, ||W^(g) z|| over the group's rms; [m, 1, G] of regions, which have
    one value an image."""


def patch_maps(x: Reading) -> np.ndarray:
    """Return the activations of test images that maps show, [n, N, G]; of regions [n, 1, G].

    A region group reads the pooled latents and predicts a fixed cell: it has no map of patches.
    """
    if x.subject.kind == "region":
        return x.run.test.pooled_activations[:, None]
    return x.run.test.activations


def make_gallery(x: Reading) -> Gallery:
    """Look at every group of a run."""
    G, norms, cells = len(x.subject.W), x.subject.norms, x.subject.cells()
    activations = patch_maps(x)
    statistics = concepts.group_statistics(activations)
    scaled = activations / np.where(statistics.dead, 1, statistics.rms).astype(activations.dtype)
    scaled[:, :, statistics.dead] = 0
    means = scaled.mean(1, dtype=np.float32)  # [n, G]
    sample = np.random.default_rng(0).choice(len(scaled), min(len(scaled), 1_000), replace=False)
    points = scaled[np.sort(sample)].reshape(-1, G).astype(np.float32)
    repeats = concepts.duplicate_groups(points)
    purity = concepts.monosemanticity(means, x.look)
    associated = _associations(means, x)
    each = int(np.clip(SHOWN // (4 * G), 3, 8))
    cards = []
    for g in range(G):
        fed = np.flatnonzero(norms[g])
        strongest = fed[np.argsort(-norms[g, fed], kind="stable")][:LATENTS]
        best = scaled[:, :, g].max(1).astype(np.float32)
        patches = np.argsort(-best, kind="stable")[:each]
        whole = np.argsort(-means[:, g], kind="stable")[:each]
        dead = bool(statistics.dead[g])
        effect = None if x.silenced is None or dead else x.silenced[g]
        cards.append(
            Card(
                index=g,
                dead=dead,
                duplicate_of=None if dead else repeats[g],
                on=float(statistics.on[g]),
                latents=[(int(j), float(norms[g, j])) for j in strongest],
                num_latents=len(fed),
                labels=[] if dead else associated[g],
                top_patches=[]
                if dead or cells[g]
                else [(int(n), int(scaled[n, :, g].argmax()), float(best[n])) for n in patches],
                top_images=[] if dead else whole.tolist(),
                drop=effect and effect.drop,
                drop_chance=effect and effect.chance,
                cell=cells[g],
                monosemanticity=purity[g],
            )
        )
    explorer = evenly(len(x.test), EXPLORED).tolist()
    shown = {*explorer}.union(*(c.top_images for c in cards))
    shown |= {image for card in cards for image, _, _ in card.top_patches}
    order = sorted(shown)
    return Gallery(cards, explorer, order, scaled[order].astype(np.float32))


def _associations(means: np.ndarray, x: Reading) -> list[list[tuple[str, str, float, float]]]:
    """Return each group's labels over all targets, those furthest above chance first."""
    result: list[list[tuple[str, str, float, float]]] = [[] for _ in means.T]
    for target, (_, values) in x.labels.items():
        found = concepts.associations(means, values, x.test.targets[target].names, top=LABELS)
        for listed, mine in zip(found, result, strict=True):
            mine += [(target, a.name, a.value, a.chance) for a in listed if a.exceeds]
    return [sorted(m, key=lambda a: (a[3] - a[2]) / max(a[3] - 0.5, 1e-9))[:LABELS] for m in result]
