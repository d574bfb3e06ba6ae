"""Readouts, columns and predictions against plain computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.images import ImageSet
from sparsejepa.explain.measures import masked_r2
from sparsejepa.explain.options import Options
from sparsejepa.explain.readout import (
    Readout,
    open_subject,
    principal_axes,
    read,
    read_tokens,
    read_train,
    standardise,
)
from sparsejepa.model.losses import normalize_targets
from sparsejepa.training.build import build_sampler


@pytest.fixture(scope="module")
def images(folder: Path) -> ImageSet:
    return load_dataset(str(folder), "train")


def test_readout_is_the_plain_computation(runs: dict[str, Path], images: ImageSet) -> None:
    subject = open_subject(str(runs["concept"]), images, Options(precision="fp32"))
    tokens = subject.encoder.tokens(torch.as_tensor(images.images.copy())).double().numpy()
    scale, z = read_train(subject.encoder, images)
    flat = tokens.reshape(-1, tokens.shape[2])
    np.testing.assert_allclose(scale.token_mean, flat.mean(0), atol=1e-5)
    np.testing.assert_allclose(scale.token_std, flat.std(0), rtol=1e-3)
    pooled = tokens.mean(1)
    np.testing.assert_allclose(z, (pooled - pooled.mean(0)) / pooled.std(0), atol=2e-2)
    standard = (tokens - flat.mean(0)) / flat.std(0)
    kept, some = read_tokens(subject.encoder, images, scale, part=20)
    np.testing.assert_allclose(some, standard[kept], atol=1e-2)
    assert kept.tolist() == [120 * k // 50 for k in range(50)]
    again, (first, half) = read(subject.encoder, images, [subject.W, subject.W[:3] / 2], scale)
    u = np.einsum("gpd,bnd->bngp", subject.W, standard)
    np.testing.assert_allclose(first, np.linalg.norm(u, axis=3), atol=2e-2)
    np.testing.assert_allclose(half, first[..., :3] / 2, atol=2e-2)
    np.testing.assert_allclose(again, z, atol=1e-4)
    found = Readout.under(subject.W, z)
    vectors = np.einsum("gpd,bd->bgp", subject.W, z)
    np.testing.assert_allclose(found.vectors, vectors, atol=1e-4)
    np.testing.assert_allclose(found.activations, np.linalg.norm(vectors, axis=2), atol=1e-4)


def test_constant_latents_stay_zero() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    z = standardise(x, torch.tensor([2.0, 5.0]), torch.tensor([1.0, 0.0]))
    assert z.tolist() == [[-1, 0], [1, 0]]


def test_principal_axes_are_scikit_learns() -> None:
    z = np.random.default_rng(0).standard_normal((500, 6)) * [5, 4, 3, 2, 1, 0.5]
    ours, theirs = principal_axes(z), PCA().fit(z).components_
    np.testing.assert_allclose(np.abs((ours * theirs).sum(1)), 1, atol=1e-4)


def test_masked_r2_is_the_plain_computation(runs: dict[str, Path], images: ImageSet) -> None:
    subject = open_subject(str(runs["region"]), images, Options(precision="fp32"))
    part = images.subset(40)
    found = masked_r2(subject, part, batch_size=16)
    groups, encoder = subject.groups, subject.encoder
    assert groups is not None and subject.config is not None
    model: Any = encoder.model
    sampler = build_sampler(subject.config, encoder.grid_size)
    mean, std = torch.tensor(encoder.mean), torch.tensor(encoder.std)
    pixels = ((torch.as_tensor(part.images.copy()) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        targets = normalize_targets(model(pixels))
    places = targets.mean(0)
    top = bottom = 0.0
    for step, index in enumerate(torch.arange(40).split(16)):
        masks = sampler.sample(len(index), seed=0, step=step)
        for b, i in enumerate(index.tolist()):
            hidden = [n for n in range(16) if n not in masks.context[b]]
            with torch.no_grad():
                z = model(pixels[i : i + 1], masks.context[b : b + 1])
                guess = groups(z, masks.context[b : b + 1], torch.tensor([hidden]))[0]
            for k, n in enumerate(hidden):
                top += float((guess[k] - targets[i, n]).square().sum())
                bottom += float((targets[i, n] - places[n]).square().sum())
    assert found.value == pytest.approx(1 - top / bottom, abs=2e-3)
