"""Trackers show every row once, whatever happens in between, and no run depends on them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsejepa import cli
from sparsejepa.config import Config
from sparsejepa.errors import UserError
from sparsejepa.model.masks import MaskSampler
from sparsejepa.results import read_rows
from sparsejepa.training import loggers
from sparsejepa.training.loggers import Loggers, check_loggers
from sparsejepa.training.loop import pretrain
from sparsejepa.training.pictures import draw_gallery, draw_masks, draw_w
from tests.training.test_loop import config_of, launch, wait_for_steps

PICTURES = {"pictures/masks", "pictures/groups", "pictures/w"}


def merged(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The rows of metrics.jsonl by step."""
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(run_dir / "metrics.jsonl"):
        loggers.merge(rows.setdefault(row["step"], {}), row)
    return rows


def read_tensorboard(run_dir: Path) -> tuple[dict[str, dict[int, float]], set[str], list[str]]:
    """Return numbers by name and step, names of pictures and of texts, as TensorBoard reads them.

    No name has two values at a step.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    tags = found.Tags()
    numbers = {}
    for name in tags["scalars"]:
        steps = [event.step for event in found.Scalars(name)]
        assert steps == sorted(set(steps)), name
        numbers[name] = {event.step: event.value for event in found.Scalars(name)}
    return numbers, set(tags["images"]), tags["tensors"]


def check_tensorboard(run_dir: Path) -> None:
    """Every number of metrics.jsonl is there once."""
    numbers, images, _ = read_tensorboard(run_dir)
    assert images == PICTURES
    rows = merged(run_dir)
    for name, values in numbers.items():
        wanted = {step: row[name] for step, row in rows.items() if row.get(name) is not None}
        assert values.keys() == wanted.keys()
        if name != "images_per_second":  # of the attempt that showed it
            assert np.allclose(list(values.values()), [wanted[step] for step in values])
    assert {"loss", "lr", "knn", "rankme", "density"} <= numbers.keys()


def read_wandb(run_dir: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Return the ids and the rows of a run's offline files, in the order of writing.

    A file has blocks of 32 KiB with records of checksum, length and kind (whole, first, middle,
    last part of one), as LevelDB's logs do, after a header of 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2

    kinds: Any = wandb_internal_pb2

    ids, rows = set(), []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, at, part = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
            if kind not in (1, 4):
                continue
            record = kinds.Record.FromString(part)
            part = b""
            ids |= {record.run.run_id} - {""}
            if record.HasField("history"):
                items = {i.key or "/".join(i.nested_key): i for i in record.history.item}
                rows.append({k: json.loads(i.value_json) for k, i in items.items()})
    return ids, rows


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    import wandb

    wandb.teardown()


def test_every_row_and_picture_is_shown_and_no_weight_changes(
    folder: Path, tmp_path: Path, offline: None
) -> None:
    plain, shown = tmp_path / "plain", tmp_path / "shown"
    settings: dict[str, Any] = {"groups": "concept", "lam": 0.1, "drop_path": 0.2, "steps": 12}
    pretrain(config_of(folder, **settings), out=plain)
    pretrain(config_of(folder, **settings, log=("tensorboard", "wandb")), out=shown)
    for name in ("encoder.safetensors", "groups.safetensors"):
        a, b = load_file(plain / name), load_file(shown / name)
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert load_file(shown / "groups.safetensors")["rms"].gt(0).all()
    check_tensorboard(shown)
    assert "settings/text_summary" in read_tensorboard(shown)[2]
    ids, rows = read_wandb(shown)
    assert len(ids) == 1
    wanted = merged(shown)
    assert [row["_step"] for row in rows] == list(wanted)
    for row in rows:
        numbers = {k: v for k, v in wanted[row["_step"]].items() if v is not None and k != "step"}
        assert row.items() >= numbers.items()
    assert rows[-1].keys() >= {f"{name}/path" for name in PICTURES}
    assert len(list(shown.rglob("media/images/**/*.png"))) >= 3
    assert not (plain / "tensorboard").exists() and not (plain / "loggers.json").exists()


def test_a_killed_run_goes_on_in_the_same_log(folder: Path, tmp_path: Path, offline: None) -> None:
    """TensorBoard from the start, wandb from the resumption: it gets what it missed."""
    config = config_of(
        folder, steps=40, log_every=1, checkpoint_every=10, eval_every=5, log=("tensorboard",)
    )
    out = tmp_path / "run"
    process = launch(config, out)
    wait_for_steps(out, process, 16)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((out / "loggers.json").read_text())["shown"]["tensorboard"] >= 15
    last = config.replace(log=("tensorboard", "wandb"))
    pretrain(last, out=out, resume=True)
    check_tensorboard(out)
    _, rows = read_wandb(out)
    assert [row["_step"] for row in rows] == list(range(40))


class Recorder:
    """A tracker in memory; it fails where it is told to."""

    rows: dict[int, dict[str, Any]]
    fail: str = ""

    def __init__(self, about: Any) -> None:
        self.fails("begin")
        type(self).rows = {}

    def fails(self, where: str) -> None:
        if where == self.fail:
            raise OSError("No space left\non device")

    def show(self, step: int, values: Any) -> None:
        self.fails("show")
        assert step not in self.rows
        self.rows[step] = dict(values)

    def close(self, complete: bool) -> None:
        self.fails("close")


@pytest.mark.parametrize("where", ["begin", "show", "close"])
def test_a_tracker_that_fails_is_named_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    failing = type("Failing", (Recorder,), {"fail": where})
    monkeypatch.setattr(loggers, "TRACKERS", {"wandb": failing, "trackio": Recorder})
    said: list[str] = []
    with Loggers(("wandb", "trackio"), tmp_path, Config(), [], said.append) as shown:
        for step in (3, 7):
            shown.show({"step": step, "loss": 1.0, "knn": None})
    assert said == ["--log wandb: No space left on device; the run goes on without it"]
    assert Recorder.rows == {3: {"loss": 1.0}, 7: {"loss": 1.0}}
    note = json.loads((tmp_path / "loggers.json").read_text())
    assert note["shown"] == {"trackio": 7} | ({"wandb": 7} if where == "close" else {})


def test_alarms_of_a_step_are_one_text_and_missed_rows_are_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "TRACKERS", {"wandb": Recorder})
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "alarm": "a"}, {"step": 1, "alarm": "b"}]
    (tmp_path / "loggers.json").write_text('{"id": "x", "shown": {"wandb": 0}}')
    Loggers(("wandb",), tmp_path, Config(), [{"step": 0, "loss": 3.0}, *rows], print)
    assert Recorder.rows == {1: {"loss": 2.0, "alarm": "a\nb"}}
    (tmp_path / "loggers.json").write_text('{"id": "x", "shown": [1]}')  # damaged: shown anew
    Loggers(("wandb",), tmp_path, Config(), rows, print)
    assert list(Recorder.rows) == [1]


def test_without_login_or_network_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(loggers, "_START_SECONDS", 2)
    words = ["pretrain", str(folder), "--preset", "nano", "--steps", "2", "--batch-size", "16",
             "--predictor-depth", "1", "--device", "cpu", "--log", "wandb"]  # fmt: skip
    assert cli.main([*words, "--out", str(tmp_path / "a")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--log wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline; the" in said
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert cli.main([*words, "--out", str(tmp_path / "b")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--log wandb: " in said and "the run goes on without it" in said
    import wandb

    wandb.teardown()


class Image:
    def __init__(self, pixels: np.ndarray) -> None:
        assert pixels.dtype == np.uint8


def test_trackio_is_asked_as_it_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in with the arguments that trackio has, whose words stay off standard output."""
    asked: list[Any] = []

    def init(**arguments: Any) -> Any:
        print("* Created new run")
        asked.append(arguments)
        return SimpleNamespace(log=lambda values, step: asked.append((step, values)))

    def finish() -> None:
        print("* Run finished")
        asked.append("finished")

    module = SimpleNamespace(init=init, Image=Image, finish=finish)
    monkeypatch.setitem(sys.modules, "trackio", module)
    with Loggers(("trackio",), tmp_path / "r", Config(), [], pytest.fail) as shown:
        (tmp_path / "r").mkdir()
        shown.show({"step": 4, "loss": 1.0, "picture": np.zeros((2, 2, 3), np.uint8)})
    begun, (step, values), end = asked
    assert begun["project"] == "sparsejepa" and begun["name"].startswith("r-")
    assert begun["resume"] == "allow" and begun["embed"] is False
    assert step == 4 and values["loss"] == 1.0 and isinstance(values["picture"], Image)
    assert end == "finished" and capsys.readouterr().out == ""


def test_unknown_and_missing_trackers_are_named_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"--log wandbb: unknown \(did you mean 'wandb'\?\)"):
        config_of(folder, log=("wandbb",)).check()
    assert config_of(folder, log="wandb").check().run.log == ("wandb",)
    # Not there, and there only as a folder of runs in the working directory.
    for found in (None, ModuleSpec("trackio", None)):
        monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(UserError, match=r"pip install 'sparsejepa\[trackio\]', or leave"):
            check_loggers(("trackio",))
    with pytest.raises(UserError, match="--log tensorboard: not installed"):
        pretrain(config_of(folder, log="tensorboard"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_are_drawn_to_the_pixel() -> None:
    images = np.full((3, 16, 24, 3), 40, np.uint8)
    images[2] = 200
    grid = (4, 6)
    masks = MaskSampler(grid).sample(3, seed=0, step=0)
    drawn = draw_masks(images, masks, grid)
    assert drawn.dtype == np.uint8 and drawn.shape == (56, 4 + 3 * 76, 3)  # enlarged 3 times
    tile = drawn[4:52, 4:76]
    context = np.isin(np.arange(24), masks.context[0].numpy()).reshape(grid)
    for (row, col), seen in np.ndenumerate(context):
        pixels = tile[12 * row : 12 * row + 12, 12 * col : 12 * col + 12].reshape(-1, 3)
        assert (pixels == 40).all() if seen else not (pixels == 40).any()
    # Image 2 excites group 0 most, in patch 7; group 1 is dead.
    activations = np.zeros((3, 24, 2))
    activations[2, 7, 0], activations[0, 3, 0] = 2.0, 1.0
    drawn = draw_gallery(images, activations, grid, None)
    first, third = drawn[4:52, 36:108], drawn[56:104, 36:108]
    assert (first[0, 0] == 200).all() and (third == 235).all()
    framed = (first == (224, 130, 20)).all(-1)
    y, x = np.nonzero(framed)
    assert (y.min(), y.max(), x.min(), x.max()) == (12, 23, 12, 23) and framed.sum() == 80
    # Regions: what the group predicts has the frame.
    cells = np.repeat([0, 0, 1, 1], 6)
    drawn = draw_gallery(images, activations.max(1, keepdims=True), grid, cells)
    y, x = np.nonzero((drawn[4:52, 36:108] == (224, 130, 20)).all(-1))
    assert (y.min(), y.max(), x.min(), x.max()) == (0, 23, 0, 71)
    norms = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    rows = draw_w(norms)[[6, 18]][:, ::192]
    assert (rows == 255).all(-1).tolist() == [[False, False, True], [True, True, False]]
    assert rows[0, 0, 0] < rows[0, 1, 0]  # the stronger one comes first
