"""The mask sampler: exact shapes and counts, whole blocks, and the flaws that it avoids."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sparsejepa.errors import UserError
from sparsejepa.model.masks import Masks, MaskSampler, StepPlan, block_shapes


def check(masks: Masks, sampler: MaskSampler, plan: StepPlan, batch_size: int) -> None:
    """Assert in plain Python everything that is promised of every single image."""
    rows, cols = sampler.grid_size
    height, width = plan.target
    assert masks.context.dtype == masks.targets.dtype == torch.int64
    assert masks.context.shape == (batch_size, plan.count)
    assert masks.targets.shape == (batch_size, sampler.num_targets, height * width)
    places = set()
    for context, targets in zip(masks.context.tolist(), masks.targets.tolist(), strict=True):
        assert context == sorted(set(context))
        assert set(context) <= set(range(rows * cols))
        for block in targets:
            top, left = divmod(block[0], cols)
            assert top + height <= rows and left + width <= cols
            wanted = [(top + r) * cols + left + c for r in range(height) for c in range(width)]
            assert block == wanted
            assert not set(block) & set(context)
        places.add(len({block[0] for block in targets}))
    # Target blocks are distinct, or in the last resort all one.
    assert places <= {1, sampler.num_targets}


def test_defaults_on_8x8() -> None:
    sampler = MaskSampler((8, 8))
    assert sampler.target_shapes == ((3, 3), (3, 4), (4, 3))
    assert sampler.context_counts == (16, 20, 24)
    assert {plan.context for plan in sampler.plans} == {(8, 8)}  # 7x7 is 0.77 of the patches
    shapes = dict.fromkeys(sampler.target_shapes, 0.0)
    for plan, probability in sampler.plans.items():
        shapes[plan.target] += probability
    assert shapes == pytest.approx({(3, 3): 1 / 2, (3, 4): 1 / 4, (4, 3): 1 / 4})


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.floats(0.05, 0.9), st.floats(0.05, 0.9)).map(sorted),
    st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted),
)
def test_block_shapes_keep_to_their_ranges(
    grid: tuple[int, int], scale: list, aspect: list
) -> None:
    rows, cols = grid
    shapes = block_shapes(grid, tuple(scale), tuple(aspect))
    assert sum(shapes.values()) == pytest.approx(1)
    assert all(1 <= h <= rows and 1 <= w <= cols for h, w in shapes)
    flat, tall = aspect
    if flat < 1 < tall:  # equally wide on both sides of a square
        flat, tall = min(flat, 1 / tall), max(tall, 1 / flat)
    fits = {
        (h, w)
        for h in range(1, rows + 1)
        for w in range(1, cols + 1)
        if int(scale[0] * rows * cols) <= h * w < scale[1] * rows * cols + 1
        and flat - 1e-9 <= h / w <= tall + 1e-9
    }
    if len(fits) > 6:
        assert set(shapes) < fits or len(shapes) >= 6
        assert set(shapes) <= fits
    elif fits:
        assert set(shapes) == fits
    if rows == cols and flat < 1 < tall:
        assert {(w, h): p for (h, w), p in shapes.items()} == pytest.approx(shapes)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(3, 12), st.integers(3, 12)),
    st.integers(1, 4),
    st.tuples(st.floats(0.3, 1), st.floats(0.3, 1)).map(sorted),
    st.integers(2, 9),
    st.integers(0, 2**40),
    st.integers(0, 10**7),
)
def test_every_image_is_as_planned(
    grid: tuple[int, int], targets: int, scale: list, candidates: int, seed: int, step: int
) -> None:
    try:
        sampler = MaskSampler(
            grid, num_targets=targets, context_scale=tuple(scale), candidates=candidates
        )
    except UserError as error:
        assert scale[0] < 0.8, error  # only a small context block can be too little
        return
    plan = sampler.plan(seed=seed, step=step)
    masks = sampler.sample(5, seed=seed, step=step)
    check(masks, sampler, plan, 5)
    again = sampler.sample(5, seed=seed, step=step)
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


def test_steps_and_seeds_differ_and_do_not_disturb_global_randomness() -> None:
    sampler = MaskSampler((8, 8), context_counts=(20,), target_aspect_ratio=(1, 1))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = {
        (tuple(m.context.flatten().tolist()), tuple(m.targets.flatten().tolist()))
        for m in (sampler.sample(2, seed=seed, step=step) for seed in range(9) for step in range(9))
    }
    assert len(drawn) == 81
    assert torch.equal(state, torch.get_rng_state())


def test_places_of_target_blocks_are_uniform() -> None:
    """One block: every place equally often. Two blocks: every set of two places equally often."""
    for targets in (1, 2):
        sampler = MaskSampler(
            (4, 5), num_targets=targets, target_scale=(0.2, 0.2), target_aspect_ratio=(1, 1),
            context_counts=(1,),
        )  # fmt: skip
        assert sampler.target_shapes == ((2, 2),)
        masks = sampler.sample(12_000, seed=1, step=0)
        found = Counter(tuple(sorted(b)) for b in masks.targets[:, :, 0].tolist())
        corners = [r * 5 + c for r in range(3) for c in range(4)]
        sets = list(combinations(corners, targets))
        assert set(found) == set(sets)
        assert stats.chisquare([found[s] for s in sets]).pvalue > 1e-4
        for slot in range(targets):
            single = masks.targets[:, slot, 0].bincount(minlength=20)[corners]
            assert stats.chisquare(single.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_targets": 40}, "--num-targets 40 different blocks of"),
        ({"num_targets": 20}, "--num-targets 20 .* smaller --num-targets"),
        ({"context_counts": (16, 60)}, "do not leave 60 .* --context-counts"),
        ({"context_counts": (44,)}, "or a larger --context-scale"),
        ({"target_scale": (1, 1)}, "blocks of 8x8 on 8x8 patches"),
        ({"context_scale": (0.2, 0.2)}, "larger --context-scale"),
    ],
)
def test_impossible_settings_name_flag_and_remedy(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskSampler((8, 8), **settings)


@pytest.mark.parametrize("grid", [(8, 8), (4, 4), (14, 14), (4, 8)])
@settings(max_examples=15, deadline=None)
@given(step=st.integers(0, 10_000), batch_size=st.integers(1, 40))
def test_merged_targets_are_the_union(grid: tuple[int, int], step: int, batch_size: int) -> None:
    """Against the same draw with its blocks apart: the union, a part of it, or a little more."""
    apart = MaskSampler(grid)
    merged = MaskSampler(grid, merge=True)
    one, many = (s.sample(batch_size, seed=3, step=step) for s in (merged, apart))
    assert torch.equal(one.context, many.context)
    assert one.targets.shape[:2] == (batch_size, 1)
    for context, union, blocks in zip(one.context, one.targets[:, 0], many.targets, strict=True):
        chosen, whole = set(union.tolist()), set(blocks.flatten().tolist())
        assert union.tolist() == sorted(chosen)  # ascending, none twice
        assert not chosen & set(context.tolist())
        assert chosen <= whole or whole <= chosen
