"""Large labelled sets in the layout of their official releases, which one gets by oneself.

Lists in the release name the images and their labels; a listed image that is missing is left out
and reported like one that cannot be read. The official validation images serve as test.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejepa.data.cache import Source
from sparsejepa.data.decode import Block, shown
from sparsejepa.data.factors import chosen
from sparsejepa.data.folders import scan
from sparsejepa.data.readers import Files, Names
from sparsejepa.data.sources import Listing, index_target
from sparsejepa.data.store import Target
from sparsejepa.errors import UserError

CLEVR_REPO = "dpdl-benchmark/clevr"
"""CLEVR on the hub: the official train and val images with their number of objects."""

OFFICIAL = {
    "inaturalist2018": "train_val2018/, train2018.json, val2018.json and, for the names of the "
    "species, categories.json",
    "places365": "places365_train_standard.txt, places365_val.txt, categories_places365.txt, "
    "data_256_standard/ and val_256/ (or data_large_standard/ and val_large/)",
    "imagenet": "train/ and val/ with a folder for each of the 1,000 classes (n01440764/ and so "
    "on), or Kaggle's ILSVRC/, LOC_synset_mapping.txt and LOC_val_solution.csv",
    "clevr-count": "CLEVR_v1.0/",
}
"""Name, which is that of a folder in the data root, and what belongs into that folder."""

_COUNTS = tuple(map(str, range(3, 11)))  # objects in a scene of CLEVR, the classes of VTAB's task


class _Found(NamedTuple):
    """One split as the release lists it."""

    folder: Path
    names: Names
    """Of the files, relative to the folder; not all need be there."""
    targets: dict[str, Target]
    unusable: tuple[tuple[str, str], ...] = ()
    """(file, reason) of images without a label."""


def read_official(name: str, folder: Path, factors: Sequence[str] = ()) -> dict[str, Listing]:
    """List one of `OFFICIAL` from its folder; with `factors`, those targets alone.

    Raises UserError: a list or a folder of images is missing, a list is damaged or names images or
    classes that another does not know, or there is no such factor.
    """
    listings = {}
    for split, found in _READERS[name](folder).items():
        targets = found.targets
        if factors:
            targets = {key: targets[key] for key in chosen(factors, list(targets), str(folder))}
        reader = Files(found.folder, found.names)
        listings[split] = Listing(
            name,
            split,
            str(found.folder),
            reader,
            np.arange(len(reader)),
            targets,
            found.unusable,
        )
    return listings


def count_objects(hub: dict[str, Source], factors: Sequence[str] = ()) -> dict[str, Source]:
    """Reduce the hub's CLEVR to one target, the number of objects.

    Its column label_count has the eight classes in ascending order.
    Raises UserError for another factor, and on decoding when there is no such column.
    """
    for source in hub.values():
        chosen(factors, ["count"], source.name)
    return {split: _with_counts(source) for split, source in hub.items()}


def _with_counts(source: Source) -> Source:
    def read(
        img_size: tuple[int, int] | None, upscale: bool
    ) -> tuple[Iterable[Block], dict[str, Target]]:
        blocks, found = source.read(img_size, upscale)
        labels = found.get("label_count")
        if labels is None or len(labels.names) != len(_COUNTS):
            raise UserError(
                f"{source.name}: hub:{CLEVR_REPO} has a column label_count with {len(_COUNTS)} "
                "classes, and this copy has not; fetch it again"
            )
        return blocks, {"count": replace(labels, names=_COUNTS)}

    return replace(source, stamp=json.dumps([source.stamp, "count"]), read=read)


def _inaturalist(root: Path) -> dict[str, _Found]:
    """iNaturalist 2018 (Van Horn et al. 2018): 8,142 species, 437,513 and 24,426 images.

    Annotations in COCO's format. Without categories.json the names are those of the competition,
    which are no words.
    """
    _need_folder(root / "train_val2018")
    fields = {"images", "annotations", "categories", "id", "file_name", "image_id", "category_id",
              "name", "supercategory"}  # fmt: skip
    paths = {"train": root / "train2018.json", "test": root / "val2018.json"}
    lists = {split: _read_json(path, fields) for split, path in paths.items()}
    named = root / "categories.json"
    if named.is_file():
        categories = _read_json(named, fields)
    else:
        named, categories = paths["train"], lists["train"].get("categories")
    with _as_released(named):
        categories = sorted(categories, key=lambda category: category["id"])
        position = {category["id"]: i for i, category in enumerate(categories)}
        species = tuple(str(category["name"]) for category in categories)
        kinds = [str(category["supercategory"]) for category in categories]
    kind = index_target(kinds, sorted(set(kinds)))
    listings = {}
    for split, path in paths.items():
        with _as_released(path):
            files = {image["id"]: str(image["file_name"]) for image in lists[split]["images"]}
            labels = {a["image_id"]: a["category_id"] for a in lists[split]["annotations"]}
        unknown = labels.keys() - files.keys()
        if unknown:
            raise UserError(
                f"{path}: labels {len(unknown)} images that it does not list, one is image "
                f"{min(unknown)}; fetch it again"
            )
        foreign = set(labels.values()) - position.keys()
        if foreign:
            raise UserError(
                f"{path}: its category {min(foreign)} is not among the {len(species)} of {named}; "
                "fetch both again"
            )
        values = np.array([position[labels[i]] for i in files if i in labels], np.int64)
        targets = {"species": Target(values, species), "supercategory": kind.take(values)}
        unusable = tuple((file, "no annotation") for i, file in files.items() if i not in labels)
        listings[split] = _Found(
            root, _names(path, (files[i] for i in files if i in labels)), targets, unusable
        )
    return listings


def _places(root: Path) -> dict[str, _Found]:
    """Places365-Standard (Zhou et al. 2018): 365 scenes, 1,803,460 and 36,500 images.

    The images of 256 pixels where both sizes are there. The archives of the training images unpack
    to data_256 and data_large, which torchvision renames.
    """
    path = root / "categories_places365.txt"
    positions = {scene: index for scene, index in _read_lines(path)}
    names = sorted(positions, key=positions.__getitem__)
    if [positions[name] for name in names] != list(range(len(names))):
        raise UserError(
            f"{path}: its classes are not numbered 0 to {len(names) - 1}; fetch it again"
        )
    scenes = tuple(name[3:] if name[:1] == "/" else name for name in names)  # without the "/a/"
    train = ("data_256_standard", "data_256", "data_large_standard", "data_large")
    listings = {}
    for split, file, folders in (
        ("train", "places365_train_standard.txt", train),
        ("test", "places365_val.txt", ("val_256", "val_large")),
    ):
        folder = next(
            (root / name for name in folders if (root / name).is_dir()), root / folders[0]
        )
        _need_folder(folder)
        lines = _read_lines(root / file)
        values = np.array([index for _, index in lines], np.int64)
        foreign = values[(values < 0) | (values >= len(scenes))]
        if len(foreign):
            raise UserError(
                f"{root / file}: its class {foreign[0]} is not among the {len(scenes)} of {path}; "
                "fetch both again"
            )
        files = _names(root / file, (image.lstrip("/") for image, _ in lines))
        listings[split] = _Found(folder, files, {"scene": Target(values, scenes)})
    return listings


def _clevr(root: Path) -> dict[str, _Found]:
    """CLEVR v1.0 (Johnson et al. 2017) with the label of VTAB's CLEVR/Count: 3 to 10 objects.

    70,000 and 15,000 images of 320x480 pixels (h, w).
    """
    root = root / "CLEVR_v1.0"
    listings = {}
    for split, part in (("train", "train"), ("test", "val")):
        path, folder = root / "scenes" / f"CLEVR_{part}_scenes.json", root / "images" / part
        _need_folder(folder)
        scenes = _read_json(path, {"scenes", "image_filename", "objects"})
        with _as_released(path):
            files = [str(scene["image_filename"]) for scene in scenes["scenes"]]
            counts = [str(len(scene["objects"])) for scene in scenes["scenes"]]
        for file, count in zip(files, counts, strict=True):
            if count not in _COUNTS:
                raise UserError(f"{path}: {file} has {count} objects, not 3 to 10; fetch it again")
        counted = index_target(counts, _COUNTS)
        listings[split] = _Found(folder, _names(path, files), {"count": counted})
    return listings


def _imagenet(root: Path) -> dict[str, _Found]:
    """ImageNet-1k (Russakovsky et al. 2015): 1,000 classes, 1,281,167 and 50,000 images.

    Either train/ and val/ with a folder for each class, or what Kaggle gives: val/ is flat there
    and LOC_val_solution.csv has its labels. Classes are in the order of their WordNet numbers and
    have their names where LOC_synset_mapping.txt lies beside.
    """
    kaggle = root / "ILSVRC" / "Data" / "CLS-LOC"
    home = kaggle if kaggle.is_dir() else root
    found = {}
    for split, folder in (("train", home / "train"), ("test", home / "val")):
        _need_folder(folder)
        found[split] = scan(folder)
    classes = sorted(found["train"].classes)
    foreign = [name for name in classes if not _SYNSET.fullmatch(name)]
    if foreign or not classes:
        raise UserError(
            f"{home / 'train'}: the images belong into folders n01440764/ and so on, one for each "
            "class; unpack each of the archives of the classes into a folder of its name"
        )
    names = _synset_names(root / "LOC_synset_mapping.txt", classes)
    listings = {}
    for split, (files, folders, labels) in found.items():
        if split == "test" and folders == [""]:  # Kaggle's is flat
            labels, folders = _solution(root / "LOC_val_solution.csv", files)
        position = {synset: i for i, synset in enumerate(classes)}
        foreign = sorted(set(folders) - position.keys())
        if foreign:
            raise UserError(
                f"{files.folder}: its class '{shown(foreign[0])}' is not among the {len(classes)} "
                f"in {home / 'train'}; fetch both again"
            )
        values = np.array([position[folder] for folder in folders], np.int64)[labels]
        listings[split] = _Found(files.folder, files.names, {"class": Target(values, names)})
    return listings


_SYNSET = re.compile(r"n\d{8}")


def _synset_names(path: Path, classes: list[str]) -> tuple[str, ...]:
    """Return the names of classes, which are their WordNet numbers where no list names them."""
    if not path.is_file():
        return tuple(classes)
    with _as_released(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        words = dict(line.split(" ", 1) for line in lines if line)
        names = [words[synset].strip() for synset in classes]
    # Two classes are both called crane.
    return tuple(
        name if names.count(name) == 1 else f"{name} ({synset})"
        for name, synset in zip(names, classes, strict=True)
    )


def _solution(path: Path, files: Files) -> tuple[np.ndarray, list[str]]:
    """Return each file's number of class [N], and the classes' WordNet numbers."""
    numbers: dict[str, int] = {}
    with _as_released(path), path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        found = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        stems = (name.rpartition(b".")[0].decode() for name in files.names)
        labels = [numbers.setdefault(found[stem], len(numbers)) for stem in stems]
    return np.array(labels, np.int64), list(numbers)


_READERS: dict[str, Callable[[Path], dict[str, _Found]]] = {
    "inaturalist2018": _inaturalist,
    "places365": _places,
    "imagenet": _imagenet,
    "clevr-count": _clevr,
}


def _read_json(path: Path, fields: set[str]) -> Any:
    """Read a JSON file, of its objects only some fields: those of half a million take gigabytes."""

    def keep(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if key in fields}

    with _as_released(path):
        return json.loads(path.read_bytes(), object_hook=keep)


def _read_lines(path: Path) -> list[tuple[str, int]]:
    """Read lines of a name and a number."""
    with _as_released(path), path.open(encoding="utf-8") as file:
        parts = (line.split() for line in file)
        return [(name, int(number)) for name, number in parts]


def _names(path: Path, files: Iterable[str]) -> Names:
    """Pack the files that the list `path` names.

    Raises UserError for one that would lie outside the folder of images.
    """

    def checked() -> Iterator[bytes]:
        for file in files:
            if os.path.isabs(file) or ".." in re.split(r"[/\\]", file):
                raise ValueError(f"'{shown(file)}' leads out of the folder of images")
            yield os.fsencode(file)

    with _as_released(path):
        return Names.of(checked())


def _need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; unpack the official archive of images there")


@contextlib.contextmanager
def _as_released(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a list of the release into one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it is part of the official release") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, csv.Error) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: not as officially released ({reason}); fetch it again") from None
