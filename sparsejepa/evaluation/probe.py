"""What simple classifiers read from frozen encoders, with the floors beside every number."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparsejepa
from sparsejepa.data.catalog import load_dataset
from sparsejepa.data.images import ImageSet, Target, shown
from sparsejepa.distributed import current, first_here, on_main
from sparsejepa.encoders.encoder import Encoder
from sparsejepa.encoders.load import load
from sparsejepa.errors import UserError, nearest
from sparsejepa.evaluation.classifiers import KNNProbe, LogisticProbe, Standardized
from sparsejepa.evaluation.features import (
    Features,
    Pool,
    embed,
    pixel_features,
    read_fitting,
    say_enlarged,
    target,
)
from sparsejepa.evaluation.stats import wilson_interval
from sparsejepa.files import read_json, write_text

PROTOCOLS = ("logistic", "knn")
"""What reads the frozen features; each also as NAME:PERCENT%, on a share of the labels."""

FEW_LABELS_PENALTY = 1.0
"""lambda in the logistic probe's C = 1 / (n lambda) where there are fewer than two labels per
class, so none to choose it on. With one image per class accuracy hardly depends on it."""

_SHARE_STREAM = 0x1ABE1


@dataclass(frozen=True)
class ProbeRow:
    """One probed number with its floors; accuracies are shares (0 to 1).

    `chance` is the largest class's share of the test images, `untrained` the same probe on the same
    architecture with random weights, `pixels` on the pixels themselves (at most 32 x 32); None
    where no floors were asked for. Intervals are 95 % Wilson intervals over the test images; they
    say nothing about other seeds. With images held out, "test" is those of them.
    """

    encoder: str
    data: str
    target: str
    protocol: str
    accuracy: float
    interval: tuple[float, float]
    chance: float
    untrained: float | None
    untrained_interval: tuple[float, float] | None
    pixels: float | None
    pixels_interval: tuple[float, float] | None
    n_train: int
    """Of the share of the labels, where the protocol names one."""
    n_test: int
    n_classes: int
    settings: dict[str, Any]
    """Pooling, seed, image sizes (h, w), "scored_on" test or holdout, and what the probe chose."""
    seconds: float
    """Time to embed train and test and to fit; without the floors'."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)


def evaluate(
    refs: Encoder | str | Path | Sequence[Encoder | str | Path],
    data: str | Sequence[str],
    *,
    protocols: Sequence[str] = ("logistic",),
    targets: Sequence[str] | None = None,
    floors: bool = True,
    pool: Pool = "mean",
    limit: int | None = None,
    holdout: int = 0,
    img_size: tuple[int, int] | None = None,
    upscale: bool = False,
    seed: int = 0,
    untrained_seed: int | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[ProbeRow]:
    """Probe frozen encoders on labelled data sets (METHOD section 6).

    Images come at `img_size`, or at the size that `read_fitting` finds for the encoders. Probes are
    fitted and tuned on train; test is used once. The floors of a data set are computed once for
    each architecture (untrained) and once in all (pixels).

    Args:
        refs: encoders, or what `load` takes.
        data: names for `load_dataset`.
        protocols: logistic or knn, each also as NAME:PERCENT%, logistic:1% for instance: on that
            share of the training images (`labelled_share`), the same for an encoder and its floors.
        targets: by name; if None, all of a data set that have two classes or more.
        limit: at most so many training images, drawn by `seed`, each class in proportion.
        holdout: set so many training images aside (`ImageSet.split_off`) and score on them instead
            of on test, which is not even loaded: for searching settings.
        img_size: height and width of the images, for data sets with images of several sizes.
        upscale: enlarge images that are smaller than `img_size` instead of refusing them.
        seed: of that draw, the validation part, and the untrained encoder's weights, unless they
            have an `untrained_seed` of their own.
        cache_dir: keep the floors there, for other calls on equal data with equal settings.
        progress: called with a line of text before each part of the work.

    Returns rows by data set, encoder, target and protocol. Raises UserError for unlabelled data, an
    unknown protocol or target, or a target with one class.
    """
    check_protocols(protocols)
    refs = [refs] if isinstance(refs, Encoder | str | Path) else refs
    encoders = [ref.to(device) if isinstance(ref, Encoder) else load(ref, device) for ref in refs]
    say = progress or (lambda text: None)
    rows: list[ProbeRow] = []
    for name in [data] if isinstance(data, str) else data:

        def read(size: tuple[int, int] | None, upscale: bool, name: str = name) -> _Splits:
            return load_splits(name, holdout, data_root=data_root, img_size=size, upscale=upscale)

        fitting: dict[str, Any] = {"img_size": img_size, "upscale": upscale, "say": say}
        sizes = partial(list, {encoder.img_size for encoder in encoders})
        reading = partial(read_fitting, read, name, refs, sizes, **fitting)
        train, test = first_here(current(), reading)
        train = train.subset(limit, seed)
        chosen = choose_targets(train, test, targets)
        for line in _remarks(train, test, chosen):
            say(f"{name}: {line}")
        bench = _Bench(train, test, chosen, tuple(protocols), seed, device, cache_dir)
        fresh_seed = seed if untrained_seed is None else untrained_seed
        for row in bench.compare(encoders, pool, fresh_seed if floors else None, say):
            row.settings["scored_on"] = "holdout" if holdout else "test"
            rows.append(row)
    return rows


@dataclass(frozen=True)
class _Score:
    """Test accuracy of one probe, its training images, what it chose, and the time it took."""

    accuracy: float
    n_train: int
    settings: dict[str, Any]
    seconds: float


Scores = dict[tuple[str, str], _Score]
"""By target and protocol."""
_Splits = tuple[ImageSet, ImageSet]
Say = Callable[[str], object]


@dataclass(frozen=True)
class _Bench:
    """One data set with everything that encoder and floors are probed with alike."""

    train: ImageSet
    test: ImageSet
    targets: tuple[str, ...]
    protocols: tuple[str, ...]
    seed: int
    device: torch.device | str
    cache_dir: Path | None

    def scores(self, features: Callable[[ImageSet], Features]) -> Scores:
        """Fit every probe on `features` of train and score it on those of test."""
        train, test = features(self.train), features(self.test)
        space: Standardized | None = None  # all training features, once for all logistic probes
        found: Scores = {}
        for name in self.targets:
            labels = self.train.targets[name].values
            for protocol in self.protocols:
                start = time.perf_counter() - train.seconds - test.seconds
                kind, share = split_protocol(protocol)
                part = labelled_share(labels, share, self.seed)
                x: Any = train.x
                if len(part) < len(x):
                    x = x[part]
                elif kind == "logistic":
                    x = space = space or Standardized(x, self.device)
                probe = self._probe(kind, labels[part])
                try:
                    probe.fit(x, labels[part])
                except UserError as error:
                    raise UserError(f"{self.train.name}, target '{name}': {error}") from None
                accuracy = probe.score(test.x, self.test.targets[name].values)
                spent = time.perf_counter() - start
                found[name, protocol] = _Score(accuracy, len(part), probe.settings_, spent)
        return found

    def compare(
        self, encoders: Sequence[Encoder], pool: Pool, fresh_seed: int | None, say: Say
    ) -> Iterator[ProbeRow]:
        """Yield the rows of each encoder beside its floors; without a seed there are no floors."""
        name, pixels, untrained = self.train.name, Scores(), dict[str, Scores]()
        if fresh_seed is not None:
            say(f"{name}: raw pixels")
            pixels = self.floor("pixels", pixel_features)
        for encoder in encoders:
            say(f"{name}: {encoder.name}")
            say_enlarged(encoder, self.train.img_size, name, say)
            found = self.scores(partial(embed, encoder, pool=pool))
            kind = json.dumps([encoder.architecture, encoder.precision, pool, fresh_seed])
            if fresh_seed is not None and kind not in untrained:
                say(f"{name}: untrained encoder")
                fresh = encoder.untrained(fresh_seed)
                untrained[kind] = self.floor(kind, partial(embed, fresh, pool=pool))
            about = {"precision": encoder.precision, "img_size": encoder.img_size}
            about |= {"pool": pool, "seed": self.seed, "data_img_size": self.train.img_size}
            yield from self.rows(encoder.name, found, untrained.get(kind, {}), pixels, about)

    def _probe(self, kind: str, labels: np.ndarray) -> KNNProbe | LogisticProbe:
        if kind == "knn":
            return KNNProbe(device=self.device)
        few = len(labels) < 2 * len(np.unique(labels))
        C = 1 / (len(labels) * FEW_LABELS_PENALTY) if few else None
        return LogisticProbe(C, random_state=self.seed, device=self.device)

    def floor(self, kind: str, features: Callable[[ImageSet], Features]) -> Scores:
        """Return `scores`, from the cache if they were computed before."""
        if self.cache_dir is None:
            return self.scores(features)
        images = [self.train.fingerprint, self.test.fingerprint, len(self.train)]
        versions = sparsejepa.TRAIN_VERSION, sparsejepa.EVAL_VERSION
        about = [versions, kind, images, self.targets, self.protocols, self.seed]
        digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
        path = self.cache_dir / f"{digest.hexdigest()}.json"
        # Of several processes one reads and writes: all must agree on whether there is work to do.
        kept = on_main(current(), lambda: read_json(path) if path.exists() else None)
        if kept is None:
            found = self.scores(features)
            kept = [[name, protocol, asdict(score)] for (name, protocol), score in found.items()]
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            on_main(current(), lambda: write_text(path, json.dumps(kept) + "\n"))
        return {(name, protocol): _Score(**score) for name, protocol, score in kept}

    def rows(
        self, encoder: str, found: Scores, untrained: Scores, pixels: Scores, about: dict[str, Any]
    ) -> list[ProbeRow]:
        """Put an encoder's scores and their floors side by side."""
        n, rows = len(self.test), []
        for key, score in found.items():
            labels = self.test.targets[key[0]].values
            floors: dict[str, Any] = {}
            for name, scores in (("untrained", untrained), ("pixels", pixels)):
                below = scores[key].accuracy if scores else None
                floors[name] = below
                floors[f"{name}_interval"] = None if below is None else wilson_interval(below, n)
            rows.append(
                ProbeRow(
                    encoder,
                    self.train.name,
                    *key,
                    accuracy=score.accuracy,
                    interval=wilson_interval(score.accuracy, n),
                    chance=float(np.bincount(labels).max()) / n,
                    n_train=score.n_train,
                    n_test=n,
                    n_classes=len(self.train.targets[key[0]].names),
                    settings={**about, **score.settings},
                    seconds=score.seconds,
                    **floors,
                )
            )
        return rows


def check_protocols(protocols: Sequence[str]) -> None:
    """Raise UserError for a protocol that is not NAME or NAME:PERCENT%."""
    for protocol in protocols:
        split_protocol(protocol)


def split_protocol(protocol: str) -> tuple[str, float]:
    """Return name and share of the labels: "logistic:1%" is logistic at 0.01.

    Raises UserError for an unknown name or a share that is not above 0 and at most 100 %.
    """
    name, colon, share = protocol.partition(":")
    if name not in PROTOCOLS:
        hint = nearest(name, PROTOCOLS)
        raise UserError(f"--protocol {protocol}: there are {', '.join(PROTOCOLS)}{hint}")
    if not colon:
        return name, 1.0
    if not re.fullmatch(r"\d+(\.\d+)?%", share) or not 0 < float(share[:-1]) <= 100:
        raise UserError(
            f"--protocol {protocol}: a share of the labels is written {name}:10%, "
            "above 0 and at most 100 %"
        )
    return name, float(share[:-1]) / 100


def labelled_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return the ascending rows of a stratified `share` of labels [n], at least one of each class.

    Systematic sampling: each class is there in proportion within about one image, and a smaller
    share lies within a larger one.
    """
    rng = np.random.default_rng([seed % 2**64, _SHARE_STREAM])
    order = rng.permutation(len(labels))
    position = np.empty(len(labels))
    first = []
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        position[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
        first.append(rows[0])
    taken = np.argsort(position, kind="stable")[: round(share * len(labels))]
    return np.union1d(taken, first)


def load_splits(name: str, holdout: int, **settings: Any) -> tuple[ImageSet, ImageSet]:
    """Return what probes are fitted on and scored on; see `evaluate` for `holdout`.

    `settings` are those of `load_dataset`.
    """
    train = load_dataset(name, "train", **settings)
    return train.split_off(holdout) if holdout else (train, load_dataset(name, "test", **settings))


def _remarks(train: ImageSet, test: ImageSet, targets: Sequence[str]) -> list[str]:
    """Say which images are left out, and which classes only one split has."""
    lines = []
    for images in (train, test):
        if images.skipped:
            file, reason = images.skipped[0]
            many = f"{len(images.skipped)} {images.split} images are left out, the first is {file}"
            lines.append(f"{many} ({reason})")
    for name in targets:
        first, second = (_labels(images.targets[name]) for images in (train, test))
        parts = []
        for split, own, other in (("train", first, second), ("test", second, first)):
            if extra := sorted(set(own) - set(other)):
                more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
                listed = ", ".join(map(shown, extra[:5]))
                count = sum(own[label] for label in extra)
                parts.append(f"only in {split}: {listed}{more} ({count} images)")
        if parts:
            lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def _labels(target: Target) -> Counter[str]:
    """Return how many images carry each label."""
    return Counter(target.names[i] for i in target.values.tolist())


def choose_targets(train: ImageSet, test: ImageSet, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the targets to probe. Raises UserError if there is none, or not in both splits."""
    target(train.targets, None, train.name)  # labelled at all?
    if names is None:
        names = [k for k, t in train.targets.items() if len(set(t.values.tolist())) > 1]
        if not names:
            raise UserError(f"{train.name}: all images have the same label; a probe needs two")
    for name in names:
        for images in (train, test):
            target(images.targets, name, f"{images.name} ({images.split})")
    return tuple(names)
