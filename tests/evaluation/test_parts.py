"""embed: any format, streamed or not, and the same after a kill as without one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import sparsejepa
from sparsejepa import cli
from sparsejepa.data.catalog import load_dataset, stream_dataset
from sparsejepa.errors import UserError
from sparsejepa.evaluation import features, parts
from sparsejepa.evaluation.activations import find_groups
from sparsejepa.evaluation.export import check_path
from sparsejepa.evaluation.parts import Embedding, embed_to
from sparsejepa.interop import Encoder, save_groups
from sparsejepa.interop.module import load_activations
from sparsejepa.interop.runs import FITTED
from sparsejepa.lock import LOCK
from sparsejepa.model.encoder import ViT
from sparsejepa.model.groups import GroupMap

MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)
ENDINGS = (".parquet", ".npz", ".safetensors")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ROWS", 20)


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a written file, by the names that parquet columns have."""
    if path.suffix == ".parquet":
        table = parquet.read_table(path).to_pydict()
        return {name: np.array(column) for name, column in table.items()}
    found = dict(np.load(path)) if path.suffix == ".npz" else load_file(path)
    return {"features": found["x"], **{k: v for k, v in found.items() if k != "x"}}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_holds_features_groups_names_and_labels(
    run: Path, encoder: Encoder, tiny_images: Path, tmp_path: Path, ending: str
) -> None:
    images, out = load_dataset(tiny_images, "test"), tmp_path / f"f{ending}"
    activations = find_groups(str(run), "auto", encoder)
    facts = embed_to(out, Embedding(encoder, images, "concat4", activations))
    assert facts == {"images": 48, "features": 96, "groups": 6, "skipped": 0}
    assert [path.name for path in tmp_path.iterdir()] == [out.name]  # the parts are gone
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
        facts = embed_to(out, Embedding(encoder, images))
        assert (facts["images"], facts["skipped"], facts["groups"]) == (94, 2, 0)
        found[name] = read(out)
    order = [found[name]["file"].argsort() for name in ("cached", "streamed")]
    for column in ("file", "class"):
        first, second = (found[n][column][o] for n, o in zip(found, order, strict=True))
        assert first.tolist() == second.tolist()
    first, second = (found[n]["features"][o] for n, o in zip(found, order, strict=True))
    np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_done_is_not_done_again(
    encoder: Encoder,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    images, whole, out = load_dataset(tiny_images), tmp_path / f"w{ending}", tmp_path / f"f{ending}"
    wanted = Embedding(encoder, images)
    embed_to(whole, wanted)
    seen: list[int] = []
    pooled = parts.pooled

    def failing(encoder: Encoder, batch: torch.Tensor, pool: features.Pool):
        if sum(seen) >= 60:
            raise KeyboardInterrupt
        seen.append(len(batch))
        return pooled(encoder, batch, pool)

    monkeypatch.setattr(parts, "pooled", failing)
    with pytest.raises(KeyboardInterrupt):
        embed_to(out, wanted)
    assert sum(seen) == 60 and not out.exists()
    monkeypatch.setattr(parts, "pooled", pooled)
    # A part that is cut short is computed again, and so is one that was being written.
    folder = out.with_name(f"{out.name}.parts")
    torn = folder / "0000001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-5])
    (folder / ".0000003.safetensors.77.tmp").write_bytes(b"half")
    said: list[str] = []
    embed_to(out, wanted, said.append)
    assert said == [f"2 of 5 parts are in {folder} already"] and not folder.exists()
    assert out.read_bytes() == whole.read_bytes()


def test_parts_of_anything_else_are_begun_anew(
    run: Path, encoder: Encoder, tiny_images: Path, tmp_path: Path
) -> None:
    images, out = load_dataset(tiny_images), tmp_path / "f.npz"
    folder, said = tmp_path / "f.npz.parts", list[str]()
    activations, other = load_activations(run, (4, 4)), load_activations(run, (4, 4))
    assert other is not None
    other.rms[0] = 9
    for wanted in (
        Embedding(encoder, images),
        Embedding(encoder.untrained(1), images),
        Embedding(encoder, load_dataset(tiny_images, "test")),
        Embedding(encoder, images.subset(50)),
        Embedding(encoder, images, "concat4"),
        Embedding(encoder, images, "mean", activations),
        Embedding(encoder, images, "mean", other),
        *(
            Embedding(encoder, stream_dataset(tiny_images, "train", img_size=size, upscale=upscale))
            for size, upscale in (((16, 16), False), ((8, 8), False), ((8, 8), True))
        ),
    ):
        folder.mkdir(exist_ok=True)
        parts._prepare(folder, wanted, said.append)
        (folder / "0000000.safetensors").write_bytes(b"")
    assert len(said) == 9 and all("begun anew" in line and "\n" not in line for line in said)
    (folder / "about.json").write_text("{")
    embed_to(out, Embedding(encoder, images), said.append)
    assert "begun anew" in said[9] and np.load(out)["x"].shape == (96, 24)


def test_a_folder_in_the_way_is_left_alone(
    encoder: Encoder, tiny_images: Path, tmp_path: Path
) -> None:
    (tmp_path / "f.npz.parts").mkdir()
    (tmp_path / "f.npz.parts" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"f\.npz\.parts: in the way"):
        embed_to(tmp_path / "f.npz", Embedding(encoder, load_dataset(tiny_images)))
    assert (tmp_path / "f.npz.parts" / "thesis.txt").read_text() == "mine"


def test_two_commands_do_not_share_a_result(
    encoder: Encoder, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = load_dataset(tiny_images, "test"), tmp_path / "f.npz"
    pooled, refused = parts.pooled, list[str]()
    said = rf"f\.npz\.parts is in use by process {os.getpid()}"

    def meanwhile(mine: Encoder, batch: torch.Tensor, pool: features.Pool):
        for other in (encoder, encoder.untrained(1)):
            with pytest.raises(UserError, match=said):
                embed_to(out, Embedding(other, images))
            refused.append(other.name)
        return pooled(mine, batch, pool)

    monkeypatch.setattr(parts, "pooled", meanwhile)
    embed_to(out, Embedding(encoder, images))
    assert refused and [path.name for path in tmp_path.iterdir()] == [out.name]
    np.testing.assert_allclose(read(out)["features"], features.embed(encoder, images).x, atol=1e-5)
    # What a command leaves that is killed before its first part is in nobody's way.
    folder = tmp_path / "f.npz.parts"
    folder.mkdir()
    for name in (LOCK, ".about.json.77.tmp"):
        (folder / name).write_text("{}")
    monkeypatch.setattr(parts, "pooled", pooled)
    embed_to(out, Embedding(encoder, images))
    assert not folder.exists()


def test_labels_that_are_called_as_a_column_is_keep_a_column(
    encoder: Encoder, tiny_images: Path, tmp_path: Path
) -> None:
    images, out = load_dataset(tiny_images, "test"), tmp_path / "f.parquet"
    names = ("file", "features", "groups", "target.groups", "class")
    images = replace(images, targets=dict.fromkeys(names, images.primary))
    embed_to(out, Embedding(encoder, images))
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
    images = load_dataset(tiny_images, "test").subset(3)
    images = replace(images, files=("a\udcff.png", "ü.png", "plain.png"))
    for ending, name in ((".parquet", "file"), (".npz", "files")):
        embed_to(tmp_path / f"f{ending}", Embedding(encoder, images))
        assert read(tmp_path / f"f{ending}")[name].tolist() == [
            "a\\udcff.png",
            "ü.png",
            "plain.png",
        ]


def test_what_cannot_be_embedded_or_written(
    run: Path, encoder: Encoder, tiny_images: Path, tmp_path: Path
) -> None:
    broken = sparsejepa.load(run)
    with torch.no_grad():
        broken.model.get_parameter("norm.bias")[0] = torch.nan
    with pytest.raises(UserError, match="gives NaN or infinity on"):
        embed_to(tmp_path / "f.npz", Embedding(broken, load_dataset(tiny_images)))
    with pytest.raises(UserError, match=r"must end in \.parquet, \.npz, \.safetensors"):
        check_path(tmp_path / "f.csv")
    with pytest.raises(UserError, match="3 file names are more than this format holds"):
        check_path(tmp_path / "f.safetensors", ["a" * 40_000_000] * 3)


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
        ([*words, "--max-unreadable", "2"], "--max-unreadable 2.0: a share"),
        (["embed", str(run), "--data", "scenes", "--stream"], "--stream: the images of scenes"),
    ):
        assert cli.main(wrong) == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(run: Path, tmp_path: Path) -> None:
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for i in range(6000):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{i:04}.png"
        )
    words = ["-m", "sparsejepa", "embed", str(run), "--data", str(folder), "--stream", "--out"]

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, *words, str(out), "--device", "cpu"]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
        )

    whole, out = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    assert start(whole).wait(200) == 0
    first, part = start(out), tmp_path / "killed.parquet.parts" / "0000001.safetensors"
    while not part.exists() and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait(20)
    assert part.exists() and not out.exists()
    again = start(out)
    printed, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "parts are in" in printed
    assert out.read_bytes() == whole.read_bytes() and not part.parent.exists()
    assert parquet.read_table(out).num_rows == 4800  # a fifth is the test split
