"""Controls: zeros in random places, along the path of the density."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsejepa.config import preset
from sparsejepa.encoders.encoder import save_groups
from sparsejepa.errors import UserError
from sparsejepa.model.groups import largest, random_pattern
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.study import pretrain
from sparsejepa.study.results import Probes, Task
from sparsejepa.study.runs import run_tasks
from sparsejepa.training.build import build_model
from sparsejepa.training.loop import plan


def model_of(**settings: object) -> SparseJEPA:
    config = preset("nano").replace(
        **{"patch_size": 8, "num_groups": 8, "density": 0.3, "pattern": "random", **settings}
    )
    return build_model(config, (32, 32), 20)


def kept(model: SparseJEPA) -> torch.Tensor:
    assert model.groups is not None
    return model.groups.block_norms() > 0


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 9))
def test_counts_are_exact_and_as_equal_as_can_be(
    groups: int, latents: int, density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    pattern = random_pattern(groups, latents, density)
    per_latent, per_group = pattern.sum(0), pattern.sum(1)
    assert int(pattern.sum()) == max(latents, round(density * groups * latents))
    assert per_latent.min() >= 1 and per_latent.max() - per_latent.min() <= 1
    assert per_group.max() - per_group.min() <= 1
    other = random_pattern(groups, latents, 1.0, like=pattern)
    assert torch.equal(other.sum(0), per_latent) and torch.equal(other.sum(1), per_group)


def test_with_given_counts_all_patterns_are_equally_likely() -> None:
    like = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    torch.manual_seed(0)
    found = [tuple(random_pattern(3, 3, 1.0, like).int().argmax(0).tolist()) for _ in range(1200)]
    counts = [found.count(one) for one in set(found)]
    assert len(counts) == 6 and max(abs(c - 200) for c in counts) < 4 * 200**0.5


@pytest.mark.parametrize("w_form", ["sphere", "plain"])
def test_the_zeros_come_along_the_path_of_the_density_and_stay(w_form: str) -> None:
    model = model_of(w_form=w_form)
    assert model.controller is None and model.groups is not None
    images, before = torch.randn(6, 3, 32, 32), kept(model)
    for step in range(20):
        model(images, step=step).total.backward()
        model.after_step(step)
        now, wanted = kept(model), model.rates.wanted_density(step)
        assert model.rates.lam(step) == 0
        assert int(now.sum()) == round(wanted * now.numel()) and not (now & ~before).any()
        before = now
    assert int(before.sum()) == round(0.3 * 8 * 96)
    assert before.sum(1).max() - before.sum(1).min() <= 1


def test_a_runs_counts_can_be_taken_over(tmp_path) -> None:
    source = model_of(seed=3).groups
    assert source is not None
    uneven = torch.rand(8, 96) * torch.linspace(0.3, 1, 8)[:, None]
    source.proximal_step(0.0, 0.0, keep=largest(uneven, 0.5))
    save_groups(tmp_path, source)
    model = model_of(pattern=str(tmp_path), density=0.5)
    assert model.order is not None
    final, wanted = largest(model.order, 0.5), source.block_norms() > 0
    assert torch.equal(final.sum(0), wanted.sum(0)) and torch.equal(final.sum(1), wanted.sum(1))
    with pytest.raises(UserError, match=r"that run kept 0\.5; use --density 0\.5"):
        model_of(pattern=str(tmp_path), density=0.25)
    with pytest.raises(UserError, match="its map is 8 groups by 96 latents, this run's 4 by 96"):
        model_of(pattern=str(tmp_path), num_groups=4)


def test_a_pattern_that_there_is_not_is_refused_before_any_data_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> Any:
        raise AssertionError("images are loaded")

    monkeypatch.setattr("sparsejepa.data.catalog.load_images", loaded)
    run = tmp_path / "run"

    def check(message: str, pattern: str = str(run)) -> None:
        config = preset("nano").replace(density=0.5, pattern=pattern, device="cpu")
        task = Task(config, tmp_path / "new", Probes(("scenes",)))
        for work in (lambda: pretrain(config, out=tmp_path / "new"), lambda: plan(config, loaded),
                     lambda: run_tasks([task], tmp_path / "rows.jsonl")):  # fmt: skip
            with pytest.raises(UserError, match=f"^--pattern {pattern}: {message}"):
                work()

    unknown = "not learned, random or a finished run with groups"
    check(rf"{unknown} \(did you mean 'learned'\?\)$", "leanred")
    check(rf"{unknown} \(did you mean 'random'\?\)$", "randon")
    check(f"{unknown}$")
    run.mkdir()
    check(f"{unknown}$")


@given(st.floats(0.2, 1.0), st.integers(0, 10**6))
def test_the_largest_blocks_are_kept_and_one_of_every_latent(density: float, seed: int) -> None:
    norms = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed))
    kept = largest(norms, density)
    first = torch.zeros(5, 7, dtype=torch.bool).scatter(0, norms.argmax(0, keepdim=True), True)
    assert kept[first].all() and kept.sum() == max(7, round(density * 35))
    gone, others = norms[~kept], norms[kept & ~first]
    if len(gone) and len(others):
        assert others.min() >= gone.max()
