"""The size that images are read at for an encoder, where nobody names one.

The images of a run's own data are read as they were for its training. Others keep their own size,
and the encoder resizes them; if they have several, they are read at the encoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from sparsejepa.config import Config, load_toml
from sparsejepa.errors import SizesDiffer, UserError
from sparsejepa.interop import Encoder, folder_of

Size = tuple[int, int]
T = TypeVar("T")


def read_fitting(
    read: Callable[[Size | None, bool], T],
    data: str,
    refs: Sequence[Encoder | str | Path],
    sizes: Callable[[], Iterable[Size]],
    *,
    img_size: Size | None = None,
    upscale: bool = False,
    say: Callable[[str], None] | None = None,
) -> T:
    """Return what `read` makes of the images at the size that suits some encoders.

    Args:
        read: takes height and width (None: the images' own) and whether to enlarge smaller images.
        data: what the images are called.
        refs: encoders, or what they are loaded from; of runs the settings are looked at.
        sizes: gives the encoders' sizes (h, w), if they are needed.
        img_size: the size that was asked for; nothing is chosen then.
        upscale: as asked for; a run that was trained with it asks for it too.
        say: is told of a size that was chosen because the images have several.

    Raises UserError as `read`: SizesDiffer if images have several sizes and encoders have too.
    """
    if img_size is not None:
        return read(img_size, upscale)
    runs = [config for ref in refs if (config := _settings(ref)) is not None]
    own = {_size(config) for config in runs if _same(config.data, data)}
    upscale = upscale or any(config.images.upscale for config in runs)
    if len(own) == 1 and len(runs) == len(refs) and all(_same(run.data, data) for run in runs):
        return read(own.pop(), upscale)
    try:
        return read(None, upscale)
    except SizesDiffer:
        found = set(sizes())
        if len(found) != 1:
            raise
    size = found.pop()
    if say is not None:
        say(f"{data}: images of several sizes, read at the encoder's {text(size)}")
    return read(size, upscale)


def say_enlarged(encoder: Encoder, images: Size, data: str, say: Callable[[str], None]) -> None:
    """Say so where images (h, w) are smaller than what an encoder was made for."""
    if images[0] < encoder.img_size[0] or images[1] < encoder.img_size[1]:
        say(
            f"{data}: images of {text(images)} pixels are enlarged to the {text(encoder.img_size)} "
            f"of {encoder.name}"
        )


def text(size: Size) -> str:
    """Return a size as people read it, height first."""
    return f"{size[0]}x{size[1]}"


def _settings(ref: Encoder | str | Path) -> Config | None:
    """Return what a run was trained with; None if that is not known or cannot be read."""
    folder = None if isinstance(ref, Encoder) else folder_of(ref)
    path = None if folder is None else folder / "config.toml"
    if path is None or not path.exists():
        return None
    try:
        return Config.from_dict(load_toml(path), str(path)).check()
    except UserError:  # it is not needed for reading the encoder
        return None


def _size(config: Config) -> Size | None:
    given = config.images.img_size
    return (given[0], given[-1]) if given else None


def _same(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
