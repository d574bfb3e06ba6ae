"""The settings of the study's arms: each trains, leaves a whole run, and says what cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsejepa.config import Config, preset
from sparsejepa.encoders.encoder import load_groups
from sparsejepa.encoders.load import load
from sparsejepa.errors import UserError
from sparsejepa.study import pretrain

TINY: dict[str, Any] = {
    "batch_size": 16, "steps": 6, "predictor_dim": 32, "predictor_depth": 1, "num_groups": 4,
    "threads": 1, "log_every": 2, "device": "cpu",
}  # fmt: skip


def config_of(folder: Path, **settings: Any) -> Config:
    return preset("nano").replace(data=str(folder), **{**TINY, **settings})


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize(
    "settings",
    [
        {"predict": "pixels"},
        {"predict": "pixels", "groups": "concept", "predictor": "mlp", "loss": "l2"},
        {"pattern": "random", "density": 0.5},
        {"predictor": "groups", "checkpoint_activations": True},
        {"predictor": "groups", "groups": "feature", "kl": "posterior", "w_form": "plain"},
    ],
    ids=lambda s: "-".join(s),
)
def test_each_setting_trains_and_its_run_loads(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = config_of(folder, **settings)
    run = pretrain(config, out=tmp_path / "run")
    rows = rows_of(run.path)
    assert len(rows) >= 3
    encoder = load(run.path)
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    assert encoder.tokens(images).shape == (2, 16, 96)
    assert encoder.untrained(0).architecture == encoder.architecture
    groups = load_groups(run.path, (4, 4))
    assert (groups is None) == (config.groups.groups == "none")
    if groups is not None:
        index = torch.arange(16)[None].expand(2, -1)
        predicted = groups(encoder.tokens(images), index, index)
        assert predicted.shape == (2, 16, 48 if config.loss.predict == "pixels" else 96)
    if config.model.predictor == "groups":
        assert all(row["prediction"] == row["group"] > 0 for row in rows)
    if config.groups.pattern == "random":
        # From a tenth to six tenths of the five steps before the last one.
        wanted = [1 - 0.5 * min(1, max(0, row["step"] / 5 - 0.1) / 0.5) for row in rows]
        assert [row["density"] for row in rows] == pytest.approx(wanted, abs=1 / 384)
        assert rows[-1]["density"] == 0.5 and {row["lam"] for row in rows} == {0}
        assert run.summary["w_nonzero"] == run.summary["w_total"] / 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predict": "pixels", "groups": "feature"}, "--predict pixels: --groups feature"),
        ({"pattern": "random"}, "--pattern random needs --density"),
        ({"predictor": "groups", "groups": "none"}, "--predictor groups needs groups; choose"),
        ({"predictor_pass": "packed"}, "--predictor-pass packed: unknown; there are blocks, union"),
        ({"pattern": "random", "density": 0.5, "groups": "none"}, "--pattern random: with"),
        ({"pattern": "random", "density": 0.01}, "--density 0.01 is below 1/16"),
        ({"crop_scale": (0.1,)}, "--crop-scale 0.1: must be 2 numbers"),
        ({"crop_scale": (-1.0, 0.1)}, "--crop-scale -1: must be between 0.01 and 1"),
        ({"stem": "hierarchical"}, "--stem: patches are always embedded by a linear map; leave it"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        preset("nano").replace(**settings).check()
    assert "\n" not in str(caught.value)
