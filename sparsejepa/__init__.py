"""SparseJEPA: self-supervised image pretraining with a group-sparse map from latents to groups.

Everything public is reachable from here and imported only when it is first used, so that
``import sparsejepa`` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsejepa.version import __version__ as __version__

_EXPORTS = {
    "Config": "sparsejepa.config",
    "preset": "sparsejepa.config",
    "UserError": "sparsejepa.errors",
    "ViT": "sparsejepa.model.vit",
    "MaskSampler": "sparsejepa.model.masks",
    "GroupMap": "sparsejepa.model.groups",
    "SparseJEPA": "sparsejepa.model.jepa",
    "load_dataset": "sparsejepa.data.catalog",
    "load": "sparsejepa.encoders.load",
    "Encoder": "sparsejepa.encoders.encoder",
    "embed": "sparsejepa.evaluation.features",
    "LogisticProbe": "sparsejepa.evaluation.classifiers",
    "RidgeProbe": "sparsejepa.evaluation.classifiers",
    "KNNProbe": "sparsejepa.evaluation.classifiers",
    "PostHocGroups": "sparsejepa.explain.posthoc",
    "pretrain": "sparsejepa.study",
    "build_model": "sparsejepa.training.build",
    "run_sweep": "sparsejepa.study.sweep",
    "run_explain": "sparsejepa.explain.run",
}

if TYPE_CHECKING:
    from sparsejepa.config import Config as Config
    from sparsejepa.config import preset as preset
    from sparsejepa.data.catalog import load_dataset as load_dataset
    from sparsejepa.encoders.encoder import Encoder as Encoder
    from sparsejepa.encoders.load import load as load
    from sparsejepa.errors import UserError as UserError
    from sparsejepa.evaluation.classifiers import KNNProbe as KNNProbe
    from sparsejepa.evaluation.classifiers import LogisticProbe as LogisticProbe
    from sparsejepa.evaluation.classifiers import RidgeProbe as RidgeProbe
    from sparsejepa.evaluation.features import embed as embed
    from sparsejepa.explain.posthoc import PostHocGroups as PostHocGroups
    from sparsejepa.explain.run import run_explain as run_explain
    from sparsejepa.model.groups import GroupMap as GroupMap
    from sparsejepa.model.jepa import SparseJEPA as SparseJEPA
    from sparsejepa.model.masks import MaskSampler as MaskSampler
    from sparsejepa.model.vit import ViT as ViT
    from sparsejepa.study import pretrain as pretrain
    from sparsejepa.study.sweep import run_sweep as run_sweep
    from sparsejepa.training.build import build_model as build_model


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sparsejepa' has no attribute '{name}'")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
