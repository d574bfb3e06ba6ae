"""Tar shards in the convention of webdataset, read at random positions.

A sample is a run of members with one key, the name up to the first dot of its last part: KEY.jpg,
KEY.cls, KEY.json, KEY.txt. A shard is passed over once, header by header, to learn where the images
lie; nothing is unpacked, and no name from a shard ever becomes a path.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsejepa.data.decode import EXTENSIONS, shown
from sparsejepa.data.factors import chosen, factor_target
from sparsejepa.data.readers import Members, Names
from sparsejepa.data.sources import (
    MAX_CATEGORIES,
    TEST_NAMES,
    TRAIN_NAMES,
    Listing,
    category_names,
    choose_splits,
    in_test,
)
from sparsejepa.data.store import Target
from sparsejepa.errors import UserError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MOST_SHARDS = 100_000  # of a pattern
_LARGEST_LABEL = 2**20  # bytes of a member that holds labels


def is_tars(name: str) -> bool:
    """Whether a name is that of a tar file, or a pattern of some: train-{000..012}.tar."""
    return name.lower().endswith((".tar", *_COMPRESSED))


def list_tars(path: str, name: str, factors: Sequence[str] = ()) -> dict[str, Listing]:
    """List a tar file, a pattern of tar files, or a folder of them.

    In a folder, shards whose names begin with train, test, val, valid or validation, or that lie in
    folders of those names, are that split; otherwise all are one split, which is then divided.
    Targets are KEY.cls as `class`, KEY.txt as `text` where texts repeat, and the fields of KEY.json
    that call themselves a label or a class; with `factors` those fields, whatever they are. Where
    no sample has any of these, members lie in folders as files do: train/ and test/, and classes.

    Raises UserError: no such file, a compressed or damaged one, no images; an unusable factor.
    """
    splits = _splits(path)
    found = {split: _Index(shards, bool(factors)) for split, shards in splits.items()}
    for split, index in found.items():
        if not len(index.shard):
            raise UserError(f"{path}: no images in the shards of the {split} split")
    readers = {split: index.reader(splits[split]) for split, index in found.items()}
    rows = {split: np.arange(len(reader)) for split, reader in readers.items()}
    by_folder = None if any(index.labelled for index in found.values()) else _folders(readers)
    targets = by_folder.targets if by_folder else _targets(found)
    about = "shards by their names" if "test" in found else "a fifth, by a hash of the name"
    if by_folder and by_folder.rows:
        rows, about = by_folder.rows, f"{by_folder.test}/ in the shards"
    elif "test" not in found:
        reader, primary = readers["train"], next(iter(targets["train"].values()), None)
        labels = primary.values if primary else np.zeros(len(reader), np.int64)
        test = in_test(map(reader.name, range(len(reader))), labels)
        rows = {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
    if factors and by_folder:
        targets = {
            split: {key: own[key] for key in chosen(factors, list(own), path)}
            for split, own in targets.items()
        }
    elif factors:  # after the division, which must not depend on them
        train = [np.isin(np.arange(len(readers[split])), rows["train"]) for split in found]
        if len(found) == 2:
            train[1][:] = False
        targets = _factor_targets(found, factors, train, path)
    listings = {}
    for split in ("train", "test"):
        part = split if split in found else "train"
        own = {key: target.take(rows[split]) for key, target in targets[part].items()}
        unusable = tuple(found[part].unusable) if part == split else ()
        listings[split] = Listing(
            name, split, path, readers[part], rows[split], own, unusable, about=about
        )
    return listings


def tar_splits(folder: Path) -> tuple[str, ...]:
    """Return the splits in a folder of shards, by their own names; "all" if there is only one."""
    found = choose_splits(filter(None, _shards(folder))) if any(_shards(folder)) else {}
    return tuple(found.values()) if "test" in found else ("all",)


class _Column:
    """One field of the samples: a number for each, standing for a text."""

    def __init__(self) -> None:
        self.numbers, self.texts = array("q"), {}

    def add(self, row: int, text: str) -> None:
        """Note the text of a sample; -1 stands for those that have none."""
        self.numbers.extend([-1] * (row - len(self.numbers)))
        self.numbers.append(self.texts.setdefault(text, len(self.texts)))


class _Sample(NamedTuple):
    """Where the members of a sample lie: (offset, length) by ending."""

    key: bytes
    members: dict[str, tuple[int, int]]


class _Index:
    """What the shards of one split hold."""

    def __init__(self, shards: Sequence[str], everything: bool) -> None:
        """Pass over the shards; fields of too many different texts are left out, or not."""
        self.shard, self.place = array("i"), array("q")
        self.columns: dict[str, _Column] = {}
        self.unusable: list[tuple[str, str]] = []
        self.labelled = False
        """Whether there is a .cls, .json or .txt with any image."""
        self._most = None if everything else MAX_CATEGORIES
        self._left_out: set[str] = set()
        self.names = Names.of(self._read(shards))

    def reader(self, shards: Sequence[str]) -> Members:
        """Return the reader of the images."""
        shard = np.frombuffer(self.shard, np.int32)
        return Members(
            shards, self.names, shard, np.frombuffer(self.place, np.int64).reshape(-1, 2)
        )

    def _read(self, shards: Sequence[str]) -> Iterator[bytes]:
        for number, shard in enumerate(shards):
            stem = os.fsencode(Path(shard).stem)
            try:
                with open(shard, "rb") as file:
                    for sample in _samples(shard):
                        ending = next((e for e in EXTENSIONS if e[1:] in sample.members), None)
                        if ending is None:
                            name = shown(os.fsdecode(sample.key))
                            where = f"{shown(os.fsdecode(stem))}/{name}"
                            self.unusable.append((where, "no image with it"))
                            continue
                        row = len(self.shard)
                        self.shard.append(number)
                        self.place.extend(sample.members[ending[1:]])
                        for field, (offset, length) in sample.members.items():
                            if field in ("cls", "txt", "json") and length <= _LARGEST_LABEL:
                                self.labelled = True
                                file.seek(offset)
                                self._label(row, field, file.read(length))
                        yield stem + b"/" + sample.key + ending.encode()
            except (OSError, tarfile.TarError, EOFError, ValueError) as error:
                reason = shown(str(error).split("\n")[0])
                raise UserError(
                    f"{shown(shard)}: damaged tar file ({reason}); copy it again"
                ) from None

    def _label(self, row: int, field: str, content: bytes) -> None:
        text = content.decode("utf-8", "replace").strip()
        fields = {"cls": "class", "txt": "text"}
        values = {fields[field]: text} if field in fields else _json_fields(text)
        for key, value in values.items():
            known = field != "json" or self._most is None or re.search(r"label|class|cls", key)
            if not known or key in self._left_out:
                continue
            column = self.columns.setdefault(key, _Column())
            column.add(row, value)
            if self._most is not None and len(column.texts) > self._most:
                self._left_out.add(key)
                del self.columns[key]


def _samples(shard: str) -> Iterator[_Sample]:
    with tarfile.open(shard, "r:") as tar:
        sample = _Sample(b"", {})
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every member
            folder, slash, last = info.name.rpartition("/")
            stem, _, ending = last.partition(".")
            if not info.isreg() or info.sparse or not stem:
                continue
            key = os.fsencode(folder + slash + stem)
            if key != sample.key:
                if sample.members:
                    yield sample
                sample = _Sample(key, {})
            sample.members.setdefault(ending.lower(), (info.offset_data, info.size))
        if sample.members:
            yield sample
    with open(shard, "rb") as file:  # tarfile takes a damaged header, or a cut, for the end
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut short at byte {tar.offset}, it has no end mark")


def _json_fields(text: str) -> dict[str, str]:
    """Return the plain values of a JSON object as texts; lists of them as numbered fields."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    found = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        entries = {f"{key}_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {}
        for name, entry in (entries or {key: value}).items():
            if isinstance(entry, str | int | float):
                found[name] = str(entry)
    return found


def _targets(found: dict[str, _Index]) -> dict[str, dict[str, Target]]:
    """Make targets of the fields that look like labels, with the same classes in all splits."""
    targets: dict[str, dict[str, Target]] = {split: {} for split in found}
    for key in sorted(found["train"].columns, key=lambda key: (key == "text", key != "class")):
        parts = {split: i.columns[key] for split, i in found.items() if _whole(i, key)}
        distinct = list(dict.fromkeys(text for part in parts.values() for text in part.texts))
        repeats = sum(len(part.numbers) for part in parts.values()) > len(distinct)
        names = category_names([*distinct, *distinct[:1]] if repeats else distinct)
        position = {text: i for i, text in enumerate(names)}
        for split, part in parts.items() if names else ():
            values = np.array([position[text] for text in part.texts], np.int64)
            targets[split][key] = Target(values[np.frombuffer(part.numbers, np.int64)], names)
    return targets


class _Folders(NamedTuple):
    """What the folders of the members say."""

    targets: dict[str, dict[str, Target]]
    rows: dict[str, np.ndarray]
    """Of the train and the test split, if the folders have those names."""
    test: str
    """Name of the folder of the test split."""


def _folders(readers: dict[str, Members]) -> _Folders | None:
    """Take the folders of the members for splits and classes; None if they are neither.

    As in folders of files: train/ and test/ come first, and a sole folder is no class. Images that
    lie in no folder, or in too many, have no class.
    """
    places = {
        split: [_parts(reader.name(row).rpartition("/")[0]) for row in range(len(reader))]
        for split, reader in readers.items()
    }
    rows: dict[str, np.ndarray] = {}
    test = ""
    if len(places) == 1:
        own = places["train"]
        depth = _shared(own)
        depth -= depth > 0 and own[0][depth - 1].lower() in TRAIN_NAMES + TEST_NAMES
        heads = [place[depth] if len(place) > depth else "" for place in own]
        chosen_heads = choose_splits(dict.fromkeys(heads)) if own else {}
        if "test" in chosen_heads:
            test = chosen_heads["test"]
            rows = {
                split: np.flatnonzero([head == name for head in heads])
                for split, name in chosen_heads.items()
            }
            places["train"] = [place[depth + 1 :] for place in own]
    else:  # the names of the shards say it already
        for split, own in places.items():
            if all(place and place[0].lower() in TRAIN_NAMES + TEST_NAMES for place in own):
                places[split] = [place[1:] for place in own]
    used = {
        split: [own[row] for row in rows.values() for row in row.tolist()] if rows else own
        for split, own in places.items()
    }
    distinct = {place for own in used.values() for place in own}
    depth = _shared(distinct)
    names = sorted({"/".join(place[depth:]) for place in distinct})
    targets: dict[str, dict[str, Target]] = {split: {} for split in places}
    if 1 < len(names) <= MAX_CATEGORIES and "" not in names:
        position = {name: i for i, name in enumerate(names)}
        for split, own in places.items():
            values = [position.get("/".join(place[depth:]), 0) for place in own]
            targets[split]["class"] = Target(np.array(values, np.int64), tuple(names))
    return _Folders(targets, rows, test) if rows or any(targets.values()) else None


@functools.lru_cache(4096)
def _parts(folder: str) -> tuple[str, ...]:
    """Return the folders of a member, from the reader's name of them: SHARD/FOLDER/...."""
    return tuple(shown(part) for part in folder.split("/")[1:] if part not in ("", "."))


def _shared(places: Iterable[tuple[str, ...]]) -> int:
    """Return how many outer folders all places share."""
    first, last = min(places, default=()), max(places, default=())
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )


def _factor_targets(
    found: dict[str, _Index], factors: Sequence[str], train: list[np.ndarray], origin: str
) -> dict[str, dict[str, Target]]:
    """Make targets of the factors; `train` [N] bool for each part says which are for training."""
    shared = [
        key for key in found["train"].columns if all(key in i.columns for i in found.values())
    ]
    targets: dict[str, dict[str, Target]] = {split: {} for split in found}
    ends = np.cumsum([len(mask) for mask in train])
    for key in chosen(factors, shared, origin):
        values: list[str | None] = []
        for index in found.values():
            column = index.columns[key]
            texts = [*column.texts, None]  # the last for -1
            own = [texts[number] for number in column.numbers]
            values += own + [None] * (len(index.shard) - len(own))
        whole = factor_target(key, values, np.concatenate(train), origin)
        for split, end, mask in zip(found, ends, train, strict=True):
            targets[split][key] = whole.take(np.arange(end - len(mask), end))
    return targets


def _whole(index: _Index, key: str) -> bool:
    """Whether every sample has this field."""
    column = index.columns.get(key)
    return (
        column is not None
        and len(column.numbers) == len(index.shard)
        and (-1 not in column.numbers)
    )


def _splits(path: str) -> dict[str, list[str]]:
    """Return the shards of each split."""
    if not os.path.isdir(path):
        return {"train": [_checked(shard) for shard in _expand(path)]}
    parts = _shards(Path(path))
    if not parts:
        raise UserError(f"{path}: no tar files in it")
    named = [name for name in parts if name]
    own = choose_splits(named) if named else {"train": ""}
    return {split: [_checked(shard) for shard in parts[name]] for split, name in own.items()}


def _shards(folder: Path) -> dict[str, list[str]]:
    """Return the shards in a folder by the name of their split, "" where they have none."""
    parts: dict[str, list[str]] = {}
    for shard in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if is_tars(shard.name) and not shard.name.startswith("."):
            in_folder = shard.parent != folder and shard.parent.name.lower()
            name = in_folder or re.split(r"[^a-z]", shard.name.lower())[0]
            known = name if name in TRAIN_NAMES + TEST_NAMES else ""
            parts.setdefault(known, []).append(str(shard))
    return parts


def _checked(shard: str) -> str:
    if shard.lower().endswith(_COMPRESSED):
        raise UserError(
            f"{shown(shard)}: compressed, so that it cannot be read at random positions; unpack it "
            "to a plain .tar (images are compressed already)"
        )
    if not os.path.isfile(shard):
        raise UserError(f"{shown(shard)}: no such file")
    return shard


def _expand(pattern: str) -> list[str]:
    """Return the names that a pattern with {000..012} or {a,b} stands for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds is None:
        choices = match[1].split(",")
    else:
        first, last = int(bounds[1]), int(bounds[2])
        if not first <= last < first + _MOST_SHARDS:
            raise UserError(f"{pattern}: {{{match[1]}}} must count upwards, to few enough files")
        choices = [f"{i:0{len(bounds[1])}d}" for i in range(first, last + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [head + choice + rest for choice in choices for rest in _expand(tail)]
