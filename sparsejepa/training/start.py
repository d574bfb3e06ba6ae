"""Where a run starts when not from random weights: ``--init``, an encoder that is gone on with.

Width, depth, heads, patches, stem, class token and kind of positions are those of the encoder, and
so are the mean and standard deviation of the pixels: its first layer was trained on pixels of that
scale. Both encoders start from its weights; predictor and group map are new.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsejepa.config import Config
from sparsejepa.data.store import ImageSet
from sparsejepa.data.stream import ImageStream
from sparsejepa.errors import UserError
from sparsejepa.files import read_json, write_text
from sparsejepa.interop import RGB, load, vit_arguments
from sparsejepa.interop.timm import TimmViT, plain_vit, rgb
from sparsejepa.model.encoder import ViT
from sparsejepa.training.checkpoint import has_checkpoint

START = "init.json"
"""In a run directory: what `Start` knows but the weights."""
FROM_START = {"encoder_dims", "patch_size", "stem"}
"""Settings that the encoder decides, whatever the flags say."""
_DEEPEST = 1 << 10


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        ref: its name, as `interop.load` takes it.
        arch: arguments of `ViT`, without drop path.
        mean, std: of the pixels, in units of [0, 1].
        license, fingerprint: of the encoder.
        vit: the encoder; None in a run that goes on from a checkpoint.
    """

    ref: str
    arch: dict[str, Any]
    mean: RGB
    std: RGB
    license: str | None
    fingerprint: str
    vit: ViT | None

    def settings(self, config: Config) -> Config:
        """Return the settings with the encoder's sizes in them, checked.

        Raises UserError if they say otherwise, or cannot work with an encoder of this size.
        """
        arch, wanted = self.arch, config.model.encoder_dims
        dims = (arch["embed_dim"], arch["depth"], arch["num_heads"])
        if wanted and wanted != dims:
            raise UserError(
                f"--encoder-dims {' '.join(map(str, wanted))}: --init {self.ref} has "
                f"{' '.join(map(str, dims))}; leave --encoder-dims out"
            )
        height, width = arch["patch_size"]
        if height != width:
            raise UserError(
                f"--init {self.ref}: its patches are {height}x{width} pixels, only square ones can "
                "be trained on here"
            )
        stem = arch.get("stem", "linear")
        return config.replace(encoder_dims=dims, patch_size=height, stem=stem).check()

    def encoder(self, img_size: tuple[int, int], drop_path: float) -> ViT:
        """Return the encoder for images of `img_size` (h, w); random weights without `vit`.

        On another grid of patches learned positions are interpolated, fixed ones computed anew.
        """
        vit = ViT(**{**self.arch, "img_size": img_size, "drop_path": drop_path})
        if self.vit is not None:
            state = dict(self.vit.state_dict())
            if vit.grid_size != self.vit.grid_size:
                state["pos_embed"] = vit.state_dict()["pos_embed"]
                if vit.positions == "learned":
                    prefix = vit.num_prefix_tokens
                    own = self.vit.pos_embed.detach()
                    state["pos_embed"] = resize_positions(
                        own, self.vit.grid_size, vit.grid_size, prefix
                    )
            vit.load_state_dict(state)
        return vit

    def scaled(self, images: ImageSet | ImageStream) -> ImageSet | ImageStream:
        """Return the images with the encoder's mean and standard deviation."""
        return dataclasses.replace(images, mean=self.mean, std=self.std)

    def write(self, run_dir: Path) -> None:
        """Write all but the weights, so that the run can go on without the encoder."""
        about = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "vit"}
        write_text(run_dir / START, json.dumps(about, indent=1))


def find_start(config: Config, run_dir: Path | None = None) -> Start | None:
    """Return what a run starts from, None for random weights.

    A run in `run_dir` that has a checkpoint or is finished needs the encoder no more. Raises
    UserError if there is no encoder of that name, or none that can be trained here.
    """
    ref = config.model.init
    if ref is None:
        return None
    if run_dir is not None and (start := read_start(run_dir)) is not None:
        return start
    try:
        encoder = load(ref)
        fingerprint, model = encoder.fingerprint(), encoder.model
        vit = plain_vit(model) if isinstance(model, TimmViT) else model
    except UserError as error:
        raise UserError(f"--init {error}") from None
    return Start(
        ref,
        vit_arguments(vit),
        encoder.mean,
        encoder.std,
        encoder.license,
        fingerprint,
        vit,
    )


def license_of(run_dir: Path, config: Config) -> str | None:
    """Return the licence of the encoder that a run in `run_dir` began with, if there is one."""
    return _read(run_dir / START).license if config.model.init else None


def read_start(run_dir: Path) -> Start | None:
    """Return what a run began from, without the weights; None if it is to begin (anew) or had none.

    Raises UserError for a file that is damaged.
    """
    begun = has_checkpoint(run_dir) or (run_dir / "summary.json").exists()
    return _read(run_dir / START) if begun and (run_dir / START).exists() else None


def _read(path: Path) -> Start:
    found = read_json(path)
    try:
        arch: dict[str, Any] = dict(found["arch"])
        arch |= {name: tuple(arch[name]) for name in ("img_size", "patch_size")}
        if not 0 < arch["depth"] < _DEEPEST:
            raise ValueError(f"{arch['depth']} blocks")
        if not isinstance(found["license"], str | None):
            raise ValueError("its licence is no text")
        with torch.device("meta"):  # only to see whether there is such an encoder
            ViT(**arch)
        about = {"arch": arch, "mean": rgb(found["mean"]), "std": rgb(found["std"]), "vit": None}
        return Start(**{**found, **about})
    except (TypeError, LookupError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: damaged ({error}); copy the run again") from None


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int
) -> Tensor:
    """Interpolate learned positions [1, prefix + N, D] from a grid of (rows, cols) to another.

    Bicubic with antialiasing, as timm does; those of the `prefix` tokens before the patches stay.
    """
    first, grid = positions[:, :prefix], positions[:, prefix:]
    planes = grid.unflatten(1, old).permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, new, mode="bicubic", antialias=True)
    resized = planes.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([first, resized], dim=1)
