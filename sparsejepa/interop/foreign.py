"""A plain ViT from another program's file of weights, by whatever names, or one line why not.

I-JEPA, timm, DeiT, MAE, DINO, MoCo v3, transformers: .pth.tar, .pth, .pt and .safetensors. The
first three are pickles, which could hold any code. They are read with ``weights_only=True``, the
one exception to the rule that nothing is unpickled: torch then rebuilds tensors, plain values and
the flags of a training script (argparse's Namespace, a bare holder of values), and refuses
everything else.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsejepa.config import ENCODER_SIZES
from sparsejepa.errors import UserError
from sparsejepa.interop.names import Report, beside, choose_part, describe_foreign, translate
from sparsejepa.model.encoder import ViT, sincos_position_embedding

ENDINGS = (".pth.tar", ".pth", ".pt", ".bin", ".safetensors")
# A state dict does not tell the heads; widths of the standard ViTs and of I-JEPA's giant do.
_HEADS = {width: heads for width, _, heads in ENCODER_SIZES.values()} | {1408: 16}
_SHOWN = 3
# How files of torch before 1.6 begin: a pickle of the number that torch marked them with.
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors of a file by dotted name, and the JSON that a .safetensors carries.

    Raises UserError: no such file, a damaged one, or one with more than tensors and plain values.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with path.open("rb") as file:
            # Mapped: what is not used, such as the optimiser's state, is never read.
            mmap = file.read(len(_OLD_FORMAT)) != _OLD_FORMAT
        with torch.serialization.safe_globals([argparse.Namespace]):
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # damaged archives and the refusals raise almost anything
        if type(error).__name__ == "UnpicklingError":
            reason = "it holds more than weights); save its state_dict alone"
        else:
            reason = "damaged, or not torch.save's); get another copy"
        raise UserError(f"{path}: not a checkpoint of weights ({reason}") from None
    return _flat(found), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = (file.metadata() or {}).get("json", "{}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged, or no safetensors ({reason}); fetch it again") from None
    try:
        return tensors, dict(json.loads(about))
    except (ValueError, TypeError, RecursionError):
        return tensors, {}


def _flat(value: Any, before: str = "", depth: int = 4) -> dict[str, Tensor]:
    """Return the tensors in dictionaries within dictionaries by dotted name."""
    if isinstance(value, Tensor):
        return {before: value.detach()}
    if not isinstance(value, Mapping) or not depth:
        return {}
    parts = ((f"{before}.{key}" if before else str(key), inner) for key, inner in value.items())
    return {k: v for name, inner in parts for k, v in _flat(inner, name, depth - 1).items()}


def build_vit(
    tensors: dict[str, Tensor],
    origin: str,
    *,
    num_heads: int | None = None,
    img_size: tuple[int, int] | None = None,
    norm_eps: float = 1e-6,
) -> tuple[ViT, Report]:
    """Return the plain ViT in a file's tensors, in float32, and what became of each tensor.

    Args:
        tensors: by name; only those of the encoder are copied.
        origin: what an error names.
        num_heads: from the width of the standard sizes if not given.
        img_size: height and width in pixels; a square if not given.
        norm_eps: see `ViT`.

    Raises UserError that names the tensors and shapes which do not fit.
    """
    part = choose_part(tensors)
    if part is None:
        raise UserError(
            f"{origin}: no vision transformer in it, it lacks patch_embed.proj.weight and has "
            f"{_listed(tensors) or 'no tensors at all'}"
        )
    weights, matched, renamed, ignored = {}, [], {}, {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(part)
        reason = beside(inner) if name.startswith(part) else "another part of the file"
        if reason is not None:
            ignored[name] = reason
            continue
        ours, third = translate(inner)
        if ours == inner:
            matched.append(name)
        else:
            renamed[name] = ours
        if third is None:
            weights[ours] = tensor
        else:
            thirds.setdefault(ours, {})[third] = tensor
    for ours, three in thirds.items():
        if len(three) < 3:
            raise UserError(f"{origin}: {ours}: only {len(three)} of query, key, value are there")
        weights[ours] = torch.cat([_held(origin, ours, three[i]) for i in range(3)])
    if part.endswith(("base_encoder.", "momentum_encoder.")):  # MoCo v3, whose ViT-S has 12 heads
        first = weights.get("patch_embed.proj.weight")
        num_heads = num_heads or (12 if first is not None and len(first) == 384 else None)
    vit, missing = _assemble(weights, origin, num_heads, img_size, norm_eps)
    return vit, Report(part, tuple(matched), renamed, ignored, missing)


def _assemble(
    weights: dict[str, Tensor],
    origin: str,
    num_heads: int | None,
    img_size: tuple[int, int] | None,
    norm_eps: float,
) -> tuple[ViT, tuple[str, ...]]:
    """Return a ViT with `weights` (by our names), and the biases that are zero instead."""
    try:
        arch = _arguments(weights, num_heads, img_size)
        with torch.device("meta"):  # takes no memory before the shapes are known to fit
            vit = ViT(**arch, norm_eps=norm_eps)
    except KeyError as error:
        raise UserError(_unlike(origin, [f"lacks {error.args[0]}"], weights)) from None
    except (ValueError, RuntimeError, ArithmeticError) as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(_unlike(origin, [detail], weights)) from None
    wanted = vit.state_dict()
    missing = tuple(n for n in wanted if n not in weights and n.endswith(("qkv.bias", "proj.bias")))
    lacking = {n: t for n, t in wanted.items() if n not in weights and n not in missing}
    unknown = {n: t for n, t in weights.items() if n not in wanted}
    shapes = [
        f"{n} is {list(weights[n].shape)}, not {list(t.shape)}"
        for n, t in wanted.items()
        if n in weights and weights[n].shape != t.shape
    ]
    wrong = [f"has {_listed(unknown)}"] if unknown else []
    wrong += [f"lacks {_listed(lacking)}"] if lacking else []
    if wrong or shapes:
        raise UserError(_unlike(origin, [*wrong, *shapes[:_SHOWN]], unknown))
    held = {name: _held(origin, name, weights[name]) for name in wanted if name in weights}
    zeros = {name: torch.zeros(wanted[name].shape) for name in missing}
    vit.load_state_dict({name: t.clone() for name, t in {**held, **zeros}.items()}, assign=True)
    return vit.float(), missing


def _arguments(
    weights: dict[str, Tensor], num_heads: int | None, img_size: tuple[int, int] | None
) -> dict[str, Any]:
    """Return the arguments of `ViT` that give these shapes. Raises KeyError for what is missing."""
    width, channels, *patch = weights["patch_embed.proj.weight"].shape
    prefix = int("cls_token" in weights)
    positions = weights["pos_embed"]
    patches = positions.shape[1] - prefix
    side, hidden = math.isqrt(patches), len(weights["blocks.0.mlp.fc1.weight"])
    if channels != 3 or len(patch) != 2 or not min(patch) or width < 1:
        raise ValueError(f"patches {channels}x{patch} of width {width}")
    num_heads = num_heads or _HEADS.get(width)
    if num_heads is None:
        known = ", ".join(map(str, sorted(_HEADS)))
        raise ValueError(f"how many heads at width {width}; known widths are {known}")
    if img_size is None:
        if side**2 != patches:
            raise ValueError(f"{patches} patches, no square")
        img_size = (side * patch[0], side * patch[1])
    grid = (img_size[0] // patch[0], img_size[1] // patch[1])
    if grid[0] * grid[1] != patches:
        raise ValueError(f"pos_embed has {patches} patches, images of {img_size} {grid} of them")
    fixed = positions.shape == (1, prefix + patches, width) and _is_sincos(positions, grid, prefix)
    return {
        "img_size": img_size,
        "patch_size": tuple(patch),
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": num_heads,
        "mlp_ratio": math.nextafter(hidden / width, math.inf),
        "class_token": bool(prefix),
        "pos_embed": "sincos" if fixed else "learned",
    }


def _is_sincos(positions: Tensor, grid: tuple[int, int], prefix: int) -> bool:
    """Return whether positions [1, prefix + N, D] are the fixed ones, rounding aside."""
    if positions.shape[2] % 4 or positions.is_sparse or not _is_held(positions):
        return False
    wanted = sincos_position_embedding(grid, positions.shape[2])
    rounding = 1e-2 if positions.element_size() == 2 else 1e-4
    own = positions[0].float()
    return torch.allclose(own[prefix:], wanted, atol=rounding) and not own[:prefix].any()


def _is_held(tensor: Tensor) -> bool:
    """Return whether the file holds all of a tensor, which strides of zero may pretend."""
    return tensor.is_sparse or tensor.untyped_storage().nbytes() >= tensor.nbytes


def _held(origin: str, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor if it is dense and whole; UserError otherwise."""
    if tensor.layout != torch.strided:
        raise UserError(f"{origin}: not the encoder of a plain ViT ({name} is sparse)")
    if not _is_held(tensor):
        raise UserError(f"{origin}: {name} is larger than what the file holds of it")
    return tensor


def _unlike(origin: str, wrong: list[str], names: Mapping[str, Any]) -> str:
    """Return the line that says why tensors are not those of a plain ViT."""
    what = describe_foreign(names)
    return f"{origin}: not the encoder of a plain ViT ({'; '.join(wrong)}){what and ': ' + what}"


def _listed(tensors: Mapping[str, Tensor]) -> str:
    """Return some names with shapes, and how many more there are."""
    some = [f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:_SHOWN]]
    more = len(tensors) - len(some)
    return ", ".join(some) + (f" and {more} more" if more else "")
