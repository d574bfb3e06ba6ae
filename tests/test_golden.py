"""Golden numbers: what a run and a probe compute, to the last digits that machines agree on.

Twenty steps in float64 of every kind of arm from fixed weights and images, the masks and the order
of the images, and probes on fixed features, against the values in tests/golden/. Refactoring moves
none of them. If a change is meant to, raise `TRAIN_VERSION` (train.json) or `EVAL_VERSION`
(probe.json, posthoc.json) in sparsejepa/__init__.py by hand and write the values anew::

    python tests/test_golden.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsejepa.config import Config
from sparsejepa.data.images import ImageSet, Target
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.evaluation.classifiers import KNNProbe, LogisticProbe
from sparsejepa.evaluation.features import embed, pixel_features
from sparsejepa.evaluation.probe import labelled_share
from sparsejepa.explain.posthoc import PostHocGroups
from sparsejepa.model import jepa
from sparsejepa.model.jepa import Losses, SparseJEPA
from sparsejepa.model.losses import KLParts, aggregate_kl
from sparsejepa.model.masks import MaskSampler
from sparsejepa.model.vit import ViT
from sparsejepa.training import schedule
from sparsejepa.training import step as step_module
from sparsejepa.training.build import build_model
from sparsejepa.training.loop import EpochOrder
from sparsejepa.training.step import TrainStep

GOLDEN = Path(__file__).parent / "golden"
STEPS, IMAGES, BATCH, SIDE = 20, 24, 12, 16
SECTIONS = ("model", "masks", "groups", "loss", "optim")

# Every setting of these sections, so that a changed default moves nothing.
SETTINGS: dict[str, Any] = {
    # model
    "encoder": "16,2,2", "init": None, "patch_size": 2, "drop_path": 0.0, "predictor_dim": 16,
    "predictor": "transformer", "predictor_depth": 1, "predictor_pass": "blocks",
    # masks
    "num_targets": 3, "target_scale": (0.15, 0.2), "target_aspect_ratio": (0.75, 1.5),
    "context_scale": (0.85, 1.0), "context_counts": (16, 20),
    # groups
    "groups": "region", "num_groups": 4, "w_form": "sphere", "lam": 0.02, "density": None,
    "pattern": "learned", "debias": 0.15,
    # loss
    "loss": "smooth_l1", "predict": "embeddings", "kl": "aggregate", "beta": 0.05,
    "group_weight": 0.3,
    # optim
    "epochs": 1, "steps": STEPS, "batch_size": BATCH, "lr": 3e-3, "warmup": 0.2,
    "weight_decay": 0.05, "ema": None, "ema_final": None, "precision": "fp64", "accumulate": 1,
    # run
    "seed": 3, "device": "cpu", "compile": False, "parallel": "ddp",
    "checkpoint_activations": False,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"groups": "none"},
    "dense, l2, drop path": {"groups": "none", "loss": "l2", "drop_path": 0.2, "accumulate": 2,
                             "ema": 0.9, "ema_final": 0.99},
    "region, sphere, lam": {},
    "region, plain, lam, l2": {"w_form": "plain", "lam": 0.02, "loss": "l2", "beta": 0.0},
    "concept, sphere, density": {"groups": "concept", "lam": 0.0, "density": 0.4},
    "region, no predictor": {"predictor": "groups", "density": 0.4},
    "concept, plain, lam, posterior KL": {"groups": "concept", "w_form": "plain", "lam": 0.02,
                                          "kl": "posterior"},
    "feature, sphere, lam, l2": {"groups": "feature", "lam": 0.012, "loss": "l2",
                                 "predictor": "mlp"},
    "feature, plain, density": {"groups": "feature", "w_form": "plain", "lam": 0.0, "density": 0.4,
                                "predictor_pass": "union"},
    "concept, sphere, random zeros": {"groups": "concept", "pattern": "random", "lam": 0.0,
                                      "density": 0.5, "debias": 0.0},
}  # fmt: skip


# What were settings when the values were written and are constants now, with other values.
CLIP, LR_FINAL, EMA_REFERENCE = 0.5, 1e-5, (0.99997, 0.999999)
CORRELATION = 0.7
"""Weight of that part of the KL."""
DETACHED = 2
"""Steps in which the group loss did not reach the encoder."""


def draw(name: str, *shape: int) -> np.ndarray:
    """Standard normal float64 numbers that a name stands for."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).normal(size=shape)


def fill(model: SparseJEPA) -> None:
    """Give every trained parameter its fixed values, W at its scale, and the target a copy."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        values = draw(name, *parameter.shape)
        if parameter.ndim > 1:
            values /= np.sqrt(parameter.shape[-1])
        else:
            values = 0.1 * values + (name.endswith("weight"))
        if model.groups is not None and parameter is model.groups.W:
            values *= (model.groups.block_norms() > 0).numpy()[:, None]  # zeros drawn at random
            values /= np.sqrt((values**2).sum((0, 1)))
            values *= 1 if model.groups.sphere else 2
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))
    model.target_encoder.load_state_dict(model.context_encoder.state_dict())


@contextlib.contextmanager
def constants(arm: str) -> Iterator[None]:
    """The constants, and the weight of the KL's parts, that an arm's values were written with."""

    def kl(*moments: Tensor) -> KLParts:
        parts = aggregate_kl(*moments)
        return KLParts(parts.marginal, CORRELATION * parts.total_correlation)

    unclipped = arm == "concept, plain, lam, posterior KL"
    with (
        mock.patch.object(step_module, "CLIP", math.inf if unclipped else CLIP),
        mock.patch.object(schedule, "LR_FINAL", LR_FINAL),
        mock.patch.object(schedule, "EMA_REFERENCE", EMA_REFERENCE),
        mock.patch.object(jepa, "aggregate_kl", kl),
    ):
        yield


def train(arm: str) -> dict[str, Any]:
    """What an arm computes: start, loss terms by step, final weights and zeros of W."""
    with constants(arm):
        return trained(arm)


def trained(arm: str) -> dict[str, Any]:
    config = Config().replace(**SETTINGS | ARMS[arm])
    model = build_model(config, (SIDE, SIDE), STEPS)
    start = {n: sizes(p) for n, p in model.named_parameters() if p.requires_grad}
    step = TrainStep(config, model, lambda images, *_: images, STEPS)  # type: ignore[arg-type]
    fill(model)
    model.train()
    found: list[Any] = []
    model.register_forward_hook(lambda _, __, losses: found.append(losses))
    images = torch.from_numpy(draw("images", IMAGES, 3, SIDE, SIDE))
    order = EpochOrder(IMAGES, BATCH, config.run.seed)
    hook = None
    if model.groups is not None and config.model.predictor != "groups":
        hook = model.groups.register_forward_pre_hook(lambda _, x: (x[0].detach(), *x[1:]))
    for number in range(STEPS):
        if number == DETACHED and hook is not None:
            hook.remove()
        step(images[order(number)], number)
    terms = [field.name for field in dataclasses.fields(Losses)]
    values = {name: [getattr(losses, name).item() for losses in found] for name in terms}
    values["kl_correlation"] = [value / CORRELATION for value in values["kl_correlation"]]
    result: dict[str, Any] = {
        "start": start,
        "losses": values,
        "weights": {name: projections(name, p) for name, p in model.named_parameters()},
    }
    if model.groups is not None:
        norms = model.groups.block_norms()
        result["groups of each latent"] = [of.nonzero().flatten().tolist() for of in norms.T]
    return result


def sizes(values: Tensor) -> list[float]:
    """The mean absolute value and the root mean square."""
    values = values.detach().double()
    return [values.abs().mean().item(), values.square().mean().sqrt().item()]


def projections(name: str, values: Tensor | np.ndarray) -> list[float]:
    """Two random projections, fixed by the name, of a tensor's values."""
    flat = np.asarray(values.detach() if isinstance(values, Tensor) else values, np.float64).ravel()
    return (draw(f"projection of {name}", 2, len(flat)) @ flat).tolist()


def digest(values: Tensor | np.ndarray) -> str:
    """The sha256 of whole numbers."""
    return hashlib.sha256(np.ascontiguousarray(values, "<i8").tobytes()).hexdigest()


def draws() -> dict[str, str]:
    """Hashes of masks, of an epoch's order and of the draw of a share of the labels."""
    found = {}
    wanted = {k: SETTINGS[k] for k in ("num_targets", "target_scale", "target_aspect_ratio")}
    wanted["context_scale"] = SETTINGS["context_scale"]
    for grid, counts in (((8, 8), (16, 20, 24)), ((6, 9), (12, 15)), ((14, 14), ())):
        for merge in (False, True):
            sampler = MaskSampler(grid, **wanted, context_counts=counts, merge=merge)
            for seed, step in ((0, 0), (0, 1), (7, 1000)):
                masks = sampler.sample(5, seed=seed, step=step)
                name = f"masks, {grid[0]}x{grid[1]}, {merge=}, {seed=}, {step=}"
                found[name] = digest(masks.context) + " " + digest(masks.targets)
    for seed in (0, 7):
        order = EpochOrder(50, 8, seed)
        for epoch in (0, 3):
            steps = [order(6 * epoch + i) for i in range(6)]
            found[f"order, {seed=}, {epoch=}"] = digest(torch.cat(steps))
    return found


def probes() -> dict[str, Any]:
    """What the probes choose and predict on planted classes, and what features are."""
    classes, dim, n = 4, 24, (300, 200)
    labels = [np.arange(count) * 7 % classes for count in n]
    planted, mixing = draw("planted", classes, dim), draw("mixing", dim, dim) / np.sqrt(dim)
    x = [
        (0.3 * planted[y] + draw(f"features {i}", count, dim) @ mixing).astype(np.float32)
        for i, (y, count) in enumerate(zip(labels, n, strict=True))
    ]
    found: dict[str, Any] = {}
    kinds = {
        "logistic": LogisticProbe(), "logistic, fixed C": LogisticProbe(0.01),
        "knn": KNNProbe(), "knn, k = 5": KNNProbe(5),
    }  # fmt: skip
    for name, probe in kinds.items():
        probe.fit(x[0], labels[0])
        found[name] = {
            "chose": probe.settings_,
            "validation": getattr(probe, "validation_score_", None),
            "accuracy": probe.score(x[1], labels[1]),
            "predicted": "".join(map(str, probe.predict(x[1]))),
        }
    for share in (0.01, 0.1):
        found[f"share {share}"] = digest(labelled_share(labels[0], share, 5))
    encoder = ViT(SIDE, 4, embed_dim=16, depth=4, num_heads=2)
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            values = draw(name, *parameter.shape) / (2 if parameter.ndim > 1 else 10)
            parameter.data.copy_(torch.from_numpy(values) + (parameter.ndim == 1))
    frozen = Encoder(encoder.eval(), name="fixed", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    y = np.arange(64) % 3
    pixels = 128 + 40 * draw("pixels", 64, SIDE, SIDE, 3) + 60 * (y == 1)[:, None, None, None]
    images = ImageSet(
        "fixed", "train", pixels.clip(0, 255).astype(np.uint8),
        {"class": Target(y, ("a", "b", "c"))}, frozen.mean, frozen.std,
    )  # fmt: skip
    for pool in ("mean", "concat4"):
        found[f"features, {pool}"] = projections(pool, embed(frozen, images, pool=pool).x)
    found["features, pixels"] = projections("pixels", pixel_features(images).x)
    return found


class FixedStart(PostHocGroups):
    """Groups whose weights begin at fixed values instead of torch's draws."""

    def _start(self, x: Tensor, purpose: str) -> None:
        super()._start(x, purpose)
        with torch.no_grad():
            for name, parameter in self.map_.named_parameters():
                values = draw(f"{purpose}, {name}", *parameter.shape)
                parameter.copy_(torch.from_numpy(values / np.sqrt(parameter.shape[-1])))
            self.map_.W.div_(self.map_.W.square().sum((0, 1)).sqrt())  # latents on the sphere


def posthoc() -> dict[str, Any]:
    """What groups fitted to fixed float64 tokens are, under lam and at a density."""
    common = np.repeat(draw("common", 40, 1, 3), 16, axis=1) @ draw("mix", 3, 12)
    tokens = common + draw("tokens", 40, 16, 12) + draw("place", 16, 12)
    found: dict[str, Any] = {}
    arms: dict[str, dict[str, Any]] = {
        "feature, lam": {"kind": "feature", "lam": 0.02},
        "concept, density": {"kind": "concept", "density": 0.5},
    }
    for name, settings in arms.items():
        groups = FixedStart(4, steps=STEPS, batch_size=16, random_state=3, **settings)
        groups.fit(tokens[:30])
        parts = dict(groups.map_.named_parameters())
        found[name] = {
            "groups of each latent": [row.nonzero()[0].tolist() for row in groups.block_norms_.T],
            "weights": {key: projections(key, value) for key, value in parts.items()},
            "losses": groups.loss_curve_.tolist(),
            "score": groups.score(tokens[30:]),
        }
    return found


def close(found: Any, golden: Any, where: str, relative: float) -> list[str]:
    """Where two trees of values differ: floats by more than `relative`, others at all."""
    if isinstance(golden, dict) and isinstance(found, dict) and set(found) == set(golden):
        return [x for k in golden for x in close(found[k], golden[k], f"{where}: {k}", relative)]
    if isinstance(golden, list) and isinstance(found, list) and len(found) == len(golden):
        pairs = enumerate(zip(found, golden, strict=True))
        return [x for i, (a, b) in pairs for x in close(a, b, f"{where}[{i}]", relative)]
    if isinstance(golden, float) and isinstance(found, float | int):
        same = abs(found - golden) <= relative * abs(golden) + 1e-13
    else:
        same = type(found) is type(golden) and found == golden
    return [] if same else [f"{where} is {found}, was {golden}"]


def read(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def differ(found: Any, golden: Any, where: str, relative: float) -> list[str]:
    """The first five differences of values as JSON has them."""
    return close(json.loads(json.dumps(found)), golden, where, relative)[:5]


def write(name: str, values: dict[str, Any]) -> None:
    """One line for each entry two levels down, floats to 13 digits."""
    shorten = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.13g}"))
    parts = []
    for key, entry in shorten.items():
        inner = json.dumps(entry)
        if isinstance(entry, dict):
            lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items()]
            inner = "{\n" + ",\n".join(lines) + "\n }"
        parts.append(f" {json.dumps(key)}: {inner}")
    (GOLDEN / name).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def test_every_setting_that_counts_is_named() -> None:
    config = Config()
    names = {f.name for s in SECTIONS for f in dataclasses.fields(getattr(config, s))}
    assert names <= set(SETTINGS), "name new settings here, with what was done before they were"


@pytest.mark.parametrize("arm", ARMS)
def test_training_computes_what_it_did(arm: str) -> None:
    golden, found = read("train.json")[arm], train(arm)
    # Where weights begin is drawn in float32 by torch, which machines do to fewer digits.
    assert not differ(found.pop("start"), golden.pop("start"), "start", 1e-5)
    assert not differ(found, golden, arm, 1e-9)


@pytest.mark.parametrize(
    ("compute", "name", "relative"),
    [(draws, "draws", 0.0), (probes, "probe", 1e-4), (posthoc, "posthoc", 1e-9)],
)
def test_masks_orders_probes_and_groups_are_what_they_were(
    compute: Callable[[], Any], name: str, relative: float
) -> None:
    assert not differ(compute(), read(f"{name}.json"), name, relative)


if __name__ == "__main__":
    write("train.json", {arm: train(arm) for arm in ARMS})
    write("draws.json", draws())
    write("probe.json", probes())
    write("posthoc.json", posthoc())
