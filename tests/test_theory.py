"""What the paper's lemma and theorem give, and the numbers of docs/theory.md.

Total correlation and mutual information come from whole probability tables and covariances here,
by their definitions; nothing is estimated but where it says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejepa.evaluation.information import (
    overlap_information,
    total_correlation,
    wishart_bias,
)

DOC = Path(__file__).parent.parent / "docs" / "theory.md"
Groups = Sequence[tuple[int, ...]]


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def marginal(p: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return p.sum(tuple(i for i in range(p.ndim) if i not in axes))


def table_information(p: np.ndarray, groups: Groups) -> float:
    """Total correlation between groups of the variables, which are the axes of the table p."""
    union = tuple(sorted(i for group in groups for i in group))
    return sum(entropy(marginal(p, g)) for g in groups) - entropy(marginal(p, union))


def gaussian_information(S: np.ndarray, groups: Groups) -> float:
    """The same for variables with the covariance S."""
    union = [i for group in groups for i in group]
    own = sum(np.linalg.slogdet(S[np.ix_(g, g)])[1] for g in groups)
    return float(own - np.linalg.slogdet(S[np.ix_(union, union)])[1]) / 2


def singles(variables: Sequence[int]) -> Groups:
    return [(i,) for i in variables]


def random_table(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    p = rng.gamma(0.5, size=shape) * (rng.random(shape) < 0.8) + 1e-3
    return p / p.sum()


partitions = st.permutations(range(5)).flatmap(
    lambda order: st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True).map(
        lambda cuts: [tuple(part) for part in np.split(np.array(order), sorted(cuts))]
    )
)


# --- the lemma: grouping lowers total correlation by what lies inside the groups ------------------


@given(groups=partitions, seed=st.integers(0, 999))
def test_chain_rule_for_tables(groups: Groups, seed: int) -> None:
    p = random_table((2, 3, 2, 2, 3), seed)
    whole = table_information(p, singles(range(5)))
    inside = sum(table_information(p, singles(group)) for group in groups)
    between = table_information(p, groups)
    assert whole == pytest.approx(between + inside, abs=1e-12)
    assert -1e-12 <= between <= whole + 1e-12


@given(groups=partitions, seed=st.integers(0, 999))
def test_chain_rule_for_gaussians(groups: Groups, seed: int) -> None:
    mix = np.random.default_rng(seed).normal(size=(5, 5))
    S = mix @ mix.T + 0.1 * np.eye(5)
    whole = gaussian_information(S, singles(range(5)))
    inside = sum(gaussian_information(S, singles(group)) for group in groups)
    between = gaussian_information(S, groups)
    assert whole == pytest.approx(between + inside, abs=1e-9)
    assert -1e-9 <= between <= whole + 1e-9


def coins(copies: Sequence[tuple[int, int]]) -> np.ndarray:
    """Four fair coins; of each pair in `copies` one coin is the copy of the other."""
    outcomes = np.indices((2, 2, 2, 2))
    p = np.ones((2, 2, 2, 2))
    for i, j in copies:
        p[outcomes[i] != outcomes[j]] = 0
    return p / p.sum()


PAIRS = [(0, 1), (2, 3)]


@pytest.mark.parametrize(
    ("copies", "strict"),
    [
        pytest.param([(0, 2), (1, 3)], False, id="only across"),
        pytest.param([(0, 1), (2, 3)], True, id="only inside"),
        pytest.param([(0, 1), (1, 2)], True, id="both"),
        pytest.param([], False, id="none"),
    ],
)
def test_strict_exactly_where_a_group_depends_inside(
    copies: list[tuple[int, int]], strict: bool
) -> None:
    p = coins(copies)
    lost = table_information(p, singles(range(4))) - table_information(p, PAIRS)
    inside = max(table_information(p, singles(group)) for group in PAIRS)
    assert (lost > 1e-9) == (inside > 1e-9) == strict


@given(seed=st.integers(0, 999), r=st.floats(-0.95, 0.95))
def test_dependence_across_groups_alone_never_makes_it_strict(seed: int, r: float) -> None:
    # Independent inside each group of two, any dependence across: the covariance C is free.
    C = np.random.default_rng(seed).normal(size=(2, 2))
    C *= r / np.linalg.norm(C, 2)
    S = np.block([[np.eye(2), C], [C.T, np.eye(2)]])
    assert gaussian_information(S, PAIRS) == pytest.approx(
        gaussian_information(S, singles(range(4))), abs=1e-9
    )
    S[0, 1] = S[1, 0] = 0.05  # and a little inside is enough
    if np.linalg.eigvalsh(S)[0] > 0:
        assert gaussian_information(S, PAIRS) < gaussian_information(S, singles(range(4))) - 1e-4


# --- the theorem: no grouping tells more about Z --------------------------------------------------


def grouped(p: np.ndarray, groups: Groups, maps: Sequence[Callable | np.ndarray]) -> np.ndarray:
    """The table of (Z, G_1..G_m), G_g = map_g(X_g), of the table p of (Z, X_1..X_n).

    A map is a function of the values of its group, or their images in a row.
    """
    values = np.indices(p.shape)
    images = [values[0]]
    for group, f in zip(groups, maps, strict=True):
        own = [values[i + 1] for i in group]
        shape = [p.shape[i + 1] for i in group]
        images.append(f(*own) if callable(f) else f[np.ravel_multi_index(own, shape)])
    table = np.zeros([image.max() + 1 for image in images])
    np.add.at(table, tuple(images), p)
    return table


def about_z(p: np.ndarray) -> float:
    """I(Z; the rest), Z the first axis."""
    return table_information(p, [(0,), tuple(range(1, p.ndim))])


GROUPINGS = [[(0, 1), (2, 3)], [(3, 0), (1,), (2,)], [(0, 1, 2, 3)], [(2, 0, 1), (3,)]]


@given(seed=st.integers(0, 999), groups=st.sampled_from(GROUPINGS))
def test_a_partition_is_a_relabelling_and_keeps_the_information(seed: int, groups: Groups) -> None:
    p, rng = random_table((3, 2, 2, 3, 2), seed), np.random.default_rng(seed)
    sizes = [math.prod(p.shape[i + 1] for i in group) for group in groups]
    table = grouped(p, groups, [rng.permutation(size) for size in sizes])
    assert about_z(table) == pytest.approx(about_z(p), abs=1e-12)


@given(seed=st.integers(0, 999), groups=st.sampled_from(GROUPINGS), labels=st.integers(1, 6))
def test_a_lossy_map_never_adds_information(seed: int, groups: Groups, labels: int) -> None:
    p, rng = random_table((3, 2, 2, 3, 2), seed), np.random.default_rng(seed)
    sizes = [math.prod(p.shape[i + 1] for i in group) for group in groups]
    table = grouped(p, groups, [rng.integers(0, labels, size) for size in sizes])
    assert about_z(table) <= about_z(p) + 1e-12


def coin_and_maps() -> dict[str, float]:
    """I(Z; G) for Z = X_1 of four fair coins in two groups of two, under several maps."""
    p = np.zeros((2, 2, 2, 2, 2))
    for z in (0, 1):
        p[z, z] = 1 / 16
    maps: dict[str, Callable] = {
        "pairs": lambda a, b: 2 * a + b,
        "sum": lambda a, b: a + b,
        "parity": lambda a, b: a ^ b,
        "first": lambda a, b: a,
    }
    return {"X": about_z(p)} | {n: about_z(grouped(p, PAIRS, [f, f])) for n, f in maps.items()}


def test_where_a_lossy_map_loses_and_where_not() -> None:
    value = coin_and_maps()
    assert value["X"] == pytest.approx(math.log(2))
    assert value["pairs"] == pytest.approx(value["X"])
    assert value["first"] == pytest.approx(value["X"])  # lossy, but not of what concerns Z
    assert value["sum"] == pytest.approx(math.log(2) / 2)
    assert value["parity"] == pytest.approx(0)


# --- overlap: what the penalty can change ---------------------------------------------------------

E = np.eye(6)
OVERLAP = {
    "disjoint": np.stack([E[:3], E[3:]]),
    "half shared": np.stack([E[:3], (E[:3] + E[3:]) / math.sqrt(2)]),
    "fully shared": np.stack([E[:3], E[:3]]),
}
CORRELATED = np.eye(6) + 0.5 * (np.eye(6, k=3) + np.eye(6, k=-3))


@pytest.mark.parametrize(
    ("name", "value"), [("disjoint", 0), ("half shared", 1.010), ("fully shared", 5.890)]
)
def test_overlap_of_two_groups(name: str, value: float) -> None:
    W = OVERLAP[name]
    assert overlap_information(W) == pytest.approx(value, abs=5e-4)
    rows = W.reshape(6, 6)
    by_definition = gaussian_information(rows @ rows.T + 0.01 * np.eye(6), [(0, 1, 2), (3, 4, 5)])
    assert overlap_information(W) == pytest.approx(by_definition, abs=1e-12)


@given(angle=st.floats(0, math.pi / 2), noise=st.floats(0.05, 1))
def test_overlap_in_closed_form_grows_with_what_is_shared(angle: float, noise: float) -> None:
    def turned(angle: float) -> np.ndarray:
        return np.stack([E[:3], math.cos(angle) * E[:3] + math.sin(angle) * E[3:]])

    r = math.cos(angle) / (1 + noise**2)
    value = overlap_information(turned(angle), noise=noise)
    assert value == pytest.approx(-1.5 * math.log1p(-(r**2)), abs=1e-9)
    assert value <= overlap_information(turned(0.9 * angle), noise=noise) + 1e-12


def test_disjoint_groups_of_correlated_latents_still_share() -> None:
    r = 0.5 / 1.01
    assert overlap_information(OVERLAP["disjoint"], CORRELATED) == pytest.approx(
        -1.5 * math.log(1 - r**2)
    )


@pytest.mark.parametrize("name", OVERLAP)
def test_the_estimator_finds_the_overlap_in_samples(name: str) -> None:
    rng, W = np.random.default_rng(0), OVERLAP[name]
    x = rng.normal(size=(10_000, 6)) @ W.reshape(6, 6).T + 0.1 * rng.normal(size=(10_000, 6))
    estimate = total_correlation(x, blocks=[0, 0, 0, 1, 1, 1])
    assert estimate.low is not None and estimate.high is not None
    assert estimate.low < overlap_information(W) < estimate.high


def penalty(W: np.ndarray) -> float:
    """The group lasso of W [G, P, D], its latents that are used put on the unit sphere."""
    norms = np.linalg.norm(W, axis=1)
    length = np.linalg.norm(norms, axis=0)
    used = length > 0
    return float((norms.sum(0)[used] / length[used]).mean())


def test_the_penalty_is_least_where_groups_are_disjoint() -> None:
    values = [penalty(OVERLAP[name]) for name in ("disjoint", "half shared", "fully shared")]
    assert values == sorted(values)
    assert values[0] == 1
    assert values[2] == pytest.approx(math.sqrt(2))


# --- the numbers of the docs page -----------------------------------------------------------------


def computed() -> dict[str, float]:
    copies = dict(inside=[(0, 1), (2, 3)], across=[(0, 2), (1, 3)], both=[(0, 1), (1, 2)])
    values: dict[str, float] = {}
    for name, pairs in copies.items():
        p = coins(pairs)
        values[f"{name}: TC(X)"] = table_information(p, singles(range(4)))
        values[f"{name}: TC(G)"] = table_information(p, PAIRS)
    for name, value in coin_and_maps().items():
        values[f"coin: {name}"] = value
    for name, W in OVERLAP.items():
        values[f"overlap: {name}"] = overlap_information(W)
        values[f"penalty: {name}"] = penalty(W)
    values["overlap: disjoint, latents correlated"] = overlap_information(
        OVERLAP["disjoint"], CORRELATED
    )
    for n in (512, 2_000, 10_000):
        values[f"bias: {n:,} points"] = wishart_bias(n, 192)
    return values


def test_numbers_of_the_docs_page_are_those_computed_here() -> None:
    text = DOC.read_text(encoding="utf-8")
    rows = re.findall(r"<!-- (.+?) -->\s*(-?[\d.]+)", text)
    values = computed()
    assert sorted(name for name, _ in rows) == sorted(values)
    for name, number in rows:
        digits = len(number.partition(".")[2])
        assert abs(values[name] - float(number)) <= 0.5001 * 10**-digits, name
