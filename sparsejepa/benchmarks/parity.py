"""How far an encoder moves on its way through every export: the table of docs/export.md.

    python -m sparsejepa.benchmarks.parity

Encoders have random weights, groups a random map. A number is the largest absolute difference of
any output (tokens, pooled features, activations of groups) from the module that was exported, in
float32 on the CPU, over batches of 1, 2, 5 and 17 images of noise; "back in ours" that of tokens
from the folder or file, loaded as an encoder of ours.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from sparsejepa.errors import UserError
from sparsejepa.interop import Encoder, load
from sparsejepa.interop.export import MODEL, write_export
from sparsejepa.interop.graphs import example
from sparsejepa.interop.module import SparseJEPAEncoder
from sparsejepa.model.encoder import ViT
from sparsejepa.model.groups import GroupMap, Kind

PROGRAMS = {
    "timm": "timm", "transformers": "transformers", "hub": "from_pretrained",
    "onnx": "onnxruntime", "pt2": "torch.export",
}  # fmt: skip
# What of these formats is loaded again as an encoder of ours; timm's folder would load with timm.
_RETURN = {"timm": MODEL, "transformers": "", "hub": ""}
_TINY: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "num_heads": 3}
ENCODERS: dict[str, tuple[dict[str, Any], Kind | None]] = {
    "Ti/4, 32 x 32, dense": (_TINY, None),
    "Ti/4, 32 x 32, region": (_TINY, "region"),
    "Ti/4, 32 x 48, concept": ({**_TINY, "img_size": (32, 48)}, "concept"),
    "S/16, 224 x 224, feature, class token, learned positions": (
        {
            "img_size": 224, "patch_size": 16, "embed_dim": 384, "num_heads": 6,
            "class_token": True, "pos_embed": "learned",
        },
        "feature",
    ),
    "Ti/4, hierarchical stem, concept": ({**_TINY, "stem": "hierarchical"}, "concept"),
}  # fmt: skip


def make_module(arguments: dict[str, Any], kind: Kind | None) -> SparseJEPAEncoder:
    """Return an encoder with random weights and, for a kind, 16 random groups."""
    torch.manual_seed(0)
    vit = ViT(**{"depth": 12, **arguments})
    encoder = Encoder(vit, name="random", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    if kind is None:
        return SparseJEPAEncoder(encoder)
    groups = GroupMap(kind, vit.embed_dim, vit.grid_size, 16, 12)
    return SparseJEPAEncoder(encoder, groups.eval(), torch.rand(16) + 0.5)


def measure(module: SparseJEPAEncoder, scratch: Path) -> dict[str, float | None]:
    """Return the largest absolute difference in each program, and of what comes back from one.

    None where a format cannot hold the encoder.
    """
    found: dict[str, float | None] = {}
    back = []
    for to, program in PROGRAMS.items():
        out = scratch / f"{to}{'' if to in _RETURN else f'.{to}'}"
        try:
            found[program] = write_export(module, to, out).difference
        except UserError:
            found[program] = None
            continue
        if to in _RETURN:
            back.append(_difference(module, load(out / _RETURN[to])))
    return {**found, "back in ours": max(back)}


@torch.no_grad()
def _difference(module: SparseJEPAEncoder, encoder: Encoder) -> float:
    """Return how far the tokens of `encoder` are from the module's."""
    pixels = example(module, 2)
    return float((encoder.model(pixels) - module.model(pixels)).abs().max())


def main() -> None:
    """Print the table as Markdown."""
    columns = [*PROGRAMS.values(), "back in ours"]
    print(f"| encoder | {' | '.join(columns)} |")
    print(f"| --- |{' --- |' * len(columns)}")
    for name, (arguments, kind) in ENCODERS.items():
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(make_module(arguments, kind), Path(scratch))
        cells = ["refused" if found[c] is None else f"{found[c]:.1e}" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
