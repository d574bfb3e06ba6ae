"""A plain I-JEPA step, written from the published description (Assran et al. 2023 and its code).

All patches are embedded and the hidden ones dropped; the context is repeated for every target block
and the blocks go through the predictor as B*M sequences; masks are drawn for one image after
another in Python and collated; AdamW and EMA move one tensor at a time; the loss is read at every
step. Left out, in its favour: images come ready, as normalised floats on the device. On a GPU,
where drawing masks in the process itself would be all that is measured, they are drawn beforehand,
as by ideal workers, and AdamW is torch's default.

Parameters have the names of `SparseJEPA`, so that either loads the other's weights.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from sparsejepa.benchmarks.settings import BenchSettings
from sparsejepa.config import ENCODER_SIZES
from sparsejepa.model.encoder import sincos_position_embedding

NUM_TARGETS = 4
_MOMENTUM = 0.996
_READY = 8
_LOOPS = ("foreach", "fused")


class Attention(nn.Module):
    """Multi-head self-attention, fused or written out (as the published code has it)."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused, self.scale = heads, fused, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, C, D] to [B, C, D]."""
        b, c, d = x.shape
        qkv = self.qkv(x).reshape(b, c, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, c, d))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, fused)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, C, D] to [B, C, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Vision transformer that embeds every patch and keeps those of `masks`."""

    def __init__(self, settings: BenchSettings, fused: bool) -> None:
        super().__init__()
        dim, depth, heads = ENCODER_SIZES[settings.encoder]
        side = settings.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, side, stride=side)})
        positions = sincos_position_embedding(settings.grid, dim)[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

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

    def __init__(self, settings: BenchSettings, fused: bool) -> None:
        super().__init__()
        dim, width = settings.predictor_dim, ENCODER_SIZES[settings.encoder][0]
        heads = next(h for h in range(max(1, dim // 32), 0, -1) if dim % h == 0)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        positions = sincos_position_embedding(settings.grid, dim)[None]
        self.register_buffer("positions", positions, persistent=False)
        depth = settings.predictor_depth
        self.blocks = nn.ModuleList(Block(dim, heads, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
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

    def __init__(self, settings: BenchSettings, fused: bool = True) -> None:
        super().__init__()
        self.context_encoder = Encoder(settings, fused)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        self.predictor = Predictor(settings, fused)

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
    kept = [
        torch.gather(x, dim=1, index=mask.unsqueeze(-1).repeat(1, 1, x.size(-1))) for mask in masks
    ]
    return torch.cat(kept, dim=0)


class MaskCollator:
    """Draws the masks of a batch for one image after another, then collates them.

    Blocks as published (never in the last row or column, the context cut by keeping the first
    indices), but with one target shape and context count, so that all steps do the same work.
    """

    def __init__(
        self, grid: tuple[int, int], target_shape: tuple[int, int], context: int, seed: int = 0
    ) -> None:
        self.grid, self.target_shape, self.context = grid, target_shape, context
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the context mask [B, C] and the target masks [B, K], each in a list."""
        seen, targets = [], []
        for _ in range(batch):
            context, blocks = self._image()
            seen.append([context])
            targets.append(blocks)
        return default_collate(seen), default_collate(targets)

    def _image(self) -> tuple[Tensor, list[Tensor]]:
        while True:
            blocks, free = [], torch.ones(self.grid, dtype=torch.int32)
            for _ in range(NUM_TARGETS):
                mask, complement = self._block(self.target_shape)
                blocks.append(mask)
                free = free * complement
            scale = 0.85 + 0.15 * float(torch.rand(1, generator=self.generator))
            share = math.sqrt(scale)
            rows, cols = (max(1, round(side * share)) for side in self.grid)
            _, outside = self._block((min(rows, self.grid[0]), min(cols, self.grid[1])))
            context = torch.nonzero(((1 - outside) * free).flatten()).squeeze(1)
            if len(context) >= self.context:
                return context[: self.context], blocks

    def _block(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return a block's patches and the grid that is 1 outside it."""
        (height, width), (rows, cols) = shape, self.grid
        top, left = (
            int(torch.randint(0, max(1, side - length), (1,), generator=self.generator))
            for side, length in ((rows, height), (cols, width))
        )
        mask = torch.zeros(self.grid, dtype=torch.int32)
        mask[top : top + height, left : left + width] = 1
        return torch.nonzero(mask.flatten()).squeeze(1), 1 - mask


class ReferenceStep:
    """One training step in the manner of the published code.

    Args:
        settings: sizes and device.
        bf16: run encoders, predictor and loss under bf16 autocast.
        fused: use the fused attention kernel instead of the published, explicit form.
    """

    def __init__(self, settings: BenchSettings, *, bf16: bool, fused: bool = True) -> None:
        device = settings.device
        on_gpu = device.startswith("cuda")
        torch.manual_seed(0)
        self.model = Reference(settings, fused).to(device)
        side = settings.img_size
        self.images = torch.randn(settings.batch, 3, side, side, device=device)
        self.masks = MaskCollator(settings.grid, settings.target_shape, settings.context)
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=1e-4, weight_decay=0.05, **({} if on_gpu else dict.fromkeys(_LOOPS, False))
        )
        self.ready = [self._draw() for _ in range(_READY)] if on_gpu else []

    def _draw(self) -> tuple[list[Tensor], list[Tensor]]:
        seen, targets = self.masks(len(self.images))
        device = self.images.device
        return [mask.to(device) for mask in seen], [mask.to(device) for mask in targets]

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
                k.data.mul_(_MOMENTUM).add_((1.0 - _MOMENTUM) * q.detach().data)
        return float(loss.detach())
