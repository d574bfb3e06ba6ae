"""Every setting of a run, typed; presets; and the checks that need no data.

The sections of `Config` are the sections of a run's config.toml and of the generated help. Field
names are unique across them, so that a flag (``--lam``) and a keyword (``lam=``) need no prefix.
Imports neither torch nor numpy: the command line reads it before anything heavy.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from sparsejepa.checks import check_image, check_settings
from sparsejepa.errors import UserError, flag, nearest

# Width, depth and heads of the standard ViTs (Dosovitskiy et al. 2021; tiny: Touvron et al. 2021).
ENCODER_SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (96, 6, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}

REMOVED = {
    "balance": "there is no such term any more; leave it out",
    "w_lr_sum": "how far W moves is the same in every run; leave it out",
}
"""Settings that earlier versions had. Files that name them can be read; who sets one is told why
it is gone."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are varied."""

    img_size: tuple[int, ...] = ()
    """Image size in pixels, one number or height and width; the data set's own if not given."""
    limit: int | None = None
    """Use only this many training images: a random subset, each class in proportion."""
    subset_seed: int = 0
    """Seed of that subset (shared by all runs of a sweep)."""
    holdout: int = 0
    """Set this many training images aside: never trained on, and sweeps score their probes on them
    instead of on test. For searching settings."""
    corruption: Literal["none", "noise", "shuffle"] = "none"
    """Pretrain on something else: noise of the images' colours, or images with shuffled patches."""
    data_root: Path | None = None
    """Folder with local copies, in the hub's own layout or as official files; SPARSEJEPA_DATA if
    not given."""
    upscale: bool = False
    """Enlarge images that are smaller than --img-size instead of refusing them."""
    stream: bool = False
    """Read and decode images while training instead of all of them beforehand: for more data than
    the disk can hold decoded. Tar shards are always read so."""
    max_unreadable: float = 0.5
    """Largest share of images that may be left out because they cannot be read (0 to 1)."""
    augment: Literal["none", "crop", "randaugment"] = "crop"
    """crop: random resized crop and flip; randaugment: RandAugment on top of it."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the image's area in a crop."""
    flip: bool = True
    """Mirror half of the images left to right."""
    randaugment: tuple[int, int] = (2, 9)
    """Operations per image and magnitude (0 to 30)."""


@dataclass(frozen=True)
class EncoderConfig:
    """The two encoders and the predictor."""

    encoder: Literal["nano", "tiny", "small", "base", "large", "huge"] = "tiny"
    """Size of the vision transformer."""
    init: str | None = None
    """Go on from these weights instead of random ones: a run directory, timm:NAME, hub:OWNER/NAME
    or a file of weights. Sizes, patches and stem are theirs."""
    encoder_dims: tuple[int, ...] = ()
    """Width, depth and heads, instead of a named size."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    stem: Literal["linear", "hierarchical"] = "linear"
    """From a patch to its token: a linear map, or stacked convolutions within the patch (hMLP)."""
    drop_path: float = 0.05
    """Stochastic depth of the last block of the context encoder."""
    predictor: Literal["transformer", "mlp", "groups"] = "transformer"
    """transformer (I-JEPA), a shallow MLP (the SparseJEPA paper), or the group map itself: then
    nothing reaches the targets but through W."""
    predictor_dim: int = 128
    """Width of the predictor."""
    predictor_depth: int = 4
    """Blocks (transformer) or hidden layers (mlp) of the predictor."""
    predictor_pass: Literal["blocks", "packed", "union"] = "blocks"
    """blocks: each target block on its own (I-JEPA); packed: all in one pass, the context sees only
    itself; union: the patches of all blocks as one. The last two are faster, and other methods."""


@dataclass(frozen=True)
class MaskConfig:
    """The multi-block masks (I-JEPA section 3, sampler corrected)."""

    num_targets: int = 4
    """Target blocks per image."""
    target_scale: tuple[float, float] = (0.15, 0.2)
    """Share of the patches in a target block."""
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    """Height over width of a target block."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Share of the patches in the context block, before the targets are taken out."""
    context_counts: tuple[int, ...] = ()
    """Context patches per image, one of these per step; 1/4, 5/16, 3/8 of all if not given."""


@dataclass(frozen=True)
class GroupConfig:
    """The group-sparse map from latent dimensions to groups."""

    groups: Literal["none", "region", "concept", "feature"] = "region"
    """What a group is; none is the dense JEPA."""
    num_groups: int = 16
    """Number of groups."""
    group_dim: int | None = None
    """Width of a group's latent; the encoder's width over the number of groups if not given."""
    w_form: Literal["sphere", "plain"] = "sphere"
    """sphere: each latent's weights have norm 1; plain: oi-VAE's form with a ridge."""
    lam: float = 0.01
    """Group-lasso penalty; 0 keeps the group map and leaves it unpenalised. 0.001, 0.01 and 0.1
    leave about 14 to 16, 3 to 11 and 1 to 2 of 16 groups per latent, the fewer the less the data
    insist. On the sphere a latent keeps one."""
    density: float | None = None
    """Steer lam towards this fraction of non-zero (group, latent) columns instead of fixing it."""
    pattern: str = "learned"
    """learned, or a control with zeros in random places along the same path to --density: random
    (all groups alike), or a run directory (each group and latent with as many as it has there)."""
    group_weight: float = 0.1
    """Weight of the group map's own prediction loss; not used with --predictor groups."""
    group_detach: float = 0.0
    """First part of training in which that loss does not reach the encoder (0 to 1)."""
    ridge: float = 1e-3
    """Weight of the squared weights of the group networks (plain form only)."""
    debias: float = 0.15
    """Last part of training with lam = 0 and the zero pattern frozen (0 to 1)."""


@dataclass(frozen=True)
class LossConfig:
    """Prediction loss and KL term."""

    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    """Distance of predicted and target embeddings."""
    predict: Literal["embeddings", "pixels"] = "embeddings"
    """What is predicted of a hidden patch: the target encoder's embedding or its pixels (MAE)."""
    target_layers: int = 1
    """Average the targets over the last so many blocks of the target encoder (data2vec)."""
    target_centering: bool = False
    """Subtract the batch's mean token from the targets."""
    kl: Literal["aggregate", "posterior"] = "aggregate"
    """aggregate: of the batch of pooled embeddings to N(0, I); posterior: oi-VAE's, per sample."""
    beta: float = 0.05
    """Weight of the KL term."""
    kl_marginal: float = 1.0
    """Weight of the aggregate KL's marginal part (mean and variance of each latent)."""
    kl_correlation: float = 1.0
    """Weight of the aggregate KL's total-correlation part."""
    vicreg: tuple[float, float] = (0.0, 0.0)
    """Weights of VICReg's variance and covariance terms on the pooled embedding (C-JEPA)."""
    sigreg: float = 0.0
    """Weight of SIGReg on the pooled embedding (LeJEPA)."""
    activation_l1: float = 0.0
    """Weight of the mean absolute value of the normalised pooled embedding."""
    rectified: float = 0.0
    """Weight of the match of the rectified pooled embedding to a rectified Laplace distribution
    (Rectified LpJEPA)."""
    rectified_share: float = 0.25
    """Share of non-zero values in that distribution."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedules, all pure functions of the step."""

    epochs: int = 300
    """Passes over the training images."""
    steps: int | None = None
    """Optimiser steps, instead of --epochs."""
    batch_size: int = 512
    """Images per step."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW."""
    lr_final: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup: float = 0.05
    """Part of training with a linear warm-up (0 to 1)."""
    weight_decay: float = 0.05
    """AdamW weight decay (matrices only)."""
    adam_beta2: float = 0.98
    """AdamW second-moment decay."""
    clip: float = 1.0
    """Largest norm of the network's gradient; 0 switches clipping off."""
    ema: float | None = None
    """EMA rate of the target encoder at the start; from --ema-reference if not given."""
    ema_final: float | None = None
    """EMA rate at the end; from --ema-reference if not given."""
    ema_reference: tuple[float, float] = (0.992, 0.9999)
    """Both rates for a run of 29,000 steps, carried over to the steps of this one: what suits a
    short run so suits a long one."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """auto: bf16 where the hardware has it; fp64: for checking."""
    accumulate: int = 1
    """Parts in which each process takes its images of a step, to save memory. The KL and the
    normalisation before W see one part (of all processes) at a time."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how often it reports."""

    seed: int = 0
    """Seed of weights, order, masks and augmentation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads; all cores if not given."""
    compile: bool = False
    """Compile the step: faster steps after a minute or two of compiling (needs a C++ compiler)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Show the numbers there too; metrics.jsonl is always written."""
    eval_every: int | None = None
    """Steps between online evaluations (k-NN, RankMe); ten a run if not given."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; twenty a run if not given."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    workers: int | None = None
    """Processes that decode a stream's images; one per CPU core if not given."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: each has the whole model (ddp), or its share of weights, gradients
    and optimiser state (fsdp), for encoders that do not fit otherwise."""
    checkpoint_activations: bool = False
    """Compute the blocks of context encoder and predictor a second time instead of keeping their
    activations: less memory, slower."""


@dataclass(frozen=True)
class Config:
    """All settings of one pretraining run."""

    data: str = "scenes"
    preset: str = "best"
    images: DataConfig = field(default_factory=DataConfig)
    model: EncoderConfig = field(default_factory=EncoderConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    groups: GroupConfig = field(default_factory=GroupConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def replace(self, **flat: Any) -> Config:
        """Return a copy with the named settings changed; names are flat (``lam=0.1``).

        Raises UserError for a name that is no setting.
        """
        fields = flat_fields()
        changes: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            if name in REMOVED:
                raise UserError(f"{flag(name)}: {REMOVED[name]}")
            if name not in fields:
                raise UserError(f"unknown setting '{name}'{nearest(name, fields)}")
            changes.setdefault(fields[name], {})[name] = _coerce(name, value)
        top = changes.pop("", {})
        sections = {s: dataclasses.replace(getattr(self, s), **kw) for s, kw in changes.items()}
        return dataclasses.replace(self, **top, **sections)

    def flat(self) -> dict[str, Any]:
        """Return every setting by its flat name, in order."""
        return {
            name: getattr(getattr(self, section) if section else self, name)
            for name, section in flat_fields().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values for TOML and JSON; settings that are None are left out."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """Rebuild from `to_dict`'s form, also that of an earlier version (see `REMOVED`).

        Raises UserError naming `source` for unknown settings.
        """
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat.update(value if isinstance(value, Mapping) else {name: value})
        try:
            return cls().replace(**{k: v for k, v in flat.items() if k not in REMOVED})
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @property
    def encoder_shape(self) -> tuple[int, int, int]:
        """Width, depth and heads of the encoder."""
        if self.model.encoder_dims:
            width, depth, heads = self.model.encoder_dims
            return width, depth, heads
        return ENCODER_SIZES[self.model.encoder]

    @property
    def group_dim(self) -> int:
        """Width P of a group's latent."""
        return self.groups.group_dim or max(1, self.encoder_shape[0] // self.groups.num_groups)

    @property
    def penalised(self) -> bool:
        """Whether W is under a sparsity penalty at all."""
        groups = self.groups
        if groups.groups == "none" or groups.pattern != "learned":
            return False
        return groups.density is not None or groups.lam > 0

    def check(self) -> Config:
        """Return self. Raises UserError for the first setting that cannot work on any data."""
        check_settings(self, self.flat(), _hints())
        return self

    def check_image(self, size: tuple[int, int]) -> Config:
        """Return self. Raises UserError if `size` (h, w) does not fit patches, masks or groups."""
        check_image(self, size)
        return self


@dataclass(frozen=True)
class Preset:
    """A named set of settings, with what to expect of it."""

    about: str
    settings: Mapping[str, Any]
    command: str
    hardware: str
    minutes: str = "not run"
    expected: str = "not run"
    """Accuracy of the probe."""


# I-JEPA's settings for ImageNet (Assran et al. 2023, appendix A, and the published configurations)
# with three changes: weight decay is constant here (0.15 is the mean of their 0.04 to 0.4, weighted
# with the learning rate), the EMA rate never gets to 1, and gradients are clipped.
_IMAGENET: dict[str, Any] = {
    "img_size": (224,), "patch_size": 16, "drop_path": 0.0, "predictor_dim": 384,
    "crop_scale": (0.3, 1.0), "flip": False, "batch_size": 2048, "epochs": 600, "lr": 1e-3,
    "warmup": 0.025, "weight_decay": 0.15, "adam_beta2": 0.999, "ema": 0.996, "ema_final": 0.99998,
}  # fmt: skip
_LARGE = {"predictor_depth": 12, "parallel": "fsdp", "checkpoint_activations": True}

PRESETS: dict[str, Preset] = {
    "best": Preset(
        "our recipe for small images: ViT-Tiny/4, 300 epochs (a starting point, tuned later)",
        {},
        command="sparsejepa pretrain cifar100",
        hardware="1 GPU",
    ),
    "nano": Preset(
        "our recipe for two CPU cores: ViT-Nano, batch 128, minutes for 5,000 images",
        {
            "encoder": "nano", "predictor_dim": 64, "predictor_depth": 3, "drop_path": 0.0,
            "batch_size": 128, "lr": 2e-3, "warmup": 0.1, "epochs": 40, "ema": 0.99,
            "ema_final": 0.9995, "beta": 0.02,
        },
        command="sparsejepa pretrain cifar100 --preset nano --patch-size 8 --limit 5000",
        hardware="2 CPU cores",
        minutes="2 to 6",
        expected="CIFAR-100: 15 to 17 % (untrained 9.4 %, raw pixels 16.4 %), see docs/results.md",
    ),
    "demo": Preset(
        "the built-in scenes in minutes on two CPU cores, as `sparsejepa demo` runs them",
        {
            "encoder": "nano", "patch_size": 8, "predictor_dim": 64, "predictor_depth": 3,
            "drop_path": 0.0, "batch_size": 128, "lr": 2e-3, "warmup": 0.1, "limit": 10_000,
            "steps": 1200, "ema": 0.99, "ema_final": 0.9995, "beta": 0.02,
        },
        command="sparsejepa demo",
        hardware="2 CPU cores",
        minutes="4.5",
        expected="the demo's own table",
    ),
    "paper": Preset(
        "the SparseJEPA paper read literally: MLP predictor, L2 loss, plain W with ridge, "
        "posterior KL, fixed lambda",
        {
            "predictor": "mlp", "predictor_depth": 2, "predictor_dim": 256, "loss": "l2",
            "w_form": "plain", "kl": "posterior", "beta": 0.01, "group_weight": 1.0,
            "debias": 0.0, "augment": "crop",
        },
        command="sparsejepa pretrain cifar100 --preset paper",
        hardware="1 GPU",
    ),
    "vit-b16": Preset(
        "ViT-B/16 on ImageNet as in I-JEPA: 224 pixels, batch 2048, 600 epochs",
        {**_IMAGENET, "encoder": "base", "predictor_depth": 6},
        command="torchrun --nproc-per-node 8 -m sparsejepa pretrain imagenet --preset vit-b16",
        hardware="8 GPUs of 80 GB",
    ),
    "vit-l16": Preset(
        "ViT-L/16 on ImageNet as in I-JEPA: 224 pixels, batch 2048, 600 epochs",
        {**_IMAGENET, **_LARGE, "encoder": "large"},
        command="torchrun --nproc-per-node 8 -m sparsejepa pretrain imagenet --preset vit-l16",
        hardware="8 GPUs of 80 GB",
    ),
    "vit-h14": Preset(
        "ViT-H/14 on ImageNet as in I-JEPA: 224 pixels, batch 2048, 300 epochs",
        {
            **_IMAGENET, **_LARGE, "encoder": "huge", "patch_size": 14, "epochs": 300,
            "warmup": 0.05,
        },
        command="torchrun --nproc-per-node 8 -m sparsejepa pretrain imagenet --preset vit-h14",
        hardware="8 GPUs of 80 GB",
    ),
}  # fmt: skip


def preset(name: str) -> Config:
    """Return the settings of a preset. Raises UserError for an unknown name."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise UserError(f"--preset {name}: unknown{nearest(name, PRESETS)}; there are {known}")
    return Config(preset=name).replace(**PRESETS[name].settings)


@functools.cache
def flat_fields() -> dict[str, str]:
    """Return {flat field name: section}, section "" for the top level."""
    names: dict[str, str] = {}
    for outer in dataclasses.fields(Config):
        inner = outer.default_factory
        if dataclasses.is_dataclass(inner):
            names.update((f.name, outer.name) for f in dataclasses.fields(inner))
        else:
            names[outer.name] = ""
    return names


@functools.cache
def _hints() -> dict[str, Any]:
    """Return {flat field name: type}."""
    sections = [f.default_factory for f in dataclasses.fields(Config)]
    hints = {name: str for name, section in flat_fields().items() if not section}
    for section in sections:
        hints |= get_type_hints(section) if dataclasses.is_dataclass(section) else {}
    return hints


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises UserError naming the file when it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # of numbers and of nesting without end as well
        raise UserError(f"{path}: not valid TOML ({error})") from None


def _coerce(name: str, value: Any) -> Any:
    """Bring a keyword or TOML value to the field's type.

    Lists become tuples, text a path, one image size a tuple, and 0 becomes 0.0 where a number need
    not be whole, so that equal settings are written and hashed alike.
    """
    if name == "img_size" and isinstance(value, int):
        return (value,)
    if name == "log" and isinstance(value, str):
        return (value,)
    if name == "data_root" and isinstance(value, str):
        return Path(value)
    values = value if isinstance(value, list | tuple) else [value]
    if any(type(x) is int and abs(x) >= 2**63 for x in values):
        raise UserError(f"{flag(name)}: a number of more than 63 bits")
    if "float" in str(_hints().get(name)):
        values = [float(x) if type(x) is int else x for x in values]
    return tuple(values) if isinstance(value, list | tuple) else values[0]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
