"""A plain I-JEPA step, as one would write it from the paper (Assran et al. 2023) and timm's blocks.

All patches are embedded and the hidden ones dropped; the context is repeated for every target block
and the blocks go through the predictor as M*B sequences; masks are drawn for one image after
another in Python and collated; AdamW and EMA move one tensor at a time; the loss is read at every
step. Left out, in its favour: images come ready, as normalised floats on the device. On a GPU,
where drawing masks in the process itself would be all that is measured, they are drawn beforehand,
as by ideal workers, and AdamW is torch's default.

Parameters have the names of `SparseJEPA`, so that either loads the other's weights.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.data import default_collate

from sparsejepa.config import ENCODER_SIZES
from sparsejepa.model.vit import sincos_position_embedding

NUM_TARGETS, MOMENTUM = 4, 0.996
_READY = 8  # masks that are drawn beforehand on a GPU
_norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class Sizes:
    """Of a step; with one target shape and context count, so that all steps do the same work."""

    encoder: str = "tiny"
    patch_size: int = 4
    img_size: int = 32
    batch_size: int = 128
    predictor_dim: int = 96
    predictor_depth: int = 6
    target_shape: tuple[int, int] = (3, 4)
    context: int = 20

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.img_size // self.patch_size
        return side, side


def blocks(dim: int, depth: int, heads: int, fused: bool) -> nn.ModuleList:
    """Return transformer blocks; attention is the fused kernel or, as published, written out."""
    made = nn.ModuleList(
        Block(dim, heads, qkv_bias=True, norm_layer=_norm)  # type: ignore[arg-type]
        for _ in range(depth)
    )
    for block in made:
        block.attn.fused_attn = fused  # type: ignore[union-attr]
    return made


class Encoder(nn.Module):
    """Vision transformer that embeds every patch and keeps those of `masks`."""

    def __init__(self, sizes: Sizes, fused: bool) -> None:
        super().__init__()
        dim, depth, heads = ENCODER_SIZES[sizes.encoder]
        side = sizes.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, side, stride=side)})
        positions = sincos_position_embedding(sizes.grid, dim)[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = blocks(dim, depth, heads, fused)
        self.norm = _norm(dim)

    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """Encode [B, 3, H, W] to [B, N, D], or the patches of each mask [B, C], stacked."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed
        if masks is not None:
            x = apply_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """Narrow transformer on the context, repeated for each target block, and mask tokens."""

    positions: Tensor

    def __init__(self, sizes: Sizes, fused: bool) -> None:
        super().__init__()
        dim, width = sizes.predictor_dim, ENCODER_SIZES[sizes.encoder][0]
        heads = next(h for h in range(max(1, dim // 32), 0, -1) if dim % h == 0)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        positions = sincos_position_embedding(sizes.grid, dim)[None]
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = blocks(dim, sizes.predictor_depth, heads, fused)
        self.norm = _norm(dim)
        self.proj = nn.Linear(dim, width)

    def forward(self, context: Tensor, seen: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Predict the patches of `targets`, M masks [B, K], as [M*B, K, D]."""
        batch, count = context.shape[:2]
        positions = self.positions.repeat(batch, 1, 1)
        x = self.embed(context) + apply_masks(positions, seen)
        hidden = apply_masks(positions, targets) + self.mask_token
        x = torch.cat([x.repeat(len(targets), 1, 1), hidden], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x)[:, count:])


class Reference(nn.Module):
    """Context encoder, target encoder and predictor."""

    def __init__(self, sizes: Sizes, fused: bool = True) -> None:
        super().__init__()
        self.context_encoder = Encoder(sizes, fused)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        self.predictor = Predictor(sizes, fused)

    def forward(self, images: Tensor, seen: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Return the smooth L1 loss; `seen` is one mask [B, C], `targets` M masks [B, K]."""
        with torch.no_grad():
            wanted = self.target_encoder(images)
            wanted = F.layer_norm(wanted, (wanted.size(-1),))
            wanted = apply_masks(wanted, targets)
        context = self.context_encoder(images, seen)
        return F.smooth_l1_loss(self.predictor(context, seen, targets), wanted)


def apply_masks(x: Tensor, masks: list[Tensor]) -> Tensor:
    """Gather the tokens of each mask [B, K] from x [B, N, D]; results stacked in the batch."""
    index = [mask.unsqueeze(-1).repeat(1, 1, x.size(-1)) for mask in masks]
    return torch.cat([torch.gather(x, 1, one) for one in index])


class MaskCollator:
    """Draws the masks of a batch for one image after another, then collates them.

    As published: no block in the last row or column, the context cut by keeping the first indices.
    """

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        self.sizes, self.generator = sizes, torch.Generator().manual_seed(seed)

    def __call__(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the context mask [B, C] and the target masks [B, K], each in a list."""
        context, targets = default_collate([self._image() for _ in range(batch)])
        return [context], targets

    def _image(self) -> tuple[Tensor, list[Tensor]]:
        count, grid = self.sizes.context, self.sizes.grid
        while True:
            free, targets = torch.ones(grid, dtype=torch.int32), []
            for _ in range(NUM_TARGETS):
                block = self._block(self.sizes.target_shape)
                targets.append(torch.nonzero(block.flatten()).squeeze(1))
                free = free * (1 - block)
            share = math.sqrt(0.85 + 0.15 * float(torch.rand(1, generator=self.generator)))
            around = self._block((max(1, round(grid[0] * share)), max(1, round(grid[1] * share))))
            context = torch.nonzero((around * free).flatten()).squeeze(1)
            if len(context) >= count:
                return context[:count], targets

    def _block(self, shape: tuple[int, int]) -> Tensor:
        """Return a grid that is 1 in a block of this shape and 0 elsewhere."""
        top, left = (
            int(torch.randint(0, max(1, side - length), (1,), generator=self.generator))
            for side, length in zip(self.sizes.grid, shape, strict=True)
        )
        block = torch.zeros(self.sizes.grid, dtype=torch.int32)
        block[top : top + shape[0], left : left + shape[1]] = 1
        return block


class ReferenceStep:
    """One training step in the manner of the published code, on images that are ready.

    `bf16` runs networks and loss under bf16 autocast, `fused` takes the fused attention kernel.
    """

    def __init__(self, sizes: Sizes, device: str, *, bf16: bool, fused: bool = True) -> None:
        on_gpu = device.startswith("cuda")
        torch.manual_seed(0)
        self.model = Reference(sizes, fused).to(device)
        self.images = torch.randn(sizes.batch_size, 3, *(sizes.img_size,) * 2, device=device)
        self.masks = MaskCollator(sizes)
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        way = None if on_gpu else False  # False: one tensor after the other
        self.optimizer = torch.optim.AdamW(groups, 1e-4, weight_decay=0.05, foreach=way, fused=way)
        self.ready = [self._draw() for _ in range(_READY)] if on_gpu else []

    def _draw(self) -> list[list[Tensor]]:
        drawn = self.masks(len(self.images))
        return [[mask.to(self.images.device) for mask in masks] for masks in drawn]

    def __call__(self, number: int) -> float:
        """Take a step and return its loss."""
        seen, targets = self.ready[number % _READY] if self.ready else self._draw()
        with self.autocast:
            loss = self.model(self.images, seen, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            fast, slow = self.model.context_encoder, self.model.target_encoder
            for q, k in zip(fast.parameters(), slow.parameters(), strict=True):
                k.data.mul_(MOMENTUM).add_((1.0 - MOMENTUM) * q.detach().data)
        return float(loss.detach())
