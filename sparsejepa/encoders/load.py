"""From a name to a frozen encoder: run directories, timm, the hub, folders and files of weights.

Nothing that is loaded can run code: weights are safetensors, or files of torch that are read with
``weights_only=True`` (torch then rebuilds tensors and plain values and refuses everything else).
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsejepa.config import ENCODER_SIZES
from sparsejepa.encoders.encoder import (
    CONFIG,
    GROUPS,
    IMAGENET,
    WEIGHTS,
    Encoder,
    Precision,
    check_scale,
    load_run,
    refusing,
)
from sparsejepa.errors import UserError, nearest
from sparsejepa.files import read_json
from sparsejepa.model.vit import ViT, sincos_position_embedding
from sparsejepa.rng import derive_seed

ENDINGS = (".pth.tar", ".pth", ".pt", ".safetensors")
MODEL, PROCESSOR, CARD = "model.safetensors", "preprocessor_config.json", "README.md"
TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm1": "layernorm_before",
    "attn.query": "attention.attention.query",
    "attn.key": "attention.attention.key",
    "attn.value": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm": "layernorm",
}
"""Our names, which are timm's, and those of transformers' files, which have q, k and v apart."""
QKV = ("attn.query", "attn.key", "attn.value")
NAME = re.compile(r"((?:blocks|encoder\.layer)\.\d+\.)?(.*?)(\.weight|\.bias)?", re.DOTALL)
"""Of a tensor: its block, what it is there, and which of the two."""
_FETCHED = [CONFIG, PROCESSOR, CARD, WEIGHTS, GROUPS, MODEL, "model-*.safetensors"]
# A state dict does not tell the heads; widths of the standard ViTs and of I-JEPA's giant do.
_HEADS = {width: heads for width, _, heads in ENCODER_SIZES.values()} | {1408: 16}
# What may lie beside an encoder's tensors and is left out: heads and what only pretraining needs.
_BESIDE = re.compile(
    r"(head|heads|classifier|fc|fc_norm|pre_logits|projector|pooler)\.|"
    r"(embeddings\.)?mask_token$|decoder[_.]"
)
_IJEPA = "CC BY-NC 4.0 (if these are the published weights of I-JEPA)"


def load(
    ref: str | Path, device: torch.device | str = "cpu", precision: Precision = "fp32"
) -> Encoder:
    """Load a frozen encoder.

    Args:
        ref: a run directory; ``timm:NAME`` for a public model with its pretrained weights;
            ``timm:NAME?untrained`` for the same model with random ones;
            ``hub:OWNER/NAME[@REVISION]``; a folder in our format or that of transformers; or a file
            of weights of a plain ViT (.pth.tar, .pth, .pt, .safetensors).

    Raises UserError, one line with the path and the remedy, if there is no encoder to be had.
    """
    text, path = str(ref), Path(ref)
    if text.startswith("timm:"):
        encoder = _load_timm(text)
    elif text.startswith("hub:"):
        encoder = _load_folder(fetch(text))
    elif text.endswith(ENDINGS) and path.name != WEIGHTS and not path.is_dir():
        encoder = _load_file(path)
    else:
        encoder = _load_folder(path.parent if path.is_file() and path.name == WEIGHTS else path)
    encoder.name, encoder.precision = text, precision
    return encoder.to(device)


def folder_of(ref: str | Path) -> Path | None:
    """Return the folder that an encoder of this name lies in, None for timm's and for a file."""
    if str(ref).startswith("hub:"):
        return fetch(str(ref))
    return Path(ref) if Path(ref).is_dir() else None


def fetch(ref: str) -> Path:
    """Return the folder of ``hub:OWNER/NAME[@REVISION]`` in the hub's cache; fetch it if need be.

    The newest version; without a network the one that lies there. Only configuration, safetensors
    and the model card are fetched. Raises UserError, one line, for a name that does not exist, one
    that needs a login, and a hub out of reach.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = ref.removeprefix("hub:").partition("@")
    options: dict[str, Any] = {"allow_patterns": _FETCHED, "etag_timeout": 10}  # seconds
    try:
        return Path(snapshot_download(name, revision=revision or None, **options))
    except Exception as error:  # whatever hub client and network raise
        raise _not_fetched(ref, error) from None


def _not_fetched(ref: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return UserError(
        f"{ref}: not fetched ({reason}); check name and network, log in with `hf auth login` to "
        "what is gated or private, or copy the hub's cache (HF_HUB_CACHE) from another machine"
    )


# timm


class TimmViT(nn.Module):
    """A timm vision transformer behind the interface of `ViT`: patch tokens only, final norm on.

    Args:
        name: of the model in timm, with or without the tag of its weights.
        pretrained: with those weights, from the hub or its cache, instead of random ones.

    Raises UserError if the name is unknown, the model is no vision transformer with a fixed grid of
    patches, or its weights are neither at hand nor reachable.
    """

    def __init__(self, name: str, *, pretrained: bool) -> None:
        super().__init__()
        import timm

        base, known = name.partition(".")[0], timm.list_models()
        if base not in known:
            raise UserError(f"timm:{name}: no such model{nearest(base, known)}")
        self.about = {"kind": "timm", "name": name}
        try:
            self.vit: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
        except Exception as error:  # whatever network and file readers raise
            raise UserError(
                f"{_not_fetched(f'timm:{name}', error)}; timm:{name}?untrained has random weights"
            ) from None
        patches: Any = getattr(self.vit, "patch_embed", None)
        if not hasattr(self.vit, "num_prefix_tokens") or not hasattr(patches, "grid_size"):
            raise UserError(f"timm:{name}: not a vision transformer with a fixed grid of patches")
        self.img_size: tuple[int, int] = tuple(patches.img_size)
        self.grid_size: tuple[int, int] = tuple(patches.grid_size)
        self.embed_dim: int = self.vit.num_features
        self.depth = len(self.vit.blocks)

    def fresh(self) -> TimmViT:
        """Return the same model with random weights."""
        return TimmViT(self.about["name"], pretrained=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to patch tokens [B, N, D]."""
        return self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]

    def forward_intermediates(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the patch tokens [B, N, D] of the last `n` blocks, each through the final norm."""
        return self.vit.forward_intermediates(
            images, indices=n, norm=True, output_fmt="NLC", intermediates_only=True
        )


def _load_timm(ref: str) -> Encoder:
    from timm.data.config import resolve_model_data_config

    name, _, query = ref.removeprefix("timm:").partition("?")
    if query not in ("", "untrained"):
        raise UserError(f"{ref}: '?{query}' is not known; only '?untrained' is")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(0, 0, "untrained"))
        model = TimmViT(name, pretrained=not query)
    about, license = resolve_model_data_config(model.vit), model.vit.pretrained_cfg.get("license")
    mean, std = check_scale(about["mean"], about["std"])
    return Encoder(model, name=ref, mean=mean, std=std, license=license)


def plain(encoder: Encoder) -> Encoder:
    """Return the encoder with timm's model, if it is one, as our `ViT` with the same tokens.

    Raises UserError if it computes something else: tensors that ours has not are named, another
    activation too, and what else no tensor tells shows in the tokens of two random images.
    """
    model = encoder.model
    if not isinstance(model, TimmViT):
        return encoder
    state = {k.removeprefix("vit."): t.detach().cpu() for k, t in model.state_dict().items()}
    heads = getattr(model.vit.blocks[0].attn, "num_heads", None)
    eps = getattr(model.vit.norm, "eps", 1e-6)
    vit = build_vit(state, encoder.name, num_heads=heads, img_size=model.img_size, norm_eps=eps)
    images = torch.randn(2, 3, *model.img_size, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-4, 4, 99)
    with torch.no_grad():
        tokens = model(images.to(encoder.device)).cpu()
        same = torch.allclose(vit.eval()(images), tokens, rtol=1e-3, atol=1e-3)
        # The tanh GELU is too near the exact one to show in small tokens.
        same &= all(torch.allclose(b.mlp.act(x), F.gelu(x), atol=1e-5) for b in model.vit.blocks)
    if not same:
        raise UserError(
            f"{encoder.name}: its tensors are those of a plain ViT, its tokens are not (another "
            "activation or order of its parts); take a plain one"
        )
    return replace(encoder, model=vit)


# Folders and files


def _load_folder(path: Path) -> Encoder:
    """Load a folder by what its config.json says; what is unknown is read as a run directory."""
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    foreign = isinstance(config, dict) and "model_type" in config
    encoder = _transformers_folder(path, config) if foreign else load_run(path)
    if encoder.license is None and (path / CARD).is_file():
        card = (path / CARD).read_text(encoding="utf-8", errors="replace")
        head = card.split("\n---")[0] if card.startswith("---\n") else ""
        found = re.search(r"^license:\s*['\"]?([\w.-]+)", head, re.MULTILINE)
        encoder.license = found and found[1]
    return encoder


def _transformers_folder(folder: Path, config: dict[str, Any]) -> Encoder:
    """Load an ``IJepaModel`` or ``ViTModel`` of transformers, or a model on top of one."""
    config = {  # transformers' own values of what is not said
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": 12, "image_size": 224,
    } | config  # fmt: skip
    pixels = dict(zip(("image_mean", "image_std"), IMAGENET, strict=True))
    with refusing(f"{folder / CONFIG}: cannot be used", "fetch it again"):
        if config["model_type"] not in ("ijepa", "vit") or config["hidden_act"] != "gelu":
            raise ValueError(f"model_type {config['model_type']!r} is not read, only ijepa and vit")
        size = config["image_size"]
        height, width = (size, size) if isinstance(size, int) else map(int, size)
        heads, eps = int(config["num_attention_heads"]), float(config["layer_norm_eps"])
        if (folder / PROCESSOR).is_file():
            pixels |= read_json(folder / PROCESSOR)
        mean, std = check_scale(pixels["image_mean"], pixels["image_std"])
    files = sorted(folder.glob("model-*.safetensors")) or [folder / MODEL]
    tensors = {name: t for file in files for name, t in read_weights(file).items()}
    about: Any = {"num_heads": heads, "img_size": (height, width), "norm_eps": eps}
    return Encoder(build_vit(tensors, str(folder), **about), name="", mean=mean, std=std)


def _load_file(path: Path) -> Encoder:
    """Load a file of weights alone; its pixels are taken to be ImageNet's."""
    tensors = read_weights(path)
    # Nobody else keeps a predictor beside a target encoder.
    parts = {name.partition(".")[0] for name in tensors}
    license = _IJEPA if {"target_encoder", "predictor"} <= parts else None
    vit = build_vit(tensors, str(path))
    return Encoder(vit, name="", mean=IMAGENET[0], std=IMAGENET[1], license=license)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file by dotted name.

    Raises UserError: no such file, a damaged one, or one with more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Of a mapped file what is not used, such as the optimiser's state, is never read.
        mapped = zipfile.is_zipfile(path)
        return _flat(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except Exception:  # damaged archives and the refusals raise almost anything
        raise UserError(
            f"{path}: not a file of weights (damaged, or it holds more than weights); get another "
            "copy, or save its state_dict alone"
        ) from None


def _flat(value: Any, before: str = "") -> dict[str, Tensor]:
    """Return the tensors in dictionaries within dictionaries by dotted name."""
    if isinstance(value, Tensor):
        return {before.removeprefix("."): value.detach()}
    parts = value.items() if isinstance(value, Mapping) else ()
    return {k: t for name, inner in parts for k, t in _flat(inner, f"{before}.{name}").items()}


# From tensors to our ViT


def build_vit(
    tensors: Mapping[str, Tensor],
    origin: str,
    *,
    num_heads: int | None = None,
    img_size: tuple[int, int] | None = None,
    norm_eps: float = 1e-6,
) -> ViT:
    """Return the plain ViT that a file's tensors are, in float32.

    Args:
        tensors: by the names of timm or of transformers' files, after any prefix; the encoder's
            are chosen by that prefix and copied. Biases that are not there are zero.
        origin: what an error names.
        num_heads: from the width of the standard sizes if not given.
        img_size: height and width in pixels; a square if not given.
        norm_eps: see `ViT`.

    Raises UserError that names a tensor which does not fit, with its shape.
    """
    part, what = choose_part(list(tensors)), "not the encoder of a plain ViT"
    if part is None:
        some = ", ".join(list(tensors)[:3]) or "no tensors at all"
        raise UserError(f"{origin}: {what}, it lacks patch_embed.proj.weight and has {some}")
    own = {k.removeprefix(part): t for k, t in tensors.items() if k.startswith(part)}
    weights = _timm_names({k: t for k, t in own.items() if not _BESIDE.match(k)})
    if part.endswith("base_encoder."):
        num_heads = num_heads or 12  # of MoCo v3, whose small ViT has twice as many as others
    with refusing(f"{origin}: {what}", "only such a one is read or exported"):
        arch = _arguments(weights, num_heads, img_size)
        with torch.device("meta"):  # takes no memory before the shapes are known to fit
            vit = ViT(**arch, norm_eps=norm_eps)
        biases = {
            k: t for k, t in vit.state_dict().items() if k.endswith(("qkv.bias", "proj.bias"))
        }
        weights = {k: torch.zeros(t.shape) for k, t in biases.items()} | weights
        copies = {k: t.to(torch.float32, copy=True) for k, t in weights.items()}
        vit.load_state_dict(copies, assign=True)
    return vit


def choose_part(names: list[str]) -> str | None:
    """Return what the names of the encoder's tensors begin with, of several the EMA teacher's.

    None if there is no ViT among them.
    """
    first = r"((?:.+\.)?)(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight"
    found = [match[1] for name in names if (match := re.fullmatch(first, name))]
    teachers = [part for part in found if re.search("target|teacher|ema", part)]
    return min(teachers or found, key=len, default=None)


def _timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under timm's names; those of transformers are renamed, and joined to qkv."""
    ours = {theirs: own for own, theirs in TRANSFORMERS.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, stem, kind = NAME.fullmatch(name).groups("")  # type: ignore[union-attr]
        found[before.replace("encoder.layer", "blocks") + ours.get(stem, stem) + kind] = tensor
    for query in [name for name in found if ".attn.query." in name]:
        three = [query.replace(QKV[0], which) for which in QKV]
        if all(name in found for name in three):
            joined = torch.cat([found.pop(name) for name in three])
            found[query.replace(QKV[0], "attn.qkv")] = joined
    return found


def _arguments(
    weights: Mapping[str, Tensor], num_heads: int | None, img_size: tuple[int, int] | None
) -> dict[str, Any]:
    """Return the arguments of `ViT` that give these shapes. Raises KeyError for what is missing."""
    width, _, *patch = weights["patch_embed.proj.weight"].shape
    prefix, positions = int("cls_token" in weights), weights["pos_embed"]
    patches, hidden = positions.shape[1] - prefix, len(weights["blocks.0.mlp.fc1.weight"])
    num_heads = num_heads or _HEADS.get(width)
    if num_heads is None:
        known = ", ".join(map(str, sorted(_HEADS)))
        raise ValueError(f"how many heads at width {width}; known widths are {known}")
    side = math.isqrt(patches)
    img_size = img_size or (side * patch[0], side * patch[1])
    grid = (img_size[0] // patch[0], img_size[1] // patch[1])
    if grid[0] * grid[1] != patches or len(patch) != 2:
        raise ValueError(f"pos_embed has {patches} patches, images of {img_size} {grid} of them")
    fixed = False
    if positions.shape == (1, prefix + patches, width) and width % 4 == 0:
        rounding = 1e-2 if positions.element_size() == 2 else 1e-4
        own, wanted = positions[0].float(), sincos_position_embedding(grid, width)
        fixed = torch.allclose(own[prefix:], wanted, atol=rounding) and not own[:prefix].any()
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
