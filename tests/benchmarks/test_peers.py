"""The contest with other packages: what is counted, and packages that are absent or changed."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import sys
from dataclasses import replace

import pytest

from sparsejepa.benchmarks import peers
from sparsejepa.benchmarks.peers import Peer, Seen, Step, count, installed, section
from sparsejepa.benchmarks.settings import BenchSettings, config, sizes
from sparsejepa.model.costs import products

TINY = BenchSettings(
    encoder="nano", img_size=16, batch=4, predictor_dim=32, predictor_depth=1, target_shape=(2, 2),
    context=5, rounds=1, quick=True,
)  # fmt: skip
BY_NAME = {peer.package: peer for peer in peers.PEERS}


def fake(package: str, **changes: object) -> Peer:
    """A peer that does the work of ours and is counted as such."""
    return replace(Peer(package, "1.0", "step", peers._our_step), **changes)  # type: ignore[arg-type]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages that are there, by version; no others are."""
    there: dict[str, str] = {}

    def version(name: str) -> str:
        if name in there:
            return there[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(peers, "has_bf16", lambda device: False)
    return there


def test_absent_peers_are_named_and_skipped(versions: dict[str, str]) -> None:
    result = section(TINY)
    assert result.rows == []
    for peer in peers.PEERS:
        note = next(note for note in result.notes if note.startswith(f"{peer.package}:"))
        assert "not installed" in note and "sparsejepa[bench]" in note
    assert any("no bf16 instructions" in note for note in result.notes)


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.package)
def test_peer_that_lacks_what_it_had_is_named_with_its_version(
    peer: Peer, versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions[peer.package] = "99.0"
    # Importing a module that is None is an ImportError, as with one that has gone.
    monkeypatch.setitem(sys.modules, peer.package.replace("-", "_"), None)
    for name in [n for n in sys.modules if n.startswith(f"{peer.package.replace('-', '_')}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(peers, "PEERS", (peer,))
    result = section(TINY)
    (note,) = [note for note in result.notes if peer.package in note]
    assert note.startswith(f"{peer.package} 99.0 left out (ModuleNotFoundError")
    assert peer.tried in note and "\n" not in note
    assert result.rows == []


@pytest.mark.parametrize(
    "error", [AttributeError("gone\nand more"), TypeError(), RuntimeError("x")]
)
def test_the_bench_goes_on_after_a_peer_that_fails(
    error: Exception, versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: BenchSettings, precision: str) -> Step:
        raise error

    versions |= {"broken": "2.0", "good": "1.0"}
    monkeypatch.setattr(peers, "PEERS", (fake("broken", build=broken), fake("good")))
    result = section(TINY)
    assert [row["name"] for row in result.rows] == ["ours, fp32", "good, fp32"]
    (note,) = [note for note in result.notes if "broken" in note]
    assert type(error).__name__ in note and "\n" not in note


def test_a_peer_that_fails_only_when_called_is_left_out(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(number: int) -> Seen:
        raise ValueError("wrong shape")

    versions["late"] = "1.0"
    monkeypatch.setattr(peers, "PEERS", (fake("late", build=lambda *_: step),))
    result = section(TINY)
    assert result.rows == [] and "wrong shape" in result.notes[-1]


def test_another_version_is_timed_and_named(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions["good"] = "1.1"
    monkeypatch.setattr(peers, "PEERS", (fake("good"),))
    result = section(TINY)
    assert any("good 1.1" in note and "1.0" in note for note in result.notes)
    ours, good = result.rows
    assert good["version"] == "1.1" and ours["version"] is None
    for row in (ours, good):
        assert row["x_ours_faster"] == pytest.approx(row["x_per_operation"])
        assert row["images_per_second"] == pytest.approx(TINY.batch / row["median_s"])
        assert row["context"] == TINY.context and row["targets"] == 4 * 4


def test_with_little_memory_nothing_is_timed(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions["good"] = "1.0"
    monkeypatch.setattr(peers, "PEERS", (fake("good"),))
    monkeypatch.setattr(peers, "available_memory", lambda device: 1e6)
    result = section(TINY)
    assert result.rows == []
    assert any("step, fp32, left out" in note and "GiB" in note for note in result.notes)


def test_operations_are_those_of_the_model() -> None:
    work = count(peers._our_step, TINY, "fp32")
    expected = sum(p.flops for p in products(sizes(TINY, config(TINY)))) / TINY.batch
    # Attention and augmentation are small here.
    assert 0.95 * expected < work.flops < 1.35 * expected


def test_nothing_that_a_peer_changes_on_import_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers, level = logging.root.handlers[:], logging.root.level
    monkeypatch.delenv("SPARSEJEPA_TEST", raising=False)
    with pytest.raises(KeyError), peers.unchanged():
        os.environ["SPARSEJEPA_TEST"] = "1"
        logging.root.handlers[:] = []
        logging.root.setLevel(1)
        raise KeyError
    assert "SPARSEJEPA_TEST" not in os.environ
    assert logging.root.handlers == handlers and logging.root.level == level


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_installed_peers_take_steps(name: str, precision: peers.Precision) -> None:
    if installed(name) is None:
        pytest.skip(f"{name} is not installed; pip install 'sparsejepa[bench]'")
    with peers.unchanged():
        work = count(BY_NAME[name].build, TINY, precision)
    assert 1 <= work.context <= math.prod(TINY.grid) and work.flops > 0
    if precision == "bf16":  # products in other kernels than torch's own are not counted
        return
    mine = count(peers._ours(BY_NAME[name], work)[1], TINY, precision)
    if name == "lightly":
        assert (work.context, work.targets) == (TINY.context, 4 * 4)
    if name != "stable-pretraining":
        assert work.flops == pytest.approx(mine.flops, rel=0.1)
