"""Every data set by name: built-in scenes, data sets of the hub, and one's own folders.

scenes, scenes:single        made on the spot
cifar100, cifar10, svhn      from the data root, or fetched from the hub
clevr-count                  likewise, or the official files in the data root
inaturalist2018, places365,
imagenet                     the official files in the data root
hub:OWNER/NAME[/CONFIG]      any data set of the hub whose files are parquet
PATH                         any folder of images, of tar shards (also FILE.tar, x-{000..012}.tar),
                             or of a hub data set's parquet files; also a folder's name inside the
                             data root

A name above comes before a folder of the same name: write ./cifar100 for the folder.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from sparsejepa.config import Config
from sparsejepa.data import cache, scenes, shapes
from sparsejepa.data.cache import Source
from sparsejepa.data.corrupt import corrupt
from sparsejepa.data.decode import EXTENSIONS, Block, size_pair
from sparsejepa.data.factors import chosen
from sparsejepa.data.facts import class_counts, measure, one_sided, size_problem
from sparsejepa.data.folders import read_folder, split_folders
from sparsejepa.data.hub import fetch, find_copy, list_hub, local_shards, read_hub
from sparsejepa.data.official import CLEVR_REPO, OFFICIAL, count_objects, read_official
from sparsejepa.data.sources import Listing, as_source, choose_splits
from sparsejepa.data.store import ImageSet, Target
from sparsejepa.data.stream import SAMPLE, ImageStream, open_images, open_stream
from sparsejepa.data.tables import find_table
from sparsejepa.data.tars import is_tars, list_tars, tar_splits
from sparsejepa.errors import SizesDiffer, UserError, nearest

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
    img_size: int | tuple[int, int] | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    upscale: bool = False,
    truth: bool = False,
    factors: Sequence[str] = (),
    max_unreadable: float = 0.5,
) -> ImageSet:
    """Return one split of a data set, decoded, with labels.

    Mean and standard deviation are those of the training split, whichever is asked for.

    Arguments:
        name: a name of the catalog, hub:OWNER/NAME[/CONFIG], or a folder.
        split: train or test.
        img_size: one number, or height and width; by default the images' own size, if they all
            have one.
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
        max_unreadable: largest share of images that may be left out because they cannot be read.

    Raises UserError: unknown name, missing or empty folder, data that is neither local nor to be
    had from the hub, images of several sizes or too small, too many unreadable ones, no space for
    the cache; a factor that is unknown, incomplete or constant; masks that do not fit their images.
    """
    _check_split(split)
    img_size = size_pair(img_size)
    sources = find_sources(str(name), data_root, img_size, factors)
    folder = cache_folder(cache_dir)
    train = images = cache.load(sources["train"], folder, img_size, upscale, max_unreadable)
    if split == "test":
        images = cache.load(sources["test"], folder, img_size, upscale, max_unreadable)
        if images.img_size != train.img_size:
            train_size, test_size = ("x".join(map(str, s.img_size)) for s in (train, images))
            raise SizesDiffer(
                f"{name}: training images have {train_size} pixels and test images {test_size}; "
                "set --img-size (img_size= in Python)"
            )
        images = replace(images, mean=train.mean, std=train.std)
    if factors and name in SCENES:  # their targets are all there is: no need to render them again
        names = chosen(factors, list(images.targets), str(name))
        images = replace(images, targets={key: images.targets[key] for key in names})
    read_masks = sources[split].masks
    return replace(images, masks=read_masks(images)) if truth and read_masks else images


def stream_dataset(
    name: str | Path,
    split: str = "train",
    *,
    img_size: int | tuple[int, int] | None = None,
    data_root: Path | None = None,
    upscale: bool = False,
    factors: Sequence[str] = (),
    max_unreadable: float = 0.5,
) -> ImageStream:
    """Return one split of a data set that is decoded while it is read.

    Arguments and errors are those of `load_dataset`; mean and standard deviation are estimates.
    Raises UserError as well for the built-in scenes, which are not stored anywhere.
    """
    _check_split(split)
    img_size = size_pair(img_size)
    listings = find_listings(str(name), data_root, factors)
    return open_stream(
        listings["train"], listings[split], img_size, upscale=upscale, max_unreadable=max_unreadable
    )


def only_streamed(name: str) -> bool:
    """Whether training on a data set streams it unasked: shards are made for that."""
    path = os.path.expanduser(name)
    return is_tars(path) or (os.path.isdir(path) and _kind(path) == "tar")


def find_sources(
    name: str,
    data_root: Path | None = None,
    img_size: tuple[int, int] | None = None,
    factors: Sequence[str] = (),
) -> dict[str, Source]:
    """Return the train and test source of a data set. Raises UserError as `load_dataset`."""
    if name in SCENES:
        return _scene_sources(name, img_size)
    place = _find(name, data_folder(data_root))
    if place.kind == "parquet":
        folder = place.path or fetch(place.repo, place.config)
        if name != "clevr-count":
            return read_hub(folder, place.name, place.config, factors)
        return count_objects(read_hub(folder, place.name, place.config), factors)
    return {split: as_source(found) for split, found in _list_files(place, factors).items()}


def find_listings(
    name: str, data_root: Path | None = None, factors: Sequence[str] = ()
) -> dict[str, Listing]:
    """Return the train and test images of a data set as they are to be streamed.

    Raises UserError as `load_dataset`, and for the built-in scenes.
    """
    if name in SCENES:
        raise UserError(f"--stream: the images of {name} are drawn, not read; leave it out")
    place = _find(name, data_folder(data_root))
    if place.kind == "parquet":
        if name == "clevr-count":
            raise UserError(f"--stream: {name} of the hub is small; leave it out")
        return list_hub(place.path, place.repo, place.name, place.config, factors)
    return _list_files(place, factors)


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
                kind = _kind(str(folder), images_first=False)
                about = {"parquet": "parquet files", "tar": "tar shards"}
                splits = tar_splits(folder) if kind == "tar" else _splits(folder, None)
                plain.append(
                    DatasetRow(
                        folder.name, about.get(kind, "folder of images"), str(folder), splits
                    )
                )
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
    img_size: int | tuple[int, int] | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    upscale: bool = False,
    stream: bool = False,
) -> dict[str, Any]:
    """Decode a data set and return what it holds, as plain values. Raises as `load_dataset`.

    Not for the sizes of files: images that are too small, or of several sizes without `img_size`,
    are counted and not decoded, and `notes` says what to do; mean, std and fingerprints are None.
    With `stream` only a sample and one batch are decoded: mean and std are estimates, `skipped`
    has what was met, and `first_batch_seconds` says how long it took until that batch was there.
    """
    result: dict[str, Any] = {"name": str(name), "splits": {}, "notes": []}
    common: dict[str, Any] = {"data_root": data_root, "upscale": upscale}
    img_size = common["img_size"] = size_pair(img_size)
    listings = _listed(str(name), data_root)
    sizes = measure(list(listings.values()), img_size, SAMPLE if stream else None)
    problem = size_problem(sizes, img_size, upscale)
    if listings and not len(listings["test"].rows) and len(listings["train"].rows) == 1:
        raise UserError(f"{name}: 1 image: too few to train on; add some")
    if sizes is not None:
        result["sizes"] = {"smallest": list(sizes.smallest), "largest": list(sizes.largest)}
    if listings and listings["test"].about:
        result["test_split"] = listings["test"].about
    counts = {}
    for split in ("train", "test"):
        began = time.perf_counter()
        if problem:
            images = listings[split]
            length, skipped = len(images.rows), images.unusable
        elif stream:
            images = stream_dataset(name, split, **common)
            length, skipped = len(images), images.skipped
        else:
            images = load_dataset(name, split, cache_dir=cache_dir, **common)
            length, skipped = len(images), images.skipped
        counts[split] = class_counts(images.targets)
        facts = {
            "images": length,
            "targets": {key: len(target.names) for key, target in images.targets.items()},
            "classes": counts[split],
            "skipped": [list(entry) for entry in skipped],
            "fingerprint": None if isinstance(images, Listing) else images.fingerprint,
        }
        if isinstance(images, ImageStream):
            batches = open_images(images, "cpu").batches([torch.arange(min(64, len(images)))])
            next(iter(batches))
            facts["first_batch_seconds"] = time.perf_counter() - began
        result["splits"][split] = facts
        if isinstance(images, Listing):
            result |= {"img_size": img_size and list(img_size), "mean": None, "std": None}
        else:
            result |= {
                "img_size": list(images.img_size),
                "mean": list(images.mean),
                "std": list(images.std),
            }
    result["notes"] = [*([problem] if problem else []), *one_sided(counts)]
    return result


def _listed(name: str, data_root: Path | None) -> dict[str, Listing]:
    """Return the splits of a data set whose images lie in files or tars; empty for others."""
    if name in SCENES:
        return {}
    place = _find(name, data_folder(data_root))
    return {} if place.kind == "parquet" else _list_files(place, ())


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


class _Place(NamedTuple):
    """Where a data set lies, and as what."""

    kind: Literal["folder", "official", "parquet", "tar"]
    name: str
    path: Path | None
    """None for a data set of the hub that is not here."""
    repo: str = ""
    config: str | None = None


def _find(name: str, root: Path | None) -> _Place:
    if name in HUB:
        return _hub_place(name, *HUB[name], root)
    if name in OFFICIAL:
        return _official_place(name, root)
    if name.startswith("hub:"):
        owner, _, rest = name.removeprefix("hub:").partition("/")
        repo, _, config = rest.partition("/")
        # Not '..' either: the name is looked for below the data root.
        if not all(re.fullmatch(r"[\w.-]*\w[\w.-]*", part) for part in (owner, repo)):
            raise UserError(f"{name}: write hub:OWNER/NAME or hub:OWNER/NAME/CONFIG")
        return _hub_place(name, f"{owner}/{repo}", config or None, root)
    path = os.path.expanduser(name)  # unlike pathlib's, these never raise
    if is_tars(path):
        return _Place("tar", Path(path).name.partition("{")[0].strip("-.") or "tars", Path(path))
    if os.path.exists(path):
        return _Place(_kind(path), Path(path).resolve().name, Path(path))
    if name and root is not None and os.path.isdir(root / name):
        return _copy_place(root / name, name)
    if re.fullmatch(r"[\w-]+/[\w.-]+", name):
        raise UserError(f"{name}: no such folder; for a data set of the hub write hub:{name}")
    if re.search(r"[/\\]|^[.~]", name):
        raise UserError(f"{name}: no such folder")
    known = [row.name for row in list_datasets(root)]
    raise UserError(
        f"unknown data set '{name}'{nearest(name, known)}; there are {', '.join(known)}, "
        "hub:OWNER/NAME, and folders of images"
    )


def _hub_place(name: str, repo: str, config: str | None, root: Path | None) -> _Place:
    copy = find_copy(repo, root)
    if copy is not None:
        return _copy_place(copy, name, repo, config)
    return _Place("parquet", name, None, repo, config)


def _official_place(name: str, root: Path | None) -> _Place:
    if root is not None and (root / name).is_dir():
        return _Place("official", name, root / name)
    if name == "clevr-count":
        return _hub_place(name, CLEVR_REPO, None, root)
    raise UserError(
        f"{name}: not in the data root; make a folder DIR/{name} with the official files "
        f"({OFFICIAL[name]}) and set --data-root DIR (or SPARSEJEPA_DATA)"
    )


def _copy_place(folder: Path, name: str, repo: str = "", config: str | None = None) -> _Place:
    """A copy in the data root: parquet files come before images, which may illustrate them."""
    kind = _kind(str(folder), images_first=False)
    return _Place(kind, name, folder, repo, config)


def _list_files(place: _Place, factors: Sequence[str]) -> dict[str, Listing]:
    assert place.path is not None
    if place.kind == "tar":
        return list_tars(str(place.path), place.name, factors)
    if place.kind == "official":
        return read_official(place.name, place.path, factors)
    if place.name == "clevr-count":  # image files where the hub's copy belongs
        raise UserError(
            f"{place.path}: hub:{CLEVR_REPO} has a column label_count with 8 classes, and this "
            "copy has not; fetch it again"
        )
    return read_folder(place.path, place.name, factors)


def _kind(folder: str, images_first: bool = True) -> Literal["folder", "parquet", "tar"]:
    """Tell image files, parquet files and tar shards apart; the first image may decide."""
    if find_table(Path(folder)):
        return "folder"
    found = set()
    for name in _file_names(folder):
        if images_first and name.endswith(EXTENSIONS):
            return "folder"
        found.add(os.path.splitext(name)[1])
    if ".parquet" in found:
        return "parquet"
    return "tar" if ".tar" in found and found.isdisjoint(EXTENSIONS) else "folder"


def _file_names(folder: str) -> Iterator[str]:
    """Yield the names of the files below a folder, in lower case."""
    waiting = [folder]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    yield entry.name.lower()


def _official_row(name: str, root: Path | None) -> DatasetRow:
    about = f"official files in {root or 'DIR'}/{name}: {OFFICIAL[name]}"
    copy = root / name if root is not None and (root / name).is_dir() else None
    if name == "clevr-count":
        about = f"hub:{CLEVR_REPO}, or {about}"
        copy = copy or find_copy(CLEVR_REPO, root)
    return DatasetRow(name, about, str(copy or ""), tuple(SCENE_COUNTS))


def _check_split(split: str) -> None:
    if split not in SCENE_COUNTS:
        raise UserError(f"split '{split}': there are train and test{nearest(split, SCENE_COUNTS)}")


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


def load_images(config: Config) -> ImageSet | ImageStream:
    """Load the training images of a run, or open their stream, as its settings say.

    Raises UserError as `load_dataset`, and if the images do not suit the settings.
    """
    wanted = config.images
    streamed = wanted.stream or only_streamed(config.data)
    if streamed and wanted.corruption != "none":
        raise UserError(
            f"--corruption {wanted.corruption}: not for streamed images; leave out --stream"
        )
    image_set = (stream_dataset if streamed else load_dataset)(
        config.data,
        "train",
        img_size=(wanted.img_size[0], wanted.img_size[-1]) if wanted.img_size else None,
        data_root=wanted.data_root,
        upscale=wanted.upscale,
    )
    if wanted.holdout:
        image_set, _ = image_set.split_off(wanted.holdout)
    if wanted.limit is not None and wanted.limit < len(image_set):
        image_set = image_set.subset(wanted.limit, 0)
    if wanted.corruption != "none" and isinstance(image_set, ImageSet):
        config.check_image(image_set.img_size)
        image_set = corrupt(
            image_set,
            wanted.corruption,
            seed=0,
            patch_size=config.model.patch_size,
            cache_dir=cache_folder(None),
        )
    return image_set
