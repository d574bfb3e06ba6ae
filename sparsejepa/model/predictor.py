"""Predictors of the embeddings (or pixels) of hidden patches from the visible ones' embeddings.

`TransformerPredictor` is I-JEPA's (Assran et al. 2023, section 3); `MLPPredictor` is the shallow
one that the SparseJEPA paper names. Both have fixed sine-cosine positions and one interface.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsejepa.model.vit import Block, Linear, init_weights, sincos_position_embedding


class TransformerPredictor(nn.Module):
    """Narrow transformer over the context tokens and one mask token per target patch.

    Each target block is predicted on its own: it sees the context and its own mask tokens, never
    those of another block, so the context goes through the network once per target block.

    Args:
        embed_dim: width D of the encoder's tokens.
        grid_size: (rows, cols) of patches.
        dim: width of the predictor, a multiple of 4; its heads are 32 wide or a little wider.
        depth: number of blocks.
        out_dim: width D' of what is predicted; D if not given.

    The attribute `recompute` is as the encoder's. Raises UserError if `dim` is no multiple of 4.
    """

    positions: Tensor

    def __init__(
        self,
        embed_dim: int,
        grid_size: tuple[int, int],
        dim: int = 128,
        depth: int = 4,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.recompute = False
        num_heads = next(h for h in range(max(1, dim // 32), 0, -1) if dim % h == 0)
        self.embed = Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        positions = sincos_position_embedding(grid_size, dim)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = Linear(dim, out_dim or embed_dim)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, context_index: Tensor, target_index: Tensor) -> Tensor:
        """Predict the target blocks, patches `target_index` [B, M, K]: [B, M, K, D'].

        `context` [B, C, D] are the tokens of the patches `context_index` [B, C]; both index int64.
        """
        blocks, patches = target_index.shape[1:]
        seen = self.embed(context)
        seen = seen + self.positions[context_index].to(seen.dtype)
        hidden = (self.mask_token + self.positions[target_index]).to(seen.dtype)
        # A batch of B*M sequences, each the whole context followed by one block's mask tokens.
        seen = seen.unsqueeze(1).expand(-1, blocks, -1, -1)
        tokens = torch.cat([seen, hidden], dim=2).flatten(0, 1)
        for i, block in enumerate(self.blocks):
            # Nobody asks for the context's tokens after the last block: there they are only seen.
            last = patches if i == len(self.blocks) - 1 else None
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, last, use_reentrant=False)
            else:
                tokens = block(tokens, last)
        return self.proj(self.norm(tokens)).view(len(context), blocks, patches, -1)


class MLPPredictor(nn.Module):
    """Shallow MLP on the mean context token and the position of the target patch.

    `dim` is the width of its `depth` hidden layers; all else is as in `TransformerPredictor`.
    """

    positions: Tensor

    def __init__(
        self,
        embed_dim: int,
        grid_size: tuple[int, int],
        dim: int = 256,
        depth: int = 2,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        positions = sincos_position_embedding(grid_size, dim)
        self.register_buffer("positions", positions, persistent=False)
        # The first layer on [mean context, position] as a sum of two maps: once per image and once
        # per patch of the grid.
        self.embed = nn.Linear(embed_dim, dim)
        self.embed_position = nn.Linear(dim, dim, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth - 1))
        self.proj = nn.Linear(dim, out_dim or embed_dim)

    def forward(self, context: Tensor, context_index: Tensor, target_index: Tensor) -> Tensor:
        """Predict the target patches, as `TransformerPredictor`; `context_index` is not used."""
        x = self.embed(context.mean(1))[:, None, None]
        x = x + self.embed_position(self.positions)[target_index]
        for layer in self.hidden:
            x = layer(F.gelu(x))
        return self.proj(F.gelu(x))
