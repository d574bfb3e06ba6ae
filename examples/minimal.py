"""SparseJEPA in one script: masked embedding prediction, a group-sparse map, a linear probe.

    python examples/minimal.py [--steps 400] [--lam 0.01] [--images 4000]

Only the images come from the package. Shapes: B images, N patches, D width, M target blocks of K
patches, C context patches, G groups of width P.
"""

import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

import sparsejepa as sj

PATCH, SIDE, D, DEPTH, HEADS = 4, 8, 96, 4, 3  # 32x32 pixels are 8x8 patches
M, HEIGHT, WIDTH, C = 4, 3, 4, 16  # four targets of 3x4 patches; 16 of the others are context
G, P = 16, 6  # one group per cell of 2x2 patches
ALL = torch.arange(SIDE * SIDE)
ROW, COL = ALL // SIDE, ALL % SIDE
CELL = ROW // 2 * 4 + COL // 2  # [N], the group of each patch


class Transformer(nn.Module):  # tokens [B, C, dim_in] of the patches `index` -> [B, C, dim]
    def __init__(self, dim_in, dim, depth):
        super().__init__()
        how = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(dim, HEADS, 4 * dim, **how)
        self.inp = nn.Linear(dim_in, dim)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)
        w = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
        angles = torch.cat([ROW[:, None] * w, COL[:, None] * w], 1)
        self.pos = nn.Parameter(torch.cat([angles.sin(), angles.cos()], 1), requires_grad=False)

    def forward(self, x, index):
        return self.norm(self.blocks(self.inp(x) + self.pos[index]))


def take(x, index):  # x [B, N, D], index [B, C] -> [B, C, D]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def sample_masks(batch):  # context [B, C], random patches outside the M targets [B, M, K]
    while True:  # nearly always the first draw leaves C patches in every image
        top = torch.randint(SIDE - HEIGHT + 1, (batch, M, 1, 1)) + torch.arange(HEIGHT)[:, None]
        left = torch.randint(SIDE - WIDTH + 1, (batch, M, 1, 1)) + torch.arange(WIDTH)
        target = (top * SIDE + left).flatten(2)
        keys = torch.rand(batch, SIDE * SIDE).scatter(1, target.flatten(1), 2.0)
        if (keys < 2).sum(1).min() >= C:
            return keys.topk(C, largest=False).indices.sort().values, target


class GroupMap(nn.Module):
    """u_g = W^(g) z for the mean context token z; group g alone predicts its cell's patches."""

    def __init__(self):
        super().__init__()
        w = torch.randn(G, P, D)
        self.W = nn.Parameter(w / w.norm(dim=(0, 1)))  # each latent's weights have norm 1
        self.mean = nn.Buffer(torch.zeros(G, P, D))  # of W's gradient
        self.norm = nn.BatchNorm1d(D, affine=False)
        self.place = nn.Parameter(0.1 * torch.randn(SIDE * SIDE, 64))
        self.up = nn.Parameter(torch.randn(G, P, 64) / P**0.5)
        self.down = nn.Parameter(torch.randn(G, 64, D) / 8)

    def forward(self, context):
        u = torch.einsum("gpd,bd->bgp", self.W, self.norm(context.mean(1)))
        h = torch.einsum("bgp,gph->bgh", u, self.up)[:, CELL] + self.place  # [B, N, 64]
        return torch.einsum("bnh,nhd->bnd", F.gelu(h), self.down[CELL])  # [B, N, D]

    @torch.no_grad()
    def proximal_step(self, gradient, rate, lam, window):
        """A step along the mean gradient, then the exact prox of the group lasso on the sphere."""
        self.mean.lerp_(gradient, 1 / window)
        v = self.W - rate * self.mean / self.mean.norm(dim=1).square().mean().sqrt()
        norms = v.norm(dim=1)  # [G, D]
        r = (norms - rate * (lam / 0.006) ** 0.5).clamp_min(0)  # 0.006: the average pull
        lone = F.one_hot(norms.argmax(0), G).T.float()  # none above the threshold: keep the largest
        r = torch.where(r.sum(0) > 0, r / r.norm(dim=0).clamp_min(1e-12), lone)
        self.W.copy_(v * (r / norms.clamp_min(1e-12))[:, None])
        self.W.grad = None


def aggregate_kl(z):  # KL(N(mean, covariance of the batch z [B, D]) || N(0, I)) / D
    mu = z.mean(0)
    cov = (z - mu).T @ (z - mu) / len(z) + 1e-3 * torch.eye(D)
    return 0.5 * (cov.trace() + mu.square().sum() - D - cov.logdet()) / D


def load(split, limit):  # images uint8 [n, 32, 32, 3] of 3 to 10 objects, their number [n]
    data = sj.load_dataset("scenes", split).subset(limit, seed=0)
    return torch.from_numpy(np.array(data.images)), data.targets["count"].values


def patchify(images):  # uint8 [B, 32, 32, 3] -> float [B, N, PATCH * PATCH * 3]
    x = (images.float() / 255 - 0.5) / 0.25
    return x.view(-1, SIDE, PATCH, SIDE, PATCH, 3).transpose(2, 3).reshape(len(x), SIDE**2, -1)


@torch.no_grad()
def probe(encoder, train, test):  # logistic regression on the frozen, averaged tokens
    x = [encoder(patchify(images), ALL).mean(1) for images, _ in (train, test)]
    x = [((part - x[0].mean(0)) / x[0].std(0)).numpy() for part in x]
    return LogisticRegression(C=0.1, max_iter=500).fit(x[0], train[1]).score(x[1], test[1])


parser = argparse.ArgumentParser()
for flag, default in (("--steps", 400), ("--lam", 0.01), ("--images", 4000)):
    parser.add_argument(flag, type=type(default), default=default)
args = parser.parse_args()
torch.manual_seed(0)
train, test = load("train", args.images), load("test", args.images // 4)
encoder, predictor = Transformer(PATCH * PATCH * 3, D, DEPTH), Transformer(D, D, 2)
target, floor = copy.deepcopy(encoder), copy.deepcopy(encoder)
head, groups, mask_token = nn.Linear(D, D), GroupMap(), nn.Parameter(torch.zeros(D))
parts = nn.ModuleList([encoder, predictor, head, groups])
network = [mask_token, *(p for p in parts.parameters() if p is not groups.W)]
optimizer = torch.optim.AdamW(network, 1e-3, weight_decay=0.05)

for step in range(args.steps):
    x = patchify(train[0][torch.randint(len(train[0]), (128,))])
    context_index, target_index = sample_masks(len(x))
    with torch.no_grad():
        wanted = F.layer_norm(target(x, ALL), (D,))  # [B, N, D]
    context = encoder(take(x, context_index), context_index)  # [B, C, D]
    index = target_index.flatten(0, 1)  # [B * M, K]: each block is predicted on its own
    tokens = torch.cat([context.repeat_interleave(M, 0), mask_token.expand(*index.shape, D)], 1)
    places = torch.cat([context_index.repeat_interleave(M, 0), index], 1)
    predicted = head(predictor(tokens, places)[:, C:])  # [B * M, K, D]
    prediction = F.smooth_l1_loss(predicted, take(wanted.repeat_interleave(M, 0), index))
    hidden = torch.ones(len(x), SIDE * SIDE).scatter(1, context_index, 0).bool()
    group = F.smooth_l1_loss(groups(context)[hidden], wanted[hidden])
    loss = prediction + 0.1 * group + 0.05 * aggregate_kl(context.mean(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    lam = args.lam * min(1, max(0, step / args.steps - 0.1) / 0.5)  # it comes in slowly
    groups.proximal_step(groups.W.grad, 4 / args.steps, lam, max(1, min(step + 1, args.steps / 5)))
    for slow, fast in zip(target.parameters(), encoder.parameters(), strict=True):
        slow.data.lerp_(fast.data, 0.02)
    if step % 50 == 0 or step == args.steps - 1:
        per_latent = (groups.W.norm(dim=1) > 0).sum(0).float().mean()
        print(f"step {step:4}  loss {loss:.3f}  groups per latent {per_latent:.1f} of {G}")
trained, untrained = (probe(e.eval(), train, test) for e in (target, floor))
print(f"objects counted, 8 classes: {trained:.3f}, untrained {untrained:.3f}")
