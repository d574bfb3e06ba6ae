"""Multi-block masks (I-JEPA, Assran et al. 2023, section 3), drawn per image on the device.

The widely copied sampler never uses the last row and column, cuts every context to the batch
minimum by keeping the first indices, and ties aspect ratio to scale. Here blocks lie uniformly over
all places where they fit, scale and aspect ratio are independent, and each context is a random
subset of a stated size, so that all images of a step have equal shapes; see `audit.audit`.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor

from sparsejepa.errors import UserError
from sparsejepa.rng import derive_seed, generator

Shape = tuple[int, int]

MAX_SHAPES = 6
"""Distinct shapes of a block, ties aside: each target shape costs one compilation of the step."""


class Masks(NamedTuple):
    """Patch indices: `context` [B, C], ascending; `targets` [B, M, K], blocks row by row.

    Merged targets are [B, 1, U], ascending.
    """

    context: Tensor
    targets: Tensor


class StepPlan(NamedTuple):
    """What all images of a step share: shapes (h, w) of target and context blocks, and C."""

    target: Shape
    context: Shape
    count: int


class MaskSampler:
    """Draws the masks of one step: shapes and context count per step, places per image.

    For each image several candidates (M distinct target blocks and a context block) are drawn at
    once, and the first that leaves C patches of context is taken. The last candidate always does:
    its target blocks coincide and its context block is the whole grid.

    Args:
        grid_size: rows and columns of patches.
        num_targets: target blocks per image, M.
        target_scale: share of the N patches in a target block.
        target_aspect_ratio: height over width of a target block (see `block_shapes`).
        context_scale: share of the patches in the context block, before the targets are taken out;
            its sides are in the grid's proportion.
        context_counts: context patches C, one of these per step; about N/4, 5N/16, 3N/8 if empty.
        candidates: candidates per image, the last resort included; at least 2.
        merge: give the union of the target blocks as one, for a predictor that takes them at once:
            the mean number U of its patches, of a larger union a random part, for a smaller one
            some hidden patches more.

    `plans` holds every `StepPlan` with its probability, `union` the U of each where targets are
    merged. Raises UserError for settings that leave too little context on this grid.
    """

    def __init__(
        self,
        grid_size: tuple[int, int],
        *,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        context_counts: Sequence[int] = (),
        candidates: int = 8,
        merge: bool = False,
    ) -> None:
        rows, cols = grid_size
        self.grid_size = (rows, cols)
        self.num_targets = num_targets
        self.candidates = max(2, candidates)
        targets = block_shapes(self.grid_size, target_scale, target_aspect_ratio)
        contexts = block_shapes(self.grid_size, context_scale, (rows / cols, rows / cols))
        default = {max(1, int(rows * cols * share + 0.5)) for share in (1 / 4, 5 / 16, 3 / 8)}
        self.target_shapes = tuple(targets)
        self.context_counts = tuple(sorted(set(context_counts) or default))
        each = 1 / len(self.context_counts)
        self.plans = {
            StepPlan(target, context, count): targets[target] * contexts[context] * each
            for target, context, count in product(targets, contexts, self.context_counts)
        }
        for plan in self.plans:
            if plan.count == self.context_counts[-1]:
                self._check(plan)
        self.union = {plan: self._mean_union(plan) for plan in self.plans} if merge else None

    def _check(self, plan: StepPlan) -> None:
        """Raise UserError where the last resort fails, or is what most images would need."""
        (rows, cols), (height, width) = self.grid_size, plan.target
        fits = height * width + plan.count <= rows * cols
        if fits and (rows - height + 1) * (cols - width + 1) >= self.num_targets:
            visible = self._candidates(64, plan, generator(0, 0, "mask-check"))[2][:, :-1]
            if (visible.sum(-1) >= plan.count).any(1).double().mean() >= 0.5:
                return
        raise UserError(
            f"--num-targets {self.num_targets} different blocks of {height}x{width} on "
            f"{rows}x{cols} patches do not leave {plan.count} for the context in half of the "
            "images; use a smaller --num-targets, --target-scale or --context-counts, or a larger "
            "--context-scale"
        )

    def _mean_union(self, plan: StepPlan) -> int:
        """Return U: the mean number of patches that the target blocks of an image cover."""
        index, place, _ = self._choose(1024, plan, generator(0, 0, "mask-union"))
        covered = cover(index, math.prod(self.grid_size))[place].any(1)
        mean = round(covered.sum(1).double().mean().item())
        return min(mean, math.prod(self.grid_size) - plan.count)

    def plan(self, *, seed: int, step: int) -> StepPlan:
        """Return what the images of a step share, a fixed function of (seed, step)."""
        drawn = derive_seed(seed, step, "mask-shape") / 2**63  # uniform in [0, 1)
        up_to = list(accumulate(self.plans.values()))
        return list(self.plans)[min(bisect(up_to, drawn * up_to[-1]), len(up_to) - 1)]

    def sample(
        self, batch_size: int, *, seed: int, step: int, device: torch.device | str = "cpu"
    ) -> Masks:
        """Return the masks of one step, int64, a fixed function of (seed, step) and device type.

        Target blocks may overlap each other; the context overlaps none. Nothing is read on the
        host.
        """
        plan = self.plan(seed=seed, step=step)
        draw = generator(seed, step, "masks", device)
        index, place, visible = self._choose(batch_size, plan, draw)
        keys = torch.rand(visible.shape, generator=draw, device=draw.device)
        context = keys.masked_fill(~visible, -1.0).topk(plan.count, sorted=False).indices
        context = context.sort().values
        if self.union is None:
            return Masks(context, index[place])
        # In [1, 2] for the union, below 1 for the rest, -1 for the context. New ones: the old keys
        # of what the context left are small.
        covered = cover(index, keys.shape[1])[place].any(1)
        keys = torch.rand(visible.shape, generator=draw, device=draw.device) + covered
        union = keys.scatter_(1, context, -1.0).topk(self.union[plan], sorted=False).indices
        return Masks(context, union.sort().values[:, None])

    def _choose(
        self, batch_size: int, plan: StepPlan, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return block indices [P, K], the targets' places [B, M], visible patches [B, N]."""
        index, place, visible = self._candidates(batch_size, plan, draw)
        feasible = visible.sum(-1) >= plan.count  # [B, T]
        first = feasible.int().argmax(1)[:, None, None]  # argmax returns the first of equals
        place = place.take_along_dim(first, 1).squeeze(1)
        return index, place, visible.take_along_dim(first, 1).squeeze(1)

    def _candidates(
        self, batch_size: int, plan: StepPlan, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return block indices [P, K], the targets' places [B, T, M], visible patches [B, T, N]."""
        size, patches = (batch_size, self.candidates), math.prod(self.grid_size)
        index = block_indices(self.grid_size, plan.target, draw.device)
        covered = cover(index, patches)
        # M distinct places by Floyd's algorithm: every set is equally likely. The turn by a random
        # number of places keeps that, and makes each single block uniform too.
        chosen: list[Tensor] = []
        for last in range(len(index) - self.num_targets, len(index)):
            new = torch.randint(last + 1, size, generator=draw, device=draw.device)
            taken = torch.zeros_like(new, dtype=torch.bool)
            for earlier in chosen:
                taken |= new == earlier
            chosen.append(new.masked_fill_(taken, last))
        turn = torch.randint(len(index), size, generator=draw, device=draw.device)
        place = (torch.stack(chosen, -1) + turn[..., None]) % len(index)
        place[:, -1] = place[:, -1, :1]
        hidden = covered[place[..., 0]]
        for target in range(1, self.num_targets):
            hidden |= covered[place[..., target]]
        blocks = cover(block_indices(self.grid_size, plan.context, draw.device), patches)
        block = blocks[torch.randint(len(blocks), size, generator=draw, device=draw.device)]
        block[:, -1] = True
        return index, place, block & ~hidden


def block_shapes(
    grid_size: tuple[int, int], scale: tuple[float, float], aspect_ratio: tuple[float, float]
) -> dict[Shape, float]:
    """Return the few shapes (h, w) that stand for two ranges on a grid, with their probabilities.

    A shape belongs when its aspect ratio h/w is in range and its area h*w within `scale` of the N
    patches, rounded outwards. An aspect range on both sides of 1 is read as equally wide on both,
    (0.75, 1.5) as (2/3, 3/2). Of more than six, those nearest to the six combinations of least or
    largest scale with least, middle or largest aspect ratio are kept; of none, the nearest to the
    middle (in the logarithms of area and aspect ratio; ties are kept). Each area is equally likely,
    then each shape of that area: 3x3 at 1/2, 3x4 and 4x3 at 1/4 by default on a grid of 8x8.
    """
    rows, cols = grid_size
    low, high = (share * rows * cols for share in scale)
    flat, tall = aspect_ratio
    if flat < 1 < tall:
        flat, tall = min(flat, 1 / tall), max(tall, 1 / flat)
    middle = math.sqrt(flat * tall)
    every = list(product(range(1, rows + 1), range(1, cols + 1)))

    def nearest(shapes: list[Shape], area: float, aspect: float) -> set[Shape]:
        def far(shape: Shape) -> float:
            h, w = shape
            return math.hypot(math.log(h * w / area), math.log(h / w / aspect))

        least = min(map(far, shapes)) + 1e-9
        return {shape for shape in shapes if far(shape) <= least}

    sized = [(h, w) for h, w in every if math.floor(low) <= h * w <= math.ceil(high)]
    shapes = [(h, w) for h, w in sized if flat - 1e-9 <= h / w <= tall + 1e-9]
    if not shapes:
        shapes = sorted(nearest(every, math.sqrt(low * high), middle))
    elif len(shapes) > MAX_SHAPES:
        corners = product((low, high), (flat, middle, tall))
        shapes = sorted(set().union(*(nearest(shapes, *corner) for corner in corners)))
    areas = [h * w for h, w in shapes]
    return {s: 1 / (len(set(areas)) * areas.count(a)) for s, a in zip(shapes, areas, strict=True)}


def block_indices(
    grid_size: tuple[int, int], shape: Shape, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the patches of a block at each of its P places, int64 [P, K], both row by row."""
    rows, cols = grid_size
    grid = torch.arange(rows * cols, device=device).view(rows, cols)
    return grid.unfold(0, shape[0], 1).unfold(1, shape[1], 1).reshape(-1, shape[0] * shape[1])


def cover(index: Tensor, patches: int) -> Tensor:
    """Return bool [P, N]: whether a place of `index` [P, K] covers a patch."""
    covered = torch.zeros(len(index), patches, dtype=torch.bool, device=index.device)
    return covered.scatter_(1, index, True)
