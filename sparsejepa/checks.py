"""Which settings cannot work, whatever the data: one clear line each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from sparsejepa.errors import UserError, flag, nearest

if TYPE_CHECKING:
    from sparsejepa.config import Config

_FEWEST_PATCHES = 9
_BIG = 1e9
_LARGEST_DIM = 1 << 16
_RANGES: dict[str, tuple[float, float]] = {
    "img_size": (4, 4096), "limit": (2, _BIG), "holdout": (0, _BIG),
    "crop_scale": (0.01, 1), "randaugment": (0, 30),
    "patch_size": (1, 256), "drop_path": (0, 0.9), "predictor_dim": (4, _BIG),
    "predictor_depth": (1, 64), "num_targets": (1, 64), "target_scale": (0.001, 0.99),
    "target_aspect_ratio": (0.05, 20), "context_scale": (0.01, 1), "context_counts": (1, _BIG),
    "num_groups": (1, _BIG), "group_dim": (1, _BIG), "lam": (0, _BIG), "density": (0, 1),
    "group_weight": (0, _BIG), "group_detach": (0, 1), "ridge": (0, _BIG),
    "debias": (0, 1), "beta": (0, _BIG), "kl_marginal": (0, _BIG),
    "kl_correlation": (0, _BIG), "target_layers": (1, 64), "vicreg": (0, _BIG),
    "sigreg": (0, _BIG), "activation_l1": (0, _BIG), "rectified": (0, _BIG),
    "rectified_share": (0.01, 0.99),
    "epochs": (1, _BIG), "steps": (1, _BIG), "batch_size": (2, _BIG),
    "lr": (0, _BIG), "lr_final": (0, _BIG), "warmup": (0, 1), "weight_decay": (0, _BIG),
    "adam_beta2": (0, 0.99999), "clip": (0, _BIG), "ema": (0, 1), "ema_final": (0, 1),
    "ema_reference": (0, 1),
    "threads": (1, 4096), "log_every": (1, _BIG), "eval_every": (1, _BIG),
    "checkpoint_every": (1, _BIG), "keep_checkpoints": (1, 1000), "workers": (0, 1024),
    "accumulate": (1, _BIG), "max_unreadable": (0, 1),
}  # fmt: skip

_PATTERNS = ("learned", "random")


def check_settings(config: Config, flat: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise UserError for the first setting that cannot work on any data.

    Args:
        flat, hints: value and type of every setting, by flat name.
    """
    for name, hint in hints.items():
        several = get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is Literal
        if get_origin(hint) is not Literal and not several:
            if not _fits(flat[name], hint):
                raise UserError(f"{flag(name)} {_shown(flat[name])}: must be {_described(hint)}")
            continue
        options = get_args(get_args(hint)[0] if several else hint)
        for word in flat[name] if several else (flat[name],):
            if word not in options:
                near = nearest(str(word), options)
                known = ", ".join(options)
                raise UserError(f"{flag(name)} {word}: unknown{near}; there are {known}")
    for name, (low, high) in _RANGES.items():
        values = flat[name] if isinstance(flat[name], tuple) else (flat[name],)
        for value in values:
            if value is not None and not (low <= value <= high):
                least = high == _BIG and not value > high
                bound = f"at least {low:g}" if least else f"between {low:g} and {high:g}"
                raise UserError(f"{flag(name)} {value:g}: must be {bound}")
    for name in ("crop_scale", "target_scale", "target_aspect_ratio", "context_scale"):
        if flat[name][0] > flat[name][1]:
            raise UserError(f"{flag(name)}: the smaller number comes first, got {flat[name]}")
    if len(config.images.img_size) > 2:
        raise UserError("--img-size takes one number or height and width")
    _check_encoder(config)
    if config.groups.groups != "none" and _known(config):
        width, count = config.encoder_shape[0], config.groups.num_groups
        if count > width:
            raise UserError(
                f"--num-groups {count} is more than the {width} latents of {_named(config)}; use "
                f"at most {width}"
            )
        if config.groups.groups == "feature" and width % count:
            raise UserError(
                f"--num-groups {count} does not divide the width {width} of {_named(config)}, "
                "which --groups feature needs; use e.g. "
                f"{max(g for g in range(1, count) if width % g == 0)}"
            )
        if config.groups.density is not None and config.groups.density < 1 / count:
            raise UserError(
                f"--density {config.groups.density:g} is below 1/{count}: each latent keeps at "
                f"least one of the --num-groups {count}; use {1 / count:.4g} or more"
            )
    if config.model.predictor_pass == "packed" and config.model.predictor != "transformer":
        raise UserError("--predictor-pass packed: only for --predictor transformer")
    if config.model.predictor_dim % 4:
        raise UserError(f"--predictor-dim {config.model.predictor_dim}: must be a multiple of 4")
    _check_objective(config)


def _check_encoder(config: Config) -> None:
    """Refuse --encoder-dims of which no encoder can be made."""
    dims = config.model.encoder_dims
    if not dims:
        return
    shown = f"--encoder-dims {_shown(dims)}"
    if len(dims) != 3 or min(dims) < 1 or max(dims) > _LARGEST_DIM:
        raise UserError(f"{shown}: width, depth and heads, three whole numbers above 0")
    width, _, heads = dims
    if width % heads or width % 4:
        raise UserError(f"{shown}: the width must be a multiple of 4 and of the heads")


def _known(config: Config) -> bool:
    """Return whether the settings say how large the encoder is; else --init does, later."""
    return config.model.init is None or bool(config.model.encoder_dims)


def _named(config: Config) -> str:
    """Return the setting that says how large the encoder is."""
    model = config.model
    if model.init is not None:
        return f"--init {model.init}"
    return (
        f"--encoder-dims {_shown(model.encoder_dims)}"
        if model.encoder_dims
        else (f"--encoder {model.encoder}")
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


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    Path: "a path",
}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_objective(config: Config) -> None:
    """Refuse combinations of stem, targets, pattern and regularisers that cannot work."""
    if config.model.stem == "hierarchical" and config.model.patch_size < 2:
        raise UserError("--stem hierarchical needs a --patch-size of at least 2")
    pattern = config.groups.pattern
    if pattern != "learned":
        if config.groups.groups == "none":
            raise UserError(f"--pattern {pattern}: with --groups none there is no pattern")
        if config.groups.density is None:
            raise UserError(f"--pattern {pattern} needs --density, the share of columns to keep")
    if config.model.predictor == "groups":
        if config.groups.groups == "none":
            raise UserError(
                "--predictor groups needs groups; choose --groups region, concept, feature"
            )
        if config.groups.group_detach:
            raise UserError(
                f"--group-detach {config.groups.group_detach:g}: with --predictor groups nothing "
                "else teaches the encoder; leave it out"
            )
    depth, layers = config.encoder_shape[1], config.loss.target_layers
    if layers > depth and _known(config):
        raise UserError(
            f"--target-layers {layers} is more than the {depth} blocks of {_named(config)}; use at "
            f"most {depth}"
        )
    if config.loss.predict == "pixels":
        if config.groups.groups == "feature":
            raise UserError(
                "--predict pixels: --groups feature shares out the dimensions of embeddings; "
                "use region or concept"
            )
        if layers > 1 or config.loss.target_centering:
            raise UserError(
                "--predict pixels: --target-layers and --target-centering are of embeddings; "
                "leave them out"
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


def check_image(config: Config, size: tuple[int, int]) -> None:
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
