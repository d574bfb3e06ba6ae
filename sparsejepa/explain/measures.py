"""One table: every measure of an encoder and its groups, each beside its floors.

`SECTIONS` lists the parts of the table. Each is a function that takes a `Reading` and yields rows;
metrics.json, the page and the terminal all show these rows. A new measure is a line in `ABOUT` and
a number in its section's function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sparsejepa.data.images import DeviceImages, ImageSet
from sparsejepa.errors import UserError
from sparsejepa.evaluation.classifiers import LogisticProbe
from sparsejepa.evaluation.disentangle import disentanglement
from sparsejepa.evaluation.information import (
    mutual_information,
    overlap_information,
    total_correlation,
)
from sparsejepa.evaluation.stats import Estimate, bootstrap_weights, from_draws
from sparsejepa.explain import objects
from sparsejepa.explain.concepts import SilenceEffect, silence_effects
from sparsejepa.explain.options import Options
from sparsejepa.explain.readout import (
    ALL,
    CEILING,
    DIRECTIONS,
    FITTED_IMAGES,
    KMEANS,
    PCA,
    PLACES,
    RANDOM,
    RUN,
    SHUFFLED,
    UNTRAINED,
    Column,
    Columns,
    Subject,
    fitting_tokens,
    read_tokens,
)
from sparsejepa.model.jepa import make_targets
from sparsejepa.training.build import build_sampler
from sparsejepa.training.monitor import rankme

PREDICTED_IMAGES = 1_000
"""Images whose hidden patches are predicted, at most."""

Values = Mapping[str, Estimate]
Labels = dict[str, tuple[np.ndarray, np.ndarray]]
"""Values of the training and of the test images, [n] and [n'], by target."""


@dataclass(frozen=True)
class Row:
    """One measure; `values` maps a column's name to its estimate, where the column has one."""

    section: str
    name: str
    about: str
    """One line: what it is, where it comes from, whether up or down is better."""
    unit: str
    values: Values


@dataclass(frozen=True)
class Reading:
    """A subject and its floors, read on images: what the sections measure."""

    subject: Subject
    options: Options
    train: ImageSet
    test: ImageSet
    labels: Labels
    columns: Columns

    @cached_property
    def silenced(self) -> list[SilenceEffect] | None:
        """What a probe of the first label loses without each group; None if there is no probe."""
        if not self.labels:
            return None
        train, test = next(iter(self.labels.values()))
        run = self.columns[RUN]
        try:
            probe = LogisticProbe().fit(run.train.z, train)
        except UserError:  # too few images of some class to choose the penalty on
            return None
        return silence_effects(probe, run.test.z, test, self.subject.W)


HIDDEN, FITTED_R2 = "R² of hidden patches", "held-out R² of fitted groups"
SILENCED = "accuracy lost by silencing a group"
GROUP_UNITS = "Disentanglement, groups as units"
ABOUT = {
    "density": "share of (group, latent) blocks that are not zero",
    "groups per latent": "mean number of groups that a latent feeds; 1 is disjoint",
    "latents per group min": "latents that feed the smallest group",
    "latents per group max": "latents that feed the largest group",
    "dead groups": "groups that no latent feeds",
    "RankMe": "effective rank of the pooled latents (Garrido et al. 2023); higher uses more "
    "dimensions",
    "total correlation, latents": "Gaussian-copula multi-information of the pooled latents, bias "
    "removed; lower is less shared. PCA shows what is left without linear dependence",
    "total correlation, groups": "the same of the groups' activations ||W^(g) z||, G numbers an "
    "image",
    "overlap of W": "closed form: multi-information of the groups W^(g) z + 0.1 noise for "
    "independent latents z ~ N(0, I), so what the overlap of W alone creates; 0 for disjoint "
    "groups",
    HIDDEN: "share of the variance of hidden tokens around their place's mean that "
    "the groups predict from the context; 0 knows the place only",
    FITTED_R2: "the groups were fitted to frozen tokens; random zeros: the "
    "same fit with as many connections in random places, which the learned pattern must beat",
    "MIG": "gap between the two units that know most of a factor (Chen et al. 2018); higher is "
    "better",
    "DCI: disentanglement": "each unit predicts one factor (Eastwood and Williams 2018), forest of "
    "30 trees; higher is better",
    "DCI: completeness": "each factor is predicted by one unit; higher is better",
    "DCI: informativeness": "accuracy of the forest's prediction; higher is better",
    "FG-ARI": "adjusted Rand index over object pixels (Greff et al. 2019): are pixels of one "
    "object, and only they, in one group; on a coarse grid blocks of places do well; higher is "
    "better",
    "mBO": "mean IoU of each object with its best segment (Pont-Tuset et al. 2017); higher is "
    "better",
    "I(patch; patch), one object": "mutual information of the tokens of pairs within an object",
    "I(patch; patch), two objects": "mutual information of pairs across objects, at the same "
    "distances",
    "I(patch; patch), gap": "one object less two; above 0: the paper's premise",
    "same group, one object": "share of pairs within an object that are in one group",
    "same group, two objects": "share of pairs across objects that are, at the same distances",
    "same group, gap": "one object less two; above 0: patches of one object come to share groups",
}
"""What each measure is, where it comes from, and whether up or down is better."""
NATS = ("total correlation", "overlap", "I(")
"""What the names of measures in nats begin with; all others have no unit."""


def make_rows(section: str, found: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Yield a row per measure of `ABOUT` from numbers or estimates by column, then by measure."""
    for name, about in ABOUT.items():
        values = {
            column: e if isinstance(e := numbers[name], Estimate) else Estimate(float(e))
            for column, numbers in found.items()
            if name in numbers
        }
        if values:
            yield Row(section, name, about, "nats" if name.startswith(NATS) else "", values)


def sparsity_rows(x: Reading) -> Iterator[Row]:
    """Sparsity of W. Exact numbers of one matrix: no intervals, and no floors."""
    on = x.subject.norms > 0
    per_group = on.sum(1)
    found = {
        "density": on.mean(),
        "groups per latent": on.sum(0).mean(),
        "latents per group min": per_group.min(),
        "latents per group max": per_group.max(),
        "dead groups": (per_group == 0).sum(),
    }
    yield from make_rows("Sparsity of W", {RUN: found})


def information_rows(x: Reading) -> Iterator[Row]:
    """Collapse and multi-information, of latents and of groups."""
    found: dict[str, dict[str, Any]] = {}
    for name, column in x.columns.items():
        z, scale = column.test.z, column.scale
        numbers = found[name] = {"total correlation, latents": total_correlation(z)}
        if name != PCA:  # it shares the run's latents
            raw = z * scale.pooled_std.numpy() + scale.pooled_mean.numpy()
            numbers["RankMe"] = rankme(raw)
        numbers["total correlation, groups"] = total_correlation(column.test.activations)
        if name != UNTRAINED:  # it has the run's W
            numbers["overlap of W"] = overlap_information(column.W)
    yield from make_rows("Information", found)


def prediction_rows(x: Reading) -> Iterator[Row]:
    """Held-out R^2 of masked prediction: of the run's own groups, or of fitted ones."""
    section, subject = "Masked prediction", x.subject
    if subject.groups is not None and subject.config is not None:
        found = masked_r2(subject, x.test.subset(PREDICTED_IMAGES))
        yield from make_rows(section, {RUN: {HIDDEN: found}})
    elif subject.estimator is not None and not x.options.quick:
        scores = subject.estimator.random_pattern_scores(
            fitting_tokens(subject.encoder, x.train, FITTED_IMAGES),
            fitting_tokens(subject.encoder, x.test, FITTED_IMAGES // 2),
        )
        fits = scores["random"]
        chance = Estimate(sum(fits) / len(fits), min(fits), max(fits), f"range of {len(fits)} fits")
        numbers = {RUN: scores["learned"], RANDOM: chance, ALL: scores["unpenalised"]}
        yield from make_rows(section, {name: {FITTED_R2: e} for name, e in numbers.items()})


@torch.no_grad()
def masked_r2(
    subject: Subject, images: ImageSet, *, batch_size: int = 128, resamples: int = 200
) -> Estimate:
    """Return R^2 of the predictions of hidden patches by the groups that a run was trained with.

    As in training, the groups see the latents of the context alone and predict the run's targets,
    by default the normalised tokens of the whole image; the EMA encoder serves as context and as
    target encoder. SST is around the mean token of each *place*: to know where a patch lies scores
    0. The interval resamples images.
    """
    assert subject.groups is not None and subject.config is not None
    encoder, device = subject.encoder, subject.encoder.device
    model: Any = encoder.model
    groups = subject.groups.to(device)
    source = DeviceImages(images, device)
    sampler = build_sampler(subject.config, encoder.grid_size)
    N = encoder.grid_size[0] * encoder.grid_size[1]

    targets, errors = [], []
    for step, index in enumerate(torch.arange(len(images)).split(batch_size)):
        pixels = encoder.pixels(source.take(index))
        masks = sampler.sample(len(index), seed=0, step=step, device=device)
        hidden = torch.ones(len(index), N, device=device).scatter_(1, masks.context, 0)
        query = hidden.argsort(dim=1, descending=True, stable=True)
        query = query[:, : N - masks.context.shape[1]]
        target = make_targets(model, pixels, subject.config.loss.predict)
        wanted = target.gather(1, query[..., None].expand(-1, -1, target.shape[-1]))
        predicted = groups(model(pixels, masks.context), masks.context, query)
        error = (predicted - wanted).square().sum(-1)
        errors.append(torch.full_like(hidden, torch.nan).scatter_(1, query, error).cpu())
        targets.append(target.half().cpu())
    wanted, error = torch.cat(targets).float(), torch.cat(errors)  # error: NaN at the context
    spread = (wanted - wanted.mean(0)).square().sum(-1).masked_fill(error.isnan(), 0)
    # Sums over the places of each image, [n].
    top, bottom = (x.double().numpy().sum(1) for x in (error.nan_to_num(), spread))
    weights = bootstrap_weights(len(images), resamples)
    draws = 1 - weights @ top / np.maximum(weights @ bottom, 1e-12)
    return from_draws(1 - top.sum() / max(bottom.sum(), 1e-12), draws)


def disentanglement_rows(x: Reading) -> Iterator[Row]:
    """Disentanglement of the labels, with a latent and with a group as unit of the code.

    A group's columns are its vector W^(g) z. Labels that follow from another are left out.
    """
    kept = independent(x.labels)[0]
    if not kept:
        return
    train, test = (np.stack([pair[i] for pair in kept.values()], 1) for i in (0, 1))

    def scores(mine: np.ndarray, held_out: np.ndarray, units: Any = None) -> dict[str, Estimate]:
        found = disentanglement(mine, train, held_out, test, units=units, quick=x.options.quick)
        return {name: found[key] for key, name in DISENTANGLEMENT.items() if key in found}

    latents, groups = {}, {}
    for name, column in x.columns.items():
        G, P, _ = column.W.shape
        both = (part.vectors.reshape(-1, G * P) for part in (column.train, column.test))
        latents[name] = scores(column.train.z, column.test.z)
        groups[name] = scores(*both, units=np.repeat(np.arange(G), P))
    yield from make_rows("Disentanglement, latents as units", latents)
    yield from make_rows(GROUP_UNITS, groups)


DISENTANGLEMENT = {
    "mig": "MIG",
    "dci_disentanglement": "DCI: disentanglement",
    "dci_completeness": "DCI: completeness",
    "dci_informativeness": "DCI: informativeness",
}
"""How the table calls what `disentanglement` gives."""


def independent(labels: Labels) -> tuple[Labels, list[str]]:
    """Leave out labels that follow from an earlier one: no code could tell them apart.

    Returns those that are kept, and a line about each of the others.
    """
    kept: Labels = {}
    left_out = []
    for name, (train, test) in labels.items():
        finer = next((k for k, (other, _) in kept.items() if _follows(train, other)), None)
        if finer is None:
            kept[name] = train, test
        else:
            left_out.append(
                f"'{name}' follows from '{finer}' and is left out of disentanglement, which is for "
                "factors that vary on their own."
            )
    return kept, left_out


def _follows(coarse: np.ndarray, fine: np.ndarray) -> bool:
    pairs = np.unique(np.stack([coarse, fine]), axis=1)
    return pairs.shape[1] == len(np.unique(fine))


def factor_rows(x: Reading) -> Iterator[Row]:
    """What single groups know of each factor.

    The group is chosen on training images, so that the choice does not flatter the test images.
    """
    rng = np.random.default_rng(x.options.seed)
    for factor, (train, test) in x.labels.items():
        values = {name: _best_group(column, train, test) for name, column in x.columns.items()}
        shuffled = rng.permutation(train), rng.permutation(test)
        values[SHUFFLED] = _best_group(x.columns[RUN], *shuffled)
        yield Row(
            "Groups and factors",
            f"I(group; {factor})",
            "mutual information of the factor and the activation of the group that knows most of "
            "it on training images; higher is better. On few images all columns are too high: read "
            "it against the shuffled",
            "nats",
            values,
        )


def _best_group(column: Column, train: np.ndarray, test: np.ndarray) -> Estimate:
    """I(g; factor) on test images of the group that has most of it on training images."""
    found = [mutual_information(a, train, resamples=0).value for a in column.train.activations.T]
    best = int(np.argmax([-np.inf if value is None else value for value in found]))
    return mutual_information(column.test.activations[:, best], test)


def silencing_rows(x: Reading) -> Iterator[Row]:
    """What a linear probe loses when what one group reads is projected out."""
    if x.silenced is None:
        return
    draws = np.mean([s.draws for s in x.silenced], axis=0)
    drop = float(np.mean([s.drop.value or 0.0 for s in x.silenced]))
    chance = Estimate(float(np.mean([s.chance for s in x.silenced])))
    yield Row(
        "Groups and factors",
        SILENCED,
        f"share of {next(iter(x.labels))} labels that a linear probe no longer gets when what one "
        "group reads is projected out, mean over groups; random directions: of equal rank",
        "",
        {RUN: from_draws(drop, draws), DIRECTIONS: chance},
    )


def object_rows(x: Reading) -> Iterator[Row]:
    """Groups of patches against the object masks of the test images, where there are any.

    Region groups are cells of the image: W gives no map of patches then and no column has one.
    """
    if x.test.masks is None:
        return
    encoder, seed, G = x.subject.encoder, x.options.seed, len(x.subject.W)
    grid, scale = encoder.grid_size, x.columns[RUN].scale
    kept, tokens = read_tokens(encoder, x.test, scale)
    groupings: dict[str, np.ndarray] = {}  # the group of each patch, [m, N]
    if x.subject.kind != "region":
        for name, column in x.columns.items():
            groupings[name] = objects.assign_patches(column.patches[kept].astype(np.float32))
    train = read_tokens(encoder, x.train, scale, part=2)[1]
    groupings[KMEANS] = objects.kmeans_patches(train.reshape(-1, train.shape[2]), tokens, G, seed)
    groupings[PLACES] = objects.position_blocks(grid, len(kept), G, seed)
    if RUN in groupings:
        groupings[SHUFFLED] = np.random.default_rng(seed).permuted(groupings[RUN], axis=1)

    masks = x.test.masks[kept]
    owner = objects.patch_labels(masks, grid)
    found: dict[str, dict[str, Estimate]] = {}
    for name, labels in groupings.items():
        found[name] = objects.object_scores(masks, labels, grid)
        shared = objects.pair_sharing(owner, labels, grid, seed)
        found[name] |= {f"same group, {key}": e for key, e in shared.items()}
    # Object pixels alone count for FG-ARI, so there the best cut gives no patch to the background.
    best = objects.patch_labels(masks, grid, background=False)
    found[CEILING] = objects.object_scores(masks, owner, grid)
    found[CEILING]["FG-ARI"] = objects.object_scores(masks, best, grid)["FG-ARI"]
    pairs = objects.pair_information(tokens, owner, grid, seed)
    known = {f"I(patch; patch), {key}": e for key, e in pairs.items()}
    found[RUN] = found.get(RUN, {}) | known
    yield from make_rows("Groups and objects", found)


SECTIONS: dict[str, Callable[[Reading], Iterator[Row]]] = {
    "sparsity of W": sparsity_rows,
    "information": information_rows,
    "masked prediction": prediction_rows,
    "disentanglement": disentanglement_rows,
    "groups and factors": factor_rows,
    "silencing groups": silencing_rows,
    "groups and objects": object_rows,
}
"""The sections of the table by what they are called while they are measured."""
