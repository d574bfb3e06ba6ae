"""A frozen encoder: any vision transformer that gives patch tokens, and what its pixels are."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsejepa.data.augment import normalize
from sparsejepa.environment import has_bf16
from sparsejepa.errors import UserError
from sparsejepa.interop.names import Report
from sparsejepa.interop.timm import RGB, TimmViT
from sparsejepa.model.encoder import ViT
from sparsejepa.rng import derive_seed

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the pixels that foreign checkpoints were trained on."""
Precision = Literal["fp32", "bf16"]


class Encoder:
    """A frozen encoder together with what its pixels must look like.

    Args:
        model: put into evaluation mode; its weights are not copied.
        name: what tables call it.
        mean, std: of the pixels that it was trained on, in units of [0, 1].
        precision: bf16 runs matrix products in bf16 where the hardware has it.
        license: of foreign weights, where their publisher states one.
        report: what became of the tensors of a foreign file.
    """

    def __init__(
        self,
        model: ViT | TimmViT,
        *,
        name: str,
        mean: RGB,
        std: RGB,
        precision: Precision = "fp32",
        license: str | None = None,
        report: Report | None = None,
    ) -> None:
        self.model = model.eval()
        self.name = name
        self.mean, self.std = mean, std
        self.precision: Precision = precision
        self.img_size = model.img_size
        self.grid_size = model.grid_size
        self.embed_dim = model.embed_dim
        self.depth = model.depth
        self.license = license or getattr(model, "license", None)
        self.report = report

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def architecture(self) -> dict[str, Any]:
        """Everything but the weights; equal for encoders that share an untrained floor."""
        return {
            **_architecture(self.model),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def to(self, device: torch.device | str) -> Encoder:
        """Move the weights and return the encoder itself."""
        self.model.to(device)
        return self

    def tokens(self, images: Tensor) -> Tensor:
        """Map uint8 images [B, H, W, 3] of any size to float32 patch tokens [B, N, D].

        Images of another size are resized (bilinear with antialiasing, the aspect ratio gives way)
        to the encoder's; the tokens are those after the final norm, without class token.
        """
        return self._run(images, lambda pixels: [self.model(pixels)])[0]

    def layers(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the tokens [B, N, D] of the last `n` blocks, each through the final norm.

        Raises UserError if the encoder has fewer blocks.
        """
        if not 1 <= n <= self.depth:
            raise UserError(f"{self.name}: has {self.depth} blocks, so not the last {n} of them")
        return self._run(images, lambda pixels: self.model.forward_intermediates(pixels, n))

    def untrained(self, seed: int = 0) -> Encoder:
        """Return the same architecture with fresh weights, a fixed function of `seed`."""
        with torch.random.fork_rng(devices=[]):
            # Only the CPU's generator: weights are drawn there, and a GPU's keeps its state.
            torch.default_generator.manual_seed(derive_seed(seed, 0, "untrained"))
            if isinstance(self.model, ViT):
                model: ViT | TimmViT = ViT(**vit_arguments(self.model))
            else:
                of = self.model
                model = TimmViT(of.timm_name, pretrained=False, settings=of.settings)
        name = f"{self.name} (untrained)"
        fresh = Encoder(model, name=name, mean=self.mean, std=self.std, precision=self.precision)
        return fresh.to(self.device)

    def fingerprint(self) -> str:
        """Return a hash of architecture, weights and precision, the same on every machine."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.architecture, self.precision], sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {data.dtype} {list(data.shape)}".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images [B, H, W, 3] as the model sees them: resized and normalised."""
        images = images.to(self.device)
        if tuple(images.shape[1:3]) != self.img_size:
            # The whole image, not a crop of it: a count must still be the count of what is seen.
            planes = images.permute(0, 3, 1, 2).float()
            planes = F.interpolate(planes, self.img_size, mode="bilinear", antialias=True)
            images = planes.permute(0, 2, 3, 1)
        return normalize(images, self.mean, self.std)

    # Not inference_mode: its tensors can never enter autograd, and maps are trained on tokens.
    @torch.no_grad()
    def _run(self, images: Tensor, forward: Any) -> list[Tensor]:
        device, pixels = self.device, self.pixels(images)
        bf16 = self.precision == "bf16" and has_bf16(str(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = forward(pixels)
        return [x.float() for x in outputs]


def vit_arguments(vit: ViT) -> dict[str, Any]:
    """Return the arguments that build `vit` again, JSON-able and without drop path.

    Norms with 1e-6 are not named: files and fingerprints stay those of versions that knew no other.
    """
    block: Any = vit.blocks[0]
    hidden: int = block.mlp.fc1.out_features
    ratio = hidden / vit.embed_dim
    if int(vit.embed_dim * ratio) < hidden:  # the division was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return {
        "img_size": tuple(vit.img_size),
        "patch_size": tuple(vit.patch_size),
        "embed_dim": vit.embed_dim,
        "depth": vit.depth,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": ratio,
        "in_chans": vit.in_chans,
        "class_token": vit.cls_token is not None,
        "pos_embed": vit.positions,
        **({} if vit.norm.eps == 1e-6 else {"norm_eps": vit.norm.eps}),
    }


def _architecture(model: ViT | TimmViT) -> dict[str, Any]:
    if isinstance(model, ViT):
        return {"kind": "vit", **vit_arguments(model)}
    settings = {"settings": model.settings} if model.settings else {}
    return {"kind": "timm", "name": model.timm_name, **settings}
