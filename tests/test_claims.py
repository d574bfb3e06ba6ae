"""What judges say of made-up rows: a claim can hold, fail, or stay open, each for its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import judges
import numpy as np
import pytest
from layouts import SHARES, SPARSE, labelled, pick
from rules import FAILS, HOLDS, PART, UNTESTED, Sign, combine
from study import Study, recipe_config

from tests.test_tables import PAIR, SMALL, block, make_row, make_study, planned, recipe

TINY, NANO = "cifar100-5k-tiny", "cifar100-5k-nano"
LAMBDAS = ("lam=0", "lam=0.001", "lam=0.01", "lam=0.1")
NOISE = np.random.default_rng(0).normal(0, 0.0005, (9, 10))
NOISE -= NOISE[:, :5].mean(1, keepdims=True)


def runs(
    arms: Mapping[str, float], seeds: int, name: str = SMALL, **more: Any
) -> list[dict[str, Any]]:
    """Runs of arms with these mean accuracies."""
    return [
        make_row(name, arm, s, mean + NOISE[i, s], **more)
        for i, (arm, mean) in enumerate(arms.items())
        for s in range(seeds)
    ]


def grown(rows: list[dict[str, Any]], seeds: int, name: str = SMALL) -> Study:
    """The study with these rows, the recipe's arms planned for so many seeds."""
    queue = [
        {**run, "seeds": [*range(seeds)]} if run["recipe"] == name else run
        for run in planned().queue
    ]
    return dataclasses.replace(make_study(rows), queue=queue)


def verdict(signs: Sequence[Sign]) -> str:
    return combine(signs)


# --- several things that must all show


@pytest.mark.parametrize(
    ("dense", "none", "seeds", "want"),
    [
        (0.2, 0.2, 5, HOLDS),
        (0.2, 0.25, 5, FAILS),  # above dense, clearly below lam=0
        (0.25, 0.2, 3, FAILS),
        (0.2, 0.23, 5, FAILS),  # no more than without the penalty
        (0.2, 0.2, 3, PART),
    ],
)
def test_a_gain_needs_both_controls(dense: float, none: float, seeds: int, want: str) -> None:
    study = make_study(runs({"dense": dense, "lam=0": none, SPARSE: 0.23}, seeds, PAIR))
    signs = judges.gain(judges.CIFAR100, (40, 45))(study, False)
    assert len(signs) == 2 and verdict(signs) == want


def test_a_gain_over_dense_alone_shows_nothing_of_the_penalty() -> None:
    rows = runs({"dense": 0.2, SPARSE: 0.23}, 5, PAIR)
    rows += runs({"lam=0": 0.2}, 1, PAIR)  # one seed decides nothing
    signs = judges.gain(judges.CIFAR100, (40, 45))(make_study(rows), False)
    assert [sign.verdict for sign in signs] == [HOLDS, UNTESTED]
    assert verdict(signs) == UNTESTED
    apart = judges.differ(1, (SPARSE, "lam=0"), (SPARSE, "dense"))(make_study(rows), False)
    assert verdict(apart) == UNTESTED
    assert combine([Sign("", HOLDS), Sign("", UNTESTED)]) == PART  # where there is no such control


def test_the_number_of_groups_is_judged_on_arms_with_the_most_seeds() -> None:
    arms = [arm for arm in block([], 6).planned if arm.startswith(f"{SPARSE}+num_groups=")]
    rows = runs({SPARSE: 0.2, arms[0]: 0.21}, 3) + runs({arms[1]: 0.4}, 1)
    (sign,) = judges.group_counts(make_study(rows), False)
    assert sign.text.startswith(f"largest of 1 differences, CIFAR-100: {arms[0]} minus {SPARSE}")


def kept(half: float, random: float, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for s in range(seeds):
        points = [
            {"groups": g, "latents": 6 * g, "accuracy": a + x, "random_latents": random}
            for g, a, x in ((16, 0.2, NOISE[0, s]), (8, half, NOISE[1, s]))
        ]
        rows.append(make_row(PAIR, SPARSE, s, measures={"kept": {"curve": points}}))
    return rows


@pytest.mark.parametrize(
    ("half", "random", "seeds", "want"),
    [
        (0.2, 0.15, 5, HOLDS), (0.2, 0.15, 3, PART), (0.2, 0.25, 5, FAILS),
        (0.17, 0.15, 5, FAILS), (0.195, 0.15, 5, HOLDS), (0.2, 0.15, 1, UNTESTED),
    ],
)  # fmt: skip
def test_half_of_the_groups(half: float, random: float, seeds: int, want: str) -> None:
    assert verdict(judges.efficient(make_study(kept(half, random, seeds)), False)) == want


# --- structure and the ends of the lambdas


def lambda_rows(groups: Sequence[float], seeds: int, name: str = SMALL) -> list[dict[str, Any]]:
    return [
        make_row(name, arm, s, 0.2 + NOISE[i, s], groups_per_latent=g + NOISE[i, s])
        for i, (arm, g) in enumerate(zip(LAMBDAS, groups, strict=False))
        for s in range(seeds)
    ]


@pytest.mark.parametrize(
    ("groups", "seeds", "want"),
    [
        ((16, 15, 8, 1), 5, HOLDS), ((16, 15, 8, 1), 2, PART), ((16, 15, 8, 1), 1, UNTESTED),
        ((16, 15, 8), 5, UNTESTED), ((16, 8, 15, 1), 5, FAILS), ((1, 8, 15, 16), 2, FAILS),
    ],
)  # fmt: skip
def test_fewer_groups_with_lambda(groups: Sequence[float], seeds: int, want: str) -> None:
    study = grown(lambda_rows(groups, seeds), 5)
    assert verdict(judges.structure(study, False)) == want


@pytest.mark.parametrize("name", [SMALL, NANO])
def test_the_first_experiment_is_any_block_of_5000_images(name: str) -> None:
    study = grown(lambda_rows((16, 15, 8, 1), 3, name), 5, name)
    assert judges.lambdas(study, False)[0].verdict == PART
    assert judges.lambdas(study, True) == []


def test_of_two_blocks_the_one_with_runs_is_judged() -> None:
    for name in (SMALL, NANO):
        found = judges.block_of(make_study(lambda_rows((16, 1), 1, name)), 3, False)
        assert found is not None and found.recipe == name


@pytest.mark.parametrize(
    ("low", "groups", "seeds", "want"),
    [
        (0.2, 16, 5, HOLDS), (0.2, 16, 3, PART), (0.2, 16, 2, UNTESTED), (0.2, 16, 1, UNTESTED),
        (0.25, 16, 3, FAILS), (0.2, 12, 3, FAILS), (0.2, 12, 1, UNTESTED),
    ],
)  # fmt: skip
def test_lambda_too_low(low: float, groups: float, seeds: int, want: str) -> None:
    rows = runs({"lam=0": 0.2}, seeds, groups_per_latent=16)
    rows += runs({"lam=0.001": low}, seeds, groups_per_latent=groups)
    assert verdict(judges.too_low(grown(rows, 5), False)) == want


def test_lambda_too_low_needs_seeds_that_both_have() -> None:
    rows = [make_row(SMALL, "lam=0", s, groups_per_latent=16) for s in (0, 1, 2)]
    rows += [make_row(SMALL, "lam=0.001", s, groups_per_latent=16) for s in (3, 4, 5)]
    assert verdict(judges.too_low(grown(rows, 6), False)) == UNTESTED


def test_alarms_of_what_was_not_run_are_queued() -> None:
    assert judges.too_high(make_study([]), False)[1].text == "alarms of lam=0.1: queued"


# --- instability and new domains

FAST = "+ema=0.9+ema_final=0.99"


@pytest.mark.parametrize(
    ("penalised", "twin", "seeds", "want"),
    [
        (["unstable: x"], [], 1, PART), (["unstable: x"], [], 5, HOLDS),
        (["unstable: x"], ["collapse: x"], 5, FAILS),  # not the penalty's
        ([], ["unstable: x"], 5, FAILS), ([], [], 1, UNTESTED), ([], [], 5, FAILS),
        (["one group: x"], [], 1, UNTESTED),
    ],
)  # fmt: skip
def test_instability_is_the_penaltys(
    penalised: list[str], twin: list[str], seeds: int, want: str
) -> None:
    arms = [a for run in planned().queue for a in run["arms"] if "+ema=" in a]
    rows = [
        make_row(SMALL, arm, s, alarms=twin if arm.startswith("lam=0+") else penalised)
        for arm in dict.fromkeys(arms)
        for s in range(seeds)
    ]
    assert verdict(judges.unstable(grown(rows, 5), False)) == want


def test_a_failed_run_is_unstable_unless_its_control_fails_too() -> None:
    rows = [make_row(SMALL, f"lam=0.1{FAST}", 0, failed="loss"), make_row(SMALL, f"lam=0{FAST}", 0)]
    assert verdict(judges.unstable(make_study(rows), False)) == PART
    rows[1] = make_row(SMALL, f"lam=0{FAST}", 0, failed="loss")
    assert verdict(judges.unstable(make_study(rows), False)) == UNTESTED


@pytest.mark.parametrize(
    ("shift", "noise", "seeds", "want"),
    [
        (0.05, 0, 3, FAILS), (-0.05, 0, 5, HOLDS), (-0.05, 0, 3, PART),
        (0.0, 0.02, 5, PART), (0.0, 0.02, 3, UNTESTED),
    ],
)  # fmt: skip
def test_new_domains(shift: float, noise: float, seeds: int, want: str) -> None:
    """The untrained floor of made-up rows is 0.1 + seed / 1000."""
    rows = [
        make_row(PAIR, SPARSE, s, far=0.1 + s / 1000 + shift + (-1) ** s * noise + NOISE[0, s])
        for s in range(seeds)
    ]
    assert verdict(judges.new_domains(make_study(rows), False)) == want


# --- two numbers, two batches


def factors(order: Sequence[float], seeds: int, gpu: bool = False) -> Study:
    name = "cifar100-vit-tiny-60" if gpu else SMALL
    arms = [a for a in block([], 3, name).planned][: len(order)]
    return make_study([
        make_row(name, arm, s, 0.2 + i / 100,
                 measures={"factors": {"dci_disentanglement": 0.1 + order[i] / 100}})
        for i, arm in enumerate(arms) for s in range(seeds)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("order", "seeds", "want"),
    [
        (range(9), 3, FAILS), (range(9, 0, -1), 3, FAILS), ((4, 0, 7, 2, 8, 1, 5, 3, 6), 3, HOLDS),
        ((4, 0, 7, 2, 8, 1, 5, 3, 6), 2, UNTESTED), ((4, 0, 7, 2, 5, 1, 3), 3, UNTESTED),
        ((2, 0, 1, 3, 6, 4, 5, 8, 7), 3, UNTESTED), ([1] * 9, 3, UNTESTED),
    ],
)  # fmt: skip
def test_interpretability_apart_from_accuracy(
    order: Sequence[float], seeds: int, want: str
) -> None:
    assert verdict(judges.measured(factors(order, seeds), False)) == want
    assert verdict(judges.measured(factors(order, seeds), True)) == UNTESTED
    assert verdict(judges.measured(factors(order, seeds, gpu=True), True)) == want


def test_growth_is_judged_on_one_device() -> None:
    small = runs({"lam=0": 0.2, SPARSE: 0.2}, 3)
    large = {"lam=0": 0.2, SPARSE: 0.25}
    assert verdict(judges.grows(make_study(small + runs(large, 3, TINY)), False)) == PART
    about = {"cpu": "CPU", "cores": 2, "gpus": [], "torch": "9.9", "commit": "c0ffee"}
    other = judges.grows(make_study(small + runs(large, 3, TINY, environment=about)), False)
    sign = next(sign for sign in other if TINY in sign.text)
    assert sign.verdict == UNTESTED and "not on one device" in sign.text


def test_above_nothing_is_at_most_in_part() -> None:
    values = {"this run": {"value": 0.2, "low": 0.1, "high": 0.3},
              "PCA": {"value": 0.0, "low": -0.1, "high": 0.05}}  # fmt: skip
    page = {"data": "scenes", "run": "runs/scenes/lam=0.03-s0",
            "measures": [{"name": "gap", "section": "", "values": values}]}  # fmt: skip
    study = make_study([], explain=[page])
    assert verdict(judges.explained("gap", ())(study, False)) == PART
    assert verdict(judges.explained("gap", ("PCA",))(study, False)) == HOLDS


# --- what may be averaged, and what is picked


@pytest.mark.parametrize(
    ("environment", "run", "named"),
    [
        ({"gpus": ["H200"]}, {}, "on cuda with torch 2.8"),
        ({"torch": "2.9.1+cpu"}, {}, "on cpu with torch 2.9"),
        ({"torch": "2.8.1"}, {}, ""),
        ({"gpus": ["H200"]}, {"device": "cpu"}, ""),
    ],
)
def test_devices_and_torch_versions_are_kept_apart(
    environment: dict[str, Any], run: dict[str, Any], named: str
) -> None:
    rows = runs({"dense": 0.2}, 3) + runs({"lam=0": 0.3}, 2)
    for i, row in enumerate(rows):
        row["environment"] |= {"torch": "2.8.0+cu126"} | (environment if i > 2 else {})
        row["settings"]["run"] |= run
    found = block(rows)
    assert len(found.values("lam=0", judges.CIFAR100)) == (0 if named else 2)
    assert (f"2 runs {named} (commit c0ffee)" in found.apart) == bool(named)


def test_the_best_arm_is_one_with_the_most_seeds() -> None:
    rows = runs({"lam=0": 0.2, "lam=0.01": 0.21, SPARSE: 0.2}, 3) + runs({"lam=0.1": 0.4}, 1)
    assert pick(block(rows)) == ("lam=0.01", 2)
    (sign,) = judges.best_of(3)(make_study(rows), False)
    assert sign.text.startswith("best of 2, CIFAR-100: lam=0.01 minus lam=0")


@pytest.mark.parametrize(
    ("count", "text"),
    [(100, "100 images, one a class"), (500, "500 images, 5 a class"), (50_000, "50,000 images")],
)
def test_a_share_of_the_labels_says_how_many(count: int, text: str) -> None:
    row = make_row(PAIR, "dense", 0)
    for probe in row["probes"]:
        probe["n_train"] = count
    assert text in labelled(block([row], 8, PAIR), SHARES[2])
    assert labelled(block([], 8, PAIR), SHARES[2]) == ""


def test_the_lambdas_are_those_of_the_recipes_that_are_judged() -> None:
    assert judges.LAMBDAS == LAMBDAS
    assert {recipe_config(recipe(name)).images.limit for name in (SMALL, NANO)} == {5000}
