"""Damaged and hostile image files: none crashes or hangs anything, and each is counted."""

from __future__ import annotations

import functools
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsejepa.data.catalog import load_dataset, stream_dataset
from sparsejepa.data.decode import Unreadable, to_rgb
from sparsejepa.data.stream import open_images
from sparsejepa.errors import UserError

FORMS = {
    "JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp",
    "PPM": "ppm",
}  # fmt: skip


def originals() -> dict[str, list[bytes]]:
    """Small images of every form and mode, animated ones too."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 20, 4), np.uint8)
    rgb, rgba = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    modes = {
        "JPEG": [rgb, rgb.convert("L"), rgb.convert("CMYK")],
        "PNG": [rgb, rgba, rgb.convert("P"), Image.fromarray(pixels[..., 0].astype(np.uint16))],
        "GIF": [rgb], "BMP": [rgb], "TIFF": [rgb, rgba], "WEBP": [rgb, rgba], "PPM": [rgb],
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = 6
    found: dict[str, list[bytes]] = {}
    for form, images in modes.items():
        for image in images:
            for options in _options(form, image, exif):
                buffer = io.BytesIO()
                image.save(buffer, form, **options)
                found.setdefault(form, []).append(buffer.getvalue())
    return found


def _options(form: str, image: Image.Image, exif: Image.Exif) -> list[dict]:
    if form == "JPEG":
        return [{"quality": 80, "exif": exif}, {"progressive": True}]
    if form == "TIFF":
        return [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}][
            : 3 - (image.mode != "RGB")
        ]
    if form in ("GIF", "WEBP", "PNG") and image.mode == "RGB":
        return [{}, {"save_all": True, "append_images": [image.rotate(90)], "exif": exif}]
    return [{}]


def mutant(random_: random.Random, files: dict[str, list[bytes]]) -> tuple[str, bytes]:
    """One damaged file, by its ending."""
    form = random_.choice(list(files))
    data = bytearray(random_.choice(files[form]))
    ending = FORMS[form]
    for _ in range(random_.randint(1, 3)):
        kind = random_.randrange(8)
        place = random_.randrange(len(data) + 1)
        if kind == 0:
            del data[place:]
        elif kind == 1 and data:
            for _ in range(random_.randint(1, 20)):
                data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        elif kind == 2:
            ending = random_.choice(list(FORMS.values()))
        elif kind == 3:
            data[place : place + 16] = bytes(16)
        elif kind == 4:  # a large number where a header may have its width, height or length
            data[min(place, 40) : min(place, 40) + 4] = random_.choice(
                [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\x23\x28", b"\x28\x23\x00\x00"]
            )
        elif kind == 5:
            data[place:place] = random_.randbytes(random_.randint(1, 300))
        elif kind == 6:
            data += data[:place]
        elif data:
            data[place:] = data[: len(data) - place][::-1]
    if random_.random() < 0.02:
        data.clear()
    return ending, bytes(data)


def chunk(kind: bytes, content: bytes) -> bytes:
    sized = struct.pack(">I", len(content)) + kind + content
    return sized + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of these measures with hardly any data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + data + chunk(b"IEND", b"")
    )


@functools.cache
def hostile() -> dict[str, bytes]:
    """Files made to exhaust whoever opens them."""
    text = zlib.compress(bytes(200_000_000), 9)
    good = png(4, 4, chunk(b"tEXt", b"k\0" + b"x" * 500_000))
    return {
        "bomb.png": png(60_000, 60_000),
        "large.png": png(10_000, 8_000),
        "large-alpha.png": png(10_000, 8_000, colour=6),
        "large-grey.png": png(10_000, 8_000, depth=16, colour=0),
        "text.png": png(4, 4, chunk(b"zTXt", b"k\0\0" + text)),
        "long-text.png": good,
        "profile.png": png(4, 4, chunk(b"iCCP", b"k\0\0" + text)),
        "bomb.gif": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6)
        + b",\0\0\0\0\xff\xff\xff\xff\0\2\0;",
        "bomb.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 2**31 - 1,
                                        2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0),
        "bomb.ppm": b"P6 99999 99999 255\n",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    }  # fmt: skip


def fill(folder: Path, count: int, seed: int = 0) -> int:
    """Write a class folder with good files, mutants and hostile ones; return how many."""
    random_, files = random.Random(seed), originals()
    (folder / "train" / "a").mkdir(parents=True)
    (folder / "test" / "a").mkdir(parents=True)
    good = [(f"good{i}.png", files["PNG"][0]) for i in range(max(4, count // 10))]
    mutants = [mutant(random_, files) for _ in range(count)]
    named = [(f"m{i:04d}.{ending}", data) for i, (ending, data) in enumerate(mutants)]
    named += [*good, *hostile().items()]
    for name, data in named:
        (folder / "train" / "a" / name).write_bytes(data)
    (folder / "test" / "a" / "0.png").write_bytes(files["PNG"][0])
    return len(named)


def check(folder: Path, cache: Path, total: int) -> None:
    """Both ways read the same files, list the same others, and lose none."""
    options = {"img_size": (16, 16), "upscale": True, "max_unreadable": 0.95}
    cached = load_dataset(folder, cache_dir=cache, **options)  # type: ignore[arg-type]
    assert len(cached) + len(cached.skipped) == total
    assert all(reason and "\n" not in reason for _, reason in cached.skipped)
    listed = {name for name, _ in cached.skipped}
    assert {"a/script.png", "a/bomb.png", "a/bomb.ppm"} <= listed
    assert not any("good" in name for name in listed)
    stream = stream_dataset(folder, **options)  # type: ignore[arg-type]
    assert len(stream) == total
    images = open_images(stream, "cpu", 2)
    batches = list(images.batches(torch.arange(total).split(100)))
    assert dict(images.skipped) == dict(cached.skipped)
    assert len(images.skipped) == len(cached.skipped)
    position = {file: i for i, file in enumerate(cached.files)}
    for file, image in zip(stream.files, np.concatenate(batches), strict=True):
        if file in position:
            assert (image == cached.images[position[file]]).all()


def test_two_thousand_mutated_files(tmp_path: Path):
    check(tmp_path / "d", tmp_path / "cache", fill(tmp_path / "d", 2000))


READ = """
import resource, sys; from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29))
from sparsejepa.data.decode import read_image
for file in sys.argv[1:]:
    image = read_image("x", Path(file), (16, 16), True)
    assert "Memory" not in str(image), (file, image)
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def peak_of(files: Iterable[Path]) -> int:
    """Read images in a process that may have 1.5 GiB of addresses; return its largest MiB."""
    command = [sys.executable, "-W", "ignore", "-c", READ, *map(str, files)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) // 1024


def test_hostile_files_take_little_memory(tmp_path: Path):
    """80 megapixels are 305 MiB in Pillow, whatever is behind the header."""
    for name, data in hostile().items():
        (tmp_path / name).write_bytes(data)
    assert peak_of(tmp_path.iterdir()) < 450


def test_large_images_in_other_modes_are_converted_in_strips(tmp_path: Path):
    """A transparent image of 20 megapixels: its conversion at once would take four copies."""
    image = Image.new("RGBA", (5000, 4000), (200, 0, 0, 0))
    image.save(tmp_path / "a.png", compress_level=1)
    rgb = to_rgb(tmp_path / "a.png")
    assert rgb.size == (5000, 4000) and rgb.getpixel((4999, 3999)) == (255, 255, 255)
    assert peak_of([tmp_path / "a.png"]) < 330  # 76 MiB each for the pixels and the result, strips


def test_programs_are_not_images(tmp_path: Path):
    """Pillow would start Ghostscript for PostScript, whatever the file's name."""
    with pytest.raises(Unreadable, match="not an image"):
        to_rgb(hostile()["script.png"])


NAMES = [
    "日本語",
    "عربى",
    "emoji 🦔",
    "new\nline",
    "tab\t",
    "$(touch x)",
    "[bold]",
    "-rf",
    "a b",
    "é",
]


def test_names_in_any_alphabet(tmp_path: Path):
    """Undecodable bytes too; messages about them are one printable line."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    folder = os.fsencode(tmp_path / "d")
    names = sorted([*map(os.fsencode, NAMES), b"\xff\xfe", b"caf\xe9"])
    for name in names:
        for split in (b"train", b"test"):
            path = os.path.join(folder, split, name)
            os.makedirs(path)
            for file, data in ((b"good.png", buffer.getvalue()), (b"bad\xff\n.png", b"")):
                with open(os.path.join(path, name + file), "wb") as out:
                    out.write(data)
    cached = load_dataset(tmp_path / "d", cache_dir=tmp_path / "cache", max_unreadable=0.5)
    want = [os.fsdecode(name + b"/" + name + b"good.png") for name in names]
    assert list(cached.files) == want
    again = load_dataset(tmp_path / "d", cache_dir=tmp_path / "cache", max_unreadable=0.5)
    assert list(again.files) == want
    assert cached.targets["class"].names == tuple(sorted(map(os.fsdecode, names)))
    assert len(cached.skipped) == len(names)
    assert all(name.isprintable() for name, _ in cached.skipped)
    stream = stream_dataset(tmp_path / "d", max_unreadable=0.5)
    images = open_images(stream, "cpu", 2)
    (batch,) = images.batches([torch.arange(len(stream))])
    assert (batch == batch[0]).all()
    assert sorted(images.skipped) == sorted(cached.skipped)


@pytest.fixture
def abyss(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed afterwards by what does not recurse."""
    yield tmp_path / "d"
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_very_deep_folders(abyss: Path):
    """Deeper than Python's recursion goes; deeper than the system's names is one line."""
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    (abyss / "train").mkdir(parents=True)
    (abyss / "test").mkdir()
    (abyss / "test" / "a.png").write_bytes(image.getvalue())
    folder = _below(os.open(abyss / "train", os.O_RDONLY), "x", 1200)
    with open("a.png", "wb", opener=functools.partial(os.open, dir_fd=folder)) as file:
        file.write(image.getvalue())
    assert tuple(stream_dataset(abyss).files) == ("x/" * 1200 + "a.png",)
    os.close(_below(folder, "y" * 200, 16))
    with pytest.raises(UserError, match=rf"^{abyss}/train: File name too long") as caught:
        stream_dataset(abyss)
    assert "\n" not in str(caught.value)


def _below(folder: int, name: str, depth: int) -> int:
    """Make folders within one another, each by its own name alone; return the innermost."""
    for _ in range(depth):
        os.mkdir(name, dir_fd=folder)
        inner = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    return folder
