"""Encoders and groups in and out: run directories, timm, transformers, the hub, foreign files."""

from sparsejepa.interop.encoder import IMAGENET, Encoder, Precision, vit_arguments
from sparsejepa.interop.names import Report
from sparsejepa.interop.refs import folder_of, load
from sparsejepa.interop.runs import load_groups, save_encoder, save_groups
from sparsejepa.interop.timm import RGB, TimmViT
from sparsejepa.interop.transformers import from_transformers, to_transformers

__all__ = [
    "IMAGENET",
    "RGB",
    "Encoder",
    "Precision",
    "Report",
    "TimmViT",
    "folder_of",
    "from_transformers",
    "load",
    "load_groups",
    "save_encoder",
    "save_groups",
    "to_transformers",
    "vit_arguments",
]
