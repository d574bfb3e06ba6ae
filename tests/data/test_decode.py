"""Every kind of image file that a folder may hold, and damaged ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsejepa.data import decode as module
from sparsejepa.data.decode import Unreadable, check_readable, decode, fit, read_image, to_rgb
from sparsejepa.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 10, 3), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = to_rgb(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_is_unchanged(form: str):
    assert (pixels(encoded(Image.fromarray(PIXELS), form)) == PIXELS).all()
    assert (pixels(encoded(Image.fromarray(PIXELS), "WEBP", lossless=True)) == PIXELS).all()


def test_grey_becomes_three_equal_channels():
    grey = PIXELS[..., 0]
    assert (pixels(encoded(Image.fromarray(grey))) == grey[..., None]).all()
    black_and_white = pixels(encoded(Image.fromarray(grey > 127)))
    assert (black_and_white == 255 * (grey > 127)[..., None]).all()


def test_transparency_is_composited_on_white():
    alpha = RNG.integers(0, 256, (12, 10, 1)).astype(np.uint8)
    want = PIXELS * (alpha / 255) + 255 * (1 - alpha / 255)
    got = pixels(encoded(Image.fromarray(np.concatenate([PIXELS, alpha], 2))))
    assert abs(got - want).max() <= 1
    grey = pixels(encoded(Image.fromarray(np.concatenate([PIXELS[..., :1], alpha], 2), "LA")))
    assert abs(grey - (want[..., :1])).max() <= 1


def test_palette_with_and_without_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    see_through = pixels(encoded(image, transparency=1))
    assert see_through.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PGM"])
def test_16_bits_are_scaled_to_8(form: str):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if form == "PGM":
        data = b"P5 256 256 65535\n" + values.astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(values), form)
    assert (pixels(data) == np.round(values / 257)[..., None]).all()


def test_cmyk_inverts_ink():
    ink = np.zeros((4, 4, 4), np.uint8)
    ink[..., 0] = 255  # all cyan
    cyan = pixels(encoded(Image.fromarray(ink, "CMYK"), "TIFF"))
    assert (cyan == [0, 255, 255]).all()
    jpeg = pixels(encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=95))
    assert abs(jpeg - [0, 255, 255]).max() < 12


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(form: str):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert abs(pixels(data) - [255, 0, 0]).max() <= 4


# EXIF 2.32, tag 0x0112: the sides of the picture on which row 0 and column 0 of the file lie.
ORIENTATIONS = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_is_honoured(orientation: int):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # white corner at the top left, wider than high
    row, column = ORIENTATIONS[orientation]
    stored = upright.transpose(1, 0, 2) if row in ("left", "right") else upright
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", exif=exif, quality=95)
    got = pixels(data)
    assert got.shape == upright.shape and abs(got - upright).mean() < 3


def test_unknown_scales_are_refused():
    with pytest.raises(Unreadable, match="floating-point"):
        to_rgb(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
    with pytest.raises(Unreadable, match="32-bit"):
        to_rgb(encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), "TIFF"))


def test_enormous_images_are_refused_before_they_are_decoded():
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    with pytest.raises(Unreadable, match="400 megapixels, more than the 89 that are read"):
        to_rgb(bomb)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(Unreadable, match="enormous: 100 megapixels"),
    ):
        to_rgb(encoded(Image.new("1", (10_000, 10_000))))


def test_truncated_empty_and_missing_files(tmp_path: Path):
    data = encoded(Image.fromarray(PIXELS))
    for broken in (data[: len(data) // 2], b"", b"text", data[:20]):
        with pytest.raises(Unreadable):
            to_rgb(broken)
    with pytest.raises(Unreadable, match="No such file"):
        to_rgb(tmp_path / "gone.png")


@settings(max_examples=300)
@given(
    form=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]),
    cut=st.one_of(st.none(), st.integers(0, 400)),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
)
def test_mutated_files_decode_or_are_reported(form, cut, edits):
    data = bytearray(encoded(Image.fromarray(PIXELS), form))
    for place, value in edits:
        data[place % len(data)] = value
    items = [
        ("good", encoded(Image.fromarray(PIXELS))),
        ("mutant", bytes(data[:cut])),
        ("none", None),
    ]
    items += [("also good", items[0][1])]
    (block,) = decode(items, (8, 8), upscale=True, origin="test")
    assert ("none", "no image data") in block.skipped
    assert len(block.images) + len(block.skipped) == 4
    assert block.positions in ([0, 3], [0, 1, 3])
    assert all(image.shape == (8, 8, 3) and image.dtype == np.uint8 for image in block.images)
    assert all(reason and "\n" not in reason for _, reason in block.skipped)


def test_blocks_keep_order_and_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_TASK", 3)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    images = RNG.integers(0, 256, (50, 4, 4, 3), np.uint8)
    items = [(f"i{k}", encoded(Image.fromarray(image))) for k, image in enumerate(images)]
    items[7] = ("i7", b"broken")
    blocks = list(decode(items, None, upscale=False, origin="test"))
    assert len(blocks) > 3
    kept = [k for k in range(50) if k != 7]
    assert [k for block in blocks for k in block.positions] == kept
    assert [name for block in blocks for name in block.names] == [f"i{k}" for k in kept]
    assert (np.concatenate([block.images for block in blocks]) == images[kept]).all()
    assert [entry for block in blocks for entry in block.skipped] == [("i7", "not an image")]


@pytest.mark.parametrize(("limit", "allowed"), [(0.5, 5), (0.0, 0), (0.29, 2), (1.0, 9)])
def test_too_many_unreadable_images_are_an_error(limit: float, allowed: int):
    skipped = [(f"{i}.png", "not an image") for i in range(10)]
    check_readable("data", skipped[:allowed], 10, limit)
    with pytest.raises(UserError, match=r"data: \d+ of 10 images .* first is 0.png .*--max-unread"):
        check_readable("data", skipped[: allowed + 1], 10, limit)


def test_sizes_must_agree_or_be_given(tmp_path: Path):
    small, large = Image.new("RGB", (6, 8)), Image.new("RGB", (12, 8))
    items = [("small.png", encoded(small)), ("large.png", encoded(large))]
    with pytest.raises(UserError, match=r"small.png has 8x6 .* large.png has 8x12.*--img-size"):
        list(decode(items, None, upscale=False, origin="data"))
    (block,) = decode(items, (8, 6), upscale=False, origin="data")
    assert {image.shape for image in block.images} == {(8, 6, 3)}


def test_too_small_images_need_upscale(tmp_path: Path):
    path = tmp_path / "small.png"
    Image.fromarray(PIXELS).save(path)
    with pytest.raises(UserError, match=r"small.png: 12x10 pixels, .*--img-size 12x12.*--upscale"):
        list(decode([("small.png", path)], (12, 12), upscale=False, origin="data"))
    (block,) = decode([("small.png", path)], (12, 12), upscale=True, origin="data")
    assert block.images[0].shape == (12, 12, 3)


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_fit_keeps_the_centre_and_a_ramp(size, out):
    """Of a horizontal ramp, the middle of the result is the middle of the image."""
    ramp = np.broadcast_to(np.linspace(0, 255, size[1])[None, :, None], (*size, 3))
    image = fit(Image.fromarray(np.round(ramp).astype(np.uint8)), out)
    got = np.asarray(image).astype(float)
    assert got.shape == (*out, 3)
    assert abs(got.mean() - ramp.mean()) < 6 or size[1] == 1
    assert (np.diff(got, axis=1) >= -2).all()  # bicubic overshoots a little
    assert (np.ptp(got, axis=0) <= 2).all()


def photograph(height: int, width: int) -> Image.Image:
    """A picture with the spectrum of photographs: amplitudes fall off with the frequency."""
    rng = np.random.default_rng(3)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency**1.2
    grey, red, blue = np.fft.irfft2(spectrum, (height, width))
    planes = np.stack([grey + 0.3 * red, grey, grey + 0.3 * blue], -1)
    planes = 128 + 50 * (planes - planes.mean()) / planes.std()
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(150, 150), (128, 128), (100, 60), (40, 64), (33, 33), (37, 37)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_large_jpeg_is_nearly_what_full_decoding_gives(size, options):
    """Decoded at a half, a quarter or an eighth, then resized: hardly further from resizing alone
    than common filters are from one another."""
    image = photograph(301, 403)
    data = encoded(image, "JPEG", quality=92, **options)
    ours = read_image("x", data, size, False)
    assert isinstance(ours, np.ndarray) and ours.shape == (*size, 3)
    whole = to_rgb(data)
    box, hamming, bicubic, lanczos = (
        np.asarray(fit(whole, size, filter_)).astype(float)
        for filter_ in (Image.Resampling.BOX, Image.Resampling.HAMMING, Image.Resampling.BICUBIC,
                        Image.Resampling.LANCZOS)
    )  # fmt: skip
    usual = abs(box - lanczos)
    nearest = min((abs(ours - other) for other in (hamming, bicubic)), key=np.mean)
    assert nearest.mean() < 1.25 * usual.mean()
    assert np.quantile(nearest, 0.99) < 1.25 * np.quantile(usual, 0.99)
    assert abs(ours.mean((0, 1)) - hamming.mean((0, 1))).max() < 1


def test_a_jpeg_that_is_turned_is_turned_before_it_is_made_smaller():
    """It lies on its side in the file: 120 x 60 pixels are 60 x 120 for whoever looks at it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photograph(60, 120), "JPEG", exif=exif)
    for size in ((100, 50), (40, 20)):
        image = read_image("x", data, size, False)
        assert (np.asarray(fit(to_rgb(data), size)) == image).all()


def test_fit_of_the_same_size_changes_nothing():
    image = Image.fromarray(PIXELS)
    assert fit(image, (12, 10)) is image


def test_mistakes_of_the_caller_are_not_taken_for_damage():
    with pytest.raises(TypeError):
        read_image("a", encoded(Image.fromarray(PIXELS), "JPEG"), 4, True)  # type: ignore[arg-type]
