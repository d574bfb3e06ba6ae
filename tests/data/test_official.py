"""Official layouts, each as a small tree of exactly that form."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sparsejepa.data.catalog import list_datasets, load_dataset, stream_dataset
from sparsejepa.data.store import ImageSet
from sparsejepa.data.stream import open_images
from sparsejepa.errors import UserError

Save = Callable[..., np.ndarray]
Edit = Callable[[dict[str, Any]], object]


def load(root: Path, name: str, split: str, **options: Any) -> ImageSet:
    return load_dataset(name, split, data_root=root, cache_dir=root / ".cache", **options)


def labels(images: ImageSet, target: str) -> list[str]:
    return [images.targets[target].names[value] for value in images.targets[target].values]


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def inaturalist(tmp_path: Path, save: Save) -> tuple[Path, dict[str, np.ndarray]]:
    """Four species in three kinds; the lists in an order that is not that of names or ids."""
    kinds = ["Plantae", "Aves", "Plantae", "Fungi"]
    root, pixels = tmp_path / "inaturalist2018", {}
    scrambled = [
        {"id": i, "name": f"x{i}", "supercategory": kind, "genus": f"g{i}"}
        for i, kind in enumerate(kinds)
    ]
    for split, first, classes in (("train", 100, [3, 0, 2, 1, 1, 0]), ("val", 500, [1, 3])):
        images, annotations = [], []
        for i, kind in enumerate(classes, first):
            file = f"train_val2018/{kinds[kind]}/{kind}/{i:032x}.png"
            pixels[file] = save(root / file)
            images.append({
                "id": i, "file_name": file, "width": 8, "height": 8, "license": 3,
                "rights_holder": "someone",
            })  # fmt: skip
            annotations.append({"id": 7 * i, "image_id": i, "category_id": kind})
        content = {
            "info": {"year": 2018}, "images": images, "categories": scrambled[::-1],
            "annotations": annotations[::-1], "licenses": [{"id": 3, "name": "CC", "url": ""}],
        }  # fmt: skip
        (root / f"{split}2018.json").write_text(json.dumps(content))
    species = ["Rosa canina", "Parus major", "Bellis perennis", "Boletus edulis"]
    named = [{**old, "name": name} for old, name in zip(scrambled, species, strict=True)]
    (root / "categories.json").write_text(json.dumps(named))
    return tmp_path, pixels


@pytest.fixture
def places(tmp_path: Path, save: Save) -> tuple[Path, dict[str, np.ndarray]]:
    root, pixels = tmp_path / "places365", {}
    names = ["/a/airfield", "/a/apartment_building/outdoor", "/b/bakery/shop"]
    train = [f"{name}/{i:08d}.png" for name in names for i in (1, 2)]
    val = [f"Places365_val_{i:08d}.png" for i in (1, 2, 3)]
    root.mkdir()
    lines = [f"{name} {i}\n" for i, name in enumerate(names)]
    (root / "categories_places365.txt").write_text("".join(lines))
    lines = [f"{file} {i // 2}\n" for i, file in enumerate(train)]
    (root / "places365_train_standard.txt").write_text("".join(lines))
    lines = [f"{file} {i}\n" for file, i in zip(val, (2, 0, 2), strict=True)]
    (root / "places365_val.txt").write_text("".join(lines))
    for file in train:
        pixels[file[1:]] = save(root / "data_256_standard" / file[1:])
    for file in val:
        pixels[file] = save(root / "val_256" / file)
    return tmp_path, pixels


@pytest.fixture
def clevr(tmp_path: Path, save: Save) -> tuple[Path, dict[str, np.ndarray]]:
    root, pixels = tmp_path / "clevr-count" / "CLEVR_v1.0", {}
    for part, counts in (("train", [5, 10, 3]), ("val", [10, 4]), ("test", [])):
        scenes = []
        for i, count in enumerate(counts):
            file = f"CLEVR_{part}_{i:06d}.png"
            pixels[file] = save(root / "images" / part / file, (4, 6))
            one = {"color": "red", "size": "large", "3d_coords": [0.1, 0.2, 0.3]}
            scenes.append({
                "image_index": i, "image_filename": file, "split": part, "objects": [one] * count,
                "relationships": {"left": [[1], []]}, "directions": {},
            })  # fmt: skip
        if part != "test":
            path = root / "scenes" / f"CLEVR_{part}_scenes.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"info": {"split": part}, "scenes": scenes}))
    save(root / "images" / "test" / "CLEVR_test_000000.png", (4, 6))
    return tmp_path, pixels


SYNSETS = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane"}
VALIDATION = {1: "n03126707", 2: "n01440764", 3: "n03126707"}


@pytest.fixture
def imagenet(tmp_path: Path, save: Save) -> tuple[Path, dict[str, np.ndarray]]:
    """The official archives, unpacked: each class has its folder in train/ and in val/."""
    root, pixels = tmp_path / "imagenet", {}
    for synset in SYNSETS:
        for i in (12, 7):
            file = f"{synset}/{synset}_{i}.JPEG"
            pixels[file] = save_jpeg(root / "train" / file, save)
    for i, synset in VALIDATION.items():
        file = f"{synset}/ILSVRC2012_val_{i:08d}.JPEG"
        pixels[file] = save_jpeg(root / "val" / file, save)
    return tmp_path, pixels


@pytest.fixture
def imagenet_of_kaggle(
    imagenet: tuple[Path, dict[str, np.ndarray]],
) -> tuple[Path, dict[str, np.ndarray]]:
    """The competition's archive: val/ is flat, two lists say what is what."""
    root, pixels = imagenet
    home = root / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC"
    (home / "val").mkdir(parents=True)
    (root / "imagenet" / "train").rename(home / "train")
    rows = ["ImageId,PredictionString"]
    for i, synset in reversed(VALIDATION.items()):
        stem = f"ILSVRC2012_val_{i:08d}"
        (root / "imagenet" / "val" / synset / f"{stem}.JPEG").rename(home / "val" / f"{stem}.JPEG")
        pixels[f"{stem}.JPEG"] = pixels.pop(f"{synset}/{stem}.JPEG")
        rows.append(f"{stem},{synset} 85 1 499 272 {synset} 1 2 3 4 ")
    shutil.rmtree(root / "imagenet" / "val")
    (root / "imagenet" / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    lines = [f"{synset} {name}\n" for synset, name in SYNSETS.items()]
    (root / "imagenet" / "LOC_synset_mapping.txt").write_text("".join(lines))
    return root, pixels


def save_jpeg(path: Path, save: Save) -> np.ndarray:
    """As `save`; the pixels are what a JPEG makes of them."""
    save(path)
    return np.asarray(Image.open(path).convert("RGB"))


def check_images(images: ImageSet, pixels: dict[str, np.ndarray]) -> None:
    for file, image in zip(images.files, images.images, strict=True):
        assert (image == pixels[file]).all()


def test_inaturalist(inaturalist: tuple[Path, dict[str, np.ndarray]]):
    root, pixels = inaturalist
    train, test = (load(root, "inaturalist2018", split) for split in ("train", "test"))
    check_images(train, pixels)
    check_images(test, pixels)
    assert (len(train), len(test)) == (6, 2) and not set(train.files) & set(test.files)
    assert list(train.targets) == ["species", "supercategory"]
    species = ("Rosa canina", "Parus major", "Bellis perennis", "Boletus edulis")
    assert train.targets["species"].names == test.targets["species"].names == species
    for images in (train, test):  # the folders of a file are its kind and its category
        assert labels(images, "supercategory") == [file.split("/")[1] for file in images.files]
        ids = [int(file.split("/")[2]) for file in images.files]
        assert images.targets["species"].values.tolist() == ids
    (root / "inaturalist2018" / "categories.json").unlink()
    again = load(root, "inaturalist2018", "train")
    assert again.targets["species"].names == ("x0", "x1", "x2", "x3")
    only = load(root, "inaturalist2018", "train", factors=["supercategory"])
    assert list(only.targets) == ["supercategory"]
    with pytest.raises(UserError, match="no factor 'genus'"):
        load(root, "inaturalist2018", "train", factors=["genus"])


def test_places(places: tuple[Path, dict[str, np.ndarray]], save: Save):
    root, pixels = places
    train, test = (load(root, "places365", split) for split in ("train", "test"))
    check_images(train, pixels)
    check_images(test, pixels)
    assert (len(train), len(test)) == (6, 3)
    assert train.targets["scene"].names == ("airfield", "apartment_building/outdoor", "bakery/shop")
    folders = [file.split("/", 1)[1].rpartition("/")[0] for file in train.files]
    assert labels(train, "scene") == folders
    assert labels(test, "scene") == ["bakery/shop", "airfield", "bakery/shop"]
    home = root / "places365"
    (home / "data_256_standard").rename(home / "data_256")  # as the archive unpacks
    assert (load(root, "places365", "train").images == train.images).all()
    for old, new in (("data_256", "data_large"), ("val_256", "val_large")):
        (home / old).rename(home / new)
    assert (load(root, "places365", "test").images == test.images).all()
    with pytest.raises(UserError, match="set --img-size"):  # the large images have many sizes
        pixels = save(home / "data_large" / "a" / "airfield" / "00000001.png", (9, 12))
        load(root, "places365", "train")
    sized = load(root, "places365", "train", img_size=(8, 8))
    assert sized.img_size == (8, 8) and (sized.images[1:] == train.images[1:]).all()


@pytest.mark.parametrize("layout", ["imagenet", "imagenet_of_kaggle"])
def test_imagenet(layout: str, request: pytest.FixtureRequest):
    root, pixels = request.getfixturevalue(layout)
    train, test = (load(root, "imagenet", split) for split in ("train", "test"))
    check_images(train, pixels)
    check_images(test, pixels)
    assert (len(train), len(test)) == (6, 3)
    names = tuple(SYNSETS)
    if layout == "imagenet_of_kaggle":
        names = ("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)")
    assert train.targets["class"].names == test.targets["class"].names == names
    synsets = list(SYNSETS)
    folders = [file.split("/")[0] for file in train.files]
    assert [synsets[value] for value in train.targets["class"].values] == folders
    numbers = [int(file[-13:-5]) for file in test.files]
    assert [synsets[v] for v in test.targets["class"].values] == [VALIDATION[i] for i in numbers]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("inaturalist", "inaturalist2018"),
        ("places", "places365"),
        ("imagenet", "imagenet"),
        ("imagenet_of_kaggle", "imagenet"),
        ("clevr", "clevr-count"),
    ],
)
def test_official_layouts_stream_as_they_are_cached(
    layout: str, name: str, request: pytest.FixtureRequest
):
    root, _ = request.getfixturevalue(layout)
    for split in ("train", "test"):
        cached = load(root, name, split)
        stream = stream_dataset(name, split, data_root=root)
        assert tuple(stream.files) == cached.files and stream.mean == cached.mean
        assert stream.targets.keys() == cached.targets.keys()
        for key, target in stream.targets.items():
            assert (target.values == cached.targets[key].values).all()
        images = open_images(stream, "cpu", 0).take(torch.arange(len(stream)))
        assert (images.numpy() == cached.images).all()


def test_clevr(clevr: tuple[Path, dict[str, np.ndarray]]):
    root, pixels = clevr
    train, test = (load(root, "clevr-count", split) for split in ("train", "test"))
    check_images(train, pixels)
    check_images(test, pixels)
    assert train.targets["count"].names == tuple("3 4 5 6 7 8 9 10".split())
    assert train.targets["count"].values.tolist() == [2, 7, 0], "as in VTAB, the count less 3"
    assert labels(test, "count") == ["10", "4"]


@pytest.mark.parametrize("first", [0, 3])
def test_clevr_of_the_hub(tmp_path: Path, first: int):
    """Labels that begin at 0 or at 3 are the same eight classes."""
    counts = {"train": [5, 0, 7, 1, 2, 3, 4, 6, 5, 0], "test": [6, 7]}
    for split, column in counts.items():
        buffer = io.BytesIO()
        Image.new("RGB", (6, 4)).save(buffer, "PNG")
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = len(column)
        table = pa.table({
            "image": pa.array([{"bytes": buffer.getvalue(), "path": None}] * rows, image),
            "objects": pa.array([{"size": [1, 0, 1]}] * rows),
            "label_count": pa.array([first + count for count in column], pa.int64()),
            "label_distance": pa.array([0, 1] * (rows // 2), pa.int64()),
        })  # fmt: skip
        path = tmp_path / "dpdl-benchmark" / "clevr" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    for split, column in counts.items():
        images = load(tmp_path, "clevr-count", split)
        assert list(images.targets) == ["count"]
        assert labels(images, "count") == [str(3 + count) for count in column]
    (row,) = [row for row in list_datasets(tmp_path) if row.name == "clevr-count"]
    assert row.found == str(tmp_path / "dpdl-benchmark" / "clevr")
    with pytest.raises(UserError, match=r"no factor 'label_distance'.*there are count"):
        load(tmp_path, "clevr-count", "train", factors=["label_distance"])


def test_a_copy_of_clevr_without_the_counts(tmp_path: Path, save: Save):
    save(tmp_path / "dpdl-benchmark" / "clevr" / "0.png")
    save(tmp_path / "dpdl-benchmark" / "clevr" / "1.png")
    with pytest.raises(UserError, match="label_count with 8 classes"):
        load(tmp_path, "clevr-count", "train")


def test_a_listed_image_that_is_missing_is_left_out(
    inaturalist: tuple[Path, dict[str, np.ndarray]], save: Save
):
    root, pixels = inaturalist
    whole = load(root, "inaturalist2018", "train")
    gone = root / "inaturalist2018" / whole.files[1]
    gone.rename(root / "elsewhere")
    part = load(root, "inaturalist2018", "train")
    assert part.skipped == ((whole.files[1], "No such file or directory"),)
    assert part.files == whole.files[:1] + whole.files[2:]
    assert labels(part, "species") == [
        name for i, name in enumerate(labels(whole, "species")) if i != 1
    ]
    check_images(part, pixels)
    (root / "elsewhere").rename(gone)
    assert load(root, "inaturalist2018", "train").fingerprint == whole.fingerprint
    save(gone)
    assert load(root, "inaturalist2018", "train").fingerprint != whole.fingerprint


def test_an_image_without_annotation_is_left_out(
    inaturalist: tuple[Path, dict[str, np.ndarray]],
):
    root, _ = inaturalist
    whole = load(root, "inaturalist2018", "train")
    edit(
        root / "inaturalist2018" / "train2018.json",
        lambda content: content["annotations"].pop(),
    )
    part = load(root, "inaturalist2018", "train")
    assert part.files == whole.files[1:]
    assert part.skipped == ((whole.files[0], "no annotation"),)


def replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


BREAKAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no list of training images": (
        "inaturalist", lambda r: (r / "train2018.json").unlink(), r"train2018\.json: no such file",
    ),
    "no list of test images": (
        "inaturalist", lambda r: (r / "val2018.json").unlink(), r"val2018\.json: no such file",
    ),
    "no images": (
        "inaturalist", lambda r: shutil.rmtree(r / "train_val2018"),
        "train_val2018: no such folder; unpack",
    ),
    "truncated": (
        "inaturalist", lambda r: (r / "val2018.json").write_bytes(b'{"images": ['),
        r"val2018\.json: not as officially released",
    ),
    "no annotations": (
        "inaturalist", lambda r: edit(r / "val2018.json", lambda c: c.pop("annotations")),
        r"val2018\.json: not as officially released \(no 'annotations'\)",
    ),
    "another form": (
        "inaturalist", lambda r: (r / "val2018.json").write_text("[1, 2]"),
        r"val2018\.json: not as officially released",
    ),
    "no categories": (
        "inaturalist", lambda r: (r / "categories.json").write_text("null"),
        r"categories\.json: not as officially released",
    ),
    "unknown image": (
        "inaturalist",
        lambda r: edit(r / "train2018.json", lambda c: c["annotations"][0].update(image_id=9999)),
        r"train2018\.json: labels 1 images that it does not list, one is image 9999",
    ),
    "unknown category": (
        "inaturalist",
        lambda r: edit(r / "val2018.json", lambda c: c["annotations"][0].update(category_id=8142)),
        r"val2018\.json: its category 8142 is not among the 4 of .*categories\.json",
    ),
    "no categories of places": (
        "places", lambda r: (r / "categories_places365.txt").unlink(),
        r"categories_places365\.txt: no such file",
    ),
    "categories with a gap": (
        "places", lambda r: replace_text(r / "categories_places365.txt", "shop 2", "shop 4"),
        r"categories_places365\.txt: its classes are not numbered 0 to 2",
    ),
    "no list of places": (
        "places", lambda r: (r / "places365_val.txt").unlink(), r"places365_val\.txt: no such file",
    ),
    "no images of places": (
        "places", lambda r: shutil.rmtree(r / "val_256"), "val_256: no such folder; unpack",
    ),
    "a list without labels": (
        "places", lambda r: replace_text(r / "places365_val.txt", ".png 0", ".png"),
        r"places365_val\.txt: not as officially released",
    ),
    "a label that is no class": (
        "places", lambda r: replace_text(r / "places365_val.txt", ".png 0", ".png 365"),
        r"places365_val\.txt: its class 365 is not among the 3 of",
    ),
    "no folder of training images": (
        "imagenet", lambda r: shutil.rmtree(r / "train"), r"imagenet/train: no such folder",
    ),
    "classes that are not unpacked": (
        "imagenet", lambda r: [shutil.rmtree(path) for path in (r / "train").iterdir()],
        r"imagenet/train: the images belong into folders n01440764/",
    ),
    "classes by another name": (
        "imagenet", lambda r: (r / "train" / "n01440764").rename(r / "train" / "tench"),
        r"imagenet/train: the images belong into folders n01440764/",
    ),
    "a class that is only in val": (
        "imagenet", lambda r: (r / "val" / "n01440764").rename(r / "val" / "n00000000"),
        r"imagenet/val: its class 'n00000000' is not among the 3 in",
    ),
    "no solution": (
        "imagenet_of_kaggle", lambda r: (r / "LOC_val_solution.csv").unlink(),
        r"LOC_val_solution\.csv: no such file",
    ),
    "a solution that lacks an image": (
        "imagenet_of_kaggle",
        lambda r: replace_text(r / "LOC_val_solution.csv", "00000002,", "00000009,"),
        r"LOC_val_solution\.csv: not as officially released \(no 'ILSVRC2012_val_00000002'\)",
    ),
    "names that lack a class": (
        "imagenet_of_kaggle",
        lambda r: replace_text(r / "LOC_synset_mapping.txt", "n01440764", "n01440765"),
        r"LOC_synset_mapping\.txt: not as officially released \(no 'n01440764'\)",
    ),
    "no scenes": (
        "clevr", lambda r: (r / "CLEVR_v1.0/scenes/CLEVR_val_scenes.json").unlink(),
        r"CLEVR_val_scenes\.json: no such file",
    ),
    "no CLEVR": (
        "clevr", lambda r: shutil.rmtree(r / "CLEVR_v1.0"), r"CLEVR_v1\.0/images/train: no such",
    ),
    "eleven objects": (
        "clevr",
        lambda r: edit(
            r / "CLEVR_v1.0/scenes/CLEVR_val_scenes.json",
            lambda c: c["scenes"][1].update(objects=[{}] * 11),
        ),
        r"CLEVR_val_scenes\.json: CLEVR_val_000001\.png has 11 objects",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKAGES)
def test_what_is_missing_or_damaged_is_one_line(case: str, request: pytest.FixtureRequest):
    layout, damage, message = BREAKAGES[case]
    root, _ = request.getfixturevalue(layout)
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(root, folder.name, "train")
    assert "\n" not in str(caught.value)


def test_where_to_put_what_is_not_there(tmp_path: Path):
    for name, file in (("inaturalist2018", "train2018.json"), ("places365", "places365_val.txt")):
        with pytest.raises(UserError, match=f"folder DIR/{name} with .*{file}.* --data-root DIR"):
            load(tmp_path, name, "train")
    with pytest.raises(UserError, match=r"dpdl-benchmark/clevr: not in the data root"):
        load(tmp_path, "clevr-count", "train")
    with pytest.raises(UserError, match=r"did you mean 'places365'"):
        load(tmp_path, "places356", "train")
    rows = {row.name: row for row in list_datasets(tmp_path)}
    assert rows["places365"].found == "" and f"{tmp_path}/places365" in rows["places365"].source
    (tmp_path / "places365").mkdir()
    (row,) = [row for row in list_datasets(tmp_path) if row.name == "places365"]
    assert row.found == str(tmp_path / "places365") and row.splits == ("train", "test")


@pytest.mark.parametrize("name", ["../../outside.png", "a/../../../outside.png", "/outside.png"])
@pytest.mark.parametrize("release", ["places365", "inaturalist2018", "clevr-count"])
def test_lists_name_only_files_in_their_folder(
    release: str, name: str, places: Any, inaturalist: Any, clevr: Any, tmp_path: Path, save: Save
):
    save(tmp_path / "outside.png")
    folder = tmp_path / release
    if release == "places365":
        if name[0] == "/":  # as all are in this list
            name = "/../.." + name
        path = folder / "places365_val.txt"
        path.write_text(f"{path.read_text()}{name} 0\n")
    elif release == "inaturalist2018":
        path = folder / "val2018.json"
        edit(path, lambda content: content["images"][0].update(file_name=name))
    else:
        path = folder / "CLEVR_v1.0" / "scenes" / "CLEVR_val_scenes.json"
        edit(path, lambda content: content["scenes"][0].update(image_filename=name))
    message = rf"^{path}: not as .* \('.*outside\.png' leads out of the folder of images\); fetch"
    for read in (stream_dataset, load_dataset):
        with pytest.raises(UserError, match=message) as caught:
            read(release, "test", data_root=tmp_path)
        assert "\n" not in str(caught.value)


def test_a_name_that_is_no_text_is_one_line(inaturalist: Any, tmp_path: Path):
    path = tmp_path / "inaturalist2018" / "val2018.json"
    edit(path, lambda content: content["images"][0].update(file_name="\ud800.png"))
    with pytest.raises(UserError, match=rf"^{path}: not as officially released"):
        stream_dataset("inaturalist2018", data_root=tmp_path)
