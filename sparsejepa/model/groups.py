"""The group map: which latent dimensions feed which group, learned under a group lasso.

Group g sees the latents z only through u_g = W^(g) z and predicts with a network of its own.
Column j of W^(g), written W_gj, says how latent j feeds group g; the penalty sum_gj ||W_gj|| makes
whole columns exactly zero (oi-VAE, Ainsworth et al. 2018, eqs. 4-7, used by SparseJEPA, Hartman
and Varshney 2025, section 3). Nothing before W mixes latents and nothing after it mixes groups, so
a zero means that this latent does not reach that group's prediction.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sparsejepa.distributed import alone, gather
from sparsejepa.errors import UserError
from sparsejepa.model.losses import full
from sparsejepa.model.vit import attend, sincos_position_embedding

Kind = Literal["region", "concept", "feature"]
Phase = Literal["penalised", "freeze", "frozen"]

# Block norms start at 1/sqrt(G) give or take 14 %: equal ones are a fixed point of prox_sphere.
_SPREAD = 0.14
# Without the sphere a block loses what the prox takes outright; oi-VAE starts W large as well.
_PLAIN_SCALE = 4.0
# Small outputs at the start (as in the ViT), so that the untrained head does not push the encoder.
_OUT_STD = 0.02
_TINY = 1e-30

LAM_UNIT = 0.004
"""The lam at which the prox is as strong as the root mean square pull of the data on W's blocks."""
W_WINDOW = 0.2
"""Share of a run over which W's gradient is averaged."""
TRAVEL = 4.0
"""How far a block moves over a run under that pull; its norm starts near 1/sqrt(G)."""


def strength(lam: float | Tensor) -> Any:
    """Return how strong the prox is at `lam`, against the pull of the data: (lam / LAM_UNIT)^(1/4).

    The power spreads lam from 0.001 to 0.1 over all densities (measured, see docs/method.md).
    """
    return (lam / LAM_UNIT) ** 0.25


def mean_momentum(step: int, total: int) -> float:
    """Return the momentum with which a gradient's mean is over the last `W_WINDOW` of a run.

    Over five steps at least; in the first steps it is the plain mean of all so far.
    """
    return 1 - max(1 / (step + 1), 1 / max(5.0, W_WINDOW * total))


def ramp(share: float) -> float:
    """Return how much of the penalty is there after a share of the penalised steps, 0 to 1.

    Nothing in the first tenth, all from six tenths on, so that W follows the data first.
    """
    return min(1.0, max(0.0, (share - 0.1) / 0.5))


def prox_group_lasso(W: Tensor, t: float | Tensor) -> Tensor:
    """Shrink every block by `t`: W_gj * max(0, 1 - t / ||W_gj||).

    The exact minimiser over X of 1/2 ||X - W||^2 + t sum_gj ||X_gj|| (oi-VAE eq. 7).

    W and the result are [G, P, D], block (g, j) is W[g, :, j]; t >= 0 is a number or a 0-d tensor.
    """
    norms = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return W * (1 - t / norms.clamp_min(_TINY)).clamp_min(0)


def prox_sphere(W: Tensor, t: float | Tensor) -> Tensor:
    """Return the exact proximal point of the group lasso on unit spheres, one per latent.

    For every j the minimiser over sum_g ||X_gj||^2 = 1 of 1/2 ||X_j - W_j||^2 + t sum_g ||X_gj||.
    With v_g = ||W_gj|| the block norms of the solution are r = (v - t)_+ / ||(v - t)_+||; if no v_g
    exceeds t, all weight goes to the largest block. Directions are kept. Where W_j is zero
    altogether every one-hot point is a minimiser; group 0 and its first axis are taken.

    Args and returns as `prox_group_lasso`.
    """
    v = torch.linalg.vector_norm(W, dim=1)  # [G, D]
    excess = (v - t).clamp_min(0)
    largest = excess.amax(0)
    one_hot = F.one_hot(v.argmax(0), len(v)).T.to(v.dtype)
    # Dividing by the largest first keeps the squares from underflowing just above the threshold.
    r = torch.where(largest > 0, excess / largest.clamp_min(_TINY), one_hot)
    r = r / torch.linalg.vector_norm(r, dim=0)
    first_axis = torch.zeros_like(W)
    first_axis[:, 0] = 1
    direction = torch.where((v == 0)[:, None], first_axis, W / v.clamp_min(_TINY)[:, None])
    return direction * r[:, None]


def partition_cells(grid_size: tuple[int, int], num_groups: int) -> Tensor:
    """Share a grid of patches out to `num_groups` rectangles of nearly equal size.

    The rows are cut into bands of nearly equal height and each band into cells of nearly equal
    width, taller bands into more, so any 1 <= G <= N works. The number of bands makes the cells
    most equal in size, then most square: 16 cells of 2x2 on 8x8.

    Returns the cell of each patch, int64 [N]. Raises UserError for more groups than patches.
    """
    rows, cols = grid_size
    if not 1 <= num_groups <= rows * cols:
        raise UserError(
            f"--num-groups {num_groups}: a grid of {rows}x{cols} patches has room for 1 to "
            f"{rows * cols} regions"
        )

    def shares(total: int, parts: int) -> list[int]:
        return [total // parts + (i < total % parts) for i in range(parts)]

    def layout(bands: int) -> list[tuple[int, int]]:
        """Return (height, width) of every cell, band by band."""
        pairs = zip(shares(rows, bands), shares(num_groups, bands), strict=True)
        return [(height, width) for height, k in pairs for width in shares(cols, k)]

    def cost(bands: int) -> tuple[int, float]:
        cells = layout(bands)
        sizes = [h * w for h, w in cells]
        return max(sizes) - min(sizes), max(max(h / w, w / h) for h, w in cells)

    fewest = -(-num_groups // cols)  # no band can hold more cells than there are columns
    bands = min(range(fewest, min(rows, num_groups) + 1), key=cost)
    cells, row, col = torch.empty(rows, cols, dtype=torch.int64), 0, 0
    for number, (height, width) in enumerate(layout(bands)):
        cells[row : row + height, col : col + width] = number
        row, col = (row + height, 0) if col + width == cols else (row, col + width)
    return cells.flatten()


def _weight(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * std)


class RegionNetworks(nn.Module):
    """One network per cell: from u_g [P] to a prediction for each of the cell's patches.

    hidden = GELU(A_g u_g + b_g + position_n), prediction = B_g hidden + c_g.
    """

    def __init__(self, cells: Tensor, out_dim: int, group_dim: int, hidden: int, gain: float):
        super().__init__()
        groups, patches = int(cells.max()) + 1, len(cells)
        self.A = _weight(groups, hidden, group_dim, std=gain / math.sqrt(group_dim))
        self.b = nn.Parameter(torch.zeros(groups, hidden))
        self.position = _weight(patches, hidden, std=0.1)
        self.B = _weight(groups, out_dim, hidden, std=_OUT_STD)
        self.c = nn.Parameter(torch.zeros(groups, 1, out_dim))
        # Patches by cell, padded to the largest cell, so that all groups are one batched product;
        # `slot` finds each patch in that table.
        own = [torch.nonzero(cells == g).flatten() for g in range(groups)]
        table, slot = pad_sequence(own, batch_first=True), torch.empty_like(cells)
        for g, patches_of in enumerate(own):
            slot[patches_of] = g * table.shape[1] + torch.arange(len(patches_of))
        self.members: Tensor  # [G, n]
        self.slot: Tensor  # [N]
        self.register_buffer("members", table, persistent=False)
        self.register_buffer("slot", slot, persistent=False)

    def forward(self, u: Tensor, query_index: Tensor) -> Tensor:
        """Map u [B, G, P] and patches [B, T] to predictions [B, T, D']."""
        hidden = torch.einsum("ghp,bgp->gbh", self.A, u) + self.b[:, None]
        # [G, B, n, h]: only the position differs between the patches of a cell.
        hidden = F.gelu(hidden[:, :, None] + self.position[self.members][:, None])
        out = torch.einsum("gdh,gbnh->bgnd", self.B, hidden) + self.c
        index = self.slot[query_index][..., None].expand(-1, -1, out.shape[-1])
        return out.flatten(1, 2).gather(1, index)

    def weights(self) -> list[Tensor]:
        """Return the matrices that weight decay and a ridge apply to."""
        return [self.A, self.B]


class AttentionNetworks(nn.Module):
    """One predictor per group: cross attention from the queries to the context's u_g, then an MLP.

    Keys and values are linear in u_g and the patch's position, queries are a mask token plus the
    position and do not see each other. A layer norm would undo the scale that the ridge pins.
    """

    def __init__(
        self, grid: tuple[int, int], groups: int, dim: int, out_dim: int, hidden: int, gain: float
    ) -> None:
        super().__init__()
        self.heads = hidden // 32 if hidden % 32 == 0 else 1
        positions = sincos_position_embedding(grid, 4 * -(-hidden // 4))
        self.positions: Tensor  # [N, E], fixed
        self.register_buffer("positions", positions, persistent=False)
        width = positions.shape[1]
        self.A = _weight(groups, 2 * hidden, dim, std=gain / math.sqrt(dim))  # key and value
        self.E = _weight(groups, 4 * hidden, width, std=1 / math.sqrt(width))
        self.mask_token = _weight(groups, hidden, std=0.1)
        self.M = _weight(groups, hidden, hidden, std=1 / math.sqrt(hidden))
        self.b = nn.Parameter(torch.zeros(groups, hidden))
        self.B = _weight(groups, out_dim, hidden, std=_OUT_STD)
        self.c = nn.Parameter(torch.zeros(groups, out_dim))

    def forward(self, u: Tensor, context_index: Tensor, query_index: Tensor) -> Tensor:
        """Map u [B, C, G, P] to hidden units [B, T, G, h] for the patches `query_index` [B, T]."""
        # The same for all images, so once per patch: [G, N, h] each.
        positions = torch.einsum("ghe,ne->gnh", self.E, self.positions)
        key_p, value_p, query, hidden_p = positions.to(u.dtype).chunk(4, dim=-1)
        query = query + self.mask_token[:, None].to(u.dtype)
        hidden_p = hidden_p + self.b[:, None].to(u.dtype)
        key, value = torch.einsum("ghp,bcgp->gbch", self.A, u).chunk(2, dim=-1)
        key, value = key + key_p[:, context_index], value + value_p[:, context_index]
        by_head = (
            x.unflatten(-1, (self.heads, -1)).transpose(2, 3)  # [G, B, heads, T or C, .]
            for x in (query[:, query_index], key, value)
        )
        seen = attend(*by_head).transpose(2, 3).flatten(3)
        mixed = torch.einsum("gkh,gbth->gbtk", self.M, seen)
        return F.gelu(mixed + hidden_p[:, query_index]).permute(1, 2, 0, 3)

    def weights(self) -> list[Tensor]:
        """Return the matrices that weight decay and a ridge apply to."""
        return [self.A, self.E, self.M, self.B]


class GroupMap(nn.Module):
    """W and the group networks: predict target tokens from the latents, each group by itself.

    * ``region``: a group is a cell of the grid (`partition_cells`); u_g = W^(g) z with z the mean
      context token; each asked patch is predicted by its own cell's group.
    * ``concept``: groups are learned; u_g = W^(g) z per context token; predictions add up.
    * ``feature``: as ``concept``, but group g predicts dimensions g D'/G to (g + 1) D'/G.

    Args:
        kind: what a group is.
        embed_dim: D.
        grid_size: rows and columns of patches, N in all.
        num_groups, group_dim: G and P.
        sphere: keep sum_g ||W_gj||^2 = 1 for every latent j; otherwise oi-VAE's plain form, which
            needs `ridge` in the loss to pin the scale.
        hidden: width of the group networks.
        out_dim: width D' of what is predicted of a patch; D if not given.

    Raises UserError for more regions than patches, or where G does not divide D' (``feature``).
    """

    def __init__(
        self,
        kind: Kind,
        embed_dim: int,
        grid_size: tuple[int, int],
        num_groups: int = 16,
        group_dim: int = 12,
        *,
        sphere: bool = True,
        hidden: int = 64,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        out_dim = out_dim or embed_dim
        if kind == "feature" and out_dim % num_groups:
            raise UserError(
                f"--num-groups {num_groups} does not divide the width {out_dim}, which "
                "--groups feature needs"
            )
        self.kind: Kind = kind
        self.sphere, self.out_dim = sphere, out_dim
        scale = 1.0 if sphere else _PLAIN_SCALE
        blocks = F.normalize(torch.randn(num_groups, group_dim, embed_dim), dim=1)
        spread = (1 + _SPREAD * torch.randn(num_groups, 1, embed_dim)).clamp_min(0.1)
        self.W = nn.Parameter(prox_sphere(blocks * spread, 0.0) * scale)
        self.mean_gradient: Tensor  # [G, P, D], of W over the recent past, see `proximal_step`
        self.register_buffer("mean_gradient", torch.zeros_like(self.W))
        # Running statistics take over in evaluation; no affine part, which could hide a latent.
        self.norm = nn.BatchNorm1d(embed_dim, affine=False)
        # Unit preactivations at the start: the variance of u is scale^2 D / (G P).
        gain = math.sqrt(num_groups * group_dim / embed_dim) / scale
        self.cells: Tensor | None
        if kind == "region":
            self.register_buffer("cells", partition_cells(grid_size, num_groups), persistent=False)
            assert self.cells is not None
            self.networks = RegionNetworks(self.cells, out_dim, group_dim, hidden, gain)
        else:
            self.register_buffer("cells", None)
            own = out_dim // num_groups if kind == "feature" else out_dim
            self.networks = AttentionNetworks(grid_size, num_groups, group_dim, own, hidden, gain)

    def forward(self, z: Tensor, context_index: Tensor, query_index: Tensor) -> Tensor:
        """Predict the patches `query_index` [B, T] from the context tokens z [B, C, D].

        `context_index` [B, C] are the patches of z, both int64. Returns [B, T, D']. Raises
        ValueError in training if the normalisation has a single value per dimension.
        """
        if isinstance(self.networks, RegionNetworks):
            pooled = self._normalize(full(z).mean(1))
            return self.networks(torch.einsum("gpd,bd->bgp", self.W, pooled), query_index)
        z = self._normalize(full(z).flatten(0, 1)).view_as(z)
        u = torch.einsum("gpd,bcd->bcgp", self.W, z)
        hidden = self.networks(u, context_index, query_index)  # [B, T, G, h]
        if self.kind == "concept":  # contracting g as well adds the groups up
            return torch.einsum("gdh,btgh->btd", self.networks.B, hidden) + self.networks.c.sum(0)
        parts = torch.einsum("gdh,btgh->btgd", self.networks.B, hidden) + self.networks.c
        return parts.flatten(2)

    def _normalize(self, x: Tensor) -> Tensor:
        """Return x [n, D] centred and scaled per dimension over the n rows of all processes."""
        norm = self.norm
        if alone() or not self.training:
            return norm(x)
        variance, mean = torch.var_mean(x, 0, correction=0)
        every = gather(torch.stack([mean, variance])[None])  # [k, 2, D]
        count, mean = len(every) * len(x), every[:, 0].mean(0)
        # The law of total variance: no second moments, which would cancel badly in fp32.
        variance = every[:, 1].mean(0) + every[:, 0].var(0, correction=0)
        unbiased = variance * (count / (count - 1))
        with torch.no_grad():
            for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                assert running is not None and norm.momentum is not None
                running.lerp_(now.to(running), norm.momentum)
            norm.num_batches_tracked += 1  # type: ignore[operator]
        return (x - mean) * (variance + norm.eps).rsqrt()

    def block_norms(self) -> Tensor:
        """Return ||W_gj||, [G, D]."""
        return torch.linalg.vector_norm(self.W, dim=1)

    def penalty(self) -> Tensor:
        """Return the group lasso sum_gj ||W_gj||; on the sphere between D and D sqrt(G)."""
        return self.block_norms().sum()

    def ridge(self) -> Tensor:
        """Return the sum of squares of the group networks' matrices (oi-VAE's N(0, 1) prior)."""
        return torch.stack([w.square().sum() for w in self.networks.weights()]).sum()

    @torch.no_grad()
    def pull(self, keep: Tensor | None = None) -> Tensor:
        """Return where the data want W to go, [G, P, D]: minus the running mean of the gradient.

        Its unit makes the root mean square of the block norms 1, over the blocks of `keep`, bool
        [G, D], if given: the others are 0.
        """
        norms = torch.linalg.vector_norm(self.mean_gradient, dim=1)
        kept = torch.ones_like(norms) if keep is None else keep.to(norms.dtype)
        unit = ((norms * kept).square().sum() / kept.sum().clamp_min(1)).sqrt()
        return -self.mean_gradient * (kept / unit.clamp_min(_TINY))[:, None]

    @torch.no_grad()
    def proximal_step(
        self, rate: float, lam: float | Tensor, *, momentum: float = 0.0, keep: Tensor | None = None
    ) -> None:
        """Take one step of proximal gradient descent on W, and clear W.grad (which may be None).

        m <- momentum m + (1 - momentum) W.grad
        W <- prox(W + rate pull, rate strength(lam)),  pull = -m / rms_gj ||m_gj||

        Only the direction of the gradient counts, whatever weight, loss and batch size stand before
        it, and lam is stated in pulls, see `strength` and docs/method.md. A zero block comes back
        when its pull exceeds the penalty; the mean keeps the noise of batches from doing that.

        `rate` is how far a block goes under the root mean square pull, `lam` the penalty (a 0-d
        tensor is not read on the host). `keep`, bool [G, D], stands for a penalty: the other blocks
        become or stay zero and do not count in the unit of the pull.
        """
        if self.W.grad is not None:
            self.mean_gradient.lerp_(self.W.grad, 1 - momentum)
            self.W.grad = None
        W = self.W + rate * self.pull(keep)
        t = rate * strength(lam)
        if keep is not None:
            W, t = W * keep[:, None], 0.0
        self.W.copy_(prox_sphere(W, t) if self.sphere else prox_group_lasso(W, t))

    @torch.no_grad()
    def steered_step(
        self,
        rate: float,
        lam: float,
        momentum: float,
        phase: Phase,
        controller: DensityController | None = None,
        density: float = 1.0,
    ) -> None:
        """Take the `proximal_step` of a phase of a run.

        penalised: under `lam`, or the one with which `controller` steers to `density`; freeze: the
        controller's last step, to `density` exactly; frozen: zeros stay and nothing shrinks.
        """
        keep: Tensor | None = None
        penalty: float | Tensor = lam
        if phase == "frozen":
            keep = self.block_norms() > 0
        elif controller is not None and phase == "freeze":
            # Zero blocks count as they are after a step: those first that the data want most.
            keep = largest(torch.linalg.vector_norm(self.W + rate * self.pull(), dim=1), density)
        elif controller is not None:
            controller.step((self.block_norms() > 0).float().mean(), density)
            penalty = controller.lam
        self.proximal_step(rate, penalty, momentum=momentum, keep=keep)

    def group_activations(self, z: Tensor) -> Tensor:
        """Return ||W^(g) z||, [B, C, G], for tokens z [B, C, D] under the running normalisation."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        z = F.batch_norm(full(z).flatten(0, 1), mean, variance, eps=self.norm.eps).view_as(z)
        return group_norms(self.W, z)


def group_norms(W: Tensor, z: Tensor) -> Tensor:
    """Return ||W^(g) z||, [..., G], for W [G, P, D] and latents z [..., D] as W expects them."""
    u = (z @ W.flatten(0, 1).T).unflatten(-1, W.shape[:2])
    return torch.linalg.vector_norm(u, dim=-1)


def largest(norms: Tensor, density: float) -> Tensor:
    """Return the share `density` of blocks with the largest norms [G, D], bool [G, D].

    Every latent keeps its largest.
    """
    ranked = norms.scatter(0, norms.argmax(0, keepdim=True), math.inf).flatten()
    count = max(norms.shape[1], round(density * norms.numel()))
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    return kept.scatter(0, ranked.topk(count).indices, True).view_as(norms)


def random_pattern(groups: int, latents: int, density: float, like: Tensor | None = None) -> Tensor:
    """Return a random pattern, bool [G, D], of the share `density` of the blocks to keep.

    All latents have as many groups and all groups as many latents, give or take one; with `like`,
    bool [G, D], as many as there. Drawn from torch's default generator.
    """
    if like is None:
        each, more = divmod(max(latents, round(density * groups * latents)), latents)
        counts = each + (torch.randperm(latents) < more)
        dealt = torch.repeat_interleave(torch.arange(latents), counts)
        like = torch.zeros(groups, latents, dtype=torch.bool)
        like[torch.arange(len(dealt)) % groups, dealt] = True
    pattern = like.clone()
    for _ in range(10 * latents if latents > 1 else 0):
        # Two latents pool the groups that only one has and deal them out again, each as many as
        # before (the curveball algorithm, Strona et al. 2014).
        a, b = torch.randperm(latents)[:2].tolist()
        differ = (pattern[:, a] != pattern[:, b]).nonzero().flatten()
        mine = differ[torch.randperm(len(differ))[: int(pattern[differ, a].sum())]]
        pattern[differ, a], pattern[differ, b] = False, True
        pattern[mine, a], pattern[mine, b] = True, False
    return pattern


class DensityController(nn.Module):
    """Steers lam so that the density (the share of non-zero blocks) follows a wanted path.

    Proportional-integral control of log lam with a limit on its speed: density answers late, as a
    block takes a tenth of a run or so to shrink to zero. All state is in buffers: a checkpoint
    restores it and no step reads a value on the host. Gains and limit are per run of `total_steps`;
    it starts at `lam`, low enough to remove nothing by itself.
    """

    proportional = 24.0  # log lam per unit of density
    integral_gain = 180.0  # the same, per run
    fastest = 180.0  # the limit on the change of log lam, per run
    low, high = math.log(1e-8), math.log(1e4)

    def __init__(self, total_steps: int, lam: float = 5e-4) -> None:
        super().__init__()
        self.total_steps = total_steps
        self.lam: Tensor  # 0-d
        self.integral: Tensor  # 0-d
        self.register_buffer("lam", torch.tensor(lam))
        self.register_buffer("integral", torch.tensor(math.log(lam)))

    @torch.no_grad()
    def step(self, density: float | Tensor, wanted: float | Tensor) -> None:
        """Update `lam` from the density now and the one wanted now."""
        error, now, limit = density - wanted, self.lam.log(), self.fastest / self.total_steps
        integral = self.integral + error * (self.integral_gain / self.total_steps)
        self.integral.copy_(integral.clamp(self.low, self.high))
        change = self.integral + self.proportional * error - now
        self.lam.copy_((now + change.clamp(-limit, limit)).clamp(self.low, self.high).exp())
