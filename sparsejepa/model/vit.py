"""Vision transformer that encodes only the patches it is given, with timm's parameter names.

Dosovitskiy et al. 2021 (pre-norm ViT, sizes Ti/S/B/L/H as in DeiT), used as in I-JEPA (Assran et
al. 2023): the context encoder sees the visible patches only, so hidden ones cost nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsejepa.errors import UserError


def sincos_position_embedding(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Return the fixed 2-D sine-cosine embedding [N, dim] of a grid of (rows, cols), row-major.

    A quarter of the dimensions each: sin(c w), cos(c w), sin(r w), cos(r w) of the column c and
    the row r, with w_i = 10000^(-4i/dim): the order of MAE and I-JEPA, so that their weights fit.
    Raises UserError if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(f"width {dim}: sine-cosine positions need a multiple of 4")
    rows, cols = grid_size
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    column_angle, row_angle = (x.reshape(-1, 1) * omega for x in (col, row))
    parts = [column_angle.sin(), column_angle.cos(), row_angle.sin(), row_angle.cos()]
    return torch.cat(parts, dim=1).to(torch.get_default_dtype())


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for q, k, v [..., C, d]."""
    # On the CPU in bfloat16 the explicit form is faster than the fused kernel.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Linear(nn.Linear):
    """x W^T + b, on the CPU in bfloat16 by oneDNN's fused kernel: 15 to 25 % less time."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Map [..., D_in] to [..., D_out], through an erf GELU if asked."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not _has_fused_linear():
            y = super().forward(x)
        elif torch.is_grad_enabled():
            y = _FusedLinear.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        else:
            return _fused_linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype), gelu)
        return F.gelu(y) if gelu else y


def _has_fused_linear() -> bool:
    return not torch.compiler.is_compiling() and _onednn_has_bf16()  # compiled code fuses more


@cache
def _onednn_has_bf16() -> bool:
    mkldnn = torch.backends.mkldnn.is_available()
    return mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _fused_linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    after = ("gelu", [], "none") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *after)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _fused_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        below = grad @ weight if ctx.needs_input_grad[0] else None
        # A product with ones sums the rows in fp32, and faster than sum() does in bf16.
        total = (rows.new_ones(1, len(rows)) @ rows)[0]
        return below, rows.t() @ x.reshape(-1, x.shape[-1]), total


class Attention(nn.Module):
    """Multi-head self-attention. Raises UserError if `num_heads` does not divide `dim`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"{num_heads} attention heads do not divide the width {dim}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Map tokens [B, C, D] to [B, C, D], or those of the `last` tokens to [B, last, D]."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        # One copy brings all heads into the layout of the batched matmuls, in place of three.
        q, k, v = heads.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        if last is not None:
            q = q[:, :, -last:]
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an erf GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [..., D] to [..., D]."""
        return self.fc2(self.fc1(x, gelu=True))


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth (Huang et al. 2016).

    In training each sample skips each of the two branches with probability `drop_path`; the others
    are scaled up to keep the mean.
    """

    def __init__(
        self, dim: int, num_heads: int, ratio: float = 4, drop_path: float = 0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * ratio))

    def forward(self, x: Tensor, last: int | None = None, kept: Tensor | None = None) -> Tensor:
        """Map tokens [B, C, D] to [B, C, D]; `last` is that of `Attention`.

        `kept` [2, B] says with ones and zeros who keeps which branch; if None it is drawn from
        torch's default generator.
        """
        first, second = (None, None) if kept is None else kept
        attended = self.attn(self.norm1(x), last)
        x = (x if last is None else x[:, -last:]) + self._thin(attended, first)
        return x + self._thin(self.mlp(self.norm2(x)), second)

    def _thin(self, branch: Tensor, kept: Tensor | None) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        if kept is None:
            kept = branch.new_empty(len(branch)).bernoulli_(keep)
        return branch * (kept.to(branch.dtype)[:, None, None] / keep)


class PatchEmbed(nn.Module):
    """Linear map of a patch's pixels, stored as the convolution that timm has."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor, index: Tensor | None) -> Tensor:
        """Embed the patches `index` [B, C] (all if None) of images [B, 3, H, W] to [B, C, D]."""
        height, width = self.proj.kernel_size
        patches = patchify(images, (height, width))  # [B, rows, cols, 3, h, w]
        if index is None:
            patches = patches.flatten(1, 2)
        else:
            image, cols = torch.arange(len(images), device=index.device)[:, None], patches.shape[2]
            patches = patches[image, index // cols, index % cols]
        return F.linear(patches.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images [B, 3, H, W] into [B, rows, cols, 3, h, w], a view."""
    height, width = patch_size
    patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))
    return patches.permute(0, 2, 4, 1, 3, 5)


class ViT(nn.Module):
    """Vision transformer encoder; its state_dict is that of timm's ``VisionTransformer``.

    Args:
        img_size, patch_size: height and width in pixels; one number for a square.
        embed_dim: width D of the tokens.
        depth: number of blocks.
        num_heads: attention heads; divides `embed_dim`.
        mlp_ratio: width of a block's MLP over D.
        in_chans: colour channels.
        class_token: put a learned token before the patches; it is not among the outputs.
        pos_embed: fixed sine-cosine positions (zero for the class token), or learned ones.
        norm_eps: what the norms add to the variance.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.

    With the attribute `recompute` the blocks are computed again in the backward pass instead of
    keeping their activations (Chen et al. 2016). Raises UserError if patches do not tile the image
    or heads do not divide the width.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int | tuple[int, int] = 4,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        *,
        in_chans: int = 3,
        class_token: bool = False,
        pos_embed: Literal["sincos", "learned"] = "sincos",
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size = img_size if isinstance(img_size, tuple) else (img_size, img_size)
        self.patch_size = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        (height, width), (patch_h, patch_w) = self.img_size, self.patch_size
        if height % patch_h or width % patch_w:
            raise UserError(
                f"patches of {patch_h}x{patch_w} pixels do not tile images of {height}x{width}"
            )
        self.grid_size = (height // patch_h, width // patch_w)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_prefix_tokens = int(class_token)

        self.positions = pos_embed
        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.num_prefix_tokens + self.num_patches, embed_dim),
            requires_grad=pos_embed == "learned",
        )
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, rate, norm_eps) for rate in rates)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.recompute = False

        self.apply(init_weights)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if pos_embed == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            positions = sincos_position_embedding(self.grid_size, embed_dim)
            self.pos_embed.data[0, self.num_prefix_tokens :] = positions

    def draw_kept(self, batch: int) -> Tensor | None:
        """Draw stochastic depth for `batch` images, from torch's default generator of the device.

        Returns ones and zeros [depth, 2, B] for `forward`; None where nothing is ever skipped.
        """
        rates = [block.drop_path for block in self.blocks if isinstance(block, Block)]
        if not self.training or not any(rates):
            return None
        like = self.pos_embed  # which FSDP may share out: new_ones of it would be shared out too
        kept = torch.ones(self.depth, 2, batch, dtype=like.dtype, device=like.device)
        for rate, branches in zip(rates, kept, strict=True):
            for branch in branches if rate else ():
                branch.bernoulli_(1 - rate)
        return kept

    def forward(
        self, images: Tensor, index: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Return the patch tokens after the final norm, [B, C, D] or [B, N, D].

        Args:
            images: float [B, 3, H, W], normalised.
            index: int64 [B, C], the patches to encode (row-major numbers in 0..N-1); all if None.
                The others' pixels are never read.
            kept: [depth, 2, B], what `draw_kept` draws; if None each block draws its own.

        Raises ValueError for images of another size.
        """
        x = self._embed(images, index)
        for i, block in enumerate(self.blocks):
            branches = None if kept is None else kept[i]
            if self.recompute and torch.is_grad_enabled():
                again: Any = {"use_reentrant": False, "preserve_rng_state": kept is None}
                x = checkpoint(block, x, None, branches, **again)
            else:
                x = block(x, kept=branches)
        return self.norm(x)[:, self.num_prefix_tokens :]

    def forward_intermediates(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the patch tokens [B, N, D] of the last `n` blocks, each through the final norm."""
        x, outputs = self._embed(images, None), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [self.norm(x)[:, self.num_prefix_tokens :] for x in outputs[-n:]]

    def _embed(self, images: Tensor, index: Tensor | None) -> Tensor:
        """Return the prefix and patch tokens with their positions added."""
        if images.ndim != 4 or images.shape[1:] != (self.in_chans, *self.img_size):
            wanted = ", ".join(map(str, (self.in_chans, *self.img_size)))
            raise ValueError(f"images must be [B, {wanted}], got {list(images.shape)}")
        positions = self.pos_embed[:, self.num_prefix_tokens :]
        if index is not None:
            positions = positions[0, index]
        x = self.patch_embed(images, index)
        # The tokens keep the type of the products (bf16 under autocast), not that of the positions.
        x = x + positions.to(x.dtype)
        if self.cls_token is None:
            return x
        prefix = (self.cls_token + self.pos_embed[:, : self.num_prefix_tokens]).to(x.dtype)
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)


def init_weights(module: nn.Module) -> None:
    """Draw weights of linear and patch layers from a normal (0.02) cut at 2; biases are zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
