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
from sparsejepa.model import regularizers
from sparsejepa.model.jepa import SparseJEPA
from sparsejepa.training.build import build_model
from sparsejepa.training.loop import pretrain

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
        {"target_layers": 3, "target_centering": True},
        {"vicreg": (0.1, 0.002)},
        {"sigreg": 0.01, "groups": "none"},
        {"activation_l1": 0.1},
        {"rectified": 0.1, "rectified_share": 0.5, "beta": 0.0},
        {"stem": "hierarchical"},
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
    regularised = settings.keys() & {"vicreg", "sigreg", "activation_l1", "rectified"}
    assert all((row["regularizer"] > 0) == bool(regularised) for row in rows)
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


def test_a_run_with_random_draws_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sigreg": 0.1, "rectified": 0.1, "stem": "hierarchical", "checkpoint_every": 2}
    config = config_of(folder, **settings)
    whole = pretrain(config, out=tmp_path / "whole")
    forward = SparseJEPA.forward

    def interrupted(self: SparseJEPA, *args: Any, step: int, **kw: Any) -> Any:
        if step == 3:
            raise RuntimeError("killed")
        return forward(self, *args, step=step, **kw)

    with monkeypatch.context() as patched:
        patched.setattr(SparseJEPA, "forward", interrupted)
        with pytest.raises(RuntimeError):
            pretrain(config, out=tmp_path / "killed")
    again = pretrain(config, out=tmp_path / "killed", resume=True)
    assert load(again.path).fingerprint() == load(whole.path).fingerprint()


def test_a_regulariser_that_is_not_finite_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regularizers, "activation_l1", lambda z: z.sum() * float("nan"))
    with pytest.raises(UserError, match="'regularizer' is not finite at step 0"):
        pretrain(config_of(folder, activation_l1=0.1), out=tmp_path / "run")


def test_the_regulariser_adds_to_the_total_and_reaches_the_context_encoder_alone() -> None:
    settings = {"vicreg": (0.5, 0.02), "sigreg": 0.1, "activation_l1": 0.1, "rectified": 0.1}
    config = preset("nano").replace(patch_size=8, num_groups=4)
    plain, other = (build_model(c, (32, 32), 10) for c in (config, config.replace(**settings)))
    images = torch.randn(6, 3, 32, 32)
    a, b = plain(images, step=3), other(images, step=3)
    assert a.regularizer == 0 and b.regularizer > 0
    assert torch.equal(a.prediction, b.prediction) and torch.equal(a.group, b.group)
    torch.testing.assert_close(b.total, a.total + b.regularizer)
    b.regularizer.backward()
    reached = {n.split(".")[0] for n, p in other.named_parameters() if p.grad is not None}
    assert reached == {"context_encoder"}
    next_step = other(images, step=4, masks=other.sampler.sample(6, seed=0, step=3))
    assert next_step.regularizer != b.regularizer  # other directions and samples


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predict": "pixels", "groups": "feature"}, "--predict pixels: --groups feature"),
        ({"predict": "pixels", "target_layers": 2}, "--predict pixels: --target-layers"),
        ({"predict": "pixels", "target_centering": True}, "--predict pixels: --target-layers"),
        ({"target_layers": 7}, "--target-layers 7 is more than the 6 blocks .* at most 6"),
        ({"pattern": "random"}, "--pattern random needs --density"),
        ({"predictor": "groups", "groups": "none"}, "--predictor groups needs groups; choose"),
        ({"predictor": "groups", "group_detach": 0.5}, "--group-detach 0.5: with --predictor gro"),
        ({"predictor": "groups", "predictor_pass": "packed"}, "--predictor-pass packed: only for"),
        ({"pattern": "random", "density": 0.5, "groups": "none"}, "--pattern random: with"),
        ({"pattern": "random", "density": 0.01}, "--density 0.01 is below 1/16"),
        ({"stem": "hierarchical", "patch_size": 1}, "--stem hierarchical needs a --patch-size"),
        ({"vicreg": (0.1,)}, "--vicreg 0.1: must be 2 numbers"),
        ({"vicreg": (0.1, -1.0)}, "--vicreg -1: must be at least 0"),
        ({"rectified_share": 1.0}, "--rectified-share 1: must be between 0.01 and 0.99"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        preset("nano").replace(**settings).check()
    assert "\n" not in str(caught.value)
