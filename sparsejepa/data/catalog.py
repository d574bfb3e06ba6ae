"""Every data set by name: built-in scenes, data sets of the hub, and one's own folders.

scenes, scenes:single        made on the spot
cifar100, cifar10, svhn      from the data root, or fetched from the hub
imagenet, places365,
clevr-count                  what torchvision.datasets reads, from a folder of that name in the
                             data root
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sparsejepa.config import Config
from sparsejepa.data.folders import (
    Files,
    Listing,
    as_source,
    chosen,
    find_table,
    read_folder,
)
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

TORCHVISION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "imagenet": ("ImageNet", {"split": "train"}, {"split": "val"}),
    "places365": (
        "Places365",
        {"split": "train-standard", "small": True},
        {"split": "val", "small": True},
    ),
    "clevr-count": ("CLEVRClassification", {"split": "train"}, {"split": "val"}),
}
"""Name, which is that of a folder in the data root: the class of torchvision.datasets that reads
it, and its arguments for train and test."""


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
    had from the hub, images of several sizes or too small, over half unreadable, no space for
    the cache; a factor that is unknown, incomplete or constant; masks that do not fit their images.
    """
    _check_split(split)
    img_size, folder = size_pair(img_size), cache_folder(cache_dir)
    sources = find_sources(str(name), data_root, img_size, factors)
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
) -> ImageStream:
    """Return one split of a data set that is decoded while it is read.

    Arguments and errors are those of `load_dataset`; mean and standard deviation are estimates.
    Raises UserError as well for the built-in scenes, which are not stored anywhere.
    """
    _check_split(split)
    listings = find_listings(str(name), data_root, factors)
    return open_stream(
        listings["train"],
        listings[split],
        size_pair(img_size),
        upscale=upscale,
    )


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
    image_set: Images = (stream_dataset if streamed else load_dataset)(
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
        patch_size, folder = config.model.patch_size, cache_folder(None)
        image_set = corrupt(image_set, wanted.corruption, patch_size=patch_size, cache_dir=folder)
    return image_set


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
    mean, std = (np.asarray(x, np.float32) for x in (image_set.mean, image_set.std))

    def draw(position: int) -> np.ndarray:
        rng = np.random.default_rng(derive_seed(0, position, corruption))
        image = image_set.images[position]
        if corruption == "noise":
            pixels = rng.standard_normal(image.shape, np.float32) * std + mean
            return np.clip(np.rint(255 * pixels), 0, 255).astype(np.uint8)
        height, width, side = image.shape[0] // patch_size, image.shape[1] // patch_size, patch_size
        patches = image.reshape(height, side, width, side, 3).swapaxes(1, 2)
        patches = patches.reshape(-1, side, side, 3)[rng.permutation(height * width)]
        return patches.reshape(height, width, side, side, 3).swapaxes(1, 2).reshape(image.shape)

    def read(*_: object) -> Iterator[list[Decoded]]:
        for position in range(len(image_set)):
            yield [("", draw(position))]

    about = [image_set.mean, image_set.std] if corruption == "noise" else patch_size
    stamp = json.dumps([corruption, image_set.fingerprint, about])
    name = f"{image_set.name}-{corruption}"
    source = Source(name, image_set.split, stamp, read, image_set.targets)
    drawn = load(source, cache_dir, None, False)
    return replace(image_set, images=drawn.images, fingerprint=drawn.fingerprint, masks=None)


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
        sources = scene_sources(name, img_size)
        if factors:
            keys = chosen(factors, list(sources["train"].targets), name)
            sources = {
                split: replace(source, targets={key: source.targets[key] for key in keys})
                for split, source in sources.items()
            }
        return sources
    listings = find_listings(name, data_root, factors)
    return {split: as_source(found) for split, found in listings.items()}


def find_listings(
    name: str, data_root: Path | None = None, factors: Sequence[str] = ()
) -> dict[str, Listing]:
    """Return the train and test images of a data set as they are to be streamed.

    Raises UserError as `load_dataset`, and for the built-in scenes.
    """
    if name in SCENES:
        raise UserError(f"--stream: the images of {name} are drawn, not read; leave it out")
    return _list(_find(name, data_folder(data_root)), factors)


def list_datasets(data_root: Path | None = None) -> list[DatasetRow]:
    """Return the data sets of the catalog and those that lie in the data root."""
    root = data_folder(data_root)
    rows = [DatasetRow(name, about, "built in") for name, about in SCENES.items()]
    repos, plain = dict(HUB), []
    folders = [] if root is None else [p for p in root.iterdir() if p.is_dir()]
    for folder in sorted(folder for folder in folders if not folder.name.startswith(".")):
        if folder.name.startswith("datasets--"):  # the hub's cache
            found = {"/".join(folder.name.split("--")[1:])}
        else:  # OWNER/NAME/CONFIG/SPLIT-....parquet
            found = {f"{folder.name}/{p.parts[-3]}" for p in folder.glob("*/*/*.parquet")}
        known = {repo for repo, _ in repos.values()}
        repos |= {f"hub:{repo}": (repo, None) for repo in sorted(found - known)}
        is_copy = found or any(repo.endswith(f"/{folder.name}") for repo in known)
        if not is_copy and folder.name not in TORCHVISION:
            plain.append(DatasetRow(folder.name, "folder in the data root", str(folder)))
    for name, (repo, _) in repos.items():
        rows.append(DatasetRow(name, f"hub:{repo}", str(find_copy(repo, root) or "")))
    for name, (kind, *_) in TORCHVISION.items():
        copy = root / name if root is not None and (root / name).is_dir() else ""
        rows.append(DatasetRow(name, f"torchvision.datasets.{kind} in DIR/{name}", str(copy)))
    return rows + plain


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

    With `stream` only a sample is decoded: mean and std are estimates, `skipped` has what was met.
    """
    result: dict[str, Any] = {"name": str(name), "splits": {}}
    common: dict[str, Any] = {"img_size": img_size, "data_root": data_root, "upscale": upscale}
    for split in ("train", "test"):
        if stream:
            images: Images = stream_dataset(name, split, **common)
        else:
            images = load_dataset(name, split, cache_dir=cache_dir, **common)
        result |= {
            "img_size": list(images.img_size),
            "mean": list(images.mean),
            "std": list(images.std),
        }
        result["splits"][split] = {
            "images": len(images),
            "targets": {key: len(target.names) for key, target in images.targets.items()},
            "classes": {key: _counts(target) for key, target in images.targets.items()},
            "skipped": [list(entry) for entry in images.skipped],
            "fingerprint": images.fingerprint,
        }
    if str(name) not in SCENES:
        found = find_listings(str(name), data_root)["test"]
        result |= {"test_split": found.about} if found.about else {}
    return result


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


class _Place(NamedTuple):
    """Where a data set lies, and as what."""

    kind: Literal["folder", "torchvision", "parquet", "tar"]
    name: str
    path: Path | None
    """None for a data set of the hub that is not here."""
    repo: str = ""
    config: str | None = None


def _find(name: str, root: Path | None) -> _Place:
    if name in HUB:
        return _hub_place(name, *HUB[name], root)
    if name in TORCHVISION:
        if root is not None and (root / name).is_dir():
            return _Place("torchvision", name, root / name)
        raise UserError(
            f"{name}: not in the data root; make a folder DIR/{name} as torchvision.datasets."
            f"{TORCHVISION[name][0]} reads it, and set --data-root DIR (or SPARSEJEPA_DATA)"
        )
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


def _copy_place(folder: Path, name: str, repo: str = "", config: str | None = None) -> _Place:
    """A copy in the data root: parquet files come before images, which may illustrate them."""
    return _Place(_kind(str(folder), images_first=False), name, folder, repo, config)


def _list(place: _Place, factors: Sequence[str]) -> dict[str, Listing]:
    if place.kind == "parquet":
        folder = place.path or fetch(place.repo, place.config)
        return list_hub(folder, place.name, place.config, factors)
    assert place.path is not None
    if place.kind == "tar":
        return list_tars(str(place.path), place.name, factors)
    if place.kind == "torchvision":
        return _list_torchvision(place.name, place.path, factors)
    return read_folder(place.path, place.name, factors)


def _list_torchvision(name: str, root: Path, factors: Sequence[str]) -> dict[str, Listing]:
    """List what torchvision finds in a folder; nothing is fetched.

    Raises UserError when it finds nothing, and for factors that are no target.
    """
    import torchvision.datasets  # takes a second, and hardly anybody asks for these

    kind, *arguments = TORCHVISION[name]
    listings: dict[str, Listing] = {}
    for split, own in zip(("train", "test"), arguments, strict=True):
        try:
            paths, targets = _named(getattr(torchvision.datasets, kind)(str(root), **own))
        except Exception as error:  # each class has its own ways to fail
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{root}: not as torchvision.datasets.{kind} reads it ({reason}); its "
                "documentation says which files belong there (a path in place of the name reads a "
                "plain folder)"
            ) from None
        if factors:
            targets = {key: targets[key] for key in chosen(factors, list(targets), str(root))}
        files = Files(root, (os.fsencode(os.path.relpath(path, root)) for path in paths))
        rows = np.arange(len(files))
        listings[split] = Listing(name, split, str(root), files, rows, targets)
    return listings


def _named(data: Any) -> tuple[list[str], dict[str, Target]]:
    """Return paths and targets of one of the classes of `TORCHVISION`."""
    kind = type(data).__name__
    if kind == "CLEVRClassification":  # VTAB's CLEVR/Count: 3 to 10 objects
        counts = tuple(map(str, range(3, 11)))
        return data._image_files, {"count": Target(np.array(data._labels, np.int64) - 3, counts)}
    labels = np.array([label for _, label in data.imgs], np.int64)
    if kind == "ImageNet":
        classes, key = [names[0] for names in data.classes], "class"
        # Two classes are both called crane.
        classes = [
            name if classes.count(name) == 1 else f"{name} ({number})"
            for name, number in zip(classes, data.wnids, strict=True)
        ]
    else:
        classes, key = [name[3:] for name in data.classes], "scene"  # without the "/a/"
    return [path for path, _ in data.imgs], {key: Target(labels, tuple(classes))}


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
    for _, _, files in os.walk(folder):
        yield from map(str.lower, files)


def _check_split(split: str) -> None:
    if split not in SCENE_COUNTS:
        raise UserError(f"split '{split}': there are train and test{nearest(split, SCENE_COUNTS)}")
