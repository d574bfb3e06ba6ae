"""Images in, features out: a frozen encoder as a step of a scikit-learn pipeline.

Letters: n images, B of a batch, H x W pixels, N patches, D latents, G groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from torch import Tensor

from sparsejepa.errors import UserError, nearest
from sparsejepa.evaluation.activations import find_groups
from sparsejepa.evaluation.features import batch_rows, pooled
from sparsejepa.interop import Encoder, load
from sparsejepa.interop.images import at_size
from sparsejepa.interop.module import GroupActivations, SparseJEPAEncoder

Output = Literal["pooled", "concat4", "groups", "tokens"]
OUTPUTS = ("pooled", "concat4", "groups", "tokens")


class SparseJEPAFeatures(TransformerMixin, BaseEstimator):
    """Features of images by a frozen encoder; there is nothing to fit.

    Images are uint8 [n, H, W, 3], an array or a tensor, or a list (or column of a table) of files,
    of PIL images or of arrays [H, W, 3]. Files and PIL images are brought to the encoder's size as
    data sets are (shorter side resized, centre cropped); of an array the whole image is resized.

    Clones share the encoder. A pickle holds what `encoder` is: its name, which is loaded again when
    it is needed, or else the weights, once.

    Args:
        encoder: what `load` takes, such as a run directory or timm:NAME, an `Encoder`, or a
            `SparseJEPAEncoder`.
        output: pooled, the mean token [n, D]; concat4, the mean tokens of the last four layers
            [n, 4 D]; groups, activations [n, G]; tokens, [n, N, D].
        groups: whose activations: auto, the encoder's own (of an `Encoder`, those in the folder
            that it was loaded from); a folder with groups; or `GroupActivations`.
        batch_size: images at once, at most; fewer for encoders with many patches.
        device: of an encoder that is named; one that is given stays where it is.
    """

    def __init__(
        self,
        encoder: Encoder | SparseJEPAEncoder | str | Path,
        output: Output = "pooled",
        *,
        groups: GroupActivations | str | Path = "auto",
        batch_size: int = 512,
        device: str = "cpu",
    ) -> None:
        self.encoder, self.groups = encoder, groups
        self.output: Output = output
        self.batch_size, self.device = batch_size, device

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Load the encoder and look at nothing. Raises UserError for arguments that do not fit."""
        self._open()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return the features of images X, float32.

        Raises UserError for images that cannot be read, or if the encoder gives NaN or infinity.
        """
        encoder, activations = self._open()
        found = []
        for batch in _batches(X, encoder.img_size, batch_rows(encoder, self.batch_size)):
            x, tokens = pooled(encoder, batch, "concat4" if self.output == "concat4" else "mean")
            if self.output == "tokens":
                x = tokens
            elif activations is not None:
                x = activations(tokens)[0]
            found.append(x.cpu())
        x = torch.cat(found)
        if not x.isfinite().all():
            raise UserError(f"{encoder.name}: gives NaN or infinity on these images")
        return x.numpy()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the columns: pooled0, pooled1, ... or group0, ...

        Raises UserError for tokens, which are no table.
        """
        encoder, activations = self._open()
        if self.output == "tokens":
            raise UserError("tokens [n, N, D] are no table, so they have no columns to name")
        width = encoder.embed_dim * (4 if self.output == "concat4" else 1)
        if activations is not None:
            width = len(activations.W)
        name = "group" if self.output == "groups" else self.output
        return np.array([f"{name}{j}" for j in range(width)], object)

    def _open(self) -> tuple[Encoder, GroupActivations | None]:
        """Return the encoder and, if they are asked for, its groups; loaded at the first call."""
        if self.output not in OUTPUTS:
            known = ", ".join(OUTPUTS)
            raise UserError(
                f"output '{self.output}': one of {known}{nearest(self.output, OUTPUTS)}"
            )
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size}: must be at least 1")
        key = (self.encoder, self.device, self.groups, self.output == "groups")
        if getattr(self, "_opened", (None,))[0] != key:
            encoder, own, activations = self.encoder, None, None
            if isinstance(encoder, SparseJEPAEncoder):
                encoder, own = encoder.encoder, encoder.groups
            elif not isinstance(encoder, Encoder):
                encoder = load(encoder, self.device)
            if self.output == "groups":
                activations = self._find_groups(encoder, own)
            self._opened = key, encoder, activations
        return self._opened[1:]

    def _find_groups(self, encoder: Encoder, own: GroupActivations | None) -> GroupActivations:
        if isinstance(self.groups, GroupActivations):
            return self.groups.to(encoder.device)
        if own is not None and self.groups == "auto":
            return own
        found = find_groups(encoder.name, str(self.groups), encoder)
        if found is None:
            raise UserError(
                f"{encoder.name}: has no groups of its own; name a folder with groups that were "
                "fitted to it (sparsejepa explain writes one), or take another output"
            )
        return found

    def __sklearn_clone__(self) -> Self:
        twin = type(self).__new__(type(self))
        # The encoder itself, not a copy; dictionaries hold what set_output was told.
        own = {k: dict(v) if isinstance(v, dict) else v for k, v in self.__dict__.items()}
        twin.__dict__.update(own)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_opened"}

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.two_d_array = False
        tags.transformer_tags.preserves_dtype = []  # features are float32 always
        return tags


def _batches(images: Any, size: tuple[int, int], rows: int) -> Iterator[Tensor]:
    """Yield uint8 images [B, H, W, 3]. Raises UserError for what are no images, or none."""
    if isinstance(images, str | Path) or not hasattr(images, "__len__") or not len(images):
        raise UserError("images: give uint8 [n, H, W, 3], or a list of files or of PIL images")
    if getattr(images, "ndim", 1) == 2 and images.shape[1] == 1:  # a table's column
        images = np.asarray(images)[:, 0]
    if getattr(images, "ndim", 1) > 1:
        yield from _pixels(images, "n, ").split(rows)
        return
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(images), rows):
            part = images[start : start + rows]
            found = pool.map(lambda image: _read(image, size), part)
            for _, alike in itertools.groupby(found, lambda image: image.shape):
                yield torch.stack(list(alike))


def _pixels(images: Any, n: str = "") -> Tensor:
    """Return an array or tensor as one; UserError unless it is uint8 [n, H, W, 3], or [H, W, 3]."""
    array = images if isinstance(images, Tensor) else np.asarray(images)
    kind, shape = str(array.dtype).removeprefix("torch."), tuple(array.shape)
    if kind != "uint8" or len(shape) != (4 if n else 3) or shape[-1] != 3:
        raise UserError(f"images of {kind} {list(shape)}: give uint8 [{n}H, W, 3]")
    return torch.as_tensor(array)


def _read(image: Any, size: tuple[int, int]) -> Tensor:
    """Return a file or PIL image as uint8 [H, W, 3] of a size, an array as it is."""
    if isinstance(image, np.ndarray | Tensor):
        return _pixels(image)
    return at_size(image, size)[0]
