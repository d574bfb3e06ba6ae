"""A new kind of group: rings around the image's centre instead of cells of a grid.

    python examples/own_groups.py [--steps 200]

A kind of group is a `GroupMap` whose networks say what group g predicts. Here group g predicts the
hidden patches of ring g; W, its penalty and the exact proximal step stay as they are.
"""

import argparse

import torch

import sparsejepa as sj
from sparsejepa.data.images import DeviceImages
from sparsejepa.model.groups import GroupMap, RegionNetworks
from sparsejepa.training.build import build_augment
from sparsejepa.training.step import TERMS, TrainStep

SIDE, HIDDEN = 32, 64


def ring_of_each_patch(grid_size, num_rings):
    """Return int64 [N]: 0 for the middle of the grid, num_rings - 1 for its border."""
    rows, cols = (torch.arange(n) - (n - 1) / 2 for n in grid_size)
    away = torch.maximum(rows.abs()[:, None] / rows.max(), cols.abs()[None] / cols.max())
    return (away.flatten() * num_rings).long().clamp_max(num_rings - 1)


class RingMap(GroupMap):
    """u_g = W^(g) z for the mean context token z; group g alone predicts the patches of ring g."""

    def __init__(self, embed_dim, grid_size, num_groups=4, group_dim=24):
        super().__init__("region", embed_dim, grid_size, num_groups, group_dim, hidden=HIDDEN)
        self.cells = ring_of_each_patch(grid_size, num_groups)
        gain = (num_groups * group_dim / embed_dim) ** 0.5  # unit preactivations at the start
        self.networks = RegionNetworks(self.cells, embed_dim, group_dim, HIDDEN, gain)


def train(steps):
    """Train on the built-in scenes and return the map."""
    config = sj.preset("nano").replace(data="scenes", limit=1000, batch_size=64, device="cpu")
    config = config.replace(patch_size=4, num_groups=4, lam=0.03, steps=steps)
    images = sj.load_dataset("scenes").subset(config.images.limit)
    model = sj.build_model(config, (SIDE, SIDE), total=steps)
    torch.manual_seed(0)
    model.groups = rings = RingMap(model.context_encoder.embed_dim, (SIDE // 4, SIDE // 4))
    step = TrainStep(config, model, build_augment(config, images), total=steps)
    source = DeviceImages(images, "cpu")
    for i in range(steps):
        rows = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(i))
        losses = dict(zip(TERMS, step(source.take(rows), i).tolist(), strict=True))
        if i % 50 == 0 or i == steps - 1:
            print(f"step {i:4}  loss {losses['total']:.3f}  group {losses['group']:.3f}")
    return rings


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    norms = train(parser.parse_args().steps).block_norms().detach()  # [G, D]
    for ring, row in enumerate(norms):
        print(f"ring {ring}: fed by {int((row > 0).sum())} of {len(row)} latents")
