"""Every data set by name: built-in scenes, data sets of the hub, and one's own folders.

scenes, scenes:single        made on the spot
cifar100, cifar10, svhn      from the data root, or fetched from the hub
hub:OWNER/NAME[/CONFIG]      any data set of the hub whose files are parquet
PATH                         any folder of images, of tar shards (also FILE.tar, x-{000..012}.tar),
                             or of a hub data set's parquet files; also a folder's name inside the
                             data root

A name above comes before a folder of the same name: write ./cifar100 for the folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparsejepa.config import Config
from sparsejepa.data.folders import Listing, chosen, find_table, read_folder
from sparsejepa.data.hub import fetch, find_copy, list_hub
from sparsejepa.data.images import (
    EXTENSIONS,
    Decoded,
    Images,
    ImageSet,
    Source,
    Target,
    load,
    size_pair,
)
from sparsejepa.data.scenes import SCENE_COUNTS, SCENES, scene_sources
from sparsejepa.data.stream import ImageStream, open_stream
from sparsejepa.data.tars import is_tars, list_tars
from sparsejepa.errors import SizesDiffer, UserError, nearest
from sparsejepa.rng import derive_seed

HUB: dict[str, tuple[str, str | None]] = {
    "cifar100": ("uoft-cs/cifar100", "cifar100"),
    "cifar10": ("uoft-cs/cifar10", "plain_text"),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
}
"""Name: data set of the hub and its configuration."""


@dataclass(frozen=True)
class DatasetRow:
    """One line of the list of data sets."""

    name: str
    source: str
    found: str
    """Where it lies; "" if it would have to be fetched."""


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
) -> ImageSet:
    """Return one split of a data set, decoded, with labels.

    Mean and standard deviation are those of the training split, whichever is asked for.

    Arguments:
        name: a name of the catalog, hub:OWNER/NAME[/CONFIG], or a folder.
        split: train or test.
        img_size: one number, or height and width; by default the images' own size, if they all
            have one.
        data_root: folder with local copies (default: SPARSEJEPA_DATA).
        cache_dir: where images are kept (default: SPARSEJEPA_CACHE, or ~/.cache/sparsejepa).
        upscale: enlarge images that are smaller than `img_size` instead of refusing them.
        truth: read or render object masks, where there are any: built-in scenes, and folders with
            masks/ beside images/.
        factors: names of columns that become the targets, in this order, instead of those that
            look like labels. Any column of numbers or text will do, and lists of one length;
            numbers with many values are cut into bins (`Target.note`). Which images are train and
            which are test does not depend on it.

    Raises UserError: unknown name, missing or empty folder, data that is neither local nor to be
    had from the hub, images of several sizes or too small, over half unreadable, no space for
    the cache; a factor that is unknown, incomplete or constant; masks that do not fit their images.
    """
    _check_split(split)
    img_size, folder = size_pair(img_size), cache_folder(cache_dir)
    sources = find_sources(str(name), data_root, folder, img_size, factors)
    train = images = load(sources["train"], folder, img_size, upscale)
    if split == "test":
        images = load(sources["test"], folder, img_size, upscale)
        if images.img_size != train.img_size:
            train_size, test_size = ("x".join(map(str, s.img_size)) for s in (train, images))
            raise SizesDiffer(
                f"{name}: training images have {train_size} pixels and test images {test_size}; "
                "set --img-size (img_size= in Python)"
            )
        images = replace(images, mean=train.mean, std=train.std)
    return replace(images, masks=sources[split].masks(images)) if truth else images


def stream_dataset(
    name: str | Path,
    split: str = "train",
    *,
    img_size: int | tuple[int, int] | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    upscale: bool = False,
    factors: Sequence[str] = (),
) -> ImageStream:
    """Return one split of a data set that is decoded while it is read.

    Arguments and errors are those of `load_dataset`; mean and standard deviation are estimates. Of
    a data set of the hub the encoded images are copied into the cache. Raises UserError as well for
    the built-in scenes, which are not stored anywhere.
    """
    _check_split(split)
    if name in SCENES:
        raise UserError(f"--stream: the images of {name} are drawn, not read; leave it out")
    listings = find_listings(str(name), data_root, cache_folder(cache_dir), factors)
    return open_stream(listings["train"], listings[split], size_pair(img_size), upscale=upscale)


def load_images(config: Config) -> Images:
    """Load the training images of a run, or open their stream, as its settings say.

    Raises UserError as `load_dataset`, and if the images do not suit the settings.
    """
    wanted = config.images
    streamed = wanted.stream or only_streamed(config.data)
    if streamed and wanted.corruption != "none":
        raise UserError(
            f"--corruption {wanted.corruption}: not for streamed images; leave out --stream"
        )
    size = (wanted.img_size[0], wanted.img_size[-1]) if wanted.img_size else None
    read = stream_dataset if streamed else load_dataset
    image_set: Images = read(
        config.data, img_size=size, data_root=wanted.data_root, upscale=wanted.upscale
    )
    if wanted.holdout:
        image_set, _ = image_set.split_off(wanted.holdout)
    image_set = image_set.subset(wanted.limit)
    if wanted.corruption != "none" and isinstance(image_set, ImageSet):
        config.check_image(image_set.img_size)
        patch_size, folder = config.model.patch_size, cache_folder(None)
        image_set = corrupt(image_set, wanted.corruption, patch_size=patch_size, cache_dir=folder)
    return image_set


@dataclass(frozen=True, eq=False)
class _Corrupted(Source):
    """A set's images in place of which noise comes, or their own patches in another order."""

    images: ImageSet = field(kw_only=True)
    kind: str = field(kw_only=True)
    patch_size: int = field(kw_only=True)

    def stamp(self) -> str:
        moments = [self.images.mean, self.images.std]
        about = moments if self.kind == "noise" else self.patch_size
        return json.dumps([self.kind, self.images.fingerprint, about])

    def read(self, img_size: tuple[int, int] | None, upscale: bool) -> Iterator[Decoded]:
        return (("", self._draw(position)) for position in range(len(self.images)))

    def _draw(self, position: int) -> np.ndarray:
        rng = np.random.default_rng(derive_seed(0, position, self.kind))
        image, side = self.images.images[position], self.patch_size
        if self.kind == "noise":
            mean, std = (np.asarray(x, np.float32) for x in (self.images.mean, self.images.std))
            pixels = rng.standard_normal(image.shape, np.float32) * std + mean
            return np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8)
        height, width = image.shape[0] // side, image.shape[1] // side
        patches = image.reshape(height, side, width, side, 3).swapaxes(1, 2)
        patches = patches.reshape(-1, side, side, 3)[rng.permutation(height * width)]
        return patches.reshape(height, width, side, side, 3).swapaxes(1, 2).reshape(image.shape)


def corrupt(
    image_set: ImageSet,
    corruption: Literal["noise", "shuffle"],
    *,
    patch_size: int,
    cache_dir: Path,
) -> ImageSet:
    """Return the set with other images under the same labels: a control of what pretraining learns.

    noise: independent normal pixels with the set's mean and standard deviation, clipped to 0..255;
    shuffle: each image's patches, of a size that divides it, in an order of its own. Each image has
    a generator keyed on its position. Mean and standard deviation stay those of the true images, on
    which the encoder is used later. The result is kept in the cache.

    Raises UserError when the cache folder cannot be written.
    """
    name, split, targets = f"{image_set.name}-{corruption}", image_set.split, image_set.targets
    source = _Corrupted(
        name, split, targets, "", images=image_set, kind=corruption, patch_size=patch_size
    )
    drawn = load(source, cache_dir, None, False)
    return replace(image_set, images=drawn.images, fingerprint=drawn.fingerprint, masks=None)


def only_streamed(name: str) -> bool:
    """Whether training on a data set streams it unasked: shards are made for that."""
    path = os.path.expanduser(name)
    return is_tars(path) or (os.path.isdir(path) and _kind(path) == "tar")


def find_sources(
    name: str,
    data_root: Path | None,
    cache: Path,
    img_size: tuple[int, int] | None = None,
    factors: Sequence[str] = (),
) -> Mapping[str, Source]:
    """Return the train and test source of a data set. Raises UserError as `load_dataset`."""
    if name not in SCENES:
        return find_listings(name, data_root, cache, factors)
    sources = scene_sources(name, img_size)
    known = list(sources["train"].targets)
    keys = chosen(factors, known, name) if factors else known
    return {
        split: replace(source, targets={key: source.targets[key] for key in keys})
        for split, source in sources.items()
    }


def find_listings(
    name: str, data_root: Path | None, cache: Path, factors: Sequence[str] = ()
) -> dict[str, Listing]:
    """Return the train and test images of a data set that lies in files.

    Raises UserError as `load_dataset`.
    """
    root, path = data_folder(data_root), os.path.expanduser(name)  # unlike pathlib's, never raises
    if name in HUB or name.startswith("hub:"):
        repo, config = HUB.get(name) or _hub_name(name)
        folder = find_copy(repo, root) or fetch(repo, config)
        return _list_folder(folder, name, cache, factors, config, copy=True)
    if is_tars(path):
        return list_tars(path, Path(path).name.partition("{")[0].strip("-.") or "tars", factors)
    if os.path.exists(path):
        own = Path(path).resolve().name
        return _list_folder(Path(path), own, cache, factors, None, copy=False)
    if name and root is not None and os.path.isdir(root / name):
        return _list_folder(root / name, name, cache, factors, None, copy=True)
    if re.fullmatch(r"[\w-]+/[\w.-]+", name):
        raise UserError(f"{name}: no such folder; for a data set of the hub write hub:{name}")
    if re.search(r"[/\\]|^[.~]", name):
        raise UserError(f"{name}: no such folder")
    known = [row.name for row in list_datasets(root)]
    raise UserError(
        f"unknown data set '{name}'{nearest(name, known)}; there are {', '.join(known)}, "
        "hub:OWNER/NAME, and folders of images"
    )


def _hub_name(name: str) -> tuple[str, str | None]:
    owner, _, rest = name.removeprefix("hub:").partition("/")
    repo, _, config = rest.partition("/")
    # Not '..' either: the name is looked for below the data root.
    if not all(re.fullmatch(r"[\w.-]*\w[\w.-]*", part) for part in (owner, repo)):
        raise UserError(f"{name}: write hub:OWNER/NAME or hub:OWNER/NAME/CONFIG")
    return f"{owner}/{repo}", config or None


def _list_folder(
    folder: Path, name: str, cache: Path, factors: Sequence[str], config: str | None, *, copy: bool
) -> dict[str, Listing]:
    """List a folder; in a copy of a hub data set there may be images beside parquet files."""
    kind = _kind(str(folder), images_first=not copy)
    if kind == "parquet":
        return list_hub(folder, name, config, cache, factors)
    return (list_tars if kind == "tar" else read_folder)(folder, name, factors)


def list_datasets(data_root: Path | None = None) -> list[DatasetRow]:
    """Return the data sets of the catalog and those that lie in the data root."""
    root = data_folder(data_root)
    rows = [DatasetRow(name, about, "built in") for name, about in SCENES.items()]
    repos, plain = {name: repo for name, (repo, _) in HUB.items()}, []
    folders = [] if root is None else [p for p in root.iterdir() if p.is_dir()]
    for folder in sorted(folder for folder in folders if not folder.name.startswith(".")):
        if folder.name.startswith("datasets--"):  # the hub's cache
            found = {"/".join(folder.name.split("--")[1:])}
        else:  # OWNER/NAME/CONFIG/SPLIT-....parquet
            found = {f"{folder.name}/{p.parts[-3]}" for p in folder.glob("*/*/*.parquet")}
        known = set(repos.values())
        repos |= {f"hub:{repo}": repo for repo in sorted(found - known)}
        if not found and not any(repo.endswith(f"/{folder.name}") for repo in known):
            plain.append(DatasetRow(folder.name, "folder in the data root", str(folder)))
    for name, repo in repos.items():
        rows.append(DatasetRow(name, f"hub:{repo}", str(find_copy(repo, root) or "")))
    return rows + plain


def describe(
    name: str | Path,
    *,
    img_size: int | tuple[int, int] | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    upscale: bool = False,
) -> dict[str, Any]:
    """Decode a data set and return what it holds, as plain values. Raises as `load_dataset`."""
    common: dict[str, Any] = {"img_size": img_size, "data_root": data_root, "cache_dir": cache_dir}
    found = {s: load_dataset(name, s, upscale=upscale, **common) for s in ("train", "test")}
    train = found["train"]
    result: dict[str, Any] = {"name": str(name), "splits": {}, "img_size": list(train.img_size)}
    result |= {"mean": list(train.mean), "std": list(train.std)}
    for split, images in found.items():
        result["splits"][split] = {
            "images": len(images),
            "targets": {key: len(target.names) for key, target in images.targets.items()},
            "classes": {key: _counts(target) for key, target in images.targets.items()},
            "skipped": [list(entry) for entry in images.skipped],
            "fingerprint": images.fingerprint,
        }
    sources = find_sources(str(name), data_root, cache_folder(cache_dir))
    return result | ({"test_split": about} if (about := sources["test"].about) else {})


def _counts(target: Target) -> dict[str, int]:
    """Return how many images of each class there are; classes without any left out."""
    counts = np.bincount(target.values, minlength=len(target.names)).tolist()
    return {name: count for name, count in zip(target.names, counts, strict=True) if count}


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


def _kind(folder: str, images_first: bool = True) -> str:
    """Tell image files, parquet files and tar shards apart; the first image may decide."""
    if find_table(Path(folder)):
        return "folder"
    found = set()
    for _, _, files in os.walk(folder):
        for name in map(str.lower, files):
            if images_first and name.endswith(EXTENSIONS):
                return "folder"
            found.add(os.path.splitext(name)[1])
    if ".parquet" in found:
        return "parquet"
    return "tar" if ".tar" in found and found.isdisjoint(EXTENSIONS) else "folder"


def _check_split(split: str) -> None:
    if split not in SCENE_COUNTS:
        raise UserError(f"split '{split}': there are train and test{nearest(split, SCENE_COUNTS)}")
