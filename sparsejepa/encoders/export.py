"""An encoder and its groups for other programs: timm, transformers, the hub, ONNX.

Every export is a folder with weights, the groups, and a README.md (the model card on the hub) that
has the lines of Python which use them. It is written beside its final name, loaded again by the
program that it is for and compared with ours on random pixels; only then does it get its name.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from sparsejepa.files import write_text
from sparsejepa.model.vit import ViT

ACTIVATIONS, ONNX = "group_activations.safetensors", "model.onnx"
BATCHES = (1, 2, 5)
"""Numbers of images that an export is checked with."""
TOLERANCE = 1e-5
"""Largest difference, as a share of the output's largest value, that an export may have."""
OPSET = 18
"""Of ONNX: what torch's exporter writes without converting; onnxruntime reads it from 1.14 on."""
_CARD = """\
---
library_name: {library}
pipeline_tag: image-feature-extraction
{license}tags:
- sparsejepa
- jepa
---

# {name}

A vision transformer as a frozen encoder of images of {height} x {width} pixels: patches of {patch},
width {embed_dim}, {depth} blocks, {num_heads} heads. Pixels are in [0, 1], less the mean {mean},
over the standard deviation {std}. Of images of another size the shorter side is resized (bicubic,
antialiased) and the longer one cropped around its centre.

```python
{use}```
{groups}"""
_GROUPS = """
{count} groups of kind {kind}. Of the connections between latents and groups {density:.1%} are not
zero; {dead} groups have none. A group's activation is ||W z|| in units of its root mean square over
training images.
"""
_GROUPS_USE = """
from safetensors.torch import load_file

g = load_file("{{out}}/group_activations.safetensors")
z = ({tokens} - g["mean"]) * g["scale"]
groups = torch.einsum("gpd,{axes}d->{axes}gp", g["W"], z).norm(dim=-1) * g["unit"]  # [{shape}]
"""
_HUB_USE = """\
import sparsejepa as sj

encoder = sj.load("{out}")
tokens = encoder.tokens(images)  # uint8 [B, H, W, 3] to [B, N, D]
"""
_HUB_GROUPS_USE = """
from sparsejepa.encoders.encoder import load_activations
from sparsejepa.encoders.load import folder_of

activations = load_activations(folder_of("{out}"), encoder.grid_size)
groups, group_map = activations(tokens)  # [B, G], and [B, N, G]; None for region groups
"""


@dataclass(frozen=True)
class Exported:
    """What was written, the lines of Python that use it, and its largest absolute difference."""

    files: list[str]
    use: str
    difference: float


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


def write_export(export: Export, to: str, out: Path, name: str | None = None) -> Exported:
    """Write the folder `out` for timm, transformers, hub or onnx; `name` is what its card says.

    Raises UserError if `out` exists, a format cannot hold the encoder, or what the other program
    computes differs.
    """
    check_out(out)
    writers = {"timm": _timm, "transformers": _transformers, "hub": _hub, "onnx": _onnx}
    with _new_folder(out) as folder:
        run, use = writers[to](export, folder)
        difference = _check(export, run, to, out)
        if to in ("timm", "transformers"):
            use += _write_groups(export, folder)
        # The folders of this machine are nobody else's business.
        name = name or out.name
        write_text(folder / CARD, card(export, to, name, use.format(out=name)))
        files = sorted(path.name for path in folder.iterdir())
    return Exported(files, use.format(out=out), difference)


def check_out(out: Path) -> None:
    """Raise UserError for a folder that is there already."""
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists already; name another, or remove it first")


def publish(export: Export, ref: str, *, public: bool = False) -> Exported:
    """Upload what the format hub writes to ``hub:OWNER/NAME``; a repository that is new is private.

    Raises UserError, one line, for a name of another form, a hub out of reach and a missing login.
    """
    if not re.fullmatch(r"hub:[\w.-]+/[\w.-]+", ref):
        raise UserError(f"--out {ref}: not of the form hub:OWNER/NAME")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        folder, api, name = Path(scratch) / "model", HfApi(), ref.removeprefix("hub:")
        try:
            # First, because it tells at once whether the name and the login are good.
            repo = api.create_repo(name, private=not public, exist_ok=True).repo_id
            found = write_export(export, "hub", folder, f"hub:{repo}")
            # Groups of an earlier model would pass for this one's.
            api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns=[GROUPS])
        except UserError:
            raise
        except Exception as error:  # whatever hub client and network raise
            line = (str(error).strip().splitlines() or [""])[0]
            raise UserError(
                f"--out {ref}: not uploaded ({type(error).__name__}: {line}); log in with "
                "`hf auth login` or set HF_TOKEN to a token that may write, and try again"
            ) from None
    return replace(found, use=found.use.replace(str(folder), ref))


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


def _write_groups(export: Export, folder: Path) -> str:
    """Write groups beside the weights of a program that has none; return the lines that use them"""
    g = export.groups
    if g is None:
        return ""
    tensors = {"W": g.W, "mean": g.mean, "scale": g.scale, "unit": g.unit}
    save_file(_whole(tensors), folder / ACTIVATIONS, {"kind": g.kind})
    if g.kind == "region":
        return _GROUPS_USE.format(tokens="tokens.mean(1)", axes="b", shape="B, G")
    return _GROUPS_USE.format(tokens="tokens", axes="bn", shape="B, N, G")


def card(export: Export, to: str, name: str, use: str) -> str:
    """Return the text of README.md: what the model is, how it is used, and its groups.

    Strangers read it, of files that may be a stranger's: texts are escaped, and no path of this
    machine gets into it.
    """
    encoder, groups, about = export.encoder, "", vit_arguments(export.vit)
    if export.groups is not None:
        alive = export.groups.W.norm(dim=1) > 0  # [G, D]
        density, dead = float(alive.float().mean()), int(alive.any(1).logical_not().sum())
        kind = export.groups.kind
        groups = _GROUPS.format(count=len(alive), kind=kind, density=density, dead=dead)
    license = _license_name(encoder.license)
    mean, std = ([round(x, 6) for x in values] for values in (encoder.mean, encoder.std))
    height, width = encoder.img_size
    return _CARD.format(
        library={"hub": "sparsejepa"}.get(to, to),
        license=f"license: {license}\n" if license else "",
        name=re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", html.escape(" ".join(name.split()))),
        patch=" x ".join(map(str, about["patch_size"])),
        **{key: about[key] for key in ("embed_dim", "depth", "num_heads")},
        **{"height": height, "width": width, "mean": mean, "std": std},
        **{"use": use, "groups": groups},
    )


# The formats. Each writes to a folder and returns how the program runs it and the lines that use it


def _timm(export: Export, folder: Path) -> tuple[Run, str]:
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

    return run, (
        "import timm\nimport torch\n\n"
        'model = timm.create_model("local-dir:{out}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"{_pixels(vit)}tokens = model.forward_features(pixels){_patches(vit)}  # [B, N, D]\n"
        "pooled = model(pixels)  # [B, D]\n"
    )


def _transformers(export: Export, folder: Path) -> tuple[Run, str]:
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError(
            "--to transformers needs transformers, which is not installed: "
            "pip install 'sparsejepa[hub]'"
        ) from None
    vit, encoder, about = export.vit, export.encoder, vit_arguments(export.vit)
    block: Any = vit.blocks[0]
    height, width = vit.img_size
    square = height == width
    name = "IJepaModel" if vit.cls_token is None else "ViTModel"
    config = (transformers.IJepaConfig if vit.cls_token is None else transformers.ViTConfig)(
        hidden_size=vit.embed_dim, num_hidden_layers=vit.depth,
        num_attention_heads=about["num_heads"], intermediate_size=block.mlp.fc1.out_features,
        layer_norm_eps=vit.norm.eps, image_size=height if square else [height, width],
        patch_size=list(vit.patch_size), architectures=[name], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    save_file(_whole(to_transformers(vit)), folder / MODEL, {"format": "pt"})
    transformers.ViTImageProcessor(
        size={"shortest_edge": height} if square else {"height": height, "width": width},
        do_center_crop=square, crop_size={"height": height, "width": width}, resample=3,
        image_mean=list(encoder.mean), image_std=list(encoder.std),
    ).save_pretrained(folder)  # fmt: skip
    options = {} if vit.cls_token is None else {"add_pooling_layer": False}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        model = getattr(transformers, name).from_pretrained(folder, **options).eval()

    def run(pixels: Tensor) -> dict[str, Tensor]:
        tokens = model(pixel_values=pixels).last_hidden_state[:, vit.num_prefix_tokens :]
        return export.outputs(tokens)

    given = "".join(f", {key}={value}" for key, value in options.items())
    squashes = "" if square else "  # squashes: crop to the model's shape first"
    return run, (
        f"import torch\nfrom transformers import AutoImageProcessor, {name}\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{{out}}"){squashes}\n'
        f'model = {name}.from_pretrained("{{out}}"{given}).eval()\n{_pixels(vit)}'
        f"tokens = model(pixel_values=pixels).last_hidden_state{_patches(vit)}  # [B, N, D]\n"
    )


def to_transformers(vit: ViT) -> dict[str, Tensor]:
    """Return the tensors of a ViT by their names in files of transformers."""
    state: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        before, stem, kind = NAME.fullmatch(name).groups("")  # type: ignore[union-attr]
        thirds = dict(zip(QKV, tensor.chunk(3), strict=True)) if stem == "attn.qkv" else {}
        for part, own in (thirds or {stem: tensor}).items():
            state[before.replace("blocks", "encoder.layer") + TRANSFORMERS[part] + kind] = own
    return state


def _hub(export: Export, folder: Path) -> tuple[Run, str]:
    """Write what `load` reads: encoder.safetensors, config.json and, with groups, their file."""
    encoder, use = export.encoder, _HUB_USE
    extra = {"license": encoder.license} if encoder.license else {}
    save_encoder(folder, export.vit, mean=encoder.mean, std=encoder.std, extra=extra)
    if export.folder is not None and export.groups is not None:
        shutil.copyfile(export.folder / GROUPS, folder / GROUPS)
        use += _HUB_GROUPS_USE
    return Export(str(folder), load_run(folder)), use


def _onnx(export: Export, folder: Path) -> tuple[Run, str]:
    """Write a graph that takes any number of images; mean, std and size stand in its metadata."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--to onnx needs {error.name}, which is not installed: pip install 'sparsejepa[onnx]'"
        ) from None
    encoder = export.encoder
    height, width = encoder.img_size
    pixels = torch.zeros(2, 3, height, width)
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

    return run, (
        "import numpy as np\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{{out}}/{ONNX}")\n'
        f"pixels = np.zeros((5, 3, {height}, {width}), np.float32)  # normalised, any number\n"
        f'{", ".join(names)} = session.run({names}, {{{{"pixels": pixels}}}})\n'
    )


def _license_name(license: str | None) -> str | None:
    """Return a licence as the hub names it: ``CC BY-NC 4.0 (...)`` is cc-by-nc-4.0."""
    return license and re.sub("[^a-z0-9.]+", "-", license.lower().split(" (")[0]).strip("-")


def _pixels(vit: ViT) -> str:
    return f"pixels = torch.randn(1, 3, {vit.img_size[0]}, {vit.img_size[1]})  # normalised\n"


def _patches(vit: ViT) -> str:
    return f"[:, {vit.num_prefix_tokens}:]" if vit.num_prefix_tokens else ""


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out`; on success it becomes `out`, on failure it is removed."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
