"""An encoder and its groups for other programs: timm, transformers, the hub, ONNX, torch.export.

What is written is loaded again by the program that it is for, and compared, before it gets its
name. timm and transformers have no groups: theirs travel in a file beside the weights.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save_file
from torch import Tensor

from sparsejepa.errors import UserError, nearest
from sparsejepa.files import save_tensors, write_text
from sparsejepa.interop.card import PAGE, front_matter, license_name, model_card
from sparsejepa.interop.encoder import Encoder, vit_arguments
from sparsejepa.interop.graphs import about, check, data_of, new_beside, quiet, to_onnx, to_pt2
from sparsejepa.interop.images import timm_rule, transformers_rule
from sparsejepa.interop.module import SparseJEPAEncoder, open_module
from sparsejepa.interop.refs import folder_of
from sparsejepa.interop.runs import CONFIG, groups_folder
from sparsejepa.interop.timm import TimmViT, plain_vit
from sparsejepa.interop.transformers import to_transformers
from sparsejepa.model.encoder import ViT

Format = Literal["timm", "transformers", "hub", "onnx", "pt2"]
FORMATS: tuple[str, ...] = get_args(Format)
MODEL, ACTIVATIONS, CARD = "model.safetensors", "group_activations.safetensors", "README.md"
_TIMM_BASE = "vit_tiny_patch16_224"
"""A name that timm knows; every size is given beside it."""
_SQUASHES = (
    "AutoImageProcessor crops only to a square, so it squashes images to {0[0]} x {0[1]} pixels: "
    "crop them to that shape first"
)
_GROUPS_USE = """\
from safetensors.torch import load_file

g = load_file("{folder}/group_activations.safetensors")
z = ({tokens} - g["mean"]) * g["scale"]
groups = torch.einsum("gpd,{axes}d->{axes}gp", g["W"], z).norm(dim=-1) * g["unit"]  # [{shape}]
"""


@dataclass(frozen=True)
class Exported:
    """What was written, and how it is used."""

    use: str
    """Lines of Python."""
    difference: float | None
    """Largest absolute difference of what the other program gives; None: it is not installed."""
    left_out: str = ""
    """What the format cannot carry, one line."""
    files: list[str] = field(default_factory=list)


def open_export(ref: str, encoder: Encoder, groups: Path | None = None) -> SparseJEPAEncoder:
    """Return an encoder with its groups in the form that every format starts from.

    Args:
        ref: what `encoder` was loaded from.
        groups: folder with a groups.safetensors; that of `ref` for None.

    Raises UserError for an encoder that is no plain ViT, or groups that are not there or do not
    fit.
    """
    folder = folder_of(ref) if groups is None else groups_folder(groups)
    module = open_module(plain(encoder), folder)
    if groups is not None and module.groups is None:
        raise UserError(f"--groups {groups}: there is no groups.safetensors")
    return module


def plain(encoder: Encoder) -> Encoder:
    """Return the encoder with timm's model, if it is one, in our form.

    Raises UserError, with the keys, if it has more than a plain ViT.
    """
    model = encoder.model
    if not isinstance(model, TimmViT):
        return encoder
    about = {"name": encoder.name, "mean": encoder.mean, "std": encoder.std}
    return Encoder(plain_vit(model), **about, license=encoder.license)


def check_out(out: Path, to: str) -> None:
    """Raise UserError for an unknown format, something that is there already, another ending."""
    if to not in FORMATS:
        raise UserError(f"--to {to}: not one of {', '.join(FORMATS)}{nearest(to, FORMATS)}")
    if to in ("onnx", "pt2") and out.suffix != f".{to}":
        raise UserError(f"--out {out}: the name must end in .{to}")
    for path in [out, *([data_of(out)] if to == "onnx" else [])]:
        if path.exists() or path.is_symlink():
            raise UserError(f"--out {path}: exists already; name another, or remove it first")


def write_export(
    module: SparseJEPAEncoder,
    to: str,
    out: Path,
    *,
    run_dir: Path | None = None,
    page: bool = True,
) -> Exported:
    """Write an encoder and its groups for another program.

    Args:
        to: timm, transformers and hub make a folder of `out`, onnx and pt2 a file.
        run_dir: where the model card finds numbers and the page, for hub.
        page: whether the page goes along.

    Raises UserError if `out` exists, or a format cannot hold the encoder.
    """
    check_out(out, to)
    writers: dict[str, Callable[[], Exported]] = {
        "timm": lambda: _timm(module, out),
        "transformers": lambda: _transformers(module, out),
        "hub": lambda: hub_folder(module, out, out.name, run_dir, page),
        "onnx": lambda: _graph(module, out, to_onnx, _ONNX_USE),
        "pt2": lambda: _graph(module, out, to_pt2, _PT2_USE),
    }
    return writers[to]()


def timm_settings(vit: ViT, encoder: Encoder) -> dict[str, Any]:
    """Return config.json of timm's own format for a plain ViT and what `encoder` says of it.

    Raises UserError for norms with another eps than timm's.
    """
    if vit.norm.eps != 1e-6:
        raise UserError(
            f"{encoder.name}: its norms have eps {vit.norm.eps:g} and timm's 1e-06; use --to "
            "transformers, hub, onnx or pt2"
        )
    block: Any = vit.blocks[0]
    sizes = {"img_size": list(vit.img_size), "patch_size": list(vit.patch_size)}
    return {
        "architecture": _TIMM_BASE,
        "num_classes": 0,
        "num_features": vit.embed_dim,
        "global_pool": "avg",
        "model_args": {
            **sizes,
            "embed_dim": vit.embed_dim,
            "depth": vit.depth,
            "num_heads": block.attn.num_heads,
            "mlp_ratio": vit_arguments(vit)["mlp_ratio"],
            "class_token": vit.cls_token is not None,
            "global_pool": "avg",
            # The norm is that of the tokens, before they are averaged.
            "fc_norm": False,
        },
        "pretrained_cfg": {
            **timm_rule(vit.img_size),
            "num_classes": 0,
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "license": encoder.license and license_name(encoder.license),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _timm(module: SparseJEPAEncoder, out: Path) -> Exported:
    import timm

    encoder, vit = module.encoder, _vit(module)
    settings = timm_settings(vit, encoder)
    arguments = {**settings["model_args"], "num_classes": 0}
    with new_folder(out) as folder:
        # What the tensors alone do not tell, so that the file can be read without the folder.
        told = {"num_heads": arguments["num_heads"], "norm_eps": vit.norm.eps, **about(module)}
        metadata = {"format": "pt", "json": json.dumps(told)}
        save_file(_state(vit.state_dict()), folder / MODEL, metadata)
        write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
        model: Any = timm.create_model(_TIMM_BASE, checkpoint_path=folder / MODEL, **arguments)
        model.eval()

        def run(pixels: Tensor) -> dict[str, Tensor]:
            tokens = model.forward_features(pixels)[:, vit.num_prefix_tokens :]
            return {"tokens": tokens, "pooled": model(pixels), **_groups(module, tokens)}

        difference = check(module, run, "timm", out)
        patches = f"[:, {vit.num_prefix_tokens}:]" if vit.num_prefix_tokens else ""
        call = ",\n    ".join(f"{name}={_python(value)}" for name, value in arguments.items())
        use = (
            "import timm\nimport torch\n\n"
            f'model = timm.create_model("local-dir:{out}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
            f"same = timm.create_model(  # in older versions, which know no transform then\n"
            f'    "{_TIMM_BASE}",\n    checkpoint_path="{out / MODEL}",\n    {call},\n).eval()\n'
            f"pixels = torch.randn(1, 3, {vit.img_size[0]}, {vit.img_size[1]})  # normalised\n"
            f"tokens = model.forward_features(pixels){patches}  # [B, N, D]\n"
            "pooled = model(pixels)  # [B, D]\n"
        )
        return _beside(module, out, folder, "timm", use, difference)


def _transformers(module: SparseJEPAEncoder, out: Path) -> Exported:
    encoder, vit = module.encoder, _vit(module)
    state, settings = to_transformers(vit)
    name = settings["architectures"][0]
    processor = {
        "image_processor_type": "ViTImageProcessor",
        **transformers_rule(vit.img_size),
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    options = "" if vit.cls_token is None else ", add_pooling_layer=False"
    prefix = vit.num_prefix_tokens
    with new_folder(out) as folder:
        save_file(_state(state), folder / MODEL, {"format": "pt"})
        write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
        write_text(folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
        model = _transformers_model(folder, name, bool(options))

        def run(pixels: Tensor) -> dict[str, Tensor]:
            tokens = model(pixel_values=pixels).last_hidden_state[:, prefix:]
            return {"tokens": tokens, "pooled": tokens.mean(1), **_groups(module, tokens)}

        difference = None if model is None else check(module, run, "transformers", out)
        patches = f"[:, {prefix}:]" if prefix else ""
        use = (
            f"import torch\nfrom transformers import AutoImageProcessor, {name}\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{out}")\n'
            f'model = {name}.from_pretrained("{out}"{options}).eval()\n'
            f"pixels = torch.randn(1, 3, {vit.img_size[0]}, {vit.img_size[1]})  # normalised\n"
            f"tokens = model(pixel_values=pixels).last_hidden_state{patches}  # [B, N, D]\n"
        )
        squashes = "" if vit.img_size[0] == vit.img_size[1] else _SQUASHES.format(vit.img_size)
        return _beside(module, out, folder, "transformers", use, difference, squashes)


def _transformers_model(folder: Path, name: str, no_pooler: bool) -> Any:
    """Load what was written with the library itself; None if it is not installed."""
    try:
        import transformers
    except ModuleNotFoundError:
        return None
    options = {"add_pooling_layer": False} if no_pooler else {}
    with redirect_stderr(io.StringIO()):  # its progress bar
        return getattr(transformers, name).from_pretrained(folder, **options).eval()


_ONNX_USE = """\
import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{out}")
about = json.loads(session.get_modelmeta().custom_metadata_map["sparsejepa.json"])  # mean, std
pixels = np.zeros((5, 3, {height}, {width}), np.float32)  # any number of images, normalised
names = [output.name for output in session.get_outputs()]
found = dict(zip(names, session.run(None, {{"pixels": pixels}})))  # {outputs}
"""
_PT2_USE = """\
import torch

model = torch.export.load("{out}").module()
pixels = torch.zeros(5, 3, {height}, {width})  # any number of images, normalised
found = model(pixels)  # {outputs}
"""


def _graph(
    module: SparseJEPAEncoder,
    out: Path,
    write: Callable[[SparseJEPAEncoder, Path], float],
    use: str,
) -> Exported:
    difference = write(module, out)
    height, width = module.encoder.img_size
    outputs = ", ".join(["tokens", "pooled", *_group_outputs(module)])
    text = use.format(out=out, height=height, width=width, outputs=outputs)
    files = [path.name for path in (out, data_of(out)) if path.exists()]
    return Exported(text, difference, files=files)


def hub_folder(
    module: SparseJEPAEncoder,
    out: Path,
    name: str,
    run_dir: Path | None = None,
    page: bool = True,
) -> Exported:
    """Write what `SparseJEPAEncoder.from_pretrained` reads, with a model card and the page.

    Args:
        name: of the model, as the card says it.
        run_dir: where the numbers and report.html come from.
        page: whether report.html goes along, where there is one.
    """
    report = run_dir / PAGE if run_dir is not None and page else None
    if report is not None and not report.is_file():
        report = None
    encoder = module.encoder
    with new_folder(out) as folder:
        card = model_card(
            name,
            encoder.architecture,
            module.trained_groups,
            run_dir=run_dir,
            license=encoder.license,
            page=report is not None,
        )
        write_text(folder / CARD, card)
        module.save_pretrained(folder)
        if report is not None:
            shutil.copyfile(report, folder / PAGE)
        with quiet():  # a licence is said where the encoder was loaded
            again = SparseJEPAEncoder.from_pretrained(folder)
        difference = check(module, again, "this program", out)
        use = (
            "import sparsejepa as sj\n\n"
            f'model = sj.SparseJEPAEncoder.from_pretrained("{out}")\n'
            "pixels = model.preprocess(images)  # files, PIL images or uint8 [B, H, W, 3]\n"
            f"found = model(pixels)  # {', '.join(['tokens', 'pooled', *_group_outputs(module)])}\n"
        )
        return Exported(use, difference, files=_names(folder))


def _beside(
    module: SparseJEPAEncoder,
    out: Path,
    folder: Path,
    to: str,
    use: str,
    difference: float | None,
    left_out: str = "",
) -> Exported:
    """Write the groups and a README with the use beside the weights of another program."""
    note = left_out and f"\n{left_out}.\n"
    if module.groups is not None:
        groups, region = module.groups, module.groups.kind == "region"
        tensors = {"W": groups.W, "mean": groups.mean, "scale": groups.scale, "unit": groups.unit}
        save_tensors(folder / ACTIVATIONS, tensors, {"kind": groups.kind})
        use += "\n" + _GROUPS_USE.format(
            folder=out,
            tokens="tokens.mean(1)" if region else "tokens",
            axes="b" if region else "bn",
            shape="B, G" if region else "B, N, G",
        )
        lacks = f"{to} has no groups: they are in {ACTIVATIONS} beside the weights"
        left_out = f"{lacks}; {left_out}" if left_out else lacks
    encoder = module.encoder
    mean, std = ([round(x, 6) for x in values] for values in (encoder.mean, encoder.std))
    height, width = encoder.img_size
    text = (
        f"{front_matter(encoder.license, to)}\n# {out.name}\n\n"
        f"An encoder of images of {height} x {width} pixels for {to}. Pixels are in [0, 1], less "
        f"the mean {mean}, over the standard deviation {std}. Of images of another size the "
        f"shorter side is resized and the longer one cropped around its centre.\n{note}\n"
        # The folders of this machine are nobody else's business.
        f"```python\n{use.replace(str(out), out.name)}```\n"
    )
    write_text(folder / CARD, text)
    return Exported(use, difference, left_out, _names(folder))


def _groups(module: SparseJEPAEncoder, tokens: Tensor) -> dict[str, Tensor]:
    """Return the activations that another program's tokens give."""
    if module.groups is None:
        return {}
    groups, group_map = module.groups(tokens)
    return {"groups": groups, **({} if group_map is None else {"group_map": group_map})}


def _group_outputs(module: SparseJEPAEncoder) -> list[str]:
    if module.kind is None:
        return []
    return ["groups"] if module.kind == "region" else ["groups", "group_map"]


def _vit(module: SparseJEPAEncoder) -> ViT:
    assert isinstance(module.model, ViT), "open_export brings every model into this form"
    return module.model


def _state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _python(value: Any) -> str:
    """Return a value as Python source."""
    if isinstance(value, list):
        return f"({', '.join(map(repr, value))})"
    return json.dumps(value) if isinstance(value, str) else repr(value)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write in; on success it becomes `out`, on failure it is removed."""
    folder = new_beside(out)
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
