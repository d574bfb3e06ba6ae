"""Every data set by name: built-in scenes, data sets of the hub, and one's own folders.

scenes, scenes:single        made on the spot
cifar100, cifar10, svhn      from the data root, or fetched from the hub
clevr-count                  likewise, or the official files in the data root
inaturalist2018, places365   the official files in the data root
hub:OWNER/NAME[/CONFIG]      any data set of the hub whose files are parquet
PATH                         any folder of images, or of a hub data set's parquet files; also a
                             folder's name inside the data root

A name above comes before a folder of the same name: write ./cifar100 for the folder.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsejepa.data import cache, scenes, shapes
from sparsejepa.data.cache import Source
from sparsejepa.data.decode import EXTENSIONS, Block
from sparsejepa.data.factors import chosen
from sparsejepa.data.folders import find_table, read_folder, split_folders
from sparsejepa.data.hub import fetch, find_copy, local_shards, read_hub
from sparsejepa.data.official import CLEVR_REPO, OFFICIAL, count_objects, read_official
from sparsejepa.data.sources import choose_splits
from sparsejepa.data.store import ImageSet, Target
from sparsejepa.errors import UserError, nearest

SCENES = {
    "scenes": "scenes of 3 to 10 objects; labels: count, shape, colour, background",
    "scenes:single": "single objects on a grid of seven factors, one label per factor",
}
HUB: dict[str, tuple[str, str | None]] = {
    "cifar100": ("uoft-cs/cifar100", "cifar100"),
    "cifar10": ("uoft-cs/cifar10", "plain_text"),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
}
"""Name: data set of the hub and its configuration."""

SCENE_COUNTS = {"train": 20_000, "test": 5_000}


@dataclass(frozen=True)
class DatasetRow:
    """One line of the list of data sets."""

    name: str
    source: str
    found: str
    """Where it lies; "" if it would have to be fetched."""
    splits: tuple[str, ...]


def load_dataset(
    name: str | Path,
    split: str = "train",
    *,
    img_size: tuple[int, int] | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    upscale: bool = False,
    truth: bool = False,
    factors: Sequence[str] = (),
) -> ImageSet:
    """Return one split of a data set, decoded, with labels.

    Mean and standard deviation are those of the training split, whichever is asked for.

    Arguments:
        name: a name of the catalog, hub:OWNER/NAME[/CONFIG], or a folder.
        split: train or test.
        img_size: height and width; by default the images' own size, if they all have one.
        data_root: folder with local copies (default: SPARSEJEPA_DATA).
        cache_dir: where decoded images are kept (default: SPARSEJEPA_CACHE, or
            ~/.cache/sparsejepa).
        upscale: enlarge images that are smaller than `img_size` instead of refusing them.
        truth: read or render object masks, where there are any: built-in scenes, and folders with
            masks/ beside images/.
        factors: names of columns that become the targets, in this order, instead of those that
            look like labels. Any column of numbers or text will do, and lists of one length;
            numbers with many values are cut into bins (`Target.note`). Which images are train and
            which are test does not depend on it.

    Raises UserError: unknown name, missing or empty folder, data that is neither local nor to be
    had from the hub, images of several sizes or too small, no space for the cache; a factor that is
    unknown, incomplete or constant; masks that do not fit their images.
    """
    if split not in SCENE_COUNTS:
        raise UserError(f"split '{split}': there are train and test{nearest(split, SCENE_COUNTS)}")
    sources = find_sources(str(name), data_root, img_size, factors)
    folder = cache_folder(cache_dir)
    train = images = cache.load(sources["train"], folder, img_size, upscale)
    if split == "test":
        images = cache.load(sources["test"], folder, img_size, upscale)
        if images.img_size != train.img_size:
            train_size, test_size = ("x".join(map(str, s.img_size)) for s in (train, images))
            raise UserError(
                f"{name}: training images have {train_size} pixels and test images {test_size}; "
                "set --img-size"
            )
        images = replace(images, mean=train.mean, std=train.std)
    if factors and name in SCENES:  # their targets are all there is: no need to render them again
        names = chosen(factors, list(images.targets), str(name))
        images = replace(images, targets={key: images.targets[key] for key in names})
    read_masks = sources[split].masks
    return replace(images, masks=read_masks(images)) if truth and read_masks else images


def find_sources(
    name: str,
    data_root: Path | None = None,
    img_size: tuple[int, int] | None = None,
    factors: Sequence[str] = (),
) -> dict[str, Source]:
    """Return the train and test source of a data set. Raises UserError as `load_dataset`."""
    if name in SCENES:
        return _scene_sources(name, img_size)
    root = data_folder(data_root)
    if name in HUB:
        return _hub_sources(name, *HUB[name], root, factors)
    if name in OFFICIAL:
        return _official_sources(name, root, factors)
    if name.startswith("hub:"):
        owner, _, rest = name.removeprefix("hub:").partition("/")
        repo, _, config = rest.partition("/")
        if not all(re.fullmatch(r"[\w.-]+", part) for part in (owner, repo)):
            raise UserError(f"{name}: write hub:OWNER/NAME or hub:OWNER/NAME/CONFIG")
        return _hub_sources(name, f"{owner}/{repo}", config or None, root, factors)
    path = os.path.expanduser(name)  # unlike pathlib's, these never raise
    if os.path.exists(path):
        folder, own = Path(path), Path(path).resolve().name
        if _is_hub_copy(path):
            return read_hub(folder, own, factors=factors)
        return read_folder(folder, own, factors)
    if name and root is not None and os.path.isdir(root / name):
        return _read_copy(root / name, name, None, factors)
    if re.fullmatch(r"[\w-]+/[\w.-]+", name):
        raise UserError(f"{name}: no such folder; for a data set of the hub write hub:{name}")
    if re.search(r"[/\\]|^[.~]", name):
        raise UserError(f"{name}: no such folder")
    known = [row.name for row in list_datasets(root)]
    raise UserError(
        f"unknown data set '{name}'{nearest(name, known)}; there are {', '.join(known)}, "
        "hub:OWNER/NAME, and folders of images"
    )


def list_datasets(data_root: Path | None = None) -> list[DatasetRow]:
    """Return the data sets of the catalog and those that lie in the data root."""
    root = data_folder(data_root)
    both = tuple(SCENE_COUNTS)
    rows = [DatasetRow(name, about, "built in", both) for name, about in SCENES.items()]
    repos, plain = dict(HUB), []
    for folder in _folders(root):
        if folder.name in OFFICIAL:
            continue
        if folder.name.startswith("datasets--"):  # the hub's cache
            found = {"/".join(folder.name.split("--")[1:])}
        else:  # OWNER/NAME/CONFIG/SPLIT-....parquet
            found = {f"{folder.name}/{p.parts[-3]}" for p in folder.glob("*/*/*.parquet")}
            if not found and not any(repo.endswith(f"/{folder.name}") for repo, _ in HUB.values()):
                parquet = not find_table(folder) and any(folder.rglob("*.parquet"))
                kind = "parquet files" if parquet else "folder of images"
                plain.append(DatasetRow(folder.name, kind, str(folder), _splits(folder, None)))
        known = {repo for repo, _ in repos.values()}
        repos |= {f"hub:{repo}": (repo, None) for repo in sorted(found - known)}
    for name, (repo, config) in repos.items():
        copy = find_copy(repo, root)
        splits = _splits(copy, config) if copy else both
        rows.append(DatasetRow(name, f"hub:{repo}", str(copy or ""), splits))
    return rows + [_official_row(name, root) for name in OFFICIAL] + plain


def describe(
    name: str | Path,
    *,
    img_size: tuple[int, int] | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    upscale: bool = False,
) -> dict[str, Any]:
    """Decode a data set and return what it holds, as plain values. Raises as `load_dataset`."""
    result: dict[str, Any] = {"name": str(name), "splits": {}}
    for split in ("train", "test"):
        images = load_dataset(
            name,
            split,
            img_size=img_size,
            data_root=data_root,
            cache_dir=cache_dir,
            upscale=upscale,
        )
        result["splits"][split] = {
            "images": len(images),
            "targets": {key: len(target.names) for key, target in images.targets.items()},
            "skipped": [list(entry) for entry in images.skipped],
            "fingerprint": images.fingerprint,
        }
        result |= {
            "img_size": list(images.img_size),
            "mean": list(images.mean),
            "std": list(images.std),
        }
    return result


def data_folder(data_root: Path | None) -> Path | None:
    """Return the data root. Raises UserError if it is set to what is not a folder."""
    named = data_root or os.environ.get("SPARSEJEPA_DATA")
    if not named:
        return None
    root = Path(named).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set --data-root or SPARSEJEPA_DATA to one")
    return root


def cache_folder(cache_dir: Path | None) -> Path:
    """Return the folder for decoded images, which need not exist."""
    named = cache_dir or os.environ.get("SPARSEJEPA_CACHE") or "~/.cache/sparsejepa"
    return Path(named).expanduser()


def _hub_sources(
    name: str, repo: str, config: str | None, root: Path | None, factors: Sequence[str]
) -> dict[str, Source]:
    copy = find_copy(repo, root)
    if copy is not None:
        return _read_copy(copy, name, config, factors)
    return read_hub(fetch(repo, config), name, config, factors)


def _official_sources(name: str, root: Path | None, factors: Sequence[str]) -> dict[str, Source]:
    if root is not None and (root / name).is_dir():
        return read_official(name, root / name, factors)
    if name == "clevr-count":
        return count_objects(_hub_sources(name, CLEVR_REPO, None, root, ()), factors)
    raise UserError(
        f"{name}: not in the data root; make a folder DIR/{name} with the official files "
        f"({OFFICIAL[name]}) and set --data-root DIR (or SPARSEJEPA_DATA)"
    )


def _official_row(name: str, root: Path | None) -> DatasetRow:
    about = f"official files in {root or 'DIR'}/{name}: {OFFICIAL[name]}"
    copy = root / name if root is not None and (root / name).is_dir() else None
    if name == "clevr-count":
        about = f"hub:{CLEVR_REPO}, or {about}"
        copy = copy or find_copy(CLEVR_REPO, root)
    return DatasetRow(name, about, str(copy or ""), tuple(SCENE_COUNTS))


def _read_copy(
    folder: Path, name: str, config: str | None, factors: Sequence[str]
) -> dict[str, Source]:
    if find_table(folder) or next(folder.rglob("*.parquet"), None) is None:
        return read_folder(folder, name, factors)
    return read_hub(folder, name, config, factors)


def _is_hub_copy(folder: str) -> bool:
    """Whether parquet files, and no images, lie below a folder."""
    found = False
    for name in (name.lower() for _, _, names in os.walk(folder) for name in names):
        if name.endswith(EXTENSIONS):
            return False
        found |= name.endswith(".parquet")
    return found


def _folders(root: Path | None) -> list[Path]:
    if root is None:
        return []
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _splits(folder: Path, config: str | None) -> tuple[str, ...]:
    """The splits that lie in a folder, by their own names; "all" if it is to be divided."""
    try:
        found = choose_splits(local_shards(folder, config))
    except UserError:
        found = {split: path.name for split, path in split_folders(folder).items()}
    return tuple(found.values()) if "test" in found else ("all",)


def _scene_sources(name: str, img_size: tuple[int, int] | None) -> dict[str, Source]:
    height, width = img_size or (scenes.REFERENCE, scenes.REFERENCE)
    if height != width:
        raise UserError(f"--img-size {height} {width}: the built-in scenes are square")
    # The generator's own text is part of the cache's key: changed code, new pictures.
    code = inspect.getsource(scenes) + inspect.getsource(shapes)
    start = 0
    sources = {}
    for split, count in SCENE_COUNTS.items():
        index = np.arange(start, start + count)
        if name == "scenes:single":
            grid = np.random.default_rng(0).permutation(len(scenes.SingleObjects()))
            index = grid[index]
        read, masks = partial(_render, name, index, height), partial(_masks, name, index, height)
        sources[split] = Source(name, split, f"{code}/{start}/{count}/{height}", read, masks)
        start += count
    return sources


def _render(
    name: str, index: np.ndarray, side: int, *_: object
) -> tuple[Iterable[Block], dict[str, Target]]:
    """Images and labels of scenes `index` [N], both in that order."""
    generator = scenes.Scenes() if name == "scenes" else scenes.SingleObjects()
    columns = zip(generator.FACTORS.items(), generator.factors(index).T, strict=True)

    def blocks() -> Iterator[Block]:
        for start in range(0, len(index), 500):
            part = index[start : start + 500]
            drawn = generator.render(part, side)
            images = drawn.images if isinstance(drawn, scenes.SceneBatch) else drawn
            yield Block(list(images), list(range(start, start + len(part))), [], [])

    return blocks(), {key: Target(values, names) for (key, names), values in columns}


def _masks(name: str, index: np.ndarray, side: int, _: ImageSet) -> np.ndarray:
    """Object masks uint8 [N, S, S] of scenes `index` [N]."""
    masks = np.empty((len(index), side, side), np.uint8)
    for start in range(0, len(index), 500):
        part = slice(start, start + 500)
        if name == "scenes":
            masks[part] = scenes.Scenes().render(index[part], side).masks
        else:
            masks[part] = scenes.SingleObjects().masks(index[part], side)
    return masks
