"""What the paper's lemma and theorem give, and the numbers of docs/theory.md.

Total correlation and mutual information come from whole probability tables here, by their
definitions; nothing is estimated but where it says so.
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

from sparsejepa.evaluation.information import overlap_information, total_correlation, wishart_bias

DOC = Path(__file__).parent.parent / "docs" / "theory.md"
Groups = Sequence[tuple[int, ...]]
PAIRS = [(0, 1), (2, 3)]
E = np.eye(6)
OVERLAP = {
    "disjoint": np.stack([E[:3], E[3:]]),
    "half shared": np.stack([E[:3], (E[:3] + E[3:]) / math.sqrt(2)]),
    "fully shared": np.stack([E[:3], E[:3]]),
}


def information(p: np.ndarray, groups: Groups) -> float:
    """Total correlation between groups of the variables, which are the axes of the table p."""

    def entropy(axes: tuple[int, ...]) -> float:
        q = p.sum(tuple(i for i in range(p.ndim) if i not in axes))
        return float(-(q[q > 0] * np.log(q[q > 0])).sum())

    return sum(map(entropy, groups)) - entropy(tuple(i for group in groups for i in group))


def singles(variables: Sequence[int]) -> Groups:
    return [(i,) for i in variables]


def random_table(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    p = rng.gamma(0.5, size=shape) * (rng.random(shape) < 0.8) + 1e-3
    return p / p.sum()


def coins(copies: Sequence[tuple[int, int]]) -> np.ndarray:
    """Four fair coins; of each pair in `copies` one coin is the copy of the other."""
    outcomes, p = np.indices((2, 2, 2, 2)), np.ones((2, 2, 2, 2))
    for i, j in copies:
        p[outcomes[i] != outcomes[j]] = 0
    return p / p.sum()


partitions = st.permutations(range(5)).flatmap(
    lambda order: st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True).map(
        lambda cuts: [tuple(part) for part in np.split(np.array(order), sorted(cuts))]
    )
)


@given(groups=partitions, seed=st.integers(0, 999))
def test_grouping_lowers_total_correlation_by_what_lies_inside(groups: Groups, seed: int) -> None:
    p = random_table((2, 3, 2, 2, 3), seed)
    whole, between = information(p, singles(range(5))), information(p, groups)
    inside = sum(information(p, singles(group)) for group in groups)
    assert whole == pytest.approx(between + inside, abs=1e-12)
    assert -1e-12 <= between <= whole + 1e-12


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
    return information(p, [(0,), tuple(range(1, p.ndim))])


@given(seed=st.integers(0, 999), groups=st.sampled_from([PAIRS, [(3, 0), (1,), (2,)]]))
def test_a_relabelling_keeps_the_information_and_no_map_adds_any(seed: int, groups: Groups) -> None:
    p, rng = random_table((3, 2, 2, 3, 2), seed), np.random.default_rng(seed)
    sizes = [math.prod(p.shape[i + 1] for i in group) for group in groups]
    table = grouped(p, groups, [rng.permutation(size) for size in sizes])
    assert about_z(table) == pytest.approx(about_z(p), abs=1e-12)
    lossy = grouped(p, groups, [rng.integers(0, 3, size) for size in sizes])
    assert about_z(lossy) <= about_z(p) + 1e-12


@pytest.mark.parametrize("name", OVERLAP)
def test_the_overlap_is_its_definition_and_what_samples_give(name: str) -> None:
    rng, W = np.random.default_rng(0), OVERLAP[name]
    rows = W.reshape(6, 6)
    S = rows @ rows.T + 0.01 * np.eye(6)
    logs = [np.linalg.slogdet(part)[1] for part in (S[:3, :3], S[3:, 3:], S)]
    overlap = overlap_information(W)
    assert overlap == pytest.approx((logs[0] + logs[1] - logs[2]) / 2, abs=1e-12)
    x = rng.normal(size=(10_000, 6)) @ rows.T + 0.1 * rng.normal(size=(10_000, 6))
    estimate = total_correlation(x, blocks=[0, 0, 0, 1, 1, 1])
    assert estimate.low is not None and estimate.high is not None
    assert estimate.low < overlap < estimate.high


def penalty(W: np.ndarray) -> float:
    """The group lasso of W [G, P, D], its latents that are used put on the unit sphere."""
    norms = np.linalg.norm(W, axis=1)
    length = np.linalg.norm(norms, axis=0)
    return float((norms.sum(0)[length > 0] / length[length > 0]).mean())


def computed() -> dict[str, float]:
    """Every number of the page, by the name in the comment before it."""
    copies = dict(inside=[(0, 1), (2, 3)], across=[(0, 2), (1, 3)], both=[(0, 1), (1, 2)])
    values: dict[str, float] = {}
    for name, pairs in copies.items():
        values[f"{name}: TC(X)"] = information(coins(pairs), singles(range(4)))
        values[f"{name}: TC(G)"] = information(coins(pairs), PAIRS)
    p = np.zeros((2, 2, 2, 2, 2))  # Z is the first of four fair coins
    p[0, 0] = p[1, 1] = 1 / 16
    maps: dict[str, Callable] = {
        "pairs": lambda a, b: 2 * a + b, "sum": lambda a, b: a + b, "parity": lambda a, b: a ^ b,
        "first": lambda a, b: a,
    }  # fmt: skip
    values["coin: X"] = about_z(p)
    values |= {f"coin: {name}": about_z(grouped(p, PAIRS, [f, f])) for name, f in maps.items()}
    for name, W in OVERLAP.items():
        values[f"overlap: {name}"] = overlap_information(W)
        values[f"penalty: {name}"] = penalty(W)
    correlated = E + 0.5 * (np.eye(6, k=3) + np.eye(6, k=-3))
    values["overlap: disjoint, latents correlated"] = overlap_information(
        OVERLAP["disjoint"], correlated
    )
    return values | {f"bias: {n:,} points": wishart_bias(n, 192) for n in (512, 2_000, 10_000)}


def test_numbers_of_the_docs_page_are_those_computed_here() -> None:
    rows = re.findall(r"<!-- (.+?) -->\s*(-?[\d.]+)", DOC.read_text(encoding="utf-8"))
    values = computed()
    assert sorted(name for name, _ in rows) == sorted(values)
    for name, number in rows:
        digits = len(number.partition(".")[2])
        assert abs(values[name] - float(number)) <= 0.5001 * 10**-digits, name
