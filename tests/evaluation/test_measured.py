from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from sparsejepa.data.catalog import load_dataset
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.errors import UserError
from sparsejepa.evaluation import measured as module
from sparsejepa.evaluation.classifiers import LogisticProbe
from sparsejepa.evaluation.disentangle import dci
from sparsejepa.evaluation.features import embed
from sparsejepa.evaluation.information import total_correlation
from sparsejepa.evaluation.measured import MEASURES, check_measures, encoder_flops, measure
from sparsejepa.model.encoder import ViT
from sparsejepa.training.quality import rankme

MEAN, STD = (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
DATA: dict[str, Any] = {"data": "scenes:single", "targets": ["colour"], "limit": 300}


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """A few hundred images."""
    monkeypatch.setattr(module, "FACTOR_IMAGES", (300, 200))
    real = module.load_splits

    def load_splits(name: str, holdout: int, **settings: Any):
        train, test = real(name, holdout, **settings)
        return train, test if holdout else test.subset(250)

    monkeypatch.setattr(module, "load_splits", load_splits)


def make_encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(ViT(32, 8, embed_dim=12, depth=2, num_heads=3), name="a", mean=MEAN, std=STD)


def sparse_map() -> torch.Tensor:
    W = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0))
    return W * (torch.arange(12) % 4 == torch.arange(4)[:, None])[:, None]


def test_information_is_of_the_test_images_with_a_twin_of_the_seed() -> None:
    encoder = make_encoder()
    found = measure(["information"], encoder, None, seed=3, **DATA)["information"]
    test = load_dataset("scenes:single", "test").subset(250)
    for prefix, source in (("", encoder), ("untrained_", encoder.untrained(3))):
        x = embed(source, test).x
        assert found[f"{prefix}rankme"] == rankme(x)
        assert found[f"{prefix}total_correlation"] == total_correlation(x).value
    assert found["n"] == 250 and found["scored_on"] == "test"


def test_information_is_of_the_images_held_out() -> None:
    encoder = make_encoder()
    found = measure(["information"], encoder, None, holdout=120, **DATA)["information"]
    _, aside = load_dataset("scenes:single", "train").split_off(120)
    assert found["n"] == 120 and found["scored_on"] == "holdout"
    assert found["rankme"] == rankme(embed(encoder, aside).x)
    _, aside = load_dataset("scenes:single", "train").split_off(10)
    few = measure(["information"], encoder, None, **{**DATA, "holdout": 10})["information"]
    assert few["total_correlation"] is None and "10 points are too few" in few["note"]
    assert few["rankme"] == rankme(embed(encoder, aside).x)


def test_factors_by_latents_and_by_groups() -> None:
    encoder, W = make_encoder(), sparse_map()
    found = measure(["factors"], encoder, W, **DATA)["factors"]
    assert (found["n_train"], found["n_test"]) == (300, 200)
    parts = [
        load_dataset("scenes:single", "train").subset(300),
        load_dataset("scenes:single", "test").subset(250).subset(200),
    ]
    codes = [embed(encoder, part).x.astype(float) for part in parts]
    mean, std = codes[0].mean(0), codes[0].std(0)
    codes = [(code - mean) / std for code in codes]
    values = [np.stack([t.values for t in part.targets.values()], 1) for part in parts]
    by_latent = dci(codes[0], values[0], codes[1], values[1])
    for name in ("disentanglement", "completeness", "informativeness"):
        assert found[f"dci_{name}"] == pytest.approx(by_latent[name].value, abs=0.02)
    units = np.repeat(np.arange(4), 3)
    maps = [code @ np.concatenate(W.numpy()).T for code in codes]
    by_group = dci(maps[0], values[0], maps[1], values[1], units=units)["disentanglement"]
    assert found["groups_dci_disentanglement"] == pytest.approx(by_group.value, abs=0.02)
    assert 0 <= found["mig"] < 0.2
    assert found["untrained_dci_disentanglement"] != found["dci_disentanglement"]
    dense = measure(["factors"], encoder, None, **DATA)["factors"]
    assert dense["groups_dci_disentanglement"] is None
    assert dense["dci_disentanglement"] == found["dci_disentanglement"]


def test_kept_is_on_the_first_target_and_the_limited_images() -> None:
    encoder = make_encoder()
    found = measure(["kept"], encoder, sparse_map(), **DATA)["kept"]
    train = load_dataset("scenes:single", "train").subset(300)
    test = load_dataset("scenes:single", "test").subset(250)
    y, wanted = (part.targets["colour"].values for part in (train, test))
    probe = LogisticProbe().fit(embed(encoder, train).x, y)
    assert found["curve"][0]["accuracy"] == probe.score(embed(encoder, test).x, wanted)
    assert found["target"] == "colour" and (found["n_train"], found["n_test"]) == (300, 250)
    # Disjoint groups of three latents: half of the groups is half of the latents.
    assert [row["latents"] for row in found["curve"]] == [12, 9, 6, 3]
    assert [row["map_flops"] for row in found["curve"]] == [72, 54, 36, 18]


def test_every_measure_is_plain_values_and_unknown_ones_are_refused() -> None:
    found = measure(list(MEASURES), make_encoder(), sparse_map(), **DATA)
    assert list(found) == ["information", "factors", "kept"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert measure([], make_encoder(), None, **DATA) == {}
    with pytest.raises(UserError, match=r"measure 'factor': .*did you mean 'factors'"):
        check_measures(["kept", "factor"])


def test_encoder_flops_are_counted_by_hand() -> None:
    width, tokens, depth = 12, 16, 2
    linear = tokens * (192 * width + depth * 12 * width**2)
    attention = depth * 2 * tokens**2 * width
    assert encoder_flops(make_encoder()) == 2 * (linear + attention)
