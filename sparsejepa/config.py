"""Every setting of a run, typed; presets; and which settings cannot work, one clear line each.

The sections of `Config` are the sections of a run's config.toml and of the generated help. Field
names are unique across them, so that a flag (``--lam``) and a keyword (``lam=``) need no prefix.
Imports neither torch nor numpy: the command line reads it before anything heavy.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from sparsejepa.errors import UserError, flag, nearest

# Width, depth and heads of the standard ViTs (Dosovitskiy et al. 2021; tiny: Touvron et al. 2021).
ENCODER_SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (96, 6, 3), "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12),
    "large": (1024, 24, 16), "huge": (1280, 32, 16),
}  # fmt: skip

REMOVED: dict[str, Any] = {
    "activation_l1": 0.0, "adam_beta2": 0.98, "augment": "crop", "balance": 0.03, "clip": 1.0,
    "ema_reference": (0.992, 0.9999), "encoder_dims": (), "eval_every": None, "group_detach": 0.0,
    "group_dim": None, "keep_checkpoints": 2, "kl_correlation": 1.0, "kl_marginal": 1.0,
    "log_every": 10, "lr_final": 1e-6, "max_unreadable": 0.5, "randaugment": (2, 9),
    "rectified": 0.0, "rectified_share": 0.25, "ridge": 1e-3, "sigreg": 0.0, "stem": "linear",
    "subset_seed": 0, "target_centering": False, "target_layers": 1, "vicreg": (0.0, 0.0),
    "w_lr_sum": 60.0,
}  # fmt: skip
"""Settings that earlier versions had, at the value that every run has now.

A file that names one at that value is read as if it did not; any other value is refused, unless
it never changed a weight (`_HARMLESS`).
"""
_HARMLESS = {"eval_every", "keep_checkpoints", "log_every", "max_unreadable"}


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are varied."""

    img_size: tuple[int, ...] = ()
    """Image size in pixels, one number or height and width; the data set's own if not given."""
    limit: int | None = None
    """Use only this many training images: the same random subset in all runs, by class."""
    holdout: int = 0
    """Never train on this many training images; sweeps score their probes on them, not on test."""
    corruption: Literal["none", "noise", "shuffle"] = "none"
    """Pretrain on noise of the images' colours, or on images with shuffled patches, instead."""
    data_root: Path | None = None
    """Folder with local copies of data sets; SPARSEJEPA_DATA if not given."""
    upscale: bool = False
    """Enlarge images that are smaller than --img-size instead of refusing them."""
    stream: bool = False
    """Decode images while training, not beforehand: for more than the disk holds decoded."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the image's area in a crop; 1 1 takes the whole image."""
    flip: bool = True
    """Mirror half of the images left to right."""


@dataclass(frozen=True)
class EncoderConfig:
    """The two encoders and the predictor."""

    init: str | None = None
    """Start from the weights of a run, timm:NAME, hub:OWNER/NAME or a file; sizes are theirs."""
    encoder: str = "tiny"
    """nano, tiny, small, base, large, huge, or width, depth and heads as in 192,12,3."""
    patch_size: int = 4
    """Side of a patch in pixels."""
    drop_path: float = 0.05
    """Stochastic depth of the last block of the context encoder."""
    predictor: Literal["transformer", "mlp", "groups"] = "transformer"
    """transformer (I-JEPA), a shallow mlp (the SparseJEPA paper), or the group map by itself."""
    predictor_dim: int = 128
    """Width of the predictor."""
    predictor_depth: int = 4
    """Blocks (transformer) or hidden layers (mlp) of the predictor."""
    predictor_pass: Literal["blocks", "union"] = "blocks"
    """blocks: each target block on its own (I-JEPA); union: all as one, faster and not the same."""


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
    """Context patches per image, one of these a step; 1/4, 5/16, 3/8 of all if not given."""


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
    """Group-lasso penalty; 0 keeps the group map unpenalised. 0.001, 0.01 and 0.1 leave about 14 to
    16, 3 to 11 and 1 to 2 of 16 groups per latent."""
    density: float | None = None
    """Steer lam towards this fraction of non-zero (group, latent) columns instead of fixing it."""
    pattern: str = "learned"
    """learned, or a control with random zeros on the same path to --density: random, or a run
    directory, so that each group and latent has as many as there."""
    debias: float = 0.15
    """Last part of training with lam = 0 and the zero pattern frozen (0 to 1)."""


@dataclass(frozen=True)
class LossConfig:
    """What is predicted, and the weights of the loss terms."""

    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    """Distance of predicted and target embeddings."""
    predict: Literal["embeddings", "pixels"] = "embeddings"
    """What is predicted of a patch: the target encoder's embedding or its pixels (MAE)."""
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
    """EMA rate of the target encoder at the start; by default 0.992 in 29,000 steps, scaled so that
    a shorter run forgets its start alike."""
    ema_final: float | None = None
    """EMA rate at the end; by default 0.9999 in 29,000 steps, scaled alike."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """auto: bf16 where the hardware has it; fp64: for checking."""
    accumulate: int = 1
    """Parts in which a step's images are taken, to save memory; KL and W's norm see one each."""


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
    """Compile the step: faster after a minute or two (needs a C++ compiler)."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Show the numbers there too; metrics.jsonl is always written."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; twenty a run if not given."""
    workers: int | None = None
    """Processes that decode a stream's images; one per CPU core if not given."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: each has the whole model (ddp) or a share of it (fsdp, less memory)."""
    checkpoint_activations: bool = False
    """Compute the blocks a second time instead of keeping activations: less memory, slower."""


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

        Raises UserError for a name that is no setting, and for a value of another type.
        """
        fields = flat_fields()
        changes: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            if gone := removed_setting(name):
                raise UserError(gone)
            if name not in fields:
                raise UserError(f"unknown setting '{name}'{nearest(name, fields)}")
            section, hint = fields[name]
            changes.setdefault(section, {})[name] = _typed(name, value, hint)
        top = changes.pop("", {})
        sections = {s: dataclasses.replace(getattr(self, s), **kw) for s, kw in changes.items()}
        return dataclasses.replace(self, **top, **sections)

    def flat(self) -> dict[str, Any]:
        """Return every setting by its flat name, in order."""
        return {
            name: getattr(getattr(self, section) if section else self, name)
            for name, (section, _) in flat_fields().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values for TOML and JSON; settings that are None are left out."""
        return dataclasses.asdict(self, dict_factory=_plain)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """Rebuild from `to_dict`'s form, also that of an earlier version.

        Raises UserError naming `source` for unknown settings, for values of another type, and for
        one of `REMOVED` that has another value than every run has now.
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
        _check_values(self)
        for fault in _faults(self):
            raise UserError(fault)
        return self

    def check_image(self, size: tuple[int, int]) -> Config:
        """Return self. Raises UserError if `size` (h, w) does not fit patches or masks."""
        patch, (height, width) = self.model.patch_size, size
        if height % patch or width % patch:
            raise UserError(
                f"--patch-size {patch} does not divide the image, {height}x{width} pixels; use "
                f"another, or set --img-size to a multiple of {patch}"
            )
        patches = (height // patch) * (width // patch)
        if patches < _FEWEST_PATCHES:
            raise UserError(
                f"--patch-size {patch} leaves {patches} patches of an image of {height}x{width} "
                "pixels, too few for masks; use a smaller --patch-size or a larger --img-size"
            )
        return self


class Preset(NamedTuple):
    """A named set of settings: what it is, on which hardware and what to expect, if it was run."""

    about: str
    settings: Mapping[str, Any]
    command: str


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
_NANO: dict[str, Any] = {
    "encoder": "nano", "predictor_dim": 64, "predictor_depth": 3, "drop_path": 0.0,
    "batch_size": 128, "lr": 2e-3, "warmup": 0.1, "ema": 0.99, "ema_final": 0.9995, "beta": 0.02,
}  # fmt: skip


def _imagenet(name: str, size: str, **settings: Any) -> Preset:
    settings = {**_IMAGENET, **settings}
    return Preset(
        f"ViT-{size} on ImageNet as in I-JEPA: 224 pixels, batch 2048, {settings['epochs']} epochs "
        "on 8 GPUs of 80 GB; not run",
        settings,
        f"torchrun --nproc-per-node 8 -m sparsejepa pretrain imagenet --preset {name}",
    )


PRESETS: dict[str, Preset] = {
    "best": Preset(
        "our recipe for small images on a GPU: ViT-Tiny/4, 300 epochs; not run, tuned later",
        {}, "sparsejepa pretrain cifar100",
    ),
    "nano": Preset(
        "our recipe for two CPU cores: ViT-Nano, batch 128; 5,000 images in 2 to 6 minutes, then "
        "CIFAR-100 at 15 to 17 % (untrained 9.4 %, raw pixels 16.4 %)",
        {**_NANO, "epochs": 40},
        "sparsejepa pretrain cifar100 --preset nano --patch-size 8 --limit 5000",
    ),
    "demo": Preset(
        "the built-in scenes in 4.5 minutes on two CPU cores, as `sparsejepa demo` runs them",
        {**_NANO, "patch_size": 8, "limit": 10_000, "steps": 1200}, "sparsejepa demo",
    ),
    "paper": Preset(
        "the SparseJEPA paper read literally, on a GPU: MLP predictor, L2 loss, plain W with "
        "ridge, posterior KL, fixed lambda; not run",
        {
            "predictor": "mlp", "predictor_depth": 2, "predictor_dim": 256, "loss": "l2",
            "w_form": "plain", "kl": "posterior", "beta": 0.01, "group_weight": 1.0, "debias": 0.0,
        },
        "sparsejepa pretrain cifar100 --preset paper",
    ),
    "vit-b16": _imagenet("vit-b16", "B/16", encoder="base", predictor_depth=6),
    "vit-l16": _imagenet("vit-l16", "L/16", encoder="large", **_LARGE),
    "vit-h14": _imagenet(
        "vit-h14", "H/14", encoder="huge", patch_size=14, epochs=300, warmup=0.05, **_LARGE
    ),
}  # fmt: skip


def preset(name: str) -> Config:
    """Return the settings of a preset. Raises UserError for an unknown name."""
    _check_option("preset", name, PRESETS)
    return Config(preset=name).replace(**PRESETS[name].settings)


_FEWEST_PATCHES = 9
_BIG = 1e9
_RANGES: dict[str, tuple[float, float]] = {
    "img_size": (4, 4096), "limit": (2, _BIG), "holdout": (0, _BIG), "crop_scale": (0.01, 1),
    "patch_size": (1, 256), "drop_path": (0, 0.9), "predictor_dim": (4, _BIG),
    "predictor_depth": (1, 64), "num_targets": (1, 64), "target_scale": (0.001, 0.99),
    "target_aspect_ratio": (0.05, 20), "context_scale": (0.01, 1), "context_counts": (1, _BIG),
    "num_groups": (1, _BIG), "lam": (0, _BIG), "density": (0, 1), "group_weight": (0, _BIG),
    "debias": (0, 1), "beta": (0, _BIG), "epochs": (1, _BIG), "steps": (1, _BIG),
    "batch_size": (2, _BIG), "lr": (0, _BIG), "warmup": (0, 1), "weight_decay": (0, _BIG),
    "ema": (0, 1), "ema_final": (0, 1), "threads": (1, 4096), "checkpoint_every": (1, _BIG),
    "workers": (0, 1024), "accumulate": (1, _BIG),
}  # fmt: skip
_ASCENDING = ("crop_scale", "target_scale", "target_aspect_ratio", "context_scale")
_PATTERNS = ("learned", "random")
_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a word", Path: "a path",
}  # fmt: skip


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return a value as its setting has it: a tuple for a list, 0.0 for 0, a path for text.

    So equal settings are written and hashed alike. Raises UserError for a value of another type or
    none of the setting's options.
    """
    if name == "encoder" and isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    try:
        return _as(name, value, hint)
    except OverflowError:
        raise UserError(f"{flag(name)}: a number of more than 63 bits") from None
    except TypeError:
        kinds = get_args(hint) or (hint,)
        wanted = _NAMES[kinds[0]]
        if get_origin(hint) is tuple:
            count = "" if Ellipsis in kinds else f"{len(kinds)} "
            wanted = f"{count}{wanted.removeprefix('a ')}s"
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        raise UserError(f"{flag(name)} {shown}: must be {wanted}") from None


def _as(name: str, value: Any, hint: Any) -> Any:
    """Return a value as the type `hint`; TypeError and OverflowError where it is none."""
    kinds = get_args(hint)
    if get_origin(hint) is tuple:
        values = value if isinstance(value, list | tuple) else (value,)
        kinds = kinds[:1] * len(values) if kinds[-1] is Ellipsis else kinds
        if len(kinds) != len(values):
            raise TypeError
        return tuple(_as(name, one, kind) for one, kind in zip(values, kinds, strict=True))
    if get_origin(hint) is Literal:
        _check_option(name, value, kinds)
    elif kinds:  # such as int | None
        return None if value is None else _as(name, value, kinds[0])
    elif type(value) is int and abs(value) >= 2**63:
        raise OverflowError
    elif type(value) is int and hint is float:
        return float(value)
    elif isinstance(value, str) and hint is Path:
        return Path(value)
    elif not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError
    return value


def _check_values(config: Config) -> None:
    """Refuse a value of another type, no option of its setting, or out of range."""
    flat = config.flat()
    for name, (_, hint) in flat_fields().items():
        _typed(name, flat[name], hint)
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
        known = f"unknown{nearest(str(word), options)}; there are {', '.join(options)}"
        raise UserError(f"{flag(name)} {word}: {known}")


def _faults(config: Config) -> Iterator[str]:
    """Yield the settings that cannot work together, the encoder's first."""
    model, groups = config.model, config.groups
    name, kind, count, density = model.encoder, groups.groups, groups.num_groups, groups.density
    if name not in ENCODER_SIZES and not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4}){2}", name):
        _check_option("encoder", name, [*ENCODER_SIZES, "WIDTH,DEPTH,HEADS"])
    width, _, heads = config.encoder_shape
    if width % heads or width % 4:
        yield f"--encoder {name}: the width must be a multiple of 4 and of the heads"
    if model.predictor_dim % 4:
        yield f"--predictor-dim {model.predictor_dim}: must be a multiple of 4"
    # Where --init says the width, groups are checked when it is read.
    if kind != "none" and (model.init is None or name not in ENCODER_SIZES):
        named = f"--init {model.init}" if model.init is not None else f"--encoder {name}"
        if count > width:
            yield f"--num-groups {count} is more than the {width} latents of {named}; use fewer"
        if kind == "feature" and width % count:
            yield f"--num-groups {count} does not divide the width {width} of {named} into features"
        if density is not None and density < 1 / count:
            least = f"each latent keeps at least one group; use {1 / count:.4g} or more"
            yield f"--density {density:g} is below 1/{count}: {least}"
    if groups.pattern != "learned" and kind == "none":
        yield f"--pattern {groups.pattern}: with --groups none there is no pattern"
    if groups.pattern != "learned" and density is None:
        yield f"--pattern {groups.pattern} needs --density, the share of columns to keep"
    if model.predictor == "groups" and kind == "none":
        yield "--predictor groups needs groups; choose --groups region, concept, feature"
    if config.loss.predict == "pixels" and kind == "feature":
        yield "--predict pixels: --groups feature is for embeddings; use region or concept"


def check_pattern(config: Config) -> None:
    """Raise UserError unless --pattern is learned, random or a finished run with groups."""
    name = config.groups.pattern
    run = Path(name)
    if name in _PATTERNS or (run / "groups.safetensors").is_file():
        return
    near = "" if run.is_dir() else nearest(name, _PATTERNS)
    raise UserError(f"--pattern {name}: not learned, random or a finished run with groups{near}")


@functools.cache
def flat_fields() -> dict[str, tuple[str, Any]]:
    """Return {flat field name: (section, type)}, section "" for the top level."""
    names: dict[str, tuple[str, Any]] = {}
    for outer in dataclasses.fields(Config):
        inner = outer.default_factory
        if dataclasses.is_dataclass(inner):
            names |= {name: (outer.name, hint) for name, hint in get_type_hints(inner).items()}
        else:
            names[outer.name] = "", str
    return names


def removed_setting(name: str) -> str:
    """Return what to do instead of a setting of `REMOVED`, empty for any other name."""
    gone = f"{flag(name)}: this setting was taken out, all runs are alike in it; leave it out"
    return gone if name in REMOVED else ""


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
        value = flat.pop(name)
        same = (tuple(value) if isinstance(value, list) else value) == REMOVED[name]
        if not same and name not in _HARMLESS:
            raise UserError(removed_setting(name))
    return flat


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises UserError naming the file when it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # of numbers and of nesting without end as well
        raise UserError(f"{path}: not valid TOML ({error})") from None


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a section with lists for tuples and text for paths, without what is None."""
    as_text = {name: str(v) if isinstance(v, Path) else v for name, v in items if v is not None}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in as_text.items()}
