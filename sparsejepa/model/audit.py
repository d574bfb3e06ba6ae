"""How often a mask sampler uses each patch: exact enumeration, and an audit of what it does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsejepa.model.masks import MaskSampler, Shape, StepPlan, block_indices, cover

MAX_SETS = 1_000_000
"""Sets of M target places per shape that are enumerated at most (four targets: about 12x12)."""
_PARTS, _PART_SETS = 8, 1 << 13  # independent parts of a Monte-Carlo estimate, sets of each
_CHUNK_CELLS = 1 << 20  # sets times patches that are held at once


def _enumerable(sampler: MaskSampler) -> bool:
    rows, cols = sampler.grid_size
    return all(
        math.comb((rows - h + 1) * (cols - w + 1), sampler.num_targets) <= MAX_SETS
        for h, w in sampler.target_shapes
    )


def _sets(
    places: int, targets: int, chunk: int, random: np.random.Generator | None
) -> Iterator[np.ndarray]:
    """Yield all sets of `targets` places, or random ones, int [at most chunk, M]."""
    if random is None:
        every = combinations(range(places), targets)
        while part := list(islice(every, chunk)):
            yield np.array(part)
    else:
        for _ in range(0, _PART_SETS, chunk):
            keys = random.random((min(chunk, _PART_SETS), places))
            yield np.argpartition(keys, targets - 1, axis=1)[:, :targets]


def _coverage(sampler: MaskSampler, random: np.random.Generator | None) -> np.ndarray:
    """Return P(patch is context) and P(it is a target) under each plan, [2, plans, N].

    Over all sets of target places, or over random ones. The choice among candidates is exact: the
    first feasible one is distributed as a candidate given that it is feasible, and all T - 1 fail
    together with probability (1 - P(feasible))^(T - 1).
    """
    grid, patches, tries = sampler.grid_size, math.prod(sampler.grid_size), sampler.candidates - 1
    chunk = max(1, _CHUNK_CELLS // patches)
    found: dict[StepPlan, list[np.ndarray]] = {}
    for shape in sampler.target_shapes:
        plans = [plan for plan in sampler.plans if plan.target == shape]
        covered = cover(block_indices(grid, shape), patches).numpy()  # [P, N]
        blocks = {p.context: cover(block_indices(grid, p.context), patches).numpy() for p in plans}
        total, feasible = 0, dict.fromkeys(plans, 0.0)
        context = {plan: np.zeros(patches) for plan in plans}
        target = {plan: np.zeros(patches) for plan in plans}
        for sets in _sets(len(covered), sampler.num_targets, chunk, random):
            total += len(sets)
            hidden = covered[sets].any(1).astype(np.float64)  # [chunk, N]
            shown = 1 - hidden
            visible = {s: shown @ block.T for s, block in blocks.items()}  # counts [chunk, Q]
            for plan in plans:
                block, seen = blocks[plan.context], visible[plan.context]
                enough = seen >= plan.count
                feasible[plan] += float(enough.mean(1).sum())
                taken = np.where(enough, plan.count / np.maximum(seen, 1), 0)  # share in context
                context[plan] += (taken.T @ shown * block).mean(0)
                kept, added = _merged(sampler, plan, hidden.sum(1))
                target[plan] += (kept * enough.mean(1)) @ hidden
                target[plan] += (added * enough.mean(1)) @ shown
                target[plan] -= ((added[:, None] * taken).T @ shown * block).mean(0)
        single = covered.mean(0)  # the last resort: one place for all M blocks, the whole grid
        for plan in plans:
            none = (1 - feasible[plan] / total) ** tries
            given = (1 - none) / feasible[plan] if feasible[plan] else 0.0
            left = plan.count / (patches - math.prod(shape))
            kept, added = _merged(sampler, plan, np.array(math.prod(shape)))
            found[plan] = [
                given * context[plan] + none * left * (1 - single),
                given * target[plan] + none * (kept * single + added * (1 - left) * (1 - single)),
            ]
    return np.array([found[plan] for plan in sampler.plans]).swapaxes(0, 1)


def _merged(
    sampler: MaskSampler, plan: StepPlan, covered: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities that a target holds a patch of its blocks, and another hidden one.

    `covered`: how many patches the blocks cover. 1 and 0 unless targets are merged.
    """
    if sampler.union is None:
        return np.ones(covered.shape), np.zeros(covered.shape)
    size, others = sampler.union[plan], math.prod(sampler.grid_size) - plan.count - covered
    return np.minimum(1, size / covered), (size - covered).clip(0) / np.maximum(others, 1)


@dataclass(frozen=True)
class UseAudit:
    """How often each patch was used in one role; all arrays [N], float64, row by row.

    `share` of the images in which it was used, its probability `expected`, and their difference in
    standard errors: `z`, and sharper `z_given_plans`, against the probability given the shapes and
    counts that were drawn.
    """

    share: np.ndarray
    expected: np.ndarray
    z: np.ndarray
    z_given_plans: np.ndarray

    @property
    def worst_z(self) -> float:
        """Largest deviation from the expectation, in standard errors."""
        return float(max(abs(self.z).max(), abs(self.z_given_plans).max()))


@dataclass(frozen=True)
class CoverageAudit:
    """What `audit` found."""

    grid_size: tuple[int, int]
    images: int
    context: UseAudit
    target: UseAudit
    exact: bool
    """Whether the expectation was enumerated; otherwise it is a Monte-Carlo estimate."""
    counts_right: bool
    """Every image had exactly the planned number of context patches, all different."""
    blocks_whole: bool
    """Every target was a whole block of the planned shape; merged, as many patches as planned."""
    disjoint: bool
    """No context patch was in a target."""

    @property
    def z_limit(self) -> float:
        """Standard errors allowed: 4, or more above 64 patches, of which some stray by chance."""
        tail = NormalDist().cdf(-4) * min(1.0, 64 / self.context.share.size)
        return -NormalDist().inv_cdf(tail)

    @property
    def passed(self) -> bool:
        """Whether every image was right and no patch strays by more than `z_limit`."""
        right = self.counts_right and self.blocks_whole and self.disjoint
        return right and max(self.context.worst_z, self.target.worst_z) <= self.z_limit

    def summary(self) -> dict[str, Any]:
        """Return the findings as plain numbers, for a table or JSON."""
        found: dict[str, Any] = {
            "passed": self.passed,
            "grid_size": list(self.grid_size),
            "images": self.images,
            "reference": "exact enumeration" if self.exact else "Monte Carlo",
        }
        for name, use in {"context": self.context, "target": self.target}.items():
            found[f"{name}_worst_z"] = use.worst_z
            found[f"{name}_min_over_max"] = float(use.expected.min() / use.expected.max())
        names = ("z_limit", "counts_right", "blocks_whole", "disjoint")
        return found | {name: getattr(self, name) for name in names}


def audit(
    sampler: MaskSampler, *, batch_size: int = 256, batches: int = 400, seed: int = 0
) -> CoverageAudit:
    """Draw `batches` steps of masks and compare them with what the sampler should do.

    Images of a step share shapes and count, so their uses are not independent. With p_i(q) the
    probability that patch i is used under plan q, a share over S steps of B images has variance
    (Var_q p_i + E_q p_i (1 - p_i) / B) / S; given the plans drawn it has the second part only. p is
    enumerated over every plan, set of M target places and place of the context block; beyond a
    million sets it is a Monte-Carlo estimate over random ones, whose own variance is added.
    """
    exact, random = _enumerable(sampler), np.random.default_rng(seed)
    count = 1 if exact else _PARTS
    parts = np.array([_coverage(sampler, None if exact else random) for _ in range(count)])
    plans, patches = list(sampler.plans), math.prod(sampler.grid_size)
    drawn = np.array([plans.index(sampler.plan(seed=seed, step=step)) for step in range(batches)])
    share = np.zeros((2, patches))
    counts_right = blocks_whole = disjoint = True
    for step, plan in enumerate(plans[i] for i in drawn):
        masks = sampler.sample(batch_size, seed=seed, step=step)
        context = torch.zeros(batch_size, patches).scatter_(1, masks.context, 1.0)
        target = torch.zeros(batch_size, patches).scatter_(1, masks.targets.flatten(1), 1.0)
        counts_right &= bool((context.sum(1) == plan.count).all())
        if sampler.union is None:
            blocks_whole &= _whole_blocks(masks.targets, sampler, plan.target)
        else:
            blocks_whole &= bool((target.sum(1) == sampler.union[plan]).all())
        disjoint &= not bool((context * target).any())
        share += np.stack([context.mean(0), target.mean(0)]) / batches
    weights = np.array(list(sampler.plans.values()))

    def compare(share: np.ndarray, estimates: np.ndarray) -> UseAudit:
        """`share` [N] of the images; `estimates` [parts, plans, N] of the probability."""
        p = estimates.mean(0)
        slack = 0.0 if exact else estimates.var(0, ddof=1).max(0) / _PARTS
        expected = weights @ p
        between, within = weights @ (p - expected) ** 2, p * (1 - p) / batch_size
        return UseAudit(
            share,
            expected,
            _ratio(share - expected, (between + weights @ within) / batches + slack),
            _ratio(share - p[drawn].mean(0), within[drawn].mean(0) / batches + slack),
        )

    return CoverageAudit(
        grid_size=sampler.grid_size,
        images=batch_size * batches,
        context=compare(share[0], parts[:, 0]),
        target=compare(share[1], parts[:, 1]),
        exact=exact,
        counts_right=counts_right,
        blocks_whole=blocks_whole,
        disjoint=disjoint,
    )


def _whole_blocks(targets: Tensor, sampler: MaskSampler, shape: Shape) -> bool:
    """Return whether `targets` [B, M, K] are M rectangles of `shape` per image, row by row."""
    cols, step = sampler.grid_size[1], torch.arange(math.prod(shape))
    row, col = targets // cols, targets % cols
    return targets.shape[1:] == (sampler.num_targets, len(step)) and bool(
        (row - row[..., :1] == step // shape[1]).all()
        and (col - col[..., :1] == step % shape[1]).all()
    )


def _ratio(difference: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return difference / sqrt(variance); 0 where both vanish, infinite if only the second does."""
    same = (variance <= 1e-20) & (abs(difference) < 1e-9)
    with np.errstate(divide="ignore"):
        return np.where(same, 0.0, difference / np.sqrt(np.where(same, 1.0, variance)))
