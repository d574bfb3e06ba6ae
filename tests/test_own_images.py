"""One's own images of many sizes: what a run was told holds for the commands after it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sparsejepa
from sparsejepa import cli
from sparsejepa.config import Config, load_toml


def call(capsys: pytest.CaptureFixture[str], command: str) -> tuple[int, str, str]:
    """Run the command inside this process; returns status, standard output, standard error."""
    status = cli.main(shlex.split(command))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`photos` in a working folder: 100 images of two classes, many sizes, three of them torn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEJEPA_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for i in range(103):
        folder = tmp_path / "photos" / ("dark" if i % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 128, (20 + i % 40, 60 - i % 40, 3)) + 127 * (i % 2 == 0)
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(folder / f"{i:03}.png")
        if i < 3:
            (folder / f"{i:03}.png").write_bytes(b"\x89PNG no more")
    return tmp_path


def test_what_pretrain_was_told_need_not_be_repeated(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = "--preset nano --steps 2 --threads 1 --patch-size 8 --img-size 32 --upscale"
    status, out, err = call(capsys, f"pretrain photos {tiny} --out a")
    # The preset's batch is halved until it fits, and the run's settings say so.
    assert status == 0, err
    assert re.search("batch size 64 in place of 128: there are only [78]. training images", out)
    assert Config.from_dict(load_toml(Path("a/config.toml"))).optim.batch_size == 64
    assert call(capsys, "pretrain --out a --resume")[0] == 0
    status, _, err = call(capsys, f"pretrain photos {tiny} --batch-size 90 --out b")
    assert status == 2 and "--batch-size 90 is more" in err
    assert call(capsys, f"pretrain photos {tiny} --dry-run")[0] == 0

    (again,) = [line for line in out.splitlines() if line.startswith("next: sparsejepa ")]
    status, out, err = call(capsys, f"{again.removeprefix('next: sparsejepa ')} --protocol knn")
    assert status == 0 and again.endswith("probe a --data photos"), err
    assert "train images are left out, the first is" in out
    assert call(capsys, "explain a --data photos --quick")[0] == 0
    assert call(capsys, "export a --to timm --out b")[0] == 0
    status, out, err = call(capsys, "embed a --data photos --out f.npz --json")
    found = json.loads(out)
    assert status == 0, err
    assert found["first_skipped"].endswith(".png") and f"{found['skipped']}" in err
    assert "images of the test split are not in it: --split test" in err
    own = call(capsys, "embed a --data photos --out g.npz --img-size 32 --upscale")
    assert own[0] == 0
    np.testing.assert_array_equal(np.load("f.npz")["x"], np.load("g.npz")["x"])
    assert call(capsys, "embed a --data photos --out s.npz --stream")[0] == 0
    np.testing.assert_array_equal(np.load("s.npz")["x"], np.load("f.npz")["x"])
    # Images that a run was not trained on, and an encoder without a run.
    (mixed / "photos").rename(mixed / "others")
    status, out, err = call(capsys, "embed a --data others --out h.npz --json")
    assert status == 0, err
    assert "images of several sizes, read at the encoder's 32x32" in err
    sparsejepa.embed(sparsejepa.load("a"), "others", upscale=True)
    Path("a/config.toml").unlink()
    status, _, err = call(capsys, "embed a --data others")
    assert status == 2 and "--upscale" in err
    assert call(capsys, "embed a --data others --upscale --out i.npz")[0] == 0
    # A size of one's own that the encoder enlarges is said.
    status, out, _ = call(capsys, "embed a --data others --img-size 16 --out j.npz")
    assert status == 0 and "images of 16x16 pixels are enlarged to the 32x32 of a" in out
    status, out, _ = call(capsys, "probe a --data others --img-size 16 --protocol knn")
    assert status == 0 and "images of 16x16 pixels are enlarged to the 32x32 of a" in out


def test_images_without_labels_are_explained_next(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (mixed / "photos").rglob("*.png"):
        file.rename(mixed / "photos" / file.name)
    for folder in ("dark", "light"):
        (mixed / "photos" / folder).rmdir()
    status, out, err = call(
        capsys, "pretrain photos --preset nano --batch-size 16 --steps 3 --img-size 16 --out a"
    )
    assert status == 0, err
    assert out.splitlines()[-1] == "next: sparsejepa explain a --data photos"
    for file in sorted((mixed / "photos").iterdir())[43:]:
        file.unlink()
    status, _, err = call(capsys, "explain a --data photos")
    assert status == 2 and "test images are too few" in err and "about 80 in all" in err


def test_a_sweep_takes_a_smaller_batch_as_a_run_does(
    tmp_path: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(tiny_images), *"--preset nano --patch-size 8 --steps 2 --lam 0".split()]
    words += ["--seeds", "1", "--jobs", "1", "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(words) == 0
    assert "batch size 64 in place of 128: there are only 96" in capsys.readouterr().err
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    assert row["settings"]["optim"]["batch_size"] == 64
    # One that was asked for is refused.
    words[words.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    assert cli.main([*words, "--batch-size", "100"]) == 2
    assert "--batch-size 100" in capsys.readouterr().err
