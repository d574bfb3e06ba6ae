"""One pass of a frozen encoder over images: everything that the measures and the page read.

Latents are standardised per dimension with the statistics of training images, nothing else lies
between the encoder and W. So a group's activation is ||W^(g) z|| with z in units of each latent's
own spread, also where W comes from another encoder (a floor) or was fitted post hoc.

Letters: n images, N patches, D latents, G groups, P group width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sparsejepa.data.images import DeviceImages, ImageSet
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.errors import UserError
from sparsejepa.evaluation.features import MAX_TOKENS

FLAT = 1e-6
"""Latents with a smaller spread than this share of the largest are constant: they stay 0."""


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation [D] of patch tokens and of pooled vectors, on training images."""

    token_mean: Tensor
    token_std: Tensor
    pooled_mean: Tensor
    pooled_std: Tensor


@dataclass(frozen=True)
class Readout:
    """What one encoder gives for one split; arrays in the order of the images."""

    z: np.ndarray
    """[n, D] float32: pooled latents, standardised."""
    vectors: np.ndarray
    """[n, G, P] float32: u_g = W^(g) z of the pooled latents."""
    activations: np.ndarray
    """[n, N, G] float16: ||W^(g) z|| of every patch; of test images only, [0, N, 0] else."""
    kept: np.ndarray
    """[m]: the images whose tokens are kept, spread evenly over all."""
    tokens: np.ndarray
    """[m, N, D] float32: their standardised tokens."""

    @property
    def pooled_activations(self) -> np.ndarray:
        """||W^(g) z|| of the pooled latents, [n, G]."""
        return np.linalg.norm(self.vectors, axis=2)

    @property
    def mean_activations(self) -> np.ndarray:
        """The mean over patches of ||W^(g) z||, [n, G]."""
        return self.activations.mean(1, dtype=np.float32)

    def under(self, W: np.ndarray) -> Readout:
        """Return the readout with the vectors that W [G, P, D] makes of z."""
        G, P, D = W.shape
        return replace(self, vectors=(self.z @ W.reshape(-1, D).T).reshape(-1, G, P))

    def part(self, groups: slice) -> Readout:
        """Return the readout under some of the groups alone."""
        return replace(
            self, vectors=self.vectors[:, groups], activations=self.activations[:, :, groups]
        )


def standardise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std, 0 where a latent hardly varies."""
    flat = std <= FLAT * std.max()
    return ((x - mean) / std.masked_fill(flat, 1.0)).masked_fill(flat, 0.0)


def read_train(
    encoder: Encoder, images: ImageSet, *, keep_tokens: int = 0
) -> tuple[Scale, Readout]:
    """Read training images, of which the statistics are; `Readout.under` adds groups to it.

    Raises UserError for an encoder that gives NaN, infinity, or the same vector for every image.
    """
    n, N, D = len(images), encoder.grid_size[0] * encoder.grid_size[1], encoder.embed_dim
    total = torch.zeros(2, D, dtype=torch.float64)
    pooled = torch.empty(n, D)
    kept, kept_tokens = evenly(n, keep_tokens), np.empty((min(keep_tokens, n), N, D), np.float32)
    start = 0
    for tokens in token_batches(encoder, images):
        stop = start + len(tokens)
        pooled[start:stop] = tokens.mean(1).cpu()
        for i, power in enumerate((tokens, tokens.square())):
            # In float64 from one image on: sums of many squares less a mean lose digits.
            total[i] += power.sum(1).double().sum(0).cpu()
        here = (kept >= start) & (kept < stop)
        kept_tokens[here] = tokens[torch.from_numpy(kept[here] - start)].cpu().numpy()
        start = stop
    mean = total[0] / (n * N)
    std = (total[1] / (n * N) - mean.square()).clamp_min(0).sqrt()
    if not (pooled.isfinite().all() and std.isfinite().all()):
        raise UserError(f"{encoder.name}: gives NaN or infinity on {images.name}; train it again")
    spread = pooled.std(0, correction=0)
    if float(spread.max()) <= 1e-6 * float(pooled.abs().max()):
        raise UserError(
            f"{encoder.name}: gives the same vector for every image of {images.name}, a dead "
            "encoder; there is nothing to explain, train it again"
        )
    scale = Scale(mean.float(), std.float(), pooled.mean(0), spread)
    z = standardise(pooled, scale.pooled_mean, scale.pooled_std).numpy()
    standard = standardise(torch.from_numpy(kept_tokens), scale.token_mean, scale.token_std)
    none = np.empty((0, N, 0), np.float16)
    return scale, Readout(z, np.empty((n, 0, 0), np.float32), none, kept, standard.numpy())


def read(
    encoder: Encoder, images: ImageSet, W: Tensor, scale: Scale, *, keep_tokens: int = 0
) -> Readout:
    """Read `images` through an encoder and W [G, P, D]; of some the tokens are kept."""
    G, P, D = W.shape
    n, N = len(images), encoder.grid_size[0] * encoder.grid_size[1]
    flat = W.detach().float().to(encoder.device).flatten(0, 1).T
    moments = [x.to(encoder.device) for x in vars(scale).values()]
    z = np.empty((n, D), np.float32)
    activations = np.empty((n, N, G), np.float16)
    kept, kept_tokens = evenly(n, keep_tokens), np.empty((min(keep_tokens, n), N, D), np.float32)
    start = 0
    for tokens in token_batches(encoder, images):
        stop = start + len(tokens)
        z[start:stop] = standardise(tokens.mean(1), *moments[2:]).cpu().numpy()
        tokens = standardise(tokens, *moments[:2])
        here = (kept >= start) & (kept < stop)
        kept_tokens[here] = tokens[torch.from_numpy(kept[here] - start)].cpu().numpy()
        u = (tokens.flatten(0, 1) @ flat).view(-1, N, G, P)
        activations[start:stop] = u.norm(dim=-1).half().cpu().numpy()
        start = stop
    return Readout(z, np.empty((n, 0, 0)), activations, kept, kept_tokens).under(W.cpu().numpy())


def evenly(n: int, count: int) -> np.ndarray:
    """Return at most `count` of n images, spread evenly, as data are often sorted by class."""
    count = min(count, n)
    return np.arange(count) * n // max(count, 1)


def token_batches(encoder: Encoder, images: ImageSet) -> Iterator[Tensor]:
    """Yield the patch tokens [b, N, D] of an image set on the encoder's device."""
    source = DeviceImages(images, encoder.device)
    most = MAX_TOKENS.get(encoder.device.type, MAX_TOKENS["cuda"])
    size = max(1, most // (encoder.grid_size[0] * encoder.grid_size[1]))
    for part in torch.arange(len(images)).split(size):
        yield encoder.tokens(source.take(part))
