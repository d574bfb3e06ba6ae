from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsejepa.data.store import ImageSet, Target
from sparsejepa.errors import UserError
from sparsejepa.evaluation import features
from sparsejepa.evaluation.features import embed, pixel_features, target
from sparsejepa.interop import Encoder
from sparsejepa.model.encoder import ViT

MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)


def image_set(count: int = 20, height: int = 16, width: int = 16, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    labels = Target(np.arange(count) % 3, ("a", "b", "c"))
    return ImageSet("made", "train", images, {"letter": labels}, MEAN, STD)


def make_encoder(seed: int = 0, depth: int = 5) -> Encoder:
    torch.manual_seed(seed)
    vit = ViT(16, 4, embed_dim=24, depth=depth, num_heads=3)
    return Encoder(vit, name="small", mean=MEAN, std=STD)


def test_mean_and_concat4_are_averages_of_the_last_layers() -> None:
    encoder, images = make_encoder(), image_set()
    batch = torch.from_numpy(images.images)
    mean = embed(encoder, images, batch_size=7)
    np.testing.assert_allclose(mean.x, encoder.tokens(batch).mean(1), atol=1e-5)
    assert mean.x.dtype == np.float32 and mean.name == "made"
    np.testing.assert_array_equal(mean.y, images.targets["letter"].values)

    four = embed(encoder, images, pool="concat4")
    assert four.x.shape == (20, 96)
    wanted = np.concatenate([x.mean(1).numpy() for x in encoder.layers(batch, 4)], axis=1)
    np.testing.assert_allclose(four.x, wanted, atol=1e-5)
    np.testing.assert_allclose(four.x[:, -24:], mean.x, atol=1e-5)


def test_many_patches_make_smaller_batches(monkeypatch) -> None:
    encoder, images = make_encoder(), image_set()
    whole = embed(encoder, images)
    sizes = []
    tokens = encoder.tokens

    def counted(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return tokens(batch)

    monkeypatch.setitem(features.MAX_TOKENS, "cpu", 16 * 6)
    encoder.tokens = counted  # type: ignore[method-assign]
    np.testing.assert_allclose(embed(encoder, images).x, whole.x, atol=1e-5)
    assert sizes == [6, 6, 6, 2]


def test_the_cache_is_used_for_equal_weights_images_and_pooling_only(tmp_path: Path) -> None:
    encoder, images = make_encoder(), replace(image_set(), fingerprint="one")
    first = embed(encoder, images, cache_dir=tmp_path)

    def files() -> int:
        return len(list(tmp_path.iterdir()))

    assert files() == 1

    def forbidden(batch: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the cache should have been used")

    twin = make_encoder()
    twin.tokens = forbidden  # type: ignore[method-assign]
    np.testing.assert_array_equal(embed(twin, images, cache_dir=tmp_path).x, first.x)
    embed(make_encoder(seed=1), images, cache_dir=tmp_path)
    assert files() == 2
    embed(encoder, images, pool="concat4", cache_dir=tmp_path)
    assert files() == 3
    embed(encoder, replace(images, fingerprint="two"), cache_dir=tmp_path)
    assert files() == 4
    embed(encoder, replace(images, split="test"), cache_dir=tmp_path)
    assert files() == 5


def test_a_damaged_cache_is_computed_again(tmp_path: Path) -> None:
    encoder, images = make_encoder(), image_set()
    first = embed(encoder, images, cache_dir=tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    np.testing.assert_array_equal(embed(encoder, images, cache_dir=tmp_path / "new").x, first.x)
    assert file.stat().st_size > 50


def test_small_pixels_are_themselves() -> None:
    images = image_set(height=12, width=32)
    found = pixel_features(images)
    wanted = images.images.reshape(20, -1) / 255
    np.testing.assert_allclose(found.x, wanted, atol=1e-6)
    assert found.x.dtype == np.float32


def test_large_pixels_are_averaged_over_areas() -> None:
    images = image_set(count=3, height=64, width=16)
    found = pixel_features(images)
    wanted = images.images.reshape(3, 32, 2, 16, 3).mean(2).reshape(3, -1) / 255
    np.testing.assert_allclose(found.x, wanted, atol=1e-6)


def test_what_cannot_be_embedded_or_read() -> None:
    images = image_set()
    encoder = make_encoder()
    with torch.no_grad():
        encoder.model.get_parameter("norm.bias")[0] = torch.nan
    with pytest.raises(UserError, match="small: gives NaN"):
        embed(encoder, images)
    with pytest.raises(UserError, match="did you mean 'concat4'"):
        embed(make_encoder(), images, pool="concat")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="3 blocks"):
        embed(make_encoder(depth=3), images, pool="concat4")
    bare = embed(make_encoder(), replace(images, targets={}))
    with pytest.raises(UserError, match=r"class folders or a factors\.csv"):
        bare.y  # noqa: B018
    with pytest.raises(UserError, match="did you mean 'letter'"):
        target(images.targets, "leter", "made")
