"""From images to one vector each: a frozen encoder's pooled tokens, or the pixels themselves.

In memory or as a file. Letters: n images, B of a batch, D latents, D' features, G groups.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from sparsejepa.config import Config, load_toml
from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.images import DeviceImages, Images, ImageSet, Target, shown
from sparsejepa.distributed import current, gather_rows, own_rows
from sparsejepa.encoders.encoder import (
    GROUPS,
    Encoder,
    GroupActivations,
    groups_folder,
    load_activations,
)
from sparsejepa.encoders.load import folder_of
from sparsejepa.errors import SizesDiffer, UserError, nearest
from sparsejepa.files import atomic_path

Pool = Literal["mean", "concat4"]
POOLS = ("mean", "concat4")
MAX_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Tokens of one batch. On the CPU what fits the cache is 1.7 times as fast as large batches."""
PIXEL_SIDE = 32
"""Height and width that pixel features are area-averaged down to, where images are larger."""
ENDINGS = (".parquet", ".npz")
"""Of the files that `embed_to` writes."""
BATCH, ROWS = 512, 1024
"""Images that an encoder takes at once, at most, and about as many whose features are written."""

Size = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """One vector per image: x [n, D'] float32, with the images' targets."""

    x: np.ndarray
    targets: dict[str, Target]
    name: str
    seconds: float
    """Time that it took to compute x."""

    @property
    def y(self) -> np.ndarray:
        """Values [n] of the primary target. Raises UserError if the images are unlabelled."""
        return target(self.targets, None, self.name).values


def target(targets: dict[str, Target], name: str | None, source: str) -> Target:
    """Return a target by name, the primary one for None; `source` says whose, in an error."""
    if not targets:
        raise UserError(
            f"{source}: has no labels; add class folders or a factors.csv, or use another data set"
        )
    if name is None:
        return next(iter(targets.values()))
    if name not in targets:
        known = ", ".join(targets)
        raise UserError(f"{source}: no target '{name}'{nearest(name, targets)}; it has {known}")
    return targets[name]


def embed(
    encoder: Encoder,
    images: ImageSet | str,
    split: Literal["train", "test"] = "train",
    *,
    pool: Pool = "mean",
    data_root: Path | None = None,
    img_size: Size | None = None,
    upscale: bool = False,
) -> Features:
    """Return the pooled patch tokens of every image.

    Of several processes that are `joined`, each embeds its share; all get the whole.

    Args:
        encoder: sees the images at its own size.
        images: a loaded image set, or a data set's name, of which `split` is loaded.
        pool: mean, the average of the last layer's tokens (D' = D), or concat4, those averages of
            the last four layers side by side (D' = 4 D), in the order of depth.
        data_root: as for `load_dataset`.
        img_size: height and width that named images are read at; by default their own, or the
            encoder's if they have several.
        upscale: enlarge named images that are smaller than that instead of refusing them.

    Raises UserError for an unknown pooling, or if the encoder gives NaN or infinity.
    """
    if pool not in POOLS:
        raise UserError(f"pool '{pool}' is not one of {', '.join(POOLS)}{nearest(pool, POOLS)}")
    if isinstance(images, str):
        name = images

        def read(size: Size | None, upscale: bool) -> ImageSet:
            return load_dataset(name, split, img_size=size, upscale=upscale, data_root=data_root)

        sizes = partial(list, [encoder.img_size])
        images = read_fitting(read, name, [encoder], sizes, img_size=img_size, upscale=upscale)
    start = time.perf_counter()
    x = np.concatenate([arrays["x"] for _, arrays in _blocks(encoder, images, pool)])
    return Features(x, images.targets, images.name, time.perf_counter() - start)


def pixel_features(images: ImageSet) -> Features:
    """Return the raw pixels in [0, 1] as vectors [n, h * w * 3], the floor that costs no training.

    Images larger than 32 pixels on a side are averaged over areas down to 32 on that side.
    """
    start = time.perf_counter()
    source = DeviceImages(images, "cpu")
    size = tuple(min(side, PIXEL_SIDE) for side in images.img_size)
    parts = []
    for index in torch.arange(len(images)).split(1024):
        pixels = source.take(index).permute(0, 3, 1, 2).float() / 255
        if size != images.img_size:
            pixels = F.interpolate(pixels, size, mode="area")
        parts.append(pixels.permute(0, 2, 3, 1).flatten(1))
    x = torch.cat(parts).numpy()
    return Features(x, images.targets, images.name, time.perf_counter() - start)


def read_fitting(
    read: Callable[[Size | None, bool], T],
    data: str,
    refs: Sequence[Encoder | str | Path],
    sizes: Callable[[], Iterable[Size]],
    *,
    img_size: Size | None = None,
    upscale: bool = False,
    say: Callable[[str], object] | None = None,
) -> T:
    """Return what `read` makes of the images at the size that suits some encoders.

    The images of a run's own data are read as they were for its training. Others keep their own
    size, and the encoder resizes them; if they have several, they are read at the encoder's.

    Args:
        read: takes height and width (None: the images' own) and whether to enlarge smaller images.
        data: what the images are called.
        refs: encoders, or what they are loaded from; of runs the settings are looked at.
        sizes: gives the encoders' sizes (h, w), if they are needed.
        img_size, upscale: as asked for; a run that was trained enlarged asks for it too.
        say: is told of a size that was chosen because the images have several.

    Raises UserError as `read`: SizesDiffer if images have several sizes and encoders have too.
    """
    if img_size is not None:
        return read(img_size, upscale)
    runs = [_trained(ref, data) for ref in refs]
    upscale = upscale or any(enlarged for _, enlarged in runs)
    trained = {size for size, _ in runs}
    if len(trained) == 1 and (size := trained.pop()) is not None:
        return read(size, upscale)
    try:
        return read(None, upscale)
    except SizesDiffer:
        found = set(sizes())
        if len(found) != 1:
            raise
    size = found.pop()
    if say is not None:
        say(f"{data}: images of several sizes, read at the encoder's {_text(size)}")
    return read(size, upscale)


def say_enlarged(encoder: Encoder, images: Size, data: str, say: Callable[[str], object]) -> None:
    """Say so where images (h, w) are smaller than what an encoder was made for."""
    if images[0] < encoder.img_size[0] or images[1] < encoder.img_size[1]:
        say(
            f"{data}: images of {_text(images)} pixels are enlarged to the "
            f"{_text(encoder.img_size)} of {encoder.name}"
        )


def _trained(ref: Encoder | str | Path, data: str) -> tuple[Size | None, bool]:
    """Return the size (h, w) that a run read these images at, None for others, and its upscale."""
    folder = None if isinstance(ref, Encoder) else folder_of(ref)
    path = None if folder is None else folder / "config.toml"
    try:
        config = Config.from_dict(load_toml(path), str(path)).check() if path else None
    except UserError:  # it is not needed for reading the encoder
        config = None
    if config is None:
        return None, False
    same = len({Path(name).expanduser().resolve() for name in (config.data, data)}) == 1
    size = config.images.img_size if same else ()
    return (size[0], size[-1]) if size else None, config.images.upscale


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def find_groups(ref: str, wanted: str, encoder: Encoder) -> GroupActivations | None:
    """Return the activations of groups for the tokens of an encoder, on its device.

    Args:
        ref: what the encoder was loaded from.
        wanted: auto, the encoder's own or None if it has none; none; or a folder with groups, or
            one that ``explain`` wrote its fitted groups to.

    Raises UserError for a folder without groups, or with those of another encoder.
    """
    if wanted == "none":
        return None
    folder = folder_of(ref) if wanted == "auto" else groups_folder(Path(wanted))
    if wanted != "auto" and folder is not None and not (folder / GROUPS).exists():
        raise UserError(
            f"--groups {wanted}: no {GROUPS} there; name a folder that has one (sparsejepa "
            "explain writes it for an encoder without groups), auto or none"
        )
    found = None if folder is None else load_activations(folder, encoder.grid_size)
    if found is None:
        return None
    if found.W.shape[2] != encoder.embed_dim:
        raise UserError(
            f"{folder}: groups of {found.W.shape[2]} latents, and {ref} has "
            f"{encoder.embed_dim}; name those of this encoder with --groups"
        )
    return found.to(encoder.device)


def check_path(path: Path) -> None:
    """Make the folder of a file that `embed_to` is to write; UserError unless it can be written."""
    if path.suffix not in ENDINGS:
        raise UserError(f"--out {path}: the name must end in {' or '.join(ENDINGS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out: the folder {path.parent} cannot be made ({error.strerror}); name another"
        ) from None


def embed_to(
    path: Path,
    encoder: Encoder,
    images: Images,
    *,
    pool: Pool = "mean",
    groups: GroupActivations | None = None,
) -> dict[str, Any]:
    """Write the features of images to `path`, one row per image, whole or not at all.

    Parquet is written block by block, so that memory stays flat; its columns are file (where images
    are files), one per target (class names), features [D'] and groups [G], the activations of
    `groups`; a target of such a name becomes ``target.NAME``. NumPy's .npz holds x [n, D'], groups
    [n, G], files [n], and target.NAME [n] with names.NAME for each target. An image of a stream
    that cannot be read has no row. Of several processes the main one writes.

    Returns numbers of images, features, groups and skipped images, and the first of these. Raises
    UserError if the encoder gives NaN or infinity.
    """
    blocks = _blocks(encoder, images, pool, groups)
    if not current().main:
        return {"images": sum(len(rows) for rows, _ in blocks)}
    names: Sequence[str] = images.files  # type: ignore[attr-defined]  # both kinds have them
    index: list[np.ndarray] = []

    def named() -> Iterator[dict[str, Any]]:
        """Yield the columns of each block, and remember its rows."""
        for rows, arrays in blocks:
            index.append(rows)
            files = [shown(names[int(i)]) for i in rows] if names else None
            yield {"files": files, "rows": rows, **arrays}

    with atomic_path(path) as beside:
        write = _write_parquet if path.suffix == ".parquet" else _write_npz
        write(beside, named(), images.targets)
    rows = np.concatenate(index)
    dropped = np.setdiff1d(np.arange(len(images)), rows)
    skipped = [name for name, _ in images.skipped] + [shown(names[int(i)]) for i in dropped]
    return {
        "images": len(rows),
        "features": encoder.embed_dim * (4 if pool == "concat4" else 1),
        "groups": 0 if groups is None else len(groups.W),
        "skipped": len(set(skipped)),
        **({"first_skipped": skipped[0]} if skipped else {}),
    }


def _blocks(
    encoder: Encoder, images: Images, pool: Pool, groups: GroupActivations | None = None
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yield the rows [m] of the images of a block and their arrays, `x` and perhaps `groups`."""
    world, source = current(), images.open(encoder.device)
    tokens = MAX_TOKENS.get(encoder.device.type, MAX_TOKENS["cuda"])
    size = max(1, min(BATCH, tokens // math.prod(encoder.grid_size)))
    whole, step = np.arange(len(images)), size * max(1, ROWS // size)
    parts = [whole[start : start + step] for start in range(0, len(whole), step)]
    own = [torch.from_numpy(own_rows(part, world)).split(size) for part in parts]
    batches = source.batches(index for split in own for index in split)
    try:
        for part, split in zip(parts, own, strict=True):
            found = []
            for index in split:
                batch = next(batches)
                layers = [encoder.tokens(batch)] if pool == "mean" else encoder.layers(batch, 4)
                columns = [torch.cat([x.mean(1) for x in layers], 1)]
                if groups is not None:
                    columns.append(groups(layers[-1])[0])
                # A stream puts another image in the place of one that cannot be read.
                readable = [[row not in source.unreadable] for row in index.tolist()]
                columns.append(columns[0].new_tensor(readable).reshape(-1, 1))
                found.append(torch.cat(columns, 1).cpu())
            table = gather_rows(torch.cat(found), len(part)).numpy()
            rows, table = part[table[:, -1] > 0], table[table[:, -1] > 0, :-1]
            if not np.isfinite(table).all():
                raise UserError(
                    f"{encoder.name}: gives NaN or infinity on {images.name}; train it again"
                )
            width = encoder.embed_dim * (1 if pool == "mean" else 4)
            if len(rows):
                own_groups = {} if groups is None else {"groups": table[:, width:]}
                yield rows, {"x": table[:, :width], **own_groups}
    finally:
        source.close()


def _write_parquet(
    path: Path, blocks: Iterator[dict[str, Any]], targets: dict[str, Target]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for block in blocks:
            columns: dict[str, Any] = {}
            if block["files"] is not None:
                columns["file"] = pa.array(block["files"], pa.string())
            for name, target_ in targets.items():
                while name in ("file", "features", "groups") or name in columns:
                    name = f"target.{name}"
                values = pa.array(target_.values[block["rows"]], pa.int64())
                columns[name] = pa.DictionaryArray.from_arrays(values, list(target_.names))
            for name, column in (("x", "features"), ("groups", "groups")):
                if name in block:
                    flat = pa.array(block[name].ravel())
                    columns[column] = pa.FixedSizeListArray.from_arrays(flat, block[name].shape[1])
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _write_npz(path: Path, blocks: Iterator[dict[str, Any]], targets: dict[str, Target]) -> None:
    whole = list(blocks)
    rows = np.concatenate([block["rows"] for block in whole])
    arrays = {
        name: np.concatenate([block[name] for block in whole])
        for name in ("x", "groups")
        if name in whole[0]
    }
    arrays["files"] = np.array([name for block in whole for name in block["files"] or ()], str)
    for given, target_ in targets.items():
        name = given.replace("/", "_").replace("\\", "_")  # members of an archive
        arrays[f"target.{name}"] = target_.values[rows]
        arrays[f"names.{name}"] = np.array(target_.names)
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
