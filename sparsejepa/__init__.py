"""SparseJEPA: self-supervised image pretraining with a group-sparse map from latents to groups.

What is public is imported when it is first used: ``import sparsejepa`` itself costs nothing.

Results of different `TRAIN_VERSION` or `EVAL_VERSION` are never averaged or paired. Raise the one
by hand when a change alters what a run computes from the same settings and seed, the other when it
alters what a probe or another measure reads from the same encoder; tests/test_golden.py fails when
that may be so.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
TRAIN_VERSION = 3
EVAL_VERSION = 1

if TYPE_CHECKING:
    from sparsejepa.config import Config, preset
    from sparsejepa.data.catalog import load_dataset
    from sparsejepa.encoders.encoder import Encoder
    from sparsejepa.encoders.load import load
    from sparsejepa.errors import UserError
    from sparsejepa.evaluation.classifiers import KNNProbe, LogisticProbe
    from sparsejepa.evaluation.features import embed
    from sparsejepa.explain.posthoc import PostHocGroups
    from sparsejepa.explain.run import run_explain
    from sparsejepa.model.groups import GroupMap
    from sparsejepa.model.jepa import SparseJEPA
    from sparsejepa.model.masks import MaskSampler
    from sparsejepa.model.vit import ViT
    from sparsejepa.study import pretrain
    from sparsejepa.study.sweep import run_sweep
    from sparsejepa.training.build import build_model

__all__ = [
    "EVAL_VERSION", "TRAIN_VERSION", "Config", "Encoder", "GroupMap", "KNNProbe", "LogisticProbe",
    "MaskSampler", "PostHocGroups", "SparseJEPA", "UserError", "ViT", "__version__", "build_model",
    "embed", "load", "load_dataset", "preset", "pretrain", "run_explain", "run_sweep",
]  # fmt: skip
_HOMES = {
    "config": ("Config", "preset"), "errors": ("UserError",), "data.catalog": ("load_dataset",),
    "encoders.encoder": ("Encoder",), "encoders.load": ("load",), "study": ("pretrain",),
    "evaluation.classifiers": ("KNNProbe", "LogisticProbe"),
    "evaluation.features": ("embed",), "explain.posthoc": ("PostHocGroups",),
    "explain.run": ("run_explain",), "model.groups": ("GroupMap",), "model.jepa": ("SparseJEPA",),
    "model.masks": ("MaskSampler",), "model.vit": ("ViT",), "study.sweep": ("run_sweep",),
    "training.build": ("build_model",),
}  # fmt: skip
_EXPORTS = {name: f"sparsejepa.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sparsejepa' has no attribute '{name}'")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
