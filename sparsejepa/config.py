"""Every setting of a run, typed; presets; and which settings cannot work, one clear line each.

The sections of `Config` are the sections of a run's config.toml and of the generated help. Field
names are unique across them, so that a flag (``--lam``) and a keyword (``lam=``) need no prefix.
Imports neither torch nor numpy: the command line reads it before anything heavy.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

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

_NO_TERM = "this term was taken out; leave it out, or use --beta for the KL term"

REMOVED: dict[str, tuple[Any, str]] = {
    "activation_l1": (0.0, _NO_TERM),
    "adam_beta2": (0.98, "AdamW's second-moment decay is always 0.98; leave it out"),
    "augment": ("crop", "use --crop-scale, and --crop-scale 1 1 --no-flip for whole images"),
    "balance": (0.03, "there is no such term any more; leave it out"),
    "clip": (1.0, "the network's gradient is always clipped at norm 1; leave it out"),
    "ema_reference": ((0.992, 0.9999), "use --ema and --ema-final"),
    "encoder_dims": ((), "use --encoder WIDTH,DEPTH,HEADS"),
    "eval_every": (None, "a run is evaluated ten times while it trains; leave it out"),
    "group_detach": (0.0, "the group loss always reaches the encoder; leave it out"),
    "group_dim": (None, "a group is as wide as the encoder over --num-groups; leave it out"),
    "keep_checkpoints": (2, "the two newest checkpoints are kept; leave it out"),
    "kl_correlation": (1.0, "both parts of the KL have weight 1; use --beta"),
    "kl_marginal": (1.0, "both parts of the KL have weight 1; use --beta"),
    "log_every": (
        10,
        "metrics are written every ten steps or a hundred times a run; leave it out",
    ),
    "lr_final": (1e-6, "the learning rate always ends at 1e-6; leave it out"),
    "max_unreadable": (0.5, "half of the images may be unreadable, always; leave it out"),
    "randaugment": ((2, 9), "RandAugment was taken out; use --crop-scale and --flip"),
    "rectified": (0.0, _NO_TERM),
    "rectified_share": (0.25, _NO_TERM),
    "ridge": (1e-3, "the ridge of the plain form is always 0.001; leave it out"),
    "sigreg": (0.0, _NO_TERM),
    "stem": ("linear", "patches are always embedded by a linear map; leave it out"),
    "subset_seed": (0, "the subset of --limit is the same in every run; leave it out"),
    "target_centering": (False, "targets are always those of the last block; leave it out"),
    "target_layers": (1, "targets are always those of the last block; leave it out"),
    "vicreg": ((0.0, 0.0), _NO_TERM),
    "w_lr_sum": (60.0, "how far W moves is the same in every run; leave it out"),
}
"""Settings that earlier versions had: the value that every run has now, and what to do instead.

Files that name one at that value are read as if they did not; any other value is refused, unless
it never changed a weight (`_HARMLESS`).
"""
_HARMLESS = {"eval_every", "keep_checkpoints", "log_every", "max_unreadable"}


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are varied."""

    img_size: tuple[int, ...] = ()
    """Image size in pixels, one number or height and width; the data set's own if not given."""
    limit: int | None = None
    """Use only this many training images: a random subset, each class in proportion, the same one
    in all runs."""
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
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the image's area in a crop; 1 1 takes the whole image."""
    flip: bool = True
    """Mirror half of the images left to right."""


@dataclass(frozen=True)
class EncoderConfig:
    """The two encoders and the predictor."""

    init: str | None = None
    """Go on from these weights instead of random ones: a run directory, timm:NAME, hub:OWNER/NAME
    or a file of weights. Sizes and patches are theirs."""
    encoder: str = "tiny"
    """Size of the vision transformer: nano, tiny, small, base, large or huge, or its width, depth
    and heads as in 192,12,3."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    drop_path: float = 0.05
    """Stochastic depth of the last block of the context encoder."""
    predictor: Literal["transformer", "mlp", "groups"] = "transformer"
    """transformer (I-JEPA), a shallow MLP (the SparseJEPA paper), or the group map itself: then
    nothing reaches the targets but through W."""
    predictor_dim: int = 128
    """Width of the predictor."""
    predictor_depth: int = 4
    """Blocks (transformer) or hidden layers (mlp) of the predictor."""
    predictor_pass: Literal["blocks", "union"] = "blocks"
    """blocks: each target block on its own (I-JEPA); union: the patches of all blocks as one, which
    is faster, and another method."""


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
    debias: float = 0.15
    """Last part of training with lam = 0 and the zero pattern frozen (0 to 1)."""


@dataclass(frozen=True)
class LossConfig:
    """What is predicted, and the weights of the loss terms."""

    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    """Distance of predicted and target embeddings."""
    predict: Literal["embeddings", "pixels"] = "embeddings"
    """What is predicted of a hidden patch: the target encoder's embedding or its pixels (MAE)."""
    kl: Literal["aggregate", "posterior"] = "aggregate"
    """aggregate: of the batch of pooled embeddings to N(0, I); posterior: oi-VAE's, per sample."""
    beta: float = 0.05
    """Weight of the KL term."""
    group_weight: float = 0.1
    """Weight of the group map's own prediction loss; not used with --predictor groups."""


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
    warmup: float = 0.05
    """Part of training with a linear warm-up (0 to 1)."""
    weight_decay: float = 0.05
    """AdamW weight decay (matrices only)."""
    ema: float | None = None
    """EMA rate of the target encoder at the start; if not given, 0.992 in a run of 29,000 steps, so
    scaled that a shorter run forgets its start by the same share."""
    ema_final: float | None = None
    """EMA rate at the end; 0.9999 in a run of 29,000 steps, scaled alike, if not given."""
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
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Show the numbers there too; metrics.jsonl is always written."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; twenty a run if not given."""
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
                raise UserError(f"{flag(name)}: {REMOVED[name][1]}")
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
        """Rebuild from `to_dict`'s form, also that of an earlier version.

        Raises UserError naming `source` for unknown settings, and for one of `REMOVED` that has
        another value than every run has now.
        """
        try:
            return cls().replace(**present_settings(values))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @property
    def encoder_shape(self) -> tuple[int, int, int]:
        """Width, depth and heads of the encoder."""
        name = self.model.encoder
        if name in ENCODER_SIZES:
            return ENCODER_SIZES[name]
        width, depth, heads = map(int, name.split(","))
        return width, depth, heads

    @property
    def group_dim(self) -> int:
        """Width P of a group's latent: the encoder's over the number of groups."""
        return max(1, self.encoder_shape[0] // self.groups.num_groups)

    @property
    def penalised(self) -> bool:
        """Whether W is under a sparsity penalty at all."""
        groups = self.groups
        if groups.groups == "none" or groups.pattern != "learned":
            return False
        return groups.density is not None or groups.lam > 0

    def check(self) -> Config:
        """Return self. Raises UserError for the first setting that cannot work on any data."""
        _check_values(self.flat(), _hints())
        _check_encoder(self)
        if self.groups.groups != "none" and _known(self):
            _check_groups(self)
        _check_objective(self)
        return self

    def check_image(self, size: tuple[int, int]) -> Config:
        """Return self. Raises UserError if `size` (h, w) does not fit patches, masks or groups."""
        _check_image(self, size)
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
# with four changes: weight decay is constant here (0.15 is the mean of their 0.04 to 0.4, weighted
# with the learning rate), the EMA rate never gets to 1, gradients are clipped, and AdamW's second
# moment decays by 0.98.
_IMAGENET: dict[str, Any] = {
    "img_size": (224,), "patch_size": 16, "drop_path": 0.0, "predictor_dim": 384,
    "crop_scale": (0.3, 1.0), "flip": False, "batch_size": 2048, "epochs": 600, "lr": 1e-3,
    "warmup": 0.025, "weight_decay": 0.15, "ema": 0.996, "ema_final": 0.99998,
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
            "debias": 0.0,
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


_FEWEST_PATCHES = 9
_BIG = 1e9
_LARGEST_DIM = 1 << 16
_RANGES: dict[str, tuple[float, float]] = {
    "img_size": (4, 4096), "limit": (2, _BIG), "holdout": (0, _BIG), "crop_scale": (0.01, 1),
    "patch_size": (1, 256), "drop_path": (0, 0.9), "predictor_dim": (4, _BIG),
    "predictor_depth": (1, 64), "num_targets": (1, 64), "target_scale": (0.001, 0.99),
    "target_aspect_ratio": (0.05, 20), "context_scale": (0.01, 1), "context_counts": (1, _BIG),
    "num_groups": (1, _BIG), "lam": (0, _BIG), "density": (0, 1), "group_weight": (0, _BIG),
    "debias": (0, 1), "beta": (0, _BIG), "epochs": (1, _BIG), "steps": (1, _BIG),
    "batch_size": (2, _BIG), "lr": (0, _BIG), "warmup": (0, 1), "weight_decay": (0, _BIG),
    "ema": (0, 1), "ema_final": (0, 1), "threads": (1, 4096),
    "checkpoint_every": (1, _BIG), "workers": (0, 1024),
    "accumulate": (1, _BIG),
}  # fmt: skip
_ASCENDING = ("crop_scale", "target_scale", "target_aspect_ratio", "context_scale")
_PATTERNS = ("learned", "random")
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    Path: "a path",
}


def _check_values(flat: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse a value of another type, no option of its setting, or out of range.

    Args:
        flat, hints: value and type of every setting, by flat name.
    """
    for name, hint in hints.items():
        several = get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is Literal
        if get_origin(hint) is not Literal and not several:
            if not _fits(flat[name], hint):
                raise UserError(f"{flag(name)} {_shown(flat[name])}: must be {_described(hint)}")
            continue
        for word in flat[name] if several else (flat[name],):
            _check_option(name, word, get_args(get_args(hint)[0] if several else hint))
    for name, (low, high) in _RANGES.items():
        for value in flat[name] if isinstance(flat[name], tuple) else (flat[name],):
            if value is not None and not (low <= value <= high):
                least = high == _BIG and not value > high
                bound = f"at least {low:g}" if least else f"between {low:g} and {high:g}"
                raise UserError(f"{flag(name)} {value:g}: must be {bound}")
    for name in _ASCENDING:
        if flat[name][0] > flat[name][1]:
            raise UserError(f"{flag(name)}: the smaller number comes first, got {flat[name]}")
    if len(flat["img_size"]) > 2:
        raise UserError("--img-size takes one number or height and width")


def _check_option(name: str, word: str, options: Collection[str]) -> None:
    if word not in options:
        near, known = nearest(str(word), options), ", ".join(options)
        raise UserError(f"{flag(name)} {word}: unknown{near}; there are {known}")


def _check_encoder(config: Config) -> None:
    """Refuse an encoder that cannot be made, or a predictor that does not fit positions."""
    name = config.model.encoder
    if name not in ENCODER_SIZES:
        numbers = name.split(",")
        if len(numbers) == 1:
            _check_option("encoder", name, [*ENCODER_SIZES, "WIDTH,DEPTH,HEADS"])
        whole = all(n.isdecimal() and 1 <= int(n) <= _LARGEST_DIM for n in numbers)
        if len(numbers) != 3 or not whole:
            raise UserError(
                f"--encoder {name}: width, depth and heads, three whole numbers above 0"
            )
        width, _, heads = config.encoder_shape
        if width % heads or width % 4:
            raise UserError(f"--encoder {name}: the width must be a multiple of 4 and of the heads")
    if config.model.predictor_dim % 4:
        raise UserError(f"--predictor-dim {config.model.predictor_dim}: must be a multiple of 4")


def _known(config: Config) -> bool:
    """Return whether the settings say how large the encoder is; else --init does, later."""
    return config.model.init is None or config.model.encoder not in ENCODER_SIZES


def _check_groups(config: Config) -> None:
    """Refuse groups that do not fit the width of the encoder, and a density of less than one."""
    groups, (width, _, _) = config.groups, config.encoder_shape
    count, model = groups.num_groups, config.model
    named = f"--init {model.init}" if model.init is not None else f"--encoder {model.encoder}"
    if count > width:
        raise UserError(
            f"--num-groups {count} is more than the {width} latents of {named}; use at most {width}"
        )
    if groups.groups == "feature" and width % count:
        raise UserError(
            f"--num-groups {count} does not divide the width {width} of {named}, which --groups "
            f"feature needs; use e.g. {max(g for g in range(1, count) if width % g == 0)}"
        )
    if groups.density is not None and groups.density < 1 / count:
        raise UserError(
            f"--density {groups.density:g} is below 1/{count}: each latent keeps at least one of "
            f"the --num-groups {count}; use {1 / count:.4g} or more"
        )


def _check_objective(config: Config) -> None:
    """Refuse combinations of pattern, predictor and targets that cannot work."""
    groups = config.groups
    if groups.pattern != "learned":
        if groups.groups == "none":
            raise UserError(f"--pattern {groups.pattern}: with --groups none there is no pattern")
        if groups.density is None:
            raise UserError(
                f"--pattern {groups.pattern} needs --density, the share of columns to keep"
            )
    if config.model.predictor == "groups" and groups.groups == "none":
        raise UserError("--predictor groups needs groups; choose --groups region, concept, feature")
    if config.loss.predict == "pixels" and groups.groups == "feature":
        raise UserError(
            "--predict pixels: --groups feature shares out the dimensions of embeddings; use "
            "region or concept"
        )


def check_pattern(config: Config) -> None:
    """Raise UserError unless --pattern is learned, random or a finished run with groups."""
    name = config.groups.pattern
    run = Path(name)
    if name in _PATTERNS or (run / "groups.safetensors").is_file():
        return
    if (run / "summary.json").is_file():
        raise UserError(f"--pattern {name}: that run has no groups; name one that has")
    if (run / "config.toml").is_file():
        raise UserError(f"--pattern {name}: that run is not finished; go on with it first")
    near = "" if run.is_dir() else nearest(name, _PATTERNS)
    raise UserError(f"--pattern {name}: not learned, random or a finished run with groups{near}")


def _check_image(config: Config, size: tuple[int, int]) -> None:
    """Raise UserError if `size` (h, w) does not fit patches, masks or groups."""
    patch = config.model.patch_size
    for side in size:
        if side % patch:
            fits = [
                str(p)
                for p in range(2, min(size) + 1)
                if not (size[0] % p or size[1] % p) and size[0] * size[1] >= _FEWEST_PATCHES * p * p
            ]
            remedy = f"use one of {', '.join(fits)} or set" if fits else "set"
            raise UserError(
                f"--patch-size {patch} does not divide the image, {size[0]}x{size[1]} pixels; "
                f"{remedy} --img-size to a multiple of {patch}"
            )
    patches = (size[0] // patch) * (size[1] // patch)
    if patches < _FEWEST_PATCHES:
        raise UserError(
            f"--patch-size {patch} leaves {patches} patches of an image of {size[0]}x{size[1]} "
            "pixels, too few for masks; use a smaller --patch-size or a larger --img-size"
        )
    if config.groups.groups == "region" and config.groups.num_groups > patches:
        raise UserError(
            f"--num-groups {config.groups.num_groups} is more than the {patches} patches that "
            f"--groups region shares out; use at most {patches}"
        )


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has a setting's type."""
    kinds = get_args(hint)
    if get_origin(hint) is tuple:
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value) if isinstance(value, tuple) else ()
        return (
            isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
        )
    if kinds:  # one of several types, such as int or None
        return any(_fits(value, kind) for kind in kinds)
    if hint is float:
        return type(value) in (int, float)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    """Return a setting's type in words."""
    kinds = [kind for kind in get_args(hint) if kind not in (NoneType, Ellipsis)]
    if get_origin(hint) is tuple:
        count = "" if get_args(hint)[-1] is Ellipsis else f"{len(kinds)} "
        return f"{count}{_NAMES[kinds[0]].removeprefix('a ')}s"
    return _NAMES[kinds[0] if kinds else hint]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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


def present_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file, perhaps of an earlier version, flat and by present names.

    Raises UserError for one of `REMOVED` at another value than every run has now.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(value if isinstance(value, Mapping) else {name: value})
    if dims := flat.pop("encoder_dims", ()):  # its successor takes them too
        flat["encoder"] = dims
    for name in flat.keys() & REMOVED.keys():
        value, (now, advice) = flat.pop(name), REMOVED[name]
        same = (tuple(value) if isinstance(value, list) else value) == now
        if not same and name not in _HARMLESS:
            raise UserError(f"{flag(name)} {_shown(value)}: {advice}")
    return flat


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

    Lists become tuples, text a path, one image size a tuple, sizes of an encoder text, and 0
    becomes 0.0 where a number need not be whole, so that equal settings are written and hashed
    alike.
    """
    if name == "encoder" and isinstance(value, list | tuple):
        return ",".join(map(str, value))
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
