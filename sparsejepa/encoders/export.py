"""An encoder and its groups for other programs: timm, transformers, the hub, ONNX.

Every export is a folder with weights, the groups, and a README.md (the model card, of the template
card.md) that has the lines of Python which use them. It is written beside its final name, loaded
again by the program that it is for and compared with ours on random pixels; only then does it get
its name.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import json
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsejepa.encoders.encoder import (
    GROUPS,
    Encoder,
    groups_folder,
    load_activations,
    load_run,
    save_encoder,
    vit_arguments,
)
from sparsejepa.encoders.load import CARD, MODEL, NAME, QKV, TRANSFORMERS, folder_of, plain
from sparsejepa.errors import UserError
from sparsejepa.files import save_tensors, write_text
from sparsejepa.model.vit import ViT

ACTIVATIONS, ONNX = "group_activations.safetensors", "model.onnx"
BATCHES = (1, 2, 5)
"""Numbers of images that an export is checked with."""
TOLERANCE = 1e-5
"""Largest difference, as a share of the output's largest value, that an export may have."""
OPSET = 18
"""Of ONNX: what torch's exporter writes without converting; onnxruntime reads it from 1.14 on."""


class Export(nn.Module):
    """What every export computes: pixels in; tokens, pooled features and group activations out.

    Args:
        ref: what `encoder` was loaded from.
        encoder: a plain ViT is made of it, if it is timm's.
        groups: folder with a groups.safetensors; that of `ref` for None.

    Raises UserError for an encoder that is no plain ViT, or groups that are not there or do not
    fit.
    """

    def __init__(self, ref: str, encoder: Encoder, groups: Path | None = None) -> None:
        super().__init__()
        self.encoder = plain(encoder)
        self.vit: ViT = self.encoder.model
        self.folder = folder_of(ref) if groups is None else groups_folder(groups)
        size = self.encoder.grid_size
        self.groups = None if self.folder is None else load_activations(self.folder, size)
        if groups is not None and self.groups is None:
            raise UserError(f"--groups {groups}: there is no {GROUPS}; name a folder that has one")
        if self.groups is not None and self.groups.W.shape[2] != self.encoder.embed_dim:
            raise UserError(f"{self.folder}: its groups are of another encoder; name its own")
        self.eval()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode normalised pixels [B, 3, H, W]: tokens [B, N, D], pooled [B, D], their mean; with
        groups also groups [B, G] and, where patches excite them, group_map [B, N, G]."""
        return self.outputs(self.vit(pixels))

    def outputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return what `forward` does, from tokens [B, N, D]."""
        found = {"tokens": tokens, "pooled": tokens.mean(1)}
        if self.groups is not None:
            found["groups"], group_map = self.groups(tokens)
            if group_map is not None:
                found["group_map"] = group_map
        return found


Run = Callable[[Tensor], dict[str, Tensor]]


def write_export(export: Export, to: str, out: Path) -> dict[str, Any]:
    """Write the folder `out` for timm, transformers, hub or onnx.

    Returns files, use (the lines of Python that use them) and difference, the largest absolute one.
    Raises UserError if `out` exists, a format cannot hold the encoder, or what the other program
    computes differs.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists already; name another, or remove it first")
    writers = {"timm": _timm, "transformers": _transformers, "hub": _hub, "onnx": _onnx}
    texts = card(export, to, out.name)  # the folders of this machine are nobody else's business
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch, "export")
        folder.mkdir()
        difference = _check(export, writers[to](export, folder), to, out)
        if export.groups is not None and to in ("timm", "transformers"):
            g = export.groups  # these programs have none: all that they need lies beside
            tensors = {"W": g.W, "mean": g.mean, "scale": g.scale, "unit": g.unit}
            save_tensors(folder / ACTIVATIONS, tensors, {"kind": g.kind})
        write_text(folder / CARD, str(texts))
        folder.rename(out)
    written = sorted(path.name for path in out.iterdir())
    return {"files": written, "use": texts.use(str(out)), "difference": difference}


@torch.no_grad()
def _check(export: Export, run: Run, to: str, out: Path) -> float:
    """Return the largest absolute difference of `run` from the export, over outputs and batches.

    Raises UserError if one is beyond `TOLERANCE`, also for outputs that are missing.
    """
    worst = 0.0
    for batch in BATCHES:
        draw = torch.Generator().manual_seed(batch)
        pixels = torch.randn(batch, 3, *export.vit.img_size, generator=draw)
        wanted, found = export(pixels), run(pixels)
        for name, ours in wanted.items():
            theirs = found.get(name)
            same = theirs is not None and theirs.shape == ours.shape
            difference = float((theirs - ours).abs().max()) if same else math.inf
            if not difference <= TOLERANCE * float(ours.abs().max()):
                raise UserError(
                    f"{out}: not written, since {to} gives other {name} (by {difference:.1e}); "
                    f"use another format, or another version of {to}"
                )
            worst = max(worst, difference)
    return worst


def card(export: Export, to: str, name: str) -> Any:
    """Return the model card as a jinja module: str() is its text, use(PATH) the lines of Python.

    Strangers read it, of files that may be a stranger's: texts are escaped, and no path of this
    machine gets into it.
    """
    from jinja2 import Environment, StrictUndefined

    encoder, vit = export.encoder, export.vit
    text = files("sparsejepa.encoders").joinpath("card.md").read_text(encoding="utf-8")
    jinja = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    title = re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", html.escape(" ".join(name.split())))
    return jinja.from_string(text).make_module(
        {
            **{"to": to, "name": name, "title": title, "license": _license_name(encoder.license)},
            **{"vit": vit, "mean": list(encoder.mean), "std": list(encoder.std)},
            "outputs": list(export.outputs(torch.zeros(1, vit.num_patches, vit.embed_dim))),
            "groups": export.groups,
            "alive": None if export.groups is None else export.groups.W.norm(dim=1) > 0,  # [G, D]
        }
    )


# The formats. Each writes to a folder and returns how the program runs what lies there


def _timm(export: Export, folder: Path) -> Run:
    import timm

    vit, encoder, about = export.vit, export.encoder, vit_arguments(export.vit)
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    # The norm is that of the tokens, before they are averaged, and not fc_norm after it.
    pool = {"class_token": about["class_token"], "global_pool": "avg", "fc_norm": False}
    arguments = {name: about[name] for name in names} | pool
    pixels = {
        **{"input_size": (3, *vit.img_size), "mean": encoder.mean, "std": encoder.std},
        **{"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"},
        "license": _license_name(encoder.license),
    }
    # A name that timm knows; every size is given beside it.
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    model.load_state_dict(vit.state_dict())
    said = {"pretrained_cfg": pixels}
    timm.models.save_for_hf(model, str(folder), said, model_args=arguments, safe_serialization=True)
    again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def run(pixels: Tensor) -> dict[str, Tensor]:
        tokens = again.forward_features(pixels)[:, vit.num_prefix_tokens :]
        return export.outputs(tokens) | {"pooled": again(pixels)}

    return run


def _transformers(export: Export, folder: Path) -> Run:
    transformers: Any = _extra("transformers", "transformers", "hub")
    vit, encoder = export.vit, export.encoder
    block: Any = vit.blocks[0]
    height, width = vit.img_size
    square = height == width
    prefix = "IJepa" if vit.cls_token is None else "ViT"
    getattr(transformers, f"{prefix}Config")(
        hidden_size=vit.embed_dim, num_hidden_layers=vit.depth,
        num_attention_heads=block.attn.num_heads, intermediate_size=block.mlp.fc1.out_features,
        layer_norm_eps=vit.norm.eps, image_size=height if square else [height, width],
        patch_size=list(vit.patch_size), architectures=[f"{prefix}Model"], dtype="float32",
    ).save_pretrained(folder)  # fmt: skip
    tensors = {name: t.detach().cpu().clone() for name, t in to_transformers(vit).items()}
    save_file(tensors, folder / MODEL, {"format": "pt"})
    transformers.ViTImageProcessor(
        size={"shortest_edge": height} if square else {"height": height, "width": width},
        do_center_crop=square, crop_size={"height": height, "width": width}, resample=3,
        image_mean=list(encoder.mean), image_std=list(encoder.std),
    ).save_pretrained(folder)  # fmt: skip
    options = {} if vit.cls_token is None else {"add_pooling_layer": False}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        model = getattr(transformers, f"{prefix}Model").from_pretrained(folder, **options).eval()

    def run(pixels: Tensor) -> dict[str, Tensor]:
        tokens = model(pixel_values=pixels).last_hidden_state[:, vit.num_prefix_tokens :]
        return export.outputs(tokens)

    return run


def to_transformers(vit: ViT) -> dict[str, Tensor]:
    """Return the tensors of a ViT by their names in files of transformers."""
    state: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        before, stem, kind = NAME.fullmatch(name).groups("")  # type: ignore[union-attr]
        thirds = dict(zip(QKV, tensor.chunk(3), strict=True)) if stem == "attn.qkv" else {}
        for part, own in (thirds or {stem: tensor}).items():
            state[before.replace("blocks", "encoder.layer") + TRANSFORMERS[part] + kind] = own
    return state


def _hub(export: Export, folder: Path) -> Run:
    """Write what `load` reads: encoder.safetensors, config.json and, with groups, their file."""
    encoder = export.encoder
    extra = {"license": encoder.license} if encoder.license else {}
    save_encoder(folder, export.vit, mean=encoder.mean, std=encoder.std, extra=extra)
    if export.folder is not None and export.groups is not None:
        shutil.copyfile(export.folder / GROUPS, folder / GROUPS)
    return Export(str(folder), load_run(folder))


def _onnx(export: Export, folder: Path) -> Run:
    """Write a graph that takes any number of images; mean, std and size stand in its metadata."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        onnxruntime: Any = _extra(name, "onnx", "onnx")
    encoder = export.encoder
    pixels = torch.zeros(2, 3, *encoder.img_size)
    names = list(export(pixels))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            export, (pixels,), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=["pixels"], output_names=names, dynamic_shapes={"pixels": {0: "batch"}},
        )  # fmt: skip
    kind = None if export.groups is None else export.groups.kind
    about = {"mean": encoder.mean, "std": encoder.std, "img_size": encoder.img_size, "groups": kind}
    program.model.metadata_props["sparsejepa.json"] = json.dumps(about)
    program.save(folder / ONNX)  # weights beyond 1.5 GB lie beside it
    # Read from a path, so that what lies beside it is found.
    session = onnxruntime.InferenceSession(folder / ONNX, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> dict[str, Tensor]:
        found: Any = session.run(names, {"pixels": pixels.numpy()})
        return {name: torch.as_tensor(x) for name, x in zip(names, found, strict=True)}

    return run


def _extra(name: str, to: str, extra: str) -> Any:
    """Import a package that not everybody has. Raises UserError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(
            f"--to {to} needs {name}, which is not installed: pip install 'sparsejepa[{extra}]'"
        ) from None


def _license_name(license: str | None) -> str | None:
    """Return a licence as the hub names it: ``CC BY-NC 4.0 (...)`` is cc-by-nc-4.0."""
    return license and re.sub("[^a-z0-9.]+", "-", license.lower().split(" (")[0]).strip("-")
