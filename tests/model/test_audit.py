"""Exact coverage against brute force, and an audit that finds what is wrong and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest
import torch

from sparsejepa.model import audit as auditing
from sparsejepa.model.audit import audit
from sparsejepa.model.masks import Masks, MaskSampler


def exact_coverage(sampler: MaskSampler) -> tuple[np.ndarray, np.ndarray]:
    """Each patch's enumerated probability of being context, and of being a target, [N] each."""
    found = audit(sampler, batch_size=2, batches=1)
    assert found.exact
    return found.context.expected, found.target.expected


def rectangles(grid: tuple[int, int], shape: tuple[int, int]) -> list[frozenset[int]]:
    return [
        frozenset((top + r) * grid[1] + left + c for r in range(shape[0]) for c in range(shape[1]))
        for top in range(grid[0] - shape[0] + 1)
        for left in range(grid[1] - shape[1] + 1)
    ]


def brute_force(sampler: MaskSampler) -> tuple[np.ndarray, np.ndarray]:
    """Play every sequence of candidates, target places in every order, in plain Python."""
    grid = sampler.grid_size
    patches = frozenset(range(grid[0] * grid[1]))
    context, target = np.zeros(len(patches)), np.zeros(len(patches))
    for plan, probability in sampler.plans.items():
        places = rectangles(grid, plan.target)
        drawn = [
            (frozenset().union(*blocks), block)
            for blocks in permutations(places, sampler.num_targets)
            for block in rectangles(grid, plan.context)
        ]
        resorts = [(place, patches) for place in places]
        sequences = list(product(*[drawn] * (sampler.candidates - 1), resorts))
        for sequence in sequences:
            hidden, visible = next(
                (hidden, block - hidden)
                for hidden, block in sequence
                if len(block - hidden) >= plan.count
            )
            weight = probability / len(sequences)
            seen = np.zeros(len(patches))
            seen[list(visible)] = plan.count / len(visible)
            context += weight * seen
            size = len(hidden) if sampler.union is None else sampler.union[plan]
            rest = list(patches - hidden)
            others = max(1, len(rest) - plan.count)
            target[list(hidden)] += weight * min(1, size / len(hidden))
            target[rest] += weight * max(0, size - len(hidden)) / others * (1 - seen[rest])
    return context, target


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        ((3, 3), {"num_targets": 2, "target_scale": (0.4, 0.5), "context_counts": (2, 3)}),
        ((3, 3), {"num_targets": 1, "context_scale": (0.4, 1.0), "context_counts": (3, 4)}),
        ((2, 4), {"num_targets": 2, "target_scale": (0.2, 0.5), "context_counts": (1, 2)}),
        ((3, 4), {"num_targets": 2, "target_aspect_ratio": (0.5, 0.5), "context_counts": (8,)}),
        ((3, 3), dict(num_targets=2, context_counts=(2,), target_scale=(0.2, 0.3), merge=True)),
    ],
)
def test_exact_coverage_against_brute_force(grid: tuple[int, int], settings: dict) -> None:
    sampler = MaskSampler(grid, candidates=2 if "merge" in settings else 3, **settings)
    for ours, brute in zip(exact_coverage(sampler), brute_force(sampler), strict=True):
        np.testing.assert_allclose(ours, brute, atol=1e-12)


def test_exact_coverage_of_8x8_in_closed_form() -> None:
    """A count that every set of places allows: P(target) = 1 - C(P - p, 4) / C(P, 4)."""
    sampler = MaskSampler((8, 8), context_counts=(16,))  # 4 * 12 hidden patches leave 16
    context, target = exact_coverage(sampler)
    expected = np.zeros((8, 8))
    for (h, w), share in (((3, 3), 0.5), ((3, 4), 0.25), ((4, 3), 0.25)):
        rows = np.array([sum(r - h < top <= r for top in range(9 - h)) for r in range(8)])
        cols = np.array([sum(c - w < left <= c for left in range(9 - w)) for c in range(8)])
        through, places = np.outer(rows, cols), (9 - h) * (9 - w)
        missed = np.prod([(places - through - k) / (places - k) for k in range(4)], axis=0)
        expected += share * (1 - missed)
    np.testing.assert_allclose(target.reshape(8, 8), expected, atol=1e-12)
    assert context.sum() == pytest.approx(16)


def test_audit_on_8x8_meets_the_requirement() -> None:
    found = audit(MaskSampler((8, 8)), batch_size=256, batches=400, seed=0)
    assert found.exact and found.passed
    assert found.z_limit == pytest.approx(4)
    assert found.counts_right and found.blocks_whole and found.disjoint
    for use in (found.context, found.target):
        assert abs(use.z).max() < 4 and abs(use.z_given_plans).max() < 4
        assert use.expected.min() >= 0.15 * use.expected.max()
    assert found.summary()["images"] == 102_400


def test_audit_without_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit the expectation is a Monte-Carlo estimate, close to the exact one."""
    sampler = MaskSampler((8, 8))
    exact = exact_coverage(sampler)
    monkeypatch.setattr(auditing, "MAX_SETS", 10)
    found = audit(sampler, batch_size=32, batches=20, seed=0)
    assert not found.exact and found.passed
    assert found.summary()["reference"] == "Monte Carlo"
    for use, wanted in zip((found.context, found.target), exact, strict=True):
        np.testing.assert_allclose(use.expected, wanted, atol=0.006)


def test_standard_errors_are_right() -> None:
    """Over many audits each kind of z has mean square 1, clustering by step included."""
    sampler = MaskSampler((4, 5), context_counts=(4, 9))
    audits = [audit(sampler, batch_size=24, batches=16, seed=seed) for seed in range(120)]
    for role in ("context", "target"):
        uses = [getattr(found, role) for found in audits]
        for kind in ("z", "z_given_plans"):
            square = np.mean([getattr(use, kind) ** 2 for use in uses])
            assert square == pytest.approx(1, abs=0.2), (role, kind)
    # The shares spread far more than they would if all images were independent.
    shares = np.array([found.context.share for found in audits])
    p = audits[0].context.expected
    assert (shares.var(0) / (p * (1 - p) / (24 * 16))).mean() > 1.5


@pytest.mark.parametrize("scale", [(0.85, 1.0), (0.6, 0.6)])
def test_audit_of_merged_targets(scale: tuple[float, float]) -> None:
    sampler = MaskSampler((8, 8), context_scale=scale, context_counts=(10,), merge=True)
    found = audit(sampler, batch_size=256, batches=200, seed=0)
    assert found.passed
    assert sampler.union is not None
    sizes = np.array([sampler.union[plan] for plan in sampler.plans])
    assert found.target.expected.sum() == pytest.approx(sizes @ list(sampler.plans.values()))


class Faulty(MaskSampler):
    """A sampler with one fault, for audits to find."""

    fault: Callable[[Masks], Masks]

    def sample(self, batch_size: int, **key: object) -> Masks:
        return type(self).fault(super().sample(batch_size, **key))  # type: ignore[arg-type]


def shifted(masks: Masks) -> Masks:
    """Mirror every fifth image if its targets lean right: all else stays, symmetry is lost."""
    right = (masks.targets[..., 0] % 8).float().mean(1) > 3
    keep = ~right | (torch.arange(len(right)) % 5 > 0)
    mirror = masks.context // 8 * 8 + 7 - masks.context % 8
    blocks = (masks.targets // 8 * 8 + 7 - masks.targets % 8).sort(-1).values
    return Masks(
        torch.where(keep[:, None], masks.context, mirror.sort(-1).values),
        torch.where(keep[:, None, None], masks.targets, blocks),
    )


def test_audit_finds_a_small_bias() -> None:
    class Leaning(Faulty):
        fault = shifted

    found = audit(Leaning((8, 8)), batch_size=256, batches=200)
    assert found.counts_right and found.blocks_whole and found.disjoint
    assert not found.passed and found.target.worst_z > 4


def test_audit_finds_broken_images() -> None:
    def doubled(masks: Masks) -> Masks:  # a patch twice in one context
        masks.context[0, 1] = masks.context[0, 0]
        return masks

    def overlapping(masks: Masks) -> Masks:  # one context patch inside a target
        masks.context[-1, 0] = masks.targets[-1, 0, 0]
        return masks

    def scattered(masks: Masks) -> Masks:  # one target patch moved
        masks.targets[3, 2, 1] = masks.targets[3, 2, 0]
        return masks

    def fewer(masks: Masks) -> Masks:
        return Masks(masks.context, masks.targets[:, 1:])

    for fault, name in (
        (doubled, "counts_right"), (overlapping, "disjoint"), (scattered, "blocks_whole"),
        (fewer, "blocks_whole"),
    ):  # fmt: skip
        broken = type("Broken", (Faulty,), {"fault": staticmethod(fault)})
        found = audit(broken((8, 8)), batch_size=16, batches=2)
        assert not getattr(found, name) and not found.passed
