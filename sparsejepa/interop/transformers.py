"""transformers' format of a ViT (``IJepaModel``, ``ViTModel``), both ways, without the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsejepa.errors import UserError
from sparsejepa.interop.foreign import build_vit
from sparsejepa.interop.names import Report, transformers_name
from sparsejepa.model.encoder import ViT

MODELS = {"ijepa": "IJepaModel", "vit": "ViTModel", "vit_mae": "ViTMAEModel"}
_QKV = ("query", "key", "value")
_SIDE = 1 << 16


def to_transformers(vit: ViT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict and config.json of a model of transformers with the same outputs.

    An ``IJepaModel``; with a class token a ``ViTModel`` without pooler, whose first token it is.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        if ".attn.qkv." in name:
            block, kind = name.split(".")[1], name.rpartition(".")[2]
            for which, third in zip(_QKV, tensor.chunk(3), strict=True):
                state[f"encoder.layer.{block}.attention.attention.{which}.{kind}"] = third
        else:
            state[transformers_name(name)] = tensor
    block: Any = vit.blocks[0]
    model_type = "ijepa" if vit.cls_token is None else "vit"
    config = {
        "architectures": [MODELS[model_type]],
        "model_type": model_type,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": vit.norm.eps,
        "image_size": _plain(vit.img_size),
        "patch_size": _plain(vit.patch_size),
        "num_channels": vit.in_chans,
        "qkv_bias": True,
        "dtype": "float32",
    }
    return state, config


def from_transformers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> ViT:
    """Return the ViT of an ``IJepaModel`` or ``ViTModel``, or of a model on top of one.

    Args:
        state: as ``model.state_dict()`` or a file of the library has it; a head is left out.
        config: the values of config.json, as ``model.config.to_dict()`` has them.

    Raises UserError for another model, or for settings and tensors that a plain ViT has not.
    """
    return read_transformers(state, config, "transformers")[0]


def read_transformers(
    state: Mapping[str, Tensor], config: Mapping[str, Any], origin: str
) -> tuple[ViT, Report]:
    """Do what `from_transformers` does; return the report of the tensors as well.

    `origin` is what an error names.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise UserError(f"{origin}: model_type {kind!r} is not read, only {', '.join(MODELS)}")
    try:
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"hidden_act {config['hidden_act']!r}, only 'gelu' is known")
        size, patch = _pair(config.get("image_size", 224)), _pair(config.get("patch_size", 16))
        heads, eps = config.get("num_attention_heads", 12), config.get("layer_norm_eps", 1e-12)
        if type(heads) is not int or not 0 < heads < _SIDE:
            raise ValueError(f"num_attention_heads {heads!r}")
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise ValueError(f"layer_norm_eps {eps!r}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{origin}: config.json cannot be used ({error})") from None
    vit, report = build_vit(dict(state), origin, num_heads=heads, img_size=size, norm_eps=eps)
    if vit.patch_size != patch:
        raise UserError(
            f"{origin}: config.json says patches of {patch}, the weights {vit.patch_size}"
        )
    return vit, report


def _plain(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _pair(value: Any) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or not all(type(v) is int and 0 < v < _SIDE for v in values):
        raise ValueError(f"{value!r} is no size")
    return values[0], values[1]
