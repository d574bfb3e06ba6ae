"""The random zero pattern: drawn once, evenly, and kept to the last step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsejepa.config import preset
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.training.build import build_model


def model_of(**settings: object) -> SparseJEPA:
    config = preset("nano").replace(
        **{"patch_size": 8, "num_groups": 8, "density": 0.3, "pattern": "random", **settings}
    )
    return build_model(config, (32, 32), 20)


def kept(model: SparseJEPA) -> torch.Tensor:
    assert model.groups is not None
    return model.groups.block_norms() > 0


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0.01, 1), st.booleans(), st.integers(0, 9))
def test_counts_are_exact_and_as_equal_as_can_be(
    groups: int, latents: int, density: float, sphere: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    map_ = GroupMap("concept", latents, (2, 2), groups, 3, sphere=sphere, hidden=4)
    before = map_.block_norms().square().sum(0).sqrt()
    map_.keep_random(density)
    pattern = map_.block_norms() > 0
    per_latent = pattern.sum(0)
    assert int(pattern.sum()) == max(latents, round(density * groups * latents))
    assert per_latent.min() >= 1 and per_latent.max() - per_latent.min() <= 1
    torch.testing.assert_close(map_.block_norms().square().sum(0).sqrt(), before)


def test_all_groups_and_pairs_of_groups_are_alike() -> None:
    torch.manual_seed(0)
    map_ = GroupMap("concept", 6000, (2, 2), 6, 1, hidden=4)
    map_.keep_random(0.5)
    pattern = (map_.block_norms() > 0).double()
    # 3 of 6 groups each: a group has half of the latents, a pair of groups a fifth.
    shares = pattern @ pattern.T / 6000
    expected = torch.full((6, 6), 0.2, dtype=torch.float64) + 0.3 * torch.eye(6)
    assert (shares - expected).abs().max() < 4 * (0.25 / 6000) ** 0.5


@pytest.mark.parametrize("w_form", ["sphere", "plain"])
def test_zeros_stay_and_nothing_joins_them(w_form: str) -> None:
    model = model_of(w_form=w_form, debias=0.0)
    first = kept(model)
    start = model.groups.W.detach().clone()  # type: ignore[union-attr]
    assert model.controller is None
    images = torch.randn(6, 3, 32, 32)
    for step in range(20):
        model(images, step=step).total.backward()
        model.after_step(step)
        assert model.rates.lam(step) == 0
        assert torch.equal(kept(model), first)
    assert model.groups is not None and not torch.equal(model.groups.W, start)
    assert int(first.sum()) == round(0.3 * 8 * 96)


def test_the_pattern_belongs_to_the_seed_and_the_rest_is_the_learned_arms() -> None:
    random, again, other = model_of(), model_of(), model_of(seed=1)
    learned = model_of(pattern="learned")
    assert torch.equal(kept(random), kept(again)) and not torch.equal(kept(random), kept(other))
    assert random.groups is not None and learned.groups is not None
    for name, p in learned.named_parameters():
        if name != "groups.W":
            assert torch.equal(p, random.get_parameter(name)), name
    assert kept(learned).all() and learned.controller is not None
    assert learned.rates.w_lr(0) == random.rates.w_lr(0)
    block = random.groups.W.detach().transpose(1, 2)[kept(random)]
    same = learned.groups.W.detach().transpose(1, 2)[kept(random)]
    cosine = torch.cosine_similarity(block, same, dim=-1)  # the kept blocks keep their directions
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
