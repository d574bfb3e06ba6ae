"""Every measure of an encoder and its groups, each beside its floors, as rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from sparsejepa.data.store import ImageSet
from sparsejepa.evaluation import disentangle, information
from sparsejepa.evaluation.features import pixel_features
from sparsejepa.evaluation.stats import Estimate, undefined
from sparsejepa.explain import objects
from sparsejepa.explain.columns import (
    ALL,
    CEILING,
    FLOORS,
    KMEANS,
    PCA,
    PLACES,
    RANDOM,
    RUN,
    SHUFFLED,
    UNTRAINED,
    Column,
    Columns,
)
from sparsejepa.explain.concepts import monosemanticity, sparsity
from sparsejepa.explain.objects import pair_information, pair_sharing
from sparsejepa.report.explain import MeasureRow
from sparsejepa.training.quality import rankme

Values = dict[str, Estimate]


def structure_rows(columns: Columns) -> Iterator[MeasureRow]:
    """Sparsity of W. Exact numbers of one matrix: no intervals."""
    about = {
        "density": ("share of (group, latent) blocks that are not zero", ""),
        "groups_per_latent": ("mean number of groups that a latent feeds; 1 is disjoint", "groups"),
        "latents_per_group_min": ("latents that feed the smallest group", "latents"),
        "latents_per_group_max": ("latents that feed the largest group", "latents"),
        "dead_groups": ("groups that no latent feeds", "groups"),
        "usage_entropy": ("entropy of the groups' shares of ||W||^2; 1: all alike", ""),
        "hoyer": ("Hoyer sparseness of a latent's block norms; 1: one group each", ""),
    }
    found = {
        name: sparsity(np.linalg.norm(column.W, axis=1))
        for name, column in columns.items()
        if column.W is not None and name not in FLOORS
    }
    for key, (text, unit) in about.items():
        values = {name: Estimate(float(numbers[key])) for name, numbers in found.items()}
        yield MeasureRow("Sparsity of W", key.replace("_", " "), text, unit, values)


def information_rows(columns: Columns) -> Iterator[MeasureRow]:
    """Collapse and multi-information, of latents and of groups."""
    section = "Information"
    yield MeasureRow(
        section, "RankMe",
        "effective rank of the pooled latents (Garrido et al. 2023); higher uses more dimensions",
        "", {
            name: Estimate(rankme(column.raw))
            for name, column in columns.items()
            if name != PCA
        },
    )  # fmt: skip

    shares = {
        name: variance_shares(column.test.tokens) for name, column in columns.items() if name != PCA
    }
    for i, (name, about) in enumerate(
        {
            "token variance between images": "what all patches of an image have in common; where "
            "this is large, groups of patches tell images apart rather than objects",
            "token variance between places": "what patches at one place have in common",
        }.items()
    ):
        values = {column: Estimate(share[i]) for column, share in shares.items()}
        yield MeasureRow(section, name, f"share of the tokens' variance: {about}", "", values)

    def each(
        measure: Callable[[Column], Estimate], wanted: Callable[[Column], bool] = lambda c: True
    ) -> Values:
        return {name: measure(c) for name, c in columns.items() if wanted(c)}

    yield MeasureRow(
        section, "total correlation, latents",
        "Gaussian-copula multi-information of the pooled latents, bias removed; lower is less "
        "shared. PCA shows what is left without linear dependence",
        "nats",
        each(lambda c: information.total_correlation(c.test.z)),
    )  # fmt: skip
    yield MeasureRow(
        section, "total correlation, groups",
        "the same of the groups' activations ||W^(g) z||, G numbers an image",
        "nats",
        each(
            lambda c: information.total_correlation(c.test.pooled_activations),
            lambda c: c.W is not None,
        ),
    )  # fmt: skip

    yield MeasureRow(
        section, "overlap of W",
        "closed form: multi-information of the groups W^(g) z + 0.1 noise for independent latents "
        "z ~ N(0, I), so what the overlap of W alone creates; 0 for disjoint groups",
        "nats",
        each(
            lambda c: Estimate(information.overlap_information(c.W)),
            lambda c: c.W is not None and c is not columns.get(UNTRAINED),
        ),
    )  # fmt: skip


def variance_shares(tokens: np.ndarray) -> tuple[float, float]:
    """Return the shares of the variance of tokens [m, N, D] between images and between places.

    Variances of the means over an image's patches, and over a place's images, summed over D and
    divided by the whole variance; 0 for constant tokens.
    """
    whole = float(tokens.var((0, 1)).sum()) or 1.0
    return float(tokens.mean(1).var(0).sum()) / whole, float(tokens.mean(0).var(0).sum()) / whole


DISENTANGLEMENT = {
    "mig": ("MIG", "gap between the two units that know most of a factor (Chen et al. 2018)"),
    "sap": ("SAP", "gap between the two units that predict a factor best (Kumar et al. 2018)"),
    "modularity": ("modularity", "does a unit know one factor only (Ridgeway and Mozer 2018)"),
    "explicitness": ("explicitness", "can a linear map read the factors (Ridgeway and Mozer 2018)"),
    "irs": ("IRS", "do units stay put when other factors change (Suter et al. 2019)"),
    "factor_vae": ("FactorVAE score", "does a fixed factor still one unit (Kim and Mnih 2018)"),
    "dci_disentanglement": ("DCI: disentanglement", "each unit predicts one factor (Eastwood and "
                            "Williams 2018), forest of 30 trees"),
    "dci_completeness": ("DCI: completeness", "each factor is predicted by one unit"),
    "dci_informativeness": ("DCI: informativeness", "accuracy of the forest's prediction"),
}  # fmt: skip


def disentanglement_rows(
    columns: Columns, train: np.ndarray, test: np.ndarray, *, quick: bool
) -> Iterator[MeasureRow]:
    """Disentanglement for factors train [n, F] and test, with a latent and with a group as unit.

    A group's columns are its vector W^(g) z.
    """
    levels: dict[str, dict[str, dict[str, Estimate]]] = {"latents": {}, "groups": {}}
    for name, column in columns.items():
        levels["latents"][name] = disentangle.disentanglement(
            column.train.z, train, column.test.z, test, quick=quick
        )
        if column.W is not None:
            G, P, _ = column.W.shape
            vectors = (part.vectors.reshape(-1, G * P) for part in (column.train, column.test))
            mine, held_out = vectors
            levels["groups"][name] = disentangle.disentanglement(
                mine, train, held_out, test, units=np.repeat(np.arange(G), P), quick=quick
            )
    for level, found in levels.items():
        for key, (name, about) in DISENTANGLEMENT.items():
            values = {column: scores[key] for column, scores in found.items() if key in scores}
            if values:
                section = f"Disentanglement, {level} as units"
                yield MeasureRow(section, name, f"{about}; higher is better", "", values)


def factor_rows(
    columns: Columns,
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    random_state: int = 0,
) -> Iterator[MeasureRow]:
    """What single groups know of each factor, given its labels of training and test images.

    The group is chosen on training images, so that the choice does not flatter the test images.
    """
    rng = np.random.default_rng(random_state)
    section = "Groups and factors"
    for factor, (train, test) in factors.items():
        values = {
            name: _best_group(column, train, test)
            for name, column in columns.items()
            if column.W is not None
        }
        values[SHUFFLED] = _best_group(columns[RUN], rng.permutation(train), rng.permutation(test))
        yield MeasureRow(
            section,
            f"I(group; {factor})",
            "mutual information of the factor and the activation of the group that knows most of "
            "it on training images; higher is better. On few images all columns are too high: read "
            "it against the shuffled",
            "nats",
            values,
        )


def purity_rows(columns: Columns, images: ImageSet) -> Iterator[MeasureRow]:
    """How alike the test images are that excite the same group; needs no labels."""
    pixels = pixel_features(images).x
    pixels = pixels - pixels.mean(0)

    def purity(activations: np.ndarray) -> Estimate:
        found = [v for v in monosemanticity(activations, pixels) if v is not None]
        return Estimate(float(np.mean(found))) if found else undefined("no group is ever on")

    values = {
        name: purity(column.test.mean_activations)
        for name, column in columns.items()
        if column.W is not None
    }
    yield MeasureRow(
        "Groups and images",
        "monosemanticity",
        "mean cosine of the centred pixels of images that excite one group (Pach et al. 2025), "
        "mean over groups; higher is purer. Shuffled: a group that is always on",
        "",
        values | {SHUFFLED: purity(np.ones((len(images), 1)))},
    )


def _best_group(column: Column, train: np.ndarray, test: np.ndarray) -> Estimate:
    """I(g; factor) on test images of the group that has most of it on training images."""
    found = [
        information.mutual_information(a, train, resamples=0).value
        for a in column.train.pooled_activations.T
    ]
    best = int(np.argmax([-np.inf if value is None else value for value in found]))
    return information.mutual_information(column.test.pooled_activations[:, best], test)


def object_rows(
    columns: Columns,
    masks: np.ndarray,
    *,
    regions: bool = False,
    random_state: int = 0,
) -> Iterator[MeasureRow]:
    """Groups of patches against object masks [n, H, W] of all test images.

    `regions`: the run's groups are cells of the image, so W gives no map of patches and its columns
    stay empty; what is left are the tokens' own clusters and the information of pairs.
    """
    run = columns[RUN]
    assert run.W is not None
    masks, grid, G = masks[run.test.kept], run.grid, len(run.W)
    n, fitting_tokens = len(masks), run.train.tokens
    groupings = {
        name: objects.assign_patches(column.test.activations[run.test.kept].astype(np.float32))
        for name, column in columns.items()
        if column.W is not None and not regions
    }
    groupings[KMEANS] = objects.kmeans_patches(
        fitting_tokens.reshape(-1, fitting_tokens.shape[2]), run.test.tokens, G, random_state
    )
    groupings[PLACES] = objects.position_blocks(grid, n, G, random_state)
    if not regions:
        groupings[SHUFFLED] = objects.permuted_patches(groupings[RUN], random_state)
    scores = {
        name: objects.object_scores(masks, labels, columns[name].grid if name in columns else grid)
        for name, labels in groupings.items()
    }
    owner = objects.patch_labels(masks, grid)
    # Object pixels alone count for FG-ARI, so there the best cut gives no patch to the background.
    best = objects.object_scores(masks, objects.patch_labels(masks, grid, background=False), grid)
    whole = objects.object_scores(masks, owner, grid)
    scores[CEILING] = {**whole, "fg_ari": best["fg_ari"]}
    about = {
        "fg_ari": (
            "FG-ARI",
            "adjusted Rand index over object pixels (Greff et al. 2019): are pixels of one object, "
            "and only they, in one group; on a coarse grid blocks of places do well",
        ),
        "mbo": ("mBO", "mean IoU of each object with its best segment (Pont-Tuset et al. 2017)"),
    }
    section = "Groups and objects"
    for key, (name, text) in about.items():
        values = {column: found[key] for column, found in scores.items()}
        yield MeasureRow(section, name, f"{text}; higher is better", "", values)
    found = pair_information(run.test.tokens, owner, grid, random_state=random_state)
    about = {
        "within": ("one object", "of the tokens of pairs within an object"),
        "across": ("two objects", "of pairs across objects, at the same distances"),
        "gap": ("gap", "one object less two; above 0: the paper's premise"),
    }
    for key, (name, text) in about.items():
        name, text = f"I(patch; patch), {name}", f"mutual information {text}"
        yield MeasureRow(section, name, text, "nats", {RUN: found[key]})
    pairs = {
        name: pair_sharing(owner, labels, grid, random_state=random_state)
        for name, labels in groupings.items()
        if labels.shape == owner.shape  # a control may have other patches
    }
    about = {
        "within": ("one object", "share of pairs within an object that are in one group"),
        "across": ("two objects", "share of pairs across objects that are, at the same distances"),
        "gap": ("gap", "one object less two; above 0: patches of one object come to share groups"),
    }
    for key, (name, text) in about.items():
        values = {column: shared[key] for column, shared in pairs.items()}
        yield MeasureRow(section, f"same group, {name}", text, "", values)


def prediction_rows(
    overall: Estimate | None, cells: Sequence[Estimate], fitted: Mapping[str, Estimate]
) -> Iterator[MeasureRow]:
    """Held-out R^2 of masked prediction: of the run's own groups, or of fitted ones."""
    section = "Masked prediction"
    if overall is not None:
        yield MeasureRow(
            section, "R² of hidden patches",
            "share of the variance of hidden tokens around their place's mean that the groups "
            "predict from the context; 0 knows the place only",
            "", {RUN: overall},
        )  # fmt: skip
    known = [e.value for e in cells if e.value is not None]
    if known:
        text = f"from {min(known):.2f} to {max(known):.2f} over the {len(cells)} regions"
        yield MeasureRow(
            section, "R² of a region's own patches", f"mean over regions; {text}", "",
            {RUN: Estimate(float(np.mean(known)))},
        )  # fmt: skip
    if fitted:
        names = {"learned": RUN, "random": RANDOM, "unpenalised": ALL}
        yield MeasureRow(
            section, "held-out R² of fitted groups",
            "the groups were fitted to frozen tokens; random zeros: the same fit with as many "
            "connections in random places, which the learned pattern must beat",
            "", {names.get(key, key): value for key, value in fitted.items()},
        )  # fmt: skip
