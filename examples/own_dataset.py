"""A new data set: images from anywhere, written as a folder that every command reads.

    python examples/own_dataset.py [--images 600] [--steps 60]

images/ holds the pictures, factors.csv their labels and the split, masks/ which pixels are which
object (0 is background). Labels and masks may be left out.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import sparsejepa as sj

COLOURS = {"red": (210, 60, 50), "green": (60, 170, 80), "blue": (60, 90, 210)}


def draw(rng):
    """Return an image [32, 32, 3] of one disc on noise, its mask [32, 32] and its factors."""
    colour, radius = rng.choice(list(COLOURS)), int(rng.integers(4, 10))
    row, col = rng.integers(radius, 32 - radius, 2)
    rows, cols = np.ogrid[:32, :32]
    mask = ((rows - row) ** 2 + (cols - col) ** 2 <= radius**2).astype(np.uint8)
    image = rng.integers(90, 130, (32, 32, 3), np.uint8)
    image[mask > 0] = COLOURS[colour]
    factors = {"colour": colour, "radius": radius, "side": "left" if col < 16 else "right"}
    return image, mask, factors


def write_folder(root, count, seed=0):
    """Write `count` images with factors and masks below `root`; the last fifth is the test part."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    with (root / "factors.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["file", "colour", "radius", "side", "split"])
        table.writeheader()
        for i in range(count):
            image, mask, factors = draw(rng)
            name = f"{i:05}.png"
            Image.fromarray(image).save(root / "images" / name)
            Image.fromarray(mask).save(root / "masks" / name)
            split = "train" if i < 0.8 * count else "test"
            table.writerow({"file": name, **factors, "split": split})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        discs = Path(folder) / "discs"
        write_folder(discs, args.images)
        settings = sj.preset("nano").replace(data=str(discs), batch_size=64, steps=args.steps)
        run = sj.pretrain(settings.replace(device="cpu"), out=Path(folder) / "run")
        encoder = sj.load(str(run.path))
        train, test = (sj.embed(encoder, str(discs), split) for split in ("train", "test"))
        for name, target in train.targets.items():
            probe = sj.LogisticProbe().fit(train.x, target.values)
            score = probe.score(test.x, test.targets[name].values)
            print(f"{name}: {score:.3f} of test images right, {len(target.names)} values")
