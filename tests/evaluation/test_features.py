"""Features of images, in memory and as files, streamed or not."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

import sparsejepa
from sparsejepa import cli
from sparsejepa.data.catalog import load_dataset, stream_dataset
from sparsejepa.data.images import ImageSet, Target
from sparsejepa.encoders.encoder import FITTED, Encoder, save_groups
from sparsejepa.errors import UserError
from sparsejepa.evaluation import features
from sparsejepa.evaluation.features import (
    ENDINGS,
    check_path,
    embed,
    embed_to,
    find_groups,
    pixel_features,
    target,
)
from sparsejepa.model.groups import GroupMap
from sparsejepa.model.vit import ViT

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
    mean = embed(encoder, images)
    np.testing.assert_allclose(mean.x, encoder.tokens(batch).mean(1), atol=1e-5)
    assert mean.x.dtype == np.float32 and mean.name == "made"
    np.testing.assert_array_equal(mean.y, images.targets["letter"].values)

    four = embed(encoder, images, pool="concat4")
    assert four.x.shape == (20, 96)
    wanted = np.concatenate([x.mean(1).numpy() for x in encoder.layers(batch, 4)], axis=1)
    np.testing.assert_allclose(four.x, wanted, atol=1e-5)
    np.testing.assert_allclose(four.x[:, -24:], mean.x, atol=1e-5)


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


# --- features as a file ---------------------------------------------------------------------------


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a written file, by the names that parquet columns have."""
    if path.suffix == ".parquet":
        table = parquet.read_table(path).to_pydict()
        return {name: np.array(column) for name, column in table.items()}
    found = dict(np.load(path))
    return {"features": found["x"], **{k: v for k, v in found.items() if k != "x"}}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "ROWS", 20)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_holds_features_groups_names_and_labels(
    run: Path, encoder: Encoder, tiny_images: Path, tmp_path: Path, ending: str
) -> None:
    images, out = load_dataset(tiny_images, "test"), tmp_path / f"f{ending}"
    activations = find_groups(str(run), "auto", encoder)
    facts = embed_to(out, encoder, images, pool="concat4", groups=activations)
    assert facts == {"images": 48, "features": 96, "groups": 6, "skipped": 0}
    assert [path.name for path in tmp_path.iterdir()] == [out.name]  # and nothing beside it
    found, wanted = read(out), features.embed(encoder, images, pool="concat4")
    np.testing.assert_allclose(found["features"], wanted.x, atol=1e-5)
    assert activations is not None
    tokens = encoder.tokens(torch.from_numpy(np.array(images.images)))
    np.testing.assert_allclose(found["groups"], activations(tokens)[0], atol=1e-5)
    labels = found["class"] if ending == ".parquet" else found["target.class"]
    names = images.targets["class"].names
    values = images.targets["class"].values
    wanted_labels = np.array(names)[values] if ending == ".parquet" else values
    np.testing.assert_array_equal(labels, wanted_labels)
    if ending == ".parquet":
        assert found["file"].tolist() == list(images.files)
    if ending == ".npz":
        assert found["files"].tolist() == list(images.files)


def test_a_stream_gives_the_same_and_leaves_out_what_cannot_be_read(
    encoder: Encoder, tiny_images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    for file in tiny_images.rglob("*.png"):
        copy = folder / file.relative_to(tiny_images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for number in (3, 21):
        (folder / "train" / "red" / f"{number}.png").write_bytes(b"\x89PNG no more")
    found = {}
    for name, images in {
        "cached": load_dataset(folder, "train"), "streamed": stream_dataset(folder, "train")
    }.items():  # fmt: skip
        out = tmp_path / f"{name}.parquet"
        facts = embed_to(out, encoder, images)
        assert (facts["images"], facts["skipped"], facts["groups"]) == (94, 2, 0)
        found[name] = read(out)
    order = [found[name]["file"].argsort() for name in ("cached", "streamed")]
    for column in ("file", "class"):
        first, second = (found[n][column][o] for n, o in zip(found, order, strict=True))
        assert first.tolist() == second.tolist()
    first, second = (found[n]["features"][o] for n, o in zip(found, order, strict=True))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_labels_that_are_called_as_a_column_is_keep_a_column(
    encoder: Encoder, tiny_images: Path, tmp_path: Path
) -> None:
    images, out = load_dataset(tiny_images, "test"), tmp_path / "f.parquet"
    names = ("file", "features", "groups", "target.groups", "class")
    images = replace(images, targets=dict.fromkeys(names, images.primary))
    embed_to(out, encoder, images)
    found = read(out)
    assert list(found) == [
        "file", "target.file", "target.features", "target.groups", "target.target.groups", "class",
        "features",
    ]  # fmt: skip
    assert found["file"].tolist() == list(images.files) and found["features"].shape == (48, 24)
    assert all((found[name] == found["class"]).all() for name in found if "target" in name)


def test_names_that_are_no_text_are_written_out(
    encoder: Encoder, tiny_images: Path, tmp_path: Path
) -> None:
    images = replace(load_dataset(tiny_images, "test").subset(2), files=("a\udcff.png", "ü.png"))
    embed_to(tmp_path / "f.npz", encoder, images)
    assert read(tmp_path / "f.npz")["files"].tolist() == ["a\\udcff.png", "ü.png"]


def test_what_cannot_be_embedded_or_written(
    run: Path, encoder: Encoder, tiny_images: Path, tmp_path: Path
) -> None:
    broken = sparsejepa.load(run)
    with torch.no_grad():
        broken.model.get_parameter("norm.bias")[0] = torch.nan
    with pytest.raises(UserError, match="gives NaN or infinity on"):
        embed_to(tmp_path / "f.npz", broken, load_dataset(tiny_images))
    assert list(tmp_path.iterdir()) == []  # not half of it
    with pytest.raises(UserError, match=r"must end in \.parquet or \.npz"):
        check_path(tmp_path / "f.csv")


def test_groups_are_the_encoders_own_or_those_that_are_named(
    run: Path, encoder: Encoder, tmp_path: Path
) -> None:
    assert find_groups(str(run), "none", encoder) is None
    for ref in ("timm:vit_tiny_patch16_224", str(tmp_path), str(run / "encoder.safetensors")):
        assert find_groups(ref, "auto", encoder) is None
    (tmp_path / FITTED).mkdir()
    save_groups(tmp_path / FITTED, GroupMap("feature", 24, (4, 4), 4, 6))
    for folder in (tmp_path, tmp_path / FITTED):
        found = find_groups("timm:any", str(folder), encoder)
        assert found is not None and found.kind == "feature" and found.W.shape == (4, 6, 24)
    with pytest.raises(UserError, match=r"--groups .*elsewhere: no groups\.safetensors there"):
        find_groups("timm:any", str(tmp_path / "elsewhere"), encoder)
    other = Encoder(ViT(16, 4, embed_dim=12, depth=1, num_heads=3), name="o", mean=MEAN, std=STD)
    with pytest.raises(UserError, match="groups of 24 latents, and o has 12"):
        find_groups("o", str(run), other)


def test_the_command_reads_tar_shards_and_the_hubs_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, encoded = np.random.default_rng(0), list[bytes]()
    for _ in range(30):
        with io.BytesIO() as file:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
            encoded.append(file.getvalue())
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i, image in enumerate(encoded):
            for ending, data in (("png", image), ("cls", str(i % 2).encode())):
                about = tarfile.TarInfo(f"{i:02}.{ending}")
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    hub = tmp_path / "root" / "owner" / "name" / "default"
    hub.mkdir(parents=True)
    images = [{"bytes": image, "path": None} for image in encoded]
    for split in ("train", "test"):
        columns = {"image": images, "label": [i % 2 for i in range(30)]}
        parquet.write_table(pa.table(columns), hub / f"{split}-00000-of-00001.parquet")
    monkeypatch.setenv("SPARSEJEPA_DATA", str(tmp_path / "root"))
    for data, rows in ((str(tmp_path / "train.tar"), 24), ("hub:owner/name", 30)):
        out = tmp_path / "f.parquet"
        words = ["embed", str(run), "--data", data, "--stream", "--out", str(out), "--json"]
        assert cli.main([*words, "--device", "cpu"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["images"], found["features"], found["groups"]) == (rows, 24, 6)
        table = read(out)
        assert table["groups"].shape == (rows, 6) and len(set(table["file"])) == rows
    for wrong, said in (
        ([*words, "--groups", str(tmp_path)], "no groups.safetensors there"),
        (["embed", str(run), "--data", "scenes", "--stream"], "--stream: the images of scenes"),
    ):
        assert cli.main(wrong) == 2 and said in capsys.readouterr().err
